"""Files in and files out, as every task's part of the verb `predict` has it."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxaccum import data
from jaxaccum.data import movies, texts
from jaxaccum.machine.waiting import waiting

PICTURES = data.SUFFIXES | movies.SUFFIXES


def find_files(source: Path, suffixes: Collection[str]) -> list[Path]:
    """The file, or all files of a folder with one of these suffixes, sorted.

    What else is in the folder is counted in a line on stdout.

    Raises:
      DataError: nothing there.
    """
    if source.is_file():
        return [source]
    shown = texts.shown_path(source)
    if not source.is_dir():
        raise data.DataError(f"--source={shown} is neither a file nor a folder")
    found, others = [], Counter[str]()
    for path in sorted(source.iterdir()):
        kind = _kind(path)
        if not kind and path.suffix.lower() in suffixes:
            found.append(path)
        else:
            others[kind or path.suffix.lower() or "without a suffix"] += 1
    left_out = ", ".join(f"{count} {texts.shown_path(kind)}" for kind, count in others.items())
    known = ", ".join(sorted(suffixes))
    if not found:
        raise data.DataError(
            f"--source={shown} holds nothing to use (looked for {known}"
            f"{f'; there is {left_out}' if left_out else ''})"
        )
    if others:
        print(f"left out of {shown}: {left_out} (taken are {known})")
    return found


def _kind(path: Path) -> str:
    """What a path is, if it is no file."""
    if path.is_file():
        return ""
    if path.is_dir():
        return "folder (sub-folders are not searched)"
    return "pipe or device" if path.exists() else "broken link"


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image, or a frame of a GIF or a video.

    Attributes:
      path: of the file. told: what results say of it: the file's name, the frame's number.
      pixels: (H, W, 3) uint8 RGB. target: where to write what becomes of it, without a suffix.
    """

    path: Path
    told: dict[str, Any]
    pixels: np.ndarray
    target: Path


def counted(paths: Sequence[Path]) -> Iterator[Path]:
    """The files; how many of them are done is said where it takes long."""
    with waiting("predicting", len(paths), "files") as advance:
        for path in paths:
            yield path
            advance(1)


def pictures(paths: Sequence[Path], out: Path, failed: list[str]) -> Iterator[Picture]:
    """The images, and the frames of the rest, one at a time.

    Args:
      failed: takes a message for every file that cannot be read, or not to its end.
    """
    targets = targets_of(out, paths)
    for path in counted(paths):
        try:
            if path.suffix.lower() not in movies.SUFFIXES:
                yield Picture(path, {"file": path.name}, data.read_image(path), targets[path])
                continue
            for number, pixels in enumerate(movies.frames(path), start=1):
                target = targets[path].with_name(f"{targets[path].name}_{number:06}")
                yield Picture(path, {"file": path.name, "frame": number}, pixels, target)
        # Whatever a decoder makes of a damaged file, the next one is another.
        except Exception as error:
            failed.append(why(path, error))


def why(path: Path, error: Exception) -> str:
    """What to say of a file that cannot be read."""
    if isinstance(error, data.DataError):
        return str(error)
    said = " ".join(str(error).split())[:200]
    return f"{texts.shown_path(path)}: cannot be read ({type(error).__name__}: {said})"


def targets_of(out: Path, paths: Sequence[Path]) -> dict[Path, Path]:
    """Where to write what becomes of each file, without the suffix: a.jpg and a.png are two.

    Frames of a file NAME become NAME_000001 and so on, which no other file may be called.
    """
    stems = Counter(path.stem for path in paths)
    numbered = {m.group(1) for path in paths if (m := re.fullmatch(r"(.*)_\d{6,}", path.stem))}
    used = set[str]()
    targets = {}
    for path in paths:
        name = path.stem if stems[path.stem] == 1 else path.name
        if path.suffix.lower() in movies.SUFFIXES and name in numbered:
            name = path.name
        while name in used or (path.suffix.lower() in movies.SUFFIXES and name in numbered):
            name += "_"
        used.add(name)
        targets[path] = out / name
    return targets


def spare(paths: Sequence[Path], targets: Iterable[str]) -> None:
    """Refuses to write over what is read.

    Raises:
      DataError: names the file.
    """
    sources = {path.resolve() for path in paths}
    for target in targets:
        if Path(target).resolve() in sources:
            raise data.DataError(f"--out would overwrite {target}: give another folder")


def report(unreadable: list[str], results: list[dict[str, Any]], source: Path) -> None:
    """Prints what could not be used.

    Raises:
      DataError: that is all there was.
    """
    for message in unreadable:
        print(f"skipped: {message}")
    if not results:
        raise data.DataError(
            f"none of the {len(unreadable)} files of {texts.shown_path(source)} could be used"
        )


def called(result: dict[str, Any]) -> str:
    """The file of a result, and the frame of it."""
    return result["file"] + (f" frame {result['frame']}" if "frame" in result else "")
