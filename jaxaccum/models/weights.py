"""The reference's state-dict keys and layouts, to our parameter paths and back.

A parameter's path joined by dots is its key, but for the last word: kernel and scale are both
called weight there, and kernels are OIHW.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax
import numpy as np

PyTree = Any
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def key_of(path: tuple[str, ...]) -> str:
    """The state-dict key of a parameter or statistic."""
    return ".".join((*path[:-1], _LEAVES.get(path[-1], path[-1])))


def to_reference(tree: PyTree) -> dict[str, np.ndarray]:
    """Parameters, statistics or gradients under the reference's keys, in its layouts."""
    flat = flax.traverse_util.flatten_dict(tree)
    return {
        key_of(path): np.transpose(a, (3, 2, 0, 1)) if path[-1] == "kernel" else np.asarray(a)
        for path, a in flat.items()
    }


def from_reference(state: Mapping[str, np.ndarray], params: PyTree, stats: PyTree):
    """Fills parameters and statistics from a state dict.

    Args:
      state: key -> array; may hold more than is needed.
      params, stats: trees whose structure, shapes and dtypes are to be filled.
    Returns:
      (params, stats).
    Raises:
      KeyError: a key is missing. ValueError: a shape does not fit.
    """

    def fill(tree):
        flat = flax.traverse_util.flatten_dict(tree)
        new = {}
        for path, old in flat.items():
            key = key_of(path)
            if key not in state:
                raise KeyError(f"the state dict has no {key!r}")
            value = np.asarray(state[key])
            if path[-1] == "kernel":
                value = np.transpose(value, (2, 3, 1, 0))
            if value.shape != old.shape:
                raise ValueError(f"{key!r} has shape {value.shape}, the model needs {old.shape}")
            new[path] = value.astype(old.dtype)
        return flax.traverse_util.unflatten_dict(new)

    return fill(params), fill(stats)
