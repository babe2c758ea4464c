"""Groupers: from a cloud to its centres, each with features of its neighbourhood.

Sources: Wang et al. 2019, arXiv:1801.07829 (edge convolution).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxaccum.accumulate import Groups
from jaxaccum.models import points
from jaxaccum.models.point_layers import Dense, Dtype, EdgeMap, largest, leaky, norm_points


class EdgeGrouper(nn.Module):
    """Centres with features of their neighbourhoods, by four edge convolutions.

    Attributes:
      centres: points kept after the first convolution, and after the third.
    """

    centres: tuple[int, int]
    neighbours: int = 16
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, xyz: jax.Array, farthest: jax.Array, groups: Groups | None
    ) -> tuple[jax.Array, jax.Array]:
        """Centres (B, G, 3) and features (B, G, 128).

        Args:
          xyz: (B, N, 3). farthest: (B, >= centres[0]) its farthest points, in their order.
        """
        del groups  # group norms are of a sample
        x = Dense(8, 1, dtype=self.dtype, name="input_trans")(xyz)
        x = self._edges("layer1", 32, xyz, x, xyz, x)
        some = farthest[:, : self.centres[0]]
        sub, y = points.gather(xyz, some), points.gather(x, some)
        y = self._edges("layer2", 64, sub, y, xyz, x)
        y = self._edges("layer3", 64, sub, y, sub, y)
        # Not the first so many of `farthest`: equal distances are decided by a point's number.
        few = points.farthest_points(sub, self.centres[1])
        centres, z = points.gather(sub, few), points.gather(y, few)
        return centres, self._edges("layer4", 128, centres, z, sub, y)

    def _edges(self, name, features, q_xyz, q, v_xyz, v):
        """Edge convolution, group norm over a sample's pairs, leaky ReLU, maximum."""
        index = points.nearest(q_xyz, v_xyz, self.neighbours)
        x = EdgeMap(features, 2, use_bias=False, dtype=self.dtype, name=f"{name}.0")(q, v, index)
        norm = nn.GroupNorm(4, epsilon=1e-5, dtype=self.dtype, use_fast_variance=False,
                            name=f"{name}.1")  # fmt: skip
        return largest(leaky(norm(x)), 2)


class PointNetGrouper(nn.Module):
    """Centres with features of their 32 nearest points, by two small PointNets.

    In no published configuration. Neighbours keep their coordinates; none are relative to a centre.
    """

    centres: tuple[int, int]
    neighbours: int = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, xyz: jax.Array, farthest: jax.Array, groups: Groups | None
    ) -> tuple[jax.Array, jax.Array]:
        """Like `EdgeGrouper`, with 512 features."""
        centres = points.gather(xyz, farthest[:, : self.centres[1]])
        index = points.nearest(centres, xyz, self.neighbours)
        x = self._pair("first_conv", (128, 256), groups, points.gather(xyz, index))
        x = self._pair("second_conv", (512, 512), groups, largest(x, 2)[:, :, None], x)
        return centres, largest(x, 2)

    def _pair(self, name, widths, groups, *parts):
        x = Dense(widths[0], 1, dtype=self.dtype, name=f"{name}.0")(*parts)
        x = jax.nn.relu(norm_points(f"{name}.1", x, groups))
        return Dense(widths[1], 1, dtype=self.dtype, name=f"{name}.3")(x)
