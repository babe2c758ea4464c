"""The geometry of a street: its camera, what stands on the ground, and the order to paint it in."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Points = NDArray[np.float64]  # (k, 3) or (k, 2)


@dataclass(frozen=True)
class View:
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
class Thing:
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


def _span(thing: Thing, axis: tuple[float, float]) -> tuple[float, float]:
    """Where the footprint of a thing begins and ends along an axis."""
    (p, q), (along, across) = axis, thing.axes
    middle = thing.x * p + thing.z * q
    reach = 0.5 * (
        thing.size[2] * abs(along[0] * p + along[1] * q)
        + thing.size[1] * abs(across[0] * p + across[1] * q)
    )
    return middle - reach, middle + reach


def apart(a: Thing, b: Thing, margin: float) -> bool:
    """Whether a line parallel to a side of one keeps two footprints `margin` apart."""
    if math.hypot(a.x - b.x, a.z - b.z) > 0.5 * (sum(a.size[1:]) + sum(b.size[1:])) + margin:
        return True
    for axis in (*a.axes, *b.axes):
        (low, high), (other_low, other_high) = _span(a, axis), _span(b, axis)
        if low > other_high + margin or other_low > high + margin:
            return True
    return False


def _hides(a: Thing, b: Thing) -> bool:
    """Whether `a` may be in front of `b`: a line between them has only `a` on the camera's side."""
    for axis in (*a.axes, *b.axes):
        (low, high), (other_low, other_high) = _span(a, axis), _span(b, axis)
        # The camera is at the origin, at 0 on every axis.
        if high < other_low > 0 or low > other_high < 0:
            return True
    return False


def back_to_front(things: Sequence[Thing]) -> list[int]:
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


def _bearings(thing: Thing) -> tuple[float, float]:
    """The least and greatest x / z of a footprint."""
    slopes = thing.footprint[:, 0] / np.maximum(thing.footprint[:, 1], 0.1)
    return float(slopes.min()), float(slopes.max())


def wrapped(angle: float) -> float:
    return (angle + math.pi) % (2 * math.pi) - math.pi
