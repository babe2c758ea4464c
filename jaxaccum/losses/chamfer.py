"""Chamfer distances between point clouds, exact and without the matrix of all distances.

Distances are squared sums of differences (the expansion into a matrix product cancels). Only the
indices of the nearest points are kept for the gradient, which is one gather and one scatter-add:
in index order on CPU; on GPU in the order of atomics, unless XLA is told otherwise by
XLA_FLAGS=--xla_gpu_deterministic_ops=true.

Fan, Su and Guibas 2017, arXiv:1612.00603.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def nearest_squared(a: jax.Array, b: jax.Array, tile: int = 32) -> tuple[jax.Array, jax.Array]:
    """Squared distance of each point of `a` to the nearest point of `b`, and which that is.

    The first of equally near points wins. A point of `a` that is NaN has distance NaN; one of `b`
    is nobody's nearest. The gradient goes to both clouds, 2 g (a - nearest) and its opposite; that
    of identical points is zero.

    Args:
      a: (B, n, 3). b: (B, m, 3), m >= 1. Narrow types are computed in float32.
      tile: points of `b` that are compared with all of `a` in one step of a loop on CPU; other
        backends fuse the comparison of all.
    Returns:
      distance (B, n), float32 or float64, and index (B, n) int32.
    Raises:
      ValueError: on shapes that do not fit, or an empty `b`.
    """
    return _forward(a, b, tile)[0]


def _forward(a, b, tile):
    if a.ndim != 3 or b.ndim != 3 or a.shape[::2] != b.shape[::2] or a.shape[2] != 3:
        raise ValueError(f"clouds must be (B, n, 3) and (B, m, 3), got {a.shape} and {b.shape}")
    if b.shape[1] < 1 or tile < 1:
        raise ValueError(f"the nearest of {b.shape[1]} points, {tile} at a time: both must be > 0")
    wide = _wide(a, b)
    index = _search(*wide, tile)
    near = jnp.take_along_axis(wide[1], index[..., None], axis=1)
    return (_squared(wide[0], near), index), (a, b, index)


def _wide(a, b):
    """Both in one type, float32 at least."""
    dtype = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    return a.astype(dtype), b.astype(dtype)


@functools.partial(jax.jit, static_argnames="tile")
def _search(a, b, tile):
    """(B, n) int32 index of the nearest point."""
    return lax.platform_dependent(
        a,
        b,
        cpu=functools.partial(_nearest_by_tiles, tile=tile),
        default=functools.partial(_nearest_by_reduction, block=8192),
    )


def _squared(a, b):
    """Squared distance of points (..., 3)."""
    return sum((a[..., i] - b[..., i]) ** 2 for i in range(3))


def _nearest_by_reduction(a, b, block):
    """(B, n) indices by reductions, which XLA fuses with the distances that they reduce.

    Over more points than `block` at once it would reduce in two steps, through memory.
    """
    m = b.shape[1]
    block = min(block, m)

    def step(i, carry):
        least, index = carry
        start = jnp.minimum(i * block, m - block)
        part = lax.dynamic_slice_in_dim(b, start, block, axis=1)
        distance = _squared(a[:, :, None], part[:, None])
        distance = jnp.where(jnp.isnan(distance), jnp.inf, distance)
        lowest, place = distance.min(axis=2), lax.argmin(distance, 2, jnp.int32)
        nearer = lowest < least
        return jnp.where(nearer, lowest, least), jnp.where(nearer, start + place, index)

    infinite = jnp.full_like(a[..., 0], jnp.inf)
    first = jnp.zeros_like(infinite, jnp.int32)
    return lax.fori_loop(0, -(-m // block), step, (infinite, first))[1]


def _nearest_by_tiles(a, b, tile):
    """(B, n) indices, as minima of vectors over `a`: XLA's CPU backend does not vectorise argmin.

    The loop finds only the tile of the nearest point, from the minimum before and after: a minimum
    and its place in one step would be two kernels, each computing all distances.
    """
    m = b.shape[1]
    tile = min(tile, m)
    x, y, z = jnp.unstack(a, axis=-1)
    rows = jnp.moveaxis(b, 2, 0)

    def start(step):
        return jnp.minimum(step * tile, m - tile)  # the last tile overlaps the one before

    def squared(point):
        return (x - point[0]) ** 2 + (y - point[1]) ** 2 + (z - point[2]) ** 2

    def step(i, carry):
        least, before, found = carry
        found = jnp.where(least < before, i - 1, found)
        part = lax.dynamic_slice_in_dim(rows, start(i), tile, axis=2)
        now = least
        for t in range(tile):
            distance = squared(part[:, :, t, None])
            now = jnp.where(distance < now, distance, now)
        return now, least, found

    infinite = jnp.full_like(x, jnp.inf)
    first = jnp.zeros_like(x, jnp.int32)
    steps = -(-m // tile)
    least, before, found = lax.fori_loop(0, steps, step, (infinite, infinite, first))
    begin = start(jnp.where(least < before, steps - 1, found))

    def within(t, carry):
        least, index = carry
        distance = squared(jnp.take_along_axis(rows, (begin + t)[None], axis=2))
        nearer = distance < least
        return jnp.where(nearer, distance, least), jnp.where(nearer, begin + t, index)

    return lax.fori_loop(0, tile, within, (infinite, begin))[1]


def _backward(tile, residuals, cotangents):
    del tile
    a, b, index = residuals
    g = cotangents[0]
    near = jnp.take_along_axis(b, index[..., None], axis=1).astype(g.dtype)
    pull = 2 * g[..., None] * (a.astype(g.dtype) - near)
    sample = lax.broadcasted_iota(jnp.int32, index.shape, 0)
    pushed = jnp.zeros_like(b, g.dtype).at[sample, index].add(-pull)
    return pull.astype(a.dtype), pushed.astype(b.dtype)


nearest_squared.defvjp(_forward, _backward)


@jax.jit
def chamfer_l1(a: jax.Array, b: jax.Array) -> jax.Array:
    """Half the sum of both clouds' mean distances to the other: (B, n, 3), (B, m, 3) -> (B,).

    A distance of zero has gradient zero.
    """
    ab, ba = _both_ways(a, b)
    return (jnp.mean(_root(ab), axis=1) + jnp.mean(_root(ba), axis=1)) / 2


@jax.jit
def chamfer_l2(a: jax.Array, b: jax.Array) -> jax.Array:
    """The sum of both clouds' mean squared distances to the other: (B, n, 3), (B, m, 3) -> (B,)."""
    ab, ba = _both_ways(a, b)
    return jnp.mean(ab, axis=1) + jnp.mean(ba, axis=1)


def _both_ways(a, b):
    a, b = _wide(a, b)  # before, so that narrow gradients are added before they are rounded
    return nearest_squared(a, b)[0], nearest_squared(b, a)[0]


def _root(square):
    """sqrt with gradient zero at zero; NaN stays NaN."""
    zero = square == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))
