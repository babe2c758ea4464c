"""Schedules, optimizers and averages against formulas written out in numpy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccum import config as configs
from jaxaccum import optim


def make(**changes):
    config = configs.detection()
    config.update_from_flattened_dict({"nbs": 16, "lr.warmup_epochs": 2.0} | changes)
    return config, optim.make_schedule(config, np.full(100, config.nbs), 160)


def test_schedule_by_hand():
    _, schedule = make()
    u = np.arange(100)
    target = 0.01 * ((1 - u / 100) * 0.99 + 0.01)
    risen = np.minimum((u + 1) / 20, 1)
    np.testing.assert_allclose(schedule.lr, target * risen, rtol=1e-12)
    np.testing.assert_allclose(schedule.bias_lr, 0.1 + (target - 0.1) * risen, rtol=1e-12)
    np.testing.assert_allclose(schedule.momentum, 0.8 + 0.137 * risen, rtol=1e-12)


def test_cosine_ends_at_final():
    _, schedule = make(**{"lr.decay": "cosine", "lr.warmup_epochs": 0.0})
    assert schedule.lr[0] == pytest.approx(0.01)
    assert schedule.lr[50] == pytest.approx(0.01 * (0.5 * 0.99 + 0.01))
    assert schedule.lr[99] == pytest.approx(0.0001, rel=0.05)


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1), ("linear", 2), ("sqrt", 2**0.5)])
def test_scaling(scaling, factor):
    config, _ = make(**{"nbs": 128, "lr.scaling": scaling})
    assert optim.scaled_lr(config.lr, config.nbs) == pytest.approx(0.01 * factor)


def test_weight_decay_rule():
    config, _ = make(**{"nbs": 128, "optimizer.weight_decay_scaling": "linear"})
    assert optim.weight_decay(config) == pytest.approx(1e-3)
    assert optim.weight_decay(make(nbs=128)[0]) == pytest.approx(5e-4)


PARAMS = {"conv": {"kernel": np.array([1.0, -2.0]), "bias": np.array([0.5])},
          "bn": {"scale": np.array([1.5]), "bias": np.array([0.1])}}  # fmt: skip
GRADIENTS = {"conv": {"kernel": np.array([0.3, 0.1]), "bias": np.array([-0.2])},
             "bn": {"scale": np.array([0.4]), "bias": np.array([0.7])}}  # fmt: skip


def three_updates(config, schedule):
    optimizer = optim.make_optimizer(config, schedule)
    params = {k: dict(v) for k, v in PARAMS.items()}
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(GRADIENTS, state, params)
        params = {k: {n: params[k][n] + updates[k][n] for n in params[k]} for k in params}
    return params


def test_sgd_by_hand(x64):
    config, schedule = make()
    params = three_updates(config, schedule)
    for layer, name, decayed, rate in [
        ("conv", "kernel", True, schedule.lr), ("conv", "bias", False, schedule.bias_lr),
        ("bn", "scale", False, schedule.lr), ("bn", "bias", False, schedule.bias_lr),
    ]:  # fmt: skip
        p, buffer = PARAMS[layer][name].copy(), 0.0
        for u in range(3):
            g = GRADIENTS[layer][name] + (5e-4 * p if decayed else 0)
            buffer = schedule.momentum[u] * buffer + g
            p = p - rate[u] * (g + schedule.momentum[u] * buffer)
        np.testing.assert_allclose(params[layer][name], p, rtol=1e-12)


def test_adamw_by_hand(x64):
    config, schedule = make(**{"optimizer.name": "adamw", "optimizer.momentum": 0.9})
    params = three_updates(config, schedule)
    for layer, name, decayed, rate in [
        ("conv", "kernel", True, schedule.lr), ("bn", "bias", False, schedule.bias_lr),
    ]:  # fmt: skip
        p, m, v = PARAMS[layer][name].copy(), 0.0, 0.0
        for u in range(3):
            g = GRADIENTS[layer][name]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            step = (m / (1 - 0.9 ** (u + 1))) / (np.sqrt(v / (1 - 0.999 ** (u + 1))) + 1e-8)
            p = p - rate[u] * (step + (5e-4 * p if decayed else 0))
        np.testing.assert_allclose(params[layer][name], p, rtol=1e-9)


def test_ema_ramp():
    decay = optim.ema_decay(0.9999, 2000)
    assert float(decay(jnp.asarray(1))) == pytest.approx(0.9999 * (1 - np.exp(-1 / 2000)), rel=1e-4)
    assert float(decay(jnp.asarray(10**6))) == pytest.approx(0.9999)


def test_a_table_stays_at_its_end():
    table = optim.at(np.array([1.0, 2.0]))
    assert [float(table(jnp.asarray(i))) for i in (0, 1, 2, 9)] == [1, 2, 2, 2]
