"""2D detection: a YOLO model, its loss terms, its samples and its mAP."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxaccum import data, draw, models
from jaxaccum.accumulate import Groups, Objective, Output
from jaxaccum.data import check
from jaxaccum.data.base import require_objects
from jaxaccum.data.formats import packed
from jaxaccum.data.views import viewed
from jaxaccum.draw import figures
from jaxaccum.fields import ConfigError, Fields
from jaxaccum.losses import detection
from jaxaccum.models import yolo
from jaxaccum.models.families import has_one_to_one
from jaxaccum.tasks import files, packing
from jaxaccum.tasks.base import Adopted, Interface, PackedSplit, Task, Trained
from jaxaccum.tasks.detection import adopt, class_weights, predict
from jaxaccum.tasks.detection import sizes as image_sizes
from jaxaccum.tasks.detection.evaluator import Evaluator
from jaxaccum.tasks.detection.fields import FIELDS
from jaxaccum.tasks.results import Predictor, Sample
from jaxaccum.weights import branches
from jaxaccum.weights.transfer import Weights

if TYPE_CHECKING:
    from jaxaccum.training.optim import Hyperparameter, Schedule

PyTree = Any


@dataclasses.dataclass(frozen=True)
class DetectionTask(Task):
    """A detector in training.

    A batch is a dict with a leading axis of samples: `image` (S, S, 3) uint8 RGB, `boxes` (M, 4)
    x1 y1 x2 y2 in pixels, `classes` (M,) int32, `valid` (M,) bool, `weight` () 1 for a real
    sample; `index` and `epoch` name the sample.

    Attributes:
      model: the network.
      image_size: side of the square input in pixels, a multiple of 32.
      gains: of the terms box, cls, dfl or l1.
      max_objects: room for objects in a training sample.
      names: of the classes.
      one_to_many: weight of the one-to-many branches' terms in the first epoch and in the last, of
        a network that has two sets.
      end_to_end: use the one-to-one branch, and no NMS.
      max_det: detections of an image that `predict` then gives at most; agnostic: of an anchor only
        one.
      class_weights: of each class in the cls term; () for 1.
      sizes: of the squares that updates are computed on; () for image_size alone.
    """

    name: ClassVar[str] = "detection"
    fields: ClassVar[Fields] = FIELDS
    unit: ClassVar[str] = "images"
    monitor: ClassVar[tuple[str, bool]] = ("map50_95", True)
    predict_flags: ClassVar[tuple[str, ...]] = (
        "conf", "iou", "classes", "max_det", "agnostic", "save_txt", "save_crop",
        "end_to_end",
    )  # fmt: skip
    suffixes: ClassVar[frozenset[str]] = files.PICTURES
    results: ClassVar[str] = "detections.json"

    model: yolo.Yolo
    image_size: int
    gains: tuple[float, float, float] = (7.5, 0.5, 1.5)
    max_objects: int = 300
    names: tuple[str, ...] = ()
    one_to_many: tuple[float, float] = (0.8, 0.1)
    end_to_end: bool = False
    max_det: int = 300
    agnostic: bool = False
    class_weights: tuple[float, ...] = ()
    sizes: tuple[int, ...] = ()

    @classmethod
    def open(
        cls, config: ml_collections.ConfigDict, split: str, names: Sequence[str] | None = None
    ) -> data.Source:
        """The "train" or "val" split that the config names.

        Raises:
          DataError: it cannot be used, or has other classes than `names`.
        """
        options = config.data
        one_class = options.single_cls
        whole = cls.open_to_pack(config, split, None if one_class else names)
        if split == "train":
            require_objects(whole)
        return viewed(whole, options.fraction if split == "train" else 1.0, one_class)

    @classmethod
    def open_to_pack(
        cls, config: ml_collections.ConfigDict, split: str, names: Sequence[str] | None
    ) -> data.Source:
        """A split, whole and with all its classes.

        Raises:
          DataError: it cannot be used, or has other classes than `names`.
        """
        options = config.data
        source = data.open_source(
            options.path, split, val_path=options.val_path, images=options.images,
            on_error=options.on_error, names=names,
        )  # fmt: skip
        return check.checked(source, options.on_error)

    @classmethod
    def settled(
        cls, config: ml_collections.ConfigDict, names: Sequence[str], source: Any = None
    ) -> tuple[ml_collections.ConfigDict, list[str]]:
        """With the classes' weights in their order, see `class_weights.settled`."""
        return class_weights.settled(config, names, source)

    @classmethod
    def create(
        cls, config: ml_collections.ConfigDict, names: Sequence[str], dtype: Any
    ) -> DetectionTask:
        """The task of a config, for classes of these names.

        Raises:
          ConfigError: its weights of classes are not those of the names.
        """
        model = models.create(config.model, num_classes=len(names), dtype=dtype)
        model = model.clone(remat=config.remat == "blocks")
        loss = config.loss
        return cls(
            model, config.data.image_size, (loss.box, loss.cls, loss.dfl),
            config.data.max_objects, tuple(names), (loss.one_to_many, loss.one_to_many_final),
            end_to_end=config.eval.end_to_end, max_det=config.eval.max_det,
            class_weights=class_weights.by_class(loss.class_weights, names),
            sizes=image_sizes.parsed(config.augment.sizes),
        )  # fmt: skip

    @property
    def anchors(self) -> yolo.Anchors:
        return yolo.anchors(self.image_size, self.image_size, self.model.strides)

    def initialise(self, seed: int, dtype: Any = np.float32) -> tuple[PyTree, PyTree]:
        """Initial (params, stats), on the host."""
        size = self.image_size
        example = jax.ShapeDtypeStruct((1, size, size, 3), self.model.dtype)
        return models.initialise(
            self.model, example, seed, yolo.initial_constants(self.model),
            yolo.initial_deviation(self.model), dtype, yolo.initial_twin,
        )  # fmt: skip

    def objective(self, nbs: int) -> Objective:
        """The loss; its gradient is scaled by the effective batch, as the recipes expect."""
        if has_one_to_one(self.model.model):
            floors = {detection.ONE_TO_MANY: 1.0, detection.ONE_TO_ONE: 1.0}
            terms = detection.terms_of_two(*self.gains)
            return Objective(terms, floors, float(nbs), owner=detection.owner_of)
        return Objective(detection.terms(*self.gains), {detection.TARGET_SCORES: 1.0}, float(nbs))

    def weights(self, schedule: Schedule) -> dict[str, Hyperparameter]:
        """Of a network with two sets of branches: from the one to the other, by epochs.

        A window has the weights of the epoch that its first sample is in.
        """
        if not has_one_to_one(self.model.model):
            return {}
        first, last = self.one_to_many

        def many(count: Any) -> Any:
            done = schedule.epoch(count) / max(schedule.epochs - 1, 1)
            return first * (1 - done) + last * done

        return {detection.ONE_TO_MANY: many, detection.ONE_TO_ONE: lambda count: 1 - many(count)}

    def forward(
        self, params: PyTree, stats: PyTree, batch: PyTree, groups: Groups | None
    ) -> Output:
        """Numerators, denominators and moments of a microbatch."""
        weight = batch["weight"]
        predictions, changed = self.model.apply(
            {"params": params, "batch_stats": stats}, batch["image"], groups, mutable=["moments"]
        )
        # XLA's CPU backend would compute the last layers anew in every part of the loss that it
        # fuses them into, half as long again as the whole model.
        predictions = yolo.Predictions(*jax.lax.optimization_barrier(tuple(predictions)))
        targets = detection.Targets(batch["boxes"], batch["classes"], batch["valid"], weight)
        two = predictions.one_to_one is not None
        loss: Callable[..., Any] = detection.loss_of_two if two else detection.detection_loss
        height, width = batch["image"].shape[1:3]
        anchors = yolo.anchors(height, width, self.model.strides)
        numerators, denominators, _ = loss(
            predictions, anchors, targets, class_weights=self.class_weights
        )
        return Output(numerators, denominators, changed.get("moments", {}))

    def choices(self) -> dict[str, Any]:
        """Of a network with two sets of branches, by which it finds."""
        if has_one_to_one(self.model.model):
            return {"end_to_end": self.end_to_end}
        return {}

    def input_size(self) -> str:
        """The side of the square, in words."""
        return f"{self.image_size} px"

    def _chosen(self) -> list[str]:
        """The same as lines."""
        if not self.choices():
            return []
        if self.end_to_end:
            return ["objects are found by the one-to-one branch, without NMS (end_to_end)"]
        return ["objects are found by the one-to-many branch and NMS (end_to_end would need none)"]

    def predict(self, params: PyTree, stats: PyTree, *inputs: jax.Array):
        """Boxes (N, A, 4) in pixels of the input and class probabilities (N, A, classes), of
        images (N, H, W, 3) whose sides are multiples of the strides. If `end_to_end` what is found:
        boxes (N, k, 4), scores (N, k) and classes (N, k), see `yolo.surest`."""
        (images,) = inputs
        predictions: Any = self.model.apply({"params": params, "batch_stats": stats}, images)
        height, width = images.shape[1:3]
        anchors = yolo.anchors(height, width, self.model.strides)
        if self.end_to_end:
            return yolo.surest(predictions, anchors, self.max_det, self.agnostic)
        return yolo.decode(predictions, anchors)

    def example(self, samples: int) -> PyTree:
        """Shapes of a batch, of the largest images."""

        def shape(*dims, dtype=jnp.float32):
            return jax.ShapeDtypeStruct((samples, *dims), dtype)

        size, room = max(self.sizes, default=self.image_size), self.max_objects
        return {
            "image": shape(size, size, 3, dtype=jnp.uint8),
            "boxes": shape(room, 4),
            "classes": shape(room, dtype=jnp.int32),
            "valid": shape(room, dtype=jnp.bool_),
            "weight": shape(),
            "index": shape(dtype=jnp.int32),
            "epoch": shape(dtype=jnp.int32),
        }

    def evaluation(self, samples: int) -> tuple[Callable[..., PyTree], tuple[Any, ...]]:
        """What an evaluation computes on the device, and the shapes of a batch of it."""
        image = jax.ShapeDtypeStruct((samples, self.image_size, self.image_size, 3), jnp.uint8)
        return self.predict, (image,)

    def stream(
        self,
        config: ml_collections.ConfigDict,
        source: data.Source,
        samples: int,
        plain: bool = False,
    ) -> data.TrainStream:
        """The samples of a run of that many; without mosaic and mixup if `plain`.

        Raises:
          ConfigError: an augmentation is out of its range.
        """
        options = config.augment.to_dict()
        del options["close_mosaic"], options["sizes"]
        try:
            augment = data.Augment(**options)
        except ValueError as error:
            raise ConfigError(f"augment: {error}") from None
        return data.TrainStream(
            source,
            image_size=self.image_size,
            max_objects=self.max_objects,
            augment=augment,
            seed=config.seed,
            close_mosaic_at=0 if plain else mosaic_until(config, samples, len(source)),
            cache=config.data.cache,
            cache_bytes=int(config.data.cache_gib * 2**30) // max(config.data.workers, 1),
            on_error=config.data.on_error,
            sizes=() if plain else self.sizes,  # statistics are recomputed at what is evaluated
            window=config.nbs,
        )

    def notes(
        self, config: ml_collections.ConfigDict, source: data.Source, samples: int
    ) -> list[str]:
        """Lines to print at the start of a run of `samples` of a source."""
        sides = ", ".join(map(str, self.sizes))
        chosen = [f"images of {sides} px, by update, compiled once each"] if sides else []
        chosen += self._chosen()
        if not (config.augment.mosaic or config.augment.mixup):
            return chosen
        until = mosaic_until(config, samples, len(source)) // config.nbs
        lines = [
            f"mosaic and mixup until update {until} (augment.close_mosaic)" if until else
            "no mosaic or mixup: the run is no longer than augment.close_mosaic="
            f"{config.augment.close_mosaic:g} epochs"
        ]  # fmt: skip
        return [*lines, *chosen]

    def evaluator(self, config: ml_collections.ConfigDict, source: data.Source) -> Evaluator:
        """COCO mAP on a source."""
        return Evaluator(self, source, config.eval, config.data.on_error)

    def full_evaluator(
        self, config: ml_collections.ConfigDict, split: str = ""
    ) -> tuple[Evaluator, list[str]]:
        """COCO mAP on a split, and what that holds."""
        source = self.open(config, split or "val", self.names)
        lines = [*source.report.lines(), *self._chosen()]
        if not source.report.objects:
            of = f"split {split}" if split else "validation set"
            lines.append(f"no objects in the {of}: there is no mAP to measure")
        return self.evaluator(config, source), lines

    def summary(self, best: dict[str, Any]) -> str:
        """The metrics of an evaluation in a few words."""
        if np.isnan(best["map50"]):
            return "no mAP"
        return f"mAP50 {best['map50']:.4f}, mAP50-95 {best['map50_95']:.4f}"

    def tables(self, found: dict[str, float]) -> list[str]:
        """The metrics of all classes together and of each."""
        columns = ("objects", "precision", "recall", "ap50", "ap")
        titles = ("objects", "precision", "recall", "AP50", "AP50-95")
        width = max(5, *map(len, self.names))
        rows: list[tuple[str, tuple[str, ...]]] = [("class", titles)]
        every = {"ap50": "map50", "ap": "map50_95"}
        for name in ("", *self.names):
            keys = (f"{c}/{name}" if name else every.get(c, c) for c in columns)
            values = [found[key] for key in keys]
            cells = (f"{values[0]:.0f}", *("-" if np.isnan(v) else f"{v:.3f}" for v in values[1:]))
            rows.append((name or "all", cells))
        return [
            f"{name:<{width}}" + "".join(f"{cell:>11}" for cell in cells) for name, cells in rows
        ]

    def coco_results(self, evaluator: Any) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """Boxes with their scores; of a COCO data set under its own ids."""
        found, ids = evaluator.measured, getattr(evaluator.source, "coco_ids", None)
        if ids is None:
            return found.as_coco()
        images, categories = ids()
        return found.as_coco([images[index] for index in evaluator.order], categories)[0], None

    def drawn_samples(self, source: Any, batch: Any, count: int) -> list[np.ndarray]:
        """Training images with their boxes, after augmentation."""
        drawn = []
        for i in np.flatnonzero(np.asarray(batch["weight"]) > 0)[:count]:
            real = np.asarray(batch["valid"][i], bool)
            drawn.append(draw.draw_detections(
                np.asarray(batch["image"][i]), batch["boxes"][i][real], batch["classes"][i][real],
                source.names,
            ))  # fmt: skip
        return drawn

    def drawn_source(self, source: data.Source) -> dict[str, np.ndarray]:
        """How many objects of which class."""
        classes = [source.objects(i).classes for i in range(len(source))]
        return {"labels": figures.counted(classes, source.names, f"{len(source)} images")}

    def drawn_evaluation(self, evaluator: Any) -> dict[str, Callable[[], np.ndarray]]:
        """Precision and recall by confidence, and a confusion matrix."""
        found = evaluator.measured
        if found is None or found.curves is None or np.isnan(found.curves.best):
            return {}
        by = found.curves
        panels: dict[str, dict[str, figures.Curve]] = {}
        for title, values in (("precision", by.precision), ("recall", by.recall), ("F1", by.f1)):
            present = [(n, v) for n, v in zip(found.names, values, strict=True) if v[0] == v[0]]
            lines: dict[str, Any] = {name: (by.grid, value) for name, value in present}
            mean: Any = np.mean([value for _, value in present], axis=0)
            panels[title] = {**lines, "mean": (by.grid, mean)}
        return {
            "precision_recall": lambda: figures.curves(panels, "confidence", columns=3, top=1.02),
            "confusion": lambda: figures.confusion(found.confusion(), found.names),
        }

    def read_file(self, path: Path) -> Iterator[Sample]:
        """An image, or the frames of an animation or a video, or the pages of a TIFF."""
        return files.read_pictures(path)

    def sample(self, value: Any) -> Sample:
        """An image in memory."""
        return files.picture_of(value)

    def writes(self, **options: Any) -> tuple[str, ...]:
        """The picture, and labels and crops where they are asked for."""
        labels = ("labels/NAME.txt",) * bool(options.get("save_txt"))
        return (".png", *labels, *("crops/*/NAME_*.png",) * bool(options.get("save_crop")))

    def predictor(self, trained: Trained, **options: Any) -> Predictor:
        """Detects the objects of one image; see `detection.predict.predictor`."""
        return predict.predictor(trained, **options)

    def interface(self, trained: Trained) -> Interface:
        """Images to boxes and class probabilities, or end to end to detections."""
        del trained
        size = self.image_size
        output = "boxes (N, A, 4) x1 y1 x2 y2 in pixels, class probabilities (N, A, classes)"
        names = ["boxes", "probabilities"]
        if self.end_to_end:
            names = ["boxes", "scores", "classes"]
            output = (
                "boxes (N, K, 4) x1 y1 x2 y2 in pixels, scores (N, K), the highest first, and "
                f"classes (N, K) int32, K = {self.max_det} or the anchors if these are fewer; none "
                "is a double of another: keep those whose score is high enough"
            )
        facts = {
            "image_size": size,
            "input": "images (N, S, S, 3) uint8 RGB, letterboxed to S = image_size",
            "output": output,
            **self.choices(),
        }
        image = jax.ShapeDtypeStruct((size, size, 3), jnp.uint8)
        return Interface([image], facts, (["images"], names), candidates=not self.end_to_end)

    @classmethod
    def adopt(cls, found: Weights, name: str, names: Sequence[str], source: Path) -> Adopted:
        """A detector of another program, with the size of its images if the file knows it."""
        config = cls.fields.defaults()
        config.model = name
        if (size := found.image_size) and size > 0 and size % 32 == 0:
            config.data.image_size = size
        classes = adopt.class_names(found, names, source)
        absent = branches.absent(found.state) if has_one_to_one(name) else ""
        config.eval.end_to_end = absent == "one-to-many"
        return adopt.adopted(config, classes, f"{config.data.image_size} px", absent)

    @classmethod
    def packed_split(
        cls, source: Any, config: ml_collections.ConfigDict, split: str
    ) -> PackedSplit:
        """Images with boxes."""
        del config
        return packing.images(source, split, packed.OBJECTS, lambda index: {})

    @classmethod
    def packed_features(cls, tfds: Any, names: Sequence[str]) -> dict[str, Any]:
        """The features of a record."""
        return packing.image_features(tfds, names, {}, {})


def mosaic_until(config: ml_collections.ConfigDict, samples: int, epoch: int) -> int:
    """Samples of a run of `samples` that are made with mosaic; its last epochs are not."""
    return max(samples - round(config.augment.close_mosaic * epoch), 0)
