"""What a training run keeps on disk: its newest states, its best weights, and what an error would
lose."""

from __future__ import annotations

from typing import Any

from jaxaccum.training.cadence import Cadence
from jaxaccum.training.checkpoint import Checkpoints, newest_complete
from jaxaccum.training.distributed import Peers
from jaxaccum.training.journal import Journal
from jaxaccum.training.progress import Progress

PyTree = Any


class Keeper:
    """Saves. All processes call `save` alike, and the first writes (see `Elsewhere` for the
    others); `save_best` is for the first alone, `rescue` for one that has no others.

    Attributes:
      saved: update of the newest state that was saved, or that the run started from.
      best: what the evaluation of the best weights gave, and its "step"; {} before the first.
      over: whether evaluations were no better for so long that the run ends.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        journal: Journal,
        peers: Peers,
        about: dict[str, Any],
        signatures: dict[str, str | None],
        saved: int,
        best: dict[str, Any],
    ) -> None:
        """Saves nothing yet.

        Args:
          journal: its memory is kept, too.
          about: what a user of the weights must know of the run, kept beside them.
          signatures: of the data sets.
        """
        self.saved, self.best, self.over = saved, best, False
        self._checkpoints, self._journal, self._peers = checkpoints, journal, peers
        self._about, self._signatures = about, signatures

    def save(self, progress: Progress) -> None:
        """Starts to save the state, to continue from.

        Raises:
          CheckpointError: it cannot be written, or the save before this one failed.
        """
        self.saved = progress.done
        whole = progress.state if self._peers.alone else progress.whole()
        self._checkpoints.save(progress.done, whole, self._meta())

    def judge(self, progress: Progress, cadence: Cadence) -> None:
        """Ends the run if patience is over after an evaluation: says so and saves the state, if
        states are saved."""
        self.over = cadence.hopeless(progress.done, self.best)
        if not self.over:
            return
        self._journal.line(
            f"stopped early: {cadence.patience} evaluations were no better than that of update "
            f"{self.best['step']} (eval.patience)"
        )
        if cadence.ever("checkpoint") and progress.done > self.saved:
            self.save(progress)

    def save_best(self, step: int, weights: PyTree, result: dict[str, float]) -> None:
        """Saves weights as the best so far, and waits until they are there.

        Args:
          result: of their evaluation.
        Raises:
          CheckpointError: they cannot be written.
        """
        self.best = {"step": step, **result}
        self._checkpoints.save_best(step, weights, self._meta(metrics=self.best))
        self._checkpoints.wait()

    def rescue(self, progress: Progress) -> None:
        """Saves what an error would lose, if all of it was logged and is sound. Raises nothing."""
        try:
            progress.read()
            if progress.done > self.saved and progress.sound:
                self.save(progress)
                self._checkpoints.wait()
                self._journal.line(
                    f"an error ends the run; update {progress.done} was saved, and the same "
                    "command continues from there"
                )
        except Exception as another:  # the first is the one to tell
            kept = newest_complete(self._checkpoints.workdir)
            self._journal.line(
                f"an error ends the run, and what came after "
                f"{'the start' if kept is None else f'update {kept}'} is lost ({another})"
            )

    def _meta(self, **more: Any) -> dict[str, Any]:
        return {
            **self._about,
            "best": self.best,
            **self._journal.memory,
            "signatures": self._signatures,
            **more,
        }
