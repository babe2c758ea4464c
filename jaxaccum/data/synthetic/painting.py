"""Paints a planned picture of flat polygons, and finds what shows of each of its items."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from jaxaccum.data.base import Image
from jaxaccum.data.synthetic.pictograms import Colour, Part, Points

_SHIFT = 4  # fractional bits of OpenCV's polygon coordinates


@dataclass
class Item:
    """Something painted over what is behind it.

    Attributes:
      label: class id, or -1 for what carries no label.
      parts: from back to front, in pixels.
      depth: items with more are painted later.
    """

    label: int
    parts: list[Part]
    depth: float


@dataclass
class Plan:
    """A scene before it is painted: all its random choices.

    Attributes:
      size: (height, width) in pixels.
      rows: (H, 3) colour of each row of the empty background.
      items: sorted by depth.
      contrast, brightness, tint: of the finished picture.
      noise: strength of the grain.
      offset: where the grain is cut from its tile.
      blur: of the finished picture, in pixels.
    """

    size: tuple[int, int]
    rows: NDArray[np.float32]
    items: list[Item] = field(default_factory=list)
    contrast: float = 1.0
    brightness: float = 0.0
    tint: Colour = (1.0, 1.0, 1.0)
    noise: float = 0.0
    offset: tuple[int, int] = (0, 0)
    blur: float = 0.0


def _fixed(points: Points) -> NDArray[np.int32]:
    # OpenCV's coordinates are of pixel centres, ours of pixel edges: half a pixel apart.
    return np.asarray(np.rint((points - 0.5) * (1 << _SHIFT)), np.int32)


def visible(plan: Plan) -> Iterator[tuple[int, float, tuple[int, int, int, int]]]:
    """Yields (item, part of its pixels that show, box of those) for each labelled item."""
    height, width = plan.size
    shown = np.zeros(plan.size, np.uint8)
    whole: dict[int, tuple[int, tuple[slice, slice]]] = {}
    first = next((k for k, item in enumerate(plan.items) if item.label >= 0), len(plan.items))
    for k, item in enumerate(plan.items[first:], first):
        value = len(whole) + 1 if item.label >= 0 else 0
        outlines = [part.points for part in item.parts if part.outline]
        for points in outlines:
            cv2.fillPoly(shown, [_fixed(points)], value, cv2.LINE_8, _SHIFT)
        if value:
            points = np.concatenate(outlines)
            x1, y1 = np.maximum(points.min(axis=0) - 2, 0).astype(int)
            x2, y2 = points.max(axis=0).astype(int) + 3
            window = slice(y1, min(y2, height)), slice(x1, min(x2, width))
            whole[k] = int(np.count_nonzero(shown[window] == value)), window
    for value, (k, (pixels, window)) in enumerate(whole.items(), 1):
        mask = (shown[window] == value).view(np.uint8)
        x, y, w, h = cv2.boundingRect(mask)
        left, top = window[1].start + x, window[0].start + y
        share = cv2.countNonZero(mask) / max(pixels, 1)
        yield k, share, (left, top, left + w, top + h)


@functools.cache
def _grain() -> NDArray[np.uint8]:
    """A tile of film grain around 128: fine noise and soft blotches."""
    side = 2048
    rng = np.random.Generator(np.random.PCG64(7))
    fine = rng.normal(0, 38, (side, side, 1)) + rng.normal(0, 20, (side, side, 3))
    soft = cv2.GaussianBlur(rng.normal(0, 1, (side, side)), (0, 0), 5)[..., None]
    return np.asarray(np.clip(128 + fine + soft * (30 / soft.std()), 0, 255), np.uint8)


def paint(plan: Plan) -> Image:
    """The finished picture of a plan."""
    height, width = plan.size
    rows = np.clip(plan.rows, 0, 255).astype(np.uint8)
    image: Image = np.empty((height, width, 3), np.uint8)
    image[:] = rows[:, None]
    for item in plan.items:
        for points, colour, _ in item.parts:
            cv2.fillPoly(image, [_fixed(points)], colour, cv2.LINE_AA, _SHIFT)
    if plan.blur:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), plan.blur), np.uint8)
    y, x = plan.offset
    tile = _grain()[y : y + height, x : x + width]
    grained = cv2.addWeighted(image, 1.0, tile, plan.noise, -128 * plan.noise)
    return np.asarray(cv2.LUT(grained, _tone(plan)), np.uint8)


def _tone(plan: Plan) -> NDArray[np.uint8]:
    """(1, 256, 3): what each level of each channel becomes."""
    levels = np.arange(256, dtype=np.float32)[:, None]
    toned = (128 + (levels - 128) * plan.contrast + plan.brightness) * np.array(plan.tint)
    return np.asarray(np.clip(toned, 0, 255), np.uint8)[None]
