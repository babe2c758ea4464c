"""Parts of a network that a run leaves as they are: parameters that no update moves, and batch norm
by the running statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxaccum.accumulate import Groups, Output
from jaxaccum.accumulate.linen import GroupBatchNorm
from jaxaccum.fields import ConfigError

PyTree = Any
Forward = Callable[[PyTree, PyTree, PyTree, Groups | None], Output]


def modules(freeze: int | str) -> tuple[str, ...]:
    """Names of the frozen modules by the config's `freeze`: the first of a detector's numbered
    ones, or names with commas between them."""
    if isinstance(freeze, int):
        return tuple(f"model.{i}" for i in range(freeze))
    return tuple(name.strip().replace("/", ".") for name in freeze.split(",") if name.strip())


def is_frozen(path: str, names: tuple[str, ...]) -> bool:
    """Whether what has the path ("model.0/conv/kernel") lies in one of the modules."""
    path = path.replace("/", ".")
    return any(path == name or path.startswith(f"{name}.") for name in names)


def frozen_forward(forward: Forward, names: tuple[str, ...]) -> Forward:
    """A task's forward whose modules of these names do not learn.

    Their parameters get the gradient zero, which counts nothing in its norm. Their layers of
    `GroupBatchNorm` normalise by the running statistics, which stay: with one's own data these
    would drift away from the weights that they belong to.
    """
    if not names:
        return forward

    def constant(path: Any, leaf: jax.Array) -> jax.Array:
        name = "/".join(str(key.key) for key in path)
        return jax.lax.stop_gradient(leaf) if is_frozen(name, names) else leaf

    def by_running_statistics(call, args, kwargs, context):
        layer = context.module
        if not (isinstance(layer, GroupBatchNorm) and is_frozen(".".join(layer.path), names)):
            return call(*args, **kwargs)
        x, groups = args
        y = call(x, None)
        if groups is not None and layer.is_mutable_collection("moments"):
            # Moments of no values, which move nothing: the layer is told of, as any other.
            mean: Any = layer.get_variable("batch_stats", "mean")
            none = 0 * jnp.sum(groups.weight).astype(mean.dtype)
            layer.put_variable("moments", "count", none)
            for name in ("first", "second"):
                layer.put_variable("moments", name, jnp.full(x.shape[-1:], none))
        return y

    def frozen(params: PyTree, stats: PyTree, batch: PyTree, groups: Groups | None) -> Output:
        params = jax.tree_util.tree_map_with_path(constant, params)
        with nn.intercept_methods(by_running_statistics):
            return forward(params, stats, batch, groups)

    return frozen


def described(params: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """How much of a network is frozen, in words.

    Raises:
      ConfigError: a name is of no module, or nothing is left to learn.
    """
    sizes = {
        "/".join(str(key.key) for key in path): leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    parents = {
        ".".join(path.replace("/", ".").split(".")[:depth])
        for path in sizes
        for depth in range(1, path.replace("/", ".").count(".") + 2)
    }
    for name in names:
        if not any(is_frozen(path, (name,)) for path in sizes):
            close = get_close_matches(name, parents, n=3) or sorted(params)
            raise ConfigError(
                f"freeze: the network has no module {name!r}; "
                + (f"did you mean {', '.join(close)}?" if len(close) <= 3 else
                   f"its largest are {', '.join(close)}")
            )  # fmt: skip
    held = sum(size for path, size in sizes.items() if is_frozen(path, names))
    if held == sum(sizes.values()):
        raise ConfigError(f"freeze: {', '.join(names)} are the whole network: nothing would learn")
    few = names if len(names) <= 3 else (names[0], "...", names[-1])
    return f"frozen: {', '.join(few)}, {held:,} of {sum(sizes.values()):,} parameters"
