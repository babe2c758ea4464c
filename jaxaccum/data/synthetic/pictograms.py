"""What the embedded scenes are drawn with: colours, flat shapes, and a pictogram for each class.

A pictogram stands on y = 0 and is 1 high, x to the right and y up, centred near x = 0.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Colour = tuple[float, float, float]
Points = NDArray[np.float32]


class Part(NamedTuple):
    """A flat polygon: (k, 2) points, its RGB colour, and whether it shapes the silhouette."""

    points: Points
    colour: Colour
    outline: bool = True


def polygon(*points: float) -> Points:
    return np.array(points, np.float32).reshape(-1, 2)


def rectangle(left: float, bottom: float, right: float, top: float) -> Points:
    return polygon(left, bottom, right, bottom, right, top, left, top)


_CIRCLE = np.stack(
    [
        np.cos(np.linspace(0, 2 * np.pi, 24, endpoint=False)),
        np.sin(np.linspace(0, 2 * np.pi, 24, endpoint=False)),
    ],
    axis=1,
).astype(np.float32)


def ellipse(x: float, y: float, rx: float, ry: float) -> Points:
    return _CIRCLE * np.array([rx, ry], np.float32) + np.array([x, y], np.float32)


def stroke(points: Points, width: float) -> Points:
    """The outline of a line of some width through points, for lines that do not turn sharply."""
    along = np.gradient(points, axis=0)
    across = np.stack([-along[:, 1], along[:, 0]], axis=1)
    across *= width / 2 / np.maximum(np.linalg.norm(across, axis=1, keepdims=True), 1e-6)
    return np.concatenate([points + across, (points - across)[::-1]]).astype(np.float32)


def shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(max(c * factor, 0.0), 255.0) for c in colour)
    return red, green, blue


def mix(first: Colour, second: Colour, part: float) -> Colour:
    red, green, blue = (a + (b - a) * part for a, b in zip(first, second, strict=True))
    return red, green, blue


@dataclass(frozen=True)
class Mood:
    """The hour and the season: colours of the sky (top, bottom), hills, ground and water."""

    top: Colour
    bottom: Colour
    hill: Colour
    ground: Colour
    water: Colour
    kind: Literal["day", "autumn", "snow", "night"] = "day"

    @property
    def dark(self) -> bool:
        return self.kind == "night"


MOODS = (
    Mood(
        (104, 170, 214), (240, 226, 200), (170, 120, 70), (196, 156, 80), (84, 140, 160), "autumn"
    ),
    Mood(
        (150, 190, 222), (232, 238, 244), (160, 178, 196), (232, 238, 244), (110, 150, 180), "snow"
    ),
    Mood((84, 156, 222), (206, 230, 244), (92, 140, 100), (122, 170, 84), (72, 140, 180)),
    Mood((120, 184, 230), (236, 240, 228), (110, 150, 90), (160, 184, 92), (96, 170, 190)),
    Mood((96, 96, 160), (250, 176, 120), (110, 92, 120), (116, 120, 84), (150, 120, 140)),
    Mood((250, 190, 150), (255, 236, 200), (150, 130, 140), (150, 160, 100), (200, 180, 170)),
    Mood((150, 164, 176), (206, 212, 214), (110, 124, 120), (120, 136, 100), (120, 142, 152)),
    Mood((18, 26, 62), (62, 76, 120), (34, 46, 72), (40, 62, 60), (34, 56, 96), "night"),
    Mood((98, 176, 220), (250, 232, 196), (200, 150, 104), (226, 192, 134), (76, 160, 170)),
)

BIRD = polygon(-1, -0.5, -0.4, -0.55, 0, 0, 0.4, -0.55, 1, -0.5)  # y down, as it flies
TUFT = polygon(-1, 0, -0.5, -1, 0, -0.2, 0.4, -1.2, 1, 0)

# fmt: off
_WALLS: Sequence[Colour] = (
    (236, 224, 200), (214, 180, 140), (196, 110, 88), (240, 240, 236), (230, 200, 120),
    (168, 190, 205), (222, 160, 150), (150, 120, 95),
)
_ROOFS: Sequence[Colour] = (
    (160, 62, 48), (110, 60, 50), (80, 86, 100), (66, 92, 120), (130, 84, 50), (84, 104, 84)
)
_PAINTS: Sequence[Colour] = (
    (206, 48, 44), (38, 92, 180), (240, 196, 48), (236, 236, 238), (44, 48, 56), (60, 140, 90),
    (232, 120, 40), (140, 150, 160), (120, 60, 140), (70, 180, 200),
)
# fmt: on
_LEAVES: Sequence[Colour] = ((70, 130, 60), (50, 104, 66), (108, 150, 56), (40, 90, 50))
_AUTUMN: Sequence[Colour] = ((214, 120, 40), (190, 70, 40), (226, 170, 60), (150, 110, 50))


def _two(r: random.Random, colours: Sequence[Colour]) -> list[Colour]:
    return r.sample(list(colours), 2)


def _house(r: random.Random, mood: Mood) -> list[Part]:
    wall, roof = r.choice(_WALLS), r.choice(_ROOFS)
    half, eaves = r.uniform(0.4, 0.8), r.uniform(0.48, 0.66)
    hip = r.choice((0.0, 0.0, 0.35, 0.6)) * half
    parts = []
    if r.random() < 0.6:
        x = r.choice((-1, 1)) * half * r.uniform(0.4, 0.6)
        parts.append(
            Part(rectangle(x - 0.06, eaves, x + 0.06, r.uniform(0.9, 1.0)), shade(roof, 0.8))
        )
    parts.append(Part(rectangle(-half, 0, half, eaves), wall))
    side = half * r.uniform(0.1, 0.5)
    parts.append(Part(rectangle(side, 0, half, eaves), shade(wall, 0.86), False))
    over = half * 1.13
    parts.append(Part(polygon(-over, eaves, over, eaves, hip, 1, -hip, 1), roof))
    parts.append(Part(polygon(side, eaves, over, eaves, hip, 1), shade(roof, 0.84), False))
    pane: Colour = (255, 214, 120) if mood.dark else (120, 160, 190)
    door = r.uniform(-0.7, 0.5) * half
    parts.append(Part(rectangle(door, 0, door + 0.17, 0.34), shade(roof, 0.7), False))
    for x in np.linspace(-half * 0.72, half * 0.72, r.randint(2, 4)):
        if abs(x - door - 0.085) > 0.2:
            low = eaves * 0.42
            parts.append(
                Part(rectangle(x - 0.085, low, x + 0.085, low + 0.19), (245, 242, 235), False)
            )
            parts.append(Part(rectangle(x - 0.06, low + 0.03, x + 0.06, low + 0.16), pane, False))
    return parts


def _tree(r: random.Random, mood: Mood) -> list[Part]:
    turned = r.random() < (0.85 if mood.kind == "autumn" else 0.08)
    leaf = r.choice(_AUTUMN if turned else _LEAVES)
    leaf = shade(leaf, r.uniform(0.8, 1.15))
    bark: Colour = shade((104, 76, 52), r.uniform(0.7, 1.2))
    kind = r.choice(("round", "round", "fir", "fir", "poplar"))
    trunk = r.uniform(0.05, 0.08)
    parts = [Part(polygon(-trunk, 0, trunk, 0, trunk * 0.7, 0.5, -trunk * 0.7, 0.5), bark)]
    if kind == "fir":
        half, tiers = r.uniform(0.22, 0.34), r.randint(3, 4)
        for i in range(tiers):
            low, top = 0.14 + 0.62 * i / tiers, 0.5 + 0.5 * (i + 1) / tiers
            wide = half * (1 - 0.62 * i / tiers)
            dark = shade(leaf, 0.72 + 0.1 * i)
            parts.append(Part(polygon(-wide, low, wide, low, 0, top), dark))
            sunny = polygon(-wide, low, -wide * 0.1, low, 0, top)
            parts.append(Part(sunny, shade(dark, 1.22), False))
        if mood.kind == "snow":
            parts.append(Part(polygon(-0.07, 0.84, 0.07, 0.84, 0, 1), (244, 248, 252), False))
    elif kind == "poplar":
        half = r.uniform(0.13, 0.19)
        parts.append(Part(ellipse(0, 0.56, half, 0.44), leaf))
        parts.append(Part(ellipse(-half * 0.25, 0.6, half * 0.6, 0.34), shade(leaf, 1.18), False))
    else:
        half = r.uniform(0.28, 0.4)
        crown = [(0.0, 0.66, half * 0.8, 0.34)]
        for x in (-1.0, 1.0):
            crown.append((x * half * 0.45, r.uniform(0.5, 0.62), half * 0.55, r.uniform(0.2, 0.26)))
        parts += [Part(ellipse(*blob), shade(leaf, 0.82)) for blob in crown]
        lit = shade(leaf, 1.08)
        for x, y, rx, ry in crown:
            parts.append(Part(ellipse(x - half * 0.14, y + 0.05, rx * 0.7, ry * 0.68), lit, False))
        if r.random() < 0.25 and mood.kind == "day":
            fruit = r.choice(((210, 50, 46), (240, 180, 60), (250, 210, 220)))
            for _ in range(6):
                x, y = r.uniform(-0.7, 0.7) * half, r.uniform(0.48, 0.82)
                parts.append(Part(ellipse(x, y, 0.025, 0.025), fruit, False))
    return parts


def _car(r: random.Random, mood: Mood) -> list[Part]:
    paint, glass = r.choice(_PAINTS), (60, 84, 104) if mood.dark else (150, 196, 220)
    half, belt = r.uniform(0.95, 1.2), r.uniform(0.52, 0.6)
    kind = r.choice(("sedan", "hatch", "van", "pickup"))
    roof = {  # back bottom, back top, front top, front bottom of the cabin, in halves
        "sedan": (-0.68, -0.4, 0.2, 0.52),
        "hatch": (-0.94, -0.8, 0.16, 0.5),
        "van": (-0.97, -0.95, 0.5, 0.82),
        "pickup": (-0.16, -0.1, 0.3, 0.58),
    }[kind]
    a, b, c, d = (v * half for v in roof)
    body = polygon(
        -half, 0.18, half, 0.18, half, belt * 0.82, half * 0.93, belt, -half * 0.97, belt
    )
    parts = [
        Part(polygon(a, belt - 0.02, b, 1, c, 1, d, belt - 0.02), shade(paint, 0.92)),
        Part(body, paint),
        Part(rectangle(-half, 0.18, half, 0.28), shade(paint, 0.66), False),
    ]
    middle = (b + c) / 2 if kind != "pickup" else c
    spans = [(a, b, middle, middle), (middle, middle, c, d)] if middle < c else [(a, b, c, d)]
    for low_l, top_l, top_r, low_r in spans:
        inset = 0.07
        sill, lintel = belt + 0.03, 0.92
        front = polygon(low_r - inset, sill, top_r - inset * 0.8, lintel)
        back = polygon(top_l + inset * 0.8, lintel, low_l + inset, sill)
        pane = np.concatenate([front, back])
        parts.append(Part(pane, glass, False))
    for x in (-0.6 * half, 0.6 * half):
        parts.append(Part(ellipse(x, 0.2, 0.2, 0.2), (34, 34, 38)))
        parts.append(Part(ellipse(x, 0.2, 0.1, 0.1), (176, 178, 184), False))
    parts.append(Part(rectangle(half * 0.93, 0.38, half, 0.48), (255, 240, 170), False))
    parts.append(Part(rectangle(-half, 0.38, -half * 0.95, 0.5), (200, 40, 36), False))
    return parts


def _balloon(r: random.Random, mood: Mood) -> list[Part]:
    half = r.uniform(0.34, 0.42)
    t = np.linspace(0, 1, 14, dtype=np.float32)
    # From the mouth of the envelope up to its crown: a cone that opens into a dome.
    y = 0.22 + 0.78 * t
    wide = half * np.sqrt(np.clip(1 - ((t - 0.62) / np.where(t > 0.62, 0.38, 0.72)) ** 2, 0, 1))
    edges = np.sin(np.linspace(-np.pi / 2, np.pi / 2, r.choice((4, 6, 8, 10)) + 1))
    colours = _two(r, _PAINTS)
    if r.random() < 0.3:
        colours.append(r.choice(_PAINTS))
    rope: Colour = (90, 70, 54)
    parts = [
        Part(stroke(polygon(-0.07, 0.1, -wide[0], 0.24), 0.016), rope),
        Part(stroke(polygon(0.07, 0.1, wide[0], 0.24), 0.016), rope),
        Part(rectangle(-0.08, 0, 0.08, 0.12), (134, 92, 54)),
        Part(rectangle(-0.08, 0.09, 0.08, 0.12), (92, 62, 40), False),
    ]
    for i in range(len(edges) - 1):
        left, right = np.stack([wide * edges[i], y], 1), np.stack([wide * edges[i + 1], y], 1)
        light = 1.12 - 0.34 * (i / max(len(edges) - 2, 1))
        gore = np.concatenate([left, right[::-1]]).astype(np.float32)
        parts.append(Part(gore, shade(colours[i % len(colours)], light)))
    if r.random() < 0.4:
        k = slice(6, 9)
        band = np.concatenate(
            [np.stack([-wide[k], y[k]], 1), np.stack([wide[k], y[k]], 1)[::-1]]
        ).astype(np.float32)
        parts.append(Part(band, r.choice(_PAINTS), False))
    return parts


def _boat(r: random.Random, mood: Mood) -> list[Part]:
    hull = r.choice(_PAINTS)
    half = r.uniform(0.36, 0.52)
    deck = r.uniform(0.17, 0.22)
    shape = polygon(-half * 0.78, 0, half * 0.68, 0, half, deck * 1.15, -half * 0.95, deck)
    parts = []
    if r.random() < 0.68:
        sail: Colour = r.choice(((250, 246, 236), (244, 232, 206), *_PAINTS[:3]))
        mast = r.uniform(-0.12, 0.06)
        stick = rectangle(mast - 0.014, deck * 0.9, mast + 0.014, 1)
        boom = deck + 0.07
        parts.append(Part(stick, (110, 82, 56)))
        main = polygon(mast - 0.02, 0.97, mast - 0.02, boom, -half * 0.92, boom + 0.02)
        parts.append(Part(main, shade(sail, 0.93)))
        if r.random() < 0.75:
            jib = polygon(mast + 0.03, 0.88, mast + 0.03, boom, half * 0.9, boom + 0.01)
            parts.append(Part(jib, sail))
        parts.append(Part(shape, hull))
    else:
        # A fishing boat: lower, so that it is wider for its height.
        shape = shape * np.array([1.7, 1.6], np.float32)
        cabin = rectangle(-0.42 * half, 0.3, 0.5 * half, 0.72)
        parts += [
            Part(rectangle(-0.02, 0.7, 0.02, 1), (110, 82, 56)),
            Part(cabin, (244, 242, 236)),
            Part(rectangle(-0.55 * half, 0.7, 0.62 * half, 0.78), shade(hull, 0.8)),
            Part(rectangle(-0.3 * half, 0.48, 0.0, 0.64), (96, 130, 156), False),
            Part(rectangle(0.12 * half, 0.48, 0.4 * half, 0.64), (96, 130, 156), False),
            Part(shape, hull),
        ]
    stripe = shape * np.array([0.97, 0.35], np.float32)
    parts.append(Part(stripe, shade(hull, 0.62), False))
    return parts


def _kite(r: random.Random, mood: Mood) -> list[Part]:
    half, cross = r.uniform(0.26, 0.34), r.uniform(0.7, 0.78)
    first, second = _two(r, _PAINTS)
    foot = 0.42
    steps = np.linspace(0, 1, 12, dtype=np.float32)
    sway = r.uniform(0.05, 0.09)
    turns = r.uniform(1.2, 2.0) * 2 * np.pi
    line = np.stack([np.sin(steps * turns) * sway * steps, foot * (1 - steps)], 1)
    parts = [Part(stroke(line, 0.03), shade(first, 0.7))]
    for i in (4, 7, 10):
        x, y = line[i]
        bow = polygon(
            x - 0.075, y + 0.045, x - 0.075, y - 0.045, x + 0.075, y + 0.045, x + 0.075, y - 0.045
        )
        parts.append(Part(bow[[0, 1, 2, 3]], second if i == 7 else first))
    spread = ((-half, first, 1.0), (half, second, 0.95))
    for x, colour, light in spread:
        parts.append(Part(polygon(0, 1, x, cross, 0, cross), shade(colour, light)))
    for x, colour, light in ((-half, second, 0.86), (half, first, 0.8)):
        parts.append(Part(polygon(0, foot, x, cross, 0, cross), shade(colour, light)))
    spar = stroke(polygon(0, foot, 0, 1), 0.014)
    parts.append(Part(spar, (70, 56, 46), False))
    parts.append(Part(stroke(polygon(-half, cross, half, cross), 0.014), (70, 56, 46), False))
    return parts


PICTOGRAMS = {
    "house": _house,
    "tree": _tree,
    "car": _car,
    "balloon": _balloon,
    "boat": _boat,
    "kite": _kite,
}
