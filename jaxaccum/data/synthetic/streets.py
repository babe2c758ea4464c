"""The embedded data set with 3D boxes: small rendered streets, nothing to download.

A scene is a straight road seen from a car: lanes, pavements, buildings, trees, perhaps a side road
and a crossing, with cars, vans, trucks, pedestrians and cyclists on the ground. Everything is
placed in metres in the camera's frame and projected by the scene's own camera, so labels are exact.
Pixel coordinates are continuous: pixel i covers [i, i + 1).
"""

from __future__ import annotations

import functools
import hashlib
import random
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from jaxaccum.data.base import DataError, Image
from jaxaccum.data.formats.kitti import NAMES, KittiReport, Objects3D, objects_of
from jaxaccum.data.synthetic.painting import Plan, paint
from jaxaccum.data.synthetic.street_planner import Planner
from jaxaccum.data.synthetic.street_view import Floats
from jaxaccum.metrics import kitti as labels3d  # a module: it imports this package, too

COUNTS = {"train": 1024, "val": 128}
SIZE = (192, 640)
KITTI_WIDTH = 1242
_VERSION = 1  # of the drawing; part of the identity


class StreetsSource:
    """The embedded streets of one split. Implements `Source3D`.

    The classes are KITTI's, those that no street has included, so a model fits both.
    """

    names = NAMES

    def __init__(
        self,
        split: str,
        *,
        count: int | None = None,
        size: tuple[int, int] = SIZE,
        seed: int = 0,
    ) -> None:
        """Describes the scenes; draws nothing yet.

        Args:
          split: "train" or "val"; they share no scene.
          count: number of scenes; None for 1024 in train and 128 in val.
          size: (height, width) of the images in pixels.
          seed: another seed gives other scenes.

        Raises:
          DataError: an argument is out of range.
        """
        if split not in COUNTS:
            raise DataError(f"embedded streets: split is {split!r}, expected 'train' or 'val'.")
        if min(size) < 32:
            raise DataError(
                f"embedded streets: size is {size}, expected (height, width) of at least 32 pixels."
            )
        count = COUNTS[split] if count is None else count
        if count < 1:
            raise DataError(f"embedded streets: count is {count}, expected at least 1.")
        self._split, self._count, self._size, self._seed = split, count, size, seed
        self._known: dict[int, tuple[labels3d.Labels, Objects3D, Floats]] = {}
        described = f"streets {_VERSION} {split} {count} {size[0]}x{size[1]} {seed}"
        self.identity = hashlib.sha256(described.encode()).hexdigest()[:12]

    @property
    def pixels(self) -> float:
        """Pixels of KITTI's images, whose metric has heights in them, to one of these."""
        return KITTI_WIDTH / self._size[1]

    @functools.cached_property
    def report(self) -> KittiReport:
        """The objects of all scenes, counted once on a machine: some milliseconds a scene."""
        report = KittiReport(f"embedded streets ({self._split})")

        def count() -> None:
            report.count(self.objects(i) for i in range(len(self)))
            report.regions = sum(
                self.labels(i).kinds.count(labels3d.DONT_CARE) for i in range(len(self))
            )

        report.count_once("streets", self.identity, count)
        return report

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        """`street_SPLIT_NUMBER`."""
        return f"street_{self._split}_{self._checked(index):05d}"

    def image(self, index: int) -> Image:
        """(H, W, 3) uint8 RGB."""
        return paint(self._planned(index))

    def objects(self, index: int) -> Objects3D:
        """The labelled objects of scene `index`; what is too far to learn from is left out."""
        return self._facts(index)[1]

    def labels(self, index: int) -> labels3d.Labels:
        """All labels of scene `index`; boxes are the extents of what is drawn, in the image.

        Truncation is the part of that extent outside the image; occlusion is 0, 1 or 2 where more
        than 90 %, more than 55 % or less shows of what is in the image.
        """
        return self._facts(index)[0]

    def camera(self, index: int) -> Floats:
        """(3, 4) float32, the projection of scene `index`."""
        return self._facts(index)[2]

    def _facts(self, index: int) -> tuple[labels3d.Labels, Objects3D, Floats]:
        if index not in self._known:
            self._planned(index)
        return self._known[index]

    def _planned(self, index: int) -> Plan:
        """Plans a scene, and remembers its labels."""
        key = f"streets/{self._seed}/{self._split}/{self._checked(index)}"
        planner = Planner(random.Random(key), self._size)
        plan, labels = planner.plan()
        if index not in self._known:
            ignored = KittiReport("")  # all labels are well formed
            objects = objects_of(labels, self._size, ignored, "", [None] * len(labels))
            self._known[index] = labels, objects, planner.view.camera.astype(np.float32)
        return plan

    def _checked(self, index: int) -> int:
        if not 0 <= index < self._count:
            raise IndexError(f"street {index} of {self._count}")
        return int(index)


def write(
    root: str | Path,
    *,
    train: int = 64,
    val: int = 16,
    size: tuple[int, int] = SIZE,
    seed: int = 0,
) -> Path:
    """Writes embedded streets as a KITTI folder: png images, labels, calibrations, lists.

    Args:
      root: the folder to make; what is there already is not overwritten.
      train: scenes in the train list.
      val: scenes in the val list.
      size: (height, width) of the images in pixels.
      seed: which scenes.

    Returns:
      The root.

    Raises:
      DataError: the folder has a training or ImageSets folder, or an argument is out of range.
    """
    root = Path(root)
    sources = {
        "train": StreetsSource("train", count=train, size=size, seed=seed),
        "val": StreetsSource("val", count=val, size=size, seed=seed),
    }
    for name in ("training", "ImageSets"):
        if (root / name).exists():
            raise DataError(
                f"{root / name}: there is such a folder already. Name a new one to write to.",
                file=str(root / name),
            )
    folders = {name: root / "training" / name for name in ("image_2", "label_2", "calib")}
    for folder in (*folders.values(), root / "ImageSets"):
        folder.mkdir(parents=True)
    first = 0
    for split, source in sources.items():
        frames = [f"{first + i:06d}" for i in range(len(source))]
        for i, frame in enumerate(frames):
            cv2.imwrite(str(folders["image_2"] / f"{frame}.png"), source.image(i)[..., ::-1])
            text = labels3d.format(source.labels(i))
            (folders["label_2"] / f"{frame}.txt").write_text(text, encoding="utf-8")
            (folders["calib"] / f"{frame}.txt").write_text(
                _calibration(source.camera(i)), encoding="utf-8"
            )
        listing = "".join(f"{frame}\n" for frame in frames)
        (root / "ImageSets" / f"{split}.txt").write_text(listing, encoding="utf-8")
        first += len(source)
    return root


def _calibration(camera: Floats) -> str:
    """A calibration file: all four cameras are the one, a laser scanner sits in its place."""
    lasers = np.array([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0]], np.float64)
    rows: dict[str, NDArray[np.floating]] = {f"P{i}": camera for i in range(4)}
    rows |= {"R0_rect": np.eye(3), "Tr_velo_to_cam": lasers, "Tr_imu_to_velo": np.eye(3, 4)}
    return "".join(
        f"{key}: {' '.join(f'{v:.12e}' for v in np.ravel(value))}\n" for key, value in rows.items()
    )
