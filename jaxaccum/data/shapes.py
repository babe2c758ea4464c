"""The embedded shapes: furniture, vehicles and vessels, built from an index, nothing to download.

A shape is a list of parts, each lofted through rings of points: boxes, rods, vessels turned on a
lathe, hulls. Its cloud is sampled evenly over the surface. y is up; lengths are arbitrary, as every
cloud is scaled in the end.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxaccum.data.base import DataError
from jaxaccum.data.cloud_files import Points
from jaxaccum.data.cloud_ops import unit_pose
from jaxaccum.data.clouds import CloudReport

# (triangles, 3 corners, 3 coordinates)
Part = NDArray[np.float64]
Vector = Sequence[float]

POINTS = 8192
_VERSION = 1  # of the shapes; part of the identity
COUNTS = ("no", "one", "two", "three", "four", "five", "six")


class Shapes:
    """The embedded complete clouds of one split. Implements `Complete` of `cloud_sources`."""

    points = POINTS

    def __init__(self, split: str, *, length: int | None = None, seed: int = 0) -> None:
        """Describes the shapes; builds nothing yet.

        Args:
          split: "train", "val", "test", or "unseen", which has categories of its own; they share
            no shape.
          length: number of shapes, their categories in turn; None for 2000 in train, 200 in val
            and test, 80 in unseen.
          seed: another seed gives other shapes.

        Raises:
          DataError: an argument is out of range.
        """
        if split not in LENGTHS:
            raise DataError(
                f"embedded shapes: split is {split!r}, expected one of {', '.join(LENGTHS)}."
            )
        length = LENGTHS[split] if length is None else length
        if length < 1:
            raise DataError(f"embedded shapes: length is {length}, expected at least 1.")
        self._makers = UNSEEN if split == "unseen" else SEEN
        self._split, self._length, self._seed = split, length, seed
        self.names = tuple(self._makers)
        described = f"shapes {_VERSION} {split} {length} {seed} {POINTS}"
        self.identity = hashlib.sha256(described.encode()).hexdigest()[:12]
        counts = {
            name: len(range(category, length, len(self.names)))
            for category, name in enumerate(self.names)
        }
        self.report = CloudReport(f"embedded shapes ({split})", counts, length)

    def __len__(self) -> int:
        return self._length

    def category(self, index: int) -> int:
        """The categories take turns."""
        return self._checked(index) % len(self.names)

    def name(self, index: int) -> str:
        """`CATEGORY_SPLIT_NUMBER`."""
        return f"{self.names[self.category(index)]}_{self._split}_{index:05d}"

    def complete(self, index: int) -> Points:
        """(8192, 3), the mean at the origin, the farthest point at distance 1."""
        triangles, r = self._surface(index, _unsaid)
        rng = np.random.Generator(np.random.PCG64(r.getrandbits(64)))
        points = surface_points(triangles, POINTS, rng)
        return unit_pose(points).apply(points)

    def caption(self, index: int) -> str:
        """What the shape is built of: "a wide coffee table with four thin round legs"."""
        said: list[str] = []
        triangles, _ = self._surface(index, said.append)
        category = self.names[self.category(index)]
        parts = [phrase.removeprefix("with ") for phrase in said if phrase.startswith("with ")]
        nouns = [phrase for phrase in said if not phrase.startswith("with ")]
        over, under, low, few, high, many = _PROPORTIONS[category]
        size = np.ptp(triangles, axis=(0, 1))
        ratio = size[over] / size[under]
        words = few if ratio < low else many if ratio > high else ""
        noun = f"{words} {nouns[-1] if nouns else category}".strip()
        article = "an" if noun[0] in "aeio" else "a"
        listed = " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
        return f"{article} {noun} with {listed}" if parts else f"{article} {noun}"

    def _surface(self, index: int, say: Say) -> tuple[Part, random.Random]:
        """The triangles of shape `index`, and its generator after them."""
        r = random.Random(f"{self._seed}/{self._split}/{self._checked(index)}")
        parts = self._makers[self.names[self.category(index)]](r, say)
        stretch = np.array([r.uniform(0.9, 1.1), r.uniform(0.9, 1.1), r.uniform(0.9, 1.1)])
        return np.concatenate(parts) * stretch, r

    def _checked(self, index: int) -> int:
        if not 0 <= index < self._length:
            raise IndexError(f"shape {index} of {self._length}")
        return int(index)


def surface_points(triangles: Part, count: int, rng: np.random.Generator) -> Points:
    """(count, 3) float32, uniform in each triangle, as many in each as its area asks for."""
    a, b, c = triangles.transpose(1, 0, 2)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    # Rounding the running sum loses and invents no point.
    ends = np.rint(np.cumsum(area) / area.sum() * count).astype(np.int64)
    of = np.repeat(np.arange(len(a)), np.diff(ends, prepend=0))
    u, v = np.sqrt(rng.random((count, 1))), rng.random((count, 1))
    return np.asarray((1 - u) * a[of] + u * (1 - v) * b[of] + u * v * c[of], np.float32)


# --- parts ---


def loft(rings: NDArray[Any], closed: bool = True) -> Part:
    """The surface through rings of points.

    Args:
      rings: (n, k, 3), each the corners of a closed polygon.
      closed: also the areas of the first and the last ring, as fans about their middles.
    """
    near, far = rings[:-1], rings[1:]
    near_next, far_next = np.roll(near, -1, axis=1), np.roll(far, -1, axis=1)
    triangles = [
        np.stack([near, near_next, far], axis=2).reshape(-1, 3, 3),
        np.stack([far, near_next, far_next], axis=2).reshape(-1, 3, 3),
    ]
    for ring in (rings[0], rings[-1]) if closed else ():
        middle = np.broadcast_to(ring.mean(axis=0), ring.shape)
        triangles.append(np.stack([ring, np.roll(ring, -1, axis=0), middle], axis=1))
    return np.concatenate(triangles)


def box(centre: Vector, size: Vector) -> Part:
    """A box along the axes."""
    square = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) / 2
    rings = np.array([[(x, y, z) for x, z in square] for y in (-0.5, 0.5)])
    return loft(rings * np.asarray(size) + np.asarray(centre))


def cushion(centre: Vector, size: Vector, sharp: float = 4.0) -> Part:
    """A box with round edges, a superellipsoid; sharp: 2 for an ellipsoid, more for a box."""

    def bent(angle: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        c, s = np.cos(angle), np.sin(angle)
        return np.sign(c) * np.abs(c) ** (2 / sharp), np.sign(s) * np.abs(s) ** (2 / sharp)

    wide, y = bent(np.linspace(-math.pi / 2, math.pi / 2, 11))
    x, z = bent(np.linspace(0, 2 * math.pi, 20, endpoint=False))
    rings = np.stack(
        [np.outer(wide, x), np.repeat(y[:, None], len(x), axis=1), np.outer(wide, z)], axis=2
    )
    return loft(rings * np.asarray(size) / 2 + np.asarray(centre))


def turned(profile: Sequence[tuple[float, float]], sides: int = 24, closed: bool = True) -> Part:
    """A surface of revolution about y; profile: its (radius, y) from below to above."""
    angle = np.linspace(0, 2 * math.pi, sides, endpoint=False)
    circle = np.stack([np.cos(angle), np.zeros(sides), np.sin(angle)], axis=1)
    rings = np.array([circle * radius + (0, y, 0) for radius, y in profile])
    return loft(rings, closed)


def tube(path: Sequence[Vector], radius: float | Sequence[float], sides: int = 8) -> Part:
    """A tube along a path, with one radius or one for each point."""
    points = np.asarray(path, np.float64)
    radii = np.broadcast_to(radius, len(points))
    along: NDArray[np.float64] = np.asarray(np.gradient(points, axis=0))
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    # Any direction that is nowhere along the path spans the rings.
    side = np.eye(3)[np.argmin(np.abs(along).max(axis=0))]
    first = np.cross(along, side)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    second = np.cross(along, first)
    angle = np.linspace(0, 2 * math.pi, sides, endpoint=False) + math.pi / sides
    rings = (
        points[:, None]
        + radii[:, None, None] * np.cos(angle)[:, None] * first[:, None]
        + radii[:, None, None] * np.sin(angle)[:, None] * second[:, None]
    )
    return loft(rings)


def side_cut(outline: Sequence[tuple[float, float]], width: float, x: float = 0.0) -> Part:
    """A slab across x whose outline in (z, y) is given."""
    rings = np.array([[(x + s * width / 2, y, z) for z, y in outline] for s in (-1, 1)])
    return loft(rings)


def wing(root: Vector, tip: Vector, root_chord: float, tip_chord: float, thick: float) -> Part:
    """A blade from root to tip, along z as long as its chords."""
    profile = np.array([(0.5, 0), (0.2, 0.5), (-0.5, 0), (0.2, -0.5)])
    ends = ((root, root_chord), (tip, tip_chord))
    across = np.asarray(tip, np.float64) - np.asarray(root, np.float64)
    up = np.array([-across[1], across[0], 0]) / np.hypot(across[0], across[1])
    rings = np.array(
        [[np.asarray(p) + (0, 0, z * c) + up * t * thick for z, t in profile] for p, c in ends]
    )
    return loft(rings)


def moved(part: Part, by: Vector) -> Part:
    """A part elsewhere."""
    return part + np.asarray(by)


def rotated(part: Part, axis: int, degrees: float) -> Part:
    """A part turned about the x (0), y (1) or z (2) axis."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = np.eye(3)
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    turn[[i, i, j, j], [i, j, i, j]] = cos, -sin, sin, cos
    return part @ turn.T


def wheel(radius: float, width: float, hub: float = 0.0) -> Part:
    """A disc standing on its rim, its axle along x through the origin."""
    half = width / 2
    profile = [(hub, -half), (radius * 0.92, -half), (radius, -half * 0.6), (radius, half * 0.6),
               (radius * 0.92, half), (hub, half)]  # fmt: skip
    return rotated(turned(profile, 20), 2, 90)


def four(x: float, z: float) -> list[tuple[float, float]]:
    """The corners of a rectangle about the origin."""
    return [(-x, -z), (x, -z), (x, z), (-x, z)]


# --- categories ---

# A maker tells what it builds: "with ..." for a part, else another noun than its category's.
Say = Callable[[str], object]


def _unsaid(phrase: str) -> None:
    del phrase


def _legs(r: random.Random, w: float, d: float, top: float, say: Say) -> list[Part]:
    """Four legs below a plate of w x d at the height top, sometimes with rails between them."""
    thick, splay = r.uniform(0.012, 0.03), r.choice((0.0, 0.0, r.uniform(0.0, 0.15)))
    sides, taper = r.choice((4, 10)), r.uniform(0.5, 1.0)
    kind = "thin" if thick < 0.018 else "thick" if thick > 0.024 else "slim"
    spread = " splayed" if splay > 0.05 else ""
    say(f"with four {kind} {'square' if sides == 4 else 'round'}{spread} legs")
    x, z = w / 2 - 1.5 * thick, d / 2 - 1.5 * thick
    feet = [((a, top, b), (a * (1 + splay), 0.0, b * (1 + splay))) for a, b in four(x, z)]
    parts = [tube([a, b], [thick, thick * taper], sides) for a, b in feet]
    if r.random() < 0.4:
        low = r.uniform(0.15, 0.45) * top
        at = [np.array(b) + (np.array(a) - np.array(b)) * low / top for a, b in feet]
        pairs = r.choice([((0, 3), (1, 2)), ((0, 1), (1, 2), (2, 3), (3, 0)), ((0, 2), (1, 3))])
        say("with crossed rails" if (0, 2) in pairs else "with rails between the legs")
        parts += [tube([at[i], at[j]], thick * 0.6, sides) for i, j in pairs]
    return parts


def _star(r: random.Random, reach: float, top: float, say: Say) -> list[Part]:
    """A column up to the height top on a star of feet or a disc."""
    parts = [tube([(0, 0.03, 0), (0, top, 0)], r.uniform(0.02, 0.045), 12)]
    if r.random() < 0.5:
        say("with a column on a round foot")
        parts.append(turned([(reach, 0), (reach, 0.02), (0.05, 0.05)]))
    else:
        feet = r.choice((4, 5))
        say(f"with a column on a {COUNTS[feet]}-armed foot")
        for k in range(feet):
            a = 2 * math.pi * k / feet
            foot = (reach * math.cos(a), 0.02, reach * math.sin(a))
            parts.append(tube([(0, 0.08, 0), foot], [0.03, 0.018]))
    return parts


def _plate(r: random.Random, w: float, thick: float, d: float, y: float) -> Part:
    """A plate with its top at the height y."""
    centre, size = (0, y - thick / 2, 0), (w, thick, d)
    return r.choice((box(centre, size), cushion(centre, size, r.uniform(4, 12))))


def _chair(r: random.Random, say: Say = _unsaid) -> list[Part]:
    w, d, seat = r.uniform(0.4, 0.58), r.uniform(0.4, 0.55), r.uniform(0.36, 0.52)
    thick, back = r.uniform(0.02, 0.1), r.uniform(0.3, 0.65)
    parts = [_plate(r, w, thick, d, seat)]
    low = seat - thick
    parts += _star(r, w * 0.55, low, say) if r.random() < 0.3 else _legs(r, w, d, low, say)
    kind, lean = r.choice(("panel", "slats", "bars", "cushion")), r.uniform(0, 16)
    made = {"panel": "solid", "slats": "slatted", "bars": "barred", "cushion": "padded"}[kind]
    size = "low " if back < 0.41 else "high " if back > 0.54 else ""
    say(f"with a {size}{made} back")
    bar = r.uniform(0.012, 0.022)
    side = w / 2 - bar
    upright: list[Part] = []
    if kind == "panel":
        upright.append(box((0, back / 2, 0), (w, back, r.uniform(0.015, 0.05))))
    elif kind == "cushion":
        upright.append(cushion((0, back / 2, 0), (w, back, r.uniform(0.06, 0.12)), 5))
    else:
        upright += [tube([(s, 0, 0), (s, back, 0)], bar, 6) for s in (-side, side)]
        count = r.randint(3, 6)
        if kind == "slats":
            for y in np.linspace(0.25, 0.95, count) * back:
                upright.append(box((0, float(y), 0), (w - bar, back / count * 0.5, bar)))
        else:
            upright.append(tube([(-side, back, 0), (side, back, 0)], bar * 1.2, 6))
            for x in np.linspace(-side, side, count + 2)[1:-1]:
                upright.append(tube([(x, 0, 0), (x, back, 0)], bar * 0.7, 6))
    parts += [moved(rotated(p, 0, -lean), (0, low, -d / 2 + bar)) for p in upright]
    if r.random() < 0.35:
        say("with armrests")
        high, arm = seat + r.uniform(0.16, 0.26), r.uniform(0.02, 0.03)
        for s in (-1, 1):
            x = s * (w / 2 + arm)
            parts.append(box((x, high, 0), (2 * arm, arm, d)))
            parts.append(tube([(x, low, d * 0.35), (x, high, d * 0.35)], arm * 0.7, 6))
            parts.append(tube([(x, low, -d * 0.4), (x, high, -d * 0.4)], arm * 0.7, 6))
    return parts


def _table(r: random.Random, say: Say = _unsaid) -> list[Part]:
    w, d = r.uniform(0.7, 1.8), r.uniform(0.6, 0.95)
    top, thick = r.choice((r.uniform(0.35, 0.5), r.uniform(0.68, 0.8))), r.uniform(0.02, 0.06)
    kind = r.choice(("legs", "legs", "column", "panels", "desk"))
    say(f"{'round ' if kind == 'column' else ''}{'coffee ' if top < 0.6 else ''}table")
    if kind == "column":
        radius = r.uniform(0.35, 0.65)
        disc = turned([(radius, top - thick), (radius, top)], 36)
        return [disc, *_star(r, radius * r.uniform(0.5, 0.8), top - thick, say)]
    parts = [box((0, top - thick / 2, 0), (w, thick, d))]
    low = top - thick
    if kind == "panels":
        say("with panels for legs")
        for s in (-1, 1):
            parts.append(box((s * (w / 2 - 0.06), low / 2, 0), (thick, low, d * 0.9)))
        parts.append(box((0, low * 0.4, 0), (w - 0.12, r.uniform(0.1, 0.3) * low, thick)))
        return parts
    parts += _legs(r, w, d, low, say)
    if kind == "desk":
        drawers, side = r.uniform(0.25, 0.4), r.choice((-1, 1))
        height = low * r.uniform(0.3, 0.95)
        say(f"with a {'tall' if height > 0.6 * low else 'small'} block of drawers")
        x = side * (w / 2 - drawers / 2 - 0.04)
        parts.append(box((x, low - height / 2, 0), (drawers, height, d * 0.9)))
    elif r.random() < 0.5:
        apron = r.uniform(0.05, 0.12)
        say("with an apron below the top")
        for s in (-1, 1):
            parts.append(box((0, low - apron / 2, s * (d / 2 - 0.05)), (w - 0.1, apron, 0.02)))
            parts.append(box((s * (w / 2 - 0.05), low - apron / 2, 0), (0.02, apron, d - 0.1)))
    return parts


def _sofa(r: random.Random, say: Say = _unsaid) -> list[Part]:
    seats = r.choice((1, 2, 2, 3, 3))
    each, d = r.uniform(0.55, 0.75), r.uniform(0.75, 0.95)
    w, arm = seats * each, r.uniform(0.1, 0.24)
    seat, back, armed = r.uniform(0.36, 0.46), r.uniform(0.7, 0.95), r.uniform(0.5, 0.68)
    say(f"{('single', 'two', 'three')[seats - 1]}-seat sofa")
    say(f"with {'slim' if arm < 0.15 else 'broad' if arm > 0.19 else 'plain'} arms")
    foot, deep, sharp = r.uniform(0.03, 0.14), r.uniform(0.14, 0.26), r.uniform(4, 14)
    base = seat - 0.14
    parts = [box((0, (foot + base) / 2, 0), (w, base - foot, d))]
    for k in range(seats):
        x = (k - (seats - 1) / 2) * each
        parts.append(cushion((x, seat - 0.07, deep / 2), (each * 0.98, 0.16, d - deep), sharp))
        if r.random() < 0.9:
            tall = back - seat + 0.04
            pillow = cushion((0, tall / 2, 0), (each * 0.96, tall, 0.16), sharp)
            parts.append(moved(rotated(pillow, 0, -9), (x, seat - 0.03, deep - d / 2 + 0.07)))
    high = back * r.uniform(0.88, 1)
    middle = ((foot + high) / 2, -d / 2 + deep / 2)
    parts.append(cushion((0, *middle), (w, high - foot, deep), sharp))
    for s in (-1, 1):
        x = s * (w + arm) / 2
        parts.append(cushion((x, (foot + armed) / 2, 0), (arm, armed - foot, d), sharp))
    long = w / 2 + arm * 0.6
    parts += [tube([(x, 0, z), (x, foot + 0.02, z)], 0.025, 6) for x, z in four(long, d * 0.42)]
    if seats > 1 and r.random() < 0.25:  # one end reaches forward
        say("with one end reaching forward")
        reach, s = r.uniform(0.5, 0.8), r.choice((-1, 1))
        x = s * (w - each) / 2
        size = (each, seat - foot, reach)
        parts.append(cushion((x, (foot + seat) / 2, d / 2 + reach / 2), size, sharp))
    return parts


def _bed(r: random.Random, say: Say = _unsaid) -> list[Part]:
    w, d = r.choice((r.uniform(0.85, 1.1), r.uniform(1.4, 1.9))), r.uniform(1.9, 2.2)
    low, thick = r.uniform(0.12, 0.32), r.uniform(0.16, 0.3)
    rail, board = r.uniform(0.14, 0.24), r.uniform(0.03, 0.07)
    parts = [cushion((0, low + thick / 2, 0), (w, thick, d), 10)]
    parts += [box((s * w / 2, low, 0), (board, rail, d)) for s in (-1, 1)]
    ends = ((-1, r.uniform(0.7, 1.25)), (1, r.choice((low + rail / 2, r.uniform(0.45, 0.7)))))
    say("single bed" if w < 1.2 else "double bed")
    for s, high in ends:
        z = s * (d + board) / 2
        name = "headboard" if s < 0 else "footboard" if high > 0.44 else ""
        rise = "high " if high > 1.0 else "low " if s < 0 and high < 0.85 else ""
        barred = high > 0.6 and r.random() < 0.35
        if name:
            say(f"with a {rise}{'barred' if barred else 'solid'} {name}")
        if barred:
            x: float
            for x in np.linspace(-w / 2, w / 2, r.randint(6, 10)):
                parts.append(tube([(x, 0.1, z), (x, high, z)], 0.015, 6))
            parts.append(tube([(-w / 2, high, z), (w / 2, high, z)], 0.025, 8))
        else:
            parts.append(box((0, (high + 0.1) / 2, z), (w + board, high - 0.1, board)))
    parts += [
        tube([(x, 0, z), (x, low, z)], 0.035, r.choice((4, 10))) for x, z in four(w / 2, d / 2)
    ]
    pillows = 1 if w < 1.2 else 2
    for k in range(pillows):
        x = (k - (pillows - 1) / 2) * w / 2
        size = (0.75 * w / pillows, 0.14, 0.42)
        parts.append(cushion((x, low + thick + 0.05, -d / 2 + 0.3), size, 2.6))
    if r.random() < 0.5:
        cover = d * r.uniform(0.5, 0.7)
        say("with a blanket")
        centre = (0, low + thick / 2 + 0.03, d / 2 - cover / 2)
        parts.append(cushion(centre, (w + 0.05, thick, cover), 8))
    return parts


def _bookshelf(r: random.Random, say: Say = _unsaid) -> list[Part]:
    w, h, d = r.uniform(0.5, 1.5), r.uniform(0.8, 2.1), r.uniform(0.25, 0.4)
    board, foot = r.uniform(0.015, 0.035), r.choice((0.0, r.uniform(0.03, 0.1)))
    parts = [box((s * (w - board) / 2, h / 2, 0), (board, h, d)) for s in (-1, 1)]
    if r.random() < 0.7:
        parts.append(box((0, (foot + h) / 2, -d / 2), (w, h - foot, 0.008)))
    else:
        say("open bookshelf")
    levels = [float(y) for y in np.linspace(foot, h - board, r.randint(3, 6) + 1)]
    parts += [box((0, y + board / 2, 0), (w - 2 * board, board, d)) for y in levels]
    columns = r.choice((1, 1, 2, 3)) if w > 0.7 else 1
    rows = f"with {COUNTS[len(levels) - 1]} rows"
    say(rows + f" in {COUNTS[columns]} columns" if columns > 1 else rows)
    edges = np.linspace(-w / 2, w / 2, columns + 1)
    filled = 0
    parts += [box((float(x), (foot + h) / 2, 0), (board, h - foot, d)) for x in edges[1:-1]]
    for low, high in pairwise(levels):
        for left, right in pairwise(edges):
            if r.random() < 0.35:  # books
                filled += 1
                x, end = float(left) + board, float(left + (right - left) * r.uniform(0.3, 0.95))
                while x < end - 0.04:
                    thick = min(r.uniform(0.03, 0.08), end - x)
                    tall = (high - low - board) * r.uniform(0.55, 0.9)
                    centre = (x + thick / 2, low + board + tall / 2, -d * 0.08)
                    parts.append(box(centre, (thick * 0.95, tall, d * 0.7)))
                    x += thick
    share = filled / columns / (len(levels) - 1)
    some = "many" if share > 0.45 else "some" if share > 0.2 else "few" if share else "no"
    say(f"with {some} books")
    return parts


def _lamp(r: random.Random, say: Say = _unsaid) -> list[Part]:
    kind = r.choice(("floor", "table", "desk", "hanging"))
    wide, narrow = r.uniform(0.13, 0.25), r.uniform(0.4, 1.0)
    tall = r.uniform(0.14, 0.32)
    shade = turned([(wide, 0), (wide * narrow, tall)], 28, closed=False)
    form = "conical" if narrow < 0.6 else "cylindrical" if narrow > 0.85 else "tapered"
    say(f"{kind} lamp")
    if kind == "hanging":
        cord, bowl = r.uniform(0.3, 0.8), r.random() < 0.5
        say(f"with a {'bowl for a' if bowl else form} shade")
        say(f"with a {'long' if cord > 0.55 else 'short'} cord")
        if bowl:
            arc = np.linspace(0.05, math.pi / 2, 7)
            shade = turned([(wide * math.cos(a), tall * math.sin(a)) for a in arc], 28, False)
        plate = turned([(0.06, tall + cord), (0.06, tall + cord + 0.03)])
        return [shade, plate, tube([(0, tall * 0.6, 0), (0, tall + cord, 0)], 0.008, 6),
                cushion((0, tall * 0.45, 0), (0.08, 0.1, 0.08), 2)]  # fmt: skip
    if kind == "desk":
        low, high, back = r.uniform(0.2, 0.35), r.uniform(0.35, 0.55), r.uniform(0.1, 0.25)
        say(f"with a {'sharply' if back > 0.175 else 'slightly'} bent arm")
        joint, head = (0, low, -back), (0, high, r.uniform(0.12, 0.28))
        cone = turned([(0.1, -0.09), (0.03, 0.03), (0.02, 0.08)], 20, closed=False)
        return [turned([(0.1, 0), (0.1, 0.02), (0.03, 0.035)]),
                tube([(0, 0.02, 0), joint], 0.012, 6), tube([joint, head], 0.012, 6),
                cushion(joint, (0.04, 0.04, 0.04), 2),
                moved(rotated(cone, 0, -r.uniform(5, 50)), head)]  # fmt: skip
    stand = r.uniform(1.0, 1.4) if kind == "floor" else r.uniform(0.25, 0.45)
    foot = r.uniform(0.09, 0.17)
    say(f"with a {form} shade")
    parts = [moved(shade, (0, stand - tall * 0.2, 0))]
    if kind == "floor" and r.random() < 0.35:  # on three legs
        say("with three legs")
        knee = (0, stand * 0.85, 0)
        for k in range(3):
            a = 2 * math.pi * k / 3
            parts.append(tube([knee, (0.28 * math.cos(a), 0, 0.28 * math.sin(a))], 0.014, 6))
        parts.append(tube([knee, (0, stand, 0)], 0.015, 6))
    elif kind == "floor":
        say("with a round foot")
        parts.append(turned([(foot, 0), (foot, 0.02), (0.02, 0.04)]))
        parts.append(tube([(0, 0.02, 0), (0, stand, 0)], r.uniform(0.01, 0.02), 8))
    else:
        say("with a turned stand")
        heights = np.linspace(0, stand, 7)
        radii = [foot * r.uniform(0.25, 1.0) for _ in heights]
        radii[0], radii[-1] = foot * 0.8, 0.012
        parts.append(turned(list(zip(radii, heights.tolist(), strict=True))))
    return parts


def _bottle(r: random.Random, say: Say = _unsaid) -> list[Part]:
    radius, body = r.uniform(0.03, 0.05), r.uniform(0.1, 0.22)
    neck, throat = r.uniform(0.03, 0.1), radius * r.uniform(0.25, 0.5)
    shoulder = r.uniform(0.02, 0.07)
    bend = np.linspace(0, 1, 6)
    curve = r.choice((bend, bend**2, np.sin(bend * math.pi / 2)))
    say(f"with a {'long' if neck > 0.075 else 'short' if neck < 0.055 else 'medium'} neck")
    say(f"with {'sloping' if shoulder > 0.045 else 'steep'} shoulders")
    profile = [(radius * 0.8, 0.0), (radius, 0.006)]
    waist = r.choice((1.0, 1.0, r.uniform(0.78, 0.9)))
    if waist < 1:
        say("with a waist")
    profile += [(radius, body * 0.35), (radius * waist, body * 0.6), (radius, body)]
    profile += [
        (radius + (throat - radius) * float(c), body + shoulder * float(b))
        for c, b in zip(curve, bend, strict=True)
    ]
    top = body + shoulder + neck
    rim = throat * r.uniform(1.1, 1.3)
    profile += [(throat, top), (rim, top), (rim, top + 0.015)]
    parts = [turned(profile, 28)]
    if r.random() < 0.25:
        say("with a handle")
        x = radius * 0.9
        arc = [(x, body * 0.95, 0), (x + 0.035, body * 0.9, 0), (x + 0.04, body * 0.55, 0),
               (x, body * 0.35, 0)]  # fmt: skip
        parts.append(tube(arc, 0.007, 6))
    return parts


def _car(r: random.Random, say: Say = _unsaid) -> list[Part]:
    kind = r.choice(("saloon", "hatchback", "van", "pickup", "sports"))
    d, w, radius = r.uniform(3.7, 4.9), r.uniform(1.6, 1.9), r.uniform(0.29, 0.38)
    say({"saloon": "saloon car", "sports": "sports car", "pickup": "pickup truck"}.get(kind, kind))
    say(f"with {'big' if radius > 0.35 else 'small' if radius < 0.32 else 'medium'} wheels")
    floor, belt = radius * 0.7, r.uniform(0.85, 0.98)
    high = r.uniform(1.38, 1.55)
    # Along the side, from the rear (z = -1/2) to the front: where the glass and the roof are.
    rear, roof_rear, roof_front, front = {
        "saloon": (-0.33, -0.2, 0.06, 0.22), "hatchback": (-0.47, -0.38, 0.06, 0.24),
        "van": (-0.49, -0.46, 0.24, 0.4), "pickup": (-0.06, -0.02, 0.14, 0.26),
        "sports": (-0.4, -0.1, 0.02, 0.24),
    }[kind]  # fmt: skip
    if kind == "van":
        high = r.uniform(1.75, 2.1)
    elif kind == "sports":
        belt, high = belt - 0.14, r.uniform(1.1, 1.22)
    nose, tail = belt - r.uniform(0.05, 0.28), belt - r.uniform(0.0, 0.1)
    drop = belt - nose
    say(f"with a {'steep' if drop > 0.2 else 'level' if drop < 0.12 else 'sloping'} bonnet")
    body = [(-0.5, floor + 0.12), (-0.5, tail), (-0.4, belt), (front, belt), (0.47, nose),
            (0.5, floor + 0.15), (0.46, floor), (-0.46, floor)]  # fmt: skip
    glass = [(rear, belt), (roof_rear, high), (roof_front, high), (front, belt)]
    parts = [side_cut([(z * d, y) for z, y in body], w)]
    rings = np.array(
        [
            [(s * w * (0.49 if y <= belt else 0.4), y, z * d) for z, y in glass]
            for s in (-1, 1)
        ]
    )  # fmt: skip
    parts.append(loft(rings))
    axles = (-r.uniform(0.29, 0.33) * d, r.uniform(0.3, 0.34) * d)
    parts += [moved(wheel(radius, 0.22), (s * (w / 2 - 0.06), radius, z))
              for s in (-1, 1) for z in axles]  # fmt: skip
    if kind == "pickup":
        deep = 0.4 * d
        for s in (-1, 1):
            parts.append(box((s * (w / 2 - 0.04), belt + 0.1, -0.28 * d), (0.06, 0.25, deep)))
        parts.append(box((0, belt + 0.1, -0.48 * d), (w, 0.25, 0.06)))
    if kind == "sports" and r.random() < 0.6:
        say("with a spoiler")
        parts.append(box((0, belt + 0.16, -0.46 * d), (w * 0.85, 0.03, 0.25)))
        parts += [box((s * w * 0.3, belt + 0.07, -0.46 * d), (0.04, 0.18, 0.1)) for s in (-1, 1)]
    parts += [box((s * (w / 2 + 0.07), belt + 0.07, front * d * 0.9), (0.16, 0.12, 0.08))
              for s in (-1, 1)]  # fmt: skip
    return parts


def _airplane(r: random.Random, say: Say = _unsaid) -> list[Part]:
    kind = r.choice(("airliner", "airliner", "propeller", "fighter"))
    say({"propeller": "propeller airplane", "fighter": "fighter jet"}.get(kind, kind))
    d, radius = 4.0, {"airliner": r.uniform(0.2, 0.27), "propeller": r.uniform(0.22, 0.32),
                      "fighter": r.uniform(0.18, 0.24)}[kind]  # fmt: skip
    z = np.array([-0.5, -0.38, -0.15, 0.2, 0.36, 0.45, 0.5]) * d
    fat = np.array([0.12, 0.5, 0.95, 1.0, 0.85, 0.5, 0.05]) * radius
    lift = np.array([0.7, 0.4, 0.05, 0, 0, -0.1, -0.15]) * radius
    body = tube([(0, float(y), float(a)) for y, a in zip(lift, z, strict=True)], fat.tolist(), 16)
    parts = [body]
    swept = {"airliner": r.uniform(0.6, 1.1), "propeller": r.uniform(-0.1, 0.15),
             "fighter": r.uniform(0.9, 1.3)}[kind]  # fmt: skip
    span = d * (r.uniform(0.26, 0.34) if kind == "fighter" else r.uniform(0.42, 0.55))
    chord = d * (r.uniform(0.3, 0.42) if kind == "fighter" else r.uniform(0.16, 0.24))
    tip, rise = chord * r.uniform(0.2, 0.5), r.uniform(-0.05, 0.12) * span
    if kind == "propeller":
        tip = chord * r.uniform(0.7, 1.0)
    level = r.choice((-0.5, 0.0, 0.8))
    y = radius * level
    seat = "low" if level < 0 else "high" if level > 0 else "mid"
    say(f"with {'swept' if swept > 0.85 else 'straight'} {seat}-set wings")
    middle = r.uniform(0.0, 0.2)
    for s in (-1, 1):
        end = (s * span, y + rise, middle - swept)
        parts.append(wing((0, y, middle), end, chord, tip, 0.09))
        tail = (s * span * r.uniform(0.34, 0.4), radius * 0.6, -0.45 * d - swept * 0.25)
        parts.append(wing((0, radius * 0.5, -0.43 * d), tail, chord * 0.5, tip * 0.6, 0.05))
    fins = (-0.35, 0.35) if kind == "fighter" and r.random() < 0.5 else (0.0,)
    if len(fins) > 1:
        say("with two fins")
    for x in fins:
        high = radius + r.uniform(0.4, 0.65)
        fin = wing((0, 0, 0), (high, 0, -0.25 - abs(swept) * 0.25), chord * 0.55, tip * 0.8, 0.05)
        parts.append(moved(rotated(fin, 2, 90 - 30 * x), (x * radius * 2, 0.1, -0.4 * d)))
    if kind == "airliner":
        engines = r.choice(((0.3,), (0.3, 0.3), (0.28, 0.5)))
        say(f"with {COUNTS[2 * len(set(engines))]} engines")
        for at in engines:
            for s in (-1, 1):
                x = s * at * span * (1.0 if at < 0.4 else 1.1)
                engine = turned([(0.07, -0.22), (0.12, 0.0), (0.12, 0.25)], 14, closed=False)
                place = (x, y + rise * at - 0.16, middle - swept * at + chord * 0.3)
                parts.append(moved(rotated(engine, 0, 90), place))
    elif kind == "propeller":
        turn = r.uniform(0, 180)
        for k in range(2):
            blade = box((0, 0, 0), (1.0, 0.08, 0.03))
            parts.append(moved(rotated(blade, 2, turn + 90 * k), (0, -0.03, 0.5 * d)))
        for s in (-1, 1):
            foot = (s * 0.3, -radius - 0.3, 0.2 * d)
            parts.append(tube([(s * 0.1, -radius * 0.5, 0.2 * d), foot], 0.03, 6))
            parts.append(moved(wheel(0.13, 0.08), foot))
    else:
        parts.append(cushion((0, radius, 0.22 * d), (radius, radius, 0.9), 2))
    return parts


def _boat(r: random.Random, say: Say = _unsaid) -> list[Part]:
    d, w, high = r.uniform(3, 5), r.uniform(1.0, 1.5), r.uniform(0.5, 0.8)
    stern, bow = r.uniform(0.6, 0.95), r.uniform(1.15, 1.5)
    rings = []
    t: float
    z: float
    for t in np.linspace(0, 1, 9):
        half = (
            w / 2 * (stern + (1 - stern) * min(t * 3, 1)) * max(1 - max(t - 0.45, 0) ** 2 * 3.3, 0)
        )
        deck, keel = high * (1 + (bow - 1) * t**2), high * 0.75 * max(t - 0.6, 0) ** 2 * 6
        z = (t - 0.5) * d
        rings.append(
            [(-half, deck, z), (-half * 0.9, deck * 0.5 + keel * 0.5, z), (0, keel, z),
             (half * 0.9, deck * 0.5 + keel * 0.5, z), (half, deck, z)]
        )  # fmt: skip
    parts = [loft(np.array(rings))]
    kind = r.choice(("sail", "motor", "ship", "row"))
    say({"sail": "sailing boat", "motor": "motor boat", "row": "rowing boat"}.get(kind, kind))
    say(f"with a {'pointed' if stern < 0.72 else 'broad' if stern > 0.84 else 'plain'} stern")
    say(f"with a {'high' if bow > 1.35 else 'low'} bow")
    if kind == "sail":
        tall, z = r.uniform(0.9, 1.3) * d, 0.08 * d
        top, boom = high + tall, high + 0.3
        parts.append(tube([(0, high * 0.5, z), (0, top, z)], 0.035, 6))
        parts.append(tube([(0, boom, z), (0, boom, -0.42 * d)], 0.025, 6))
        parts.append(side_cut([(z - 0.05, top - 0.1), (z - 0.05, boom), (-0.42 * d, boom)], 0.01))
        if r.random() < 0.7:
            say("with a second sail")
            sail = [(z + 0.08, top - 0.3), (z + 0.08, boom), (0.47 * d, high * bow)]
            parts.append(side_cut(sail, 0.01))
    elif kind == "row":
        for t in (-0.25, 0.0, 0.22):
            parts.append(box((0, high * 1.02, t * d), (w * 0.95, 0.05, 0.22)))
        for s in (-1, 1):
            parts.append(
                tube([(s * w * 0.2, high + 0.2, 0), (s * w * 1.1, high - 0.3, -0.3)], 0.03)
            )
            parts.append(box((s * w * 1.15, high - 0.33, -0.32), (0.3, 0.03, 0.14)))
    else:
        levels = r.randint(1, 2) if kind == "motor" else r.randint(2, 4)
        say(f"with {COUNTS[levels]} deck{'s' if levels > 1 else ''}")
        long, wide, y, back = r.uniform(0.3, 0.5) * d, w * 0.7, high, -0.1 * d
        for _ in range(levels):
            tall = r.uniform(0.25, 0.4)
            parts.append(box((0, y + tall / 2, back), (wide, tall, long)))
            y, long, wide = y + tall, long * r.uniform(0.55, 0.85), wide * 0.85
        if kind == "ship":
            for z in (back - long * 0.2, back + long * 0.2):
                chimney = turned([(0.12, y), (0.1, y + r.uniform(0.3, 0.5))], 14)
                parts.append(moved(chimney, (0, 0, z)))
        else:
            parts.append(tube([(0, y, back), (0, y + 0.5, back - 0.1)], 0.02, 6))
    return parts


def _mug(r: random.Random, say: Say = _unsaid) -> list[Part]:
    radius, tall, thick = r.uniform(0.035, 0.05), r.uniform(0.07, 0.13), 0.004
    flare, belly = r.uniform(0.85, 1.2), r.uniform(0.9, 1.15)
    say(f"with a {'flared' if flare > 1.08 else 'narrow' if flare < 0.96 else 'straight'} rim")
    say(f"with a {'round' if belly > 1.06 else 'slim' if belly < 0.98 else 'plain'} belly")
    outer = [(radius * 0.85, 0.0), (radius, 0.01), (radius * belly, tall * 0.5)]
    inner = [(radius * flare - thick, tall), (radius * belly - thick, tall * 0.5),
             (radius - thick, 0.014), (0.001, 0.012)]  # fmt: skip
    parts = [turned([*outer, (radius * flare, tall), *inner], 32)]
    low, high, reach = tall * 0.18, tall * r.uniform(0.7, 0.9), r.uniform(0.025, 0.04)
    say(f"with a {'big' if reach > 0.0325 else 'small'} handle")
    angle = np.linspace(-math.pi / 2, math.pi / 2, 9)
    middle, half = (low + high) / 2, (high - low) / 2
    loop = [(radius * 0.97 + reach * math.cos(a), middle + half * math.sin(a), 0.0) for a in angle]
    parts.append(tube(loop, r.uniform(0.004, 0.007), 8))
    return parts


def _rocket(r: random.Random, say: Say = _unsaid) -> list[Part]:
    radius, body = r.uniform(0.16, 0.3), r.uniform(1.6, 3.0)
    nose, waist = r.uniform(0.4, 0.9), r.choice((1.0, r.uniform(0.6, 0.85)))
    if waist < 1:
        say("two-stage rocket")
    say(f"with a {'long' if nose > 0.65 else 'short'} nose")
    bend = np.linspace(0, 1, 7)
    profile = [(radius * 0.6, -0.18), (radius * 0.45, -0.02), (radius, 0.0), (radius, body * 0.5),
               (radius * waist, body * 0.56), (radius * waist, body)]  # fmt: skip
    profile += [
        (radius * waist * math.sqrt(1 - float(b) ** 2), body + nose * float(b)) for b in bend
    ]
    parts = [turned(profile)]
    fins, reach, tall = r.choice((3, 4)), r.uniform(0.25, 0.5), r.uniform(0.35, 0.8)
    say(f"with {COUNTS[fins]} {'wide' if reach > 0.375 else 'narrow'} fins")
    sweep = r.uniform(0.0, 0.35)
    for k in range(fins):
        fin = np.array([(0, tall), (0, 0), (reach, -sweep), (reach, tall * 0.35 - sweep)])
        rings = np.array([[(radius * 0.9 + x, y, s * 0.015) for x, y in fin] for s in (-1, 1)])
        parts.append(rotated(loft(rings), 1, 360 * k / fins))
    if r.random() < 0.4:
        say("with boosters")
        small, high = radius * 0.5, body * r.uniform(0.4, 0.6)
        for s in (-1, 1):
            booster = turned([(small, -0.1), (small, high), (0.01, high + 0.35)], 16)
            parts.append(moved(booster, (0, 0, s * (radius + small))))
    return parts


def _skateboard(r: random.Random, say: Say = _unsaid) -> list[Part]:
    d, w, thick = r.uniform(0.7, 0.85), r.uniform(0.17, 0.24), 0.012
    kick, radius = r.uniform(0.02, 0.07), r.uniform(0.024, 0.04)
    say(f"with {'flat' if kick < 0.036 else 'raised' if kick > 0.053 else 'gently raised'} ends")
    say(f"with {'big' if radius > 0.034 else 'small' if radius < 0.029 else 'medium'} wheels")
    high = 2 * radius + 0.035
    rings = []
    z: float
    for t in np.linspace(-1, 1, 25):
        half = w / 2 * math.sqrt(max(1 - max(abs(t) - 0.72, 0) ** 2 / 0.28**2, 0.0009))
        y, z = high + kick * max(abs(t) - 0.6, 0) / 0.4, t * d / 2
        rings.append([(-half, y, z), (half, y, z), (half, y + thick, z), (-half, y + thick, z)])
    parts = [loft(np.array(rings))]
    for s in (-1, 1):
        z = s * d * 0.3
        parts.append(box((0, high - 0.012, z), (0.06, 0.024, 0.09)))
        parts.append(tube([(-w * 0.4, radius, z), (w * 0.4, radius, z)], 0.01, 6))
        parts.append(box((0, (high + radius) / 2, z), (0.05, high - radius, 0.03)))
        parts += [moved(wheel(radius, 0.035), (x * w * 0.42, radius, z)) for x in (-1, 1)]
    return parts


def _mailbox(r: random.Random, say: Say = _unsaid) -> list[Part]:
    w, d, wall = r.uniform(0.18, 0.26), r.uniform(0.4, 0.55), r.uniform(0.1, 0.2)
    post = r.uniform(0.8, 1.1)
    arc = [(math.cos(a) * w / 2, wall + math.sin(a) * w / 2) for a in np.linspace(0, math.pi, 12)]
    outline = [(w / 2, 0.0), *arc, (-w / 2, 0.0)]
    rings = np.array([[(x, post + y, s * d / 2) for x, y in outline] for s in (-1, 1)])
    parts = [loft(rings), box((0, post / 2, 0), (0.08, post, 0.08))]
    parts.append(box((0, post - 0.02, 0), (w * 0.9, 0.04, d * 0.9)))
    if r.random() < 0.7:
        say("with a flag")
        x, y, z = w / 2 + 0.012, post + wall, d * r.uniform(-0.2, 0.3)
        parts.append(box((x, y + 0.08, z), (0.012, 0.2, 0.025)))
        parts.append(box((x, y + 0.15, z + 0.05), (0.012, 0.07, 0.1)))
    if r.random() < 0.5:
        say("with a round foot")
        parts.append(turned([(0.25, 0), (0.25, 0.04), (0.06, 0.08)], 20))
    if r.random() < 0.4:
        say("with a brace")
        brace = [(0, post * 0.7, 0.03), (0, post - 0.02, d * 0.4)]
        parts.append(tube(brace, 0.025, 4))
    return parts


Maker = Callable[[random.Random, Say], list[Part]]
SEEN: dict[str, Maker] = {
    "airplane": _airplane, "bed": _bed, "boat": _boat, "bookshelf": _bookshelf,
    "bottle": _bottle, "car": _car, "chair": _chair, "lamp": _lamp, "sofa": _sofa,
    "table": _table,
}  # fmt: skip
UNSEEN: dict[str, Maker] = {
    "mailbox": _mailbox, "mug": _mug, "rocket": _rocket, "skateboard": _skateboard,
}  # fmt: skip
# Extent along one axis over that along another: the word below a bound, the word above another.
# A third of the shapes of a category is below, a third above.
_X, _Y, _Z = range(3)
_PROPORTIONS: dict[str, tuple[int, int, float, str, float, str]] = {
    "airplane": (_X, _Z, 0.78, "short-winged", 0.97, "long-winged"),
    "bed": (_Y, _Z, 0.4, "low", 0.5, "tall"),
    "boat": (_X, _Z, 0.3, "slender", 0.46, "broad"),
    "bookshelf": (_Y, _X, 1.16, "wide", 1.61, "tall"),
    "bottle": (_Y, _X, 2.75, "squat", 3.6, "slender"),
    "car": (_Z, _Y, 2.64, "short", 3.2, "long"),
    "chair": (_Y, _X, 1.37, "wide", 1.74, "tall"),
    "lamp": (_Y, _X, 2, "squat", 2.8, "slender"),
    "sofa": (_Y, _Z, 0.84, "low", 1.0, "tall"),
    "table": (_X, _Z, 1.13, "short", 1.8, "long"),
    "mailbox": (_Y, _Z, 2.3, "squat", 2.65, "tall"),
    "mug": (_Y, _X, 0.67, "squat", 0.84, "tall"),
    "rocket": (_Y, _X, 2.3, "squat", 3.5, "slender"),
    "skateboard": (_X, _Z, 0.257, "narrow", 0.28, "wide"),
}
LENGTHS = {"train": 2000, "val": 200, "test": 200, "unseen": 80}
