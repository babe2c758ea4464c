"""Layers of networks on clouds (B, N, channels): linear maps, norms, attention, edge maps.

Features are computed in `dtype`; coordinates keep at least float32, also where they enter a layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxaccum.accumulate import GroupBatchNorm, Groups
from jaxaccum.models import points

Dtype = Any
SLOPE = 0.2  # of every leaky ReLU
BATCH_NORM_EPS = 1e-5


def wide(dtype: Dtype) -> Dtype:
    """The dtype of coordinates where features have that one."""
    return jnp.promote_types(dtype, jnp.float32)


def leaky(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, SLOPE * x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def largest(x: jax.Array, axis: int) -> jax.Array:
    """Maximum over an axis; the first of equal values takes the whole gradient.

    Its own derivative, since `x == max(x)` fails where a fused program computes x twice.
    """
    return jnp.max(x, axis)


def _largest_forward(x, axis):
    place = jnp.arange(x.shape[axis]).reshape([-1 if i == axis % x.ndim else 1
                                               for i in range(x.ndim)])  # fmt: skip
    return jnp.max(x, axis), (jnp.argmax(x, axis), place)


def _largest_backward(axis, residuals, dy):
    index, place = residuals
    return (jnp.where(jnp.expand_dims(index, axis) == place, jnp.expand_dims(dy, axis), 0),)


largest.defvjp(_largest_forward, _largest_backward)


@jax.custom_vjp
def settled(x: jax.Array) -> jax.Array:
    """x, whose gradient is computed once.

    XLA's CPU backend would fuse the sums of gradients along a chain of residual blocks, and those
    of the norms with them, into every layer that reads one: work that grows with the square of the
    depth. It fuses nothing across a branch; barriers it drops before.
    """
    return x


def _settled_backward(_, dy):
    def cpu(dy):
        first = dy.ravel()[0]
        return jax.lax.cond(first == first, lambda a: a, lambda a: a * jnp.nan, dy)

    return (jax.lax.platform_dependent(dy, cpu=cpu, default=lambda dy: dy),)


settled.defvjp(lambda x: (x, None), _settled_backward)


class Dense(nn.Module):
    """A linear map of channels.

    Attributes:
      features: channels of the result.
      axes: unit axes before those of the kernel, as a convolution of size 1 over so many has.
    """

    features: int
    axes: int = 0
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, *parts: jax.Array) -> jax.Array:
        """Maps the channels of all parts (..., c_i) together, in their order.

        Their other axes broadcast; what is the same for many points is multiplied once.
        """
        inputs = sum(part.shape[-1] for part in parts)
        shape = (*[1] * self.axes, inputs, self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        total: Any = 0
        start = 0
        for part in parts:
            dtype = jnp.promote_types(part.dtype, self.dtype)
            stop = start + part.shape[-1]
            rows = kernel.reshape(inputs, self.features)[start:stop]
            total = total + part.astype(dtype) @ rows.astype(dtype)
            start = stop
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            total = total + bias.astype(total.dtype)
        return total.astype(self.dtype)


def chain(
    prefix: str,
    widths: tuple[int, ...],
    activation: Callable[[jax.Array], jax.Array],
    *parts: jax.Array,
    axes: int = 0,
    dtype: Dtype,
    last: Dtype = None,
) -> jax.Array:
    """Linear maps "prefix.0", "prefix.2", ... with an activation in between.

    Args:
      widths: of the maps. parts: the input of the first. axes: see `Dense`.
      dtype: of the results; last: of the last one, if it is another.
    """
    for i, width in enumerate(widths):
        final = i == len(widths) - 1
        layer = Dense(
            width, axes, dtype=last or dtype if final else dtype, name=f"{prefix}.{2 * i}"
        )
        x = layer(*parts)
        parts = (x if final else activation(x),)
    return parts[0]


def normed_pair(prefix: str, hidden: int, features: int, x, groups: Groups | None, dtype: Dtype):
    """Convolution, batch norm, leaky ReLU, convolution: "prefix.0", ".1" and ".3"."""
    x = Dense(hidden, 1, dtype=dtype, name=f"{prefix}.0")(x)
    x = leaky(GroupBatchNorm(BATCH_NORM_EPS, name=f"{prefix}.1")(x, groups))
    return Dense(features, 1, dtype=dtype, name=f"{prefix}.3")(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalise(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Layer norm of (..., C); keeps only the input and two numbers per token for its gradient."""
    return _normalise_forward(x, scale, bias, eps)[0]


def _normalise_forward(x, scale, bias, eps):
    centred = x.astype(wide(x.dtype))
    mean = jnp.mean(centred, axis=-1, keepdims=True)
    centred = centred - mean
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    y = centred * inverse * scale + bias
    return y.astype(x.dtype), (x, scale, bias, mean, inverse)


def _normalise_backward(eps, residuals, dy):
    x, scale, bias, mean, inverse = residuals
    dy = dy.astype(mean.dtype)
    normal = (x.astype(mean.dtype) - mean) * inverse
    pulled = dy * scale
    first = jnp.mean(pulled, axis=-1, keepdims=True)
    second = jnp.mean(pulled * normal, axis=-1, keepdims=True)
    dx = inverse * (pulled - first - normal * second)
    tokens = tuple(range(x.ndim - 1))
    return (
        dx.astype(x.dtype),
        jnp.sum(dy * normal, axis=tokens).astype(scale.dtype),
        jnp.sum(dy, axis=tokens).astype(bias.dtype),
    )


normalise.defvjp(_normalise_forward, _normalise_backward)


class LayerNorm(nn.Module):
    """Layer norm over channels, in at least float32 (Ba et al. 2016, arXiv:1607.06450)."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        dtype = wide(x.dtype)
        return normalise(x, scale.astype(dtype), bias.astype(dtype), self.eps)


@jax.custom_vjp
def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention, the softmax in at least float32.

    Its gradient computes the weights again, so that none of the size queries x keys are kept
    (Dao et al. 2022, arXiv:2205.14135).

    Args:
      q: (..., queries, heads, width). k, v: (..., keys, heads, width).
    Returns:
      like q.
    """
    return _attend_forward(q, k, v)[0]


def _by_head(x):
    return jnp.swapaxes(x, -2, -3)


def _logits(q, k):
    product = jnp.matmul(q, jnp.swapaxes(k, -1, -2), preferred_element_type=wide(q.dtype))
    return product * q.shape[-1] ** -0.5


def _attend_forward(q, k, v):
    q, k, v = map(_by_head, (q, k, v))
    logits = _logits(q, k)
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=total.dtype) / total
    return _by_head(out.astype(v.dtype)), (q, k, v, out, top + jnp.log(total))


def _attend_backward(residuals, dy):
    q, k, v, out, log_total = residuals
    dy = _by_head(dy)
    weights = jnp.exp(_logits(q, k) - log_total)
    dv = jnp.matmul(jnp.swapaxes(weights, -1, -2).astype(v.dtype), dy)
    pulled = jnp.matmul(dy, jnp.swapaxes(v, -1, -2), preferred_element_type=out.dtype)
    pulled = pulled - jnp.sum(dy.astype(out.dtype) * out, axis=-1, keepdims=True)
    dlogits = (weights * pulled * q.shape[-1] ** -0.5).astype(q.dtype)
    dq, dk = jnp.matmul(dlogits, k), jnp.matmul(jnp.swapaxes(dlogits, -1, -2), q)
    return _by_head(dq), _by_head(dk), _by_head(dv)


attend.defvjp(_attend_forward, _attend_backward)


@jax.custom_vjp
def thirds(x: jax.Array) -> tuple[jax.Array, ...]:
    """The channels in three equal parts; the gradient joins them in one pass."""
    return tuple(jnp.split(x, 3, axis=-1))


thirds.defvjp(lambda x: (thirds(x), None), lambda _, dy: (jnp.concatenate(dy, axis=-1),))


class EdgeMap(nn.Module):
    """A linear map of [v_j - q_i, q_i] for the neighbours j of every i.

    Computed as W1 v_j + (W2 - W1) q_i: a product per point instead of one per pair.
    """

    features: int
    axes: int = 0
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, q: jax.Array, v: jax.Array, index: jax.Array | None, pool: bool = False
    ) -> jax.Array:
        """The map of every pair, or its maximum over the neighbours.

        Args:
          q: (B, Q, C). v: (B, N, C) with index (B, Q, k), or the neighbours (B, Q, k, C) with None.
          pool: take the maximum.
        Returns:
          (B, Q, k, features), or (B, Q, features).
        """
        inputs = q.shape[-1]
        shape = (*[1] * self.axes, 2 * inputs, self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        near, centre = jnp.split(kernel.reshape(2 * inputs, self.features), 2)
        # The two products nearly cancel where features are alike.
        product = functools.partial(jnp.matmul, preferred_element_type=wide(self.dtype))
        own = product(q.astype(self.dtype), (centre - near).astype(self.dtype))
        if self.use_bias:
            own = own + self.param("bias", nn.initializers.zeros, (self.features,)).astype(
                own.dtype
            )
        pairs = product(v.astype(self.dtype), near.astype(self.dtype))
        if index is not None:
            pairs = points.gather(pairs, index)
        y = largest(pairs, 2) + own if pool else pairs + own[:, :, None]
        return y.astype(self.dtype)


def norm_points(name: str, x: jax.Array, groups: Groups | None) -> jax.Array:
    """Batch norm of (B, M, k, C) over all points of a group's samples."""
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    return GroupBatchNorm(BATCH_NORM_EPS, name=name)(flat, groups).reshape(x.shape)
