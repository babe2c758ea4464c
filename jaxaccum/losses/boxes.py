"""Overlaps of axis-aligned boxes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    """max(a, b) whose gradient asks which is larger.

    That of `jnp.maximum` asks which one *equals* the maximum; XLA may compute an operand anew,
    rounded differently, in the program of the gradient, and then neither does.
    """
    return jnp.where(a > b, a, b)


def _smaller(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(a < b, a, b)


def complete_iou(
    a: jax.Array, b: jax.Array, eps: float = 1e-7, inverted: bool = False
) -> jax.Array:
    """Complete IoU of boxes (..., 4), x1 y1 x2 y2, broadcast against each other.

        CIoU = IoU - |centre distance|^2 / |enclosing diagonal|^2 - alpha v
        v = 4/pi^2 (atan(w_b/h_b) - atan(w_a/h_a))^2,  alpha = v / (1 - IoU + v)

    alpha is a constant of the gradient. Zheng et al. 2020, arXiv:1911.08287. As in the reference
    eps is added to the heights, the union and the squared diagonal.

    Args:
      inverted: boxes may be inside out, of negative width or height. The formula is the same, but
        where it divides by zero: a height or a union of exactly zero is taken as eps.
    """
    ax1, ay1, ax2, ay2 = (a[..., i] for i in range(4))
    bx1, by1, bx2, by2 = (b[..., i] for i in range(4))
    aw, ah = ax2 - ax1, ay2 - ay1 + eps
    bw, bh = bx2 - bx1, by2 - by1 + eps
    if inverted:
        ah, bh = (jnp.where(h == 0, eps, h) for h in (ah, bh))
    width = _larger(_smaller(ax2, bx2) - _larger(ax1, bx1), jnp.zeros_like(ax1))
    height = _larger(_smaller(ay2, by2) - _larger(ay1, by1), jnp.zeros_like(ay1))
    intersection = width * height
    union = aw * ah + bw * bh - intersection + eps
    if inverted:
        union = jnp.where(union == 0, eps, union)
    iou = intersection / union
    diagonal = (
        jnp.square(_larger(ax2, bx2) - _smaller(ax1, bx1))
        + jnp.square(_larger(ay2, by2) - _smaller(ay1, by1))
        + eps
    )
    distance = (jnp.square(bx1 + bx2 - ax1 - ax2) + jnp.square(by1 + by2 - ay1 - ay2)) / 4
    v = (4 / math.pi**2) * jnp.square(jnp.arctan(bw / bh) - jnp.arctan(aw / ah))
    alpha = jax.lax.stop_gradient(v / (v - iou + (1 + eps)))
    return iou - (distance / diagonal + v * alpha)
