"""Running statistics recomputed for an evaluation ("precise batch norm")."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum.accumulate import batchnorm, grouped, in_time
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
    microbatch = this.window.geometry.microbatch
    parts = group // microbatch if group % microbatch == 0 else 1
    moments_of, total = _moments_of(this.forward, group, max(parts, 1)), None
    for batch in stream.windows(0, [group] * -(-samples // group)):
        new = moments_of(params, stats, batch)
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    return batchnorm.move_statistics(stats, total, 1.0)


@functools.cache
def _moments_of(forward: Any, group: int, microbatches: int):
    """Compiled once per task: (params, stats, batch of one group) -> moments.

    Args:
      microbatches: that a group is computed in, one after the other.
    """
    of_groups = grouped(forward, group, microbatches)
    if microbatches == 1:
        return jax.jit(lambda params, stats, batch: of_groups(params, stats, batch).moments)

    def moments(params: PyTree, stats: PyTree, batch: PyTree) -> PyTree:
        parts = jax.tree.map(lambda a: a.reshape(microbatches, -1, *a.shape[1:]), batch)

        def one(fixed: tuple[PyTree, PyTree], part: PyTree) -> tuple[PyTree, PyTree]:
            params, stats = fixed
            return of_groups(params, stats, part).moments, ()

        return in_time.computed(one, microbatches, (params, stats), parts)[0]

    return jax.jit(moments)
