"""Schedules, optimizers and averages against formulas written out in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from accumulate.test_golden import uniform

from jaxaccum import config as configs
from jaxaccum.accumulate.usual_rule import WindowSizes
from jaxaccum.training import optim


def make(**changes):
    config = configs.detection()
    config.update_from_flattened_dict({"nbs": 16, "lr.warmup_epochs": 2.0} | changes)
    return config, optim.make_schedule(config, WindowSizes(config.nbs, 100), 160)


def test_schedule_by_hand():
    _, schedule = make()
    u = np.arange(100)
    target = 0.01 * ((1 - u / 100) * 0.99 + 0.01)
    risen = np.minimum((u + 1) / 20, 1)
    np.testing.assert_allclose(schedule.lr(u), target * risen, rtol=1e-12)
    np.testing.assert_allclose(schedule.bias_lr(u), 0.1 + (target - 0.1) * risen, rtol=1e-12)
    np.testing.assert_allclose(schedule.momentum(u), 0.8 + 0.137 * risen, rtol=1e-12)


def test_cosine_ends_at_final():
    _, schedule = make(**{"lr.decay": "cosine", "lr.warmup_epochs": 0.0})
    assert schedule.lr(0) == pytest.approx(0.01)
    assert schedule.lr(50) == pytest.approx(0.01 * (0.5 * 0.99 + 0.01))
    assert schedule.lr(99) == pytest.approx(0.0001, rel=0.05)


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
            buffer = schedule.momentum(u) * buffer + g
            p = p - rate(u) * (g + schedule.momentum(u) * buffer)
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
            p = p - rate(u) * (step + (5e-4 * p if decayed else 0))
        np.testing.assert_allclose(params[layer][name], p, rtol=1e-9)


def test_ema_ramp():
    decay = optim.ema_decay(0.9999, 2000)
    assert float(decay(jnp.asarray(1))) == pytest.approx(0.9999 * (1 - np.exp(-1 / 2000)), rel=1e-4)
    assert float(decay(jnp.asarray(10**6))) == pytest.approx(0.9999)


PI = 4 * np.arctan(np.longdouble(1))


def tables(config, sizes, epoch_samples):
    """The schedules as they are defined, by a table of all updates: lr, bias_lr, momentum, bn.

    In long doubles, as differences lose digits near the end.
    """
    sizes = np.asarray(sizes, np.longdouble)
    lr, ends = config.lr, np.cumsum(sizes)
    progress, epochs = (ends - sizes) / ends[-1], (ends - sizes) / epoch_samples
    if lr.decay == "exponential":
        shape = np.maximum(lr.decay_rate ** (epochs / lr.decay_epochs), lr.final)
    else:
        shape = 1 - progress if lr.decay == "linear" else (1 + np.cos(PI * progress)) / 2
        shape = shape * (1 - lr.final) + lr.final
    warmup = min(lr.warmup_epochs * epoch_samples, max(ends[-1] - epoch_samples, ends[-1] / 2))
    risen = np.minimum(ends / warmup, 1.0) if warmup > 0 else np.ones(len(sizes))
    target, bn = optim.scaled_lr(lr, config.nbs) * shape, config.bn_momentum
    return (
        target * risen,
        lr.warmup_bias + (target - lr.warmup_bias) * risen,
        lr.warmup_momentum + (config.optimizer.momentum - lr.warmup_momentum) * risen,
        np.maximum(bn.start * bn.decay ** (epochs / bn.epochs), bn.final),
    )


@pytest.mark.parametrize("decay", ["linear", "cosine", "exponential"])
@pytest.mark.parametrize("ramp", [[], [4], [4, 8, 12, 12], [4] * 90])
@pytest.mark.parametrize("warmup_epochs", [0.0, 1.5, 40.0])
def test_functions_of_the_count_are_the_tables(x64, decay, ramp, warmup_epochs):
    config = configs.completion()
    config.lr.update(decay=decay, warmup_epochs=warmup_epochs, warmup_bias=0.1, final=0.02)
    sizes = WindowSizes(16, 90, np.asarray(ramp, int))
    counts = np.arange(95)
    wanted = tables(config, [sizes.of(i) for i in range(90)], 100)
    made = optim.make_schedule(config, sizes, 100)
    for table, f in zip(
        wanted, (made.lr, made.bias_lr, made.momentum, made.bn_momentum), strict=True
    ):
        table = np.append(table, [table[-1]] * 5)  # and stays at its end
        np.testing.assert_allclose(f(counts), table, rtol=1e-12)
        assert f(counts).shape == jax.jit(f)(counts).shape == table.shape
        assert f(7) == pytest.approx(table[7], rel=1e-12)
        np.testing.assert_allclose(jax.jit(f)(counts.astype(np.int32)), table, rtol=1e-12)
    assert made.peak() == pytest.approx(wanted[0].max(), rel=1e-12)


@pytest.mark.parametrize("decay", ["linear", "cosine", "exponential"])
def test_the_longest_run_has_exact_schedules_and_no_table(decay):
    """In float32 to rounding from the first update to the last, by a program of a few kilobytes."""
    config = configs.completion()
    config.lr.update(decay=decay, warmup_epochs=3.0, warmup_bias=0.1)
    updates, nbs = configs.MOST_UPDATES, configs.MOST_SAMPLES
    made = optim.make_schedule(config, WindowSizes(nbs, updates), 10**9)
    counts = np.array([0, 1, 2, 999, 3000, updates // 2, updates - 2, updates - 1])
    for f in (made.lr, made.bias_lr, made.momentum, made.bn_momentum):
        lowered = jax.jit(f).lower(jax.ShapeDtypeStruct((), jnp.int32))
        assert len(lowered.as_text()) < 10_000
        found = np.array([float(jax.jit(f)(np.int32(n))) for n in counts])
        np.testing.assert_allclose(found, f(counts), rtol=2e-5 if decay == "exponential" else 1e-6)


def test_orthogonal_by_hand(x64):
    """Of (out, rest): the rows of a kernel's output channels, whatever its spatial shape."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 2, 5))
    x = kernel.reshape(18, 5).T  # (out, rest)
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    found = optim.orthogonal(jnp.asarray(kernel))
    np.testing.assert_allclose(found, x.T.reshape(kernel.shape), rtol=1e-10)
    singular = np.linalg.svd(np.asarray(found).reshape(18, 5), compute_uv=False)
    assert 0.6 < singular.min() < singular.max() < 1.3
    tall = rng.normal(size=(1, 1, 3, 7))  # more outputs than inputs: the same through its transpose
    swapped = np.swapaxes(tall, 2, 3)
    np.testing.assert_allclose(
        optim.orthogonal(jnp.asarray(tall)),
        np.swapaxes(optim.orthogonal(jnp.asarray(swapped)), 2, 3), rtol=1e-9,
    )  # fmt: skip


def test_musgd_by_hand(x64):
    config, schedule = make(**{"optimizer.name": "musgd"})
    optimizer = optim.make_optimizer(config, schedule)
    rng = np.random.default_rng(1)
    params = {
        "model.1": {"conv": {"kernel": rng.normal(size=(1, 1, 4, 3))}, "bn": {"bias": np.ones(3)}},
        "model.2": {
            "cv3.0.2": {"kernel": rng.normal(size=(1, 1, 4, 2)), "bias": np.ones(2)},
            "one2one_cv3.1.2": {"kernel": rng.normal(size=(1, 1, 4, 2)), "bias": np.ones(2)},
        },
    }
    gradient = {
        "model.1": {"conv": {"kernel": rng.normal(size=(1, 1, 4, 3))}, "bn": {"bias": np.ones(3)}},
        "model.2": {
            "cv3.0.2": {"kernel": rng.normal(size=(1, 1, 4, 2)), "bias": np.ones(2)},
            "one2one_cv3.1.2": {"kernel": rng.normal(size=(1, 1, 4, 2)), "bias": np.ones(2)},
        },
    }
    state = optimizer.init(params)
    first, state = optimizer.update(gradient, state, params)
    second, _ = optimizer.update(gradient, state, params)

    def kernel_step(p, g, rate, u, momentum, buffer):
        mu = schedule.momentum(u)
        momentum = mu * momentum + (1 - mu) * g
        muon = np.asarray(optim.orthogonal(jnp.asarray(mu * momentum + (1 - mu) * g)))
        decayed = g + 5e-4 * (p - rate * 0.2 * muon)
        buffer = mu * buffer + decayed
        return -rate * (0.2 * muon + decayed + mu * buffer), momentum, buffer

    for layer, name, factor in (
        ("model.1", "conv", 1), ("model.2", "cv3.0.2", 3), ("model.2", "one2one_cv3.1.2", 3),
    ):  # fmt: skip
        p, g = params[layer][name]["kernel"], gradient[layer][name]["kernel"]
        momentum = buffer = np.zeros_like(g)
        for u, found in enumerate((first, second)):
            rate = factor * schedule.lr(u)
            step, momentum, buffer = kernel_step(p, g, rate, u, momentum, buffer)
            np.testing.assert_allclose(found[layer][name]["kernel"], step, rtol=1e-12)
    mu = schedule.momentum(0)
    np.testing.assert_allclose(first["model.1"]["bn"]["bias"], -schedule.bias_lr(0) * (1 + mu))
    np.testing.assert_allclose(
        first["model.2"]["cv3.0.2"]["bias"], -3 * schedule.bias_lr(0) * (1 + mu)
    )


def by_rule():
    """Two updates of MuSGD at a constant rate, of tensors that follow from keys: the reference's
    unit values. Kernels in the reference's layout, (out, in, height, width)."""

    def laid(a):
        return np.transpose(a, (2, 3, 1, 0)) if a.ndim == 4 else a

    def back(a):
        return np.transpose(a, (3, 2, 0, 1)) if a.ndim == 4 else np.asarray(a)

    config, _ = make(**{"optimizer.name": "musgd"})
    rates = {"lr": 0.01, "bias_lr": 0.01, "momentum": 0.9, "bn_momentum": 0.03, "epoch": 0.0}
    constants = {k: lambda count, v=v: jnp.full(jnp.shape(count), v) for k, v in rates.items()}
    optimizer = optim.make_optimizer(config, optim.Schedule(**constants, updates=2, epochs=1))
    shapes = {"w": (4, 2, 3, 3), "tall": (24, 2, 1, 1), "dw": (3, 1, 3, 3), "b": (4,)}
    leaf = {key: "bias" if key == "b" else "kernel" for key in shapes}

    def tree(suffix=""):
        return {k: {leaf[k]: jnp.asarray(laid(uniform(k + suffix, s)))} for k, s in shapes.items()}

    params, seen = tree(), []
    state = optimizer.init(params)
    for number in (1, 2):
        updates, state = optimizer.update(tree(f".grad{number}"), state, params)
        params = optax.apply_updates(params, updates)
        seen.append({k: back(params[k][leaf[k]]) for k in shapes})
    probes = {k: [np.sum((one[k] - uniform(k, s)) * uniform(f"{k}.probe", s)) for one in seen]
              for k, s in shapes.items()}  # fmt: skip
    return probes, seen[1]


def test_musgd_has_the_references_unit_values(x64):
    """Of the rule in float64; the package itself rounds to bfloat16 on the way, 2e-5 of it."""
    probes, last = by_rule()
    for key, first, second, element in (
        ("w", -0.059450, -0.043438, 0.0416321),
        ("tall", -0.030807, 0.0045387, 0.7178526),
        ("dw", -0.0011634, 0.0048690, 0.4937291),
    ):
        assert probes[key] == pytest.approx([first, second], abs=6e-7)
        assert last[key].ravel()[0] == pytest.approx(element, abs=6e-8)
    np.testing.assert_allclose(last["b"], [-0.57004, -0.49487, 0.03333, 0.10569], atol=6e-6)


def test_newton_schulz_has_the_references_unit_values(x64):
    found = optim.orthogonal(jnp.asarray(uniform("ns", (3, 4)).T)).T
    expected = [(0.094139, -0.326559, -0.055746, 0.785876), (-0.519346, 0.437558, 0.240921,
                0.210083), (-0.434025, 0.097366, -0.728712, -0.203326)]  # fmt: skip
    np.testing.assert_allclose(found, expected, atol=6e-7)


@pytest.mark.parametrize(
    ("shape", "longer"),
    [((6, 3), 1.0), ((3, 6), 2**0.5), ((4, 1, 2, 3), 2.0), ((1, 4, 2, 3), 1.0), ((2, 3, 4), 1.0)],
)
def test_kernels_that_are_not_square_are_longer(x64, shape, longer):
    """By outputs over inputs of a dense layer, by height over width of a window."""
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=shape))
    whole = kernel.reshape(1, 1, -1, shape[-1])
    found = optim.orthogonal(kernel).reshape(whole.shape)
    np.testing.assert_allclose(found, longer * optim.orthogonal(whole), rtol=1e-12)


def test_kernels_of_one_shape_are_made_orthogonal_together(x64):
    """Each as by itself, in one product for all that are alike, also when laid on their side."""
    rng = np.random.default_rng(0)
    shapes = [(3, 3, 2, 5), (1, 1, 18, 5), (1, 1, 5, 18), (1, 1, 4, 4), (3, 3, 1, 8), (1, 1, 4, 4)]
    kernels = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
    found = optim.orthogonal_all(kernels)
    for one, kernel in zip(found, kernels, strict=True):
        np.testing.assert_allclose(one, optim.orthogonal(kernel), rtol=1e-12)
    text = str(jax.make_jaxpr(optim.orthogonal_all)(kernels))
    # Three matrices: 5 x 18, 4 x 4 and 8 x 9; three products in each of five turns.
    assert text.count("dot_general") == 3 * 5 * 3


def test_auto_is_the_references_choice():
    config, _ = make(**{"optimizer.name": "auto"})
    few = optim.resolve(config, 3, 500)
    assert (few.optimizer.name, few.lr.base, few.lr.warmup_bias) == ("adamw", 0.001429, 0.0)
    assert optim.resolve(config, 80, 500).lr.base == 0.000119
    many = optim.resolve(config, 80, 20_000)
    assert (many.optimizer.name, many.lr.base, many.optimizer.momentum) == ("musgd", 0.01, 0.937)
    assert config.optimizer.name == "auto"
