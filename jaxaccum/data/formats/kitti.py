"""KITTI's object detection: images with 3D boxes and cameras, from its folders or from TFDS.

Camera frame: x right, y down, z forward, metres. A box has its location at its bottom centre,
dimensions (height, width, length) and a yaw (KITTI's rotation_y): 0 faces +x, -pi/2 away from the
camera. Pixel coordinates are those of the files; label boxes and P2 share them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from jaxaccum.data.base import DataError, Objects, Report, Source, refuse_faults
from jaxaccum.data.formats.kitti_files import (
    PICTURES,
    TEXTS,
    frame_file,
    frames_folder,
    identity_of,
    listed,
    sample,
)
from jaxaccum.data.formats.kitti_files import read_calibration as read_calibration
from jaxaccum.data.formats.kitti_files import write_split as write_split
from jaxaccum.data.formats.tfds import TfdsSource, find_tfds
from jaxaccum.data.images import Damaged, FileSource, Header, Record, Unreadable, read_header
from jaxaccum.data.texts import lines as lines_of
from jaxaccum.data.texts import read_text, shown, shown_path
from jaxaccum.metrics import kitti as labels3d  # a module: it imports this package, too

Floats = NDArray[np.float32]

NAMES = ("Car", "Truck", "Pedestrian", "Cyclist", "Misc", "Van", "Tram", "Person_sitting")
_ALIKE = {name.lower(): name for name in (*NAMES, labels3d.DONT_CARE)}
_MERGED = {"Van": "Car", "Tram": "Truck", "Person_sitting": "Pedestrian"}
_MANY = 8  # boxes that do not all lie in the first pixel by chance
_COLUMNS = ("truncated", "occluded", "alpha", "dimensions", "location", "rotation_y")  # of TFDS

# P2 of the recording day that most of KITTI is from; its images are 1242 x 375.
DEFAULT_CAMERA = np.array(
    [[721.5377, 0, 609.5593, 44.85728], [0, 721.5377, 172.854, 0.2163791], [0, 0, 1, 0.002745884]],
    np.float32,
)
DEFAULT_CAMERA.flags.writeable = False
_DEFAULT_SIZE = (375, 1242)


@dataclass(frozen=True, eq=False)
class Objects3D(Objects):
    """The labelled objects of one image, with their boxes in space.

    Attributes:
      boxes: (n, 4) float32, xyxy in pixels of the original image, inside it.
      classes: (n,) int32, class ids.
      locations: (n, 3) float32, bottom centres x, y, z in the camera's frame, metres.
      dimensions: (n, 3) float32, height, width, length in metres, positive.
      yaw: (n,) float32, rotation about y in radians.
    """

    locations: Floats
    dimensions: Floats
    yaw: Floats


class Source3D(Source, Protocol):
    """A data set of one split with 3D boxes, read by index."""

    @property
    def pixels(self) -> float:
        """Pixels of KITTI's images, whose metric has heights in them, to one of these."""
        ...

    def objects(self, index: int) -> Objects3D:
        """The labelled objects of image `index`; DontCare regions are left out."""
        ...

    def labels(self, index: int) -> labels3d.Labels:
        """All labels of image `index` as KITTI has them, DontCare and difficulty included."""
        ...

    def camera(self, index: int) -> Floats:
        """(3, 4) float32, the projection of image `index`: (u, v, 1) ~ camera @ (x, y, z, 1)."""
        ...


@dataclass
class KittiReport(Report):
    """What a source of images with 3D boxes holds and what it left out.

    Attributes:
      regions: DontCare regions, which are no objects.
      note: something to know of its lists or cameras, or "".
    """

    regions: int = 0
    note: str = ""

    def summary(self) -> str:
        """What was kept, in one line."""
        return f"{super().summary()}, {self.regions} DontCare regions"

    def lines(self, examples: int = 3) -> list[str]:
        """A summary for people."""
        return [*super().lines(examples), *([f"  {self.note}"] if self.note else [])]


def open_kitti(
    path: str,
    split: str,
    *,
    merge: bool = False,
    fraction: float = 1.0,
    seed: int = 0,
    on_error: str = "raise",
) -> KittiSource | TfdsKittiSource:
    """Opens one split of KITTI.

    Args:
      path: the root folder, or `tfds:kitti[:TRAIN_SPLIT[:VAL_SPLIT]]`.
      split: "train" or "val", or another list of ImageSets.
      merge: as `class_id` takes it.
      fraction: as `KittiSource` takes it; a split of TFDS is cut by a slice instead.
      seed: of the choice of frames.
      on_error: as `KittiSource` takes it.

    Raises:
      DataError: the data cannot be used as given; says where and what to do.
    """
    if not path.startswith("tfds:"):
        return KittiSource(
            path, split, merge=merge, fraction=fraction, seed=seed, on_error=on_error
        )
    if fraction != 1:
        raise DataError(
            f"{path}: fraction is {fraction}, which is for KITTI's folders. Name a slice instead, "
            f"such as tfds:kitti:train[:10%]:validation[:10%]."
        )
    return TfdsKittiSource(path, split, merge=merge)


def class_id(kind: str, *, merge: bool) -> int | None:
    """The class of a KITTI type, an index of `NAMES`, or None if it has none.

    Args:
      kind: the type as in a label file.
      merge: takes Van for Car, Tram for Truck, Person_sitting for Pedestrian, and unknown types
        for Misc, as YOLOv12-3D does; else each type is its own class.
    """
    if kind == labels3d.DONT_CARE:
        return None
    if merge:
        kind = _MERGED.get(kind, kind if kind in NAMES else "Misc")
    return NAMES.index(kind) if kind in NAMES else None


def objects_of(
    labels: labels3d.Labels,
    size: tuple[int, int],
    report: Report,
    file: str,
    lines: Sequence[int | None],
    *,
    merge: bool = False,
) -> Objects3D:
    """The objects among labels, with their boxes clipped to the image; counts what it leaves out.

    Left out: DontCare regions (not counted), unknown types, duplicates, boxes without area or
    outside the image, boxes in space without volume, objects that are not before the camera.
    Boxes that reach beyond the image by a pixel and more are counted, too, and types taken for Misc
    that are a type of KITTI's in other cases.

    Args:
      labels: of one image.
      size: (height, width) of the image in pixels.
      report: takes the counts.
      file: label file or image, for the report.
      lines: for each label its line in `file`, or None.
      merge: as `class_id` takes it.
    """
    height, width = size
    boxes = np.clip(labels.boxes, 0, np.array([width, height, width, height], np.float32))
    seen: set[tuple[Any, ...]] = set()
    rows, classes = [], []
    for i, (kind, line) in enumerate(zip(labels.kinds, lines, strict=True)):
        if kind == labels3d.DONT_CARE:
            continue
        label = class_id(kind, merge=merge)
        row = (
            kind, *labels.boxes[i].tolist(), *labels.locations[i].tolist(),
            *labels.dimensions[i].tolist(), float(labels.yaw[i]),
        )  # fmt: skip
        if not np.isfinite(row[1:]).all():
            report.skip("object with a number that is not finite", file, line)
        elif label is None:
            report.skip(f"unknown type {_with_alike(kind)}", file, line)
        elif row in seen:
            report.skip("duplicate label", file, line)
        elif (labels.boxes[i, 2:] <= labels.boxes[i, :2]).any():
            report.skip("box without area", file, line)
        elif (boxes[i, 2:] <= boxes[i, :2]).any():
            report.skip("box outside the image", file, line)
        elif (labels.dimensions[i] <= 0).any():
            report.skip("object without a 3D box", file, line)
        elif labels.locations[i, 2] <= 0:
            report.skip("object that is not before the camera", file, line)
        else:
            if np.abs(boxes[i] - labels.boxes[i]).max() >= 1:
                report.skip("part of a box outside the image, clipped", file, line)
            if kind not in NAMES and kind.lower() in _ALIKE:
                report.skip(f"type taken for Misc: {_with_alike(kind)}", file, line)
            rows.append(i)
            classes.append(label)
        seen.add(row)
    return Objects3D(
        boxes[rows],
        np.array(classes, np.int32),
        labels.locations[rows],
        labels.dimensions[rows],
        labels.yaw[rows],
    )


def _with_alike(kind: str) -> str:
    """An unknown type for a message, with the one that has the same letters in other cases."""
    alike = _ALIKE.get(kind.lower())
    return shown(kind, 40) + (f", did you mean {alike}?" if alike else "")


def _check_split(labels: Sequence[labels3d.Labels], report: Report, *, merge: bool) -> None:
    """Refuses a split of which no type or no box can be KITTI's; says where labels have scores.

    Args:
      labels: of every image.
      report: takes what is to be said.
      merge: as `class_id` takes it.

    Raises:
      DataError: there are objects and none has a type of `NAMES`, or all boxes are parts of an
        image.
    """
    kinds = Counter(k for one in labels for k in one.kinds if k != labels3d.DONT_CARE)
    unknown = not kinds.keys() & set(NAMES)
    if kinds and unknown and not (merge and not any(k.lower() in _ALIKE for k in kinds)):
        told = "; ".join(f"{n} x {_with_alike(kind)}" for kind, n in kinds.most_common(5))
        raise DataError(
            f"{report.where}: none of its objects has a type of KITTI's, as the benchmark spells "
            f"them ({', '.join(NAMES)}): {told}. Rename the types in its label files."
        )
    boxes = np.concatenate([one.boxes for one in labels]) if labels else np.zeros((0, 4))
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)]
    if len(boxes) >= _MANY and boxes.min() >= 0 and boxes.max() <= 1:
        raise DataError(
            f"{report.where}: all of its {len(boxes)} boxes lie between 0 and 1, as parts of an "
            "image; KITTI has left, top, right and bottom in pixels. Multiply them by the width "
            "and the height of the image."
        )
    if scored := sum(one.scores is not None for one in labels):
        report.notes.append(
            f"{scored} label files have 16 columns, with scores, as files of detections have: they "
            "are taken for the truth, and the scores are not used"
        )


class KittiSource(FileSource):
    """One split of KITTI's folders. Implements `Source3D`.

    The root holds `training/image_2/*.png` (or jpg), `training/label_2/*.txt` and
    `training/calib/*.txt`, or the three folders themselves, and `ImageSets/SPLIT.txt`, a list of
    frames such as 000123; the list may lie beside the folder, as the benchmark ships it.
    """

    pixels = 1.0

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        merge: bool = False,
        fraction: float = 1.0,
        seed: int = 0,
        on_error: str = "raise",
    ) -> None:
        """Reads labels and cameras; counts the frames that lack a file.

        Args:
          root: KITTI's folder.
          split: name of a list of ImageSets: train, val, ...
          merge: as `class_id` takes it.
          fraction: part of the listed frames to use: a random sample, in the list's order.
          seed: of that sample.
          on_error: "raise" refuses a label or calibration file with an error in it; "skip" counts
            and drops its frame.

        Raises:
          DataError: naming file, line and fix; or the split's labels as a whole are not KITTI's.
        """
        if not 0 < fraction <= 1:
            raise DataError(f"{root}: fraction is {fraction}, expected more than 0, at most 1.")
        if on_error not in ("raise", "skip"):
            raise DataError(f"on_error is {on_error!r}, expected 'raise' or 'skip'.")
        root = Path(root)
        report = KittiReport(f"{shown_path(root)} ({split})")
        folder = frames_folder(root)
        frames, report.note = listed(root, split, report)
        if fraction < 1:
            part = sample(len(frames), max(round(len(frames) * fraction), 1), seed)
            frames = [frame for frame, one in zip(frames, part, strict=True) if one]
        records: list[Record] = []
        self._labels: list[labels3d.Labels] = []
        self._cameras: list[Floats] = []
        for frame in frames:
            try:
                found = _read_frame(folder, frame, report, merge, on_error)
            except DataError as error:
                if on_error != "skip":
                    raise
                report.skip(
                    "frame with an error in its labels or calibration",
                    shown_path(error.file),
                    error.line,
                )
                continue
            if found is not None:
                record, labels, camera = found
                records.append(record)
                self._labels.append(labels)
                self._cameras.append(camera)
        super().__init__(NAMES, records, report)
        _check_split(self._labels, report, merge=merge)
        report.regions = sum(labels.kinds.count(labels3d.DONT_CARE) for labels in self._labels)
        self._objects = [r.objects for r in records if isinstance(r.objects, Objects3D)]
        self.identity = identity_of(
            NAMES,
            ((r.name, r.header.size, r.objects) for r in records),
            self._labels,
            self._cameras,
        )

    def keep(self, indices: Sequence[int]) -> None:
        """As `FileSource.keep`."""
        super().keep(indices)
        self._labels = [self._labels[i] for i in indices]
        self._cameras = [self._cameras[i] for i in indices]
        self._objects = [self._objects[i] for i in indices]
        assert isinstance(self.report, KittiReport)
        regions = (labels.kinds.count(labels3d.DONT_CARE) for labels in self._labels)
        self.report.regions = sum(regions)
        images = ((r.name, r.header.size, r.objects) for r in self._records)
        self.identity = identity_of(NAMES, images, self._labels, self._cameras)

    def objects(self, index: int) -> Objects3D:
        """The labelled objects of image `index`; DontCare regions are left out."""
        return self._objects[index]

    def labels(self, index: int) -> labels3d.Labels:
        """All labels of image `index` as its file has them."""
        return self._labels[index]

    def camera(self, index: int) -> Floats:
        """(3, 4) float32, P2 of image `index`."""
        return self._cameras[index]


class TfdsKittiSource(TfdsSource):
    """One split of KITTI from TFDS. Implements `Source3D`.

    TFDS has neither calibration nor DontCare regions: every image gets `DEFAULT_CAMERA`.
    """

    pixels = 1.0

    def __init__(self, path: str, split: str, *, merge: bool = False) -> None:
        """Reads the labels.

        Args:
          path: `tfds:kitti[:TRAIN_SPLIT[:VAL_SPLIT]]`.
          split: "train" or "val".
          merge: as `class_id` takes it.

        Raises:
          DataError: it is not prepared, or not KITTI.
        """
        name, chosen, features, records = find_tfds(path, split)
        inner = getattr(features["objects"], "feature", {}) if "objects" in features else {}
        needed = {"type", "bbox", *_COLUMNS}
        if not needed <= set(inner):
            raise DataError(
                f"{path}: the objects of {name} lack {', '.join(sorted(needed - set(inner)))}, "
                f"which 3D boxes need. Use tfds:kitti."
            )
        self._kinds = tuple(inner["type"].names)
        self._merge = merge
        self._labels: list[labels3d.Labels] = []
        self._objects: list[Objects3D] = []
        self._sizes: list[tuple[int, int]] = []
        super().__init__(name, chosen, features, records)
        other = sum(size != _DEFAULT_SIZE for size in self._sizes)
        note = "TFDS has no calibration: KITTI's usual camera is taken for every image"
        if other:
            note += f", which is not quite that of the {other} images that are not 1242 x 375"
        self.report = KittiReport(**vars(self.report), note=note + ".")
        self.names = NAMES
        self.identity = identity_of(
            NAMES,
            zip(map(self.name, range(len(self))), self._sizes, self._objects, strict=True),
            self._labels,
            [DEFAULT_CAMERA] * len(self),
        )

    def _read(self, record: dict[str, Any], size: tuple[int, int], title: str) -> Objects3D:
        found, rows = record["objects"], self._rows(record["objects"], title)
        columns = {key: np.asarray(found[key], np.float32) for key in _COLUMNS}
        count = min(len(rows), *map(len, columns.values()))
        for _ in range(len(rows) - count):
            self.report.skip("object without all its values", title)
        rows = rows[:count]
        columns = {key: column[:count] for key, column in columns.items()}
        height, width = size
        _, x, y, w, h = (rows * [1, width, height, width, height]).T
        labels = labels3d.Labels(
            kinds=tuple(
                self._kinds[int(k)] if 0 <= k < len(self._kinds) else f"class {int(k)}"
                for k in rows[:, 0]
            ),
            truncation=columns["truncated"],
            occlusion=columns["occluded"].astype(np.int32),
            alpha=columns["alpha"],
            boxes=np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1).astype(np.float32),
            dimensions=columns["dimensions"].reshape(-1, 3),
            locations=columns["location"].reshape(-1, 3),
            yaw=columns["rotation_y"],
            scores=None,
        )
        objects = objects_of(labels, size, self.report, title, [None] * count, merge=self._merge)
        self._labels.append(labels)
        self._objects.append(objects)
        self._sizes.append(size)
        return objects

    def objects(self, index: int) -> Objects3D:
        """The labelled objects of image `index`."""
        return self._objects[index]

    def labels(self, index: int) -> labels3d.Labels:
        """All labels of image `index`."""
        return self._labels[index]

    def camera(self, index: int) -> Floats:
        """(3, 4) float32, `DEFAULT_CAMERA`."""
        del index
        return DEFAULT_CAMERA


def _read_frame(
    folder: Path, frame: str, report: Report, merge: bool, on_error: str
) -> tuple[Record, labels3d.Labels, Floats] | None:
    """The image, labels and camera of a frame, or None, counted, if one of them is missing."""
    image = frame_file(folder, "image_2", frame, PICTURES)
    label = frame_file(folder, "label_2", frame, TEXTS)
    calibration = frame_file(folder, "calib", frame, TEXTS)
    for file, reason, usual in (
        (image, "image missing", f"image_2/{frame}.png"),
        (label, "label file missing", f"label_2/{frame}.txt"),
        (calibration, "calibration missing", f"calib/{frame}.txt"),
    ):
        if file is None:
            report.skip(reason, shown_path(folder / usual))
            return None
    assert image and label and calibration
    try:
        header: Header = read_header(image)
    except Unreadable as problem:
        if isinstance(problem, Damaged) and on_error != "skip":
            refuse_faults(report.where, [(shown_path(image), str(problem))])
        report.skip(str(problem), shown_path(image))
        return None
    text = read_text(label)
    labels = labels3d.parse(text, str(label))
    camera = read_calibration(calibration)
    lines = [number for number, line in enumerate(lines_of(text), 1) if line.split()]
    objects = objects_of(labels, header.size, report, shown_path(label), lines, merge=merge)
    return Record(image.name, str(image), header, objects), labels, camera
