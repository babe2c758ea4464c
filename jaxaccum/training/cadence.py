"""When a training run logs, evaluates and saves, and when it has waited long enough."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxaccum.training import run
from jaxaccum.training.logs import MetricsFile


class Cadence:
    """At which updates it does so: `every` of the config's `log`, `eval` and `checkpoint`.

    Attributes:
      patience: evaluations in a row that may be no better than one before; 0: any number.
    """

    def __init__(self, this: run.Run, samples: int, file: MetricsFile) -> None:
        """Reads nothing yet.

        Args:
          samples: of an epoch.
          file: has a line for every evaluation that was made.
        """
        self._steps, self._file = this.steps, file
        self.patience: int = this.config.eval.patience
        epoch = samples / this.recipe.nbs
        self._every = {}
        for name in ("log", "eval", "checkpoint"):
            own = this.config[name]
            epochs = own.get("every_epochs", 0.0) or 1.0
            self._every[name] = own.every or max(round(epochs * epoch), 1)

    def ever(self, name: str) -> bool:
        """Whether it is ever due."""
        return self._every[name] > 0

    def due(self, name: str, step: int) -> bool:
        """Whether it is due after an update; what ever is, is after the last."""
        return self.ever(name) and (step % self._every[name] == 0 or step == self._steps)

    def owes(self, step: int) -> bool:
        """Whether an evaluation was due after an update and has no line: a run may be stopped
        before it is made.

        Raises:
          WorkdirError: metrics.jsonl cannot be read.
        """
        return step > 0 and self.due("eval", step) and not self._file.evaluated(step)

    def hopeless(self, step: int, best: Mapping[str, Any]) -> bool:
        """Whether patience is over: too many evaluations up to an update were no better.

        Args:
          best: the best evaluation, with its "step"; {} before the first.
        """
        if not (self.patience and best and self.due("eval", step)):
            return False
        return step // self._every["eval"] - best["step"] // self._every["eval"] >= self.patience
