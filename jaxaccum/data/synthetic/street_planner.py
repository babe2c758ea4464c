"""Plans a street: where its parts lie, what stands on it, and the labels of what shows."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from jaxaccum.data.synthetic.painting import Item, Plan, visible
from jaxaccum.data.synthetic.pictograms import MOODS, Colour, Part, ellipse, mix, shade
from jaxaccum.data.synthetic.street_figures import Artist
from jaxaccum.data.synthetic.street_view import (
    Floats,
    Points,
    Thing,
    View,
    apart,
    back_to_front,
    wrapped,
)
from jaxaccum.metrics import kitti as labels3d  # a module: it imports this package, too

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
# fmt: off
_WALLS: Sequence[Colour] = (
    (214, 196, 166), (186, 122, 98), (206, 206, 204), (170, 150, 130), (226, 206, 150),
    (154, 170, 182), (198, 160, 150),
)
_ROOFS: Sequence[Colour] = ((150, 70, 56), (96, 84, 84), (112, 62, 50), (84, 92, 104))
# fmt: on


class Planner:
    """Draws the random choices of one scene."""

    def __init__(self, r: random.Random, size: tuple[int, int]) -> None:
        self.r = r
        height, width = size
        focal = width * r.uniform(0.52, 0.64)
        cx, cy = width * r.uniform(0.47, 0.53), height * r.uniform(0.42, 0.5)
        lens = np.array([[focal, 0, cx], [0, focal, cy], [0, 0, 1]])
        # The reference point of the frame lies a little beside the lens, as KITTI's does.
        beside = np.array([[r.uniform(0.04, 0.07)], [r.uniform(-0.002, 0.002)], [0.003]])
        self.view = View(np.hstack([lens, lens @ beside]), r.uniform(1.5, 1.85), size)
        self.mood = r.choice([mood for mood in MOODS if mood.kind != "snow"])
        sun = np.array([r.uniform(-1, 1), -r.uniform(0.7, 1.4), r.uniform(-1, 0.4)])
        self.artist = Artist(r, self.view, self.mood, sun / np.linalg.norm(sun))
        self.haze = self.artist.haze
        self.horizon = cy
        self.things: list[Thing] = []
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
        order = back_to_front(self.things)
        self.things = [self.things[i] for i in order]
        items = [Item(0 if t.kind else -1, self.artist.draw(t), 0.0) for t in self.things]
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
            dark = [part for k in kept for part in self.artist.shadow(self.things[k])]
            shadows = Item(-1, dark, 0.0)
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
        lit = self.artist.lit(far, np.array([-side, 0.0, 0.0]))
        front = self.artist.lit(far, np.array([0.0, 0.0, -1.0]))
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
            tiles = mix(shade(r.choice(_ROOFS), self.artist.light), self.haze, min(a / 140, 0.6))
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
        thing = Thing(kind, x, z, wrapped(yaw), (height, width, length))
        if self._free(thing, 0.3):
            self.things.append(thing)

    def _free(self, thing: Thing, margin: float) -> bool:
        if thing.footprint[:, 1].min() < _NEAREST:
            return False
        u = self.view.pixels(np.array([[thing.x, 0.0, thing.z]]))[0, 0]
        width = self.view.size[1]
        if not -0.25 * width < u < 1.25 * width:
            return False
        return all(apart(thing, other, margin) for other in self.things)

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
                plant = Thing("", x, float(z), 0.0, (tall, 0.35, 0.35))
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


def _labels(rows: Sequence[tuple[Thing, Points, float, float]], view: View) -> labels3d.Labels:
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
        alpha = wrapped(thing.yaw - math.atan2(thing.x, thing.z))
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
