"""Small leaves of a tree as one vector, where what counts is the number of operations."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
SMALL = 4096  # values of a leaf that is taken together with others, at most


class Packing:
    """Trees of one structure as (large leaves, a vector for each dtype of the small ones).

    A GPU starts a kernel for each leaf; of a detector's sums, two hundred are of a few channels.

    Args:
      shapes: arrays or shapes of such a tree.
      small: values that a small leaf has at most; 0 packs nothing but empty leaves.
    """

    def __init__(self, shapes: PyTree, small: int):
        leaves, self._structure = jax.tree.flatten(shapes)
        self._shapes = [leaf.shape for leaf in leaves]
        self._large = [i for i, leaf in enumerate(leaves) if math.prod(leaf.shape) > small]
        self._small: dict[Any, list[int]] = {}
        for i, leaf in enumerate(leaves):
            if math.prod(leaf.shape) <= small:
                self._small.setdefault(jnp.dtype(leaf.dtype), []).append(i)

    def pack(self, tree: PyTree) -> PyTree:
        """The tree as large leaves and vectors."""
        leaves = jax.tree.leaves(tree)
        vectors = [
            jnp.concatenate([leaves[i].reshape(-1) for i in own]) for own in self._small.values()
        ]
        return [leaves[i] for i in self._large], vectors

    def unpack(self, packed: PyTree) -> PyTree:
        """The tree that was packed."""
        large, vectors = packed
        leaves: list[Any] = [None] * len(self._shapes)
        for i, leaf in zip(self._large, large, strict=True):
            leaves[i] = leaf
        for own, vector in zip(self._small.values(), vectors, strict=True):
            start = 0
            for i in own:
                size = math.prod(self._shapes[i])
                leaves[i] = vector[start : start + size].reshape(self._shapes[i])
                start += size
        return jax.tree.unflatten(self._structure, leaves)
