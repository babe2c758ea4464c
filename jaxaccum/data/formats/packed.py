"""Packed sets: any source written once as sharded ArrayRecord, read by index by many processes.

A packed set is a TensorFlow Datasets folder, whose records hold an image or a cloud each, and a
folder `jaxaccum` in it: `set.json`, and the labels of each split as SPLIT.npz, so that opening a
set reads no record. `python -m jaxaccum.pack` writes it.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from jaxaccum.data.base import DataError, Image, Objects, Report
from jaxaccum.data.clouds import CloudReport
from jaxaccum.data.formats.cloud_files import Points
from jaxaccum.data.formats.kitti import KittiReport, Objects3D
from jaxaccum.data.images import Unreadable, decode, read_header
from jaxaccum.data.stamps import Stamps, stamp
from jaxaccum.metrics import kitti as labels3d  # a module: it imports this package, too

PREFIX = "packed:"
FORMAT = 1
FOLDER = "jaxaccum"  # inside the set: what TFDS does not hold
SET = "set.json"
# Packages that read and write records, and how to get them.
_PACKAGES = {"tensorflow_datasets": "tensorflow-datasets", "array_record": "array-record"}

OBJECTS = ("boxes", "classes")
OBJECTS_3D = (*OBJECTS, "locations", "dimensions", "yaw")
LABELS_3D = ("truncation", "occlusion", "alpha", "boxes", "dimensions", "locations", "yaw")

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class PackedSet:
    """What the set says of itself.

    Attributes:
      path: as the user gave it, with its prefix.
      folder: where it lies.
      task: that it was packed for.
      splits: of each its identity, class names, samples, report and what its kind adds.
      options: fields of the config that decided what was packed.
      stamps: of its files, all splits together.
    """

    path: str
    folder: Path
    task: str
    splits: dict[str, dict[str, Any]]
    options: dict[str, Any]
    stamps: Stamps

    def split(self, name: str) -> dict[str, Any]:
        """What is known of a split.

        Raises:
          DataError: the set has none of that name.
        """
        if name not in self.splits:
            raise DataError(
                f"{self.path}: no split {name!r} was packed; there are {', '.join(self.splits)}. "
                f"Pack the source again if it has one.",
                file=str(self.folder),
            )
        return self.splits[name]

    def arrays(self, split: str) -> Arrays:
        """The labels of a split."""
        file = self.folder / FOLDER / f"{split}.npz"
        try:
            with np.load(file) as stored:  # checks the checksums of what it reads
                return {name: stored[name] for name in stored.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise _damaged(self.path, f"{file} cannot be read ({error})") from error


def open_set(path: str, task: str) -> PackedSet:
    """Opens `packed:DIR` as far as needed to know what is in it; reads no record.

    Args:
      path: with its prefix.
      task: that its samples must be of.

    Raises:
      DataError: it is not there, broken, of another task, or a package is missing.
    """
    folder = Path(path.removeprefix(PREFIX))
    file = folder / FOLDER / SET
    if not file.is_file():
        raise DataError(
            f"{path}: no packed set; looked for {file}, which is written when all the rest is. "
            f"Check the path, or pack the source: python -m jaxaccum.pack --config=FILE "
            f"--out={folder}",
            file=str(file),
        )
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        if told["format"] != FORMAT:
            raise DataError(
                f"{path}: a packed set of format {told['format']}, this program reads format "
                f"{FORMAT}. Pack the source again.",
                file=str(file),
            )
        files = dict(told["files"])
        stamps = {str(folder / name): stamp(folder / name) for name in files}
        found = PackedSet(path, folder, told["task"], told["splits"], told["options"], stamps)
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, f"{file} is not what was written ({error!r})") from error
    if found.task != task:
        raise DataError(
            f"{path}: packed for the task {found.task}, but the config's task is {task}. Give the "
            f"set that was packed with a config of this task.",
            file=str(file),
        )
    for name, size in files.items():
        part = folder / name
        there = part.stat().st_size if part.is_file() else None
        if there != size:
            state = "is missing" if there is None else f"has {there} bytes"
            raise _damaged(path, f"{part} {state}, {size} bytes were written")
    require_packages(path)
    return found


def require_packages(where: str) -> None:
    """Checks that records can be read and written.

    Raises:
      DataError: a package is not installed.
    """
    for module, package in _PACKAGES.items():
        if find_spec(module) is None:
            raise DataError(
                f"{where}: packed sets need the package {package} (no TensorFlow): pip install "
                f"{package}"
            )


def _damaged(path: str, detail: str) -> DataError:
    return DataError(
        f"{path}: a broken packed set: {detail}. Copy it again, or pack the source again."
    )


class Records:
    """The records of a split by index, without TensorFlow. Safe among threads; pickles by place."""

    def __init__(self, packed: PackedSet, split: str, samples: int) -> None:
        """Opens a split of the TFDS data set.

        Args:
          packed: the set.
          split: as TFDS knows it.
          samples: that it must have.

        Raises:
          DataError: TFDS cannot open it.
        """
        import tensorflow_datasets as tfds

        self._where = f"{packed.path} ({split})"
        try:
            builder = tfds.builder_from_directory(packed.folder)
            decoders = {"image": tfds.decode.SkipDecoding()}
            given = decoders if "image" in builder.info.features else None
            self._records: Any = builder.as_data_source(split=split, decoders=given)
            count = len(self._records)
        except (OSError, ValueError, KeyError, AssertionError, RuntimeError) as error:
            raise _damaged(packed.path, f"TFDS cannot open its split {split} ({error})") from error
        if count != samples:
            raise _damaged(packed.path, f"{count} records in {split}, {samples} were written")

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Record `index`.

        Raises:
          DataError: it cannot be read.
        """
        try:
            return self._records[index]
        except (OSError, ValueError, RuntimeError) as error:
            raise _damaged(self._where, f"record {index} cannot be read ({error})") from error


class PackedImages:
    """Images with boxes of a packed set. Implements `Source`."""

    fields: ClassVar[tuple[str, ...]] = OBJECTS
    report: Report

    def __init__(self, packed: PackedSet, split: str) -> None:
        """Reads the labels.

        Args:
          packed: the set.
          split: "train" or "val".

        Raises:
          DataError: there is no such split, or the set is broken.
        """
        found = packed.split(split)
        self._where = f"{packed.path} ({split})"
        self.stamps = packed.stamps
        self.names = tuple(found["names"])
        self.identity = str(found["identity"])
        self.report = self._report(_report(self._where, found["report"]))
        self._arrays = packed.arrays(split)
        self._titles = strings(self._arrays.pop("titles"))
        self._starts = _starts(self._arrays["counts"])
        self._records = Records(packed, split, len(self))

    def _report(self, told: dict[str, Any]) -> Report:
        return Report(**told)

    def __len__(self) -> int:
        return len(self._titles)

    def image(self, index: int) -> Image:
        """(H, W, 3) uint8 RGB; DataError if its record is damaged."""
        data = self._records[index]["image"]
        return decode(
            data, f"{self._where} {self.name(index)}", int(self._arrays["orientations"][index])
        )

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of image `index`, upright; DataError if its record is damaged."""
        try:
            header = read_header(io.BytesIO(self._records[index]["image"]))
        except Unreadable as problem:
            raise DataError(f"{self._where} {self.name(index)}: {problem}") from problem
        turned = (header.orientation >= 5) != (int(self._arrays["orientations"][index]) >= 5)
        height, width = header.size
        return (width, height) if turned else (height, width)

    def objects(self, index: int) -> Objects:
        """The labelled objects of image `index`."""
        return Objects(*self._rows(index))

    def _rows(self, index: int) -> list[NDArray[Any]]:
        rows = slice(self._starts[index], self._starts[index + 1])
        return [self._arrays[name][rows] for name in self.fields]

    def name(self, index: int) -> str:
        """The name that the source gave image `index`."""
        return self._titles[index]


class PackedImages3D(PackedImages):
    """Images with boxes in space of a packed set. Implements `Source3D`."""

    fields = OBJECTS_3D
    report: KittiReport

    def __init__(self, packed: PackedSet, split: str) -> None:
        """As `PackedImages`."""
        super().__init__(packed, split)
        self.pixels = float(packed.split(split)["pixels"])
        self._kinds = strings(self._arrays.pop("kinds"))
        self._label_starts = _starts(self._arrays["label_counts"])

    def _report(self, told: dict[str, Any]) -> KittiReport:
        return KittiReport(**told)

    def objects(self, index: int) -> Objects3D:
        """The labelled objects of image `index`; DontCare regions are left out."""
        return Objects3D(*self._rows(index))

    def labels(self, index: int) -> labels3d.Labels:
        """All labels of image `index` as the source has them."""
        rows = slice(self._label_starts[index], self._label_starts[index + 1])
        columns: dict[str, Any] = {n: self._arrays[f"label_{n}"][rows] for n in LABELS_3D}
        return labels3d.Labels(tuple(self._kinds[rows]), **columns, scores=None)

    def camera(self, index: int) -> NDArray[np.float32]:
        """(3, 4) float32, the projection of image `index`."""
        return np.asarray(self._arrays["cameras"][index])


class PackedClouds:
    """Shapes of a packed set. Implements `Complete` of `cloud_sources`, and `Paired` if `paired`.

    Attributes:
      paired: the set has partial clouds of its own.
      viewpoints: from how many directions evaluation crops a shape if nobody says.
    """

    def __init__(self, packed: PackedSet, split: str) -> None:
        """Reads what is known of the shapes.

        Args:
          packed: the set.
          split: a split of `open_clouds`.

        Raises:
          DataError: there is no such split, or the set is broken.
        """
        found = packed.split(split)
        self.stamps = packed.stamps
        self.names = tuple(found["names"])
        self.identity = str(found["identity"])
        self.report = CloudReport(**_report(f"{packed.path} ({split})", found["report"]))
        self.points = int(found["points"])
        self.paired = bool(found["paired"])
        self.viewpoints = int(found["viewpoints"])
        arrays = packed.arrays(split)
        self._titles, self._captions = strings(arrays["titles"]), strings(arrays["captions"])
        self._categories = arrays["categories"]
        self._starts = _starts(arrays["views"])
        self._records = Records(packed, split, len(self))
        self._partials = None
        if self.paired:
            self._partials = Records(packed, partials(split), int(self._starts[-1]))

    def __len__(self) -> int:
        return len(self._titles)

    def category(self, index: int) -> int:
        """The category of shape `index`."""
        return int(self._categories[index])

    def name(self, index: int) -> str:
        """The name that the source gave shape `index`."""
        return self._titles[index]

    def caption(self, index: int) -> str | None:
        """What the source itself says of shape `index`, if it does."""
        return self._captions[index] if self._captions else None

    def complete(self, index: int) -> Points:
        """(points, 3) float32."""
        return np.asarray(self._records[index]["cloud"])

    def views(self, index: int) -> int:
        """Partial clouds of shape `index`."""
        return int(self._starts[index + 1] - self._starts[index])

    def partial(self, index: int, view: int) -> Points:
        """(n, 3) float32, partial cloud `view` of shape `index`."""
        assert self._partials is not None
        return np.asarray(self._partials[int(self._starts[index]) + view]["cloud"])


def open_packed(path: str, split: str) -> PackedImages:
    """One split of a packed set for detection.

    Raises:
      DataError: it cannot be used; says why and what to do.
    """
    return PackedImages(open_set(path, "detection"), split)


def open_packed3d(
    path: str, split: str, *, merge: bool, fraction: float, seed: int
) -> PackedImages3D:
    """One split of a packed set for 3D detection.

    Args:
      path: with its prefix.
      split: the list of ImageSets that was packed as "train" or "val".
      merge, fraction, seed: as `open_kitti` takes them: what was packed must have been read alike.

    Raises:
      DataError: it cannot be used; says why and what to do.
    """
    packed = open_set(path, "detection3d")
    if packed.options["merge"] != merge:
        raise DataError(
            f"{path}: packed with compat={packed.options['merge']}, but the config has "
            f"compat={merge}, which merges KITTI's types into other classes. Pack the source again "
            f"with this config."
        )
    sample = (fraction, seed if fraction < 1 else 0)
    for name, found in packed.splits.items():
        if (found["list"], tuple(found["sample"])) == (split, sample):
            return PackedImages3D(packed, name)
    there = ", ".join(f"{s['list']} ({_share(*s['sample'])})" for s in packed.splits.values())
    raise DataError(
        f"{path}: the list {split} ({_share(*sample)}) was not packed; there are {there}. Give "
        f"data.val_split, data.val_fraction and seed as they were, or pack the source again."
    )


def _share(fraction: float, seed: int) -> str:
    return "all of it" if fraction == 1 else f"{fraction:g} of it by seed {seed}"


def as_array(words: Sequence[str]) -> NDArray[np.uint8]:
    """Strings as an array of bytes, to lie beside others; `strings` is the way back."""
    return np.frombuffer(json.dumps(list(words)).encode(), np.uint8)


def strings(array: NDArray[np.uint8]) -> list[str]:
    """What `as_array` was given."""
    return list[str](json.loads(array.tobytes()))


def partials(split: str) -> str:
    """The TFDS split with the partial clouds of a split."""
    return f"{split}_partials"


def _starts(counts: NDArray[Any]) -> NDArray[np.int64]:
    """(n + 1,) first rows of n samples with these numbers of rows, and the end."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _report(where: str, told: dict[str, Any]) -> dict[str, Any]:
    """The fields of a report as they were, but for saying where the set is and was."""
    skipped = {
        reason: [(file, line) for file, line in places]
        for reason, places in told["skipped"].items()
    }
    return told | {"where": f"{where}, packed from {told['where']}", "skipped": skipped}
