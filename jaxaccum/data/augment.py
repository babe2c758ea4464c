"""Augmentation of detection samples: pure functions of a sample and a random generator.

The order is mosaic, affine, mixup, HSV, flips. Pixel coordinates are continuous: pixel i covers
[i, i + 1), so an image of width w spans 0 to w, and boxes follow pixels exactly.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from jaxaccum.data.base import Boxes, Classes, Image

FILL = 114  # grey of whatever no image covers
_MIN_SIDE = 2.0  # pixels; smaller boxes are dropped after the affine
_MIN_AREA = 0.10  # of a box's own area that must stay in view
_MAX_ASPECT = 100.0


@dataclasses.dataclass(frozen=True)
class Augment:
    """The hyperparameters of augmentation; part of the recipe.

    Attributes:
      mosaic: probability of composing four images.
      mixup: probability of blending with a second sample.
      degrees: rotation, drawn from +-degrees.
      translate: shift, drawn from +-translate of the image size.
      scale: zoom, drawn from 1 +- scale.
      shear: shear along x and y, drawn from +-shear degrees.
      perspective: perspective coefficients, drawn from +-perspective (at most 0.001).
      hsv_h: hue shift, drawn from +-hsv_h of the colour circle.
      hsv_s: saturation gain, drawn from 1 +- hsv_s.
      hsv_v: value gain, drawn from 1 +- hsv_v.
      flipud: probability of an up-down flip.
      fliplr: probability of a left-right flip.
    """

    mosaic: float = 1.0
    mixup: float = 0.0
    degrees: float = 0.0
    translate: float = 0.1
    scale: float = 0.5
    shear: float = 0.0
    perspective: float = 0.0
    hsv_h: float = 0.015
    hsv_s: float = 0.7
    hsv_v: float = 0.4
    flipud: float = 0.0
    fliplr: float = 0.5

    def __post_init__(self) -> None:
        highest = {"degrees": 180.0, "shear": 89.0, "perspective": 0.001}
        for field in dataclasses.fields(self):
            value, top = getattr(self, field.name), highest.get(field.name, 1.0)
            if not 0 <= value <= top:
                raise ValueError(f"{field.name} is {value}, expected 0 to {top:g}.")
        if self.scale == 1:
            raise ValueError("scale is 1, which would zoom images to nothing; expected below 1.")

    def without_mosaic(self) -> Augment:
        """The same without mosaic and mixup, for the last epochs."""
        return dataclasses.replace(self, mosaic=0.0, mixup=0.0)


class Sample(NamedTuple):
    """An image with its objects: (H, W, 3) uint8, (n, 4) float32 xyxy pixels, (n,) int32."""

    image: Image
    boxes: Boxes
    classes: Classes


def augmented(
    load: Callable[[int], Sample],
    index: int,
    count: int,
    size: int,
    augment: Augment,
    rng: np.random.Generator,
) -> Sample:
    """Loads sample `index` and augments it to a square.

    Args:
      load: returns a sample resized by `resize_long`; its image is not written to.
      index: the sample.
      count: samples in the data set; mosaic and mixup draw partners from all of it.
      size: side of the result in pixels.
      augment: the hyperparameters.
      rng: the only source of randomness.

    Returns:
      A sample of (size, size, 3).
    """

    def composed(first: int) -> Sample:
        sample = load(first)
        if rng.random() < augment.mosaic:
            partners = [load(int(i)) for i in rng.integers(count, size=3)]
            sample = mosaic([sample, *partners], size, rng)
        return affine(sample, size, augment, rng)

    sample = composed(index)
    if rng.random() < augment.mixup:
        sample = mixup(sample, composed(int(rng.integers(count))), rng)
    sample = sample._replace(image=hsv(sample.image, augment, rng))
    return flips(sample, augment, rng)


def resize_long(image: Image, size: int) -> Image:
    """Resizes so that the long side is `size` pixels; the other is rounded up."""
    height, width = image.shape[:2]
    if max(height, width) == size:
        return image
    new = long_sized(height, width, size)
    return np.asarray(cv2.resize(image, new[::-1], interpolation=cv2.INTER_LINEAR), np.uint8)


def long_sized(height: int, width: int, size: int) -> tuple[int, int]:
    """The (height, width) that `resize_long` gives an image of that size."""
    ratio = size / max(height, width)
    return min(math.ceil(height * ratio), size), min(math.ceil(width * ratio), size)


def letterbox(
    image: Image, size: int, shape: tuple[int, int] | None = None
) -> tuple[Image, NDArray[np.float32], NDArray[np.float32]]:
    """Fits an image into a square of `size` pixels, centred on grey; or into a part of it.

    Args:
      image: (H, W, 3) uint8.
      size: of the long side of the fitted image, in pixels.
      shape: (height, width) of the canvas, which the fitted image has room in; None: the square.

    Returns:
      The (size, size, 3) or (*shape, 3) image; ratio (2,) and pad (2,) float32, both x then y, that
      map coordinates: x_canvas = x * ratio_x + pad_x.
    """
    resized = resize_long(image, size)
    height, width = resized.shape[:2]
    rows, columns = (size, size) if shape is None else shape
    top, left = round((rows - height) / 2 - 0.1), round((columns - width) / 2 - 0.1)
    canvas = np.full((rows, columns, 3), FILL, np.uint8)
    canvas[top : top + height, left : left + width] = resized
    ratio = np.array([width / image.shape[1], height / image.shape[0]], np.float32)
    return canvas, ratio, np.array([left, top], np.float32)


def mosaic(samples: Sequence[Sample], size: int, rng: np.random.Generator) -> Sample:
    """Puts four samples around a random centre on a canvas of (2 size, 2 size, 3).

    Boxes are clipped to the canvas; those left without area are dropped.
    """
    full = 2 * size
    canvas = np.full((full, full, 3), FILL, np.uint8)
    cx, cy = (int(v) for v in rng.uniform(size / 2, 3 * size / 2, size=2))
    boxes = []
    for place, sample in enumerate(samples):
        height, width = sample.image.shape[:2]
        # The corner of the image that touches the centre differs with the quarter.
        left = cx - width if place in (0, 2) else cx
        top = cy - height if place in (0, 1) else cy
        x1, y1 = max(left, 0), max(top, 0)
        x2, y2 = min(left + width, full), min(top + height, full)
        canvas[y1:y2, x1:x2] = sample.image[y1 - top : y2 - top, x1 - left : x2 - left]
        boxes.append(sample.boxes + np.array([left, top, left, top], np.float32))
    merged = np.clip(np.concatenate(boxes), 0, full)
    classes = np.concatenate([sample.classes for sample in samples])
    kept = (merged[:, 2] > merged[:, 0]) & (merged[:, 3] > merged[:, 1])
    return Sample(canvas, merged[kept], classes[kept])


def affine(sample: Sample, size: int, augment: Augment, rng: np.random.Generator) -> Sample:
    """Warps the image, centre to centre, into (size, size, 3), and its boxes with it.

    A box becomes the extent of its warped corners, clipped. It stays if both sides exceed 2
    pixels, more than a tenth of its area is in view, and its aspect ratio is below 100.
    """
    matrix, zoom = _affine_matrix(sample.image.shape, size, augment, rng)
    # OpenCV's coordinates are of pixel centres, ours of pixel edges: half a pixel apart.
    centres = _shift(-0.5, -0.5) @ matrix @ _shift(0.5, 0.5)
    border = (FILL, FILL, FILL)
    if augment.perspective:
        image = cv2.warpPerspective(sample.image, centres, (size, size), borderValue=border)
    else:
        image = cv2.warpAffine(sample.image, centres[:2], (size, size), borderValue=border)
    before = sample.boxes
    after, visible = _warp_boxes(before, matrix)
    after = np.clip(after, 0, size)
    kept = visible & worth_keeping(before, after, zoom)
    return Sample(np.asarray(image, np.uint8), after[kept].astype(np.float32), sample.classes[kept])


def worth_keeping(before: Boxes, after: NDArray[np.float64], zoom: float) -> NDArray[np.bool_]:
    """Which boxes are still of use after a warp by `zoom`, clipped to the image.

    Both sides exceed 2 pixels, more than a tenth of the area is in view, and the aspect ratio is
    below 100.
    """
    w, h = after[:, 2] - after[:, 0], after[:, 3] - after[:, 1]
    area = (before[:, 2] - before[:, 0]) * (before[:, 3] - before[:, 1]) * zoom**2
    sides = np.maximum(np.minimum(w, h), 1e-9)
    return np.asarray(
        (w > _MIN_SIDE)
        & (h > _MIN_SIDE)
        & (w * h > _MIN_AREA * area)
        & (np.maximum(w, h) / sides < _MAX_ASPECT)
    )


def _shift(x: float, y: float) -> NDArray[np.float64]:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]], np.float64)


def _affine_matrix(
    shape: tuple[int, ...], size: int, augment: Augment, rng: np.random.Generator
) -> tuple[NDArray[np.float64], float]:
    """Draws translation, shear, rotation with zoom, and perspective; returns matrix and zoom."""
    draw = rng.uniform(-1, 1, size=8)
    angle = math.radians(draw[0] * augment.degrees)
    zoom = 1 + draw[1] * augment.scale
    shear_x, shear_y = (math.tan(math.radians(v * augment.shear)) for v in draw[2:4])
    bend_x, bend_y = draw[4:6] * augment.perspective
    dx, dy = (0.5 + draw[6:8] * augment.translate) * size
    cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
    rotation = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    shear = np.array([[1, shear_x, 0], [shear_y, 1, 0], [0, 0, 1]])
    bend = np.array([[1, 0, 0], [0, 1, 0], [bend_x, bend_y, 1]])
    centred = _shift(-shape[1] / 2, -shape[0] / 2)
    return _shift(dx, dy) @ shear @ rotation @ bend @ centred, zoom


def _warp_boxes(
    boxes: Boxes, matrix: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The extent of each box's warped corners, and whether all of them are in front."""
    corners = np.ones((len(boxes), 4, 3))
    corners[:, :, :2] = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    warped = corners @ matrix.T
    depth = warped[..., 2:]
    points = warped[..., :2] / np.maximum(depth, 1e-6)
    extent = np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1)
    return extent, np.asarray((depth > 1e-6).all(axis=(1, 2)))


def mixup(first: Sample, second: Sample, rng: np.random.Generator) -> Sample:
    """Blends two samples of one size, in a ratio from Beta(32, 32); keeps the objects of both."""
    ratio = float(rng.beta(32, 32))
    blend = cv2.addWeighted(first.image, ratio, second.image, 1 - ratio, 0)
    return Sample(
        np.asarray(blend, np.uint8),
        np.concatenate([first.boxes, second.boxes]),
        np.concatenate([first.classes, second.classes]),
    )


def hsv(image: Image, augment: Augment, rng: np.random.Generator) -> Image:
    """Shifts hue, scales saturation and value of an RGB image."""
    hue, saturation, value = rng.uniform(-1, 1, size=3)
    if not (augment.hsv_h or augment.hsv_s or augment.hsv_v):
        return image
    levels = np.arange(256)
    table = np.empty((1, 256, 3), np.uint8)
    table[0, :, 0] = (levels + hue * augment.hsv_h * 180) % 180  # OpenCV's hue ends at 180
    table[0, :, 1] = np.clip(levels * (1 + saturation * augment.hsv_s), 0, 255)
    table[0, :, 2] = np.clip(levels * (1 + value * augment.hsv_v), 0, 255)
    shifted = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), table)
    return np.asarray(cv2.cvtColor(shifted, cv2.COLOR_HSV2RGB), np.uint8)


def flips(sample: Sample, augment: Augment, rng: np.random.Generator) -> Sample:
    """Mirrors a sample up-down and left-right, each with its probability."""
    image, boxes, classes = sample
    height, width = image.shape[:2]
    up, left = rng.random(2)
    if up < augment.flipud:
        image = np.asarray(cv2.flip(image, 0), np.uint8)
        boxes = np.stack(
            [boxes[:, 0], height - boxes[:, 3], boxes[:, 2], height - boxes[:, 1]], axis=1
        )
    if left < augment.fliplr:
        image = np.asarray(cv2.flip(image, 1), np.uint8)
        boxes = np.stack(
            [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1
        )
    return Sample(image, boxes, classes)
