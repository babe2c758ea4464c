"""The rectangles that images are evaluated in: few, and hardly larger than the images need."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxaccum.data.augment import long_sized
from jaxaccum.data.base import DataError, Source

MOST = 8  # rectangles, each of which is compiled for
STRIDE = 32  # the coarsest of the detectors' strides
# Compiling costs as much as so many squares; a rectangle that saves less is not worth it. A count
# of images and no time, so that the same data set has the same rectangles everywhere.
_COST = 64

Shape = tuple[int, int]  # (height, width)


@dataclass(frozen=True, eq=False)
class Rectangles:
    """Which images of a data set are letterboxed into which rectangle.

    Attributes:
      size: the long side of the letterboxed images, in pixels.
      shapes: (height, width) of the rectangles in pixels, multiples of `STRIDE`; from tall to wide.
      order: indices of the images of each, by their aspect ratio.
    """

    size: int
    shapes: tuple[Shape, ...]
    order: tuple[NDArray[np.int64], ...]

    def groups(self) -> list[tuple[Shape, Sequence[int]]]:
        """The shape and the images of each rectangle."""
        return [(s, found.tolist()) for s, found in zip(self.shapes, self.order, strict=True)]

    @property
    def share(self) -> float:
        """The pixels of all images over those that they have in squares."""
        pixels = sum(len(found) * h * w for (h, w), found in self.groups())
        return pixels / (self.size**2 * sum(map(len, self.order)))

    def line(self) -> str:
        """Them in a line."""
        shown = ", ".join(f"{h} x {w} ({len(found):,} images)" for (h, w), found in self.groups())
        what = f"{len(self.shapes)} shapes" if len(self.shapes) > 1 else "one shape"
        return f"rect: {what}, height x width: {shown}; {self.share:.0%} of the pixels of squares"


def rectangles(sizes: Sequence[Shape], size: int, most: int = MOST) -> Rectangles:
    """Chooses rectangles for images.

    An image fits the rectangle whose sides are those of the image with its long side `size`,
    rounded up to multiples of `STRIDE`. Of these as many are joined, neighbours by aspect ratio, as
    leave `most`, and those that save less than compiling costs: the choice with the fewest pixels.
    It depends on the sizes of the images and on nothing else.

    Args:
      sizes: (height, width) of each image in pixels, at least one.
      size: long side of the letterboxed images in pixels, a multiple of `STRIDE`.
      most: rectangles at most, at least 1.
    Raises:
      ValueError: there is no image, or another argument is out of range.
    """
    if not len(sizes) or size < STRIDE or size % STRIDE or most < 1:
        raise ValueError(f"rectangles of {len(sizes)} images, {size=}, {most=}")
    fitted = np.array([long_sized(h, w, size) for h, w in sizes], np.int64)
    needed = -(-fitted // STRIDE) * STRIDE
    # One side is `size`, so that width - height orders them from tall to wide.
    levels, level = np.unique(needed[:, 1] - needed[:, 0], return_inverse=True)
    shapes = np.stack([np.minimum(size, size - levels), np.minimum(size, size + levels)], axis=1)
    ends = _cuts(shapes, np.bincount(level), most, _COST * size**2)
    aspect = np.array([w / h for h, w in sizes])
    by_aspect = np.lexsort((np.arange(len(aspect)), aspect))
    chosen, order = list[Shape](), list[NDArray[np.int64]]()
    for first, end in zip([0, *ends[:-1]], ends, strict=True):
        height, width = shapes[first:end].max(axis=0).tolist()
        chosen.append((height, width))
        member = (level >= first) & (level < end)
        order.append(by_aspect[member[by_aspect]])
    return Rectangles(size, tuple(chosen), tuple(order))


def _cuts(shapes: NDArray[np.int64], counts: NDArray[np.int64], most: int, cost: int) -> list[int]:
    """Where to end each of at most `most` groups of neighbouring shapes, so that all pixels, with
    `cost` for each group, are fewest."""

    @functools.cache
    def best(first: int, groups: int) -> tuple[int, tuple[int, ...]]:
        if first == len(counts):
            return 0, ()
        if not groups:
            return 1 << 62, ()  # more than any pixels
        found = []
        for end in range(first + 1, len(counts) + 1):
            height, width = shapes[first:end].max(axis=0).tolist()
            pixels = int(counts[first:end].sum()) * height * width
            rest, ends = best(end, groups - 1)
            found.append((pixels + cost + rest, (end, *ends)))
        return min(found)

    return list(best(0, most)[1])


def size_of(source: Source, index: int) -> Shape:
    """(height, width) of an image of a source in pixels, upright; by the header where the source
    knows it (`size`), else by decoding it.

    Raises:
      DataError: it cannot be read.
    """
    told = getattr(source, "size", None)
    if told is not None:
        height, width = told(index)
        return int(height), int(width)
    height, width = source.image(index).shape[:2]
    return height, width


def of_source(source: Source, size: int, lenient: bool = False) -> Rectangles:
    """The rectangles of a data set.

    Args:
      source: the data set.
      size: as of `rectangles`.
      lenient: an image that cannot be read counts as a square; whoever evaluates it then finds out.
    Raises:
      DataError: an image cannot be read.
    """

    def told(index: int) -> Shape:
        try:
            return size_of(source, index)
        except DataError:
            if not lenient:
                raise
            return size, size

    with ThreadPoolExecutor() as pool:
        return rectangles(list(pool.map(told, range(len(source)))), size)
