"""Convolution and pooling that stay fast inside of a loop on every backend.

XLA's CPU backend rewrites convolutions into a fast form only outside of loops; the gradients
of a plain convolution inside of `scan` run 8 to 12 times slower than they should. Here the
gradients are written in the form that needs no rewriting, or left to oneDNN where that is installed
(machine.onednn). The choice is made when a program is lowered (`jax.lax.platform_dependent`), so
GPU and TPU programs are the plain ones.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxaccum.machine import onednn

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def conv_general_dilated(
    lhs, rhs, window_strides, padding, lhs_dilation=None, rhs_dilation=None,
    dimension_numbers=None, feature_group_count=1, precision=None,
):  # fmt: skip
    """A drop-in for `lax.conv_general_dilated` as `flax.linen.Conv` calls it for images.

    Args:
      lhs: (N, H, W, C). rhs: (kh, kw, C // groups, features). padding: explicit pairs.
    Returns:
      (N, H', W', features).
    Raises:
      ValueError: a dilated convolution, or padding by name.
    """
    del dimension_numbers
    dilated = [d for d in (lhs_dilation, rhs_dilation) if d is not None and set(d) != {1}]
    if dilated or isinstance(padding, str):
        raise ValueError("only explicitly padded convolutions without dilation are provided here")
    strides = tuple(window_strides)
    pads = tuple((int(a), int(b)) for a, b in padding)
    groups = feature_group_count
    if groups == 1:
        return _conv(lhs, rhs, strides, pads, precision)
    if groups == lhs.shape[-1] == rhs.shape[-1]:
        return _depthwise(lhs, rhs, strides, pads, precision)
    return _grouped(lhs, rhs, strides, pads, precision, groups)


def _plain(x, w, strides, pads, precision, groups=1):
    return lax.conv_general_dilated(
        x, w, strides, pads, dimension_numbers=DIMENSIONS, feature_group_count=groups,
        precision=precision,
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(x, w, strides, pads, precision):
    def cpu(x, w):
        if onednn.takes(x, w, strides):
            return _library(x, w, strides, pads, 1)
        if w.shape[:2] == (1, 1) and strides == (1, 1):
            return jnp.dot(x, w[0, 0], precision=precision)
        return _plain(x, w, strides, pads, precision)

    return lax.platform_dependent(
        x, w, cpu=cpu, default=lambda x, w: _plain(x, w, strides, pads, precision)
    )


def _conv_forward(x, w, strides, pads, precision):
    return _conv(x, w, strides, pads, precision), (x, w)


def _conv_backward(strides, pads, precision, residuals, dy):
    def plain(x, w, dy):
        return jax.vjp(lambda x, w: _plain(x, w, strides, pads, precision), x, w)[1](dy)

    def cpu(x, w, dy):
        if onednn.takes(x, w, strides):
            return _library_backward(strides, pads, 1, (x, w), dy)
        if w.shape[:2] == (1, 1) and strides == (1, 1):
            kernel = w[0, 0]
            flat = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
            return (
                jnp.dot(dy, kernel.T, precision=precision),
                jnp.dot(flat[0].T, flat[1], precision=precision)[None, None],
            )
        dy = _computed_once(dy)
        sizes = list(zip(x.shape[1:3], dy.shape[1:3], w.shape[:2], strides, pads, strict=True))
        # dx: the dilated cotangent convolved with the flipped kernel.
        flipped = lax.transpose(lax.rev(w, (0, 1)), (0, 1, 3, 2))
        dx_pads = [
            (k - 1 - lo, n - ((o - 1) * s + 1 + (k - 1 - lo) - k + 1))
            for n, o, k, s, (lo, _) in sizes
        ]
        dx = lax.conv_general_dilated(
            dy, flipped, (1, 1), dx_pads, lhs_dilation=strides, dimension_numbers=DIMENSIONS,
            precision=precision,
        )  # fmt: skip
        # dw: input channels play the batch, the batch plays the features.
        dw_pads = [(lo, k - 1 + (o - 1) * s + 1 - n - lo) for n, o, k, s, (lo, _) in sizes]
        dw = lax.conv_general_dilated(
            lax.transpose(x, (3, 1, 2, 0)), lax.transpose(dy, (1, 2, 0, 3)), (1, 1), dw_pads,
            rhs_dilation=strides, dimension_numbers=DIMENSIONS, precision=precision,
        )  # fmt: skip
        return dx, lax.transpose(dw, (1, 2, 0, 3))

    x, w = residuals
    return lax.platform_dependent(x, w, dy, cpu=cpu, default=plain)


_conv.defvjp(_conv_forward, _conv_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _library(x, w, strides, pads, groups):
    """A convolution by oneDNN."""
    like = jax.eval_shape(lambda x, w: _plain(x, w, strides, pads, None, groups), x, w)
    return onednn.forward(like, x, w, strides, pads, groups)


def _library_forward(x, w, strides, pads, groups):
    return _library(x, w, strides, pads, groups), (x, w)


def _library_backward(strides, pads, groups, residuals, dy):
    def plain(x, w, dy):
        return jax.vjp(lambda x, w: _plain(x, w, strides, pads, None, groups), x, w)[1](dy)

    x, w = residuals
    like = jax.eval_shape(plain, x, w, dy)
    return onednn.gradients(like, x, w, dy, strides, pads, groups)


_library.defvjp(_library_forward, _library_backward)


def _computed_once(value):
    """value, which XLA's CPU backend then computes once, and not in each place that uses it.

    It puts cheap arithmetic into every consumer, and a consumer that transposes or shifts runs
    several times slower for it. Divisions are not cheap in its eyes, and it cannot see that these
    are by 1 (by one number for all it would make a multiplication, which is cheap again).
    """
    return value / jnp.where(value == value, 1, value)


def _depthwise(x, w, strides, pads, precision):
    """One kernel per channel. On CPU by oneDNN or as shifted multiply-adds."""

    def cpu(x, w):
        if onednn.takes(x, w, strides):
            return _library(x, w, strides, pads, x.shape[-1])
        return _shifted(x, w, strides, pads)

    def default(x, w):
        return _plain(x, w, strides, pads, precision, groups=x.shape[-1])

    return lax.platform_dependent(x, w, cpu=cpu, default=default)


def _grouped(x, w, strides, pads, precision, groups):
    """Some channels to a kernel."""

    def cpu(x, w):
        if onednn.takes(x, w, strides):
            return _library(x, w, strides, pads, groups)
        return default(x, w)

    def default(x, w):
        parts = zip(jnp.split(x, groups, axis=-1), jnp.split(w, groups, axis=-1), strict=True)
        return jnp.concatenate([_conv(x, w, strides, pads, precision) for x, w in parts], axis=-1)

    return lax.platform_dependent(x, w, cpu=cpu, default=default)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _shifted(x, w, strides, pads):
    # XLA would do all multiply-adds again in each part of batch norm and in each gradient, and
    # the gradient of the input would do them once more for each place of the kernel.
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    total = functools.reduce(jnp.add, (a * w[i, j, 0] for i, j, a in _shifts(padded, w, strides)))
    return _computed_once(total)


def _shifted_forward(x, w, strides, pads):
    return _shifted(x, w, strides, pads), (x, w)


def _shifted_backward(strides, pads, residuals, dy):
    x, w = residuals
    dy = _computed_once(dy)
    # dx: the dilated cotangent with the flipped kernel, padded to the size that gives x's.
    edges = [
        (k - 1 - lo, n + lo - (o - 1) * s - 1, s - 1)
        for n, o, k, s, (lo, _) in zip(
            x.shape[1:3], dy.shape[1:3], w.shape[:2], strides, pads, strict=True
        )
    ]
    spread = lax.pad(dy, jnp.zeros([], dy.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    flipped = lax.rev(w, (0, 1))
    dx = functools.reduce(jnp.add, (a * flipped[i, j, 0] for i, j, a in _shifts(spread, w, (1, 1))))
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    dw = jnp.stack([jnp.sum(a * dy, (0, 1, 2)) for _, _, a in _shifts(padded, w, strides)])
    return _computed_once(dx), dw.reshape(w.shape)


_shifted.defvjp(_shifted_forward, _shifted_backward)


def _shifts(padded, w, strides):
    """(i, j, what element i, j of the kernel w meets) for each of its elements."""
    kernel = w.shape[:2]
    last = [(n - k) // s * s for n, k, s in zip(padded.shape[1:3], kernel, strides, strict=True)]
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            yield (
                i,
                j,
                padded[:, i : i + last[0] + 1 : strides[0], j : j + last[1] + 1 : strides[1]],
            )


def max_pool(x: jax.Array, size: int) -> jax.Array:
    """Max pool with stride 1 that keeps the size. x: (N, H, W, C), size odd.

    On CPU along one axis and then the other, remembering where each maximum came from: XLA
    computes the input anew wherever it fuses it, rounded differently, so a gradient that asks
    which element *equals* the maximum loses some.
    """
    reach = size // 2

    def default(x):
        return lax.reduce_window(
            x, -jnp.inf, lax.max, (1, size, size, 1), (1, 1, 1, 1),
            ((0, 0), (reach, reach), (reach, reach), (0, 0)),
        )  # fmt: skip

    def cpu(x):
        return _max_along(_max_along(x, 1, size), 2, size)

    return lax.platform_dependent(x, cpu=cpu, default=default)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _max_along(x, axis, size):
    return _max_along_forward(x, axis, size)[0]


def _max_along_forward(x, axis, size):
    reach = size // 2
    place = lax.broadcasted_iota(jnp.int32, x.shape, axis)

    def larger(a, b):
        (value_a, place_a), (value_b, place_b) = a, b
        first = (value_a > value_b) | ((value_a == value_b) & (place_a < place_b))
        return jnp.where(first, value_a, value_b), jnp.where(first, place_a, place_b)

    start = jnp.asarray(-jnp.inf, x.dtype), jnp.int32(jnp.iinfo(jnp.int32).max)
    window = tuple(size if a == axis else 1 for a in range(x.ndim))
    pads = [(reach, reach) if a == axis else (0, 0) for a in range(x.ndim)]
    y, taken = lax.reduce_window((x, place), start, larger, window, (1,) * x.ndim, pads)
    return y, taken - place


def _max_along_backward(axis, size, offset, dy):
    reach = size // 2

    def shifted(a, fill):
        pads = [(reach, reach) if i == axis else (0, 0) for i in range(a.ndim)]
        padded = jnp.pad(a, pads, constant_values=fill)
        return [lax.slice_in_dim(padded, i, i + a.shape[axis], axis=axis) for i in range(size)]

    parts = [
        jnp.where(o == reach - i, d, 0)
        for i, (o, d) in enumerate(zip(shifted(offset, size), shifted(dy, 0), strict=True))
    ]
    return (functools.reduce(jnp.add, parts),)


_max_along.defvjp(_max_along_forward, _max_along_backward)


def upsample(x: jax.Array) -> jax.Array:
    """Nearest-neighbour upsampling by two: every pixel becomes a 2x2 block."""
    n, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)
