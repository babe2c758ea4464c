"""Indices into point clouds: farthest points, nearest neighbours, gathering and interpolation.

Everything is jitted, has static shapes and works on all samples at once; what it gives for a
sample does not depend on the others. Coordinates are float32 or float64. Indices are int32 and
carry no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

ORIGIN = 1e-3  # squared distance from the origin up to which a point counts as padding
GROUP = 8  # points that `nearest` looks at together before it looks at them one by one


@functools.partial(jax.jit, static_argnames=("count", "skip_origin"))
def farthest_points(xyz: jax.Array, count: int, skip_origin: bool = True) -> jax.Array:
    """Farthest point sampling: each point taken is the farthest from those taken before.

    The first index is 0. Among equally far points the one wins whose thread number (index modulo
    the power of two up to N, 512 at most) reads lowest backwards in binary, then the lowest index:
    the order of the reference's parallel reduction. Where all valid points are taken the first of
    that order, index 0 if valid, repeats; without any valid point index 0 does.

    Qi et al. 2017, arXiv:1706.02413.

    Args:
      xyz: (B, N, 3) coordinates.
      count: points to take.
      skip_origin: never take a point with |p|^2 <= 1e-3, except as the first: zeros are padding.
    Returns:
      (B, count) int32. The result for a smaller count is its beginning.
    Raises:
      ValueError: without points, or a count below 1.
    """
    if xyz.shape[1] < 1 or count < 1:
        raise ValueError(f"cannot take {count} farthest of {xyz.shape[1]} points: both must be > 0")
    # In this order of the points "first of the largest" is the reference's rule. Index 0 is first.
    order = jnp.asarray(_by_priority(xyz.shape[1]))
    x, y, z = jnp.unstack(lax.stop_gradient(xyz)[:, order], axis=-1)
    far = jnp.full_like(x, 1e10)
    if skip_origin:
        far = jnp.where(x * x + y * y + z * z <= ORIGIN, -1, far)

    def take(far, place):
        px, py, pz = (jnp.take_along_axis(c, place[:, None], axis=1) for c in (x, y, z))
        distance = (x - px) ** 2 + (y - py) ** 2 + (z - pz) ** 2
        return jnp.where(distance < far, distance, far)

    def step(far, _):
        place = lax.platform_dependent(
            far, cpu=_first_largest, default=lambda far: lax.argmax(far, 1, jnp.int32)
        )
        return take(far, place), place

    first = jnp.zeros(far.shape[0], jnp.int32)
    _, places = lax.scan(step, take(far, first), length=count - 1)
    return order[jnp.concatenate([first[None], places]).T]


def _by_priority(n: int) -> np.ndarray:
    """(n,) the indices in the order in which they win a tie."""
    bits = min(512, n).bit_length() - 1
    backwards = np.zeros(1 << bits, np.int32)
    for bit in range(bits):
        backwards |= (np.arange(1 << bits, dtype=np.int32) >> bit & 1) << (bits - 1 - bit)
    return np.argsort(backwards[np.arange(n) % (1 << bits)], kind="stable").astype(np.int32)


def _first_largest(values):
    """argmax of each row, which XLA's CPU backend computes one element at a time, in halves.

    `values` must be in memory (a loop's carry is), not an expression: XLA may compute that twice,
    rounded differently, and then nothing equals the maximum.
    """
    largest = _in_halves(jnp.maximum, values).max(axis=1, keepdims=True)
    place = lax.broadcasted_iota(jnp.int32, values.shape, 1)
    place = jnp.where(values == largest, place, values.shape[1] - 1)
    return _in_halves(jnp.minimum, place).min(axis=1)


def _in_halves(combine: Callable, rows):
    """Combines the halves of each row as vectors while they are long and even."""
    while rows.shape[1] > 64 and rows.shape[1] % 2 == 0:
        half = rows.shape[1] // 2
        rows = combine(rows[:, :half], rows[:, half:])
    return rows


@functools.partial(jax.jit, static_argnames="k")
def nearest(query: jax.Array, points: jax.Array, k: int) -> jax.Array:
    """The k nearest points of each query, nearest first; of equally near ones the lowest index.

    Distances are squared sums of differences: the usual expansion into a matrix product would
    cancel, and round differently in every batch size.

    Args:
      query: (B, Q, 3). points: (B, N, 3).
      k: neighbours, at most N.
    Returns:
      (B, Q, k) int32.
    Raises:
      ValueError: k is not in 1..N.
    """
    n = points.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"cannot take the {k} nearest of {n} points: 1 <= k <= {n} is needed")
    query, points = lax.stop_gradient((query, points))
    if n <= 4 * GROUP * k:
        return lax.top_k(-_squared(query[:, :, None], points[:, None]), k)[1].astype(jnp.int32)
    # The k nearest lie in the k groups whose own nearest point is nearest: each group left out
    # has k points before all of its own. That leaves few enough to sort.
    padding = ((0, 0), (0, -n % GROUP), (0, 0))
    groups = jnp.pad(points, padding, constant_values=jnp.inf)
    groups = groups.reshape(points.shape[0], -1, GROUP, 3)
    closest = functools.reduce(
        jnp.minimum, (_squared(query[:, :, None], groups[:, None, :, i]) for i in range(GROUP))
    )
    taken = jnp.sort(lax.top_k(-closest, k)[1], axis=-1)
    distance = _squared(query[:, :, None, None], gather(groups, taken))
    place = lax.top_k(-distance.reshape(*taken.shape[:2], k * GROUP), k)[1]
    index = jnp.take_along_axis(taken, place // GROUP, axis=-1) * GROUP + place % GROUP
    return jnp.minimum(index, n - 1).astype(jnp.int32)  # padding counts only against NaN


def _squared(a, b):
    """Squared distance of points (..., 3)."""
    return sum((a[..., i] - b[..., i]) ** 2 for i in range(3))


def gather(values: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of each sample. values: (B, N, ...), index: (B, I...) -> (B, I..., ...)."""
    return jax.vmap(lambda v, i: v[i])(values, index)


def interpolate(values: jax.Array, points: jax.Array, query: jax.Array) -> jax.Array:
    """Values at the queries: the mean of the three nearest points' by inverse distance.

    Weights 1 / (d + 1e-8), made to sum to one, with d the Euclidean distance; no gradient passes
    through the coordinates.

    Args:
      values: (B, N, C). points: (B, N, 3), N >= 3. query: (B, Q, 3).
    Returns:
      (B, Q, C).
    """
    points, query = lax.stop_gradient((points, query))
    index = nearest(query, points, 3)
    weight = 1 / (jnp.sqrt(_squared(query[:, :, None], gather(points, index))) + 1e-8)
    weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
    return jnp.sum(gather(values, index) * weight[..., None].astype(values.dtype), axis=2)
