"""Builds cars, airplanes, boats, rockets and skateboards."""

from __future__ import annotations

import math
import random

import numpy as np

from jaxaccum.data.synthetic.shape_parts import (
    COUNTS,
    Part,
    Say,
    box,
    cushion,
    loft,
    moved,
    rotated,
    side_cut,
    tube,
    turned,
    unsaid,
    wheel,
    wing,
)


def car(r: random.Random, say: Say = unsaid) -> list[Part]:
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


def airplane(r: random.Random, say: Say = unsaid) -> list[Part]:
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


def boat(r: random.Random, say: Say = unsaid) -> list[Part]:
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


def rocket(r: random.Random, say: Say = unsaid) -> list[Part]:
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


def skateboard(r: random.Random, say: Say = unsaid) -> list[Part]:
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
