"""When a training run logs, evaluates and saves."""

from __future__ import annotations

from jaxaccum.training import run
from jaxaccum.training.logs import MetricsFile


class Cadence:
    """At which updates it does so: `every` of the config's `log`, `eval` and `checkpoint`."""

    def __init__(self, this: run.Run, samples: int, file: MetricsFile) -> None:
        """Reads nothing yet.

        Args:
          samples: of an epoch.
          file: has a line for every evaluation that was made.
        """
        self._steps, self._file = this.steps, file
        per_epoch = max(round(samples / this.recipe.nbs), 1)
        self._every = {
            name: this.config[name].every or per_epoch for name in ("log", "eval", "checkpoint")
        }

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
