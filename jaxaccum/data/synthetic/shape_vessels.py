"""Builds bottles and mugs."""

from __future__ import annotations

import math
import random

import numpy as np

from jaxaccum.data.synthetic.shape_parts import Part, Say, tube, turned, unsaid


def bottle(r: random.Random, say: Say = unsaid) -> list[Part]:
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


def mug(r: random.Random, say: Say = unsaid) -> list[Part]:
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
