"""What a task is to train, evaluate and predict: a model, its loss, its samples, its metrics."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import jax
import ml_collections
import numpy as np

from jaxaccum.accumulate import Groups, Objective, Output
from jaxaccum.fields import ConfigError, Fields
from jaxaccum.tasks.results import Predictor, Sample
from jaxaccum.weights.transfer import Weights

if TYPE_CHECKING:
    from jaxaccum.training.optim import Hyperparameter, Schedule

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


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with the weights of a run.

    Attributes:
      task: the model and what belongs to it.
      params, stats: of the best evaluation, or the newest, averaged if the recipe averages.
      config: the run's config.
      names: of the classes or categories.
      step: update the weights are of.
      fingerprint: of the recipe they were learned by.
      facts: what of the training data a user of the weights must know; see `Task.facts`.
    """

    task: Task
    params: PyTree
    stats: PyTree
    config: ml_collections.ConfigDict
    names: tuple[str, ...]
    step: int
    fingerprint: str
    facts: dict[str, Any]

    def with_end_to_end(self, chosen: bool | None) -> Trained:
        """The same, to be used as `eval.end_to_end` of its config says if that is `chosen`.

        Args:
          chosen: by the one-to-one branch and without NMS, or not; None: as it is.
        Raises:
          ConfigError: the network has no such branch, or the file that it is from had none.
        """
        options = self.config.eval
        if chosen is None or chosen == options.get("end_to_end", False):
            return self
        if "end_to_end" not in options:
            raise ConfigError(
                f"end_to_end is for detectors with a one-to-one branch; {self.config.model} is "
                f"none, but one of the task {self.task.name}"
            )
        absent = self.facts.get("absent_branch")
        if absent == ("one-to-one" if chosen else "one-to-many"):
            raise ConfigError(
                f"end_to_end={chosen}: these weights are of a file without the {absent} branch: "
                f"use end_to_end={not chosen}, or train from them, which trains both"
            )
        config = self.config.copy_and_resolve_references()
        config.eval.end_to_end = chosen
        type(self.task).fields.check(config)
        task = type(self.task).create(config, self.names, self.task.model.dtype)
        return dataclasses.replace(self, task=task, config=config)


@dataclasses.dataclass(frozen=True)
class Interface:
    """What an exported program takes and gives; see `Task.predict`.

    Attributes:
      inputs: shapes and dtypes of a sample's inputs, without the axis of samples.
      facts: the same in words, and what else a caller must know.
      onnx: names of inputs and outputs of the program as ONNX; None: it is not written as ONNX.
      candidates: whether the first outputs are boxes (N, A, 4) and class probabilities
        (N, A, classes), and all others (N, A, ...), for non-maximum suppression to choose from.
    """

    inputs: list[jax.ShapeDtypeStruct]
    facts: dict[str, Any]
    onnx: tuple[list[str], list[str]] | None = None
    candidates: bool = False


@dataclasses.dataclass(frozen=True)
class Adopted:
    """What makes weights from a file a trained model.

    Attributes:
      config: of the model, else with its defaults.
      names: of its classes.
      facts: see `Task.facts`.
      summary: of the model in words; hints: lines for who converts it.
    """

    config: ml_collections.ConfigDict
    names: tuple[str, ...]
    facts: dict[str, Any]
    summary: str
    hints: tuple[str, ...] = ()


@dataclasses.dataclass
class PackedSplit:
    """A split on its way into a packed set.

    Attributes:
      told: what the set says of it.
      arrays: what lies beside the records; what is known only after these is added by them.
      records: TFDS split -> the number of its records and the one at an index.
    """

    told: dict[str, Any]
    arrays: dict[str, np.ndarray]
    records: dict[str, tuple[int, Callable[[int], dict[str, Any]]]]


class Task(abc.ABC):
    """A model in training, and all that only this kind of model knows.

    A batch is a dict of arrays with a leading axis of samples; `weight` () is 1 for a real sample,
    `index` and `epoch` name it. What a task may leave as it is here has a default; a verb that it
    has no part for ends with an error that says so.

    Attributes:
      name: in packed sets and messages.
      fields: of its config.
      unit: what a sample is called, in the plural.
      monitor: the metric that decides which weights are best, and whether more of it is better.
      predict_flags: flags of `predict` that it takes, beside source and out.
      suffixes: of the files that it predicts; results: name of the JSON file with what it found.
      loss_modules: top-level names of parameters and statistics that belong to the loss: weights
        from elsewhere (`init_from`) leave them as they begin.
      model: the network.
      names: of the classes or categories.
    """

    name: ClassVar[str]
    fields: ClassVar[Fields]
    unit: ClassVar[str]
    monitor: ClassVar[tuple[str, bool]]
    predict_flags: ClassVar[tuple[str, ...]] = ()
    suffixes: ClassVar[frozenset[str]] = frozenset()
    results: ClassVar[str] = "results.json"
    loss_modules: ClassVar[tuple[str, ...]] = ()

    model: Any
    names: tuple[str, ...]

    # --- training ---

    @classmethod
    @abc.abstractmethod
    def open(
        cls, config: ml_collections.ConfigDict, split: str, names: Sequence[str] | None = None
    ) -> Any:
        """The "train" or "val" split that the config names.

        Raises:
          DataError: it cannot be used, or has other classes than `names`.
        """

    @classmethod
    def settled(
        cls, config: ml_collections.ConfigDict, names: Sequence[str], source: Any = None
    ) -> tuple[ml_collections.ConfigDict, list[str]]:
        """The config with what it leaves to the data set as values, and lines about these.

        Args:
          names: of the classes or categories.
          source: the training set; None where only the names are known.
        Raises:
          ConfigError: a field does not fit the names, or needs the source.
        """
        del names, source
        return config, []

    @classmethod
    @abc.abstractmethod
    def create(cls, config: ml_collections.ConfigDict, names: Sequence[str], dtype: Any) -> Task:
        """The task of a config, for classes of these names, that computes in `dtype`."""

    @abc.abstractmethod
    def initialise(self, seed: int, dtype: Any = np.float32) -> tuple[PyTree, PyTree]:
        """Initial (params, stats), on the host."""

    def load_frozen(
        self, config: ml_collections.ConfigDict, stats: PyTree
    ) -> tuple[PyTree, list[str]]:
        """Statistics with the weights that the config brings and no run trains; lines about them.

        Raises:
          WeightsError: they cannot be used.
        """
        del config
        return stats, []

    @abc.abstractmethod
    def objective(self, nbs: int) -> Objective:
        """The loss as terms over sums."""

    def weights(self, schedule: Schedule) -> dict[str, Hyperparameter]:
        """Weights of the terms that change during a run (`Objective.weights`): name of a
        denominator -> function of the updates done before, made of those of the schedule."""
        del schedule
        return {}

    @abc.abstractmethod
    def forward(
        self, params: PyTree, stats: PyTree, batch: PyTree, groups: Groups | None
    ) -> Output:
        """Numerators, denominators and moments of a microbatch."""

    def untrained(self, path: str) -> bool:
        """Whether the loss does not depend on a parameter."""
        del path
        return False

    @abc.abstractmethod
    def example(self, samples: int) -> PyTree:
        """Shapes of a batch."""

    @abc.abstractmethod
    def stream(
        self,
        config: ml_collections.ConfigDict,
        source: Any,
        samples: int,
        plain: bool = False,
    ) -> Any:
        """The samples of a run of that many; without the strongest augmentation if `plain`."""

    def facts(self, source: Any) -> dict[str, Any]:
        """What of the training data a user of the weights must know; kept in checkpoints."""
        del source
        return {}

    def notes(self, config: ml_collections.ConfigDict, source: Any, samples: int) -> list[str]:
        """Lines to print at the start of a run of `samples` of a source.

        Raises:
          ConfigError: the source does not fit the model.
        """
        del config, source, samples
        return []

    def readable(self, record: dict[str, Any]) -> dict[str, float]:
        """What people want to read beside a logged update, in their units."""
        del record
        return {}

    # --- evaluation ---

    @abc.abstractmethod
    def evaluation(self, samples: int) -> tuple[Callable[..., PyTree], tuple[Any, ...]]:
        """What an evaluation computes on the device, and the shapes of a batch of it: a function
        of (params, stats, *batch), and batch."""

    @abc.abstractmethod
    def evaluator(self, config: ml_collections.ConfigDict, source: Any) -> Evaluator:
        """The metrics of weights on the val split, as a function, for use during training."""

    def full_evaluator(
        self, config: ml_collections.ConfigDict, split: str = ""
    ) -> tuple[Evaluator, list[str]]:
        """Everything that the data set has to evaluate on, and lines about it: a split of it, by
        default val.

        Raises:
          DataError: there is no such split.
        """
        source = self.open(config, split or "val", self.names)
        return self.evaluator(config, source), source.report.lines()

    @abc.abstractmethod
    def summary(self, best: dict[str, Any]) -> str:
        """The metrics of an evaluation in a few words."""

    def tables(self, found: dict[str, float]) -> list[str]:
        """The metrics of a full evaluation as lines of a table, where that is usual."""
        del found
        return []

    def coco_results(self, evaluator: Any) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """What an evaluator found last, as COCO's tools read results, and the data set that they
        are of; None where that is a COCO json already.

        Raises:
          ConfigError: the task finds no boxes.
        """
        del evaluator
        raise ConfigError(f"--predictions: the task {self.name} finds nothing that COCO has")

    # --- pictures ---

    def drawn_samples(self, source: Any, batch: Batch, count: int) -> list[np.ndarray]:
        """Up to `count` samples of a training batch as the network sees them, (H, W, 3) uint8."""
        del source, batch, count
        return []

    def drawn_source(self, source: Any) -> dict[str, np.ndarray]:
        """Name -> picture of what a data set holds."""
        del source
        return {}

    def drawn_evaluation(self, evaluator: Any) -> dict[str, Callable[[], np.ndarray]]:
        """Name -> what draws a picture of what an evaluator has measured last, also later."""
        del evaluator
        return {}

    # --- use ---

    def choices(self) -> dict[str, Any]:
        """How the network is used, where there is more than one way: what results say of it."""
        return {}

    def input_size(self) -> str:
        """How large a sample is to the network, in words that speeds end with; "" if it varies."""
        return ""

    @abc.abstractmethod
    def predict(self, params: PyTree, stats: PyTree, *inputs: jax.Array) -> Any:
        """What the network makes of inputs, each with a leading axis of samples."""

    def read_file(self, path: Path) -> Iterator[Sample]:
        """The samples in a file, of one of `suffixes`.

        Raises:
          DataError: it cannot be read, or not to its end. ConfigError: the task reads no files.
        """
        del path
        raise ConfigError(f"predict: the task {self.name} has no way to use files")

    def sample(self, value: Any) -> Sample:
        """A sample of what a user has in memory.

        Raises:
          DataError: it is none.
        """
        del value
        raise ConfigError(f"predict: the task {self.name} has no way to use arrays")

    def writes(self, **options: Any) -> tuple[str, ...]:
        """Where `Result.save` writes what becomes of a file NAME, below --out: "labels/NAME.txt",
        "crops/*/NAME_*.png"; or a suffix, which stands behind NAME. What is there of these and was
        not written by `predict` is never written over."""
        del options
        return (".png",)

    def predictor(self, trained: Trained, **options: Any) -> Predictor:
        """What the network makes of one sample, as a function.

        Args:
          trained: this task with its weights.
          options: of `predict_flags`.
        Raises:
          ConfigError: an option cannot be, or the task has none.
        """
        del trained, options
        raise ConfigError(f"predict: the task {self.name} has no way to use single samples")

    def interface(self, trained: Trained) -> Interface:
        """What an exported program takes and gives.

        Raises:
          ConfigError: the task cannot be exported.
        """
        del trained
        raise ConfigError(f"export: the task {self.name} does not say what its program takes")

    @classmethod
    def adopt(cls, found: Weights, name: str, names: Sequence[str], source: Path) -> Adopted:
        """What the verb `convert` keeps beside weights from a file; only tasks that ship are asked.

        Args:
          found: in the file. name: of their model, one of `fields.models`.
          names: of the classes, as the user gives them; none for those of the file.
          source: the file.
        Raises:
          WeightsError: the names are not those of the weights' classes.
        """
        del found, name, names, source
        raise ConfigError(f"convert: the task {cls.name} takes no weights from files")

    @classmethod
    def packed_splits(cls, config: ml_collections.ConfigDict) -> tuple[str, ...]:
        """The splits that a packed set holds."""
        del config
        return ("train", "val")

    @classmethod
    def open_to_pack(
        cls, config: ml_collections.ConfigDict, split: str, names: Sequence[str] | None
    ) -> Any:
        """A split as it is packed; by default as it is trained on.

        Raises:
          DataError: it cannot be used, or has other classes than `names`.
        """
        return cls.open(config, split, names)

    @classmethod
    def packed_options(cls, config: ml_collections.ConfigDict) -> dict[str, Any]:
        """Fields of the config that decide what is packed."""
        del config
        return {}

    @classmethod
    def packed_split(
        cls, source: Any, config: ml_collections.ConfigDict, split: str
    ) -> PackedSplit:
        """A source as it is packed.

        Raises:
          ConfigError: the task has no packed form.
        """
        del source, config, split
        raise ConfigError(f"pack: the task {cls.name} has no packed form")

    @classmethod
    def packed_features(cls, tfds: Any, names: Sequence[str]) -> dict[str, Any]:
        """The features of a record by TFDS (the module given), for classes of these names."""
        del tfds, names
        raise ConfigError(f"pack: the task {cls.name} has no packed form")
