"""The embedded data set with 3D boxes: small rendered streets, nothing to download.

A scene is a straight road seen from a car: lanes, pavements, buildings, trees, perhaps a side road
and a crossing, with cars, vans, trucks, pedestrians and cyclists on the ground. Everything is
placed in metres in the camera's frame and projected by the scene's own camera, so labels are exact.
Pixel coordinates are continuous: pixel i covers [i, i + 1).
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from jaxaccum.data.base import DataError, Image
from jaxaccum.data.kitti import NAMES, KittiReport, Objects3D, objects_of
from jaxaccum.data.pictograms import MOODS, Colour, Part, ellipse, mix, shade, stroke
from jaxaccum.data.scenes import Item, Plan, paint, visible
from jaxaccum.metrics import kitti as labels3d  # a module: it imports this package, too

Floats = NDArray[np.float32]
Points = NDArray[np.float64]  # (k, 3) or (k, 2)

COUNTS = {"train": 1024, "val": 128}
SIZE = (192, 640)
KITTI_WIDTH = 1242
_VERSION = 1  # of the drawing; part of the identity
_MOST = 18  # objects in a scene
_FAR = 120.0  # metres; streets end there
_NEAREST = 2.2  # metres in front of the camera that stay free
_LEAST_VISIBLE = 0.12  # of an object's pixels in view; one that shows less is not in the scene
_MOST_TRUNCATED = 0.8
_SMALLEST = 0.05  # of the image's height; what is less high is a DontCare region
_VISIBLE = (0.9, 0.55)  # above: occlusion 0 and 1

# Mean and deviation of height, width, length in metres, about KITTI's.
_SIZES = {
    "Car": ((1.53, 1.65, 3.95), (0.09, 0.07, 0.32)),
    "Van": ((2.15, 1.90, 4.95), (0.15, 0.09, 0.35)),
    "Truck": ((3.20, 2.50, 8.60), (0.25, 0.10, 1.20)),
    "Pedestrian": ((1.74, 0.64, 0.82), (0.10, 0.07, 0.12)),
    "Cyclist": ((1.73, 0.60, 1.76), (0.07, 0.06, 0.08)),
}
_GLASS: Colour = (62, 78, 96)
_TYRE: Colour = (34, 34, 38)
# fmt: off
_PAINTS: Sequence[Colour] = (
    (196, 40, 44), (226, 226, 228), (40, 44, 52), (150, 156, 164), (38, 84, 156), (24, 110, 92),
    (232, 186, 60), (110, 60, 84), (206, 118, 52), (92, 132, 178),
)
_CLOTHES: Sequence[Colour] = (
    (206, 60, 60), (56, 92, 170), (240, 236, 228), (60, 132, 92), (230, 168, 60), (118, 70, 140),
    (70, 76, 88), (226, 120, 150),
)
_TROUSERS: Sequence[Colour] = ((48, 58, 88), (60, 56, 54), (128, 110, 84), (36, 38, 44))
_SKINS: Sequence[Colour] = ((236, 196, 164), (198, 146, 108), (134, 92, 66))
_HAIRS: Sequence[Colour] = ((52, 38, 30), (30, 28, 28), (168, 122, 66), (150, 148, 146))
_WALLS: Sequence[Colour] = (
    (214, 196, 166), (186, 122, 98), (206, 206, 204), (170, 150, 130), (226, 206, 150),
    (154, 170, 182), (198, 160, 150),
)
_ROOFS: Sequence[Colour] = ((150, 70, 56), (96, 84, 84), (112, 62, 50), (84, 92, 104))
# fmt: on


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
        planner = _Planner(random.Random(key), self._size)
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


@dataclass(frozen=True)
class _View:
    """A camera `height` metres above the ground, level, looking along z."""

    camera: Points
    height: float
    size: tuple[int, int]

    def pixels(self, points: Points) -> Points:
        """(k, 2) pixels of (k, 3) points in front of the camera."""
        seen = points @ self.camera[:, :3].T + self.camera[:, 3]
        return np.asarray(seen[:, :2] / seen[:, 2:])

    def ground(self, *xz: float) -> Floats:
        """Pixels of points on the ground, given as x, z, x, z, ..."""
        flat = np.array(xz, np.float64).reshape(-1, 2)
        points = np.stack([flat[:, 0], np.full(len(flat), self.height), flat[:, 1]], axis=1)
        return self.pixels(points).astype(np.float32)

    @property
    def focal(self) -> float:
        return float(self.camera[0, 0])


@dataclass(frozen=True)
class _Thing:
    """Something that stands on the ground.

    Attributes:
      kind: KITTI type, or "" for what carries no label.
      x, z: where its centre stands.
      yaw: its direction, as KITTI's rotation_y.
      size: height, width, length.
    """

    kind: str
    x: float
    z: float
    yaw: float
    size: tuple[float, float, float]

    @functools.cached_property
    def footprint(self) -> Points:
        """(4, 2) corners x, z on the ground."""
        _, width, length = self.size
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        a, b = length / 2, width / 2
        local = ((a, b), (a, -b), (-a, -b), (-a, b))
        return np.array(
            [(self.x + cos * p + sin * q, self.z - sin * p + cos * q) for p, q in local]
        )

    @functools.cached_property
    def axes(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Unit vectors (x, z) along and across it."""
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        return (cos, -sin), (sin, cos)


def _span(thing: _Thing, axis: tuple[float, float]) -> tuple[float, float]:
    """Where the footprint of a thing begins and ends along an axis."""
    (p, q), (along, across) = axis, thing.axes
    middle = thing.x * p + thing.z * q
    reach = 0.5 * (
        thing.size[2] * abs(along[0] * p + along[1] * q)
        + thing.size[1] * abs(across[0] * p + across[1] * q)
    )
    return middle - reach, middle + reach


def _apart(a: _Thing, b: _Thing, margin: float) -> bool:
    """Whether a line parallel to a side of one keeps two footprints `margin` apart."""
    if math.hypot(a.x - b.x, a.z - b.z) > 0.5 * (sum(a.size[1:]) + sum(b.size[1:])) + margin:
        return True
    for axis in (*a.axes, *b.axes):
        (low, high), (other_low, other_high) = _span(a, axis), _span(b, axis)
        if low > other_high + margin or other_low > high + margin:
            return True
    return False


def _hides(a: _Thing, b: _Thing) -> bool:
    """Whether `a` may be in front of `b`: a line between them has only `a` on the camera's side."""
    for axis in (*a.axes, *b.axes):
        (low, high), (other_low, other_high) = _span(a, axis), _span(b, axis)
        # The camera is at the origin, at 0 on every axis.
        if high < other_low > 0 or low > other_high < 0:
            return True
    return False


def _back_to_front(things: Sequence[_Thing]) -> list[int]:
    """The order to paint in: nothing comes after what it may be hidden by."""
    near = [float(np.hypot(*thing.footprint.T).min()) for thing in things]
    spans = [_bearings(thing) for thing in things]
    # Only what overlaps as seen from the camera has an order.
    behind = [
        {
            j
            for j in range(len(things))
            if j != i
            and spans[i][0] < spans[j][1]
            and spans[j][0] < spans[i][1]
            and _hides(things[i], things[j])
            and not (_hides(things[j], things[i]) and near[i] > near[j])
        }
        for i in range(len(things))
    ]
    left = sorted(range(len(things)), key=lambda i: -near[i])
    order: list[int] = []
    while left:
        free = next((i for i in left if behind[i].isdisjoint(left)), left[0])
        left.remove(free)
        order.append(free)
    return order


def _bearings(thing: _Thing) -> tuple[float, float]:
    """The least and greatest x / z of a footprint."""
    slopes = thing.footprint[:, 0] / np.maximum(thing.footprint[:, 1], 0.1)
    return float(slopes.min()), float(slopes.max())


class _Planner:
    """Draws the random choices of one scene."""

    def __init__(self, r: random.Random, size: tuple[int, int]) -> None:
        self.r = r
        height, width = size
        focal = width * r.uniform(0.52, 0.64)
        cx, cy = width * r.uniform(0.47, 0.53), height * r.uniform(0.42, 0.5)
        lens = np.array([[focal, 0, cx], [0, focal, cy], [0, 0, 1]])
        # The reference point of the frame lies a little beside the lens, as KITTI's does.
        beside = np.array([[r.uniform(0.04, 0.07)], [r.uniform(-0.002, 0.002)], [0.003]])
        self.view = _View(np.hstack([lens, lens @ beside]), r.uniform(1.5, 1.85), size)
        self.mood = r.choice([mood for mood in MOODS if mood.kind != "snow"])
        self.light = 0.55 if self.mood.dark else 1.0
        sun = np.array([r.uniform(-1, 1), -r.uniform(0.7, 1.4), r.uniform(-1, 0.4)])
        self.sun = sun / np.linalg.norm(sun)
        self.haze = self.mood.bottom
        self.horizon = cy
        self.things: list[_Thing] = []
        self.back: list[Item] = []

    def plan(self) -> tuple[Plan, labels3d.Labels]:
        r, (height, width) = self.r, self.view.size
        self._street()
        self._sky()
        self._ground()
        self._buildings()
        self._traffic()
        self._people()
        self._parking()
        order = _back_to_front(self.things)
        self.things = [self.things[i] for i in order]
        items = [Item(0 if t.kind else -1, self._draw(t), 0.0) for t in self.things]
        plan = Plan(
            size=(height, width),
            rows=self._rows(),
            items=[],
            contrast=r.uniform(0.85, 1.12),
            brightness=r.uniform(-10, 10),
            tint=(r.uniform(0.95, 1.05), 1.0, r.uniform(0.95, 1.05)),
            noise=r.choice((0.03, 0.06, 0.1)),
            offset=(r.randrange(64), r.randrange(64)),
            blur=r.choice((0.0, 0.0, 0.0, 0.5)),
        )
        return plan, self._labelled(plan, items)

    def _labelled(self, plan: Plan, items: Sequence[Item]) -> labels3d.Labels:
        """Takes out what shows too little, completes the plan, and labels the rest."""
        height, width = self.view.size
        kept, boxes = [], []
        for k, item in enumerate(items):
            if item.label < 0:
                kept.append(k)
                boxes.append((np.zeros(4), 0.0))
                continue
            points = np.concatenate([part.points for part in item.parts if part.outline])
            whole = np.concatenate([points.min(axis=0), points.max(axis=0)]).astype(np.float64)
            box = np.clip(whole, 0, [width, height, width, height])
            area = (whole[2] - whole[0]) * (whole[3] - whole[1])
            truncation = 1 - (box[2] - box[0]) * (box[3] - box[1]) / area
            if truncation < _MOST_TRUNCATED and min(box[2:] - box[:2]) > 2:
                kept.append(k)
                boxes.append((box, truncation))
        while True:
            shadows = Item(-1, [part for k in kept for part in self._shadow(self.things[k])], 0.0)
            plan.items = [*self.back, shadows, *(items[k] for k in kept)]
            shown = {k - len(self.back) - 1: share for k, share, _ in visible(plan)}
            hidden = {i for i, share in shown.items() if share < _LEAST_VISIBLE}
            if not hidden:
                break
            kept = [k for i, k in enumerate(kept) if i not in hidden]
            boxes = [box for i, box in enumerate(boxes) if i not in hidden]
        labelled = [(self.things[kept[i]], *boxes[i], share) for i, share in shown.items()]
        labelled.sort(key=lambda row: row[0].z)
        return _labels(labelled, self.view)

    # --- the street ---

    def _street(self) -> None:
        """Where its parts lie, in metres from the camera."""
        r = self.r
        self.lane = r.uniform(3.1, 3.6)
        ours, theirs = r.choice(((1, 1), (1, 1), (2, 1), (2, 2), (1, 0)))
        mine = r.randrange(ours)
        # Lane centres with the direction of traffic; we drive on the right, lane 0 is rightmost.
        right = self.lane * (mine + 0.5) + r.uniform(-0.3, 0.3)
        self.lanes = [(right - self.lane * (i + 0.5), 1) for i in range(ours)]
        self.lanes += [(right - self.lane * (ours + i + 0.5), -1) for i in range(theirs)]
        left = right - self.lane * (ours + theirs)
        self.middle = right - self.lane * ours if theirs else None
        self.marked = (left, right)
        self.parking = [r.choice(("", "along", "along", "across", "askew")) for _ in range(2)]
        depth = {"": 0.0, "along": 2.3, "across": 5.0, "askew": 4.6}
        self.road = (left - depth[self.parking[0]], right + depth[self.parking[1]])
        self.walk = (r.uniform(2.2, 4.0), r.uniform(2.2, 4.0))
        self.kerbs = (self.road[0] - self.walk[0], self.road[1] + self.walk[1])
        self.side = r.uniform(18, 45) if r.random() < 0.45 else None
        self.side_width = r.uniform(6.0, 7.5)
        self.crossing = r.uniform(9, 24) if r.random() < 0.35 else None

    def _on_side_road(self, z: float, margin: float) -> bool:
        return self.side is not None and abs(z - self.side) < self.side_width / 2 + margin

    def _rows(self) -> Floats:
        mood, (height, _) = self.mood, self.view.size
        stops: Sequence[tuple[float, Colour]] = (
            (0, mood.top),
            (self.horizon, mood.bottom),
            (self.horizon + 0.5, mix(mood.ground, self.haze, 0.6)),
            (self.horizon + 0.12 * height, mood.ground),
            (height, shade(mood.ground, 0.86)),
        )
        at, rows = np.arange(height) + 0.5, [y for y, _ in stops]
        channels = [np.interp(at, rows, [c[k] for _, c in stops]) for k in range(3)]
        return np.stack(channels, axis=1).astype(np.float32)

    def _add(self, *parts: tuple[NDArray[np.floating], Colour]) -> None:
        self.back.append(Item(-1, [Part(p.astype(np.float32), c) for p, c in parts], 0.0))

    def _sky(self) -> None:
        r, (height, width) = self.r, self.view.size
        for _ in range(r.choice((0, 1, 2, 3))):
            x, y = r.uniform(0, width), r.uniform(0.05, 0.6) * self.horizon
            scale = r.uniform(0.05, 0.1) * height
            white = mix((90, 98, 128) if self.mood.dark else (252, 252, 252), self.haze, 0.3)
            for dx in np.linspace(-1.6, 1.6, r.randint(3, 5)):
                puff = r.uniform(0.5, 1.0) * scale
                self._add((ellipse(x + dx * scale, y, puff * 1.2, puff * 0.6), white))
        turn = np.linspace(0, 2 * np.pi, 33)
        a, b, p = r.uniform(1, 3), r.uniform(4, 9), r.uniform(0, 6)
        tall = 0.06 + 0.02 * np.sin(a * turn + p) + 0.008 * np.sin(b * turn)
        ridge = np.stack([turn * width / (2 * np.pi), self.horizon - height * tall], axis=1)
        low = [[width, self.horizon + 1], [0, self.horizon + 1]]
        self._add((np.concatenate([ridge, low]), mix(self.mood.hill, self.haze, 0.45)))

    def _ground(self) -> None:
        r, ground = self.r, self.view.ground
        near, far = 2.0, _FAR
        dark = self.mood.dark
        asphalt = shade((104, 104, 108), r.uniform(0.85, 1.2) * (0.6 if dark else 1))
        pavement = shade((168, 162, 154), r.uniform(0.85, 1.1) * (0.55 if dark else 1))
        white = shade((232, 230, 222), 0.7 if dark else 1.0)
        (left, right), (kerb_left, kerb_right) = self.road, self.kerbs
        if self.side is not None:
            a, b = self.side - self.side_width / 2, self.side + self.side_width / 2
            grey = mix(asphalt, self.haze, 0.12)
            self._add((ground(-90, a, 90, a, 90, b, -90, b), grey))
        pieces = [(near, far)] if self.side is None else [(near, a), (b, far)]
        for start, end in pieces:
            strip = ground(kerb_left, start, kerb_right, start, kerb_right, end, kerb_left, end)
            self._add((strip, pavement))
            for x in (left - 0.12, right):
                kerb = ground(x, start, x + 0.12, start, x + 0.12, end, x, end)
                self._add((kerb, shade(pavement, 1.15)))
        self._add((ground(left, near, right, near, right, far, left, far), asphalt))
        if right - left > 1.1 * (self.marked[1] - self.marked[0]):
            for edge, line in ((left, self.marked[0]), (self.marked[1], right)):
                parking = ground(edge, near, line, near, line, far, edge, far)
                self._add((parking, shade(asphalt, 0.9)))
        for x in self.marked:
            self._line(x, near, 70, white)
        for x in (x - self.lane / 2 for x, _ in self.lanes[:-1]):
            if self.middle is not None and abs(x - self.middle) < 0.1 and r.random() < 0.4:
                self._line(x, near, 70, white)
                continue
            phase = r.uniform(0, 9)
            for k in range(9):
                self._line(x, near + phase + 9 * k - 6, near + phase + 9 * k - 3, white)
        if self.crossing is not None:
            z = self.crossing
            for x in np.arange(self.marked[0] + 0.4, self.marked[1] - 0.5, 1.0):
                stripe = ground(x, z, x + 0.5, z, x + 0.5, z + 3, x, z + 3)
                self._add((stripe, white))

    def _line(self, x: float, start: float, end: float, colour: Colour) -> None:
        start = max(start, 2.0)
        if end > start:
            a, b = x - 0.07, x + 0.07
            points = self.view.ground(a, start, b, start, b, end, a, end)
            self._add((points, mix(colour, self.haze, min(start / 150, 0.5))))

    def _buildings(self) -> None:
        r = self.r
        built = r.choice((0.3, 0.75, 0.95, 0.95))
        for side, kerb in ((-1, self.kerbs[0]), (1, self.kerbs[1])):
            rows = []
            z = r.uniform(-4, 4)
            while z < _FAR - 20:
                length = r.uniform(8, 18)
                a, b = max(z, 2.5), z + length
                free = not self._on_side_road((a + b) / 2, (b - a) / 2 + 1.5)
                if b > 4 and free and r.random() < built:
                    rows.append((a, b, kerb + side * r.uniform(0.3, 3.5)))
                z += length + r.choice((0, 0, r.uniform(1, 5)))
            for a, b, x in reversed(rows):
                self._building(side, x, a, b)

    def _building(self, side: int, x: float, a: float, b: float) -> None:
        r, view = self.r, self.view
        house = r.random() < 0.45
        storeys = r.randint(1, 2) if house else r.randint(3, 6)
        storey = r.uniform(2.7, 3.2)
        top, depth = -storeys * storey, r.uniform(8, 11)
        wall = shade(r.choice(_WALLS), r.uniform(0.9, 1.06))
        far = mix(wall, self.haze, min(a / 140, 0.6))
        lit = self._lit(far, np.array([-side, 0.0, 0.0]))
        front = self._lit(far, np.array([0.0, 0.0, -1.0]))
        h, back = view.height, x + side * depth

        def face(*xyz: float) -> Points:
            points = np.array(xyz, np.float64).reshape(-1, 3) + np.array([0, h, 0])
            return view.pixels(points)

        parts = [
            (face(x, 0, a, x, 0, b, x, top, b, x, top, a), lit),
            (face(x, 0, a, back, 0, a, back, top, a, x, top, a), front),
        ]
        if house:
            rise = r.uniform(2, 3.2)
            ridge, peak = x + side * depth / 2, top - rise
            tiles = mix(shade(r.choice(_ROOFS), self.light), self.haze, min(a / 140, 0.6))
            eaves = x - side * 0.3
            parts.append(
                (face(eaves, top, a, eaves, top, b, ridge, peak, b, ridge, peak, a), tiles)
            )
            parts.append((face(x, top, a, back, top, a, ridge, peak, a), front))
        glass: Colour = (250, 214, 130) if self.mood.dark and r.random() < 0.6 else (92, 108, 124)
        pane = mix(glass, self.haze, min(a / 140, 0.6))
        if a < 60:
            sills = [-(k + 0.35) * storey for k in range(storeys)]
            along = np.arange(a + 1.2, b - 1.8, r.uniform(2.2, 3.4))
            across = side * np.arange(1.2, depth - 1.8, 2.8)
            beside = [(x, y, z, 0.0, 1.1) for y in sills for z in along.tolist()]
            ahead = [(x + d, y, a, side * 1.1, 0.0) for y in sills for d in across.tolist()]
            for rows, light in ((beside, 1.0), (ahead, 0.92)):
                parts += [(window, shade(pane, light)) for window in self._windows(rows)]
        self._add(*parts)

    def _windows(self, rows: Sequence[Sequence[float]]) -> list[Points]:
        """Those in view of windows given as x, up, z of a corner and their width along x and z."""
        if not rows:
            return []
        table = np.array(rows)
        corner = table[:, None, :3] + np.array([0, self.view.height, 0])
        wide = np.insert(table[:, 3:], 1, 0, axis=1)[:, None] * [[[0], [1], [1], [0]]]
        tall = np.array([0, -1.4, 0]) * [[[0], [0], [1], [1]]]
        flat = self.view.pixels((corner + wide + tall).reshape(-1, 3)).reshape(-1, 4, 2)
        (low, high), (height, width) = (flat.min(axis=1), flat.max(axis=1)), self.view.size
        seen = (high > 0).all(axis=1) & (low[:, 0] < width) & (low[:, 1] < height)
        return list(flat[seen])

    # --- what stands on it ---

    def _try(self, kind: str, x: float, z: float, yaw: float) -> None:
        """Puts something in place, if it is in view and nothing is in the way."""
        if sum(bool(thing.kind) for thing in self.things) >= _MOST:
            return
        mean, spread = _SIZES[kind]
        size = tuple(m + s * self.r.gauss(0, 1) for m, s in zip(mean, spread, strict=True))
        # No size is more than 2.5 deviations from its mean.
        height, width, length = (
            min(max(v, m - 2.5 * s), m + 2.5 * s)
            for v, m, s in zip(size, mean, spread, strict=True)
        )
        thing = _Thing(kind, x, z, _wrapped(yaw), (height, width, length))
        if self._free(thing, 0.3):
            self.things.append(thing)

    def _free(self, thing: _Thing, margin: float) -> bool:
        if thing.footprint[:, 1].min() < _NEAREST:
            return False
        u = self.view.pixels(np.array([[thing.x, 0.0, thing.z]]))[0, 0]
        width = self.view.size[1]
        if not -0.25 * width < u < 1.25 * width:
            return False
        return all(_apart(thing, other, margin) for other in self.things)

    def _vehicle(self) -> str:
        return self.r.choices(("Car", "Van", "Truck"), (0.8, 0.13, 0.07))[0]

    def _traffic(self) -> None:
        r = self.r
        busy = r.uniform(0.15, 0.75)
        if self.side is not None and r.random() < 0.75:
            for way in (-1, 1):
                for _ in range(r.randint(0, 2)):
                    z = self.side + way * self.side_width / 4
                    yaw = (0 if way > 0 else math.pi) + r.gauss(0, 0.05)
                    self._try(self._vehicle(), r.uniform(-0.5, 0.5) * z, z, yaw)
        for x, way in self.lanes:
            z = r.uniform(5, 16)
            while z < 95:
                if r.random() < busy and not (way > 0 and abs(x) < 1 and z < 7):
                    yaw = -way * math.pi / 2 + r.gauss(0, 0.04)
                    if self._on_side_road(z, -1) and r.random() < 0.5:
                        yaw += r.uniform(-1.2, 1.2)  # turning
                    self._try(self._vehicle(), x + r.gauss(0, 0.2), z, yaw)
                z += r.uniform(7, 20)

    def _parking(self) -> None:
        for mode, edge, line, out in (
            (self.parking[0], self.road[0], self.marked[0], -1),
            (self.parking[1], self.marked[1], self.road[1], 1),
        ):
            self._parked(mode, (edge + line) / 2, out)

    def _parked(self, mode: str, x: float, out: int) -> None:
        if not mode:
            return
        r = self.r
        step = {"along": 6.2, "across": 2.7, "askew": 3.4}[mode]
        full = r.uniform(0.25, 0.85)
        z = r.uniform(2, 6)
        while z < 45:
            if r.random() < full and not self._on_side_road(z, 3):
                turned = math.pi if r.random() < 0.3 else 0.0
                base = {
                    "along": -out * math.pi / 2,
                    "across": 0.0 if out > 0 else math.pi,
                    "askew": (0.0 if out > 0 else math.pi) - out * 0.8,
                }[mode]
                kind = "Car" if mode != "along" else r.choices(("Car", "Van"), (0.85, 0.15))[0]
                self._try(kind, x + r.gauss(0, 0.1), z, base + turned + r.gauss(0, 0.04))
            z += step + abs(r.gauss(0, 0.3))

    def _people(self) -> None:
        r = self.r
        walks = ((self.kerbs[0], self.road[0]), (self.road[1], self.kerbs[1]))
        for low, high in walks:
            for z in np.arange(r.uniform(4, 14), 60, r.uniform(11, 20)):
                # Trees and lamps, which carry no label.
                x = (high - 0.5) if low < 0 else (low + 0.5)
                tall = r.uniform(4, 7)
                plant = _Thing("", x, float(z), 0.0, (tall, 0.35, 0.35))
                wanted = r.random() < 0.45 and not self._on_side_road(float(z), 1)
                if wanted and self._free(plant, 0.15):
                    self.things.append(plant)
        if self.crossing is not None:
            for _ in range(r.randint(0, 3)):
                x = r.uniform(self.marked[0] + 0.5, self.marked[1] - 0.5)
                yaw = r.choice((0, math.pi)) + r.gauss(0, 0.2)
                self._try("Pedestrian", x, self.crossing + r.uniform(0.5, 2.5), yaw)
        for _ in range(min(int(r.expovariate(0.2)), 10)):
            low, high = r.choice(walks)
            z = math.exp(r.uniform(math.log(4.5), math.log(45)))
            yaw = r.uniform(-math.pi, math.pi)
            if r.random() < 0.7:
                yaw = r.choice((-1, 1)) * math.pi / 2 + r.gauss(0, 0.15)
            self._try("Pedestrian", r.uniform(low + 0.4, high - 0.4), z, yaw)
        for _ in range(r.choice((0, 1, 1, 2, 3))):
            x, way = r.choice((self.lanes[0], self.lanes[-1]))
            x += (1 if x > 0 else -1) * (self.lane / 2 - 0.7)
            z = math.exp(r.uniform(math.log(5), math.log(45)))
            yaw = -way * math.pi / 2 + r.gauss(0, 0.12)
            if self._on_side_road(z, -1):
                yaw += r.choice((0, 1)) * math.pi / 2
            self._try("Cyclist", x, z, yaw)

    # --- drawing ---

    def _lit(self, colour: Colour, normal: Points) -> Colour:
        """A colour under the sun; `normal` (3,) is of the surface."""
        return shade(colour, self.light * (0.66 + 0.42 * max(float(normal @ self.sun), 0.0)))

    def _far(self, colour: Colour, thing: _Thing) -> Colour:
        return mix(colour, self.haze, 1 - math.exp(-thing.z / 160))

    def _shadow(self, thing: _Thing) -> list[Part]:
        if not thing.kind:
            return []
        centre = np.array([thing.x, thing.z])
        flat = centre + (thing.footprint - centre) * 1.08
        if thing.kind in ("Pedestrian", "Cyclist"):
            (along, across), (_, width, length) = np.array(thing.axes), thing.size
            turned = _ROUND @ [[length / 2, 0], [0, width / 2], [0, 0]]
            flat = centre + turned @ np.stack([along, across])
        if flat[:, 1].min() < 1.5:
            return []
        ground = self.view.ground(*flat.ravel())
        return [Part(ground, shade((62, 62, 66), 0.6 if self.mood.dark else 1.0))]

    def _draw(self, thing: _Thing) -> list[Part]:
        draw: dict[str, Callable[[_Thing], list[Part]]] = {
            "Car": self._car,
            "Van": self._van,
            "Truck": self._truck,
            "Pedestrian": self._pedestrian,
            "Cyclist": self._cyclist,
            "": self._tree,
        }
        return draw[thing.kind](thing)

    def _placed(self, thing: _Thing, local: Points) -> Points:
        """Points (k, 3) given as forward, up, left of a thing, in the camera's frame."""
        cos, sin = math.cos(thing.yaw), math.sin(thing.yaw)
        forward, up, side = local.T
        return np.stack(
            [
                thing.x + cos * forward + sin * side,
                self.view.height - up,
                thing.z - sin * forward + cos * side,
            ],
            axis=1,
        )

    def _solids(self, thing: _Thing, solids: Sequence[Sequence[_Face]]) -> list[Part]:
        """The visible faces of convex solids, which are given from back to front."""
        faces = [face for solid in solids for face in solid]
        polygons = [points for face in faces for points in (face.points, *(d for d, _ in face.on))]
        ends = np.cumsum([len(p) for p in polygons])
        world = self._placed(thing, np.concatenate(polygons))
        flat = self.view.pixels(world).astype(np.float32)
        starts = [0, *ends[:-1].tolist()]
        parts = []
        at = 0  # the polygon that we are at
        for solid in solids:
            # The two sides come first and hold every corner once.
            corners = len(solid[0].points)
            middle = world[starts[at] : starts[at] + corners].mean(axis=0)
            second_side = starts[at + 1 + len(solid[0].on)]
            middle = (middle + world[second_side : second_side + corners].mean(axis=0)) / 2
            for face in solid:
                first, second, third = world[starts[at] : starts[at] + 3]
                normal = _cross(second - first, third - first)
                if normal @ (first - middle) < 0:
                    normal = -normal
                if normal @ first < 0:  # it looks towards the camera
                    normal = normal / math.sqrt(float(normal @ normal))
                    colours = [face.colour, *(colour for _, colour in face.on)]
                    for k, colour in enumerate(colours, at):
                        seen = self._far(self._lit(colour, normal), thing)
                        # Of what is painted on a face, only tyres stick out of it.
                        outline = k == at or colour is _TYRE
                        parts.append(Part(flat[starts[k] : ends[k]], seen, outline))
                at += 1 + len(face.on)
        return parts

    def _car(self, thing: _Thing) -> list[Part]:
        height, width, length = thing.size
        a, b, h = length / 2, width / 2, height
        paint_ = self.r.choice(_PAINTS)
        body = _prism(
            [
                (-a, 0.17 * h), (a, 0.17 * h), (a, 0.46 * h),
                (0.4 * a, 0.6 * h), (-0.8 * a, 0.6 * h), (-a, 0.56 * h),
            ],
            [b] * 6, paint_,
        )  # fmt: skip
        _lights(body, a, b, 0.17 * h, 0.46 * h, 0.56 * h)
        _wheels(body, a * 0.6, b, 0.2 * h)
        cabin = _prism(
            [(0.45 * a, 0.58 * h), (0.08 * a, h), (-0.58 * a, h), (-0.88 * a, 0.58 * h)],
            [b * 0.95, b * 0.78, b * 0.78, b * 0.95], paint_,
        )  # fmt: skip
        for face, inset in ((cabin[2], 0.1), (cabin[4], 0.16)):
            face.on.append((_inset(face.points, inset), _GLASS))
        for side in cabin[:2]:
            low, front, back, end = side.points  # along the profile
            pillar = low * 0.48 + end * 0.52, front * 0.5 + back * 0.5
            for window in ((low, front, pillar[1], pillar[0]), (pillar[0], pillar[1], back, end)):
                side.on.append((_inset(np.array(window), 0.14), _GLASS))
        tyres = _tyres((-a * 0.6, a * 0.6), b, 0.2 * h, 0.17 * h)
        return self._solids(thing, [*tyres, body, cabin])

    def _van(self, thing: _Thing) -> list[Part]:
        height, width, length = thing.size
        a, b, h = length / 2, width / 2, height
        body = _prism(
            [(-a, 0.13 * h), (a, 0.13 * h), (a, 0.46 * h), (0.62 * a, h), (-a, h)],
            [b, b, b, 0.9 * b, 0.9 * b], self.r.choice(_PAINTS),
        )  # fmt: skip
        _lights(body, a, b, 0.13 * h, 0.4 * h, 0.5 * h)
        _wheels(body, a * 0.62, b, 0.15 * h)
        body[4].on.append((_inset(body[4].points, 0.1), _GLASS))
        rear = np.array([(-a, 0.62 * h, -0.7 * b), (-a, 0.62 * h, 0.7 * b),
                         (-a, 0.9 * h, 0.6 * b), (-a, 0.9 * h, -0.6 * b)])  # fmt: skip
        body[-1].on.append((rear, _GLASS))
        for side, sign in ((body[0], 1), (body[1], -1)):
            low, high = sign * b * 0.97, sign * b * 0.92
            for start, end in ((0.45, 0.8), (-0.1, 0.38)):
                window = [(end * a, 0.58 * h, low), (start * a, 0.58 * h, low),
                          (start * a, 0.9 * h, high), (end * a * 0.82, 0.9 * h, high)]  # fmt: skip
                side.on.append((np.array(window), _GLASS))
        tyres = _tyres((-a * 0.62, a * 0.62), b, 0.15 * h, 0.13 * h)
        return self._solids(thing, [*tyres, body])

    def _truck(self, thing: _Thing) -> list[Part]:
        height, width, length = thing.size
        a, b, h = length / 2, width / 2, height
        split = a - 2.1
        box = _prism(
            [(-a, 0.25 * h), (split, 0.25 * h), (split, h), (-a, h)], [b] * 4,
            self.r.choice(((232, 232, 228), (214, 208, 190), (70, 110, 160), (176, 70, 60))),
        )  # fmt: skip
        cab = _prism(
            [(split + 0.1, 0.12 * h), (a, 0.12 * h), (a, 0.42 * h), (a - 0.2, 0.8 * h),
             (split + 0.1, 0.8 * h)],
            [b * 0.98] * 5, self.r.choice(_PAINTS),
        )  # fmt: skip
        _lights(cab, a, b * 0.98, 0.12 * h, 0.3 * h, None)
        _lights(box, a, b, 0.25 * h, None, 0.4 * h)
        cab[4].on.append((_inset(cab[4].points, 0.1), _GLASS))
        wheel = 0.16 * h
        for side, sign in ((0, 1), (1, -1)):
            for solid, x in ((box, -0.72 * a), (box, -0.45 * a), (cab, a - 1.1)):
                solid[side].on.extend(_wheel(x, wheel, sign * b))
            window = [(a - 0.45, 0.45 * h), (split + 0.5, 0.45 * h), (split + 0.5, 0.72 * h),
                      (a - 0.6, 0.72 * h)]  # fmt: skip
            cab[side].on.append((np.array([(x, y, sign * b) for x, y in window]), _GLASS))
        # What is on the camera's side of the plane between the two is in front.
        (forward, _) = thing.axes
        ahead = -(thing.x * forward[0] + thing.z * forward[1]) > split
        tyres = _tyres((-0.72 * a, -0.45 * a), b, wheel, 0.25 * h)
        tyres += _tyres((a - 1.1,), b, wheel, 0.12 * h)
        return self._solids(thing, [*tyres, *((box, cab) if ahead else (cab, box))])

    def _limbs(self, thing: _Thing, limbs: Sequence[_Limb]) -> list[Part]:
        """Round limbs, the far ones first."""
        ends = self._placed(thing, np.array([end for limb in limbs for end in limb[:2]]))
        flat = self.view.pixels(ends)
        depth = ends[:, 2]
        drawn = []
        for k, (_, _, start, end, colour) in enumerate(limbs):
            i, j = 2 * k, 2 * k + 1
            outline = _capsule(
                flat[i], flat[j],
                max(start * self.view.focal / depth[i], 0.45),
                max(end * self.view.focal / depth[j], 0.45),
            )  # fmt: skip
            seen = self._far(shade(colour, self.light * 0.97), thing)
            drawn.append((float(depth[i] + depth[j]), Part(outline, seen)))
        drawn.sort(key=lambda one: -one[0])
        return [part for _, part in drawn]

    def _pedestrian(self, thing: _Thing) -> list[Part]:
        r, (h, w, length) = self.r, thing.size
        shirt, legs, shoe = r.choice(_CLOTHES), r.choice(_TROUSERS), (40, 36, 34)
        skin, hair = r.choice(_SKINS), r.choice(_HAIRS)
        step, wide = length / 2 - 0.05 * h, w / 2 - 0.03 * h
        swing = r.choice((-1, 1))
        foot = 0.03 * h
        limbs: list[_Limb] = [
            ((0, 0.54 * h, 0), (0, 0.76 * h, 0), 0.085 * h, 0.1 * h, shirt),
            ((-0.018 * h, h - 0.078 * h, 0),) * 2 + (0.075 * h, 0.075 * h, hair),
            ((0.025 * h, h - 0.092 * h, 0),) * 2 + (0.064 * h, 0.064 * h, skin),
        ]
        for sign in (-1, 1):
            hip = (0, 0.5 * h, sign * 0.055 * h)
            ankle = (sign * swing * step * 0.8, 0.06 * h, sign * 0.06 * h)
            toe = (min(ankle[0] + 0.06 * h, step), foot, ankle[2])
            shoulder = (0, 0.78 * h, sign * wide * 0.8)
            hand = (-sign * swing * step * 0.6, 0.47 * h, sign * wide)
            elbow = (-0.03 * h, 0.62 * h, sign * wide)
            limbs += [
                (hip, ankle, 0.058 * h, 0.036 * h, legs),
                ((ankle[0], foot, ankle[2]), toe, foot, foot, shoe),
                (shoulder, elbow, 0.038 * h, 0.03 * h, shade(shirt, 0.9)),
                (elbow, hand, 0.03 * h, 0.026 * h, skin if r.random() < 0.5 else shirt),
            ]
        return self._limbs(thing, limbs)

    def _cyclist(self, thing: _Thing) -> list[Part]:
        r, (h, w, length) = self.r, thing.size
        frame, shirt, legs = r.choice(_PAINTS), r.choice(_CLOTHES), r.choice(_TROUSERS)
        skin, cap = r.choice(_SKINS), r.choice((*_HAIRS, *_CLOTHES))
        wheel, wide = 0.34, w / 2 - 0.04
        hub = length / 2 - wheel
        turn = np.linspace(0, 2 * np.pi, 17)
        parts = []
        for x in sorted(
            (-hub, hub), key=lambda x: -self._placed(thing, np.array([[x, 0, 0]]))[0, 2]
        ):
            tyre = wheel - 0.02
            rim = np.stack([x + tyre * np.cos(turn), wheel + tyre * np.sin(turn), 0 * turn], 1)
            flat = self.view.pixels(self._placed(thing, rim)).astype(np.float32)
            thick = max(0.05 * self.view.focal / thing.z, 0.9)
            parts.append(Part(stroke(flat, thick), self._far(shade(_TYRE, self.light), thing)))
        seat, crank, head, grip = (-0.18, 0.92, 0), (0.0, 0.3, 0), (0.42, 0.9, 0), (0.4, 1.02, 0)
        thin = 0.022
        limbs: list[_Limb] = [
            ((-hub, wheel, 0), seat, thin, thin, frame),
            ((-hub, wheel, 0), crank, thin, thin, frame),
            (seat, crank, thin, thin, frame),
            (crank, head, thin, thin, frame),
            (seat, head, thin, thin, frame),
            ((hub, wheel, 0), grip, thin, thin, frame),
            ((0.4, 1.02, -wide), (0.4, 1.02, wide), thin, thin, _TYRE),
            ((-0.18, 0.97, 0), (0.16, h - 0.36, 0), 0.13, 0.15, shirt),
            ((0.24, h - 0.125, 0),) * 2 + (0.125, 0.125, cap),
            ((0.3, h - 0.16, 0),) * 2 + (0.105, 0.105, skin),
        ]
        for sign, pedal in ((-1, 0.17), (1, -0.13)):
            knee, foot = (
                (0.2 - pedal * 0.3, 0.68 + pedal, sign * 0.1),
                (pedal * 0.4, 0.3 + pedal, sign * 0.1),
            )
            limbs += [
                ((-0.15, 0.92, sign * 0.08), knee, 0.085, 0.06, legs),
                (knee, foot, 0.06, 0.04, legs),
                ((0.14, h - 0.36, sign * wide * 0.7), (0.4, 1.04, sign * wide * 0.85), 0.055, 0.04,
                 shade(shirt, 0.9)),
            ]  # fmt: skip
        return parts + self._limbs(thing, limbs)

    def _tree(self, thing: _Thing) -> list[Part]:
        r, tall = self.r, thing.size[0]
        lamp = tall > 5.8
        bark: Colour = (96, 100, 104) if lamp else (104, 78, 58)
        trunk = self._limbs(thing, [((0, 0, 0), (0, tall, 0), 0.07 if lamp else 0.14, 0.05, bark)])
        if lamp:
            arm = -1.2 if thing.x > 0 else 1.2
            glow: Colour = (255, 236, 170) if self.mood.dark else (210, 210, 204)
            return trunk + self._limbs(
                thing,
                [
                    ((0, tall, 0), (arm, tall, 0), 0.05, 0.05, bark),
                    ((arm * 0.8, tall - 0.05, 0), (arm, tall - 0.05, 0), 0.11, 0.11, glow),
                ],
            )
        leaf: Colour = (196, 128, 60) if self.mood.kind == "autumn" else (84, 128, 70)
        leaf = shade(leaf, r.uniform(0.8, 1.15))
        crown: list[_Limb] = []
        for k in range(6):
            up, out = tall * r.uniform(0.62, 0.98), r.uniform(-0.9, 0.9)
            at: _Triple = (out, up, r.uniform(-0.6, 0.6))
            puff = r.uniform(0.5, 0.85)
            crown.append((at, at, puff, puff, shade(leaf, 0.82 + 0.06 * k)))
        return trunk + self._limbs(thing, crown)


_Triple = tuple[float, float, float]
# Two ends as forward, up, left; the radius at each; a colour.
_Limb = tuple[_Triple, _Triple, float, float, Colour]


@dataclass
class _Face:
    """A flat face of a solid, (k, 3) forward, up, left, with what is painted on it."""

    points: Points
    colour: Colour
    on: list[tuple[Points, Colour]]


def _prism(
    profile: Sequence[tuple[float, float]], halves: Sequence[float], colour: Colour
) -> list[_Face]:
    """A convex solid: left and right side, then one face from each corner to the next.

    Args:
      profile: corners of the side as (forward, up).
      halves: half the width at each of them.
      colour: of all faces.
    """
    left = np.array([(x, y, half) for (x, y), half in zip(profile, halves, strict=True)])
    right = left * (1, 1, -1)
    faces = [left, right]
    for i in range(len(profile)):
        j = (i + 1) % len(profile)
        faces.append(np.stack([left[i], left[j], right[j], right[i]]))
    return [_Face(points, colour, []) for points in faces]


def _inset(quad: Points, part: float) -> Points:
    """A face drawn in towards its middle."""
    return np.asarray(quad + (quad.mean(axis=0) - quad) * 2 * part)


def _lights(
    solid: list[_Face], a: float, b: float, low: float, front: float | None, rear: float | None
) -> None:
    """Paints grille, lamps and plates on the faces at +-a, where a height is given."""

    def quad(x: float, y1: float, y2: float, z1: float, z2: float) -> Points:
        return np.array([(x, y1, z1), (x, y1, z2), (x, y2, z2), (x, y2, z1)])

    for x, high in ((a, front), (-a, rear)):
        if high is None:
            continue
        face = next(f for f in solid[2:] if bool((np.abs(f.points[:, 0] - x) < 1e-9).all()))
        tall = high - low
        for sign in (-1, 1):
            inner, outer = sign * 0.58 * b, sign * 0.94 * b
            lamp: Colour = (255, 246, 200) if x > 0 else (255, 62, 52)
            if x < 0:
                rim = quad(x, low + 0.5 * tall, low + 0.98 * tall, sign * 0.52 * b, sign * b)
                face.on.append((rim, (74, 12, 16)))
            face.on.append((quad(x, low + 0.58 * tall, low + 0.92 * tall, inner, outer), lamp))
        if x > 0:
            grille = quad(x, low + 0.25 * tall, low + 0.85 * tall, -0.48 * b, 0.48 * b)
            face.on.append((grille, (44, 46, 52)))
        plate = quad(x, low + 0.1 * tall, low + 0.32 * tall, -0.26 * b, 0.26 * b)
        face.on.append((plate, (238, 238, 230)))


_TURN = np.linspace(0, 2 * np.pi, 14, endpoint=False)
_ROUND = np.stack([np.cos(_TURN), np.sin(_TURN), 0 * _TURN], axis=1)


def _wheel(x: float, radius: float, side: float) -> list[tuple[Points, Colour]]:
    """A tyre and its hub on a side, standing on the ground."""
    centre = np.array([x, radius, side])
    return [(centre + _ROUND * radius, _TYRE), (centre + _ROUND * radius * 0.55, (150, 152, 156))]


def _wheels(solid: list[_Face], at: float, b: float, radius: float) -> None:
    for face, side in ((solid[0], b), (solid[1], -b)):
        for x in (-at, at):
            face.on.extend(_wheel(x, radius, side))


def _tyres(axles: Sequence[float], b: float, radius: float, floor: float) -> list[list[_Face]]:
    """What shows of the wheels below the floor of a vehicle, axle by axle."""
    tyres = []
    for x in axles:
        start, end = x - 0.85 * radius, x + 0.85 * radius
        profile = [(start, 0.0), (end, 0.0), (end, floor), (start, floor)]
        for side in (-1, 1):
            tyre = _prism(profile, [0.13 * b] * 4, _TYRE)
            for face in tyre:
                face.points = face.points + np.array([0, 0, side * 0.82 * b])
            tyres.append(tyre)
    return tyres


_HALF = np.linspace(np.pi / 2, 3 * np.pi / 2, 8)


def _capsule(p: Points, q: Points, start: float, end: float) -> Floats:
    """The outline of a line from p to q (pixels) that is round at its ends, with their radii."""
    angle = math.atan2(q[1] - p[1], q[0] - p[0])
    turn = np.concatenate([_HALF + angle, _HALF + angle + np.pi])
    radii, middle = np.repeat([start, end], len(_HALF)), np.repeat([p, q], len(_HALF), axis=0)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    return np.asarray(middle + circle * radii[:, None], np.float32)


def _cross(a: Points, b: Points) -> Points:
    (a0, a1, a2), (b0, b1, b2) = a.tolist(), b.tolist()
    return np.array([a1 * b2 - a2 * b1, a2 * b0 - a0 * b2, a0 * b1 - a1 * b0])


def _wrapped(angle: float) -> float:
    return (angle + math.pi) % (2 * math.pi) - math.pi


def _labels(rows: Sequence[tuple[_Thing, Points, float, float]], view: _View) -> labels3d.Labels:
    """KITTI labels of things with their 2D boxes, truncations and the part that shows."""
    table: list[list[float]] = []
    kinds = []
    for thing, box, truncation, share in rows:
        if box[3] - box[1] < _SMALLEST * view.size[0]:
            kinds.append(labels3d.DONT_CARE)
            unknown = [-1.0] * 3 + [-1000.0] * 3 + [-10.0]
            table.append([-1, -1, -10, *box, *unknown])
            continue
        kinds.append(thing.kind)
        occlusion = sum(share <= least for least in _VISIBLE)
        alpha = _wrapped(thing.yaw - math.atan2(thing.x, thing.z))
        place = (thing.x, view.height, thing.z)
        table.append([truncation, occlusion, alpha, *box, *thing.size, *place, thing.yaw])
    values = np.array(table, np.float32).reshape(-1, 14)
    return labels3d.Labels(
        kinds=tuple(kinds),
        truncation=values[:, 0],
        occlusion=values[:, 1].astype(np.int32),
        alpha=values[:, 2],
        boxes=values[:, 3:7],
        dimensions=values[:, 7:10],
        locations=values[:, 10:13],
        yaw=values[:, 13],
        scores=None,
    )
