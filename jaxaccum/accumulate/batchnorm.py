"""Batch norm as part of the recipe: statistics over groups of samples, whatever the microbatch.

Batch statistics are taken over groups of `size` consecutive samples of the effective batch;
samples of weight zero are masked out. A group may lie on several devices, which then add up their
sums of it, and only they. Each layer also reports additive moments, from which the
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

PyTree = Any
GROUP_AXIS = "group"  # of the mesh: the devices that a group lies on


class Groups(NamedTuple):
    """How a microbatch shares batch statistics.

    Attributes:
      size: samples per group; the microbatch is a multiple of it, or divides it: then the group
        lies on size / microbatch devices, those along the mesh's axis `GROUP_AXIS`.
      weight: (samples,) 1 for a real sample, 0 for a padded one.
    """

    size: int
    weight: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def normalise(x, scale, bias, weight, size: int, eps: float, silu: bool):
    """Batch norm over groups of samples, then optionally SiLU.

    One custom derivative for both, so that of everything inside only `x` is kept for the
    backward pass.

    Args:
      x: (samples, ..., channels).
      scale, bias: (channels,).
      weight: (samples,) 0 or 1.
      size: samples per group, see `Groups`.
      eps: added to the variance.
      silu: apply x * sigmoid(x) to the result.
    Returns:
      y like x, mean and variance (groups, channels) and the number of a group's values that are
      here, (groups,), in the dtype of scale. Only y is differentiable.
    """
    return _normalise_forward(x, scale, bias, weight, size, eps, silu)[0]


def _grouped(x, weight, size):
    """x as (groups, size, pixels, channels) in at least float32, and each sample's weight.

    Weights act on a sample's sums over its pixels: as a factor of every value they would cost
    half as much as the whole network on CPU.
    """
    size = min(size, x.shape[0])
    xg = x.reshape(x.shape[0] // size, size, -1, x.shape[-1])
    xg = xg.astype(jnp.promote_types(x.dtype, jnp.float32))
    return xg, weight.reshape(-1, size, 1).astype(xg.dtype)


def _over_group(sums, x, size):
    """Sums over the samples of a group that are here, as sums over the whole group."""
    return sums if size <= x.shape[0] else jax.lax.psum(sums, GROUP_AXIS)


def _everywhere(per_group):
    """(groups, channels), to be combined with all values of a group."""
    return per_group[:, None, None]


def _normalise_forward(x, scale, bias, weight, size, eps, silu):
    xg, wg = _grouped(x, weight, size)
    here = jnp.sum(wg, axis=1) * xg.shape[2]
    total = jnp.sum(jnp.sum(xg, axis=2) * wg, axis=1)
    count, total = _over_group((here, total), x, size)
    divisor = jnp.maximum(count, 1)
    mean = total / divisor
    square = jnp.square(xg - _everywhere(mean))
    var = _over_group(jnp.sum(jnp.sum(square, axis=2) * wg, axis=1), x, size) / divisor
    # A group of padding alone would be blown up by 1 / sqrt(eps) in every layer, to inf and NaN.
    inv = jnp.where(count > 0, jax.lax.rsqrt(var + eps), 0)
    y = (xg - _everywhere(mean)) * _everywhere(inv * scale) + bias
    # As a division XLA's CPU backend computes it once, not again wherever it is used.
    y = y / (1 + jnp.exp(-y)) if silu else y
    out = (y.astype(x.dtype).reshape(x.shape), mean, var, here[:, 0])
    return out, (x, scale, bias, weight, mean, inv, divisor)


def _normalise_backward(size, eps, silu, residuals, cotangents):
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
    all_dy, all_dy_xhat = _over_group((sum_dy, sum_dy_xhat), x, size)
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


normalise.defvjp(_normalise_forward, _normalise_backward)


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
