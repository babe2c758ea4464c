"""Draws what stands in a street: cars, vans, trucks, pedestrians, cyclists, trees and lamps."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxaccum.data.synthetic.pictograms import Colour, Mood, Part, mix, shade, stroke
from jaxaccum.data.synthetic.street_solids import (
    ROUND,
    TYRE,
    Face,
    Limb,
    Triple,
    capsule,
    cross,
    drawn_in,
    paint_lights,
    paint_wheels,
    prism,
    tyres_below,
    wheel_at,
)
from jaxaccum.data.synthetic.street_view import Points, Thing, View

_GLASS: Colour = (62, 78, 96)
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
# fmt: on


@dataclass(frozen=True)
class Artist:
    """Draws the things of one street in its light.

    Attributes:
      r: of the scene; drawing takes its colours and poses from it.
      view: the camera.
      mood: the hour and the season.
      sun: (3,), the unit vector towards it.
    """

    r: random.Random
    view: View
    mood: Mood
    sun: Points

    @property
    def light(self) -> float:
        return 0.55 if self.mood.dark else 1.0

    @property
    def haze(self) -> Colour:
        return self.mood.bottom

    def lit(self, colour: Colour, normal: Points) -> Colour:
        """A colour under the sun; `normal` (3,) is of the surface."""
        return shade(colour, self.light * (0.66 + 0.42 * max(float(normal @ self.sun), 0.0)))

    def far(self, colour: Colour, thing: Thing) -> Colour:
        return mix(colour, self.haze, 1 - math.exp(-thing.z / 160))

    def shadow(self, thing: Thing) -> list[Part]:
        if not thing.kind:
            return []
        centre = np.array([thing.x, thing.z])
        flat = centre + (thing.footprint - centre) * 1.08
        if thing.kind in ("Pedestrian", "Cyclist"):
            (along, across), (_, width, length) = np.array(thing.axes), thing.size
            turned = ROUND @ [[length / 2, 0], [0, width / 2], [0, 0]]
            flat = centre + turned @ np.stack([along, across])
        if flat[:, 1].min() < 1.5:
            return []
        ground = self.view.ground(*flat.ravel())
        return [Part(ground, shade((62, 62, 66), 0.6 if self.mood.dark else 1.0))]

    def draw(self, thing: Thing) -> list[Part]:
        draw: dict[str, Callable[[Thing], list[Part]]] = {
            "Car": self._car,
            "Van": self._van,
            "Truck": self._truck,
            "Pedestrian": self._pedestrian,
            "Cyclist": self._cyclist,
            "": self._tree,
        }
        return draw[thing.kind](thing)

    def _placed(self, thing: Thing, local: Points) -> Points:
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

    def _solids(self, thing: Thing, solids: Sequence[Sequence[Face]]) -> list[Part]:
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
                normal = cross(second - first, third - first)
                if normal @ (first - middle) < 0:
                    normal = -normal
                if normal @ first < 0:  # it looks towards the camera
                    normal = normal / math.sqrt(float(normal @ normal))
                    colours = [face.colour, *(colour for _, colour in face.on)]
                    for k, colour in enumerate(colours, at):
                        seen = self.far(self.lit(colour, normal), thing)
                        # Of what is painted on a face, only tyres stick out of it.
                        outline = k == at or colour is TYRE
                        parts.append(Part(flat[starts[k] : ends[k]], seen, outline))
                at += 1 + len(face.on)
        return parts

    def _car(self, thing: Thing) -> list[Part]:
        height, width, length = thing.size
        a, b, h = length / 2, width / 2, height
        paint_ = self.r.choice(_PAINTS)
        body = prism(
            [
                (-a, 0.17 * h), (a, 0.17 * h), (a, 0.46 * h),
                (0.4 * a, 0.6 * h), (-0.8 * a, 0.6 * h), (-a, 0.56 * h),
            ],
            [b] * 6, paint_,
        )  # fmt: skip
        paint_lights(body, a, b, 0.17 * h, 0.46 * h, 0.56 * h)
        paint_wheels(body, a * 0.6, b, 0.2 * h)
        cabin = prism(
            [(0.45 * a, 0.58 * h), (0.08 * a, h), (-0.58 * a, h), (-0.88 * a, 0.58 * h)],
            [b * 0.95, b * 0.78, b * 0.78, b * 0.95], paint_,
        )  # fmt: skip
        for face, inset in ((cabin[2], 0.1), (cabin[4], 0.16)):
            face.on.append((drawn_in(face.points, inset), _GLASS))
        for side in cabin[:2]:
            low, front, back, end = side.points  # along the profile
            pillar = low * 0.48 + end * 0.52, front * 0.5 + back * 0.5
            for window in ((low, front, pillar[1], pillar[0]), (pillar[0], pillar[1], back, end)):
                side.on.append((drawn_in(np.array(window), 0.14), _GLASS))
        tyres = tyres_below((-a * 0.6, a * 0.6), b, 0.2 * h, 0.17 * h)
        return self._solids(thing, [*tyres, body, cabin])

    def _van(self, thing: Thing) -> list[Part]:
        height, width, length = thing.size
        a, b, h = length / 2, width / 2, height
        body = prism(
            [(-a, 0.13 * h), (a, 0.13 * h), (a, 0.46 * h), (0.62 * a, h), (-a, h)],
            [b, b, b, 0.9 * b, 0.9 * b], self.r.choice(_PAINTS),
        )  # fmt: skip
        paint_lights(body, a, b, 0.13 * h, 0.4 * h, 0.5 * h)
        paint_wheels(body, a * 0.62, b, 0.15 * h)
        body[4].on.append((drawn_in(body[4].points, 0.1), _GLASS))
        rear = np.array([(-a, 0.62 * h, -0.7 * b), (-a, 0.62 * h, 0.7 * b),
                         (-a, 0.9 * h, 0.6 * b), (-a, 0.9 * h, -0.6 * b)])  # fmt: skip
        body[-1].on.append((rear, _GLASS))
        for side, sign in ((body[0], 1), (body[1], -1)):
            low, high = sign * b * 0.97, sign * b * 0.92
            for start, end in ((0.45, 0.8), (-0.1, 0.38)):
                window = [(end * a, 0.58 * h, low), (start * a, 0.58 * h, low),
                          (start * a, 0.9 * h, high), (end * a * 0.82, 0.9 * h, high)]  # fmt: skip
                side.on.append((np.array(window), _GLASS))
        tyres = tyres_below((-a * 0.62, a * 0.62), b, 0.15 * h, 0.13 * h)
        return self._solids(thing, [*tyres, body])

    def _truck(self, thing: Thing) -> list[Part]:
        height, width, length = thing.size
        a, b, h = length / 2, width / 2, height
        split = a - 2.1
        box = prism(
            [(-a, 0.25 * h), (split, 0.25 * h), (split, h), (-a, h)], [b] * 4,
            self.r.choice(((232, 232, 228), (214, 208, 190), (70, 110, 160), (176, 70, 60))),
        )  # fmt: skip
        cab = prism(
            [(split + 0.1, 0.12 * h), (a, 0.12 * h), (a, 0.42 * h), (a - 0.2, 0.8 * h),
             (split + 0.1, 0.8 * h)],
            [b * 0.98] * 5, self.r.choice(_PAINTS),
        )  # fmt: skip
        paint_lights(cab, a, b * 0.98, 0.12 * h, 0.3 * h, None)
        paint_lights(box, a, b, 0.25 * h, None, 0.4 * h)
        cab[4].on.append((drawn_in(cab[4].points, 0.1), _GLASS))
        wheel = 0.16 * h
        for side, sign in ((0, 1), (1, -1)):
            for solid, x in ((box, -0.72 * a), (box, -0.45 * a), (cab, a - 1.1)):
                solid[side].on.extend(wheel_at(x, wheel, sign * b))
            window = [(a - 0.45, 0.45 * h), (split + 0.5, 0.45 * h), (split + 0.5, 0.72 * h),
                      (a - 0.6, 0.72 * h)]  # fmt: skip
            cab[side].on.append((np.array([(x, y, sign * b) for x, y in window]), _GLASS))
        # What is on the camera's side of the plane between the two is in front.
        (forward, _) = thing.axes
        ahead = -(thing.x * forward[0] + thing.z * forward[1]) > split
        tyres = tyres_below((-0.72 * a, -0.45 * a), b, wheel, 0.25 * h)
        tyres += tyres_below((a - 1.1,), b, wheel, 0.12 * h)
        return self._solids(thing, [*tyres, *((box, cab) if ahead else (cab, box))])

    def _limbs(self, thing: Thing, limbs: Sequence[Limb]) -> list[Part]:
        """Round limbs, the far ones first."""
        ends = self._placed(thing, np.array([end for limb in limbs for end in limb[:2]]))
        flat = self.view.pixels(ends)
        depth = ends[:, 2]
        drawn = []
        for k, (_, _, start, end, colour) in enumerate(limbs):
            i, j = 2 * k, 2 * k + 1
            outline = capsule(
                flat[i], flat[j],
                max(start * self.view.focal / depth[i], 0.45),
                max(end * self.view.focal / depth[j], 0.45),
            )  # fmt: skip
            seen = self.far(shade(colour, self.light * 0.97), thing)
            drawn.append((float(depth[i] + depth[j]), Part(outline, seen)))
        drawn.sort(key=lambda one: -one[0])
        return [part for _, part in drawn]

    def _pedestrian(self, thing: Thing) -> list[Part]:
        r, (h, w, length) = self.r, thing.size
        shirt, legs, shoe = r.choice(_CLOTHES), r.choice(_TROUSERS), (40, 36, 34)
        skin, hair = r.choice(_SKINS), r.choice(_HAIRS)
        step, wide = length / 2 - 0.05 * h, w / 2 - 0.03 * h
        swing = r.choice((-1, 1))
        foot = 0.03 * h
        limbs: list[Limb] = [
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

    def _cyclist(self, thing: Thing) -> list[Part]:
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
            parts.append(Part(stroke(flat, thick), self.far(shade(TYRE, self.light), thing)))
        seat, crank, head, grip = (-0.18, 0.92, 0), (0.0, 0.3, 0), (0.42, 0.9, 0), (0.4, 1.02, 0)
        thin = 0.022
        limbs: list[Limb] = [
            ((-hub, wheel, 0), seat, thin, thin, frame),
            ((-hub, wheel, 0), crank, thin, thin, frame),
            (seat, crank, thin, thin, frame),
            (crank, head, thin, thin, frame),
            (seat, head, thin, thin, frame),
            ((hub, wheel, 0), grip, thin, thin, frame),
            ((0.4, 1.02, -wide), (0.4, 1.02, wide), thin, thin, TYRE),
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

    def _tree(self, thing: Thing) -> list[Part]:
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
        crown: list[Limb] = []
        for k in range(6):
            up, out = tall * r.uniform(0.62, 0.98), r.uniform(-0.9, 0.9)
            at: Triple = (out, up, r.uniform(-0.6, 0.6))
            puff = r.uniform(0.5, 0.85)
            crown.append((at, at, puff, puff, shade(leaf, 0.82 + 0.06 * k)))
        return trunk + self._limbs(thing, crown)
