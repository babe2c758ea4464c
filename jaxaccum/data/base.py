"""What a data set of images is to the rest of jaxaccum: objects, an identity and a report."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from jaxaccum.errors import UserError
from jaxaccum.machine import user_cache

Boxes = NDArray[np.float32]
Classes = NDArray[np.int32]
Image = NDArray[np.uint8]

CLIPPED = "part of a box outside the image, clipped"
_SHOWN = 5  # files in a message
_LONGEST_NAME = 4096  # characters; Linux and others have no longer path


class DataError(UserError, ValueError):
    """Data that cannot be used as given.

    The message says what was given, what was expected, where, and what to do.

    Attributes:
      file: the file at fault, or "".
      line: its line, counted from 1, or None.
    """

    def __init__(self, message: str, *, file: str = "", line: int | None = None) -> None:
        super().__init__(message)
        self.file = file
        self.line = line

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions pickle by their args alone; worker processes must not lose the rest.
        return (_rebuild, (str(self), self.file, self.line))


def _rebuild(message: str, file: str, line: int | None) -> DataError:
    return DataError(message, file=file, line=line)


@dataclass(frozen=True, eq=False)
class Objects:
    """The labelled objects of one image.

    Attributes:
      boxes: (n, 4) float32, xyxy in pixels of the original image, inside it.
      classes: (n,) int32, class ids.
    """

    boxes: Boxes
    classes: Classes

    def __len__(self) -> int:
        return len(self.classes)


def no_objects() -> Objects:
    """The objects of a background image: none."""
    return Objects(np.zeros((0, 4), np.float32), np.zeros(0, np.int32))


@dataclass
class Findings(abc.ABC):
    """What a source left out, and why.

    Attributes:
      where: the data set and split, for people.
      skipped: reason -> the (file, line or None) of everything left out for it.
      notes: what else a person should know of how the data was read, a sentence each.
    """

    where: str
    skipped: dict[str, list[tuple[str, int | None]]] = field(default_factory=dict, kw_only=True)
    notes: list[str] = field(default_factory=list, kw_only=True)

    def skip(self, reason: str, file: str, line: int | None = None) -> None:
        """Counts one thing left out."""
        self.skipped.setdefault(reason, []).append((file, line))

    @abc.abstractmethod
    def summary(self) -> str:
        """What was kept, in one line."""

    def lines(self, examples: int = 3) -> list[str]:
        """A summary for people: a line of totals, one for each reason to skip, one for each note.

        File names are made printable, and cut where they are longer than any file's.
        """
        from jaxaccum.data.texts import shown_path  # that module needs this one's errors

        summary = [f"{self.where}: {self.summary()}"]
        for reason, places in self.skipped.items():
            shown = [
                shown_path(file[:_LONGEST_NAME]) + ("" if line is None else f":{line}")
                for file, line in places[:examples]
            ]
            more = ", ..." if len(places) > examples else ""
            summary.append(f"  skipped {len(places)} x {reason}: {', '.join(shown)}{more}")
        return [*summary, *(f"  {note}" for note in self.notes)]


@dataclass
class Report(Findings):
    """What a source of images holds and what it left out, counted.

    Attributes:
      images: images kept.
      objects: labelled objects kept.
      backgrounds: images kept that have no object.
    """

    images: int = 0
    objects: int = 0
    backgrounds: int = 0

    def count(self, objects: Iterable[Objects]) -> None:
        """Counts the images kept, one `Objects` each."""
        for one in objects:
            self.images += 1
            self.objects += len(one)
            self.backgrounds += len(one) == 0

    def count_once(self, kind: str, identity: str, count: Callable[[], None]) -> None:
        """Fills in what follows from an identity alone, and keeps it in the user's cache.

        Args:
          kind: of data set, the name of a folder.
          identity: of the data set, the name of a file.
          count: fills in the counts where they are not known yet.
        """
        file = user_cache.folder() / kind / f"{identity}.json"
        known, counts = user_cache.load(file), self._counts()
        if (
            isinstance(known, dict)
            and known.keys() == counts.keys()
            and all(type(number) is int and number >= 0 for number in known.values())
        ):
            vars(self).update(known)
            return
        count()
        user_cache.save(file, self._counts())

    def _counts(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if type(value) is int}

    def summary(self) -> str:
        """What was kept, in one line."""
        return (
            f"{self.images} images, {self.objects} objects, "
            f"{self.backgrounds} images without objects"
        )


class Source(Protocol):
    """A data set of one split, read by index.

    Attributes:
      names: class names; the index is the class id.
      identity: 12 hex characters, a hash of what is learned from (image names relative to the
        split, sizes, objects, class names) and not of where it lies on disk.
      report: what was kept and what was left out.
    """

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def identity(self) -> str: ...

    @property
    def report(self) -> Report: ...

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image:
        """(H, W, 3) uint8 RGB."""
        ...

    def objects(self, index: int) -> Objects:
        """The labelled objects of image `index`."""
        ...

    def name(self, index: int) -> str:
        """File name or id of image `index`, for messages and predictions."""
        ...


def identify(names: Sequence[str], images: Iterable[tuple[str, tuple[int, int], Objects]]) -> str:
    """The identity of a data set: 12 hex characters.

    Args:
      names: class names.
      images: for each image its name relative to the split, its (height, width), its objects.
    """
    # A file name that is not UTF-8 has surrogates in it, which plain UTF-8 refuses.
    digest = hashlib.sha256("\0".join(names).encode("utf-8", "surrogatepass"))
    for name, (height, width), objects in images:
        told = f"\0{name}\0{height}x{width}\0{len(objects)}\0"
        digest.update(told.encode("utf-8", "surrogatepass"))
        digest.update(np.ascontiguousarray(objects.boxes, "<f4").tobytes())
        digest.update(np.ascontiguousarray(objects.classes, "<i4").tobytes())
    return digest.hexdigest()[:12]


def refuse_faults(where: str, faults: Sequence[tuple[str, str]]) -> None:
    """Raises DataError for files that cannot be used, (file, what is wrong), if there are any."""
    if not faults:
        return
    shown = [f"{problem}: {file}" for file, problem in faults[:_SHOWN]]
    more = f"\n  and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    raise DataError(
        f"{where}: {len(faults)} files cannot be used:\n  " + "\n  ".join(shown) + more
        + "\nReplace them, or set data.on_error=skip to leave them out.",
        file=faults[0][0],
    )  # fmt: skip


def require_objects(source: Any) -> None:
    """Raises DataError where a training set has no object: it would teach to find nothing."""
    if not source.report.objects:
        told = "\n".join(source.report.lines())
        raise DataError(
            f"{told}\nThere is no object in the training set, so nothing to learn. Look at what "
            "was left out, at the paths of the labels and at their classes."
        )


def normalised_objects(
    rows: NDArray[np.float64],
    size: tuple[int, int],
    report: Report,
    file: str,
    lines: Sequence[int | None],
    count_clipped: bool = True,
) -> Objects:
    """Turns checked label rows into objects, and counts the rows it leaves out.

    Left out: duplicates of an earlier row, boxes without area, boxes wholly outside the image.
    Clipped, and counted too: boxes that reach beyond it by a pixel or more.

    Args:
      rows: (n, 5) class, centre x, centre y, width, height; as parts of the image's size.
      size: (height, width) of the image in pixels.
      report: takes the counts.
      file: label file or image, for the report.
      lines: for each row its line in `file`, or None.
      count_clipped: False if the caller has counted.
    """
    height, width = size
    seen: set[tuple[float, ...]] = set()
    boxes, classes, kept = [], [], []
    for row, line in zip(rows.tolist(), lines, strict=True):
        label, x, y, w, h = row
        if tuple(row) in seen:
            report.skip("duplicate label", file, line)
            continue
        seen.add(tuple(row))
        if w <= 0 or h <= 0:
            report.skip("box without area", file, line)
            continue
        left, right, top, bottom = x - w / 2, x + w / 2, y - h / 2, y + h / 2
        if right <= 0 or bottom <= 0 or left >= 1 or top >= 1:
            report.skip("box outside the image", file, line)
            continue
        beyond = min(left * width, top * height, (1 - right) * width, (1 - bottom) * height)
        if count_clipped and beyond <= -1:  # less than a pixel is the rounding of who wrote it
            report.skip(CLIPPED, file, line)
        left, right = max(left, 0.0) * width, min(right, 1.0) * width
        top, bottom = max(top, 0.0) * height, min(bottom, 1.0) * height
        boxes.append((left, top, right, bottom))
        classes.append(label)
        kept.append(line)
    found = np.array(boxes, np.float32).reshape(-1, 4)
    solid = (found[:, 2:] > found[:, :2]).all(axis=1)  # in the numbers that are learned from
    for i in np.flatnonzero(~solid):
        report.skip("box without area", file, kept[i])
    return Objects(found[solid], np.array(classes, np.int32).reshape(-1)[solid])
