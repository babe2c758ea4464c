"""The law: geometry changes nothing that is learned. And the check that says so can fail."""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxaccum.accumulate import (
    Geometry,
    GeometryError,
    Objective,
    Recipe,
    equivalence,
    grouped,
    make_engine,
    update,
)
from jaxaccum.accumulate.recipe import Window

UPDATES = 3


def run(geometry, nbs=8, bn_group=4, *, forward=None, objective=Objective, amount=1.0):
    dtype = np.float64 if jax.config.jax_enable_x64 else np.float32
    recipe = Recipe(nbs, bn_group)
    return equivalence.trace(
        forward or toy.make_forward(), toy.make_rule(nbs, objective), recipe, geometry,
        *toy.initial(dtype), toy.make_batches(nbs, dtype, amount=amount), UPDATES,
    )  # fmt: skip


@functools.cache
def reference(x64, nbs=8, bn_group=4, amount=1.0):
    """The whole effective batch as one microbatch (of whole groups)."""
    assert jax.config.jax_enable_x64 == x64
    size = nbs if bn_group == "frozen" else -(-nbs // bn_group) * bn_group
    return run(Geometry(size), nbs, bn_group, amount=amount)


def assert_one_run(found, x64):
    assert equivalence.within(found, equivalence.Tolerance.of(x64)), found


@pytest.mark.parametrize("engine", ["scan", "multisteps"])
@pytest.mark.parametrize("devices", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("bn_group", "microbatch"),
    [("frozen", 1), ("frozen", 2), ("frozen", 4), ("frozen", 8), (4, 4), (4, 8)],
)
def test_every_geometry_is_one_run_float64(x64, microbatch, devices, engine, bn_group):
    nbs = 11  # not a multiple of any of them: uneven tails
    trace = run(Geometry(microbatch, devices, engine), nbs, bn_group)
    assert_one_run(equivalence.differences(trace, reference(True, nbs, bn_group)), True)


@pytest.mark.parametrize("engine", ["scan", "multisteps"])
def test_one_run_float32(engine):
    found = equivalence.differences(run(Geometry(4, 2, engine)), reference(False))
    assert_one_run(found, False)


def test_whole_batch_statistics(x64):
    """bn_group "all" is one group of the effective batch."""
    found = equivalence.differences(run(Geometry(8), 8, "all"), reference(True, 8, 8))
    assert_one_run(found, True)


def test_denominator_below_its_floor(x64):
    """With almost no objects the sum of the window is below 1, and is clamped once."""
    whole = reference(True, amount=0.11)
    assert 0 < whole.logs[0]["sums/objects"] < 1
    for geometry in (Geometry(4), Geometry(4, 2, "multisteps")):
        assert_one_run(equivalence.differences(run(geometry, amount=0.11), whole), True)


def losing(rows, filled_with):
    """Effective batches in which some samples were lost: weight 0, the arrays of another sample."""

    def batches():
        for batch in toy.make_batches(11, np.float64)():
            for name in ("x", "y", "objects"):
                batch[name][rows] = batch[name][filled_with]
            batch["weight"][rows] = 0
            yield batch

    return batches


@pytest.mark.parametrize("bn_group", ["frozen", 4])
def test_samples_that_were_lost_are_lost_on_every_geometry(x64, bn_group):
    """One in a group, and a whole group; what fills their places counts for nothing."""

    def trace(geometry, filled_with=0):
        recipe, lost = Recipe(11, bn_group), [1, 4, 5, 6, 7]
        return equivalence.trace(
            toy.make_forward(), toy.make_rule(11), recipe, geometry,
            *toy.initial(np.float64), losing(lost, filled_with), UPDATES,
        )  # fmt: skip

    whole = trace(Geometry(12))
    nothing_lost = equivalence.differences(reference(True, 11, bn_group), whole)
    assert nothing_lost["gradient"] > 1e-3
    for geometry, filled_with in (
        (Geometry(12), 9), (Geometry(4), 0), (Geometry(4, 2), 9), (Geometry(4, 2, "multisteps"), 9),
    ):  # fmt: skip
        assert_one_run(equivalence.differences(trace(geometry, filled_with), whole), True)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    nbs=st.integers(1, 12), microbatch=st.integers(1, 6), devices=st.sampled_from([1, 2, 4]),
    engine=st.sampled_from(["scan", "multisteps"]),
)  # fmt: skip
def test_any_geometry(nbs, microbatch, devices, engine):
    with jax.enable_x64(True):
        found = equivalence.differences(
            run(Geometry(microbatch, devices, engine), nbs, "frozen"),
            run(Geometry(nbs), nbs, "frozen"),
        )
        assert_one_run(found, True)


# --- The check must notice a broken core. ---


class DividesPerMicrobatch(Objective):
    """Each microbatch by its own denominator, then averaged: the usual trainers."""

    def sums(self, forward, params, stats, batch, coupling=None):
        sums = super().sums(forward, params, stats, batch)
        return sums._replace(
            gradients={
                n: jax.tree.map(
                    lambda g, n=n: g / self.divisor(n, sums.denominators) * sums.samples, tree
                )
                for n, tree in sums.gradients.items()
            },
        )

    def gradient(self, sums):
        parts = sums.gradients.values()
        return jax.tree.map(lambda *g: sum(g) * self.scale / sums.samples, *parts)


class ClampsPerMicrobatch(Objective):
    """Denominators floored in every microbatch instead of once."""

    def sums(self, forward, params, stats, batch, coupling=None):
        sums = super().sums(forward, params, stats, batch)
        return sums._replace(
            denominators={n: self.divisor(n, sums.denominators) for n in sums.denominators}
        )


class AveragesInsteadOfSums(Objective):
    """The numerators' gradient as a mean over microbatches."""

    def sums(self, forward, params, stats, batch, coupling=None):
        sums = super().sums(forward, params, stats, batch)
        share = batch["weight"].shape[0] / self.scale  # 1 / number of microbatches
        return sums._replace(gradients=jax.tree.map(lambda g: g * share, sums.gradients))


forward = toy.make_forward
BROKEN = {  # name: (how `run` is called, effective batch, bn_group)
    "divide per microbatch": (dict(objective=DividesPerMicrobatch), 8, 4),
    "clamp per microbatch": (dict(objective=ClampsPerMicrobatch, amount=0.11), 8, 4),
    "mean instead of sum": (dict(objective=AveragesInsteadOfSums), 8, 4),
    "statistics per microbatch": (dict(forward=forward(group_of=lambda size: size)), 8, 4),
    "noise by place": (dict(forward=forward(by_place=True)), 8, 4),
    "padding not masked": (dict(forward=forward(mask=False)), 10, "frozen"),
}


@functools.cache
def broken_reference(name):
    options, nbs, bn_group = BROKEN[name]
    return run(Geometry(nbs), nbs, bn_group, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("geometry", [Geometry(4, 2), Geometry(4, 1, "multisteps")], ids=str)
def test_the_check_notices(x64, name, geometry):
    options, nbs, bn_group = BROKEN[name]
    trace = run(geometry, nbs, bn_group, **options)
    found = equivalence.differences(trace, broken_reference(name))
    assert not equivalence.within(found, equivalence.Tolerance.of(True)), found
    assert found["gradient"] > 1e-3


def in_bfloat16(forward):
    """The task with a network that computes in bfloat16."""
    return lambda params, stats, batch, groups: forward(
        params, stats, batch | {"x": batch["x"].astype(jnp.bfloat16)}, groups
    )


def rounded(nbs, bn_group, forward=None, **options):
    """(the task in bfloat16, its run as one microbatch, how far geometries may be from that)."""
    forward = forward or toy.make_forward()
    task = in_bfloat16(forward)
    whole = run(Geometry(nbs), nbs, bn_group, forward=task, **options)
    exact = run(Geometry(nbs), nbs, bn_group, forward=forward, **options)
    found = equivalence.differences(whole, exact)
    assert found["gradient"] < 0.02  # else nothing could be told from rounding
    return task, whole, equivalence.Tolerance.of_rounding("bfloat16", found)


@functools.cache
def rounded_once():
    return rounded(8, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "geometry",
    [Geometry(4), Geometry(4, 2), Geometry(4, 1, "multisteps"), Geometry(1, 4), Geometry(2, 4)],
    ids=str,
)
def test_one_run_bfloat16(geometry):
    """To the rounding of a microbatch's gradient, which is more than float32 would allow."""
    task, whole, tolerance = rounded_once()
    found = equivalence.differences(run(geometry, forward=task), whole)
    assert equivalence.within(found, tolerance), (found, tolerance)
    assert not equivalence.within(found, equivalence.Tolerance.of(False)), found


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["divide per microbatch", "mean instead of sum", "statistics per microbatch"]
)
def test_the_check_notices_in_bfloat16(name):
    options, nbs, bn_group = BROKEN[name]
    task, whole, tolerance = rounded(nbs, bn_group, **options)
    broken = run(Geometry(4, 2), nbs, bn_group, **options | {"forward": task})
    found = equivalence.differences(broken, whole)
    assert not equivalence.within(found, tolerance)
    assert found["gradient"] > 1.5 * tolerance.gradient, (found, tolerance)


def test_the_tolerance_of_rounding():
    """Half as much again as from float32, and never less than float32 has."""
    found = {"gradient": 0.01, "first loss": 0.5, "parameters": 0.5}
    tolerance = equivalence.Tolerance.of_rounding("bfloat16", found)
    assert tolerance == equivalence.Tolerance(0.015, None, 2**-6)
    assert equivalence.within({"gradient": 0.014, "first loss": 0.01, "parameters": 9}, tolerance)
    assert not equivalence.within({"gradient": 0.016, "first loss": 0.01}, tolerance)
    assert not equivalence.within({"gradient": 0.014, "first loss": 0.02}, tolerance)
    exact = equivalence.Tolerance.of_rounding("tf32", {"gradient": 0.0})
    assert exact == equivalence.Tolerance(1e-5, None, 2**-9)


def test_every_difference_is_of_its_own_part():
    one = equivalence.Trace(
        [np.ones(2)], [np.ones(3)], [np.ones(4)], [np.ones(5)],
        [{"loss": 1.0, "loss/a": 1.0, "samples": 4.0}, {"loss": 2.0, "loss/a": 2.0}],
    )  # fmt: skip
    assert not any(equivalence.differences(one, one).values())
    first, later = ([dict(log) for log in one.logs] for _ in range(2))
    first[0]["loss"], later[1]["loss"] = 1.5, 2.5
    for changed, parts in (
        (one._replace(gradient=[np.full(2, 1.5)]), {"gradient": 0.5}),
        (one._replace(params=[np.full(3, 1.5)]), {"parameters": 0.5}),
        (one._replace(stats=[np.full(4, 1.5)]), {"statistics": 0.5}),
        (one._replace(ema=[np.full(5, 1.5)]), {"average": 0.5}),
        (one._replace(logs=first), {"first loss": 0.5 / 2**0.5, "losses": 0.5 / 10**0.5}),
        (one._replace(logs=later), {"losses": 0.5 / 10**0.5}),
    ):
        found = equivalence.differences(changed, one)
        assert {k: v for k, v in found.items() if v} == pytest.approx(parts, rel=1e-12)
    broken = equivalence.differences(one._replace(params=[np.full(3, np.nan)]), one)
    assert broken["parameters"] == np.inf


def test_the_verdict_names_what_differs():
    rows = (
        (Geometry(4, 2, fsdp=2), {"gradient": 1e-13, "loss": 0.0}),
        (Geometry(2, 1, "multisteps"), {"gradient": 1e-13, "loss": 1e-11}),
    )
    verdict = equivalence.Verdict(Geometry(8), rows, 1e-12)
    head, fine, other, said = str(verdict).splitlines()
    assert head.startswith("from 8 scan") and head.split()[-2:] == ["gradient", "loss"]
    assert fine.startswith("4 x 2 devices scan, fsdp 2") and "one run" in fine
    assert other.startswith("2 multisteps") and "ANOTHER" in other
    assert said.startswith("Differences up to 1e-12 are rounding") and "float32" not in said
    assert not verdict.ok
    assert equivalence.Verdict(Geometry(8), rows[:1], 1e-12).ok


@pytest.mark.parametrize("engine", ["scan", "multisteps"])
def test_the_check_notices_a_double_reduction(x64, monkeypatch, engine):
    expected, once = reference(True), jax.lax.psum

    def twice(tree, axis):
        again = jax.tree.map(lambda a: jax.lax.pcast(a, axis, to="varying"), once(tree, axis))
        return once(again, axis)

    monkeypatch.setattr(jax.lax, "psum", twice)
    found = equivalence.differences(run(Geometry(4, 2, engine)), expected)
    assert not equivalence.within(found, equivalence.Tolerance.of(True)), found


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["scan", "multisteps"])
def test_the_check_notices_statistics_moved_per_microbatch(x64, monkeypatch, engine):
    """Running statistics that move twice in a window of two microbatches."""
    from jaxaccum.accumulate import batchnorm

    expected = reference(True)
    merged = batchnorm.move_statistics

    def twice(stats, moments, momentum):
        return merged(merged(stats, moments, momentum), moments, momentum)

    monkeypatch.setattr(update, "batchnorm", types.SimpleNamespace(move_statistics=twice))
    found = equivalence.differences(run(Geometry(4, 1, engine)), expected)
    assert found["statistics"] > 1e-6


# --- What the engines promise beside it. ---


@pytest.mark.parametrize("engine", [pytest.param("scan", marks=pytest.mark.slow), "multisteps"])
def test_a_window_that_is_not_finite_is_skipped(engine):
    recipe = Recipe(8, 4)
    rule = toy.make_rule(8)
    machine = make_engine(toy.make_forward(), rule, Window(recipe, Geometry(4, 2, engine)))
    state = machine.init(*toy.initial(np.float32))
    before = jax.device_get(state)
    batches = toy.make_batches(8, np.float32)()
    bad = next(batches)
    bad["x"][5] = np.nan
    state, log = machine.update(state, bad)
    assert not log["ok"]
    assert (int(state.step), int(state.windows), int(state.skipped_in_row)) == (0, 1, 1)
    for name in ("params", "stats", "opt_state", "ema"):
        assert equivalence.distance(getattr(state, name), getattr(before, name)) == 0, name
    state, log = machine.update(state, next(batches))  # and leaves nothing behind
    assert log["ok"] and np.isfinite(log["loss"])
    assert (int(state.step), int(state.windows), int(state.skipped_in_row)) == (1, 2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["scan", "multisteps"])
def test_a_ramp_of_the_effective_batch(x64, engine):
    """A smaller effective batch in the room of the full one, without a second compilation."""
    machine = make_engine(
        toy.make_forward(), toy.make_rule(8), Window(Recipe(8, 4), Geometry(4, 1, engine))
    )
    state = machine.init(*toy.initial(np.float64))
    batch = next(toy.make_batches(8, np.float64)())
    half = {k: v[:4] for k, v in batch.items()}
    ramped, _ = machine.update(state, half, steps=1)

    whole = make_engine(toy.make_forward(), toy.make_rule(8), Window(Recipe(4, 4), Geometry(4)))
    expected, _ = whole.update(whole.init(*toy.initial(np.float64)), half)
    assert equivalence.distance(ramped.params, expected.params) < 1e-14
    if engine == "scan":
        with jax.no_tracing():
            machine.update(ramped, batch)


@pytest.mark.parametrize("engine", ["scan", "multisteps"])
@pytest.mark.parametrize(
    ("samples", "steps", "said"),
    [
        (8, 1, "8 samples in 1 microbatches of 4: the window has 2"),
        (9, None, "9 samples in 2 microbatches of 4"),
        (8, 3, "8 samples in 3 microbatches of 4: the window has 2"),
    ],
)
def test_what_the_window_has_no_room_for_is_refused(engine, samples, steps, said):
    """Not left out, and no microbatch is computed twice."""
    machine = make_engine(
        toy.make_forward(), toy.make_rule(8), Window(Recipe(8, 4), Geometry(4, 1, engine))
    )
    batch = next(toy.make_batches(samples, np.float32)())
    with pytest.raises(GeometryError, match=said):
        machine.update(machine.init(*toy.initial(np.float32)), batch, steps=steps)


@pytest.mark.parametrize("engine", ["scan", "multisteps"])
def test_several_processes_compute_whole_windows_only(monkeypatch, engine):
    """A shorter window would leave out the last samples of every process's share."""
    with monkeypatch.context() as one_of_two:
        one_of_two.setattr(jax, "process_count", lambda: 2)
        machine = make_engine(
            toy.make_forward(), toy.make_rule(8), Window(Recipe(8, 4), Geometry(4, 1, engine))
        )
    assert machine.share.tolist() == list(range(8))
    state = machine.init(*toy.initial(np.float32))
    batch = next(toy.make_batches(8, np.float32)())
    with pytest.raises(GeometryError, match=r"1 microbatches of a window of 2: .*whole windows"):
        machine.update(state, batch, steps=1)
    state, _ = machine.update(state, batch, steps=2)
    assert int(state.step) == 1


def test_the_gradient_is_that_of_the_ratio(x64):
    """Against plain autodiff of the loss over the whole effective batch."""
    nbs, forward = 8, toy.make_forward()
    params, stats = toy.initial(np.float64)
    batch = next(toy.make_batches(nbs, np.float64)())

    def loss(params):
        out = forward(params, stats, batch, None)
        fit = 2.0 * out.numerators["fit"] / jnp.maximum(out.denominators["objects"], 1)
        calm = 0.5 * out.numerators["calm"] / jnp.maximum(out.denominators["points"], 1)
        return nbs * (fit + calm)

    expected = jax.grad(loss)(params)
    trace = run(Geometry(2, 2), nbs, "frozen")
    assert equivalence.distance(trace.gradient, expected) < 1e-12
    assert trace.logs[0]["loss"] == pytest.approx(float(loss(params)) / nbs, rel=1e-12)


def test_sums_are_as_wide_as_the_numerators(x64):
    """Weights in float32 narrow nothing: `optax.MultiSteps` adds everything up in one dtype."""
    batch = next(toy.make_batches(8, np.float64)())
    batch["weight"] = batch["weight"].astype(np.float32)
    sums = toy.make_rule(8).objective.sums(
        grouped(toy.make_forward(), None), *toy.initial(np.float64), batch
    )
    assert {a.dtype for a in jax.tree.leaves(sums)} == {np.dtype(np.float64)}


def test_clipping_acts_once_on_the_divided_gradient(x64):
    rule = dataclasses.replace(
        toy.make_rule(8), optimizer=optax.scale(-1.0), clip=0.01, ema_decay=None
    )
    machine = make_engine(toy.make_forward(), rule, Window(Recipe(8, 4), Geometry(4)))
    params, stats = toy.initial(np.float64)
    state, log = machine.update(
        machine.init(params, stats), next(toy.make_batches(8, np.float64)())
    )
    assert log["grad_norm"] > 0.01
    moved = jax.tree.map(np.subtract, jax.device_get(state.params), params)
    assert float(optax.tree.norm(moved)) == pytest.approx(0.01, rel=1e-9)
