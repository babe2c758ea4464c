"""The usual trainers' accumulation is what its formula says, against plain autodiff."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from jaxaccum.accumulate import (
    Geometry,
    GeometryError,
    Groups,
    Recipe,
    Window,
    batchnorm,
    equivalence,
    make_engine,
    usual_rule,
)

NBS, MICROBATCH = 8, 4
usual = usual_rule.UsualObjective


def trace(geometry, bn_group=MICROBATCH):
    return equivalence.trace(
        toy.make_forward(), toy.make_rule(NBS, usual), Recipe(NBS, bn_group), geometry,
        *toy.initial(np.float64), toy.make_batches(NBS, np.float64), 1,
    )  # fmt: skip


def microbatches():
    batch = next(toy.make_batches(NBS, np.float64)())
    return [{k: v[i : i + MICROBATCH] for k, v in batch.items()} for i in (0, MICROBATCH)]


def loss(params, batch, bn_group=MICROBATCH):
    groups = None if bn_group == "frozen" else Groups(bn_group, jnp.asarray(batch["weight"]))
    out = toy.make_forward()(params, toy.initial(np.float64)[1], batch, groups)
    fit = 2.0 * out.numerators["fit"] / jnp.maximum(out.denominators["objects"], 1)
    return fit + 0.5 * out.numerators["calm"] / jnp.maximum(out.denominators["points"], 1), out


@pytest.mark.slow
@pytest.mark.parametrize("bn_group", [MICROBATCH, "frozen"])
@pytest.mark.parametrize("devices", [1, 2])
def test_every_microbatch_divides_by_its_own_denominators(x64, devices, bn_group):
    params, _ = toy.initial(np.float64)
    whole = functools.partial(loss, bn_group=bn_group)
    found = [jax.value_and_grad(whole, has_aux=True)(params, one) for one in microbatches()]
    expected = jax.tree.map(lambda *g: MICROBATCH * sum(g), *(g for _, g in found))
    made = trace(Geometry(MICROBATCH, devices), bn_group)
    assert equivalence.distance(made.gradient, expected) < 1e-12
    assert made.logs[0]["loss"] == pytest.approx(np.mean([v for (v, _), _ in found]), rel=1e-12)


def test_every_microbatch_moves_the_statistics(x64):
    """On one device one after the other; devices move their own, and take the mean."""
    params, before = toy.initial(np.float64)
    moments = [loss(params, one)[1].moments for one in microbatches()]
    move = functools.partial(batchnorm.move_statistics, momentum=0.03)
    in_turn = functools.reduce(move, moments, before)
    assert equivalence.distance(trace(Geometry(MICROBATCH)).stats, in_turn) < 1e-12
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *(move(before, m) for m in moments))
    assert equivalence.distance(trace(Geometry(MICROBATCH, 2)).stats, mean) < 1e-12


def test_the_rate_of_the_statistics_is_that_of_the_update(x64):
    """By updates done before: the first takes the first."""
    rule = dataclasses.replace(
        toy.make_rule(NBS, usual), statistics_momentum=lambda step: jnp.asarray([0.5, 0.25])[step]
    )
    made = make_engine(
        toy.make_forward(), rule, Window(Recipe(NBS, MICROBATCH), Geometry(MICROBATCH))
    )
    params, before = toy.initial(np.float64)
    moments = [loss(params, one)[1].moments for one in microbatches()]
    move = functools.partial(batchnorm.move_statistics, momentum=0.5)
    state, _ = made.update(made.init(params, before), next(toy.make_batches(NBS, np.float64)()))
    assert equivalence.distance(state.stats, functools.reduce(move, moments, before)) < 1e-12


def test_where_it_cannot_be_computed(monkeypatch):
    def engine(geometry):
        return make_engine(
            toy.make_forward(), toy.make_rule(NBS, usual), Window(Recipe(NBS, 4), geometry)
        )

    with pytest.raises(GeometryError, match="a rule of the scan engine: set engine to 'scan'"):
        engine(Geometry(4, 1, "multisteps"))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(GeometryError, match="compat is a rule to compare with"):
        engine(Geometry(4))


def test_no_noise_scale_of_it():
    with pytest.raises(ValueError, match="of the exact rule"):
        usual((), {}, noise=True)


def test_the_same_terms():
    exact = toy.make_rule(NBS).objective
    made = usual.of(exact)
    assert (made.terms, made.floors, made.scale) == (exact.terms, exact.floors, exact.scale)


def test_the_recipe_that_is_run():
    sizes = usual_rule.window_sizes(10, 4, 40, 0, lambda updates: None)
    assert [sizes.of(i) for i in range(sizes.updates)] == [8] * 5  # round(10 / 4) batches of 4
    run = usual_rule.recipe(Recipe(10, 2, {"seed": 1}), sizes, 4)
    assert run == Recipe(8, 4, {"seed": 1})
    assert usual_rule.recipe(Recipe(10, "frozen"), sizes, 4) == Recipe(8, "frozen")


def test_the_ramp_says_how_many_updates_there_are():
    asked = []
    sizes = usual_rule.window_sizes(16, 4, 64, 8, asked.append)
    assert sizes.of(0) == 4 and sizes.of(sizes.updates - 1) == 16
    assert asked[-1] == sizes.updates and max(asked) == sizes.updates
    assert sizes.ramp.tolist() == [4, 4, 8, 12, 16]  # 11 batches, the last begun in the warm-up
    assert (sizes.each, sizes.updates) == (16, 7)
