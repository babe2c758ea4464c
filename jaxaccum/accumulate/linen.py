"""Batch norm over groups as a layer of flax.linen; the one module of the core that needs Flax."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxaccum.accumulate.batchnorm import Groups, moments, normalise


class GroupBatchNorm(nn.Module):
    """Batch norm over groups, as a Linen layer, optionally followed by SiLU.

    Variables: params/{scale, bias}, batch_stats/{mean, var}; writes moments/{count, first,
    second} when called with groups.

    Attributes:
      eps: added to the variance.
      silu: apply SiLU to the result.
    """

    eps: float = 1e-3
    silu: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, groups: Groups | None) -> jax.Array:
        """x: (samples, ..., channels); groups: None normalises by the running statistics."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running = {
            "mean": self.variable("batch_stats", "mean", jnp.zeros, (channels,)).value,
            "var": self.variable("batch_stats", "var", jnp.ones, (channels,)).value,
        }
        if groups is None:
            factor = scale * jax.lax.rsqrt(running["var"] + self.eps)
            shift = bias - running["mean"] * factor
            y = x.astype(factor.dtype) * factor + shift
            return (nn.silu(y) if self.silu else y).astype(x.dtype)
        y, mean, var, count = normalise(x, scale, bias, groups, self.eps, self.silu)
        if self.is_mutable_collection("moments"):
            for name, value in moments(mean, var, count, running["mean"]).items():
                self.put_variable("moments", name, value)
        return y
