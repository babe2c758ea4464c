"""The accumulation of the usual trainers (`compat`), to compare with: its one place here.

With b_k samples in microbatch k of an update, its numerators N_kt and its denominators D_kd,

    gradient = sum_k  b_k * d/dparams  sum_t gain_t * N_kt / max(D_kd, floor_d)

Every microbatch divides by its own denominators and counts with its samples, where the law divides
once by the sums of the window; the objective's own `scale` plays no part. Batch statistics are over
a microbatch and move the running ones with each. An update has K = max(round(nbs / batch), 1)
batches (a microbatch of every device), in the warm-up from 1 up. So here the geometry decides what
is learned.

`UsualObjective` takes the place of an objective; engines ask the functions here, which change
nothing for one that keeps the law.

Source: Ultralytics, ultralytics/engine/trainer.py (K) and ultralytics/utils/loss.py (the loss of a
microbatch times its samples).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxaccum.accumulate import batchnorm
from jaxaccum.accumulate.recipe import Geometry, GeometryError, Group, Recipe
from jaxaccum.accumulate.terms import Objective, Sums, Term

PyTree = Any


@dataclasses.dataclass(frozen=True)
class UsualObjective(Objective):
    """An objective whose microbatches each divide by their own denominators.

    Raises:
      ValueError: it estimates a noise scale, or couples samples.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise:
            raise ValueError("the noise scale is estimated of the exact rule, not of compat's")
        if self.coupled:
            raise ValueError("compat knows no coupled terms: the usual rule cannot compute them")

    @classmethod
    def of(cls, objective: Objective) -> UsualObjective:
        """The usual rule for the terms of an objective that keeps the law."""
        return cls(**{f.name: getattr(objective, f.name) for f in dataclasses.fields(objective)})

    def sums(self, *args: Any, **options: Any) -> Sums:
        """A microbatch's sums: its b * loss, divided by its own denominators."""
        sums = super().sums(*args, **options)
        by = {n: sums.samples / self.divisor(n, sums.denominators) for n in self.floors}
        return sums._replace(
            gradients={
                n: jax.tree.map(lambda g, n=n: g * by[n], tree)
                for n, tree in sums.gradients.items()
            },
            numerators={t.name: sums.numerators[t.name] * by[t.denominator] for t in self.terms},
        )

    def _share(self, name: str, sums: Sums) -> Any:
        return 1.0  # they are divided already

    def _logged_over(self, term: Term, sums: Sums) -> jax.Array:
        return sums.samples  # they are divided already, and weighted by samples


def check_engine(objective: Objective, geometry: Geometry, processes: int) -> None:
    """Refuses geometries for which the usual rule is not written.

    Raises:
      GeometryError: several processes, or another engine than scan.
    """
    if not isinstance(objective, UsualObjective):
        return
    if processes > 1:
        raise GeometryError("compat is a rule to compare with: run it in one process")
    if geometry.engine != "scan":
        raise GeometryError("compat is a rule of the scan engine: set engine to 'scan'")


def moved(
    objective: Objective, stats: PyTree, moments: PyTree, momentum: jax.Array | float
) -> PyTree:
    """Running statistics after a microbatch with these moments (as `batchnorm.move_statistics`
    takes them); the law leaves them alone until the update."""
    if not isinstance(objective, UsualObjective):
        return stats
    return batchnorm.move_statistics(stats, moments, momentum)


def averaged(objective: Objective, stats: PyTree, axes: tuple[str, ...]) -> PyTree | None:
    """Running statistics after a window: the mean of those that each device moved by itself.

    For the inside of `jax.shard_map`. None under the law, which moves them at the update.

    Args:
      axes: of the mesh, all of them.
    """
    return jax.lax.pmean(stats, axes) if isinstance(objective, UsualObjective) else None


@dataclasses.dataclass(frozen=True)
class WindowSizes:
    """Samples of every update of a run: all alike, but for the ramp of the usual rule.

    Attributes:
      each: samples of an update after the ramp.
      updates: of the run, those of the ramp included.
      ramp: (n,) int, samples of the first updates, n < updates or as many.
    """

    each: int
    updates: int
    ramp: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))

    def of(self, update: int) -> int:
        """Samples of an update; those after the last are like the last."""
        update = min(update, self.updates - 1)
        return int(self.ramp[update]) if update < len(self.ramp) else self.each

    def before(self, update: int) -> int:
        """Samples of all updates before one."""
        more = max(update - self.updates, 0)
        first = min(update, self.updates)
        ramped = int(self.ramp[:first].sum()) + max(first - len(self.ramp), 0) * self.each
        return ramped + more * self.of(self.updates - 1)

    @property
    def total(self) -> int:
        """Samples of the run."""
        return self.before(self.updates)

    @property
    def extremes(self) -> tuple[int, int]:
        """Samples of the smallest and of the largest update."""
        found = [int(n) for n in self.ramp]
        found += [self.each] * (len(self.ramp) < self.updates)
        return min(found), max(found)


def recipe(asked: Recipe, sizes: WindowSizes, microbatch: int) -> Recipe:
    """The recipe that is run: as many samples as K gives, batch statistics over a microbatch.

    Args:
      asked: as the user has it.
      sizes: samples of every update, of `window_sizes`.
      microbatch: of the geometry.
    """
    group: Group = "frozen" if asked.bn_group == "frozen" else microbatch
    return dataclasses.replace(asked, nbs=sizes.extremes[1], bn_group=group)


def window_sizes(
    nbs: int, batch: int, total: float, warmup: int, require: Callable[[int], None]
) -> WindowSizes:
    """Samples of every update: K batches, K from 1 up over the warm-up.

    Args:
      nbs: the effective batch that is asked for.
      batch: samples of one microbatch on every device.
      total: samples of the run, at least.
      warmup: batches that the ramp takes.
      require: called with a number of updates that there are at least; raises if that is too many.
    Returns:
      Multiples of `batch`; the last update is as large as those before it.
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
    return WindowSizes(most * batch, len(sizes) + rest, np.asarray(sizes, np.int64))
