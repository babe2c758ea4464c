"""Predictions of whatever a user gives: files, folders, patterns, videos, arrays, and these in
lists and generators."""

from __future__ import annotations

import glob
import itertools
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxaccum.data import DataError, texts
from jaxaccum.tasks import files, videos
from jaxaccum.tasks.base import Task, Trained
from jaxaccum.tasks.options import checked
from jaxaccum.tasks.outputs import Outputs
from jaxaccum.tasks.results import Predictor, Result, Sample
from jaxaccum.tasks.speed import Phases, Speed, timed

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def paths_of(source: str | os.PathLike[str], task: Task) -> list[Path]:
    """The files that a path or a pattern names.

    Args:
      source: a file, a folder, or a pattern as "photos/**/*.jpg". Folders that are there are not
        taken for patterns, whatever is in their names.
    Raises:
      DataError: there are none that the task reads; or it is an address.
    """
    text = os.fspath(source)
    if _ADDRESS.match(text):
        shown = texts.shown_path(text)
        raise DataError(f"{shown}: nothing is downloaded; give a file or a folder of this machine")
    if not os.path.exists(text) and glob.has_magic(text):
        pattern = _pattern(text)
        found = sorted(Path(one) for one in glob.glob(pattern, recursive=True))
        taken = [path for path in found if path.suffix.lower() in task.suffixes and path.is_file()]
        if not taken:
            hint = "; [ ] are signs of a pattern: write [[] for [" if "[" in text else ""
            raise DataError(
                f"--source={texts.shown_path(text)} matches {len(found) or 'no'} files, none of "
                f"them to be used (looked for {', '.join(sorted(task.suffixes))}{hint})"
            )
        return taken
    return files.find_files(Path(text), task.suffixes)


def _pattern(text: str) -> str:
    """A pattern, with what is there of its beginning taken as it is written."""
    parts = Path(text).parts
    starts = list(itertools.accumulate(parts, os.path.join))
    known = next((n for n in range(len(starts), 0, -1) if os.path.exists(starts[n - 1])), 0)
    return os.path.join(*map(glob.escape, starts[known - 1 : known]), *parts[known:])


def predict_files(
    trained: Trained, source: str | os.PathLike[str], out: Path, failed: list[str], *,
    save_video: bool = True, codec: str = "", speed: Speed | None = None, **options: Any,
) -> list[str]:  # fmt: skip
    """What the verb `predict` does: predicts files, and writes what is found.

    Args:
      source: as of `paths_of`.
      out: folder to write to: a picture of each, of videos also a video, what else the task writes,
        and a JSON of all.
      failed: takes a message for every file that could not be used, or video not written.
      save_video: of a video NAME.mp4 also write NAME.mp4, drawn, with its size and frame rate.
      codec: of these videos, see `draw.videos.VideoWriter`.
      speed: takes how long the samples took; see `new_speed`.
      options: of the task's `predict_flags`.
    Returns:
      each result in words.
    Raises:
      DataError: no file can be used, or one would be written over that no earlier call wrote.
      ConfigError: an option cannot be. VideoError: the codec cannot be written here.
    """
    task = trained.task
    options = checked(options)
    predictor = task.predictor(trained, **options)
    paths = paths_of(source, task)
    targets = files.targets_of(out, paths)
    outputs, drawn = Outputs(out), videos.names_of(targets) if save_video else {}
    outputs.require_free(
        targets, task.writes(**options), task.results, files.has_frames, drawn.values()
    )
    out.mkdir(parents=True, exist_ok=True)
    found = files.samples(paths, task.read_file, failed)
    with videos.Drawn(outputs, drawn, failed, codec) as movies:
        return files.write_results(
            found, predictor, targets, failed, Path(source), task.results, outputs, movies,
            new_speed(trained) if speed is None else speed,
        )  # fmt: skip


def new_speed(trained: Trained) -> Speed:
    """Of what is predicted, of which nothing has been yet."""
    return Speed(trained.task.unit, trained.task.input_size())


def predictions(
    trained: Trained, source: Any, *, speed: Speed | None = None, **options: Any
) -> Iterator[Result]:
    """Results one at a time, as the samples come.

    Args:
      source: a path or a pattern, an array, an image of Pillow, or an iterable of these.
      speed: takes how long the samples took; see `new_speed`.
      options: of the task's `predict_flags`.
    Raises:
      DataError: a source that was named cannot be used. A file of a folder that cannot be is a
        warning.
      ConfigError: an option cannot be, at once.
    """
    predictor = trained.task.predictor(trained, **checked(options))
    taken = new_speed(trained) if speed is None else speed
    return _counted(timed(_samples(source, trained.task)), predictor, taken)


def _counted(
    found: Iterator[tuple[float, Sample]], predictor: Predictor, speed: Speed
) -> Iterator[Result]:
    for reading, sample in found:
        phases = Phases()
        result = predictor(sample)
        phases.end("preparation and network")  # and all else, of a task that tells no phases
        speed.add_one({"reading": reading, **(result.speed or phases.milliseconds)})
        yield result
        del sample, result  # not held while the next is made


def _samples(source: Any, task: Task) -> Iterator[Sample]:
    if isinstance(source, str | os.PathLike):
        paths = paths_of(source, task)
        failed: list[str] = []
        yield from files.samples(paths, task.read_file, failed)
        if failed and len(paths) == 1:
            raise DataError(failed[0])
        for message in failed:
            warnings.warn(f"skipped: {message}", stacklevel=5)
    elif isinstance(source, Iterable) and not hasattr(source, "__array__"):
        for one in source:
            yield from _samples(one, task)
    else:
        yield task.sample(source)
