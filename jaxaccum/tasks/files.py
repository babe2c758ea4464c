"""Files in and files out, as every task's part of the verb `predict` has it."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from jaxaccum import data
from jaxaccum.data import movies, texts
from jaxaccum.machine.waiting import waiting
from jaxaccum.tasks.outputs import Outputs
from jaxaccum.tasks.results import Predictor, Sample
from jaxaccum.tasks.speed import Phases, Speed, timed
from jaxaccum.tasks.videos import Drawn

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
    """What a path is, if it is no file that is taken."""
    if path.name.startswith("."):  # as macOS writes beside every file on disks of others
        return "hidden"
    if path.is_file():
        return ""
    if path.is_dir():
        return "folder (sub-folders are not searched)"
    return "pipe or device" if path.exists() else "broken link"


def counted(paths: Sequence[Path]) -> Iterator[Path]:
    """The files; how many of them are done is said where it takes long."""
    with waiting("predicting", len(paths), "files") as advance:
        for path in paths:
            yield path
            advance(1)


def samples(
    paths: Sequence[Path], read: Callable[[Path], Iterable[Sample]], failed: list[str]
) -> Iterator[Sample]:
    """The samples of files, one at a time.

    Args:
      read: a file's samples.
      failed: takes a message for every file that cannot be read, or not to its end.
    """
    for path in counted(paths):
        try:
            yield from read(path)
        # Whatever a decoder makes of a damaged file, the next one is another.
        except Exception as error:
            failed.append(why(path, error))


def read_pictures(path: Path) -> Iterator[Sample]:
    """An image, the frames of an animation or a video, or the pages of a TIFF.

    Of a photograph with others in its file (MPO) it is the first, which is said on stderr.

    Raises:
      DataError: it cannot be read, or not to its end.
    """
    if path.suffix.lower() not in movies.SUFFIXES:
        told = movies.told(path)
        if told.copies:
            what = f"{told.copies} smaller copies or masks of its pages"
            print(f"note: {texts.shown_path(path)}: left out {what}", file=sys.stderr)
        if not told.moves:
            if told.pictures > 1:
                what = f"the first of the {told.pictures} pictures in it is used"
                print(f"note: {texts.shown_path(path)}: {what}", file=sys.stderr)
            yield Sample(data.read_image(path), {"file": path.name}, path)
            return
    for number, pixels in enumerate(movies.frames(path), start=1):
        yield Sample(pixels, {"file": path.name, "frame": number}, path)


def picture_of(value: Any) -> Sample:
    """An image in memory: an array (H, W, 3) or (H, W) uint8, RGB or grey, or one of Pillow's.

    Raises:
      DataError: it is none of these.
    """
    if hasattr(value, "convert") and hasattr(value, "size"):  # Pillow's
        from PIL import ImageOps

        value = np.asarray(ImageOps.exif_transpose(value).convert("RGB"))
    pixels = np.asarray(value)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=-1)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or not pixels.size:
        raise data.DataError(
            f"an image is an array (height, width, 3) of uint8, RGB, or an image of Pillow; got "
            f"{type(value).__name__} {pixels.dtype} {pixels.shape}"
        )
    return Sample(np.ascontiguousarray(pixels))


def write_results(
    found: Iterable[Sample],
    predictor: Predictor,
    targets: Mapping[Path, Path],
    failed: list[str],
    source: Path,
    results: str,
    outputs: Outputs,
    drawn: Drawn,
    speed: Speed,
) -> list[str]:
    """Predicts samples of files, writes each result, and all of them as one JSON file.

    One result is in memory at a time: a video may have many.

    Args:
      targets: as of `targets_of`.
      failed: takes a message for every file that could not be used, after those it has.
      source: of all, for messages. results: name of the JSON file.
      outputs: where to write.
      drawn: takes the frames of videos.
      speed: takes how long each sample took.
    Returns:
      each result in words.
    Raises:
      DataError: none of the files could be used, or another file is where one is to be written.
    """
    words, told = list[str](), list[dict[str, Any]]()
    for reading, sample in timed(found):
        path, phases = cast(Path, sample.path), Phases()
        try:
            result = predictor(sample)
        except data.DataError as error:
            if (said := why(path, error)) not in failed:  # else every frame would say it
                failed.append(said)
            continue
        name, frame = targets[path].name, sample.facts.get("frame")
        phases.end("preparation and network")  # and all else that it does
        made = result.speed or phases.milliseconds.copy()
        phases.milliseconds.clear()
        more = outputs.save(name if frame is None else f"{name}_{frame:06}", result.save)
        drawn.add(path, result)
        phases.end("drawing and writing")
        speed.add_one({"reading": reading, **made, **phases.milliseconds})
        told.append({**sample.facts, **result.to_json(), **more})
        words.append(str(result))
    drawn.end()
    for message in failed:
        print(f"skipped: {message}")
    if not words:
        raise data.DataError(
            f"none of the {len(failed)} files of {texts.shown_path(source)} could be used"
        )
    text = json.dumps(told, indent=1) + "\n"
    outputs.save(results, lambda file: file.write_text(text))
    return words


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
        if name in numbered and has_frames(path):
            name = path.name
        while name in used or (name in numbered and has_frames(path)):
            name += "_"
        used.add(name)
        targets[path] = out / name
    return targets


def has_frames(path: Path) -> bool:
    """Whether a file becomes several samples, which its suffix alone does not tell."""
    suffix = path.suffix.lower()
    return suffix in movies.SUFFIXES or (suffix in movies.PAGED and movies.told(path).moves)
