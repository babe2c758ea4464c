"""The samples of a run by position, whatever a sample is: effective batches in order.

A run is one infinite sequence of samples. Sample n is index `order(n // N)[n % N]` of a data set
of N, and all its random choices draw from a generator seeded with (seed, epoch, index). So the
position is the only state: any geometry, any number of workers and any resume see the same samples.
"""

from __future__ import annotations

import abc
import functools
import operator
import os
import signal
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, islice
from typing import Any, Literal, NamedTuple, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from jaxaccum.data.base import DataError
from jaxaccum.machine import host_memory

Batch = dict[str, NDArray[Any]]
Backend = Literal["auto", "grain", "threads"]
OnError = Literal["raise", "skip"]
Result = TypeVar("Result")

_LOST_IN_ROW = 16  # samples, at least, that make a data set that is gone and not one with faults
_TOLD = 3  # lost samples that are told by name; after that they are counted


class Outcome(NamedTuple):
    """What there is to say of a sample that was made.

    Attributes:
      truncated: things that it had no room for.
      lost: why it could not be made, or "".
    """

    truncated: int
    lost: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample stands: its position in the run, its epoch, its index in the data set."""

    position: int
    epoch: int
    index: int


class SampleStream(abc.ABC):
    """Random access to the samples of a run. A subclass says what a sample is.

    Attributes:
      truncated: things left out of samples so far because a sample had no room for them.
      lost: samples so far that could not be read, and got the weight 0.
    """

    def __init__(self, length: int, seed: int, on_error: OnError = "raise") -> None:
        """Describes the order of the samples.

        Args:
          length: samples in the data set.
          seed: of the order and of everything random in a sample; not negative.
          on_error: "raise" ends with the error of a sample that cannot be read; "skip" gives it
            the weight 0, whatever the geometry, and leaves all other samples as they are.

        Raises:
          ValueError: an argument is out of range.
        """
        if length < 1:
            raise ValueError(f"a data set of {length} samples; expected at least 1.")
        if seed < 0:
            raise ValueError(f"seed is {seed}, expected at least 0.")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error is {on_error!r}, expected 'raise' or 'skip'.")
        self.truncated = self.lost = 0
        self._lost_in_row = 0
        self._news: list[str] = []
        self._on_error = on_error
        self._length = length
        self._seed = seed
        self._lock = threading.Lock()
        self._orders: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    @abc.abstractmethod
    def _empty(self, count: int, position: int) -> Batch:
        """A batch of `count` samples of weight 0, of the window that holds the position.

        It holds weight (n,) float32, index and epoch (n,) int32, and what the subclass adds.
        """

    @abc.abstractmethod
    def _write(self, batch: Batch, row: int, place: Place, rng: np.random.Generator) -> int:
        """Writes the sample of a place into a row, and its weight, but not its index and epoch.

        Args:
          rng: seeded with (seed, epoch, index); the only source of random choices.
        Returns:
          How many things the row had no room for.
        """

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
                self._orders[epoch] = rng.permutation(self._length)
                if len(self._orders) > 2:
                    self._orders.popitem(last=False)
            return self._orders[epoch]

    def indices(self, start: int, size: int) -> NDArray[np.int64]:
        """Indices in the data set of consecutive samples of the run: (size,) int64."""
        epochs, places = np.divmod(np.arange(start, start + size), self._length)
        return np.array(
            [self.order(int(e))[p] for e, p in zip(epochs, places, strict=True)], np.int64
        )

    def sample(self, position: int) -> Batch:
        """Sample `position` of the run: the arrays of a batch without their leading axis."""
        sample, outcome = self._sample(position)
        self._count([outcome], sys.maxsize)
        return sample

    def news(self) -> list[str]:
        """Lines about samples lost since this was called before, to be shown to people."""
        with self._lock:
            news, self._news = self._news, []
        return news

    def windows(
        self,
        start: int,
        sizes: Iterable[int],
        *,
        workers: int = 0,
        prefetch: int = 2,
        backend: Backend = "auto",
        share: NDArray[np.integer] | None = None,
    ) -> Generator[Batch, None, None]:
        """Consecutive effective batches.

        Args:
          start: position of the first sample. Starting here gives what iterating to here would.
          sizes: samples of each effective batch; may be endless. Read `prefetch` ahead.
          workers: processes that make samples; 0 for threads in this process. Needs grain.
          prefetch: effective batches to prepare ahead.
          backend: "grain", "threads" (of this module), or "auto": grain if installed. The samples
            are the same.
          share: which samples of each effective batch to make, if other processes make the rest;
            all sizes must then be alike.

        Yields:
          The arrays of `sample` with a leading axis of sizes[i], or of len(share). A lost sample
          has the arrays of another one, and the weight 0.

        Raises:
          DataError: a sample cannot be read, or, with on_error "skip", as many in a row as an
            effective batch has (and at least 16).
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
        checked: Iterator[int] = map(_checked_size, sizes)
        position = functools.partial(operator.add, start)
        if share is not None:
            seen = list(islice(checked, 1))
            size = seen[0] if seen else 1
            checked = (_share_of(other, size, share) for other in chain(seen, checked))
            position = functools.partial(_shared_position, start, size, share)
        suit_process()
        if backend == "threads" or not installed:
            return self._threaded(position, checked, prefetch)
        return self._grained(position, checked, workers, prefetch)

    def _threaded(
        self, position: Callable[[int], int], sizes: Iterable[int], prefetch: int
    ) -> Generator[Batch, None, None]:
        def jobs() -> Iterator[tuple[Batch, list[Callable[[], Outcome]]]]:
            done = 0
            for size in sizes:
                batch = self._empty(size, position(done))
                yield (
                    batch,
                    [
                        functools.partial(self._fill, batch, i, position(done + i))
                        for i in range(size)
                    ],
                )
                done += size

        for batch, outcomes in ahead(jobs(), prefetch):
            yield self._accounted(batch, outcomes)

    def _grained(
        self, position: Callable[[int], int], sizes: Iterable[int], workers: int, prefetch: int
    ) -> Generator[Batch, None, None]:
        import grain

        remaining = iter(sizes)
        coming = deque(islice(remaining, prefetch + 1))
        if not coming:
            return
        options = grain.ReadOptions(
            num_threads=thread_count(), prefetch_buffer_size=max(thread_count(), sum(coming))
        )
        positions = grain.MapDataset.range(sys.maxsize).map(position)
        samples = positions.map(self._sample).to_iter_dataset(options)
        if workers:
            from absl import flags

            # Grain's processes read absl flags, which only absl's own app.run parses.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            samples = samples.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=workers,
                    per_worker_buffer_size=max(1, sum(coming) // workers),
                ),
                worker_init_fn=_end_with_parent,
            )
        iterator, done = iter(samples), 0
        try:
            while coming:
                size = coming.popleft()
                coming.extend(islice(remaining, 1))
                batch = self._empty(size, position(done))
                done += size
                outcomes = []
                for i in range(size):
                    sample, outcome = next(iterator)
                    outcomes.append(Outcome(int(outcome[0]), str(outcome[1])))
                    for key, value in sample.items():
                        batch[key][i] = value
                yield self._accounted(batch, outcomes)
        finally:
            iterator.close()

    def _sample(self, position: int) -> tuple[Batch, Outcome]:
        batch = self._empty(1, int(position))
        outcome = self._fill(batch, 0, int(position))
        return {key: value[0] for key, value in batch.items()}, outcome

    def _fill(self, batch: Batch, row: int, position: int) -> Outcome:
        """Writes sample `position` into a row of a batch, which is as `_empty` made it."""
        epoch, place = divmod(position, self._length)
        index = int(self.order(epoch)[place])
        rng = np.random.Generator(np.random.PCG64([self._seed, epoch, index]))
        batch["index"][row] = index
        batch["epoch"][row] = epoch
        try:
            return Outcome(self._write(batch, row, Place(position, epoch, index), rng), "")
        except DataError as error:
            if self._on_error == "raise":
                raise
            return Outcome(0, str(error))

    def _accounted(self, batch: Batch, outcomes: Sequence[Outcome]) -> Batch:
        """A batch whose samples are counted. Lost ones get the arrays of one that is not, as
        padding does: a blank image, normalised by the statistics of others, can overflow."""
        self._count(outcomes, max(len(outcomes), _LOST_IN_ROW))
        lost = [row for row, outcome in enumerate(outcomes) if outcome.lost]
        if lost and len(lost) < len(outcomes):
            (whole,) = islice((r for r, outcome in enumerate(outcomes) if not outcome.lost), 1)
            for key, array in batch.items():
                if key not in ("weight", "index", "epoch"):
                    array[lost] = array[whole]
        return batch

    def _count(self, outcomes: Sequence[Outcome], most: int) -> None:
        """Counts what samples lacked. Raises DataError once `most` in a row were lost."""
        with self._lock:
            for truncated, lost in outcomes:
                self.truncated += truncated
                self._lost_in_row = self._lost_in_row + 1 if lost else 0
                if not lost:
                    continue
                self.lost += 1
                if self.lost <= _TOLD or self.lost & (self.lost - 1) == 0:  # then at powers of 2
                    self._news.append(f"sample left out (weight 0), {self.lost} so far: {lost}")
                if self._lost_in_row >= most:
                    raise DataError(
                        f"{self._lost_in_row} samples in a row could not be read, and data.on_error"
                        f"=skip is for a few. Is the disk there? The last error: {lost}"
                    )


def in_order(
    length: int,
    batch: int,
    empty: Callable[[], Batch],
    fill: Callable[[Batch, int, int], object],
    prefetch: int,
    lost: list[str] | None = None,
    prepared: dict[int, float] | None = None,
) -> Iterator[Batch]:
    """A data set of `length` once, in order, in batches; see `in_groups`."""
    return in_groups([(empty, range(length))], batch, fill, prefetch, lost, prepared)


def in_groups(
    groups: Sequence[tuple[Callable[[], Batch], Sequence[int]]],
    batch: int,
    fill: Callable[[Batch, int, int], object],
    prefetch: int,
    lost: list[str] | None = None,
    prepared: dict[int, float] | None = None,
) -> Iterator[Batch]:
    """Samples of groups, one group after the other, in batches; samples of a group's last that are
    not filled keep the index -1.

    Args:
      groups: what makes the arrays of a batch, all of weight 0, and the indices of the samples.
      fill: writes into a batch, at a row, the sample of an index; all of it or, with a DataError,
        nothing.
      lost: takes the errors of samples that cannot be read, which are left at weight 0 and index
        -1; None ends with the first.
      prepared: takes the milliseconds of a processor that each sample took, by its index.

    Raises:
      DataError: a sample cannot be read, or none of them.
    """

    def tried(arrays: Batch, row: int, index: int) -> str:
        since = time.thread_time()  # others on the same processor do not count
        try:
            fill(arrays, row, index)
        except DataError as error:
            if lost is None:
                raise
            return str(error)
        if prepared is not None:
            prepared[index] = 1e3 * (time.thread_time() - since)
        return ""

    def jobs() -> Iterator[tuple[Batch, list[Callable[[], str]]]]:
        for empty, indices in groups:
            for first in range(0, len(indices), batch):
                arrays = empty()
                arrays["index"][:] = -1
                part = enumerate(indices[first : first + batch])
                yield arrays, [functools.partial(tried, arrays, i, n) for i, n in part]

    length = sum(len(indices) for _, indices in groups)
    failed = 0
    for arrays, errors in ahead(jobs(), prefetch):
        new = [error for error in errors if error]
        if lost is not None:
            lost.extend(new)
        failed += len(new)
        if failed == length:
            raise DataError(f"none of {length} samples could be read. The last error: {new[-1]}")
        yield arrays


def say_lost(lost: Sequence[str], length: int, what: str) -> None:
    """Says on stderr what an evaluation of `length` samples had to leave out."""
    if lost:
        shown = "".join(f"\n  {error}" for error in lost[:_TOLD])
        more = f"\n  and {len(lost) - _TOLD} more" if len(lost) > _TOLD else ""
        print(f"{len(lost)} of {length} {what} left out:{shown}{more}", file=sys.stderr)


def ahead(
    jobs: Iterable[tuple[Batch, Sequence[Callable[[], Result]]]], prefetch: int
) -> Iterator[tuple[Batch, list[Result]]]:
    """Runs each batch's jobs on threads, up to `prefetch` batches ahead; yields them in order."""
    pending: deque[tuple[Batch, list[Future[Result]]]] = deque()
    pool = ThreadPoolExecutor(thread_count(), thread_name_prefix="samples")
    try:
        for batch, work in jobs:
            pending.append((batch, [pool.submit(job) for job in work]))
            if len(pending) > prefetch:
                yield _finished(*pending.popleft())
        while pending:
            yield _finished(*pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(batch: Batch, work: Sequence[Future[Result]]) -> tuple[Batch, list[Result]]:
    return batch, [job.result() for job in work]


def _checked_size(size: int) -> int:
    if size < 1:
        raise ValueError(f"an effective batch of {size} samples; expected at least 1.")
    return int(size)


def _share_of(size: int, usual: int, share: NDArray[np.integer]) -> int:
    if size != usual:
        raise ValueError(f"effective batches of {usual} and {size} samples cannot be shared.")
    return len(share)


def _shared_position(start: int, size: int, share: NDArray[np.integer], number: int) -> int:
    """Position in the run of a sample of this process, counted from `start` on."""
    window, row = divmod(number, len(share))
    return start + window * size + int(share[row])


def suit_process() -> None:
    """Suits this process to making samples: many small calls beside each other, in which threads
    inside OpenCV would only fight, and many images that come and go."""
    cv2.setNumThreads(0)
    host_memory.keep_freed()


def _end_with_parent(index: int, count: int) -> None:
    """In a worker process: leaves Ctrl-C to the parent, and ends soon after it, come what may."""
    suit_process()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def thread_count() -> int:
    """Threads that read and decode: a few more than processors, as some wait for the disk."""
    return min(16, (os.cpu_count() or 1) + 1)
