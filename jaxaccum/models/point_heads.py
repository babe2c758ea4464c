"""Heads: from the features of a query to the offsets of the points around it.

Sources: Yang et al. 2018, arXiv:1712.07262 (folding).
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum.accumulate import Groups
from jaxaccum.machine.jax_stand_ins import gelu
from jaxaccum.models.point_layers import Dense, Dtype, largest, norm_points, wide


def grid(step: int) -> np.ndarray:
    """(step * step, 2) points of the square [-1, 1]^2, the first coordinate fastest."""
    line = np.linspace(-1, 1, step)
    return np.stack([np.tile(line, step), np.repeat(line, step)], axis=-1)


class Fold(nn.Module):
    """Points around a query: a grid, folded twice.

    Attributes:
      points: per query, a square number.
      hidden: channels of the first layer; the second has half as many.
    """

    points: int
    hidden: int = 256
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array, groups: Groups | None) -> jax.Array:
        """Features (B, M, C) to offsets (B, M, points, 3) in at least float32."""
        coordinates = wide(self.dtype)
        x = jnp.asarray(grid(math.isqrt(self.points)), coordinates)
        for name in ("folding1", "folding2"):
            x = self._layer(f"{name}.0", self.hidden)(x, features[:, :, None])
            x = jax.nn.relu(norm_points(f"{name}.1", x, groups))
            x = self._layer(f"{name}.3", self.hidden // 2)(x)
            x = jax.nn.relu(norm_points(f"{name}.4", x, groups))
            x = Dense(3, 1, dtype=coordinates, name=f"{name}.6")(x)
        return x

    def _layer(self, name, width):
        return Dense(width, 1, dtype=self.dtype, name=name)


class FullyConnected(nn.Module):
    """Points around a query: an MLP of its features and the largest features of all queries."""

    points: int
    hidden: int = 512
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array, groups: Groups | None) -> jax.Array:
        """Features (B, M, C) to offsets (B, M, points, 3) in at least float32."""
        del groups
        everywhere = largest(features, 1)[:, None]
        x = gelu(Dense(self.hidden, dtype=self.dtype, name="layer.fc1")(everywhere, features))
        x = Dense(3 * self.points, dtype=wide(self.dtype), name="layer.fc2")(x)
        return x.reshape(*features.shape[:2], self.points, 3)
