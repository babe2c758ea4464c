"""The gradient noise scale: how large an effective batch still helps, from a window's own sums.

McCandlish et al. 2018, arXiv:1812.06162, appendix A. With G the true gradient of the mean loss and
Sigma the covariance of one sample's, the noise scale is tr(Sigma) / |G|^2: far below it a batch
twice as large halves the updates needed, far above it saves none.

Microbatch m of n_m samples adds c_m to the window's gradient g = sum c_m of N = sum n_m samples.
With q = sum n_m^2 / N^2 and S = sum |c_m|^2,

    E S = q |G|^2 + tr(Sigma) / N,    E |g|^2 = |G|^2 + tr(Sigma) / N

give both without bias. c_m needs denominators that are known only when the window ends, so the
inner products of the microbatch's gradients, one for each pair of denominators, are summed instead.
Samples of a batch-norm group depend on each other a little; the estimate takes them as independent.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def products(
    gradients: Mapping[str, PyTree], samples: jax.Array, disjoint: bool = False
) -> dict[str, Any]:
    """What one microbatch adds: inner products of its gradients, and its samples squared.

    Args:
      disjoint: the gradients are of different parameters (accumulate.owners): their products with
        one another are zero, and left out.
    """
    pairs = itertools.combinations_with_replacement(sorted(gradients), 2)
    return {
        "pairs": {
            (a, b): _inner(gradients[a], gradients[b]) for a, b in pairs if a == b or not disjoint
        },
        "samples": jnp.square(samples),
    }


def estimate(
    summed: Mapping[str, Any],
    factors: Mapping[str, jax.Array | float],
    norm: jax.Array,
    samples: jax.Array,
    scale: float,
) -> dict[str, jax.Array]:
    """tr(Sigma) and |G|^2 of the mean loss, one window's word; average them before dividing.

    Args:
      summed: `products`, summed over the window.
      factors: of each gradient in the window's.
      norm: of the window's gradient, that of `scale * loss`.
      samples: of the window.
    """
    parts = sum(
        (1 if a == b else 2) * factors[a] * factors[b] * value
        for (a, b), value in summed["pairs"].items()
    ) / jnp.square(scale)
    whole = jnp.square(norm / scale)
    q = summed["samples"] / jnp.square(samples)
    return {
        "noise/trace": samples * (parts - q * whole) / (1 - q),
        "noise/square": (whole - parts) / (1 - q),
    }


class NoiseScale:
    """The ratio of both estimates, each averaged over updates.

    One window's estimates scatter widely, and their ratio is biased.

    Args:
      state: of an earlier run, to continue from.
      decay: of the averages, for each update.
    """

    def __init__(self, state: Mapping[str, float] | None = None, decay: float = 0.99):
        self.decay = decay
        self.state = dict(state) if state else {"trace": 0.0, "square": 0.0, "weight": 0.0}

    def add(self, trace: float, square: float) -> None:
        """Takes an update's estimates in."""
        for name, value in (("trace", trace), ("square", square), ("weight", 1.0)):
            self.state[name] = self.decay * self.state[name] + (1 - self.decay) * value

    def value(self) -> float | None:
        """In samples; None while the averaged |G|^2 is not positive: too noisy to say."""
        square = self.state["square"]
        return max(self.state["trace"], 0.0) / square if square > 0 else None

    def record(self, group: int | None) -> dict[str, float]:
        """For the log: the scale in samples, and an effective batch of that size in whole groups;
        {} before there is an estimate."""
        value, group = self.value(), group or 1
        if value is None:
            return {}
        return {
            "noise/scale": value,
            "noise/suggested_nbs": max(round(value / group), 1) * group,
        }


def _inner(a: PyTree, b: PyTree) -> jax.Array:
    parts = [jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
    return jnp.sum(jnp.stack(parts))
