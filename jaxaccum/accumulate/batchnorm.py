"""Batch norm as part of the recipe: statistics over groups of samples, whatever the microbatch.

Batch statistics are taken over groups of `size` consecutive samples of the effective batch;
samples of weight zero are masked out. A group may lie on several devices, which then add up their
sums of it, and only they, and in several microbatches that are computed one after the other
(accumulate.in_time). Each layer also reports additive moments, from which the
running statistics of the whole update are merged by the law of total variance and moved once.

Source: Ioffe and Szegedy 2015, arXiv:1502.03167; groups as in "ghost batch norm", Hoffer et al.
2017, arXiv:1705.08741.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum.accumulate.in_time import over_group

PyTree = Any
GROUP_AXIS = "group"  # of the mesh: the devices that a group lies on


class Groups(NamedTuple):
    """How a microbatch shares batch statistics.

    Attributes:
      size: samples per group; the microbatch is a multiple of it, or divides it: then the group
        lies on several devices, those along the mesh's axis `GROUP_AXIS`, or in several
        microbatches, or both.
      weight: (samples,) 1 for a real sample, 0 for a padded one.
      microbatches: of a group on one device; of more than one it is computed by
        `in_time.computed`.
    """

    size: int
    weight: jax.Array
    microbatches: int = 1


def normalise(x, scale, bias, groups: Groups, eps: float, silu: bool):
    """Batch norm over groups of samples, then optionally SiLU.

    One custom derivative for both, so that of everything inside only `x` is kept for the
    backward pass.

    Args:
      x: (samples, ..., channels).
      scale, bias: (channels,).
      groups: as the forward was given them.
      eps: added to the variance.
      silu: apply x * sigmoid(x) to the result.
    Returns:
      y like x, mean and variance (groups, channels) and the number of a group's values that are
      here, (groups,), in the dtype of scale. Only y is differentiable.
    """
    size, weight, microbatches = groups
    return _normalise(x, scale, bias, weight, size, eps, silu, microbatches)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _normalise(x, scale, bias, weight, size, eps, silu, microbatches):
    return _normalise_forward(x, scale, bias, weight, size, eps, silu, microbatches)[0]


def _grouped(x, weight, size):
    """x as (groups, size, pixels, channels) in at least float32, and each sample's weight.

    Weights act on a sample's sums over its pixels: as a factor of every value they would cost
    half as much as the whole network on CPU.
    """
    size = min(size, x.shape[0])
    xg = x.reshape(x.shape[0] // size, size, -1, x.shape[-1])
    xg = xg.astype(jnp.promote_types(x.dtype, jnp.float32))
    return xg, weight.reshape(-1, size, 1).astype(xg.dtype)


def _over_group(sums, x, size, microbatches):
    """Sums over the samples of a group that are here, as sums over the whole group."""
    if microbatches > 1:
        sums = jax.tree.map(over_group, sums)
    return sums if size <= x.shape[0] * microbatches else jax.lax.psum(sums, GROUP_AXIS)


def _everywhere(per_group):
    """(groups, channels), to be combined with all values of a group."""
    return per_group[:, None, None]


def _statistics(xg, wg, over):
    """Values of a group that are here, (groups, 1), of all of it, its mean and its variance."""
    here = jnp.sum(wg, axis=1) * xg.shape[2]
    total = jnp.sum(jnp.sum(xg, axis=2) * wg, axis=1)
    count, total = over((here, total))
    mean = total / jnp.maximum(count, 1)
    square = jnp.square(xg - _everywhere(mean))
    second = over(jnp.sum(jnp.sum(square, axis=2) * wg, axis=1))
    return here, count, mean, second / jnp.maximum(count, 1)


def _statistics_in_time(xg, wg, over):
    """The same, which reads the values once: in time each sum over the group ends a loop.

    The parts are merged as by Chan, Golub and LeVeque 1979; only their means wait for the total.
    """
    here = jnp.sum(wg, axis=1) * xg.shape[2]
    total = jnp.sum(jnp.sum(xg, axis=2) * wg, axis=1)
    own = total / jnp.maximum(here, 1)
    square = jnp.square(xg - _everywhere(own))
    within = jnp.sum(jnp.sum(square, axis=2) * wg, axis=1)
    count, total, within = over((here, total, within))
    mean = total / jnp.maximum(count, 1)
    between = over(here * jnp.square(own - mean))
    return here, count, mean, (within + between) / jnp.maximum(count, 1)


def _normalise_forward(x, scale, bias, weight, size, eps, silu, microbatches):
    xg, wg = _grouped(x, weight, size)

    def over(sums):
        return _over_group(sums, x, size, microbatches)

    statistics = _statistics if microbatches == 1 else _statistics_in_time
    here, count, mean, var = statistics(xg, wg, over)
    # A group of padding alone would be blown up by 1 / sqrt(eps) in every layer, to inf and NaN.
    inv = jnp.where(count > 0, jax.lax.rsqrt(var + eps), 0)
    y = (xg - _everywhere(mean)) * _everywhere(inv * scale) + bias
    # As a division XLA's CPU backend computes it once, not again wherever it is used.
    y = y / (1 + jnp.exp(-y)) if silu else y
    out = (y.astype(x.dtype).reshape(x.shape), mean, var, here[:, 0])
    return out, (x, scale, bias, weight, mean, inv, jnp.maximum(count, 1))


def _normalise_backward(size, eps, silu, microbatches, residuals, cotangents):
    x, scale, bias, weight, mean, inv, divisor = residuals

    def pulled_back(x, dy):
        """The cotangent of the affine map's result, and x normalised."""
        xg, wg = _grouped(x, weight, size)
        dy = dy.reshape(xg.shape).astype(xg.dtype)
        xhat = (xg - _everywhere(mean)) * _everywhere(inv)
        if silu:
            y = xhat * scale + bias
            t = 1 / (1 + jnp.exp(y))  # 1 - sigmoid(y)
            dy = dy * ((1 - t) * (1 + y * t))
        return dy, xhat, wg

    # Nothing depends on a padded sample's y, so its dy is zero and needs no weight here.
    dy, xhat, wg = pulled_back(x, cotangents[0])
    sum_dy = jnp.sum(dy, axis=(1, 2))
    sum_dy_xhat = jnp.sum(dy * xhat, axis=(1, 2))
    share = (wg / divisor[:, None])[:, :, None]
    all_dy, all_dy_xhat = _over_group((sum_dy, sum_dy_xhat), x, size, microbatches)
    dy, xhat, _ = pulled_back(*_read_again((x, cotangents[0])))
    pulled = (_everywhere(all_dy) + xhat * _everywhere(all_dy_xhat)) * share
    dx = (dy - pulled) * _everywhere(inv * scale)
    return (
        dx.astype(x.dtype).reshape(x.shape),
        jnp.sum(sum_dy_xhat, axis=0).astype(scale.dtype),
        jnp.sum(sum_dy, axis=0).astype(bias.dtype),
        jnp.zeros_like(weight),
    )


def _read_again(values):
    """values, of which XLA does not know on GPUs that it has seen them.

    A GPU would else write what the sums are of, in float32 for inputs of bfloat16, for the pass
    that follows: reading the inputs again moves less.
    """
    barrier = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(
        values, cuda=barrier, rocm=barrier, default=lambda values: values
    )


_normalise.defvjp(_normalise_forward, _normalise_backward)


def moments(mean, var, count, origin) -> dict[str, jax.Array]:
    """Moments of a layer that add up over groups, microbatches and devices.

    Args:
      mean, var: (groups, channels), biased variance; count: (groups,) values per channel, those
        of a group that are here.
      origin: (channels,) point to take the moments about; the running mean keeps the second
        moment from cancelling and is the same on every geometry.
    Returns:
      count (), first = sum of (x - origin) and second = sum of (x - origin)^2, (channels,).
    """
    mean, var, count, origin = jax.lax.stop_gradient((mean, var, count, origin))
    offset = mean - origin
    return {
        "count": jnp.sum(count),
        "first": jnp.sum(count[:, None] * offset, axis=0),
        "second": jnp.sum(count[:, None] * (var + jnp.square(offset)), axis=0),
    }


def move_statistics(stats: PyTree, moments: PyTree, momentum: jax.Array | float) -> PyTree:
    """Moves the running statistics by one update.

    Args:
      stats: nested dict with leaves {mean, var}; moments: same nesting with {count, first,
        second}, summed over the update; {} leaves the statistics alone.
      momentum: weight of the new statistics (PyTorch's convention).
    Returns:
      stats with mean + momentum * (batch mean - mean) and the unbiased batch variance likewise.
    """
    if not moments:
        return stats
    if "count" in moments:
        count = jnp.maximum(moments["count"], 1)
        offset = moments["first"] / count
        var = jnp.maximum(moments["second"] / count - jnp.square(offset), 0)
        var = var * (count / jnp.maximum(count - 1, 1))
        rate = jnp.where(moments["count"] > 0, momentum, 0.0)
        return {
            "mean": (stats["mean"] + rate * offset).astype(stats["mean"].dtype),
            "var": (stats["var"] + rate * (var - stats["var"])).astype(stats["var"].dtype),
        }
    assert isinstance(stats, Mapping)
    return {
        k: move_statistics(v, moments[k], momentum) if k in moments else v for k, v in stats.items()
    }
