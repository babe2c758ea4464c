"""The gradient noise scale: against per-sample gradients, on every geometry, in both engines."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_completion
import toy
from tiny import tiny_config

from jaxaccum import config as configs
from jaxaccum import train
from jaxaccum.accumulate import (
    Coupled,
    Geometry,
    Objective,
    Output,
    Recipe,
    Term,
    UpdateRule,
    Window,
    grouped,
    make_engine,
)  # fmt: skip
from jaxaccum.accumulate.noise import NoiseScale
from jaxaccum.training import run

WIDTH, NBS = 5, 24
TRUE_GRADIENT = np.linspace(0.2, 1.0, WIDTH)
SPREAD = 0.7  # standard deviation of one sample's gradient in each coordinate


def linear(params, stats, batch, groups):
    """A loss whose gradient for a sample is the sample."""
    weight = batch["weight"]
    value = jnp.sum(weight * (batch["x"] @ params["w"]))
    return Output({"linear": value}, {"samples": jnp.sum(weight)}, {})


def engine_of(microbatch, devices=1, engine="scan", scale=1.0):
    objective = Objective(
        (Term("linear", 1.0, "samples"),), {"samples": 1.0}, scale=scale, noise=True
    )
    rule = UpdateRule(objective, optax.sgd(0.0), statistics_momentum=lambda step: 0.1)
    window = Window(Recipe(NBS, "frozen"), Geometry(microbatch, devices, engine))
    return make_engine(linear, rule, window)


def batch_of(rng):
    x = TRUE_GRADIENT + SPREAD * rng.standard_normal((NBS, WIDTH))
    return {"x": x.astype(np.float32), "weight": np.ones(NBS, np.float32)}


def by_hand(x, microbatch):
    """Both estimates from the gradients of samples, one by one, by the formulas of the paper's
    appendix A.1 generalised to an uneven last microbatch."""
    parts = [x[i : i + microbatch] for i in range(0, len(x), microbatch)]
    sizes = np.array([len(p) for p in parts])
    q = np.sum(sizes**2) / len(x) ** 2
    s = sum(np.sum((p.sum(0) / len(x)) ** 2) for p in parts)
    whole = np.sum(x.mean(0) ** 2)
    return len(x) * (s - q * whole) / (1 - q), (whole - s) / (1 - q)


@pytest.mark.parametrize("scale", [1.0, 24.0])
@pytest.mark.parametrize(
    ("microbatch", "devices", "engine"),
    [(4, 1, "scan"), (4, 1, "multisteps"), (3, 2, "scan"), (5, 1, "scan"), (2, 4, "multisteps")],
)
def test_the_formula(microbatch, devices, engine, scale):
    made = engine_of(microbatch, devices, engine, scale)
    batch = batch_of(np.random.default_rng(0))
    _, log = made.update(made.init({"w": np.zeros(WIDTH, np.float32)}, {}), batch)
    trace, square = by_hand(batch["x"].astype(np.float64), microbatch)
    assert float(log["noise/trace"]) == pytest.approx(trace, rel=1e-4)
    assert float(log["noise/square"]) == pytest.approx(square, rel=1e-4)


@pytest.mark.parametrize("microbatch", [1, 6, 12])
def test_no_bias_at_any_microbatch(microbatch):
    rng = np.random.default_rng(microbatch)
    found = np.mean(
        [
            by_hand(TRUE_GRADIENT + SPREAD * rng.standard_normal((NBS, WIDTH)), microbatch)
            for _ in range(4000)
        ],
        axis=0,
    )
    assert found[0] == pytest.approx(WIDTH * SPREAD**2, rel=0.05)
    assert found[1] == pytest.approx(np.sum(TRUE_GRADIENT**2), rel=0.05)


def test_two_denominators_are_one_gradient():
    """The toy divides two terms by two denominators; the products must add up to its gradient's."""
    window = Window(Recipe(8, "frozen"), Geometry(2))
    rule = toy.make_rule(8)
    rule = dataclasses.replace(
        rule, optimizer=optax.sgd(0.0), clip=0.0,
        objective=dataclasses.replace(rule.objective, noise=True),
    )  # fmt: skip
    forward = toy.make_forward()
    params, stats = toy.initial(np.float32)
    batch = next(toy.make_batches(8, np.float32)())
    made = make_engine(forward, rule, window)
    _, log = made.update(made.init(params, stats), batch)

    objective = dataclasses.replace(rule.objective, noise=False)
    quarters = [{k: a[i : i + 2] for k, a in batch.items()} for i in range(0, 8, 2)]
    sums = [objective.sums(grouped(forward, None), params, stats, one) for one in quarters]
    whole = {name: sum(s.denominators[name] for s in sums) for name in objective.floors}
    parts = [
        np.concatenate(
            [
                np.ravel(g)
                for g in jax.tree.leaves(objective.gradient(s._replace(denominators=whole)))
            ]
        ) / objective.scale
        for s in sums
    ]  # fmt: skip
    square = sum(np.sum(p.astype(np.float64) ** 2) for p in parts)
    norm = np.sum(sum(p.astype(np.float64) for p in parts) ** 2)
    n = np.array([float(s.samples) for s in sums])
    q = np.sum(n**2) / np.sum(n) ** 2
    assert float(log["noise/trace"]) == pytest.approx(
        n.sum() * (square - q * norm) / (1 - q), rel=1e-3
    )
    assert float(log["noise/square"]) == pytest.approx((norm - square) / (1 - q), rel=1e-3)


@pytest.mark.parametrize("engine", ["scan", "multisteps"])
def test_coupled_terms_without_weight_change_nothing(engine):
    """One accumulator for all terms, divided beforehand: the same estimates."""
    plain = engine_of(5, engine=engine, scale=24.0)

    def featured(params, stats, batch, groups):
        return linear(params, stats, batch, groups)._replace(features=batch["x"])

    coupled = (Coupled("none", 0.0, lambda params, features, weight: jnp.sum(params["w"])),)
    objective = dataclasses.replace(plain.rule.objective, coupled=coupled)
    rule = dataclasses.replace(plain.rule, objective=objective)
    batch = batch_of(np.random.default_rng(0))
    found = []
    for made in (plain, make_engine(featured, rule, plain.window)):
        _, log = made.update(made.init({"w": np.zeros(WIDTH, np.float32)}, {}), batch)
        found.append({k: float(v) for k, v in log.items() if k.startswith("noise/")})
    assert len(found[0]) == 2 and found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.slow
def test_the_update_is_the_same_with_it(tmp_path):
    found = {}
    for on in (False, True):
        config = tiny_config(
            nbs=8, steps=3, **{"log.noise_scale": on, "eval.every": -1, "checkpoint.every": -1}
        )
        train.train(config, tmp_path / str(on))
        lines = (tmp_path / str(on) / "metrics.jsonl").read_text().splitlines()
        found[on] = [json.loads(line) for line in lines]
    assert found[True][0]["fingerprint"] == found[False][0]["fingerprint"]
    losses = [[r["loss"] for r in found[on]] for on in (False, True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    told = [r for r in found[True] if "noise/scale" in r]
    assert all(r["noise/suggested_nbs"] % 2 == 0 and r["noise/scale"] >= 0 for r in told)
    assert not any("noise/scale" in r for r in found[False])


@pytest.mark.slow
def test_with_coupled_terms():
    config = tiny_completion.tiny_config(
        nbs=4, bn_group=2, microbatch=2, steps=1,
        **tiny_completion.CAPTIONED, **{"log.noise_scale": True},
    )  # fmt: skip
    this = run.prepare(config, names=["a", "b"], samples=8, identity={})
    made = make_engine(this.forward, this.rule, this.window)
    state = jax.eval_shape(made.init, *this.task.initialise(0))
    (program,) = made.lowered(state, this.task.example(4))
    _, log = program.out_info
    assert log["noise/trace"].shape == ()


def test_the_average_outlives_a_restart():
    one = NoiseScale()
    rng = np.random.default_rng(3)
    values = rng.normal((4.0, 1.0), 0.5, (300, 2))
    for trace, square in values[:100]:
        one.add(trace, square)
    two = NoiseScale(json.loads(json.dumps(one.state)))
    for trace, square in values[100:]:
        one.add(trace, square), two.add(trace, square)
    assert one.value() == two.value() == pytest.approx(4.0, rel=0.15)
    assert (
        one.record(8)["noise/suggested_nbs"] == 8 and one.record(None)["noise/suggested_nbs"] == 4
    )
    assert NoiseScale().value() is None and NoiseScale().record(8) == {}


def test_the_first_estimate_is_the_average():
    one = NoiseScale()
    one.add(5.0, 1.0)
    assert one.value() == pytest.approx(5.0, rel=1e-12)
    nbs = {group: one.record(group)["noise/suggested_nbs"] for group in (None, 1, 2, 4, 16)}
    assert nbs == {None: 5, 1: 5, 2: 4, 4: 4, 16: 16}
    assert one.record(None)["noise/scale"] == one.value()


def test_where_it_has_no_meaning():
    with pytest.raises(configs.ConfigError, match="not with compat"):
        configs.validate(tiny_config(compat=True, **{"log.noise_scale": True}))
    config = tiny_config(nbs=4, microbatch=4, **{"log.noise_scale": True})
    with pytest.raises(configs.ConfigError, match="smaller microbatch than 4"):
        run.prepare(config, names=["a"], samples=8, identity={})
