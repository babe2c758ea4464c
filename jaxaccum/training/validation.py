"""Evaluations while a run trains: of which weights, by which process, and which are the best."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxaccum import tasks
from jaxaccum.machine.waiting import waiting
from jaxaccum.training import run
from jaxaccum.training.album import Album
from jaxaccum.training.cadence import Cadence
from jaxaccum.training.distributed import Peers
from jaxaccum.training.journal import Journal
from jaxaccum.training.keeping import Keeper
from jaxaccum.training.precise_bn import recompute_statistics
from jaxaccum.training.preemption import Preemption
from jaxaccum.training.progress import Progress
from jaxaccum.training.restart import NO_OBJECTS

PyTree = Any


class Validation:
    """Evaluates on the validation set. The first process does, and tells the others."""

    def __init__(
        self,
        this: run.Run,
        evaluator: tasks.Evaluator,
        train_set: tasks.Source,
        val_set: tasks.Source,
        cadence: Cadence,
        journal: Journal,
        keeper: Keeper,
        album: Album,
        preemption: Preemption,
        peers: Peers,
    ) -> None:
        """Evaluates nothing yet; says so if the validation set has nothing to measure by.

        Args:
          evaluator: of the validation set.
          train_set: the running statistics are recomputed over it, if the config wants that.
          keeper: keeps the best weights. album: draws what they find.
        """
        self._this, self._evaluator, self._journal, self._keeper = this, evaluator, journal, keeper
        self._album, self._preemption, self._peers = album, preemption, peers
        self._cadence = cadence
        self._measurable = getattr(val_set.report, "objects", 1) > 0
        if cadence.ever("eval") and not self._measurable:
            journal.line(f"{NO_OBJECTS}; best/ will hold the weights of the last evaluation")
        precise = this.config.eval.precise_bn
        self._plain: Any = run.make_stream(this, train_set, plain=True) if precise else None

    def evaluate(self, progress: Progress) -> None:
        """Evaluates the weights after the last update; all processes call.

        Raises:
          Preempted: a signal came; the next start makes up for the evaluation.
          CheckpointError, WorkdirError: what it gave cannot be written.
        """
        occasion, keeper = f"best at {progress.done}", self._keeper
        weights = progress.weights()
        if self._peers.first:
            self._evaluate(progress.done, weights)
            self._peers.from_first(occasion, keeper.best)
        else:
            with self._preemption.allowed():
                keeper.best = self._peers.from_first(occasion, keeper.best)
        keeper.judge(progress, self._cadence)

    def _evaluate(self, step: int, weights: dict[str, PyTree]) -> None:
        config = self._this.config
        with self._preemption.allowed():
            if config.eval.precise_bn:
                with waiting("recomputing the statistics"):
                    stats = recompute_statistics(
                        self._this, weights["params"], weights["stats"], self._plain,
                        config.eval.precise_bn,
                    )  # fmt: skip
                weights = weights | {"stats": stats}
            with waiting(f"evaluating update {step}"):
                result, pictures = self._evaluator(
                    weights["params"], weights["stats"], config.log.images
                )
        if self._is_best(result):
            self._keeper.save_best(step, weights, result)
            self._album.best(self._evaluator, pictures)
        remark = ""
        if np.isnan(result[metric := self._this.task.monitor[0]]):
            remark = (
                f"{metric} is not a number: a prediction is not finite" if self._measurable
                else f"{NO_OBJECTS}; these weights count as the best so far"
            )  # fmt: skip
        self._journal.evaluation(step, result, pictures, remark)

    def _is_best(self, result: dict[str, float]) -> bool:
        metric, more_is_better = self._this.task.monitor
        score, best = result[metric], self._keeper.best
        better = score - best[metric] if best and not np.isnan(best[metric]) else 0.0
        # Of equal scores the later is better: it has learned from more.
        better = better >= 0 if more_is_better else better <= 0
        return not self._measurable or bool(better and not np.isnan(score))
