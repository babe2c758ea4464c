"""Detection's samples: the training stream, and evaluation batches."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Literal, cast

import cv2
import numpy as np

from jaxaccum.data.augment import Augment, Sample, augmented, letterbox, resize_long
from jaxaccum.data.base import DataError, Image, Source
from jaxaccum.data.cache import ByteCache
from jaxaccum.data.rectangles import Rectangles
from jaxaccum.data.stream import Batch, OnError, Place, SampleStream, in_groups, suit_process

_GIB = 1 << 30


class TrainStream(SampleStream):
    """Random access to the samples of a run.

    A sample is image (S, S, 3) uint8 RGB, S being its window's; boxes (M, 4) float32 xyxy pixels;
    classes (M,) int32; valid (M,) bool; weight () float32, 1; index () int32; epoch () int32.

    Attributes:
      truncated: objects left out so far because a sample had more than `max_objects`; the
        smallest are left out.
    """

    def __init__(
        self,
        source: Source,
        *,
        image_size: int,
        max_objects: int,
        augment: Augment,
        seed: int,
        close_mosaic_at: int | None = None,
        cache: Literal["ram", "none"] = "ram",
        cache_bytes: int = 2 * _GIB,
        on_error: OnError = "raise",
        sizes: Sequence[int] = (),
        window: int = 1,
    ) -> None:
        """Describes a run's samples; reads nothing yet.

        Args:
          source: the data set.
          image_size: side of the square samples, in pixels.
          max_objects: rows for objects in a sample.
          augment: the hyperparameters of augmentation.
          seed: of the order and the augmentation; not negative.
          close_mosaic_at: position in the run, in samples, from which mosaic and mixup are off;
            None for never.
          cache: "ram" keeps resized images in memory.
          cache_bytes: most bytes to keep, the least recently used go first; each worker process
            keeps its own share.
          on_error: as in `SampleStream`; a sample is lost if any image of its mosaic is.
          sizes: what S may be; drawn for each window of `window` samples from (seed, its number).
            Samples are made at image_size and resized, bilinearly. () for image_size alone.
          window: samples of a window; one by default.

        Raises:
          ValueError: an argument is out of range.
        """
        for name, value, lowest in (
            ("image_size", image_size, 2),
            ("max_objects", max_objects, 1),
            ("seed", seed, 0),
            ("close_mosaic_at", close_mosaic_at or 0, 0),
            ("cache_bytes", cache_bytes, 0),
            ("sizes", min(sizes, default=2), 2),
            ("window", window, 1),
        ):
            if value < lowest:
                raise ValueError(f"{name} is {value}, expected at least {lowest}.")
        if cache not in ("ram", "none"):
            raise ValueError(f"cache is {cache!r}, expected 'ram' or 'none'.")
        super().__init__(len(source), seed, on_error)
        self._source = source
        self._size = image_size
        self._sizes, self._window = tuple(sizes), window
        self._rows = max_objects
        self._augment = augment
        self._close_at = sys.maxsize if close_mosaic_at is None else close_mosaic_at
        self._images = _ResizedImages(source, image_size, cache_bytes if cache == "ram" else 0)

    def side(self, window: int) -> int:
        """The side of the images of a window, in pixels."""
        if not self._sizes:
            return self._size
        # The spawn key keeps this apart from the orders of epochs and from the samples.
        entropy = np.random.SeedSequence([self._seed, window], spawn_key=(1,))
        rng = np.random.Generator(np.random.PCG64(entropy))
        return int(self._sizes[rng.integers(len(self._sizes))])

    def _empty(self, count: int, position: int) -> Batch:
        side = self.side(position // self._window)
        return _empty(count, (side, side), self._rows)

    def _write(self, batch: Batch, row: int, place: Place, rng: np.random.Generator) -> int:
        augment = self._augment
        if place.position >= self._close_at:
            augment = augment.without_mosaic()
        sample = augmented(self._load, place.index, len(self._source), self._size, augment, rng)
        return _write(batch, row, _resized(sample, batch["image"].shape[1]))

    def _load(self, index: int) -> Sample:
        image, (height, width) = self._images[index]
        objects = self._source.objects(index)
        x, y = image.shape[1] / width, image.shape[0] / height
        return Sample(image, objects.boxes * np.array([x, y, x, y], np.float32), objects.classes)


def eval_batches(
    source: Source,
    *,
    image_size: int,
    batch: int,
    max_objects: int | None = None,
    prefetch: int = 2,
    lost: list[str] | None = None,
    rectangles: Rectangles | None = None,
    prepared: dict[int, float] | None = None,
) -> Iterator[Batch]:
    """The data set once, in order, letterboxed, without augmentation.

    Args:
      source: the data set.
      image_size: side of the square samples, in pixels.
      batch: samples in each batch; the last is filled up with grey samples of weight 0 and
        index -1.
      max_objects: rows for objects; None takes as many as the fullest image has.
      prefetch: batches to prepare ahead.
      lost: takes the errors of images that cannot be read; their samples are like those that fill
        up the last batch. None ends with the first error.
      rectangles: letterbox each image into its own of these, and take them in their order; the long
        side is image_size all the same. None: in squares, in the order of the source.
      prepared: as `stream.in_groups` takes it.

    Yields:
      The arrays of a `TrainStream` sample, image (H, W, 3) of the batch's rectangle, with a leading
      axis of `batch`, epoch 0, and also ratio (n, 2) and pad (n, 2) float32, both x then y:
      x_original = (x - pad_x) / ratio_x; size (n, 2) float32, the original height and width.

    Raises:
      DataError: an image cannot be read, or none can; or one has more than max_objects objects.
      ValueError: an argument is out of range.
    """
    if image_size < 2 or batch < 1 or prefetch < 0:
        raise ValueError(
            f"image_size {image_size}, batch {batch}, prefetch {prefetch}: expected at least "
            f"2, 1 and 0."
        )
    rows = room(source, max_objects)
    suit_process()
    return _evaluated(source, image_size, batch, rows, prefetch, lost, rectangles, prepared)


def room(source: Source, max_objects: int | None) -> int:
    """Rows for objects that every image of a source fits in: `max_objects`, if that is enough.

    Raises:
      DataError: an image has more than max_objects objects.
    """
    counts = [len(source.objects(i)) for i in range(len(source))]
    fullest = int(np.argmax(counts))
    rows = max(counts[fullest], 1) if max_objects is None else max_objects
    if counts[fullest] > rows:
        raise DataError(
            f"{source.name(fullest)}: {counts[fullest]} objects, but max_objects is {rows}; an "
            f"evaluation that leaves objects out is wrong. Set max_objects to at least "
            f"{counts[fullest]}.",
            file=source.name(fullest),
        )
    return rows


def _evaluated(
    source: Source, size: int, batch: int, rows: int, prefetch: int, lost: list[str] | None,
    rectangles: Rectangles | None, prepared: dict[int, float] | None,
) -> Iterator[Batch]:  # fmt: skip
    def fill(arrays: Batch, row: int, index: int) -> int:
        image, objects = source.image(index), source.objects(index)
        height, width = arrays["image"].shape[1:3]
        canvas, ratio, pad = letterbox(image, size, (height, width))
        boxes = objects.boxes * np.tile(ratio, 2) + np.tile(pad, 2)
        arrays["index"][row] = index
        arrays["ratio"][row] = ratio
        arrays["pad"][row] = pad
        arrays["size"][row] = image.shape[:2]
        return _write(arrays, row, Sample(canvas, boxes, objects.classes))

    def empty(shape: tuple[int, int]) -> Batch:
        arrays = _empty(batch, shape, rows)
        arrays["ratio"] = np.ones((batch, 2), np.float32)
        arrays["pad"] = np.zeros((batch, 2), np.float32)
        arrays["size"] = np.tile(np.array(shape, np.float32), (batch, 1))
        return arrays

    groups: list[tuple[tuple[int, int], Sequence[int]]] = [((size, size), range(len(source)))]
    if rectangles is not None:
        groups = rectangles.groups()
    made = [(functools.partial(empty, shape), indices) for shape, indices in groups]
    return in_groups(made, batch, fill, prefetch, lost, prepared)


class _ResizedImages(ByteCache[tuple[Image, tuple[int, int]]]):
    """Images with their long side resized, the least recently used forgotten."""

    def __init__(self, source: Source, size: int, capacity: int) -> None:
        super().__init__(capacity)
        self._source = source
        self._size = size

    def __getitem__(self, index: int) -> tuple[Image, tuple[int, int]]:
        """The resized image, not to be written to, and its original (height, width)."""
        return self.get(index, functools.partial(self._read, index))

    def _read(self, index: int) -> tuple[Image, tuple[int, int]]:
        original = self._source.image(index)
        height, width = original.shape[:2]
        return resize_long(original, self._size), (height, width)


def _empty(count: int, shape: tuple[int, int], rows: int) -> Batch:
    """A batch of grey samples of weight 0."""
    return {
        "image": np.full((count, *shape, 3), 114, np.uint8),
        "boxes": np.zeros((count, rows, 4), np.float32),
        "classes": np.zeros((count, rows), np.int32),
        "valid": np.zeros((count, rows), bool),
        "weight": np.zeros(count, np.float32),
        "index": np.zeros(count, np.int32),
        "epoch": np.zeros(count, np.int32),
    }


def _resized(sample: Sample, side: int) -> Sample:
    """A square sample at another side."""
    if sample.image.shape[0] == side:
        return sample
    image = cv2.resize(sample.image, (side, side), interpolation=cv2.INTER_LINEAR)
    factor = np.float32(side / sample.image.shape[0])
    return Sample(cast(Image, image), sample.boxes * factor, sample.classes)


def _write(batch: Batch, row: int, sample: Sample) -> int:
    """Writes a sample into a row of a batch; returns how many of its objects did not fit."""
    image, boxes, classes = sample
    rows = int(batch["valid"].shape[1])
    excess = len(classes) - rows
    if excess > 0:
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        largest = np.sort(np.argsort(-areas, kind="stable")[:rows])
        boxes, classes = boxes[largest], classes[largest]
    count = len(classes)
    batch["image"][row] = image
    batch["boxes"][row, :count] = boxes
    batch["classes"][row, :count] = classes
    batch["valid"][row, :count] = True
    batch["weight"][row] = 1
    return max(excess, 0)
