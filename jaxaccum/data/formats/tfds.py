"""TensorFlow Datasets as a source, read at random without TensorFlow."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxaccum.data.base import DataError, Image, Objects, Report, identify, normalised_objects
from jaxaccum.data.images import Unreadable, decode_upright, read_header

# TFDS writes the boxes of these with the origin at the bottom left, against its own BBoxFeature.
_UPSIDE_DOWN = frozenset({"kitti"})


def open_tfds(path: str, split: str) -> TfdsSource:
    """Opens `tfds:NAME[:TRAIN_SPLIT[:VAL_SPLIT]]`.

    Args:
      path: splits may be TFDS slices such as `train[:80%]`. The default splits are "train", and
        "validation" else "test".
      split: "train" or "val".

    Raises:
      DataError: TFDS is missing, the data set is unknown or not prepared, or it holds no boxes.
    """
    return TfdsSource(*find_tfds(path, split))


def find_tfds(path: str, split: str) -> tuple[str, str, Any, Sequence[dict[str, Any]]]:
    """The name, TFDS split, features and records of a path as `open_tfds` takes it."""
    # Colons inside the brackets of a slice do not separate.
    name, *splits = re.split(r":(?![^\[]*\])", path.removeprefix("tfds:"))
    if not name or len(splits) > 2:
        raise DataError(f"{path!r}: expected tfds:NAME[:TRAIN_SPLIT[:VAL_SPLIT]].")
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"{path}: needs the package tensorflow-datasets (no TensorFlow): "
            f"pip install tensorflow-datasets"
        ) from error
    try:
        builder = tfds.builder(name, try_gcs=False)
    except tfds.core.DatasetNotFoundError as error:
        raise DataError(
            f"{path}: TFDS knows no data set {name!r}. See tensorflow.org/datasets for the names."
        ) from error
    chosen = dict(zip(("train", "val"), splits, strict=False)).get(split) or _default_split(
        split, list(builder.info.splits), path
    )
    return name, chosen, builder.info.features, _records(tfds, name, chosen, path)


def _default_split(split: str, known: Sequence[str], path: str) -> str:
    wanted = ["validation", "test"] if split == "val" else [split]
    # A data set that is not prepared does not tell its splits; opening it says what is missing.
    found = [s for s in wanted if s in known] if known else wanted
    if not found:
        raise DataError(
            f"{path}: no split {' or '.join(wanted)} among {list(known)}. Name the splits: "
            f"{path.split(':')[0]}:NAME:TRAIN_SPLIT:VAL_SPLIT, slices such as train[:80%] work."
        )
    return found[0]


def _records(tfds: Any, name: str, split: str, path: str) -> Sequence[dict[str, Any]]:
    def source(decoders: dict[str, Any] | None) -> Any:
        return tfds.data_source(name, split=split, download=False, decoders=decoders)

    try:
        records = source({"image": tfds.decode.SkipDecoding()})
        count = len(records)
    except (NotImplementedError, FileNotFoundError, AssertionError, ValueError, KeyError) as error:
        raise DataError(
            f"{path}: split {split!r} of {name} cannot be read ({error}). Prepare the data set "
            f"once, in the format that is read without TensorFlow:\n  import tensorflow_datasets "
            f"as tfds\n  tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
        ) from error
    if not count:
        raise DataError(f"{path}: split {split!r} of {name} is empty. Choose another.")
    try:
        records[0]
    except (ModuleNotFoundError, ValueError):
        # Prepared data gives encoded images without TensorFlow; TFDS's own mock cannot.
        return source(None)
    return records


class TfdsSource:
    """Images and boxes of a TFDS split. Implements `Source`.

    The features must be an `image` and `objects` with a `bbox` and a class, `label` or `type`.
    """

    def __init__(
        self, name: str, split: str, features: Any, records: Sequence[dict[str, Any]]
    ) -> None:
        where = f"tfds:{name} ({split})"
        self._label, self.names = _classes(features, where)
        self._flip = name.split("/")[0] in _UPSIDE_DOWN
        self.report = Report(where)
        self._records = records
        self._kept: list[tuple[int, str, Objects]] = []
        sizes = []
        for i in range(len(records)):
            record = records[i]
            title = _title(record, f"{split}[{i}]")
            try:
                size = _size(record["image"])
            except Unreadable as problem:
                self.report.skip(str(problem), title)
                continue
            self._kept.append((i, title, self._read(record, size, title)))
            sizes.append(size)
        if not self._kept:
            raise DataError("\n".join([f"{where}: no usable image.", *self.report.lines()[1:]]))
        self._sizes = sizes
        self.report.count(objects for _, _, objects in self._kept)
        self.identity = identify(
            self.names,
            ((t, size, o) for (_, t, o), size in zip(self._kept, sizes, strict=True)),
        )

    def _read(self, record: dict[str, Any], size: tuple[int, int], title: str) -> Objects:
        """The objects of a record; counts what it leaves out."""
        rows = self._rows(record["objects"], title)
        known = (rows[:, 0] >= 0) & (rows[:, 0] < len(self.names))
        finite = np.isfinite(rows).all(axis=1)
        for _ in range(int((~known).sum())):
            self.report.skip("class that has no name", title)
        for _ in range(int((known & ~finite).sum())):
            self.report.skip("box that is not finite", title)
        rows = rows[known & finite]
        return normalised_objects(rows, size, self.report, title, [None] * len(rows))

    def _rows(self, objects: dict[str, Any], title: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        boxes = np.asarray(objects["bbox"], np.float64).reshape(-1, 4)
        classes = np.asarray(objects[self._label], np.float64).reshape(-1)
        paired = min(len(boxes), len(classes))
        for _ in range(max(len(boxes), len(classes)) - paired):
            self.report.skip("box without a class or class without a box", title)
        boxes, classes = boxes[:paired], classes[:paired]
        crowd = np.asarray(objects.get("is_crowd", np.zeros(paired, bool)), bool)
        for _ in range(int(crowd.sum())):
            self.report.skip("crowd box", title)
        y1, x1, y2, x2 = boxes[~crowd].T
        if self._flip:
            y1, y2 = 1 - y2, 1 - y1
        return np.stack([classes[~crowd], (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], axis=1)

    def __len__(self) -> int:
        return len(self._kept)

    def image(self, index: int) -> Image:
        """(H, W, 3) uint8 RGB; DataError if its bytes are damaged."""
        at, title, _ = self._kept[index]
        pixels = self._records[at]["image"]
        if isinstance(pixels, bytes):
            return decode_upright(pixels, f"{self.report.where} {title}")
        grey = pixels.shape[2] == 1
        return np.ascontiguousarray(np.repeat(pixels, 3, axis=2) if grey else pixels[..., :3])

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of image `index` in pixels, upright."""
        return self._sizes[index]

    def objects(self, index: int) -> Objects:
        """The labelled objects of image `index`."""
        return self._kept[index][2]

    def name(self, index: int) -> str:
        """The image's file name where TFDS has one, else `split[number]`."""
        return self._kept[index][1]


def _size(image: bytes | Image) -> tuple[int, int]:
    if isinstance(image, bytes):
        return read_header(io.BytesIO(image)).size
    height, width = image.shape[:2]
    return height, width


def _title(record: dict[str, Any], default: str) -> str:
    for key in ("image/filename", "image/file_name", "image/id"):
        if key in record:
            value = record[key]
            return (
                value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)
            )
    return default


def _classes(features: Any, where: str) -> tuple[str, tuple[str, ...]]:
    """Finds the feature that holds an object's class: its key, and the class names."""
    inner = getattr(features["objects"], "feature", {}) if "objects" in features else {}
    label = next((key for key in ("label", "type") if key in inner), None)
    if "image" not in features or "bbox" not in inner or label is None:
        raise DataError(
            f"{where}: expected the features `image` and `objects` with `bbox` and `label` or "
            f"`type`, found {', '.join(features)} and, in objects, {', '.join(inner) or 'nothing'}."
            f" Choose a detection data set."
        )
    names = getattr(inner[label], "names", None)
    if not names:
        raise DataError(
            f"{where}: `objects/{label}` has no class names. Give the feature its names "
            f"(tfds.features.ClassLabel)."
        )
    kind = getattr(inner["bbox"], "bbox_format", None)
    if getattr(kind, "value", kind) != "REL_YXYX":
        raise DataError(
            f"{where}: the boxes have the format {kind}, expected relative ymin, xmin, ymax, xmax."
        )
    return label, tuple(str(name) for name in names)
