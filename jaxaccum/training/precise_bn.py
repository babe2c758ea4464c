"""Running statistics recomputed for an evaluation ("precise batch norm")."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum.accumulate import batchnorm, grouped
from jaxaccum.tasks import Stream
from jaxaccum.training import run

PyTree = Any


def recompute_statistics(
    this: run.Run, params: PyTree, stats: PyTree, stream: Stream, samples: int
) -> PyTree:
    """Running statistics of the given weights over training samples.

    Wu and Johnson 2021, arXiv:2105.07576, section 3. Groups are the recipe's; moments of all
    groups are merged exactly.

    Args:
      this: the run; its recipe says the groups.
      stream: the run's samples, better without strong augmentation.
      samples: how many to use, from the start, rounded up to whole groups.
    Raises:
      ValueError: the recipe has no groups (bn_group "frozen").
    """
    group = this.recipe.group
    if group is None:
        raise ValueError("eval.precise_bn needs batch statistics; this recipe's are frozen")
    moments_of, total = _moments_of(this.forward, group), None
    for batch in stream.windows(0, [group] * -(-samples // group)):
        new = moments_of(params, stats, batch)
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    return batchnorm.move_statistics(stats, total, 1.0)


@functools.cache
def _moments_of(forward: Any, group: int):
    """Compiled once per task: (params, stats, batch of one group) -> moments."""
    of_groups = grouped(forward, group)
    return jax.jit(lambda params, stats, batch: of_groups(params, stats, batch).moments)
