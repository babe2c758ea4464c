"""The loader: a run's samples by position, effective batches in order, evaluation batches.

A run is one infinite sequence of samples. Sample n is index `order(n // N)[n % N]` of a data set
of N, and its augmentation draws from a generator seeded with (seed, epoch, index). So the position
is the only state: any geometry, any number of workers and any resume see the same samples.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from itertools import islice
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from jaxaccum.data.augment import Augment, Sample, augmented, letterbox, resize_long
from jaxaccum.data.base import DataError, Image, Source

Batch = dict[str, NDArray[Any]]
Backend = Literal["auto", "grain", "threads"]

_GIB = 1 << 30


class TrainStream:
    """Random access to the samples of a run.

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

        Raises:
          ValueError: an argument is out of range.
        """
        for name, value, lowest in (
            ("image_size", image_size, 2),
            ("max_objects", max_objects, 1),
            ("seed", seed, 0),
            ("close_mosaic_at", close_mosaic_at or 0, 0),
            ("cache_bytes", cache_bytes, 0),
        ):
            if value < lowest:
                raise ValueError(f"{name} is {value}, expected at least {lowest}.")
        if cache not in ("ram", "none"):
            raise ValueError(f"cache is {cache!r}, expected 'ram' or 'none'.")
        self.truncated = 0
        self._source = source
        self._size = image_size
        self._rows = max_objects
        self._augment = augment
        self._seed = seed
        self._close_at = sys.maxsize if close_mosaic_at is None else close_mosaic_at
        self._images = _ResizedImages(source, image_size, cache_bytes if cache == "ram" else 0)
        self._lock = threading.Lock()
        self._orders: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The permutation of the data set in `epoch`: (N,) int64, of (seed, epoch) alone."""
        with self._lock:
            if epoch not in self._orders:
                # The spawn key keeps this stream apart from those of the samples.
                entropy = np.random.SeedSequence([self._seed, epoch], spawn_key=(0,))
                rng = np.random.Generator(np.random.PCG64(entropy))
                self._orders[epoch] = rng.permutation(len(self._source))
                if len(self._orders) > 2:
                    self._orders.popitem(last=False)
            return self._orders[epoch]

    def sample(self, position: int) -> Batch:
        """Sample `position` of the run.

        Returns:
          image (S, S, 3) uint8 RGB; boxes (M, 4) float32 xyxy pixels; classes (M,) int32;
          valid (M,) bool; weight () float32, 1; index () int32; epoch () int32.
        """
        batch = _empty(1, self._size, self._rows)
        self._count(self._fill(batch, 0, position))
        return {key: value[0] for key, value in batch.items()}

    def windows(
        self,
        start: int,
        sizes: Iterable[int],
        *,
        workers: int = 0,
        prefetch: int = 2,
        backend: Backend = "auto",
    ) -> Generator[Batch, None, None]:
        """Consecutive effective batches.

        Args:
          start: position of the first sample. Starting here gives what iterating to here would.
          sizes: samples of each effective batch; may be endless. Read `prefetch` ahead.
          workers: processes that make samples; 0 for threads in this process. Needs grain.
          prefetch: effective batches to prepare ahead.
          backend: "grain", "threads" (of this module), or "auto": grain if installed. The samples
            are the same.

        Yields:
          The arrays of `sample` with a leading axis of sizes[i].

        Raises:
          DataError: an image cannot be read.
          ImportError: grain is asked for and not installed.
          ValueError: an argument is out of range.
        """
        if start < 0 or workers < 0 or prefetch < 0:
            raise ValueError(
                f"start {start}, workers {workers} and prefetch {prefetch} must not be negative."
            )
        if backend not in ("auto", "grain", "threads"):
            raise ValueError(f"backend is {backend!r}, expected 'auto', 'grain' or 'threads'.")
        if backend == "threads" and workers:
            raise ValueError("worker processes need the backend 'grain'; set workers=0.")
        installed = find_spec("grain") is not None
        if not installed and (backend == "grain" or workers):
            raise ImportError(
                "worker processes and the backend 'grain' need the package grain: "
                "pip install grain, or set workers=0 and backend='auto'."
            )
        checked = map(_checked_size, sizes)
        # Many small calls run beside each other: threads inside OpenCV would only fight.
        cv2.setNumThreads(0)
        if backend == "threads" or not installed:
            return self._threaded(start, checked, prefetch)
        return self._grained(start, checked, workers, prefetch)

    def _threaded(
        self, start: int, sizes: Iterable[int], prefetch: int
    ) -> Generator[Batch, None, None]:
        def jobs() -> Iterator[tuple[Batch, list[Callable[[], int]]]]:
            position = start
            for size in sizes:
                batch = _empty(size, self._size, self._rows)
                yield (
                    batch,
                    [functools.partial(self._fill, batch, i, position + i) for i in range(size)],
                )
                position += size

        for batch, truncated in _ahead(jobs(), prefetch):
            self._count(sum(truncated))
            yield batch

    def _grained(
        self, start: int, sizes: Iterable[int], workers: int, prefetch: int
    ) -> Generator[Batch, None, None]:
        import grain

        remaining = iter(sizes)
        ahead = deque(islice(remaining, prefetch + 1))
        if not ahead:
            return
        options = grain.ReadOptions(
            num_threads=_threads(), prefetch_buffer_size=max(_threads(), sum(ahead))
        )
        positions = grain.MapDataset.range(start, sys.maxsize)
        samples = positions.map(self._counted_sample).to_iter_dataset(options)
        if workers:
            from absl import flags

            # Grain's processes read absl flags, which only absl's own app.run parses.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            samples = samples.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=workers,
                    per_worker_buffer_size=max(1, sum(ahead) // workers),
                )
            )
        iterator = iter(samples)
        try:
            while ahead:
                size = ahead.popleft()
                ahead.extend(islice(remaining, 1))
                batch = _empty(size, self._size, self._rows)
                for i in range(size):
                    sample, truncated = next(iterator)
                    self._count(int(truncated))
                    for key, value in sample.items():
                        batch[key][i] = value
                yield batch
        finally:
            iterator.close()

    def _counted_sample(self, position: int) -> tuple[Batch, int]:
        batch = _empty(1, self._size, self._rows)
        truncated = self._fill(batch, 0, int(position))
        return {key: value[0] for key, value in batch.items()}, truncated

    def _fill(self, batch: Batch, row: int, position: int) -> int:
        """Writes sample `position` into a row of a batch; returns the objects left out."""
        epoch, place = divmod(position, len(self._source))
        index = int(self.order(epoch)[place])
        rng = np.random.Generator(np.random.PCG64([self._seed, epoch, index]))
        augment = self._augment
        if position >= self._close_at:
            augment = augment.without_mosaic()
        sample = augmented(self._load, index, len(self._source), self._size, augment, rng)
        batch["index"][row] = index
        batch["epoch"][row] = epoch
        return _write(batch, row, sample)

    def _load(self, index: int) -> Sample:
        image, (height, width) = self._images[index]
        objects = self._source.objects(index)
        x, y = image.shape[1] / width, image.shape[0] / height
        return Sample(image, objects.boxes * np.array([x, y, x, y], np.float32), objects.classes)

    def _count(self, truncated: int) -> None:
        with self._lock:
            self.truncated += truncated


def eval_batches(
    source: Source,
    *,
    image_size: int,
    batch: int,
    max_objects: int | None = None,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """The data set once, in order, letterboxed, without augmentation.

    Args:
      source: the data set.
      image_size: side of the square samples, in pixels.
      batch: samples in each batch; the last is filled up with grey samples of weight 0 and
        index -1.
      max_objects: rows for objects; None takes as many as the fullest image has.
      prefetch: batches to prepare ahead.

    Yields:
      The arrays of `TrainStream.sample` with a leading axis of `batch`, epoch 0, and also
      ratio (n, 2) and pad (n, 2) float32, both x then y: x_original = (x - pad_x) / ratio_x;
      size (n, 2) float32, the original height and width.

    Raises:
      DataError: an image cannot be read, or has more than max_objects objects.
      ValueError: an argument is out of range.
    """
    if image_size < 2 or batch < 1 or prefetch < 0:
        raise ValueError(
            f"image_size {image_size}, batch {batch}, prefetch {prefetch}: expected at least "
            f"2, 1 and 0."
        )
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
    cv2.setNumThreads(0)
    return _evaluated(source, image_size, batch, rows, prefetch)


def _evaluated(source: Source, size: int, batch: int, rows: int, prefetch: int) -> Iterator[Batch]:
    def fill(arrays: Batch, row: int, index: int) -> int:
        image, objects = source.image(index), source.objects(index)
        square, ratio, pad = letterbox(image, size)
        boxes = objects.boxes * np.tile(ratio, 2) + np.tile(pad, 2)
        arrays["index"][row] = index
        arrays["ratio"][row] = ratio
        arrays["pad"][row] = pad
        arrays["size"][row] = image.shape[:2]
        return _write(arrays, row, Sample(square, boxes, objects.classes))

    def jobs() -> Iterator[tuple[Batch, list[Callable[[], int]]]]:
        for first in range(0, len(source), batch):
            arrays = _empty(batch, size, rows)
            arrays["index"][:] = -1
            arrays["ratio"] = np.ones((batch, 2), np.float32)
            arrays["pad"] = np.zeros((batch, 2), np.float32)
            arrays["size"] = np.full((batch, 2), size, np.float32)
            indices = range(first, min(first + batch, len(source)))
            yield (
                arrays,
                [functools.partial(fill, arrays, row, index) for row, index in enumerate(indices)],
            )

    for arrays, _ in _ahead(jobs(), prefetch):
        yield arrays


class _ResizedImages:
    """Images with their long side resized, the least recently used forgotten; thread-safe."""

    def __init__(self, source: Source, size: int, capacity: int) -> None:
        self._source = source
        self._size = size
        self._capacity = capacity
        self._forget()

    def _forget(self) -> None:
        self._bytes = 0
        self._kept: OrderedDict[int, tuple[Image, tuple[int, int]]] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"_source": self._source, "_size": self._size, "_capacity": self._capacity}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __getitem__(self, index: int) -> tuple[Image, tuple[int, int]]:
        """The resized image, not to be written to, and its original (height, width)."""
        with self._lock:
            if index in self._kept:
                self._kept.move_to_end(index)
                return self._kept[index]
        original = self._source.image(index)
        height, width = original.shape[:2]
        image = resize_long(original, self._size)
        image.flags.writeable = False
        entry = image, (height, width)
        with self._lock:
            if index not in self._kept and image.nbytes <= self._capacity:
                self._kept[index] = entry
                self._bytes += image.nbytes
                while self._bytes > self._capacity:
                    self._bytes -= self._kept.popitem(last=False)[1][0].nbytes
        return entry


def _empty(count: int, size: int, rows: int) -> Batch:
    """A batch of grey samples of weight 0."""
    return {
        "image": np.full((count, size, size, 3), 114, np.uint8),
        "boxes": np.zeros((count, rows, 4), np.float32),
        "classes": np.zeros((count, rows), np.int32),
        "valid": np.zeros((count, rows), bool),
        "weight": np.zeros(count, np.float32),
        "index": np.zeros(count, np.int32),
        "epoch": np.zeros(count, np.int32),
    }


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


def _ahead(
    jobs: Iterable[tuple[Batch, Sequence[Callable[[], int]]]], prefetch: int
) -> Iterator[tuple[Batch, list[int]]]:
    """Runs each batch's jobs on threads, up to `prefetch` batches ahead; yields them in order."""
    pending: deque[tuple[Batch, list[Future[int]]]] = deque()
    pool = ThreadPoolExecutor(_threads(), thread_name_prefix="samples")
    try:
        for batch, work in jobs:
            pending.append((batch, [pool.submit(job) for job in work]))
            if len(pending) > prefetch:
                yield _finished(*pending.popleft())
        while pending:
            yield _finished(*pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(batch: Batch, work: Sequence[Future[int]]) -> tuple[Batch, list[int]]:
    return batch, [job.result() for job in work]


def _checked_size(size: int) -> int:
    if size < 1:
        raise ValueError(f"an effective batch of {size} samples; expected at least 1.")
    return int(size)


def _threads() -> int:
    return min(16, (os.cpu_count() or 1) + 1)
