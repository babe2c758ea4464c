"""What the embedded shapes are built of: surfaces lofted through rings of points."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# (triangles, 3 corners, 3 coordinates)
Part = NDArray[np.float64]
Vector = Sequence[float]
# A maker tells what it builds: "with ..." for a part, else another noun than its category's.
Say = Callable[[str], object]
COUNTS = ("no", "one", "two", "three", "four", "five", "six")


def unsaid(phrase: str) -> None:
    del phrase


def surface_points(triangles: Part, count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """(count, 3) float32, uniform in each triangle, as many in each as its area asks for."""
    a, b, c = triangles.transpose(1, 0, 2)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    # Rounding the running sum loses and invents no point.
    ends = np.rint(np.cumsum(area) / area.sum() * count).astype(np.int64)
    of = np.repeat(np.arange(len(a)), np.diff(ends, prepend=0))
    u, v = np.sqrt(rng.random((count, 1))), rng.random((count, 1))
    return np.asarray((1 - u) * a[of] + u * (1 - v) * b[of] + u * v * c[of], np.float32)


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
