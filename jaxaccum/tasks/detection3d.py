"""Monocular 3D detection: YOLOv12-3D, its loss terms, its samples and KITTI's metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxaccum import config as configs
from jaxaccum import data, draw_boxes3d, models
from jaxaccum.accumulate import Groups, Objective, Output
from jaxaccum.data import check
from jaxaccum.data.stream import say_lost
from jaxaccum.losses import detection
from jaxaccum.losses import solids as losses
from jaxaccum.metrics import detection as metrics
from jaxaccum.metrics import kitti
from jaxaccum.models import solids, yolo

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Detection3DTask:
    """A 3D detector in training.

    A batch is a dict with a leading axis of samples: `image` (H, W, 3) uint8 RGB, `boxes` (M, 4)
    x1 y1 x2 y2 in pixels, `classes` (M,) int32, `valid` (M,) bool, `locations` (M, 3) and
    `dimensions` (M, 3) in metres, `yaw` (M,), `camera` (3, 4) to pixels of the image, `weight` ()
    1 for a real sample; `index` and `epoch` name the sample.

    Attributes:
      model: the network.
      size: height and width of the input in pixels, multiples of 32.
      gains: of the terms box, cls, dfl, of a location's axis, of size and heading.
      metres: see `losses.solids`.
      coding: what the outputs mean.
      max_objects: room for objects in a training sample.
      names: of the classes.
      compat: the loss as published.
    """

    unit: ClassVar[str] = "images"
    monitor: ClassVar[tuple[str, bool]] = ("ap40_3d/mean/moderate", True)

    model: yolo.Yolo
    size: tuple[int, int]
    gains: tuple[float, ...] = (7.5, 0.5, 1.5, 1.0, 1.0, 1.0)
    metres: float = 0.1
    coding: solids.Coding = dataclasses.field(default_factory=solids.Coding)
    max_objects: int = 50
    names: tuple[str, ...] = ()
    compat: bool = False

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
        return check.checked(source, options.on_error)

    @classmethod
    def create(
        cls, config: ml_collections.ConfigDict, names: Sequence[str], dtype: Any
    ) -> Detection3DTask:
        """The task of a config, for classes of these names."""
        model = models.create(config.model, num_classes=len(names), dtype=dtype)
        loss, coding = config.loss, solids.Coding(**config.box3d.to_dict())
        gains = (loss.box, loss.cls, loss.dfl, loss.location, loss.size, loss.heading)
        return cls(
            model.clone(remat=config.remat, solids=solids.outputs(coding)),
            (config.data.height, config.data.width), gains, loss.metres, coding,
            config.data.max_objects, tuple(names), config.compat,
        )  # fmt: skip

    @property
    def anchors(self) -> yolo.Anchors:
        return yolo.anchors(*self.size, self.model.strides)

    def initialise(self, seed: int, dtype: Any = np.float32) -> tuple[PyTree, PyTree]:
        """Initial (params, stats), on the host."""
        example = jax.ShapeDtypeStruct((1, *self.size, 3), self.model.dtype)
        return models.initialise(
            self.model, example, seed, yolo.initial_constants(self.model), yolo.initial_deviation,
            dtype,
        )  # fmt: skip

    def load_frozen(
        self, config: ml_collections.ConfigDict, stats: PyTree
    ) -> tuple[PyTree, list[str]]:
        """Nothing: every weight of a detector is trained."""
        del config
        return stats, []

    def objective(self, nbs: int, compat: bool = False) -> Objective:
        """The loss; its gradient is scaled by the effective batch, as the recipes expect."""
        location, size, heading = self.gains[3:]
        more, floors = losses.terms(location, size, heading, self.compat)
        floors = {detection.TARGET_SCORES: 1.0, **floors}
        return Objective((*detection.terms(*self.gains[:3]), *more), floors, float(nbs), compat)

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
            predictions, self.anchors, targets, enlarge_small=not self.compat
        )
        more, others = losses.solid_loss(
            predictions.solids, assignment, losses.SolidTargets(
                batch["locations"], batch["dimensions"], batch["yaw"], weight, batch["camera"]
            ), self.coding, self.size[1], self.metres, self.compat,
        )  # fmt: skip
        return Output(numerators | more, denominators | others, changed.get("moments", {}))

    def predict(self, params: PyTree, stats: PyTree, images: jax.Array, cameras: jax.Array):
        """Boxes in the image and in space.

        Args:
          images: (N, H, W, 3). cameras: (N, 3, 4) to their pixels.
        Returns:
          boxes (N, A, 4) in pixels of the input, class probabilities (N, A, classes), and Solids
          in metres and radians of the cameras' frame.
        """
        variables = {"params": params, "batch_stats": stats}
        predictions: Any = self.model.apply(variables, images)
        boxes, scores = yolo.decode(predictions, self.anchors)
        found = solids.decode(predictions.solids, self.coding)
        cameras = cameras.astype(boxes.dtype)
        return boxes, scores, solids.in_camera(found, boxes, cameras, self.size[1], self.coding)

    def untrained(self, path: str) -> bool:
        """Every parameter of a detector is trained."""
        del path
        return False

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
            raise configs.ConfigError(f"augment: {error}") from None
        return data.TrainStream3D(
            source, size=self.size, max_objects=self.max_objects, augment=augment,
            seed=config.seed, compat=self.compat, cache=config.data.cache,
            cache_bytes=int(config.data.cache_gib * 2**30) // max(config.data.workers, 1),
            on_error=config.data.on_error,
        )  # fmt: skip

    def facts(self, source: data.Source3D) -> dict[str, Any]:
        """Nothing: the config and the class names say all."""
        del source
        return {}

    def notes(
        self, config: ml_collections.ConfigDict, source: data.Source3D, samples: int
    ) -> list[str]:
        """Lines to print at the start of a run of `samples` of a source."""
        del samples
        lines = []
        low, reach = solids.LOWEST, solids.WIDTH * solids.BINS
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

    def full_evaluator(self, config: ml_collections.ConfigDict) -> tuple[Evaluator, list[str]]:
        """KITTI's metrics on the val split, and what that holds."""
        source = self.open(config, "val", self.names)
        return self.evaluator(config, source), source.report.lines()

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

    def readable(self, record: dict[str, Any]) -> dict[str, float]:
        """Nothing: the terms have no unit alone."""
        del record
        return {}


def to_labels(
    found: metrics.Detections, boxes: np.ndarray, own: solids.Solids, names: Sequence[str]
) -> kitti.Labels:
    """Detections of an image as KITTI writes them.

    Args:
      found: of one image. boxes: (n, 4) theirs in pixels of the original image.
      own: 3D boxes of all anchors of the image. names: of the classes.
    """
    rows = np.zeros(0, int) if found.anchors is None else found.anchors
    where, sizes, yaw = (np.asarray(a, np.float32)[rows] for a in own)
    alpha = yaw - np.arctan2(where[:, 0], where[:, 2])
    return kitti.Labels(
        tuple(names[c] for c in found.classes),
        np.full(len(rows), -1, np.float32),
        np.full(len(rows), -1, np.int32),
        ((alpha + np.pi) % (2 * np.pi) - np.pi).astype(np.float32),
        np.asarray(boxes, np.float32),
        sizes,
        where,
        yaw,
        found.scores,
    )


def chosen(labels: kitti.Labels, rows: np.ndarray) -> kitti.Labels:
    """Some rows, by (n,) bool."""
    values: dict[str, Any] = {
        f.name: getattr(labels, f.name)[rows] for f in dataclasses.fields(labels)[1:]
    }
    kinds = tuple(kind for kind, keep in zip(labels.kinds, rows, strict=True) if keep)
    return kitti.Labels(kinds, **values)


def _none() -> kitti.Labels:
    """No detections."""
    flat, triples = np.zeros(0, np.float32), np.zeros((0, 3), np.float32)
    corners = np.zeros((0, 4), np.float32)
    return kitti.Labels(
        (), flat, np.zeros(0, np.int32), flat, corners, triples, triples, flat, flat
    )  # fmt: skip


class Evaluator:
    """KITTI's metrics of a 3D detector on a source, as a function of its weights.

    The padded samples of the last batch are not counted. Results do not depend on the batch.
    """

    def __init__(
        self,
        task: Detection3DTask,
        source: data.Source3D,
        options: ml_collections.ConfigDict,
        on_error: str = "raise",
    ):
        """on_error: "skip" leaves out images that cannot be read, and says so."""
        self.task, self.source, self.options = task, source, options
        self._forgiven = (data.DataError,) if on_error == "skip" else ()
        self._predict = jax.jit(task.predict)
        self._truths = [self._in_pixels_of_kitti(source.labels(i)) for i in range(len(source))]
        metric, _ = task.monitor
        if np.isnan(kitti.evaluate(self._truths, [_none()] * len(source))[metric]):
            raise data.DataError(
                f"{source.report.where}: no {', '.join(kitti.CLASSES)} that counts at the level "
                "moderate (higher than 25 pixels, hardly hidden), so KITTI's metric has nothing to "
                "say: evaluate on other frames"
            )

    def _in_pixels_of_kitti(self, labels: kitti.Labels) -> kitti.Labels:
        return dataclasses.replace(labels, boxes=labels.boxes * np.float32(self.source.pixels))

    def __call__(
        self, params: PyTree, stats: PyTree, pictures: int = 0
    ) -> tuple[dict[str, float], list[np.ndarray]]:
        """Metrics, and the first `pictures` images with detections of score 0.25 and more."""
        # One device evaluates; weights that lie on all of them would have each do all of it.
        params, stats = jax.device_put((params, stats), jax.local_devices()[0])
        seen: list[int] = []
        labels: list[kitti.Labels] = []
        lost: list[str] | None = [] if self._forgiven else None
        pending: Callable[[], None] | None = None
        batches = data.eval_batches3d(
            self.source, size=self.task.size, batch=self.options.batch, lost=lost
        )
        with ThreadPoolExecutor() as pool:
            for batch in batches:
                output = self._predict(params, stats, batch["image"], batch["camera"])
                if pending is not None:  # the host works on a batch while the device is on the next
                    pending()
                seen.extend(int(i) for i in batch["index"][batch["weight"] > 0])
                pending = functools.partial(self._detect, pool, batch, output, labels)
            if pending is not None:
                pending()
        say_lost(lost or [], len(self.source), "images")
        truths = [self._truths[i] for i in seen]
        enlarged = [self._in_pixels_of_kitti(one) for one in labels]
        result = kitti.evaluate(truths, enlarged)
        loose = kitti.evaluate(truths, enlarged, thresholds=kitti.LOOSE)
        result |= {
            f"loose/{k}": v for k, v in loose.items() if k.startswith(("ap40_bev", "ap40_3d"))
        }
        result |= kitti.errors(truths, enlarged)
        drawn = []
        for index, one in zip(seen[:pictures], labels, strict=False):
            with contextlib.suppress(*self._forgiven):
                drawn.append(self._drawn(index, one))
        return result, drawn

    def _detect(self, pool, batch, output, labels):
        boxes, scores, found_3d = jax.tree.map(np.asarray, output)
        options = self.options

        def detect(i):
            found = metrics.nms(
                boxes[i], scores[i], conf=options.conf, iou=options.iou, max_det=options.max_det,
                multi_label=False,
            )  # fmt: skip
            original = metrics.unletterbox(
                found.boxes, batch["ratio"][i], batch["pad"][i], batch["size"][i]
            )
            own = solids.Solids(*(a[i] for a in found_3d))
            return to_labels(found, original, own, self.task.names)

        labels.extend(pool.map(detect, np.flatnonzero(batch["weight"] > 0)))

    def _drawn(self, index: int, labels: kitti.Labels) -> np.ndarray:
        image, camera = self.source.image(index), self.source.camera(index)
        shown = chosen(labels, np.asarray(labels.scores) >= 0.25)
        return draw_boxes3d.side_by_side(image, shown, camera, self.source.labels(index))
