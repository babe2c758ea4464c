"""The YOLO format: a data.yaml, folders or lists of images, a text file of labels for each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from jaxaccum.data.base import DataError, Objects, Report, no_objects, normalised_objects
from jaxaccum.data.images import SUFFIXES, FileSource, Record, Unreadable, read_header

LOWEST, HIGHEST = -0.01, 1.01  # tolerance of normalised coordinates


def open_yolo(path: str, split: str, *, on_error: str = "raise") -> FileSource:
    """Opens one split of a YOLO data set.

    Args:
      path: the data.yaml: `path` (root, relative to the yaml), `train` and `val` (each a folder,
        a txt list of images, or a list of those), `names` and/or `nc`.
      split: "train" or "val".
      on_error: "raise" refuses a label file with an error in it; "skip" counts and drops its
        image.

    Raises:
      DataError: naming file, line and fix.
    """
    config = _read_yaml(path)
    names = _class_names(config, path)
    root = (Path(path).parent / str(config.get("path") or ".")).resolve()
    report = Report(f"{path} ({split})")

    images = list(_split_images(config, split, root, path, report))
    records, unlabelled = [], []
    for name, image in images:
        try:
            header = read_header(image)
        except Unreadable as problem:
            report.skip(str(problem), str(image))
            continue
        labels = label_file(image)
        try:
            objects = _read_labels(labels, len(names), header.size, report)
        except FileNotFoundError:
            unlabelled.append(labels)
            objects = no_objects()
        except DataError as error:
            if on_error != "skip":
                raise
            report.skip("image with an error in its labels", error.file, error.line)
            continue
        records.append(Record(name, str(image), header, objects))
    if records and len(unlabelled) == len(records):
        raise DataError(
            f"{path} ({split}): none of the {len(records)} images has a label file; looked for "
            f"{unlabelled[0]} and so on. Put the labels where the last /images/ of the image's "
            f"path becomes /labels/ and its suffix .txt; leave out only those of background images."
        )
    return FileSource(names, records, report)


def label_file(image: Path) -> Path:
    """Where the labels of an image lie: the last /images/ becomes /labels/, the suffix .txt."""
    parts = list(image.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def parse_labels(text: str, classes: int, file: str) -> tuple[NDArray[np.float64], list[int]]:
    """Parses and checks a label file.

    Args:
      text: rows of `class cx cy w h`, or of `class x1 y1 x2 y2 x3 y3 ...` (the box is the
        polygon's extent); the two are not mixed in one file. Coordinates are parts of the image.
      classes: the number of classes.
      file: the file's name, for messages.

    Returns:
      (n, 5) float64 rows of class, cx, cy, w, h, and the line number of each.

    Raises:
      DataError: naming file, line, content and fix.
    """
    rows: list[tuple[float, ...]] = []
    lines: list[int] = []
    polygons: bool | None = None
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if not fields:
            continue

        def wrong(problem: str, fix: str, number: int = number, line: str = line) -> DataError:
            return DataError(
                f"{file}:{number}: {problem}, in the row {line.strip()!r}. {fix}",
                file=file,
                line=number,
            )

        polygon = len(fields) >= 7 and len(fields) % 2 == 1
        if len(fields) != 5 and not polygon:
            raise wrong(
                f"{len(fields)} columns, expected 5 (class cx cy w h) or a polygon "
                f"(class and at least 3 points x y)",
                "Give the row the columns it lacks, or delete it.",
            )
        if polygons is None:
            polygons = polygon
        elif polygon != polygons:
            raise wrong(
                "a polygon in a file of boxes" if polygon else "a box in a file of polygons",
                "Use one kind of row in a file: convert the polygons to boxes, or the other way.",
            )
        try:
            values = [float(field) for field in fields]
        except ValueError:
            raise wrong("not a number", "Write numbers only, separated by spaces.") from None
        label, coordinates = values[0], values[1:]
        if not label.is_integer() or not 0 <= label < classes:
            raise wrong(
                f"class {fields[0]}, expected a whole number from 0 to {classes - 1}",
                "Correct the class, or the names and nc of the data.yaml (class ids start at 0).",
            )
        if not all(math.isfinite(v) for v in coordinates):
            raise wrong("a coordinate that is not finite", "Correct the row or delete it.")
        if min(coordinates) < LOWEST or max(coordinates) > HIGHEST:
            worst = max(coordinates, key=lambda v: abs(v - 0.5))
            raise wrong(
                f"coordinate {worst:g}, expected 0 to 1",
                "Divide x and width by the image's width, y and height by its height.",
            )
        if polygon:
            x, y = coordinates[0::2], coordinates[1::2]
            coordinates = [
                (min(x) + max(x)) / 2,
                (min(y) + max(y)) / 2,
                max(x) - min(x),
                max(y) - min(y),
            ]
        rows.append((label, *coordinates))
        lines.append(number)
    return np.array(rows, np.float64).reshape(-1, 5), lines


def _read_labels(file: Path, classes: int, size: tuple[int, int], report: Report) -> Objects:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: not a text file ({error.reason} at byte {error.start}). "
            f"Write labels as plain text.",
            file=str(file),
        ) from error
    rows, lines = parse_labels(text, classes, str(file))
    return normalised_objects(rows, size, report, str(file), lines)


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such data.yaml. Check the path.", file=path) from None
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not valid YAML: {error}", file=path) from error
    if not isinstance(config, dict):
        raise DataError(
            f"{path}: expected keys (path, train, val, names), found {type(config).__name__}. "
            f"See the YOLO data.yaml format.",
            file=path,
        )
    if config.get("channels", 3) != 3:
        raise DataError(
            f"{path}: channels is {config['channels']!r}; only 3 (RGB) is supported. "
            f"Images with other channels are read as RGB if you remove the key.",
            file=path,
        )
    return config


def _class_names(config: dict[str, Any], path: str) -> tuple[str, ...]:
    names, count = config.get("names"), config.get("nc")
    if count is not None and (not isinstance(count, int) or count < 1):
        raise DataError(f"{path}: nc is {count!r}, expected a whole number from 1 on.", file=path)
    if isinstance(names, dict):
        if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
            raise DataError(
                f"{path}: names has the class ids {list(names)}, expected 0 to {len(names) - 1} "
                f"without gaps. Number the classes from 0, in the labels too.",
                file=path,
            )
        names = [names[k] for k in sorted(names, key=int)]
    if not names:
        if count is None:
            raise DataError(
                f"{path}: neither names nor nc. Add `names: [first, second, ...]`.", file=path
            )
        return tuple(f"class{i}" for i in range(count))
    if not isinstance(names, list):
        raise DataError(
            f"{path}: names is {names!r}, expected a list or a mapping from id to name.", file=path
        )
    twice = {str(name) for name in names if names.count(name) > 1}
    if twice:
        raise DataError(
            f"{path}: names has {', '.join(sorted(twice))} more than once; names must differ.",
            file=path,
        )
    if count is not None and count != len(names):
        raise DataError(
            f"{path}: nc is {count} but names has {len(names)} entries. Make them agree, "
            f"or remove nc.",
            file=path,
        )
    return tuple(str(name) for name in names)


def _split_images(
    config: dict[str, Any], split: str, root: Path, path: str, report: Report
) -> Iterator[tuple[str, Path]]:
    """Yields (name relative to the split, file) for each image of the split."""
    entries = config.get(split)
    if not entries:
        raise DataError(
            f"{path}: no `{split}`; the file has {', '.join(map(str, config))}. "
            f"Add `{split}: images/{split}` or wherever its images are.",
            file=path,
        )
    for entry in entries if isinstance(entries, list) else [entries]:
        place = root / str(entry)
        if place.is_dir():
            yield from _folder_images(place, report)
        elif place.is_file() and place.suffix == ".txt":
            yield from _listed_images(place, root)
        elif place.is_file():
            raise DataError(
                f"{path}: `{split}` names the file {place}, expected a folder of images or a .txt "
                f"list of them.",
                file=path,
            )
        else:
            download = (
                " The `download` key is not run: fetch the data yourself."
                if config.get("download")
                else ""
            )
            raise DataError(
                f"{path}: `{split}` names {place}, which does not exist. Correct `path` (relative "
                f"to the yaml file) or `{split}` (relative to `path`).{download}",
                file=path,
            )


def _folder_images(folder: Path, report: Report) -> Iterator[tuple[str, Path]]:
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if hidden or file.is_dir():
            continue
        if file.suffix.lower() in SUFFIXES:
            yield file.relative_to(folder).as_posix(), file
        elif not (file.suffix == ".txt" and label_file(file) == file):
            # Labels may lie beside their images when no folder is called images.
            report.skip("file that is no image", str(file))


def _listed_images(listing: Path, root: Path) -> Iterator[tuple[str, Path]]:
    for line in listing.read_text(encoding="utf-8-sig").splitlines():
        entry = line.strip()
        if not entry:
            continue
        places: Sequence[Path] = [listing.parent / entry, root / entry]
        file = next((p for p in places if p.is_file()), places[0])
        yield _portable_name(entry, root), file


def _portable_name(entry: str, root: Path) -> str:
    """A listed image's name without the part that says where the data set lies."""
    path = Path(entry)
    if not path.is_absolute():
        return path.as_posix()
    if path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    *_, tail = path.as_posix().rpartition("/images/")
    return tail if tail != path.as_posix() else path.name
