"""Monocular 3D detection: YOLOv12-3D, its loss terms, its samples and KITTI's metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxaccum import data, models
from jaxaccum.accumulate import Groups, Objective, Output
from jaxaccum.data import check
from jaxaccum.data.base import require_objects
from jaxaccum.data.formats import packed
from jaxaccum.draw import boxes3d as draw_boxes3d
from jaxaccum.draw import figures
from jaxaccum.fields import ConfigError, Fields
from jaxaccum.losses import boxes3d as losses
from jaxaccum.losses import detection
from jaxaccum.metrics import kitti
from jaxaccum.models import boxes3d, yolo
from jaxaccum.tasks import files, packing
from jaxaccum.tasks.base import Adopted, Interface, PackedSplit, Task, Trained
from jaxaccum.tasks.detection import adopt, class_weights
from jaxaccum.tasks.detection3d import labels, predict
from jaxaccum.tasks.detection3d.evaluator import Evaluator
from jaxaccum.tasks.detection3d.fields import FIELDS, as_original
from jaxaccum.tasks.results import Predictor, Sample
from jaxaccum.weights.transfer import Weights

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Detection3DTask(Task):
    """A 3D detector in training.

    A batch is a dict with a leading axis of samples: `image` (H, W, 3) uint8 RGB, `boxes` (M, 4)
    x1 y1 x2 y2 in pixels, `classes` (M,) int32, `valid` (M,) bool, `locations` (M, 3) and
    `dimensions` (M, 3) in metres, `yaw` (M,), `camera` (3, 4) to pixels of the image, `weight` ()
    1 for a real sample; `index` and `epoch` name the sample.

    Attributes:
      model: the network.
      size: height and width of the input in pixels, multiples of 32.
      gains: of the terms box, cls, dfl, of a location's axis, of size and heading.
      metres: see `losses.boxes3d`.
      coding: what the outputs mean.
      max_objects: room for objects in a training sample.
      names: of the classes.
      compat: the loss as published.
      class_weights: of each class in the cls term; () for 1.
    """

    name: ClassVar[str] = "detection3d"
    fields: ClassVar[Fields] = FIELDS
    unit: ClassVar[str] = "images"
    monitor: ClassVar[tuple[str, bool]] = ("ap40_3d/mean/moderate", True)
    predict_flags: ClassVar[tuple[str, ...]] = ("conf", "iou", "calib")
    suffixes: ClassVar[frozenset[str]] = files.PICTURES
    results: ClassVar[str] = "detections.json"

    model: yolo.Yolo
    size: tuple[int, int]
    gains: tuple[float, ...] = (7.5, 0.5, 1.5, 1.0, 1.0, 1.0)
    metres: float = 0.1
    coding: boxes3d.Coding = dataclasses.field(default_factory=boxes3d.Coding)
    max_objects: int = 50
    names: tuple[str, ...] = ()
    compat: bool = False
    class_weights: tuple[float, ...] = ()

    @classmethod
    def open(
        cls, config: ml_collections.ConfigDict, split: str, names: Sequence[str] | None = None
    ) -> data.Source3D:
        """The "train" or "val" split that the config names.

        Raises:
          DataError: it cannot be used, or has other classes than `names`.
        """
        options = config.data
        fraction = options.val_fraction if split == "val" else 1.0
        split = options.val_split if split == "val" else split
        source = data.open_source3d(
            options.path, split, merge=config.compat, fraction=fraction, seed=config.seed,
            on_error=options.on_error,
        )  # fmt: skip
        if names is not None and tuple(names) != source.names:
            raise data.DataError(
                f"{source.report.where} has the classes {', '.join(source.names)}; expected "
                f"{', '.join(names)}"
            )
        source = check.checked(source, options.on_error)
        if split == "train":
            require_objects(source)
        return source

    @classmethod
    def settled(
        cls, config: ml_collections.ConfigDict, names: Sequence[str], source: Any = None
    ) -> tuple[ml_collections.ConfigDict, list[str]]:
        """With the classes' weights in their order, see `class_weights.settled`."""
        return class_weights.settled(config, names, source)

    @classmethod
    def create(
        cls, config: ml_collections.ConfigDict, names: Sequence[str], dtype: Any
    ) -> Detection3DTask:
        """The task of a config, for classes of these names.

        Raises:
          ConfigError: its weights of classes are not those of the names.
        """
        model = models.create(config.model, num_classes=len(names), dtype=dtype)
        loss, coding = config.loss, boxes3d.Coding(**config.box3d.to_dict())
        gains = (loss.box, loss.cls, loss.dfl, loss.location, loss.size, loss.heading)
        return cls(
            model.clone(remat=config.remat == "blocks", outputs3d=boxes3d.outputs(coding)),
            (config.data.height, config.data.width), gains, loss.metres, coding,
            config.data.max_objects, tuple(names), config.compat,
            class_weights.by_class(loss.class_weights, names),
        )  # fmt: skip

    def input_size(self) -> str:
        """Height and width, in words."""
        return f"{self.size[0]} x {self.size[1]} px"

    @property
    def anchors(self) -> yolo.Anchors:
        return yolo.anchors(*self.size, self.model.strides)

    def initialise(self, seed: int, dtype: Any = np.float32) -> tuple[PyTree, PyTree]:
        """Initial (params, stats), on the host."""
        example = jax.ShapeDtypeStruct((1, *self.size, 3), self.model.dtype)
        return models.initialise(
            self.model, example, seed, yolo.initial_constants(self.model),
            yolo.initial_deviation(self.model), dtype,
        )  # fmt: skip

    def objective(self, nbs: int) -> Objective:
        """The loss; its gradient is scaled by the effective batch, as the recipes expect."""
        location, size, heading = self.gains[3:]
        more, floors = losses.terms(location, size, heading, self.compat)
        floors = {detection.TARGET_SCORES: 1.0, **floors}
        return Objective((*detection.terms(*self.gains[:3]), *more), floors, float(nbs))

    def forward(
        self, params: PyTree, stats: PyTree, batch: PyTree, groups: Groups | None
    ) -> Output:
        """Numerators, denominators and moments of a microbatch."""
        weight = batch["weight"]
        raw, changed = self.model.apply(
            {"params": params, "batch_stats": stats}, batch["image"], groups, mutable=["moments"]
        )
        # As in 2D: XLA's CPU backend would compute the last layers anew in every part of the loss.
        predictions: Any = yolo.Predictions(*jax.lax.optimization_barrier(tuple(raw)))
        targets = detection.Targets(batch["boxes"], batch["classes"], batch["valid"], weight)
        numerators, denominators, assignment = detection.detection_loss(
            predictions, self.anchors, targets, enlarge_small=not self.compat,
            class_weights=self.class_weights,
        )  # fmt: skip
        more, others = losses.boxes3d_loss(
            predictions.boxes3d, assignment, losses.Targets3D(
                batch["locations"], batch["dimensions"], batch["yaw"], weight, batch["camera"]
            ), self.coding, self.size[1], self.metres, self.compat,
        )  # fmt: skip
        return Output(numerators | more, denominators | others, changed.get("moments", {}))

    def predict(self, params: PyTree, stats: PyTree, *inputs: jax.Array):
        """Boxes in the image and in space.

        Args:
          inputs: images (N, H, W, 3); cameras (N, 3, 4) to their pixels.
        Returns:
          boxes (N, A, 4) in pixels of the input, class probabilities (N, A, classes), and Boxes3D
          in metres and radians of the cameras' frame.
        """
        images, cameras = inputs
        variables = {"params": params, "batch_stats": stats}
        predictions: Any = self.model.apply(variables, images)
        boxes, scores = yolo.decode(predictions, self.anchors)
        found = boxes3d.decode(predictions.boxes3d, self.coding)
        cameras = cameras.astype(boxes.dtype)
        return boxes, scores, boxes3d.in_camera(found, boxes, cameras, self.size[1], self.coding)

    def example(self, samples: int) -> PyTree:
        """Shapes of a batch."""

        def shape(*dims, dtype=jnp.float32):
            return jax.ShapeDtypeStruct((samples, *dims), dtype)

        room = self.max_objects
        return {
            "image": shape(*self.size, 3, dtype=jnp.uint8),
            "boxes": shape(room, 4),
            "classes": shape(room, dtype=jnp.int32),
            "valid": shape(room, dtype=jnp.bool_),
            "locations": shape(room, 3),
            "dimensions": shape(room, 3),
            "yaw": shape(room),
            "camera": shape(3, 4),
            "weight": shape(),
            "index": shape(dtype=jnp.int32),
            "epoch": shape(dtype=jnp.int32),
        }

    def evaluation(self, samples: int) -> tuple[Callable[..., PyTree], tuple[Any, ...]]:
        """What an evaluation computes on the device, and the shapes of a batch of it."""
        example = self.example(samples)
        return self.predict, (example["image"], example["camera"])

    def stream(
        self,
        config: ml_collections.ConfigDict,
        source: data.Source3D,
        samples: int,
        plain: bool = False,
    ) -> data.TrainStream3D:
        """The samples of a run; not zoomed or shifted if `plain`.

        Raises:
          ConfigError: an augmentation is out of its range.
        """
        del samples
        options = config.augment.to_dict()
        if plain:
            options |= {"scale": 0.0, "translate": 0.0}
        try:
            augment = data.Augment3D(**options)
        except ValueError as error:
            raise ConfigError(f"augment: {error}") from None
        return data.TrainStream3D(
            source, size=self.size, max_objects=self.max_objects, augment=augment,
            seed=config.seed, compat=self.compat, cache=config.data.cache,
            cache_bytes=int(config.data.cache_gib * 2**30) // max(config.data.workers, 1),
            on_error=config.data.on_error,
        )  # fmt: skip

    def notes(
        self, config: ml_collections.ConfigDict, source: data.Source3D, samples: int
    ) -> list[str]:
        """Lines to print at the start of a run of `samples` of a source."""
        del samples
        lines = []
        low, reach = boxes3d.LOWEST, boxes3d.WIDTH * boxes3d.BINS
        outside = 0
        for i in range(len(source)):
            where = source.objects(i).locations
            outside += int(np.sum(np.any((where <= low) | (where >= low + reach), axis=1)))
        if outside:
            lines.append(
                f"{outside} objects lie beyond the bins of a location (x and y within 50 m, z up "
                "to 100 m): what is beyond teaches no location"
            )
        if config.augment.scale and not self.coding.focal:
            lines.append(
                "augment.scale without box3d.focal: near and far objects look alike, and depth "
                "is learned from both"
            )
        return lines

    def evaluator(self, config: ml_collections.ConfigDict, source: data.Source3D) -> Evaluator:
        """KITTI's metrics on a source."""
        return Evaluator(self, source, config.eval, config.data.on_error)

    def summary(self, best: dict[str, Any]) -> str:
        """The metrics of an evaluation in a few words."""
        return (
            f"moderate AP (R40) 3D {best['ap40_3d/mean/moderate']:.2f}, BEV "
            f"{best['ap40_bev/mean/moderate']:.2f}, 2D {best['ap40_2d/mean/moderate']:.2f}; "
            f"depth error {best['depth/all']:.2f} m"
        )

    def tables(self, found: dict[str, float]) -> list[str]:
        """The table of KITTI's benchmark, and errors of what was found in the image."""
        lines = kitti.summary(found).splitlines()
        lines.append(f"{'mean absolute error':28}{'found':>10}" + "".join(
            f"{title:>10}" for title in ("depth m", "lateral m", "length m", "yaw rad")
        ))  # fmt: skip
        for kind in (*kitti.CLASSES, "all"):
            count = f"{found[f'matched/{kind}']:.0f}/{found[f'truths/{kind}']:.0f}"
            values = (found[f"{k}/{kind}"] for k in ("depth", "lateral", "length", "yaw"))
            cells = "".join(f"{'-' if np.isnan(v) else f'{v:.2f}':>10}" for v in values)
            lines.append(f"{kind:28}{count:>10}{cells}")
        return lines

    def read_file(self, path: Path) -> Iterator[Sample]:
        """An image, or the frames of an animation or a video, or the pages of a TIFF."""
        return files.read_pictures(path)

    def drawn_samples(self, source: Any, batch: Any, count: int) -> list[np.ndarray]:
        """Training images with their boxes in space, after augmentation."""
        return [
            draw_boxes3d.draw(
                np.asarray(batch["image"][i]), labels.of_sample(batch, i, source.names),
                batch["camera"][i], text=min(self.size) >= 192,
            )
            for i in np.flatnonzero(np.asarray(batch["weight"]) > 0)[:count]
        ]  # fmt: skip

    def drawn_source(self, source: data.Source3D) -> dict[str, np.ndarray]:
        """How many objects of which class."""
        classes = [source.objects(i).classes for i in range(len(source))]
        return {"labels": figures.counted(classes, source.names, f"{len(source)} images")}

    def sample(self, value: Any) -> Sample:
        """An image in memory."""
        return files.picture_of(value)

    def writes(self, **options: Any) -> tuple[str, ...]:
        """The picture, and a label file of KITTI's."""
        del options
        return (".png", "data/NAME.txt")

    def predictor(self, trained: Trained, **options: Any) -> Predictor:
        """Detects the objects of one image; see `detection3d.predict.predictor`."""
        return predict.predictor(trained, **options)

    def interface(self, trained: Trained) -> Interface:
        """Images and cameras to boxes in the image and in space."""
        del trained
        height, width = self.size
        inputs = [
            jax.ShapeDtypeStruct((height, width, 3), jnp.uint8),
            jax.ShapeDtypeStruct((3, 4), jnp.float32),
        ]
        facts = {
            "image_size": [height, width],
            "input": "images (N, height, width, 3) uint8 RGB, letterboxed, and cameras (N, 3, 4) "
            "that project metres to their pixels",
            "output": "boxes (N, A, 4) x1 y1 x2 y2 in pixels, class probabilities (N, A, classes), "
            "bottom centres (N, A, 3) x y z and sizes (N, A, 3) height width length in metres, "
            "yaw (N, A) in radians",
        }
        outputs = ["boxes", "probabilities", "locations", "sizes", "yaw"]
        return Interface(inputs, facts, (["images", "cameras"], outputs), candidates=True)

    @classmethod
    def adopt(cls, found: Weights, name: str, names: Sequence[str], source: Path) -> Adopted:
        """YOLOv12-3D as published, or ours: the original has no heading of two outputs."""
        config = cls.fields.defaults()
        config.model = name
        if found.outputs3d == boxes3d.OUTPUTS:
            as_original(config)
        classes = adopt.class_names(found, names, source)
        return adopt.adopted(config, classes, f"{config.data.height} x {config.data.width} px")

    @classmethod
    def packed_options(cls, config: ml_collections.ConfigDict) -> dict[str, Any]:
        """Whether KITTI's types were merged, as the original has it."""
        return {"merge": config.compat}

    @classmethod
    def packed_split(
        cls, source: Any, config: ml_collections.ConfigDict, split: str
    ) -> PackedSplit:
        """Images with boxes in space, and KITTI's labels of them."""
        made = packing.images(
            source, split, packed.OBJECTS_3D, lambda index: {"camera": source.camera(index)}
        )
        options, val = config.data, split == "val"
        fraction = options.val_fraction if val else 1.0
        made.told["pixels"] = source.pixels
        made.told["list"] = options.val_split if val else split
        made.told["sample"] = [fraction, config.seed if fraction < 1 else 0]
        labels = [source.labels(i) for i in range(len(source))]
        for name in packed.LABELS_3D:
            made.arrays[f"label_{name}"] = np.concatenate([getattr(one, name) for one in labels])
        made.arrays["label_counts"] = np.array([len(one) for one in labels])
        made.arrays["kinds"] = packed.as_array([kind for one in labels for kind in one.kinds])
        made.arrays["cameras"] = np.stack([source.camera(i) for i in range(len(source))])
        return made

    @classmethod
    def packed_features(cls, tfds: Any, names: Sequence[str]) -> dict[str, Any]:
        """The features of a record."""
        objects = {
            "locations": packing.floats(tfds, 3),
            "dimensions": packing.floats(tfds, 3),
            "yaw": packing.floats(tfds),
        }
        return packing.image_features(tfds, names, objects, {"camera": packing.floats(tfds, 3, 4)})
