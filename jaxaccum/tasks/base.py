"""What a task is to train, evaluate and predict: a model, its loss, its samples, its metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Protocol

import ml_collections
import numpy as np

from jaxaccum.accumulate import Groups, Objective, Output

PyTree = Any
Batch = dict[str, np.ndarray]
# (params, stats, pictures to draw) -> (metrics, pictures)
Evaluator = Callable[[PyTree, PyTree, int], tuple[dict[str, float], list[np.ndarray]]]


class Source(Protocol):
    """A data set of one split."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def identity(self) -> str: ...

    @property
    def report(self) -> Any: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...


class Stream(Protocol):
    """The samples of a run, by position."""

    @property
    def truncated(self) -> int: ...

    def indices(self, start: int, size: int) -> np.ndarray: ...

    def news(self) -> list[str]: ...

    def windows(
        self,
        start: int,
        sizes: Any,
        *,
        workers: int = 0,
        prefetch: int = 2,
        backend: Any = "auto",
        share: np.ndarray | None = None,
    ) -> Iterator[Batch]: ...


class Task(Protocol):
    """A model in training, and all that only this kind of model knows.

    A batch is a dict of arrays with a leading axis of samples; `weight` () is 1 for a real sample,
    `index` and `epoch` name it.

    Attributes:
      unit: what a sample is called, in the plural.
      monitor: the metric that decides which weights are best, and whether more of it is better.
      model: the network.
      names: of the classes or categories.
    """

    unit: ClassVar[str]
    monitor: ClassVar[tuple[str, bool]]

    @property
    def model(self) -> Any: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    @classmethod
    def open(
        cls, config: ml_collections.ConfigDict, split: str, names: Sequence[str] | None = None
    ) -> Any:
        """The "train" or "val" split that the config names.

        Raises:
          DataError: it cannot be used, or has other classes than `names`.
        """
        ...

    @classmethod
    def create(
        cls,
        config: ml_collections.ConfigDict,
        names: Sequence[str],
        dtype: Any,
    ) -> Task: ...

    def initialise(self, seed: int, dtype: Any = np.float32) -> tuple[PyTree, PyTree]:
        """Initial (params, stats), on the host."""
        ...

    def load_frozen(
        self, config: ml_collections.ConfigDict, stats: PyTree
    ) -> tuple[PyTree, list[str]]:
        """Statistics with the weights that the config brings and no run trains; lines about them.

        Raises:
          WeightsError: they cannot be used.
        """
        ...

    def objective(self, nbs: int, compat: bool = False) -> Objective: ...

    def forward(
        self, params: PyTree, stats: PyTree, batch: PyTree, groups: Groups | None
    ) -> Output:
        """Numerators, denominators and moments of a microbatch."""
        ...

    def untrained(self, path: str) -> bool:
        """Whether the loss does not depend on a parameter."""
        ...

    def example(self, samples: int) -> PyTree:
        """Shapes of a batch."""
        ...

    def evaluation(self, samples: int) -> tuple[Callable[..., PyTree], tuple[Any, ...]]:
        """What an evaluation computes on the device, and the shapes of a batch of it: a function
        of (params, stats, *batch), and batch."""
        ...

    def stream(
        self,
        config: ml_collections.ConfigDict,
        source: Any,
        samples: int,
        plain: bool = False,
    ) -> Any:
        """The samples of a run of that many; without the strongest augmentation if `plain`."""
        ...

    def facts(self, source: Any) -> dict[str, Any]:
        """What of the training data a user of the weights must know; kept in checkpoints."""
        ...

    def notes(self, config: ml_collections.ConfigDict, source: Any, samples: int) -> list[str]:
        """Lines to print at the start of a run of `samples` of a source.

        Raises:
          ConfigError: the source does not fit the model.
        """
        ...

    def evaluator(self, config: ml_collections.ConfigDict, source: Any) -> Evaluator:
        """The metrics of weights on the val split, as a function, for use during training."""
        ...

    def full_evaluator(self, config: ml_collections.ConfigDict) -> tuple[Evaluator, list[str]]:
        """Everything that the data set has to evaluate on, and lines about it."""
        ...

    def summary(self, best: dict[str, Any]) -> str:
        """The metrics of an evaluation in a few words."""
        ...

    def tables(self, found: dict[str, float]) -> list[str]:
        """The metrics of a full evaluation as lines of a table, where that is usual."""
        ...

    def readable(self, record: dict[str, Any]) -> dict[str, float]:
        """What people want to read beside a logged update, in their units."""
        ...
