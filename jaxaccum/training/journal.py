"""What the log of an update and the result of an evaluation become: lines of metrics.jsonl, of the
console, of TensorBoard and of trackers, the noise scale, and warnings."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxaccum import tasks
from jaxaccum.accumulate.noise import NoiseScale
from jaxaccum.draw import contact_sheet
from jaxaccum.errors import TrainingError
from jaxaccum.machine import memory as of_machine
from jaxaccum.training import run
from jaxaccum.training.cadence import Cadence
from jaxaccum.training.distributed import Peers
from jaxaccum.training.divergence import Divergence
from jaxaccum.training.logs import Board, Console, MetricsFile, format_line
from jaxaccum.training.trackers import Trackers

Watch = Callable[[dict[str, Any]], None]


class Journal:
    """Keeps the record of a run. Of several processes only the first writes, and all watch."""

    def __init__(
        self,
        this: run.Run,
        source: tasks.Source,
        stream: tasks.Stream,
        file: MetricsFile,
        cadence: Cadence,
        peers: Peers,
        start: int,
        memory: Mapping[str, Any],
        trackers: Trackers,
        watch: Watch | None = None,
    ) -> None:
        """Opens the console and, beside `file`, the board.

        Args:
          source, stream: the training set, and the run's samples of it.
          file: metrics.jsonl, rewound to the start.
          start: updates done before this process.
          memory: that of the run so far; {} if it is new.
          trackers: get what TensorBoard gets.
          watch: called with every record.
        """
        self._this, self._source, self._stream = this, source, stream
        self._file, self._cadence, self._peers = file, cadence, peers
        self._trackers = trackers
        self._watch: Watch = watch or (lambda record: None)
        self._since = Counter[str]()  # updates and sums of losses since the last line
        self._noise = NoiseScale(memory.get("noise"))
        self._divergence = Divergence(memory.get("divergence"))
        self._taken: dict[str, int] = {}  # bytes of memory that were said last
        where = None if peers.first else sys.stdout  # which leads nowhere in the others
        self._console = Console(this.steps, start, this.recipe.nbs, this.task.unit, stream=where)
        wanted = this.config.log.tensorboard and peers.first
        self._board = Board(file.path.parent / "events", start) if wanted else None

    @property
    def _boards(self) -> list[Board | Trackers]:
        """What draws curves and pictures."""
        return [self._trackers] if self._board is None else [self._board, self._trackers]

    @property
    def memory(self) -> dict[str, Any]:
        """What a checkpoint must hold so that the journal can be continued from it."""
        # Copies: a save goes on while the next updates are told.
        return copy.deepcopy({"noise": self._noise.state, "divergence": self._divergence.state})

    @property
    def divergence(self) -> str:
        """How the run has diverged; "" if it has not."""
        return str(self._divergence)

    def line(self, text: str) -> None:
        """Prints one line on the console."""
        self._console.line(text)

    def pause(self) -> contextlib.AbstractContextManager[None]:
        """Time spent in this context is not training time."""
        return self._console.pause()

    def update(self, number: int, values: Mapping[str, jax.Array]) -> bool:
        """Takes in the log of a window, waiting for it; whether the window was an update.

        Args:
          number: of the window.
          values: as the engine gave them.
        Raises:
          TrainingError: too many windows in a row were skipped.
          WorkdirError: metrics.jsonl cannot be written.
        """
        log: dict[str, Any] = {k: v.item() for k, v in jax.device_get(values).items()}
        self._console.update(int(log["ok"]), samples=self._this.size_of(number))
        for line in self._stream.news():
            self.line(line) if self._peers.first else print(line, file=sys.stderr)
        for line in self._trackers.news():
            self.line(line)
        if not log["ok"]:
            self._skipped(number, log)
            return False
        if self._this.config.log.noise_scale:
            self._noise.add(log["noise/trace"], log["noise/square"])
        self._divergence.add(log["loss"], log["grad_norm"])
        self._since["updates"] += 1
        self._since.update({k: v for k, v in log.items() if k.startswith("loss")})
        if self._cadence.due("log", int(log["step"])) and self._peers.first:
            self._write(number, log)
        else:
            self._console.sign()
        return True

    def evaluation(
        self, step: int, result: dict[str, float], pictures: list[np.ndarray], remark: str = ""
    ) -> None:
        """Writes down an evaluation.

        Args:
          step: updates behind the weights.
          pictures: predictions of them.
          remark: a line to print after it.
        Raises:
          WorkdirError: metrics.jsonl cannot be written.
        """
        record = {"step": step, "kind": "eval", **result}
        self._file.write(record)
        self._watch(dict(record))
        total = self._this.steps
        self.line(f"eval   {step:>{len(str(total))}}/{total} | {self._this.task.summary(result)}")
        for board in self._boards:
            board.scalars({f"val/{k}": v for k, v in result.items()}, step)
            if pictures:
                board.image("val/samples", contact_sheet(pictures, 2), step)
        for line in filter(None, (remark, self.divergence)):
            self.line(line)

    def close(self) -> None:
        """Ends the console's bar, and closes the files.

        Raises:
          WorkdirError: metrics.jsonl cannot be written.
        """
        self._console.close()
        if self._board:
            self._board.close()
        self._file.close()

    def _write(self, number: int, log: dict[str, Any]) -> None:
        this, step = self._this, int(log["step"])
        record = {
            "step": step,
            "kind": "train",
            "epoch": this.samples_before(number + 1) / len(self._source),
            **{k: v for k, v in log.items() if k.startswith(("loss", "metrics/"))},
            "lr": float(this.schedule.lr(step - 1)),
            "grad_norm": log["grad_norm"],
            **{k: v for k, v in log.items() if k.startswith(("sums/", "weight/"))},
            **self._noise.record(this.recipe.group),
            "samples": int(log["samples"]),
            "skipped": int(log["windows"]) - step,
        }
        self._file.write(record)
        self._watch(dict(record))
        count, sums = self._since.pop("updates"), self._since
        means, self._since = {key: sums[key] / count for key in sums}, Counter()
        # A small effective batch's loss is mostly noise; the file has that of the one update.
        mean = "mean_" if count > 1 else ""
        more = {f"{this.task.unit}_per_second": self._console.per_second}
        more |= this.task.readable(record)
        shown = {
            mean + k if k in means else k: means.get(k, v)
            for k, v in record.items()
            if not k.startswith(("samples", "skipped", "sums/", "weight/"))
        }
        self.line(format_line(step, this.steps, shown | more))
        more |= self._memory()
        for board in self._boards:
            board.scalars(record | more, step)
        if self._stream.truncated:  # only detectors have objects
            self.line(
                f"{self._stream.truncated} objects left out so far"
                f"{'' if self._peers.alone else ' by this process'}: samples with more than "
                f"data.max_objects={this.config.data.max_objects} (the smallest go first)"
            )

    def _memory(self) -> dict[str, float]:
        """GiB taken, as curves; what has grown by a tenth since it was said is said."""
        found = of_machine.used()
        if any(used.taken > 1.1 * self._taken.get(where, 0) for where, used in found.items()):
            self._taken = {where: used.taken for where, used in found.items()}
            self.line(of_machine.said(found))
        return {f"memory_gib/{where}": u.taken / of_machine.GIB for where, u in found.items()}

    def _skipped(self, number: int, log: dict[str, Any]) -> None:
        this, limit = self._this, self._this.config.max_skipped
        indices = self._stream.indices(this.samples_before(number), this.size_of(number))
        names = ", ".join(self._source.name(int(i)) for i in indices)
        self.line(
            f"window {number} skipped ({log['skipped_in_row']} in a row): loss {log['loss']}, "
            f"gradient norm {log['grad_norm']}"
        )
        if log["skipped_in_row"] >= limit:
            raise TrainingError(
                f"{limit} windows in a row had a loss or gradient that is not finite; the last was "
                f"window {number} with the samples {indices.tolist()} ({names}). Look at these, "
                "lower lr.base, or raise max_skipped."
            )
