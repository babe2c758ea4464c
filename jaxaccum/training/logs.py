"""What a run says about itself: metrics.jsonl, TensorBoard events, the progress bar, its lines.

A record is a flat dict that names its "step" (updates done), its "kind" ("train" or "eval") and any
numbers. Keys "a/b" belong together: `loss/box` and `loss/cls` are parts of `loss`.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO

import numpy as np
from tqdm import tqdm

from jaxaccum.data.texts import shown
from jaxaccum.draw import Image, encode_image
from jaxaccum.machine.waiting import Bar, heard, width
from jaxaccum.training.workdir import WorkdirError, why_not_written

# Without a bar, a run says how far it is after so many seconds of silence, for so many.
_SILENCE, _YOUNG = 3.0, 600.0

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

KINDS = ("train", "eval")
_GROUP_LIMIT = 8  # members of a group that one console line shows


class MetricsFile:
    """metrics.jsonl: one JSON object a line, one line per logged update and per evaluation.

    A line is on disk when `write` returns. A resumed run's file equals the uninterrupted run's byte
    for byte, provided that records hold no wall times and that `rewind` was called with the step of
    the checkpoint: one taken at step s is saved after everything of step s was written.
    """

    def __init__(self, path: str | Path, fingerprint: str) -> None:
        """Opens nothing yet; `fingerprint` identifies the recipe and ends every line."""
        self.path = Path(path)
        self.fingerprint = fingerprint
        self._file: IO[bytes] | None = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line, keys in the given order, and waits until it is on disk.

        Values may be None, bool, int, float, str, numpy or jax scalars, and lists and dicts of
        them. Floats are written so that they read back unchanged; JSON has no nan and no infinity,
        so those become null.

        Raises:
          ValueError: without an integer "step" and a "kind" of "train" or "eval", with a
            "fingerprint" of its own, or if the file ends in a torn line (call `rewind` first).
          TypeError: on any other value.
          WorkdirError: the file cannot be written.
        """
        line = {key: _plain(value) for key, value in record.items()}
        if type(line.get("step")) is not int or line.get("kind") not in KINDS:
            raise ValueError(f"a record needs an integer step and a kind of {KINDS}, got {line}")
        if "fingerprint" in line:
            raise ValueError("the file adds the fingerprint; a record must not bring its own")
        line["fingerprint"] = self.fingerprint
        text = json.dumps(line, allow_nan=False).encode() + b"\n"
        with self._told_if_it_fails():
            file = self._file or self._open()
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def rewind(self, step: int) -> int:
        """Drops every line after `step`, a last line torn by a kill in mid-write, and lines that
        are no records, which it says.

        The file is replaced in one move, so a kill in here leaves the old or the new one. A missing
        file is an empty one.

        Returns:
          How many lines were dropped.

        Raises:
          WorkdirError: the file cannot be read or written.
        """
        self.close()
        with self._told_if_it_fails():
            if not self.path.exists():
                return 0
            old = self.path.read_bytes()
        lines = old.removesuffix(b"\n").split(b"\n") if old else []
        kept, foreign = [], []
        for number, line in enumerate(lines, start=1):
            line_step = _step_of(line)
            if line_step is not None and line_step <= step:
                kept.append(line + b"\n")
            elif line_step is None and number < len(lines):
                foreign.append(f"line {number}: {shown(line)}")
        if foreign:
            more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
            print(
                f"{self.path}: left out {len(foreign)} lines that are no records "
                f"({'; '.join(foreign[:3])}{more})"
            )
        new = b"".join(kept)
        if new != old:
            fresh = self.path.with_name(self.path.name + ".new")
            with self._told_if_it_fails():
                with fresh.open("wb") as file:
                    file.write(new)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(fresh, self.path)
                _sync_folder(self.path.parent)
        return len(lines) - len(kept)

    def evaluated(self, step: int) -> bool:
        """Whether the file has the evaluation of an update.

        Raises:
          WorkdirError: the file cannot be read.
        """
        with self._told_if_it_fails():
            lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        return any(
            _step_of(line) == step and json.loads(line).get("kind") == "eval" for line in lines
        )

    @contextmanager
    def _told_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            why, advice = why_not_written(error, self.path.parent)
            raise WorkdirError(f"{self.path}: {why}. {advice}") from error

    def close(self) -> None:
        """Closes the file; the next `write` opens it again."""
        if self._file is not None:
            file, self._file = self._file, None
            with self._told_if_it_fails():
                file.close()

    def _open(self) -> IO[bytes]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+b")
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.close()
                raise ValueError(f"{self.path} ends in a torn line; rewind to the checkpoint first")
        else:
            _sync_folder(self.path.parent)
        self._file = file
        return file


def _plain(value: Any) -> Any:
    """A value as JSON knows it; nan and infinities become None."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        item = array.item() if array.ndim == 0 else None
        if isinstance(item, bool | int | float):
            return _plain(item)
    raise TypeError(f"cannot log {type(value).__name__} {value!r}; scalars, lists and dicts only")


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """What of a record is drawn as curves: "step", nan and what is no number are left out."""
    plain = {tag: _plain(value) for tag, value in record.items() if tag != "step"}
    return {tag: value for tag, value in plain.items() if isinstance(value, int | float)}


def records(file: Path) -> list[dict[str, Any]]:
    """The records in metrics.jsonl; a last line in the making, and lines that are none, are left
    out.

    Raises:
      OSError: the file cannot be read.
    """
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines if _step_of(line) is not None]


def _step_of(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl, None if the line is not a record."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if type(step) is int else None


def _sync_folder(folder: Path) -> None:
    """Waits until a new or replaced name in `folder` is on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Board:
    """TensorBoard events: curves and pictures, by update."""

    def __init__(self, folder: str | Path, start: int = 0) -> None:
        """Opens an event file; TensorBoard will forget what earlier files say after `start`.

        Args:
          folder: where the event files go.
          start: updates done before this process.
        """
        # Imported here: it takes two seconds, which only runs with a board should pay.
        from tensorboardX import SummaryWriter

        self._writer: SummaryWriter = SummaryWriter(str(folder), purge_step=start + 1)

    def scalars(self, record: Mapping[str, Any], step: int) -> None:
        """One point per number in the record, see `numbers`."""
        for tag, number in numbers(record).items():
            self._writer.add_scalar(tag, number, step)

    def image(self, tag: str, image: Image, step: int) -> None:
        """One (height, width, 3) uint8 RGB image."""
        from tensorboardX.proto.summary_pb2 import Summary

        # tensorboardX would encode with Pillow, which nothing else here needs.
        encoded = Summary.Image(
            height=image.shape[0],
            width=image.shape[1],
            colorspace=3,
            encoded_image_string=encode_image(image),
        )
        summary = Summary(value=[Summary.Value(tag=tag, image=encoded)])
        self._writer.file_writer.add_summary(summary, step)

    def close(self) -> None:
        """Writes what is buffered and closes the event file."""
        self._writer.close()


class Console:
    """The run on the terminal: a progress bar, and lines above it; only lines if piped.

    A terminal or a pipe that goes away does not end the run: it goes on without a word.
    """

    def __init__(
        self,
        total_updates: int,
        start: int = 0,
        samples_per_update: int = 1,
        unit: str = "images",
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Starts the clock.

        Args:
          total_updates: updates of the whole run.
          start: updates done before this process.
          samples_per_update: samples in an update.
          unit: what samples are, in the plural.
          stream: where to print; None is stderr.
          clock: seconds; replaced in tests.
        """
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._samples_per_update = samples_per_update
        self._unit = unit
        self._total, self._left = total_updates, total_updates - start
        self._began = self._said = clock()
        self._paused = 0.0
        self._samples = 0
        # (seconds, samples) after each recent update, and one before the first.
        self._marks: deque[tuple[float, int]] = deque([(clock(), 0)], maxlen=33)
        self._compiling = True
        self._bar: Bar | None = None
        self._gone = False
        if self._stream.isatty():
            self._bar = Bar(
                total=total_updates,
                initial=start,
                file=self._stream,
                **width(self._stream),
                bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} updates{postfix}",
            )

    @property
    def per_second(self) -> float:
        """Samples a second over the last 32 updates; nan before the first.

        Pauses do not count, nor does the first update, which compiles, once there is a second.
        """
        (start, before), (end, after) = self._marks[0], self._marks[-1]
        return (after - before) / (end - start) if end > start else math.nan

    def update(self, n: int = 1, samples: int | None = None) -> None:
        """Counts `n` more updates that took `samples` samples in all (None: the usual number)."""
        self._left -= n
        self._samples += n * self._samples_per_update if samples is None else samples
        self._marks.append((self._clock() - self._paused, self._samples))
        if self._compiling and len(self._marks) == 3:
            self._marks.popleft()
            self._compiling = False
        if self._bar is not None:
            rate = self.per_second
            if rate > 0 and not self._compiling:  # else what is left would be compiled, too
                seconds = self._left * self._samples_per_update / rate
                eta = tqdm.format_interval(round(seconds))
                self._bar.set_postfix_str(f"{rate:.1f} {self._unit}/s, {eta} left", refresh=False)
            with self._while_there():
                self._bar.update(n)

    def sign(self) -> None:
        """Says how far a young run is, where there is no bar and nothing was said for seconds."""
        now, rate = self._clock(), self.per_second
        if self._bar is None and now - self._said >= _SILENCE and now - self._began < _YOUNG:
            done = f"{self._total - self._left:>{len(str(self._total))}}/{self._total}"
            self.line(f"now    {done} | {rate:.1f} {self._unit}/s")

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent in this block (an evaluation, a checkpoint) is not training time."""
        begin = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - begin

    def line(self, text: str) -> None:
        """Prints one line, above the bar if there is one."""
        self._said = self._clock()
        heard()
        with self._while_there():
            if self._gone:
                return
            if self._bar is not None:
                self._bar.write(text, file=self._stream)
            else:
                print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            with self._while_there():
                self._bar.close()

    @contextmanager
    def _while_there(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._gone, self._bar = True, None


def format_line(step: int, total: int, record: Mapping[str, Any]) -> str:
    """One console line for a record.

    Example: `update  120/520 | epoch 9.20 | loss 4.812 (box 2.1 cls 1.7 dfl 1.0) | lr 1.30e-03 |
    grad norm 12.3 | 24.1 images/s`. Entries keep the record's order; keys "a/b" are shown in
    brackets behind "a", eight at most; `images_per_second` and the like come last. An evaluation's
    line starts with `eval`.
    """
    groups: dict[str, dict[str, str]] = {}
    heads: dict[str, str] = {}
    for key, value in record.items():
        if key in ("step", "kind", "fingerprint") or key.endswith("_per_second"):
            continue
        head, _, member = key.partition("/")
        group = groups.setdefault(head, {})
        if member:
            group[member] = _show(head, value, digits=3)
        else:
            heads[head] = _show(head, value)
    word = "eval" if record.get("kind") == "eval" else "update"
    parts = [f"{word:<6} {step:>{len(str(total))}}/{total}"]
    for head, members in groups.items():
        part = head.replace("_", " ")
        if head in heads:
            part += f" {heads[head]}"
        if members:
            shown = [f"{name} {text}" for name, text in list(members.items())[:_GROUP_LIMIT]]
            if len(members) > _GROUP_LIMIT:
                shown.append(f"and {len(members) - _GROUP_LIMIT} more")
            part += f" ({' '.join(shown)})"
        parts.append(part)
    for key, value in record.items():
        if key.endswith("_per_second"):
            parts.append(f"{float(value):.1f} {key.removesuffix('_per_second')}/s")
    return " | ".join(parts)


def _show(head: str, value: Any, digits: int = 4) -> str:
    """A value in as many digits as a reader wants."""
    if isinstance(value, str | bool | int) or value is None:
        return str(value)
    array = np.asarray(value)
    if array.dtype.kind in "biu":
        return str(array)
    number = float(array)
    usual = {"lr": ".2e", "epoch": ".2f", "grad_norm": ".3g"}
    return format(number, usual.get(head, f".{digits}g"))
