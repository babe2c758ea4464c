"""The building blocks of the YOLO families, as Linen modules on NHWC images.

Submodules carry the names of the reference's state-dict keys ("cv1", "m.0", ...), so that a
parameter's path, joined by dots, is its key. Every block is called as `block(x, groups)`;
`groups` says how samples share batch statistics, None takes the running ones.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxaccum.accumulate import GroupBatchNorm, Groups
from jaxaccum.models import ops

Dtype = Any


def conv2d(features: int, kernel: int, stride: int = 1, groups: int = 1, **options) -> nn.Conv:
    """A convolution padded by kernel // 2 on every side, also at stride 2."""
    pad = kernel // 2
    return nn.Conv(
        features, (kernel, kernel), (stride, stride), padding=((pad, pad), (pad, pad)),
        feature_group_count=groups, conv_general_dilated=ops.conv_general_dilated, **options,
    )  # fmt: skip


class Conv(nn.Module):
    """Convolution without bias, batch norm, SiLU."""

    features: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    silu: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, groups: Groups | None) -> jax.Array:
        x = conv2d(
            self.features, self.kernel, self.stride, self.groups, use_bias=False, dtype=self.dtype,
            name="conv",
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


class C2f(nn.Module):
    """Split in two, a chain of bottlenecks on one half, everything concatenated."""

    features: int
    repeats: int = 1
    shortcut: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, groups: Groups | None) -> jax.Array:
        hidden = self.features // 2
        x = Conv(2 * hidden, dtype=self.dtype, name="cv1")(x, groups)
        parts = jnp.split(x, 2, axis=-1)
        for i in range(self.repeats):
            block = Bottleneck(hidden, self.shortcut, (3, 3), 1.0, self.dtype, name=f"m.{i}")
            parts.append(block(parts[-1], groups))
        x = jnp.concatenate(parts, axis=-1)
        return Conv(self.features, dtype=self.dtype, name="cv2")(x, groups)


class SPPF(nn.Module):
    """Three max pools in a row, every stage concatenated."""

    features: int
    size: int = 5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, groups: Groups | None) -> jax.Array:
        stages = [Conv(x.shape[-1] // 2, dtype=self.dtype, name="cv1")(x, groups)]
        for _ in range(3):
            stages.append(ops.max_pool(stages[-1], self.size))
        x = jnp.concatenate(stages, axis=-1)
        return Conv(self.features, dtype=self.dtype, name="cv2")(x, groups)
