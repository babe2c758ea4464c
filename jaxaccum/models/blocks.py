"""The building blocks of the YOLO families, as Linen modules on NHWC images.

Submodules carry the names of the reference's state-dict keys ("cv1", "m.0", ...), so that a
parameter's path, joined by dots, is its key. Every block is called as `block(x, groups)`;
`groups` says how samples share batch statistics, None takes the running ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxaccum.accumulate import GroupBatchNorm, Groups
from jaxaccum.models import ops

Dtype = Any
PyTree = Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def rematerialised(
    function: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    inputs: PyTree,
    in_segments: bool = False,
) -> PyTree:
    """function(params, inputs), its inner values not kept for the gradient but computed anew.

    What `jax.checkpoint` does (Chen et al. 2016, arXiv:1604.06174), on every backend. It holds the
    second computation back with a barrier, which XLA's CPU backend drops before it orders the
    program: all is then computed anew as early as can be, and kept. A branch is not torn apart so.

    Args:
      function: of pytrees of floating arrays, to such; closes over no traced value.
      in_segments: it is computed so (accumulate.in_time): the second computation then comes in
        loops of its own, which nothing needs to hold back.
    """
    return function(params, inputs)


def _rematerialised_forward(function, params, inputs, in_segments):
    return function(params, inputs), (params, inputs)


def _rematerialised_backward(function, in_segments, residuals, cotangents):
    def gradient(residuals, cotangents):
        return jax.vjp(function, *residuals)[1](cotangents)

    def cpu(residuals, cotangents):
        number = sum(a.ravel()[0] for a in jax.tree.leaves(cotangents))
        # XLA cannot know that this is no NaN; if it is one, so is the gradient.
        return jax.lax.cond(number == number, gradient, nan, residuals, cotangents)

    def nan(residuals, cotangents):
        return jax.tree.map(lambda a: a * jnp.nan, residuals)

    def default(residuals, cotangents):
        return gradient(*jax.lax.optimization_barrier((residuals, cotangents)))

    if in_segments:
        return gradient(residuals, cotangents)
    return jax.lax.platform_dependent(residuals, cotangents, cpu=cpu, default=default)


rematerialised.defvjp(_rematerialised_forward, _rematerialised_backward)


def conv2d(features: int, kernel: int, stride: int = 1, groups: int = 1, **options) -> nn.Conv:
    """A convolution padded by kernel // 2 on every side, also at stride 2."""
    pad = kernel // 2
    return nn.Conv(
        features, (kernel, kernel), (stride, stride), padding=((pad, pad), (pad, pad)),
        feature_group_count=groups,
        conv_general_dilated=ops.conv_general_dilated, **options,
    )  # fmt: skip


class Conv(nn.Module):
    """Convolution without bias, batch norm, SiLU."""

    features: int
    kernel: int = 1
    stride: int = 1
    channel_groups: int = 1
    silu: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, groups: Groups | None) -> jax.Array:
        x = conv2d(
            self.features, self.kernel, self.stride, self.channel_groups, use_bias=False,
            dtype=self.dtype, name="conv",
        )(x)  # fmt: skip
        return GroupBatchNorm(silu=self.silu, name="bn")(x, groups)


class Bottleneck(nn.Module):
    """Two convolutions, and the input added where it fits."""

    features: int
    shortcut: bool = True
    kernels: tuple[int, int] = (3, 3)
    expansion: float = 0.5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, groups: Groups | None) -> jax.Array:
        hidden = int(self.features * self.expansion)
        y = Conv(hidden, self.kernels[0], dtype=self.dtype, name="cv1")(x, groups)
        y = Conv(self.features, self.kernels[1], dtype=self.dtype, name="cv2")(y, groups)
        return x + y if self.shortcut and x.shape[-1] == self.features else y


class C3k(nn.Module):
    """Two branches from the input: a chain of bottlenecks, and a shortcut; then both together."""

    features: int
    repeats: int = 2
    shortcut: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, groups: Groups | None) -> jax.Array:
        hidden = self.features // 2
        y = Conv(hidden, dtype=self.dtype, name="cv1")(x, groups)
        for i in range(self.repeats):
            block = Bottleneck(hidden, self.shortcut, (3, 3), 1.0, self.dtype, name=f"m.{i}")
            y = block(y, groups)
        x = Conv(hidden, dtype=self.dtype, name="cv2")(x, groups)
        x = jnp.concatenate([y, x], axis=-1)
        return Conv(self.features, dtype=self.dtype, name="cv3")(x, groups)


class C2f(nn.Module):
    """Split in two, a chain of blocks on one half, everything concatenated."""

    features: int
    repeats: int = 1
    shortcut: bool = False
    expansion: float = 0.5
    dtype: Dtype = jnp.float32

    def inner(self, hidden: int, name: str) -> Callable[[jax.Array, Groups | None], jax.Array]:
        """A block of the chain."""
        return Bottleneck(hidden, self.shortcut, (3, 3), 1.0, self.dtype, name=name)

    @nn.compact
    def __call__(self, x: jax.Array, groups: Groups | None) -> jax.Array:
        hidden = int(self.features * self.expansion)
        x = Conv(2 * hidden, dtype=self.dtype, name="cv1")(x, groups)
        parts = jnp.split(x, 2, axis=-1)
        for i in range(self.repeats):
            parts.append(self.inner(hidden, f"m.{i}")(parts[-1], groups))
        x = jnp.concatenate(parts, axis=-1)
        return Conv(self.features, dtype=self.dtype, name="cv2")(x, groups)


class C3k2(C2f):
    """C2f whose blocks are C3k, or bottlenecks with half the hidden width.

    Attributes:
      c3k: they are C3k.
      attention: they are bottlenecks, and attention over the whole image behind each; whatever
        `c3k` says.
    """

    shortcut: bool = True
    c3k: bool = False
    attention: bool = False

    def inner(self, hidden: int, name: str) -> Callable[[jax.Array, Groups | None], jax.Array]:
        if self.attention:
            near = Bottleneck(hidden, self.shortcut, (3, 3), 0.5, self.dtype, name=f"{name}.0")
            far = PSABlock(max(hidden // 64, 1), self.dtype, name=f"{name}.1")
            return lambda x, groups: far(near(x, groups), groups)
        if self.c3k:
            return C3k(hidden, 2, self.shortcut, self.dtype, name=name)
        return Bottleneck(hidden, self.shortcut, (3, 3), 0.5, self.dtype, name=name)


class SPPF(nn.Module):
    """Three max pools in a row, every stage concatenated.

    Attributes:
      residual: YOLO26's form: no SiLU before the pools, and the input added. Its parameters are
        named and shaped like those of the other form.
    """

    features: int
    size: int = 5
    residual: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, groups: Groups | None) -> jax.Array:
        first = Conv(x.shape[-1] // 2, silu=not self.residual, dtype=self.dtype, name="cv1")
        stages = [first(x, groups)]
        for _ in range(3):
            stages.append(ops.max_pool(stages[-1], self.size))
        y = jnp.concatenate(stages, axis=-1)
        y = Conv(self.features, dtype=self.dtype, name="cv2")(y, groups)
        return x + y if self.residual and x.shape[-1] == self.features else y


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention over positions, the softmax in at least float32.

    `jax.nn.dot_product_attention` takes as long and as much memory on CPU, rounds to float32 in
    float64 too, and wants keys as wide as values.

    Args:
      q, k: (..., positions, heads, key width). v: (..., positions, heads, value width).
    Returns:
      like v.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("...qhd,...khd->...hqk", q, k, preferred_element_type=wide)
    weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("...hqk,...khd->...qhd", weights.astype(v.dtype), v)


class Attention(nn.Module):
    """Attention over all positions of an image, with a depthwise convolution of the values added.

    Keys are half as wide as values. The channels of `qkv` are [q, k, v] of one head after another.
    """

    heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, groups: Groups | None) -> jax.Array:
        n, h, w, c = x.shape
        value = c // self.heads
        key = value // 2
        qkv = Conv(c + 2 * key * self.heads, silu=False, dtype=self.dtype, name="qkv")(x, groups)
        qkv = qkv.reshape(n, h * w, self.heads, 2 * key + value)
        q, k, v = jnp.split(qkv, (key, 2 * key), axis=-1)
        out = attend(q, k, v).reshape(x.shape)
        place = Conv(c, 3, channel_groups=c, silu=False, dtype=self.dtype, name="pe")
        out = out + place(v.reshape(x.shape), groups)
        return Conv(c, silu=False, dtype=self.dtype, name="proj")(out, groups)


class PSABlock(nn.Module):
    """Attention and two convolutions, each added to its input."""

    heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, groups: Groups | None) -> jax.Array:
        c = x.shape[-1]
        x = x + Attention(self.heads, self.dtype, name="attn")(x, groups)
        y = Conv(2 * c, dtype=self.dtype, name="ffn.0")(x, groups)
        return x + Conv(c, silu=False, dtype=self.dtype, name="ffn.1")(y, groups)


class C2PSA(nn.Module):
    """Split in two, attention on one half."""

    features: int
    repeats: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, groups: Groups | None) -> jax.Array:
        hidden = self.features // 2
        x = Conv(2 * hidden, dtype=self.dtype, name="cv1")(x, groups)
        a, b = jnp.split(x, 2, axis=-1)
        for i in range(self.repeats):
            b = PSABlock(max(hidden // 64, 1), self.dtype, name=f"m.{i}")(b, groups)
        x = jnp.concatenate([a, b], axis=-1)
        return Conv(self.features, dtype=self.dtype, name="cv2")(x, groups)


class AreaAttention(nn.Module):
    """Attention inside of each of `area` horizontal stripes of an image, heads of 32 channels.

    Tian et al. 2025, arXiv:2502.12524. The `turbo` form, of the authors' later code, has two
    projections (all of q before all of k, and v) and a smaller kernel for the values.
    """

    area: int = 1
    turbo: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, groups: Groups | None) -> jax.Array:
        n, h, w, c = x.shape
        if h * w % self.area:
            raise ValueError(
                f"area attention cuts {h} x {w} positions into {self.area} equal stripes; use an "
                "image size that is a multiple of 32"
            )
        heads = c // 32
        if self.turbo:
            qk = Conv(2 * c, silu=False, dtype=self.dtype, name="qk")(x, groups)
            v = Conv(c, silu=False, dtype=self.dtype, name="v")(x, groups)
            q, k, v = (a.reshape(n, h * w, heads, 32) for a in (*jnp.split(qk, 2, axis=-1), v))
        else:
            qkv = Conv(3 * c, silu=False, dtype=self.dtype, name="qkv")(x, groups)
            q, k, v = jnp.split(qkv.reshape(n, h * w, heads, 96), 3, axis=-1)
        striped = (a.reshape(n, self.area, -1, heads, 32) for a in (q, k, v))
        out = attend(*striped).reshape(x.shape)
        kernel = 5 if self.turbo else 7
        place = Conv(c, kernel, channel_groups=c, silu=False, dtype=self.dtype, name="pe")
        out = out + place(v.reshape(x.shape), groups)
        return Conv(c, silu=False, dtype=self.dtype, name="proj")(out, groups)


class AreaBlock(nn.Module):
    """Area attention and two convolutions, each added to its input."""

    area: int
    mlp_ratio: float
    turbo: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, groups: Groups | None) -> jax.Array:
        c = x.shape[-1]
        x = x + AreaAttention(self.area, self.turbo, self.dtype, name="attn")(x, groups)
        y = Conv(int(c * self.mlp_ratio), dtype=self.dtype, name="mlp.0")(x, groups)
        return x + Conv(c, silu=False, dtype=self.dtype, name="mlp.1")(y, groups)


class A2C2f(nn.Module):
    """A chain of stages, all concatenated: pairs of area blocks, or C3k where `area` is 0.

    Attributes:
      residual: add the input, the result scaled per channel by `gamma` (area stages only).
    """

    features: int
    repeats: int = 1
    area: int = 1
    residual: bool = False
    mlp_ratio: float = 2.0
    turbo: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, groups: Groups | None) -> jax.Array:
        hidden = self.features // 2
        if self.area and hidden % 32:
            raise ValueError(f"A2C2f of {self.features} channels: half of them is not 32 a head")
        parts = [Conv(hidden, dtype=self.dtype, name="cv1")(x, groups)]
        for i in range(self.repeats):
            y = parts[-1]
            if self.area:
                for j in range(2):
                    options = (self.area, self.mlp_ratio, self.turbo, self.dtype)
                    y = AreaBlock(*options, name=f"m.{i}.{j}")(y, groups)
            else:
                y = C3k(hidden, 2, True, self.dtype, name=f"m.{i}")(y, groups)
            parts.append(y)
        y = jnp.concatenate(parts, axis=-1)
        y = Conv(self.features, dtype=self.dtype, name="cv2")(y, groups)
        if not (self.residual and self.area):
            return y
        gamma = self.param("gamma", nn.initializers.constant(0.01), (self.features,))
        return x + gamma.astype(y.dtype) * y
