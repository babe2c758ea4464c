"""What a data set of clouds is to the rest of jaxaccum, and its samples in batches.

A sample is a partial cloud and the complete cloud of the same shape, in one frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from jaxaccum.data.base import Findings
from jaxaccum.data.captions import Texts
from jaxaccum.data.cloud_ops import NUM_INPUT, mirror_factors
from jaxaccum.data.formats.cloud_files import Points
from jaxaccum.data.stream import Batch, OnError, Place, SampleStream, in_order


@dataclass
class CloudReport(Findings):
    """What a source of clouds holds and what it left out, counted.

    Attributes:
      shapes: category name -> shapes kept.
      samples: samples of an epoch or of an evaluation.
    """

    shapes: dict[str, int] = field(default_factory=dict)
    samples: int = 0

    def summary(self) -> str:
        """What was kept, in one line."""
        return (
            f"{self.samples} samples of {sum(self.shapes.values())} shapes in "
            f"{len(self.shapes)} categories"
        )


class CloudSource(Protocol):
    """A data set of clouds of one split, read by index. Safe among threads.

    Attributes:
      names: category names; the index is the category.
      identity: 12 hex characters, a hash of what is learned from (names of shapes and categories,
        file sizes, the kind of partial clouds) and not of where it lies on disk.
      report: what was kept and what was left out.
      points: P, the points of every complete cloud; 0 if there are none.
      normalised: the mean of every complete cloud is the origin, its largest radius 1.
    """

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def identity(self) -> str: ...

    @property
    def report(self) -> CloudReport: ...

    @property
    def points(self) -> int: ...

    @property
    def normalised(self) -> bool: ...

    def __len__(self) -> int: ...

    def category(self, index: int) -> int:
        """The category of sample `index`."""
        ...

    def name(self, index: int) -> str:
        """The name of sample `index`, for messages and predictions."""
        ...

    def sample(self, index: int, rng: np.random.Generator | None) -> tuple[Points, Points]:
        """The partial (2048, 3) and the complete (P, 3) cloud, float32, not to be written to.

        Args:
          rng: of the random choices of training; None for the fixed sample of evaluation.
        Raises:
          DataError: a file cannot be used.
        """
        ...


class CloudStream(SampleStream):
    """Random access to the samples of a run.

    A sample is partial (2048, 3) and complete (P, 3) float32; weight () float32, 1; index () and
    epoch () int32. With captions also text (T,) float32, the caption's vector, and caption ()
    int32, its id: equal captions have equal ids.
    """

    def __init__(
        self,
        source: CloudSource,
        *,
        seed: int,
        mirror: bool = False,
        texts: Texts | None = None,
        on_error: OnError = "raise",
    ) -> None:
        """Describes a run's samples; reads nothing yet.

        Args:
          source: the data set.
          seed: of the order, the partial clouds and the mirroring; not negative.
          mirror: mirror partial and complete clouds alike, along x, z, both or neither.
          texts: the captions of the source, as vectors.
          on_error: as in `SampleStream`.

        Raises:
          ValueError: the seed is negative, the source has no complete clouds, or the captions are
            those of another one.
        """
        super().__init__(len(source), seed, on_error)
        if not source.points:
            raise ValueError(f"{source.report.where}: no complete clouds to learn from.")
        _check(source, texts)
        self._source = source
        self._mirror = mirror
        self._texts = texts

    def _empty(self, count: int, position: int) -> Batch:
        del position
        return _empty(count, self._source.points, self._texts)

    def _write(self, batch: Batch, row: int, place: Place, rng: np.random.Generator) -> int:
        partial, complete = self._source.sample(place.index, rng)
        factors = mirror_factors(rng) if self._mirror else np.ones(3, np.float32)
        np.multiply(partial, factors, out=batch["partial"][row])
        np.multiply(complete, factors, out=batch["complete"][row])
        batch["weight"][row] = 1
        if self._texts is not None:
            self._texts.write(batch, row, place.index)
        return 0


def cloud_batches(
    source: CloudSource,
    *,
    batch: int,
    prefetch: int = 2,
    texts: Texts | None = None,
    lost: list[str] | None = None,
    prepared: dict[int, float] | None = None,
) -> Iterator[Batch]:
    """The fixed samples of a data set once, in order.

    Args:
      source: the data set.
      batch: samples in each batch; the last is filled up with clouds of zeros, of weight 0 and
        index -1, with the text 0 and the caption -1.
      prefetch: batches to prepare ahead.
      texts: the captions of the source, as vectors.
      lost: takes the errors of samples that cannot be read, which are like those that fill up the
        last batch. None ends with the first error.
      prepared: as `stream.in_groups` takes it.

    Yields:
      The arrays of a `CloudStream` sample with a leading axis of `batch`, epoch 0.

    Raises:
      DataError: a file cannot be used.
      ValueError: an argument is out of range.
    """
    if batch < 1 or prefetch < 0:
        raise ValueError(f"batch {batch}, prefetch {prefetch}: expected at least 1 and 0.")
    _check(source, texts)
    return _evaluated(source, batch, prefetch, texts, lost, prepared)


def _evaluated(
    source: CloudSource, batch: int, prefetch: int, texts: Texts | None, lost: list[str] | None,
    prepared: dict[int, float] | None,
) -> Iterator[Batch]:  # fmt: skip
    def fill(arrays: Batch, row: int, index: int) -> int:
        arrays["partial"][row], arrays["complete"][row] = source.sample(index, None)
        arrays["weight"][row] = 1
        arrays["index"][row] = index
        if texts is not None:
            texts.write(arrays, row, index)
        return 0

    def empty() -> Batch:
        return _empty(batch, source.points, texts)

    return in_order(len(source), batch, empty, fill, prefetch, lost, prepared)


def _check(source: CloudSource, texts: Texts | None) -> None:
    if texts is not None and len(texts) != len(source):
        raise ValueError(
            f"captions of {len(texts)} samples for {source.report.where}, which has "
            f"{len(source)}: they are those of another source. Make them with Texts.of(source)."
        )


def _empty(count: int, points: int, texts: Texts | None) -> Batch:
    """A batch of clouds of zeros, of weight 0."""
    batch = {
        "partial": np.zeros((count, NUM_INPUT, 3), np.float32),
        "complete": np.zeros((count, points, 3), np.float32),
        "weight": np.zeros(count, np.float32),
        "index": np.zeros(count, np.int32),
        "epoch": np.zeros(count, np.int32),
    }
    return batch if texts is None else batch | texts.empty(count)
