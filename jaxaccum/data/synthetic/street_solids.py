"""What vehicles and people in a street are made of: convex solids, wheels and round limbs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxaccum.data.synthetic.pictograms import Colour
from jaxaccum.data.synthetic.street_view import Floats, Points

TYRE: Colour = (34, 34, 38)
Triple = tuple[float, float, float]
# Two ends as forward, up, left; the radius at each; a colour.
Limb = tuple[Triple, Triple, float, float, Colour]


@dataclass
class Face:
    """A flat face of a solid, (k, 3) forward, up, left, with what is painted on it."""

    points: Points
    colour: Colour
    on: list[tuple[Points, Colour]]


def prism(
    profile: Sequence[tuple[float, float]], halves: Sequence[float], colour: Colour
) -> list[Face]:
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
    return [Face(points, colour, []) for points in faces]


def drawn_in(quad: Points, part: float) -> Points:
    """A face drawn in towards its middle."""
    return np.asarray(quad + (quad.mean(axis=0) - quad) * 2 * part)


def paint_lights(
    solid: list[Face], a: float, b: float, low: float, front: float | None, rear: float | None
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
ROUND = np.stack([np.cos(_TURN), np.sin(_TURN), 0 * _TURN], axis=1)


def wheel_at(x: float, radius: float, side: float) -> list[tuple[Points, Colour]]:
    """A tyre and its hub on a side, standing on the ground."""
    centre = np.array([x, radius, side])
    return [(centre + ROUND * radius, TYRE), (centre + ROUND * radius * 0.55, (150, 152, 156))]


def paint_wheels(solid: list[Face], at: float, b: float, radius: float) -> None:
    for face, side in ((solid[0], b), (solid[1], -b)):
        for x in (-at, at):
            face.on.extend(wheel_at(x, radius, side))


def tyres_below(axles: Sequence[float], b: float, radius: float, floor: float) -> list[list[Face]]:
    """What shows of the wheels below the floor of a vehicle, axle by axle."""
    tyres = []
    for x in axles:
        start, end = x - 0.85 * radius, x + 0.85 * radius
        profile = [(start, 0.0), (end, 0.0), (end, floor), (start, floor)]
        for side in (-1, 1):
            tyre = prism(profile, [0.13 * b] * 4, TYRE)
            for face in tyre:
                face.points = face.points + np.array([0, 0, side * 0.82 * b])
            tyres.append(tyre)
    return tyres


_HALF = np.linspace(np.pi / 2, 3 * np.pi / 2, 8)


def capsule(p: Points, q: Points, start: float, end: float) -> Floats:
    """The outline of a line from p to q (pixels) that is round at its ends, with their radii."""
    angle = math.atan2(q[1] - p[1], q[0] - p[0])
    turn = np.concatenate([_HALF + angle, _HALF + angle + np.pi])
    radii, middle = np.repeat([start, end], len(_HALF)), np.repeat([p, q], len(_HALF), axis=0)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    return np.asarray(middle + circle * radii[:, None], np.float32)


def cross(a: Points, b: Points) -> Points:
    (a0, a1, a2), (b0, b1, b2) = a.tolist(), b.tolist()
    return np.array([a1 * b2 - a2 * b1, a2 * b0 - a0 * b2, a0 * b1 - a1 * b0])
