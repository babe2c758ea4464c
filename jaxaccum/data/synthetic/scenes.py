"""The embedded data set: small painted landscapes, drawn from an index, nothing to download.

A scene is a sky, hills, perhaps water and a road, and up to eight labelled objects: houses, trees,
cars, hot-air balloons, boats and kites. Clouds, birds, stones, flowers and fences carry no label.
A scene is planned as a list of items, each a stack of flat polygons; the same polygons are painted
into the image and into a map of which item shows at which pixel, from which the boxes are taken.
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from jaxaccum.data.base import DataError, Image, Objects, Report, no_objects
from jaxaccum.data.synthetic.painting import Item, Plan, paint, visible
from jaxaccum.data.synthetic.pictograms import (
    BIRD,
    MOODS,
    PICTOGRAMS,
    TUFT,
    Colour,
    Part,
    ellipse,
    mix,
    polygon,
    rectangle,
    shade,
    stroke,
)

NAMES = tuple(PICTOGRAMS)
LENGTHS = {"train": 2048, "val": 256}
_VERSION = 1  # of the drawing; part of the identity
_MOST = 8  # objects in a scene
_LEAST_VISIBLE = 0.3  # of an object's pixels; one that shows less is not drawn at all


class Scenes:
    """The embedded data set of one split. Implements `Source`."""

    names = NAMES

    def __init__(
        self, split: str, *, size: int = 320, length: int | None = None, seed: int = 0
    ) -> None:
        """Describes the scenes; draws nothing yet.

        Args:
          split: "train" or "val"; they share no scene.
          size: long side of the images in pixels; the short side is 3/4 of it or more.
          length: number of scenes; None for 2048 in train and 256 in val.
          seed: another seed gives other scenes.

        Raises:
          DataError: an argument is out of range.
        """
        if split not in LENGTHS:
            raise DataError(f"embedded scenes: split is {split!r}, expected 'train' or 'val'.")
        if size < 32:
            raise DataError(f"embedded scenes: size is {size}, expected at least 32 pixels.")
        length = LENGTHS[split] if length is None else length
        if length < 1:
            raise DataError(f"embedded scenes: length is {length}, expected at least 1.")
        self._split, self._size, self._length, self._seed = split, size, length, seed
        self._objects: dict[int, Objects] = {}
        described = f"scenes {_VERSION} {split} {size} {length} {seed}"
        self.identity = hashlib.sha256(described.encode()).hexdigest()[:12]

    @functools.cached_property
    def report(self) -> Report:
        """The objects of all scenes, counted once on a machine: some milliseconds a scene."""
        report = Report(f"embedded scenes ({self._split})")

        def count() -> None:
            report.count(self.objects(i) for i in range(len(self)))

        report.count_once("scenes", self.identity, count)
        return report

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        """`scene_SPLIT_NUMBER`."""
        return f"scene_{self._split}_{self._checked(index):05d}"

    def image(self, index: int) -> Image:
        """(H, W, 3) uint8 RGB."""
        plan, self._objects[index] = self._plan(index)
        return paint(plan)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of image `index` in pixels."""
        return self._plan(index)[0].size

    def objects(self, index: int) -> Objects:
        """Boxes are the extents of what is visible of each object."""
        if index not in self._objects:
            self._objects[index] = self._plan(index)[1]
        return self._objects[index]

    def _plan(self, index: int) -> tuple[Plan, Objects]:
        key = f"{self._seed}/{self._split}/{self._checked(index)}"
        plan = _Planner(random.Random(key), self._size).plan()
        return _without_hidden(plan)

    def _checked(self, index: int) -> int:
        if not 0 <= index < self._length:
            raise IndexError(f"scene {index} of {self._length}")
        return int(index)


# Height as a part of the scene's short side, and the most tilt in degrees.
_HEIGHTS = ((0.17, 0.44), (0.2, 0.56), (0.1, 0.2), (0.2, 0.5), (0.16, 0.42), (0.2, 0.42))
_TILTS = (0.0, 3.0, 0.0, 7.0, 6.0, 38.0)


class _Planner:
    """Draws the random choices of one scene."""

    def __init__(self, r: random.Random, size: int) -> None:
        self.r = r
        short = round(size * r.uniform(0.75, 1.0))
        self.height, self.width = (size, short) if r.random() < 0.2 else (short, size)
        self.unit = min(self.height, self.width)
        self.mood = r.choice(MOODS)
        self.items: list[Item] = []

    def plan(self) -> Plan:
        r, mood = self.r, self.mood
        count = 0 if r.random() < 0.06 else min(1 + int(r.gammavariate(2.2, 1.35)), _MOST)
        labels = [r.randrange(len(NAMES)) for _ in range(count)]
        self.horizon = r.uniform(0.34, 0.56) * self.height
        water = NAMES.index("boat") in labels or r.random() < 0.2
        self.shore = self.horizon + (r.uniform(0.12, 0.28) * self.height if water else 0.0)
        ground = self._jitter(mood.ground, 14)
        rows = self._background(self._jitter(mood.water, 12), ground)
        self._sky()
        self._hills()
        if water:
            self._ripples()
        self._ground(ground)
        self._place(labels)
        self._clutter(ground)
        self.items.sort(key=lambda item: item.depth)
        return Plan(
            size=(self.height, self.width),
            rows=rows,
            items=self.items,
            contrast=r.uniform(0.75, 1.15),
            brightness=r.uniform(-14, 14),
            tint=(r.uniform(0.93, 1.07), 1.0, r.uniform(0.93, 1.07)),
            noise=r.choice((0.04, 0.08, 0.14, 0.22)),
            offset=(r.randrange(64), r.randrange(64)),
            blur=r.choice((0.0, 0.0, 0.0, 0.0, 0.6, 1.0)),
        )

    def _jitter(self, colour: Colour, by: float) -> Colour:
        red, green, blue = (c + self.r.uniform(-by, by) for c in colour)
        return red, green, blue

    def _background(self, water: Colour, ground: Colour) -> NDArray[np.float32]:
        top, bottom = self._jitter(self.mood.top, 14), self._jitter(self.mood.bottom, 10)
        self.haze = bottom
        shore = max(self.shore, self.horizon + 1)
        stops: Sequence[tuple[float, Colour]] = (
            (0, top),
            (self.horizon, bottom),
            (self.horizon + 0.5, mix(water, bottom, 0.5)),
            (shore, water),
            (shore + 0.5, shade(ground, 1.05)),
            (self.height, shade(ground, 0.78)),
        )
        at, rows = np.arange(self.height) + 0.5, [y for y, _ in stops]
        channels = [np.interp(at, rows, [c[k] for _, c in stops]) for k in range(3)]
        return np.stack(channels, axis=1).astype(np.float32)

    def _add(self, parts: list[Part], depth: float) -> None:
        self.items.append(Item(-1, parts, depth))

    def _sky(self) -> None:
        r, mood, unit = self.r, self.mood, self.unit
        if r.random() < 0.6:
            x, y = r.uniform(0.05, 0.95) * self.width, r.uniform(0.08, 0.8) * self.horizon
            radius = r.uniform(0.03, 0.06) * unit
            disc: Colour = (244, 240, 220) if mood.dark else (255, 236, 170)
            sky = mix(mood.top, mood.bottom, y / self.horizon)
            rings = ((1.7, 0.22), (1.3, 0.42), (1.0, 1.0))
            glow = [(radius * wide, mix(sky, disc, share)) for wide, share in rings]
            self._add([Part(ellipse(x, y, s, s), colour) for s, colour in glow], -3.0)
        if mood.dark:
            stars = []
            for _ in range(24):
                x, y, s = r.uniform(0, self.width), r.uniform(0, self.horizon), r.uniform(0.4, 1)
                stars.append(Part(ellipse(x, y, s, s), (226, 228, 240)))
            self._add(stars, -3.5)
        for _ in range(r.choice((0, 1, 2, 3, 4))):
            x, y = r.uniform(0, self.width), r.uniform(0.05, 0.7) * self.horizon
            scale = r.uniform(0.05, 0.12) * unit
            white = mix((90, 98, 128) if mood.dark else (252, 252, 252), self.haze, 0.25)
            puffs = [
                (x + dx * scale, y - r.uniform(0, 0.45) * scale, r.uniform(0.6, 1.0) * scale)
                for dx in np.linspace(-1.3, 1.3, r.randint(3, 5))
            ]
            cloud = [
                Part(ellipse(px, py + 0.14 * scale, s, s * 0.55), shade(white, 0.93))
                for px, py, s in puffs
            ]
            cloud += [Part(ellipse(px, py, s * 0.95, s * 0.5), white) for px, py, s in puffs]
            self._add(cloud, -2.5)
        if r.random() < 0.3:
            for _ in range(r.randint(2, 5)):
                x, y = r.uniform(0, self.width), r.uniform(0.1, 0.8) * self.horizon
                s = r.uniform(0.012, 0.022) * unit
                wings = BIRD * np.float32(s) + np.array([x, y], np.float32)
                self._add([Part(stroke(wings, max(s * 0.28, 0.9)), (56, 60, 72))], -2.0)

    def _hills(self) -> None:
        r = self.r
        x = np.linspace(0, self.width, 25, dtype=np.float32)
        ridges = r.randint(1, 3)
        for i in range(ridges):
            near = (i + 1) / ridges
            tall = r.uniform(0.05, 0.2) * self.height * (1.25 - 0.6 * near)
            waves = [(r.uniform(0.6, 2.2) * k, r.uniform(0, 6.3), 1 / k) for k in (1, 2.3, 4.1)]
            ridge = np.zeros_like(x)
            for f, p, a in waves:
                ridge += a * np.sin(f * 2 * np.pi * x / self.width + p)
            y = self.horizon + 1 - tall * (0.55 + 0.3 * ridge).clip(0.02)
            colour = mix(self.haze, self._jitter(self.mood.hill, 12), 0.35 + 0.5 * near)
            base = polygon(self.width, self.horizon + 1, 0, self.horizon + 1)
            points = np.concatenate([np.stack([x, y], 1), base]).astype(np.float32)
            self._add([Part(points, colour)], -1.9 + 0.1 * i)

    def _ripples(self) -> None:
        r = self.r
        light = mix(self.mood.water, self.haze, 0.55)
        parts = []
        for _ in range(r.randint(8, 18)):
            y = r.uniform(self.horizon + 2, self.shore)
            near = (y - self.horizon) / (self.shore - self.horizon)
            x, s = r.uniform(0, self.width), (0.02 + 0.05 * near) * self.width
            parts.append(Part(ellipse(x, y, s, 0.5 + 0.7 * near), light))
        self._add(parts, -1.0)

    def _ground(self, ground: Colour) -> None:
        r = self.r
        x = np.linspace(0, self.width, 17, dtype=np.float32)
        bank = self.shore - 0.012 * self.height * (
            1 + np.sin(r.uniform(1, 3) * 2 * np.pi * x / self.width + r.uniform(0, 6.3))
        )
        if self.shore > self.horizon:
            # Painted after the boats, so that the bank covers the foot of one behind it.
            low = polygon(self.width, self.shore + 2, 0, self.shore + 2)
            sand = np.concatenate([np.stack([x, bank], 1), low]).astype(np.float32)
            self._add([Part(sand, shade(ground, 1.08))], -0.01)
        span = self.height - self.shore
        for _ in range(r.randint(1, 3)):  # fields
            y = self.shore + r.uniform(0.05, 0.9) * span
            left, reach = r.uniform(-0.3, 0.8) * self.width, r.uniform(0.3, 0.9) * self.width
            meadow = ellipse(left + reach / 2, y, reach / 2, r.uniform(0.04, 0.12) * span)
            green = self._jitter(shade(ground, r.uniform(0.86, 1.1)), 8)
            self._add([Part(meadow, green)], -0.9)
        self.road: float | None = None
        if r.random() < 0.5:
            middle = self.shore + r.uniform(0.35, 0.8) * span
            wide, tilt = r.uniform(0.05, 0.085) * self.height, r.uniform(-0.04, 0.04) * self.height
            grey = self._jitter((118, 116, 120) if not self.mood.dark else (58, 60, 70), 10)
            left, right = middle - tilt, middle + tilt
            w = self.width
            parts = [Part(stroke(polygon(0, left, w, right), 2 * wide), grey)]
            for i in range(9):
                a, b = (i + 0.1) / 9, (i + 0.6) / 9
                ya, yb = left + (right - left) * a, left + (right - left) * b
                dash = stroke(polygon(a * w, ya, b * w, yb), 2)
                parts.append(Part(dash, (226, 222, 206)))
            self._add(parts, -0.8)
            self.road = middle

    def _place(self, labels: Sequence[int]) -> None:
        """Draws the labelled objects; one that finds no room is left out of the scene."""
        taken: list[tuple[float, float, float, float]] = []
        for label in labels:
            shape = PICTOGRAMS[NAMES[label]](self.r, self.mood)
            for _ in range(12):
                parts, depth = self._stand(label, shape)
                points = np.concatenate([p.points for p in parts if p.outline])
                (x1, y1), (x2, y2) = points.min(axis=0), points.max(axis=0)
                box = (float(x1), float(y1), float(x2), float(y2))
                if self._fits(box, taken):
                    taken.append(box)
                    self.items.append(Item(label, parts, depth))
                    if NAMES[label] in ("house", "tree", "car"):
                        self._shadow(box, depth)
                    break

    def _stand(self, label: int, shape: list[Part]) -> tuple[list[Part], float]:
        """Gives a shape its place, size, tilt and direction, in pixels."""
        r, name = self.r, NAMES[label]
        low, high = _HEIGHTS[label]
        scale = math.exp(r.uniform(math.log(low), math.log(high))) * self.unit
        x = r.uniform(0.02, 0.98) * self.width
        if name in ("balloon", "kite"):
            y = r.uniform(0.06, 0.95) * self.horizon + 0.6 * scale
            depth = -0.5 + 0.001 * r.random()
        elif name == "boat":
            near = r.uniform(0.25, 0.97)
            y = self.horizon + near * (self.shore - self.horizon)
            scale *= 0.75 + 0.35 * near
            depth = -0.1 + 0.08 * near
        else:
            near = r.uniform(0.08, 0.98)
            y = self.shore + near * (self.height - self.shore)
            if name == "car" and self.road is not None and r.random() < 0.8:
                y = self.road + r.uniform(0.0, 0.05) * self.height
                near = (y - self.shore) / (self.height - self.shore)
            scale *= 0.75 + 0.45 * near
            depth = near
        angle = math.radians(r.uniform(-1, 1) * _TILTS[label])
        stretch = r.uniform(0.88, 1.14) * r.choice((-1, 1))
        cos, sin = math.cos(angle), math.sin(angle)
        matrix = np.array([[stretch * cos, -stretch * sin], [-sin, -cos]], np.float32) * np.float32(
            scale
        )
        light = r.uniform(0.82, 1.12) * (0.62 if self.mood.dark else 1.0)
        distance = 0.0 if depth > 0 else 0.12
        place = np.array([x, y], np.float32)
        parts = [
            Part(p.points @ matrix, mix(shade(p.colour, light), self.haze, distance), p.outline)
            for p in shape
        ]
        return [p._replace(points=p.points + place) for p in parts], depth

    def _fits(
        self,
        box: tuple[float, float, float, float],
        taken: Sequence[tuple[float, float, float, float]],
    ) -> bool:
        """Whether most of a box is in the picture and it hides no other nor is hidden."""
        x1, y1, x2, y2 = box
        area = (x2 - x1) * (y2 - y1)
        seen = _overlap(box, (0, 0, self.width, self.height))
        if seen < 0.72 * area:
            return False
        return all(
            _overlap(box, other) < 0.35 * min(area, (other[2] - other[0]) * (other[3] - other[1]))
            for other in taken
        )

    def _shadow(self, box: tuple[float, float, float, float], depth: float) -> None:
        x1, _, x2, y2 = box
        row = min(max(int(y2), 0), self.height - 1)
        ground = shade(self.mood.ground, 0.62 + 0.1 * (row / self.height))
        shadow = ellipse((x1 + x2) / 2, y2 - 0.5, (x2 - x1) * 0.54, max((x2 - x1) * 0.05, 1.2))
        self._add([Part(shadow, ground)], depth - 1e-6)

    def _clutter(self, ground: Colour) -> None:
        """Things without a label: stones, flowers, tufts, a fence."""
        r, unit = self.r, self.unit
        span = self.height - self.shore

        def spot() -> tuple[float, float, float]:
            near = r.random()
            return r.uniform(0, self.width), self.shore + near * span, near

        for _ in range(r.choice((0, 0, 1, 2, 4))):
            x, y, near = spot()
            s = r.uniform(0.012, 0.04) * unit * (0.5 + near)
            grey = self._jitter((140, 138, 134), 18)
            stone = Part(ellipse(x, y, s, s * 0.6), shade(grey, 0.72))
            light = Part(ellipse(x - s * 0.15, y - s * 0.12, s * 0.75, s * 0.4), grey)
            self._add([stone, light], near)
        petals = r.choice(((236, 90, 90), (246, 220, 90), (240, 240, 246), (190, 120, 210)))
        dots = []
        for _ in range(0 if self.mood.kind == "snow" or r.random() < 0.4 else r.randint(8, 30)):
            x, y, near = spot()
            s = 0.7 + 1.3 * near
            dots.append(Part(ellipse(x, y, s, s), petals))
        for _ in range(r.randint(10, 30)):
            x, y, near = spot()
            s = (0.006 + 0.012 * near) * unit
            tuft = TUFT * np.float32(s) + np.array([x, y], np.float32)
            dots.append(Part(tuft, shade(ground, r.choice((0.82, 1.14)))))
        self._add(dots, -0.85)
        if r.random() < 0.22:
            near = r.uniform(0.1, 0.95)
            y, tall = self.shore + near * span, (0.03 + 0.05 * near) * unit
            wood = self._jitter((168, 132, 92) if r.random() < 0.5 else (236, 232, 224), 12)
            left = r.uniform(-0.2, 0.7) * self.width
            right = left + r.uniform(0.2, 0.6) * self.width
            rails = [
                rectangle(left, y - tall * k - tall * 0.07, right, y - tall * k + tall * 0.07)
                for k in (0.35, 0.75)
            ]
            posts = [
                rectangle(x - tall * 0.08, y - tall, x + tall * 0.08, y)
                for x in np.arange(left, right, tall * 0.9)
            ]
            self._add([Part(p, wood) for p in rails + posts], near)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(wide, 0.0) * max(tall, 0.0)


def _without_hidden(plan: Plan) -> tuple[Plan, Objects]:
    """Takes out objects of which too little shows, and finds the boxes of the others."""
    while True:
        shown = list(visible(plan))
        hidden = [k for k, share, _ in shown if share < _LEAST_VISIBLE]
        if not hidden:
            break
        plan.items = [item for k, item in enumerate(plan.items) if k not in hidden]
    if not shown:
        return plan, no_objects()
    boxes = np.array([box for _, _, box in shown], np.float32)
    labels = np.array([plan.items[k].label for k, _, _ in shown], np.int32)
    return plan, Objects(boxes, labels)
