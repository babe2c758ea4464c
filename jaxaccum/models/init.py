"""Parameters from random numbers, made on the host.

Every parameter is drawn by numpy from its own path and the seed: the same values on every
device count and JAX version, and no compilation.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def initialise(
    model: nn.Module,
    example: jax.ShapeDtypeStruct | tuple[jax.ShapeDtypeStruct, ...],
    seed: int,
    constants: Mapping[str, float] | None = None,
    deviation: Callable[[str], float | Literal["xavier"] | None] = lambda path: None,
    dtype: Any = np.float32,
    twin: Callable[[str], str] = lambda path: path,
) -> tuple[PyTree, PyTree]:
    """Initial parameters and running statistics.

    Kernels and biases of convolutions and linear maps are uniform in +-1/sqrt(fan_in) (PyTorch's
    default), norms start as the identity.

    Args:
      model: a Linen module.
      example: shape and dtype of its input, or of its inputs.
      seed: the run's seed.
      constants: parameter path ("model.22/cv2.0.2/bias") -> value to fill it with.
      deviation: parameter path -> standard deviation, for kernels and biases that start normal
        instead (0: at zero); "xavier" for sqrt(2 / (fan_in + fan_out)) (Glorot and Bengio 2010).
      dtype: of the parameters and statistics.
      twin: parameter path -> the path that its values are drawn by; of another parameter of its
        shape where both start the same.
    Returns:
      (params, stats), nested dicts of numpy arrays.
    Raises:
      KeyError: a parameter that is none of these and has no constant, or a constant of none.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    shapes = jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x), *inputs)
    constants = dict(constants or {})
    flat = flax.traverse_util.flatten_dict(shapes["params"])
    params = {}
    for path, leaf in flat.items():
        name = "/".join(path)
        if name in constants:
            params[path] = np.full(leaf.shape, constants.pop(name), dtype)
        elif path[-1] == "scale":
            params[path] = np.ones(leaf.shape, dtype)
        elif path[-1] == "bias" and (*path[:-1], "kernel") not in flat:
            params[path] = np.zeros(leaf.shape, dtype)
        elif (*path[:-1], "kernel") not in flat:
            raise KeyError(f"{name!r} has no initial value; give it one in `constants`")
        else:
            kernel = flat[(*path[:-1], "kernel")].shape
            bound = 1 / np.sqrt(np.prod(kernel[:-1]))
            rng = np.random.default_rng([seed, zlib.crc32(twin(name).encode())])
            sigma = deviation(name)
            if sigma == "xavier":
                sigma = np.sqrt(2 / (np.prod(kernel[:-2]) * (kernel[-2] + kernel[-1])))
            if sigma is not None:
                params[path] = rng.normal(0.0, sigma, leaf.shape).astype(dtype)
            else:
                params[path] = rng.uniform(-bound, bound, leaf.shape).astype(dtype)
    if constants:
        raise KeyError(f"the model has no parameters named {sorted(constants)}")
    stats = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (np.ones if path[-1].key == "var" else np.zeros)(leaf.shape, dtype),
        shapes.get("batch_stats", {}),
    )
    return flax.traverse_util.unflatten_dict(params), stats


def count(params: PyTree) -> int:
    """Number of parameters."""
    return sum(int(np.prod(jnp.shape(leaf))) for leaf in jax.tree.leaves(params))
