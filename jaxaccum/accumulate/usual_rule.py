"""The accumulation of the usual trainers (`compat`), to compare with: its one place here.

With b_k samples in microbatch k of an update, its numerators N_kt and its denominators D_kd,

    gradient = sum_k  b_k * d/dparams  sum_t gain_t * N_kt / max(D_kd, floor_d)

Every microbatch divides by its own denominators and counts with its samples, where the law divides
once by the sums of the window; the objective's own `scale` plays no part. Batch statistics are over
a microbatch and move the running ones with each. An update has K = max(round(nbs / batch), 1)
batches (a microbatch of every device), in the warm-up from 1 up. So here the geometry decides what
is learned.

Objective and engines ask the functions here; for an objective that keeps the law they change
nothing.

Source: Ultralytics, ultralytics/engine/trainer.py (K) and ultralytics/utils/loss.py (the loss of a
microbatch times its samples).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxaccum.accumulate import batchnorm
from jaxaccum.accumulate.recipe import Geometry, GeometryError, Group, Recipe

if TYPE_CHECKING:
    from jaxaccum.accumulate.terms import Objective, Sums

PyTree = Any


def check_objective(objective: Objective) -> None:
    """Refuses what has no meaning under the usual rule.

    Raises:
      ValueError: the objective estimates a noise scale, or couples samples.
    """
    if objective.noise and objective.compat:
        raise ValueError("the noise scale is estimated of the exact rule, not of compat's")
    if objective.coupled and objective.compat:
        raise ValueError("compat knows no coupled terms: the usual rule cannot compute them")


def check_engine(objective: Objective, geometry: Geometry, processes: int) -> None:
    """Refuses geometries for which the usual rule is not written.

    Raises:
      GeometryError: several processes, or another engine than scan.
    """
    if objective.compat and processes > 1:
        raise GeometryError("compat is a rule to compare with: run it in one process")
    if objective.compat and geometry.engine != "scan":
        raise GeometryError("compat is a rule of the scan engine: set engine to 'scan'")


def normalised(objective: Objective, sums: Sums) -> Sums:
    """A microbatch's sums: its b * loss, divided by its own denominators."""
    if not objective.compat:
        return sums
    by = {n: sums.samples / objective.divisor(n, sums.denominators) for n in objective.floors}
    return sums._replace(
        gradients={
            n: jax.tree.map(lambda g, n=n: g * by[n], tree) for n, tree in sums.gradients.items()
        },
        numerators={t.name: sums.numerators[t.name] * by[t.denominator] for t in objective.terms},
    )


def factors(objective: Objective) -> dict[str, float] | None:
    """What a window's gradients, by denominator, are multiplied by: they are divided already.

    None under the law, which divides them now.
    """
    return dict.fromkeys(objective.floors, 1.0) if objective.compat else None


def logged_over(objective: Objective, sums: Sums) -> jax.Array | None:
    """What a window's numerators are divided by for the log, (): they are divided already, and
    weighted by samples.

    None under the law, which divides each by its denominator.
    """
    return sums.samples if objective.compat else None


def moved(
    objective: Objective, stats: PyTree, moments: PyTree, momentum: jax.Array | float
) -> PyTree:
    """Running statistics after a microbatch with these moments (as `batchnorm.move_statistics`
    takes them); the law leaves them alone until the update."""
    return batchnorm.move_statistics(stats, moments, momentum) if objective.compat else stats


def averaged(objective: Objective, stats: PyTree, axes: tuple[str, ...]) -> PyTree | None:
    """Running statistics after a window: the mean of those that each device moved by itself.

    For the inside of `jax.shard_map`. None under the law, which moves them at the update.

    Args:
      axes: of the mesh, all of them.
    """
    return jax.lax.pmean(stats, axes) if objective.compat else None


def recipe(asked: Recipe, sizes: np.ndarray, microbatch: int) -> Recipe:
    """The recipe that is run: as many samples as K gives, batch statistics over a microbatch.

    Args:
      asked: as the user has it.
      sizes: (updates,) samples of every update, of `window_sizes`.
      microbatch: of the geometry.
    """
    group: Group = "frozen" if asked.bn_group == "frozen" else microbatch
    return dataclasses.replace(asked, nbs=int(sizes.max()), bn_group=group)


def window_sizes(
    nbs: int, batch: int, total: float, warmup: int, require: Callable[[int], None]
) -> np.ndarray:
    """Samples of every update: K batches, K from 1 up over the warm-up.

    Args:
      nbs: the effective batch that is asked for.
      batch: samples of one microbatch on every device.
      total: samples of the run, at least.
      warmup: batches that the ramp takes.
      require: called with a number of updates that there are at least; raises if that is too many.
    Returns:
      (updates,) int, multiples of `batch`; the last update is as large as those before it.
    """
    ratio = nbs / batch
    most = max(round(ratio), 1)  # and after the warm-up, always
    require(int(total / (most * batch)))
    sizes: list[int] = []
    done = 0
    while done < total and done // batch < warmup:
        k = 1
        while True:
            number = done // batch + k - 1
            wanted = 1 + (ratio - 1) * number / warmup if number < warmup else ratio
            if k >= round(wanted):
                break
            k = round(wanted)  # it only grows with k: none in between is enough
        sizes.append(k * batch)
        done += k * batch
        require(len(sizes))
    rest = max(-(-(math.ceil(total) - done) // (most * batch)), 0)
    require(len(sizes) + rest)
    return np.concatenate([np.asarray(sizes, int), np.full(rest, most * batch)])
