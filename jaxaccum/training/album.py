"""Pictures and a report of a run, in its workdir."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxaccum import tasks
from jaxaccum.draw import contact_sheet, save_image
from jaxaccum.training import logs, report, run
from jaxaccum.training.trackers import Trackers

FOLDER = "pictures"
_SHOWN = 16  # samples of the first window
_OFTEN = 60.0  # seconds between figures of better and better weights


class Album:
    """Keeps pictures/ and report.html. What cannot be drawn or written is said, and ends no run.

    Attributes:
      failed: whether that was said.
    """

    def __init__(
        self, this: run.Run, workdir: Path, wanted: bool, trackers: Trackers | None = None
    ) -> None:
        """Writes nothing yet.

        Args:
          wanted: if not, it never does.
          trackers: get the pictures, too.
        """
        self._this, self._workdir, self._wanted = this, workdir, wanted
        self._trackers = trackers or Trackers({})
        self._begun = self.failed = False
        # Figures take a second, and a run may be better at every evaluation.
        self._later: Mapping[str, Callable[[], np.ndarray]] = {}
        self._drawn = float("-inf")

    def begin(self, source: tasks.Source, batch: dict[str, np.ndarray]) -> None:
        """Draws what the run learns from.

        Args:
          source: the training set. batch: its first window, as the network sees it.
        """
        if self._begun or not self._wanted:
            return
        self._begun = True
        if (self._workdir / FOLDER / "batch.png").exists():
            return
        with self._harmless():
            samples = self._this.task.drawn_samples(source, batch, _SHOWN)
            if samples:
                self._save("batch", contact_sheet(samples, 4, cell=320))
            for name, picture in self._this.task.drawn_source(source).items():
                self._save(name, picture)

    def best(self, evaluator: tasks.Evaluator, pictures: list[np.ndarray]) -> None:
        """Draws what the best weights find.

        Args:
          evaluator: that has just evaluated them. pictures: of samples.
        """
        if not self._wanted:
            return
        with self._harmless():
            if pictures:
                self._save("validation", contact_sheet(pictures, 2))
            self._later = self._this.task.drawn_evaluation(evaluator)
            if time.monotonic() - self._drawn > _OFTEN:
                self._draw()

    def end(self, about: Mapping[str, Any], best: Mapping[str, Any]) -> None:
        """Draws the curves, and writes the report.

        Args:
          about: what is kept of the run. best: its best evaluation; {} if there is none.
        """
        if not self._wanted:
            return
        with self._harmless():
            self._draw()
            records = logs.records(self._workdir / "metrics.jsonl")
            self._save("results", report.results(records, self._this.task.monitor[0]))
            tables = self._this.task.tables(dict(best)) if best else []
            report.write(
                self._workdir, about, str(self._this.window), best, tables, self._workdir / FOLDER
            )

    def _draw(self) -> None:
        for name, figure in self._later.items():
            self._save(name, figure())
        self._later, self._drawn = {}, time.monotonic()

    def _save(self, name: str, picture: np.ndarray) -> None:
        save_image(self._workdir / FOLDER / f"{name}.png", picture)
        self._trackers.image(f"{FOLDER}/{name}", picture)

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self.failed:
                what = f"{type(error).__name__}: {error}"
                print(f"note: the report is not whole ({what}); log.report=False leaves it out")
            self.failed = True
