"""Chamfer distances against their formula in numpy, finite differences and the naive form."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxaccum.losses import chamfer

LOSSES = [chamfer.chamfer_l1, chamfer.chamfer_l2]


def clouds(seed, *sizes, batch=2, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return [rng.uniform(-0.5, 0.5, (batch, n, 3)).astype(dtype) for n in sizes]


def lattice(seed, *sizes, dtype=np.float32):
    """Clouds with many equal distances, all of them exact."""
    rng = np.random.default_rng(seed)
    return [rng.integers(-3, 4, (2, n, 3)).astype(dtype) / 4 for n in sizes]


def table(a, b):
    """(B, n, m) squared distances in numpy."""
    return ((a[:, :, None].astype(np.float64) - b[:, None].astype(np.float64)) ** 2).sum(-1)


def naive(a, b, power):
    distance = jnp.sum((a[:, :, None] - b[:, None]) ** 2, axis=-1)
    ab, ba = distance.min(2), distance.min(1)
    if power == 2:
        return ab.mean(1) + ba.mean(1)
    return (jnp.sqrt(ab).mean(1) + jnp.sqrt(ba).mean(1)) / 2


@pytest.mark.parametrize(
    ("n", "m", "tile"), [(1, 1, 4), (5, 1, 1), (1, 70, 32), (60, 64, 16), (33, 101, 10), (90, 7, 8)]
)
def test_nearest_squared(n, m, tile):
    a, b = clouds(n, n, m, dtype=np.float32)
    distance, index = jax.jit(chamfer.nearest_squared, static_argnums=2)(a, b, tile)
    expected = table(a, b)
    assert index.dtype == jnp.int32 and distance.dtype == jnp.float32
    assert np.array_equal(index, expected.argmin(2))
    np.testing.assert_allclose(distance, expected.min(2), rtol=1e-6)


def by_tiles(tile):
    return functools.partial(chamfer._nearest_by_tiles, tile=tile)


def by_reduction(block):
    return functools.partial(chamfer._nearest_by_reduction, block=block)


@pytest.mark.parametrize("search", [by_tiles(8), by_tiles(7), by_reduction(512), by_reduction(40)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_first_of_equally_near_points_wins(search, dtype):
    """In the search of every backend, whatever the tile."""
    a, b = lattice(0, 80, 300, dtype=dtype)
    with jax.enable_x64(dtype == np.float64):
        assert np.array_equal(jax.jit(search)(a, b), table(a, b).argmin(2))


@pytest.mark.parametrize("search", [by_tiles(8), by_reduction(40)])
def test_nan_is_nobodys_nearest(search):
    a, b = clouds(1, 50, 100, dtype=np.float32)
    a[0, 3], b[:, 20:90] = np.nan, np.nan
    index = np.asarray(jax.jit(search)(a, b))
    expected = np.where(np.isnan(table(a, b)), np.inf, table(a, b)).argmin(2)
    assert expected[0, 3] == 0
    assert np.array_equal(index, expected)


def test_conventions():
    """Two points against one: L1 halves the sum of both means, L2 does not."""
    a = np.array([[[0, 0, 0], [3, 4, 0]]], np.float32)
    b = np.array([[[0, 0, 1]]], np.float32)
    # a to b: squares 1 and 26; b to a: square 1.
    np.testing.assert_allclose(chamfer.chamfer_l1(a, b), [((1 + 26**0.5) / 2 + 1) / 2], rtol=1e-6)
    np.testing.assert_allclose(chamfer.chamfer_l2(a, b), [27 / 2 + 1], rtol=1e-6)


def test_values_are_per_sample(x64):
    a, b = clouds(2, 70, 130, batch=3)
    for loss, power in zip(LOSSES, (1, 2), strict=True):
        ab, ba = (table(a, b).min(axis) ** (power / 2) for axis in (2, 1))
        expected = (ab.mean(1) + ba.mean(1)) / (2 if power == 1 else 1)
        np.testing.assert_allclose(loss(a, b), expected, rtol=1e-13)
        np.testing.assert_allclose(loss(a[1:2], b[1:2]), expected[1:2], rtol=1e-13)


@pytest.mark.parametrize(("loss", "power"), [(LOSSES[0], 1), (LOSSES[1], 2)])
def test_gradient(x64, loss, power):
    """Of both clouds: that of the naive form, and what moving the points does."""
    a, b = clouds(3, 40, 75)
    weight = np.array([1.0, -2.5])

    def weighted(form):
        return lambda a, b: (weight * form(a, b)).sum()

    gradients = jax.jit(jax.grad(weighted(loss), (0, 1)))(a, b)
    reference = weighted(functools.partial(naive, power=power))
    expected = jax.jit(jax.grad(reference, (0, 1)))(a, b)
    for ours, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)
    rng = np.random.default_rng(0)
    da, db = rng.normal(size=a.shape), rng.normal(size=b.shape)
    step, function = 1e-6, jax.jit(weighted(loss))
    moved = function(a + step * da, b + step * db) - function(a - step * da, b - step * db)
    slope = (gradients[0] * da).sum() + (gradients[1] * db).sum()
    np.testing.assert_allclose(moved / (2 * step), slope, rtol=1e-6)


def test_gradient_of_each_direction(x64):
    """A cotangent per point; points that are the nearest of several collect from all of them."""
    a, b = clouds(4, 60, 9)
    g = np.random.default_rng(0).normal(size=(2, 60))

    @jax.jit
    def differentiated(a, b, g):
        _, pull, index = jax.vjp(chamfer.nearest_squared, a, b, has_aux=True)
        return index, *pull(g)

    index, da, db = differentiated(a, b, g)
    expected_a, expected_b = np.zeros_like(a), np.zeros_like(b)
    for s in range(2):
        for i, j in enumerate(np.asarray(index)[s]):
            expected_a[s, i] = 2 * g[s, i] * (a[s, i] - b[s, j])
            expected_b[s, j] -= expected_a[s, i]
    np.testing.assert_allclose(da, expected_a, rtol=1e-13)
    np.testing.assert_allclose(db, expected_b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", LOSSES)
def test_identical_points_have_gradient_zero(loss):
    a, b = clouds(5, 50, 80, dtype=np.float32)
    b[:, 10:30] = a[:, 10:30]
    differentiated = jax.jit(jax.value_and_grad(lambda *x: loss(*x).sum(), (0, 1)))
    value, gradients = differentiated(a, b)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in gradients)
    value, gradients = differentiated(a, np.concatenate([a, a[:, :30]], axis=1))
    assert value == 0
    assert not any(np.asarray(g).any() for g in gradients)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("point", [0, 17])
def test_nan_stays_nan_and_where_it_is(loss, broken, point):
    pair = clouds(6, 50, 50, dtype=np.float32)
    pair[broken][1, point, 2] = np.nan

    @jax.jit
    def differentiated(*pair):
        values, pull = jax.vjp(loss, *pair)
        return values, pull(jnp.ones_like(values))

    values, gradients = differentiated(*pair)
    assert np.isfinite(values[0]) and np.isnan(values[1])
    rows = [np.argwhere(~np.isfinite(g).all(-1)).tolist() for g in gradients]
    assert rows[broken] == [[1, point]]
    assert rows[1 - broken] == [[1, 0]]  # what NaN calls its nearest


def test_narrow_types_are_computed_in_float32():
    a, b = (jnp.asarray(c, jnp.bfloat16) for c in clouds(7, 60, 90))
    wide = a.astype(jnp.float32), b.astype(jnp.float32)
    assert chamfer.chamfer_l1(a, b).dtype == jnp.float32
    assert np.array_equal(chamfer.chamfer_l1(a, b), chamfer.chamfer_l1(*wide))
    gradient, expected = (
        jax.jit(jax.grad(lambda a, b: chamfer.chamfer_l1(a, b).sum()))(*pair)
        for pair in ((a, b), wide)
    )
    assert gradient.dtype == jnp.bfloat16
    assert np.array_equal(gradient, expected.astype(jnp.bfloat16))


def test_memory_does_not_hold_the_distances():
    """Forward and backward at 16384 points, whose matrix alone would be 1 GiB."""
    cloud = jax.ShapeDtypeStruct((1, 16384, 3), jnp.float32)
    step = jax.jit(jax.grad(lambda a, b: chamfer.chamfer_l1(a, b).sum(), (0, 1)))
    memory = step.lower(cloud, cloud).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * 2**20


@pytest.mark.slow
def test_in_a_loop_on_several_devices(x64):
    """Microbatches in a scan within shard_map, as an update does it."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    a, b = clouds(8, 40, 66, batch=8)

    def loss(scale, a, b):
        return (chamfer.chamfer_l1(a * scale, b) + chamfer.chamfer_l2(a, b * scale)).sum()

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P()
    )
    def accumulated(scale, a, b):
        scale = jax.lax.pcast(scale, ("data",), to="varying")
        micro = [x.reshape(2, 2, *x.shape[1:]) for x in (a, b)]

        def step(total, pair):
            return total + jax.grad(loss)(scale, *pair), None

        total, _ = jax.lax.scan(step, jnp.zeros_like(scale), tuple(micro))
        return jax.lax.psum(total, "data")

    scale = jnp.array([1.0, 0.9, 1.2])
    np.testing.assert_allclose(
        accumulated(scale, a, b), jax.jit(jax.grad(loss))(scale, a, b), rtol=1e-12
    )


def test_wrong_arguments_are_refused():
    a, b = clouds(0, 4, 5, dtype=np.float32)
    with pytest.raises(ValueError, match=r"must be \(B, n, 3\)"):
        chamfer.nearest_squared(a, b[:1])
    with pytest.raises(ValueError, match=r"must be \(B, n, 3\)"):
        chamfer.nearest_squared(a[..., :2], b[..., :2])
    with pytest.raises(ValueError, match="the nearest of 0 points"):
        chamfer.nearest_squared(a, b[:, :0])
    with pytest.raises(ValueError, match="0 at a time"):
        chamfer.nearest_squared(a, b, 0)
