"""Builds chairs, tables, sofas, beds, bookshelves, lamps and mailboxes."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import numpy as np

from jaxaccum.data.synthetic.shape_parts import (
    COUNTS,
    Part,
    Say,
    box,
    cushion,
    four,
    loft,
    moved,
    rotated,
    tube,
    turned,
    unsaid,
)


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


def chair(r: random.Random, say: Say = unsaid) -> list[Part]:
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


def table(r: random.Random, say: Say = unsaid) -> list[Part]:
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


def sofa(r: random.Random, say: Say = unsaid) -> list[Part]:
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


def bed(r: random.Random, say: Say = unsaid) -> list[Part]:
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


def bookshelf(r: random.Random, say: Say = unsaid) -> list[Part]:
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


def lamp(r: random.Random, say: Say = unsaid) -> list[Part]:
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


def mailbox(r: random.Random, say: Say = unsaid) -> list[Part]:
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
