"""Group batch norm against numpy, and its moments against the law of total variance."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxaccum.accumulate import GroupBatchNorm, Groups, batchnorm

EPS = 1e-3


def silu(y):
    return y / (1 + np.exp(-y))


def expected(x, scale, bias, weight, size):
    """The definition, a group at a time."""
    out = np.empty_like(x)
    for start in range(0, len(x), size):
        group, w = x[start : start + size], weight[start : start + size]
        real = group[w > 0].reshape(-1, x.shape[-1])
        mean = real.mean(0) if len(real) else np.zeros(x.shape[-1])
        var = real.var(0) if len(real) else np.zeros(x.shape[-1])
        out[start : start + size] = (group - mean) / np.sqrt(var + EPS) * scale + bias
    return out


def data(samples=6, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(3.0, 2.0, (samples, 4, 5, channels))
    return x, rng.uniform(0.5, 2, channels), rng.normal(size=channels)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("activate", [False, True])
def test_forward_is_the_definition(x64, size, activate):
    x, scale, bias = data()
    weight = np.array([1, 1, 1, 1, 1, 0.0])
    y, *_ = batchnorm.normalise(x, scale, bias, Groups(size, weight), EPS, activate)
    wanted = expected(x, scale, bias, weight, size)
    wanted = silu(wanted) if activate else wanted
    real = weight > 0
    np.testing.assert_allclose(np.asarray(y)[real], wanted[real], rtol=1e-12, atol=1e-12)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("activate", [False, True])
def test_gradient_is_that_of_the_definition(x64, size, activate):
    x, scale, bias = (jnp.asarray(a) for a in data())
    weight = jnp.array([1, 1, 0, 1, 1, 0.0])
    probe = jax.random.normal(jax.random.key(1), x.shape) * weight[:, None, None, None]

    def plain(x, scale, bias):
        xg = x.reshape(-1, size, 4, 5, 3)
        w = weight.reshape(-1, size, 1, 1, 1)
        n = jnp.maximum(w.sum((1, 2, 3), keepdims=True) * 20, 1)
        mean = (xg * w).sum((1, 2, 3), keepdims=True) / n
        var = (jnp.square(xg - mean) * w).sum((1, 2, 3), keepdims=True) / n
        y = ((xg - mean) / jnp.sqrt(var + EPS) * scale + bias).reshape(x.shape)
        return jnp.sum(probe * (jax.nn.silu(y) if activate else y))

    def ours(x, scale, bias):
        return jnp.sum(
            probe * batchnorm.normalise(x, scale, bias, Groups(size, weight), EPS, activate)[0]
        )

    for a, b in zip(
        jax.grad(ours, (0, 1, 2))(x, scale, bias), jax.grad(plain, (0, 1, 2))(x, scale, bias),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    samples=st.integers(1, 12), size=st.integers(1, 4), padded=st.integers(0, 3),
    cuts=st.integers(1, 4), seed=st.integers(0, 99),
)  # fmt: skip
def test_merged_moments_are_those_of_all_samples(samples, size, padded, cuts, seed):
    """However the samples are cut into groups and microbatches."""
    rng = np.random.default_rng(seed)
    groups = -(-(samples + padded) // size)
    x = rng.normal(5.0, 2.0, (groups * size, 7, 3))
    weight = (np.arange(len(x)) < samples).astype(float)
    running = {"mean": rng.normal(size=3), "var": rng.uniform(0.5, 2, 3)}
    with jax.enable_x64(True):
        total = None
        for part in np.array_split(np.arange(groups), min(cuts, groups)):
            rows = (part[:, None] * size + np.arange(size)).ravel()
            xs, ws = x[rows], weight[rows]
            _, mean, var, count = batchnorm.normalise(
                xs, np.ones(3), np.zeros(3), Groups(size, ws), EPS, False
            )
            new = batchnorm.moments(mean, var, count, running["mean"])
            total = new if total is None else jax.tree.map(jnp.add, total, new)
        moved = batchnorm.move_statistics(running, total, 0.1)
    real = x[:samples].reshape(-1, 3)
    wanted = {"mean": real.mean(0), "var": real.var(0, ddof=1)}
    for name, value in wanted.items():
        blend = 0.9 * running[name] + 0.1 * value
        np.testing.assert_allclose(moved[name], blend, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activate", [False, True])
def test_a_group_on_several_devices_is_one_group(x64, activate):
    """Also one that has fewer values than devices."""
    rng = np.random.default_rng(0)
    x, probe = rng.normal(3.0, 2.0, (2, 4, 3))
    scale, bias = rng.uniform(0.5, 2, 3), rng.normal(size=3)
    weight = np.array([1.0, 0, 1, 0])
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:4]), (batchnorm.GROUP_AXIS,))

    def results(x, scale, bias, weight, probe):
        def loss(x, scale, bias):
            y, mean, var, count = batchnorm.normalise(
                x, scale, bias, Groups(4, weight), EPS, activate
            )
            added = batchnorm.moments(mean, var, count, jnp.ones(3))
            return jnp.sum(y * probe * weight[:, None]), added

        return jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("group"), P(), P(), P("group"), P("group")),
        out_specs=((P("group"), P(), P()), P()),
    )  # fmt: skip
    def divided(x, scale, bias, weight, probe):
        own = jax.lax.pcast((scale, bias), "group", to="varying")
        (dx, *rest), added = results(x, *own, weight, probe)
        rest, added = jax.lax.psum((rest, added), "group")
        return (dx, *rest), added

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13),
        divided(x, scale, bias, weight, probe), results(x, scale, bias, weight, probe),
    )  # fmt: skip


def test_a_window_without_samples_moves_nothing():
    zero = {"count": jnp.zeros(()), "first": jnp.zeros(3), "second": jnp.zeros(3)}
    stats = {"a": {"mean": jnp.ones(3), "var": jnp.full(3, 2.0)}}
    moved = batchnorm.move_statistics(stats, {"a": zero}, 0.5)
    jax.tree.map(np.testing.assert_array_equal, moved, stats)


def test_a_window_of_a_single_value_moves_the_mean():
    """Its variance is 0, and not 0 / 0."""
    one = {"count": jnp.ones(()), "first": jnp.full(3, 2.0), "second": jnp.full(3, 4.0)}
    stats = {"mean": jnp.ones(3), "var": jnp.full(3, 2.0)}
    moved = batchnorm.move_statistics(stats, one, 0.5)
    np.testing.assert_array_equal(moved["mean"], np.full(3, 2.0))
    np.testing.assert_array_equal(moved["var"], np.full(3, 1.0))


def test_running_statistics_without_groups():
    layer = GroupBatchNorm()
    x = jnp.asarray(data()[0], jnp.float32)
    variables = layer.init(jax.random.key(0), x, None)
    variables["batch_stats"] = {"mean": jnp.full(3, 3.0), "var": jnp.full(3, 4.0)}
    y, changed = layer.apply(variables, x, None, mutable=["moments"])
    np.testing.assert_allclose(y, (x - 3) / np.sqrt(4 + EPS), rtol=1e-5, atol=1e-6)
    assert not changed
    _, changed = layer.apply(variables, x, Groups(3, jnp.ones(6)), mutable=["moments"])
    assert set(changed["moments"]) == {"count", "first", "second"}


def test_bfloat16_statistics_are_float32():
    x = jnp.asarray(data()[0], jnp.bfloat16)
    y, mean, var, _ = batchnorm.normalise(
        x, jnp.ones(3), jnp.zeros(3), Groups(6, jnp.ones(6)), EPS, False
    )
    assert (y.dtype, mean.dtype, var.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)


def test_gradients_of_bfloat16_are_summed_in_float32():
    x = jnp.asarray(data()[0], jnp.bfloat16)
    probe = jax.random.normal(jax.random.key(1), x.shape, jnp.bfloat16)

    def gradients(x, dtype):
        scale, bias = jnp.full(3, 1.5, dtype), jnp.ones(3, dtype)

        def loss(x, scale, bias):
            y = batchnorm.normalise(x, scale, bias, Groups(6, jnp.ones(6)), EPS, False)[0]
            return jnp.vdot(y, probe.astype(y.dtype))

        return jax.grad(loss, (0, 1, 2))(x, scale, bias)

    found, wide = gradients(x, jnp.float32), gradients(x.astype(jnp.float32), jnp.float32)
    for a, b in zip(found[1:], wide[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(found[0].astype(jnp.float32), wide[0], rtol=2**-8, atol=1e-6)
    assert [a.dtype for a in found] == [jnp.bfloat16, jnp.float32, jnp.float32]
    assert [a.dtype for a in gradients(x, jnp.bfloat16)] == [jnp.bfloat16] * 3


def test_weights_in_float64_widen_nothing(x64):
    x, weight = jnp.asarray(data()[0], jnp.float32), jnp.ones(6)
    ones = jnp.ones(3, jnp.float32)
    assert weight.dtype == jnp.float64
    made = batchnorm.normalise(x, ones, ones, Groups(6, weight), EPS, False)
    assert [a.dtype for a in made] == [jnp.float32] * 4


def test_a_group_of_padding_is_finite_through_many_layers():
    x = jnp.full((4, 2, 2, 3), 2.0)
    weight = jnp.array([1, 1, 0, 0.0])
    for _ in range(60):
        x = (
            batchnorm.normalise(x, jnp.full(3, 2.0), jnp.ones(3), Groups(2, weight), EPS, True)[0]
            * 3
        )
    assert np.isfinite(x).all()
