"""Rows of YOLO label files: boxes, polygons, and boxes with key points, told apart and checked."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from jaxaccum.data.base import DataError, Findings
from jaxaccum.data.texts import lines, number, shown, shown_path

LOWEST, HIGHEST = -0.01, 1.01  # tolerance of normalised coordinates
LARGEST_FILE = 1 << 26  # bytes of a label file: over a million boxes

KeyPoints = tuple[int, int]  # how many, and values of each: 2 (x y) or 3 (x y visibility)

_ENOUGH = 1000  # long rows that tell what the others are
_MOST = 0.9  # part of them; an image cropped after it was labelled has key points anywhere
_TELLING = 8  # boxes from which on their numbers tell what they mean
_SKEW = 0.01  # of a turned box's corners, parts of the image: clipped ones have more
_HINT = "If these are key points, give their kpt_shape in the data.yaml."


def label_file(image: Path) -> Path:
    """Where the labels of an image lie: the last /images/ becomes /labels/, the suffix .txt."""
    parts = list(image.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


class LabelFiles:
    """Where the labels of a split's images lie, and what is odd about that.

    Attributes:
      missing: of images without one, where it was looked for.
    """

    def __init__(self) -> None:
        self.missing: list[Path] = []
        self._used: dict[Path, Path] = {}  # label file -> an image of it
        self._linked = self._spelled = self._beside = 0
        self._shared: list[str] = []

    def of(self, image: Path) -> Path:
        """The label file of an image; the usual place if there is none."""
        usual = label_file(image)
        file = usual if os.path.lexists(usual) else self._elsewhere(image, usual)
        if file in self._used and self._used[file] != image:
            self._shared.append(f"{shown_path(self._used[file])} and {shown_path(image)}")
        self._used.setdefault(file, image)
        return file

    def none(self, image: Path, usual: Path) -> None:
        """There is none, and the image counts as one without objects."""
        self.missing.append(usual)
        beside = image.with_suffix(".txt")
        self._beside += beside != usual and os.path.lexists(beside)

    def tell(self, report: Findings, folders: Iterable[Path]) -> None:
        """Says what is odd.

        Args:
          folders: that were read whole, so that each of their labels should have its image.
        """
        for folder in sorted({label_file(folder / "0.jpg").parent for folder in folders}):
            try:
                there = sorted(os.listdir(folder))
            except OSError:
                continue
            for name in there:
                is_label = name.endswith(".txt") and name != "classes.txt" and name[0] != "."
                if is_label and folder / name not in self._used:
                    report.skip("label file without its image", str(folder / name))
        notes = []
        if self._linked:
            notes.append(f"labels of {self._linked} images read where a link leads")
        if self._spelled:
            notes.append(
                f"labels of {self._spelled} images read from names in another spelling (.TXT, or "
                "another form of Unicode)"
            )
        if self._shared:
            notes.append(
                f"{len(self._shared)} images share their label file with another of the same name "
                f"but the suffix: {', '.join(self._shared[:2])}"
            )
        if self.missing:
            notes.append(
                f"{len(self.missing)} images have no label file, and count as images without "
                f"objects: looked for {', '.join(shown_path(f) for f in self.missing[:2])}"
                + (", ..." if len(self.missing) > 2 else "")
                + (
                    f"; beside {self._beside} of them lies a .txt, which is not read, as they are "
                    "in a folder called images"
                    if self._beside
                    else ""
                )
            )
        report.notes.extend(notes)

    def _elsewhere(self, image: Path, usual: Path) -> Path:
        """Where a link leads, or under another spelling; else the usual place."""
        real = label_file(Path(os.path.realpath(image)))
        if real != usual and os.path.lexists(real):
            self._linked += 1
            return real
        names = [usual.with_suffix(".TXT")]
        names += [usual.with_name(normalize(form, usual.name)) for form in ("NFC", "NFD")]
        for name in names:
            if name != usual and os.path.lexists(name):
                self._spelled += 1
                return name
        return usual


class Corners:
    """Whether rows `class cx cy w h` of a split are all `class x1 y1 x2 y2` by mistake.

    Most such boxes would reach beyond their image, be clipped, and be taught.
    """

    def __init__(self) -> None:
        self._boxes = self._clipped = 0
        self._all = True
        self._first: tuple[str, int] | None = None

    def add(self, rows: NDArray[np.float64], places: Sequence[int], file: str) -> None:
        """Takes the boxes of a file, (n, 5), and their lines."""
        if not len(rows):
            return
        x, y, w, h = rows[:, 1:].T
        self._boxes += len(rows)
        beyond = (abs(x - 0.5) + w / 2 > 0.5 - LOWEST) | (abs(y - 0.5) + h / 2 > 0.5 - LOWEST)
        self._clipped += int(beyond.sum())
        self._all = self._all and bool(((x < w) & (y < h)).all())
        self._first = self._first or (file, places[0])

    def refuse(self) -> None:
        """Raises DataError if they are."""
        if self._first is None or self._boxes < _TELLING or not self._all:
            return
        if 3 * self._clipped >= self._boxes:
            file, line = self._first
            raise DataError(
                f"{shown_path(file)}:{line}: {self._clipped} of {self._boxes} boxes reach beyond "
                "their image as class cx cy w h, and all lie in it as class x1 y1 x2 y2. Write the "
                "centre, the width and the height.",
                file=file, line=line,
            )  # fmt: skip


class LongRows:
    """Whether the long rows of a split, read as polygons, may be boxes and more numbers instead.

    A polygon of n points and a box with n - 2 key points of x and y have the same columns. Both
    can be meant only where almost all rows have equally many, and where almost all have their
    points in the box that their first four numbers make: polygons drawn by hand never do. A box
    with two or four further numbers (scores, marks) looks like a triangle or a quadrilateral: it
    is taken for one only where it is a parallelogram, as turned boxes are.
    """

    def __init__(self) -> None:
        self._rows = 0
        self._columns: Counter[int] = Counter()  # of the rows that could be either
        self._first: dict[int, tuple[str, int]] = {}

    def add(self, values: Sequence[float], file: str, line: int) -> None:
        """Takes the class and the coordinates of one long row; looks at the first 1000."""
        if self._rows == _ENOUGH:
            return
        self._rows += 1
        if _could_be_pose(values) or _could_be_more(values):
            self._columns[len(values)] += 1
            self._first.setdefault(len(values), (file, line))

    def refuse(self, path: str) -> None:
        """Raises DataError if they could be either; `path` is the data.yaml, for the message."""
        if not self._columns:
            return
        [(columns, found)] = self._columns.most_common(1)
        if found < _MOST * self._rows:
            return
        file, line = self._first[columns]
        shapes = [f"[{(columns - 5) // n}, {n}]" for n in (2, 3) if (columns - 5) % n == 0]
        raise DataError(
            f"{shown_path(file)}:{line}: {columns} columns, here and in other rows, that could be "
            f"a polygon as well as a box with its key points or other numbers. In "
            f"{shown_path(path)}, add `kpt_shape: {' or '.join(shapes)}` if they are key points, "
            f"or `kpt_shape: null` if they are polygons. Delete scores and the like.",
            file=file,
            line=line,
        )


def parse_labels(
    text: str,
    classes: int,
    file: str,
    *,
    key_points: KeyPoints | None = None,
    long_rows: LongRows | None = None,
) -> tuple[NDArray[np.float64], list[int]]:
    """Parses and checks a label file.

    Args:
      text: rows of `class cx cy w h`, or of `class x1 y1 x2 y2 x3 y3 ...` (the box is the
        polygon's extent); the two are not mixed in one file. Coordinates are parts of the image.
      classes: the number of classes.
      file: the file's name, for messages.
      key_points: rows may be `class cx cy w h` and this many key points, which are left out, and
        may not be polygons.
      long_rows: takes the rows that were read as polygons.

    Returns:
      (n, 5) float64 rows of class, cx, cy, w, h, and the line number of each.

    Raises:
      DataError: naming file, line, content and fix.
    """
    # Of what is plain, float() reads just what number() does, in half the time.
    to_number: Callable[[str], float] = float if text.isascii() and "_" not in text else number
    pose = 0 if key_points is None else 5 + key_points[0] * key_points[1]
    rows: list[tuple[float, ...]] = []
    places: list[int] = []
    polygons: bool | None = None
    for place, line in enumerate(lines(text), 1):
        fields = line.split()
        if not fields:
            continue

        def wrong(problem: str, fix: str, place: int = place, line: str = line) -> DataError:
            return DataError(
                f"{shown_path(file)}:{place}: {problem}, in the row {shown(line.strip())}. {fix}",
                file=file,
                line=place,
            )

        polygon = not pose and len(fields) >= 7 and len(fields) % 2 == 1
        if len(fields) not in (5, pose) and not polygon:
            other = (
                f"{pose} (those and the key points of kpt_shape)"
                if pose
                else "a polygon (class and at least 3 points x y)"
            )
            fix = "Give the row the columns it lacks, or delete it."
            if len(fields) < 5 and re.search("[,;]", line):
                fix = "Separate the numbers by spaces."
            elif len(fields) > 5 and not pose:
                fix += f" {_HINT}"
            raise wrong(f"{len(fields)} columns, expected 5 (class cx cy w h) or {other}", fix)
        if polygons is None:
            polygons = polygon
        elif polygon != polygons:
            raise wrong(
                "a polygon in a file of boxes" if polygon else "a box in a file of polygons",
                "Use one kind of row in a file: convert the polygons to boxes, or the other way. "
                + _HINT,
            )
        try:
            values = [to_number(field) for field in fields]
        except ValueError:
            raise wrong("not a number", "Write numbers only, separated by spaces.") from None
        label, coordinates = values[0], values[1:]
        if not label.is_integer() or not 0 <= label < classes:
            raise wrong(
                f"class {fields[0][:40]}, expected a whole number from 0 to {classes - 1}",
                "Correct the class, or the names and nc of the data.yaml (class ids start at 0).",
            )
        if not all(map(math.isfinite, coordinates)):
            raise wrong("a coordinate that is not finite", "Correct the row or delete it.")
        if pose:
            coordinates = coordinates[:4]
        if min(coordinates) < LOWEST or max(coordinates) > HIGHEST:
            worst = max(coordinates, key=lambda v: abs(v - 0.5))
            raise wrong(
                f"coordinate {worst:g}, expected 0 to 1",
                "Divide x and width by the image's width, y and height by its height."
                + (f" {_HINT}" if polygon else ""),
            )
        if polygon:
            if long_rows is not None:
                long_rows.add(values, file, place)
            x, y = coordinates[0::2], coordinates[1::2]
            coordinates = [
                (min(x) + max(x)) / 2,
                (min(y) + max(y)) / 2,
                max(x) - min(x),
                max(y) - min(y),
            ]
        rows.append((label, *coordinates))
        places.append(place)
    return np.array(rows, np.float64).reshape(-1, 5), places


def _could_be_pose(values: Sequence[float]) -> bool:
    """Whether a row makes sense as a box and key points, half of them or more in the box."""
    _, x, y, width, height, *rest = values
    edges = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    if min(width, height) <= 0 or min(edges) < LOWEST or max(edges) > HIGHEST:
        return False
    if _is_turned_box(values[1:]):
        return False
    readings = [rest[0::2], rest[1::2]]
    if len(rest) % 3 == 0 and set(rest[2::3]) <= {0, 1, 2}:
        readings += [rest[0::3], rest[1::3]]
    return any(
        _mostly_inside(zip(x, y, strict=True), edges)
        for x, y in zip(readings[0::2], readings[1::2], strict=True)
    )


def _could_be_more(values: Sequence[float]) -> bool:
    """Whether a row makes sense as a box and two or four numbers that are no points."""
    _, x, y, width, height, *rest = values
    if len(rest) not in (2, 4):
        return False
    edges = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    if min(width, height) <= 0 or min(edges) < LOWEST or max(edges) > HIGHEST:
        return False
    return not _is_turned_box(values[1:])


def _is_turned_box(points: Sequence[float]) -> bool:
    """Whether x1 y1 x2 y2 ... are the corners of a box, upright or turned, one after the other."""
    if len(points) == 10 and points[8:] == points[:2]:
        points = points[:8]
    if len(points) != 8:
        return False
    corners = np.array(points).reshape(4, 2)
    sides = abs(corners - np.roll(corners, 1, axis=0)).max(axis=1)
    skew = abs(corners[0] + corners[2] - corners[1] - corners[3]).max()
    return bool(skew <= _SKEW and sides.min() > 0)


def _mostly_inside(
    points: Iterable[tuple[float, float]], edges: tuple[float, float, float, float]
) -> bool:
    """Whether half or more of the points lie in a box; (0, 0) is a point that was not seen."""
    left, top, right, bottom = edges
    seen = [p for p in points if p != (0, 0)]
    inside = sum(
        left + LOWEST <= x <= right - LOWEST and top + LOWEST <= y <= bottom - LOWEST
        for x, y in seen
    )
    return 2 * inside >= len(seen)
