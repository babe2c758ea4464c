"""Leaves divided among devices: gathered before an update's loop, scattered after it, once each.

Every function but `spec` and `norm` is for the inside of `jax.shard_map`. The leaves of a tree
travel together, as one vector, so that there is one collective for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from jaxaccum.accumulate.batchnorm import GROUP_AXIS

PyTree = Any
AXES = ("fsdp", GROUP_AXIS)  # of the mesh: the devices that hold a part each
SMALLEST = 1024  # values of a leaf that is worth dividing


def spec(shape: Sequence[int], parts: int) -> PartitionSpec:
    """How a leaf lies over the mesh: its longest axis that `parts` divides is cut, if any is."""
    fitting = [i for i, n in enumerate(shape) if n % parts == 0]
    if parts == 1 or not fitting or math.prod(shape) < SMALLEST:
        return PartitionSpec()
    axis = max(fitting, key=lambda i: shape[i])
    return PartitionSpec(*[None] * axis, AXES)


def gathered(tree: PyTree, specs: PyTree) -> PyTree:
    """Whole leaves, from this device's parts of them."""

    def gather(leaves: list[jax.Array], axes: list[int]) -> list[jax.Array]:
        first = [jnp.moveaxis(x, axis, 0) for x, axis in zip(leaves, axes, strict=True)]
        together = jax.lax.all_gather(jnp.concatenate([x.reshape(-1) for x in first]), AXES)
        parts = len(together)
        rows = _cut(together, [x.size for x in first])
        return [
            jnp.moveaxis(row.reshape(parts * len(x), *x.shape[1:]), 0, axis)
            for row, x, axis in zip(rows, first, axes, strict=True)
        ]

    return _on_divided(gather, tree, specs)


def reduced(tree: PyTree, specs: PyTree) -> PyTree:
    """Sums over all devices; of the leaves that are divided, this device's part of the sum."""

    def scatter(leaves: list[jax.Array], axes: list[int]) -> list[jax.Array]:
        parts = math.prod(jax.lax.axis_size(axis) for axis in AXES)
        first = [jnp.moveaxis(x, axis, 0) for x, axis in zip(leaves, axes, strict=True)]
        together = jnp.concatenate([x.reshape(parts, -1) for x in first], axis=1)
        own = jax.lax.psum(jax.lax.psum_scatter(together, AXES), "data")
        rows = _cut(own, [x.size // parts for x in first])
        return [
            jnp.moveaxis(row.reshape(len(x) // parts, *x.shape[1:]), 0, axis)
            for row, x, axis in zip(rows, first, axes, strict=True)
        ]

    return _on_divided(scatter, tree, specs, lambda rest: jax.lax.psum(rest, ("data", *AXES)))


def norm(mesh: Mesh, specs: PyTree) -> Callable[[PyTree], jax.Array]:
    """The norm of a tree of whole arrays that lie so: one reduction of one number."""

    def local(tree):
        divided, whole = [jnp.zeros(())], [jnp.zeros(())]
        for x, cut in _with_specs(tree, specs):
            (divided if len(cut) else whole).append(jnp.sum(jnp.square(x)))
        return jnp.sqrt(jax.lax.psum(sum(divided[1:], divided[0]), AXES) + sum(whole))

    if not any(len(cut) for cut in jax.tree.leaves(specs, is_leaf=_is_spec)):
        return optax.tree.norm
    return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec())


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _with_specs(tree: PyTree, specs: PyTree) -> list[tuple[jax.Array, PartitionSpec]]:
    leaves, cuts = jax.tree.leaves(tree), jax.tree.leaves(specs, is_leaf=_is_spec)
    return list(zip(leaves, cuts, strict=True))


def _cut(x: jax.Array, sizes: list[int]) -> list[jax.Array]:
    """Consecutive pieces of these sizes along the last axis."""
    places = [sum(sizes[:i]) for i in range(1, len(sizes))]
    return jnp.split(x, places, axis=-1)


def _on_divided(
    function: Callable[[list[jax.Array], list[int]], list[jax.Array]],
    tree: PyTree,
    specs: PyTree,
    on_rest: Callable[[list[jax.Array]], list[jax.Array]] = lambda rest: rest,
) -> PyTree:
    """The tree with `function` applied to the divided leaves of each dtype together, with the axes
    they are cut along, and `on_rest` to the others together."""
    pairs = _with_specs(tree, specs)
    new = [x for x, _ in pairs]
    rest = [i for i, (_, cut) in enumerate(pairs) if not len(cut)]
    for i, value in zip(rest, on_rest([new[i] for i in rest]), strict=True):
        new[i] = value
    for dtype in sorted({x.dtype for x, cut in pairs if len(cut)}, key=str):
        own = [i for i, (x, cut) in enumerate(pairs) if len(cut) and x.dtype == dtype]
        axes = [len(pairs[i][1]) - 1 for i in own]
        for i, value in zip(own, function([new[i] for i in own], axes), strict=True):
            new[i] = value
    return jax.tree.unflatten(jax.tree.structure(tree), new)
