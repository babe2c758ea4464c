"""A task of your own in one file: which kind of object is the largest in an image?

    export PYTHONPATH=examples/own_task
    python -m jaxaccum.train --config=examples/own_task/classification.py --workdir=runs/classes
    python -m jaxaccum.evaluate --workdir=runs/classes
    python -m jaxaccum.predict --workdir=runs/classes --source=photos --out=found
    python -m jaxaccum.export --workdir=runs/classes --out=classes.stablehlo

It learns from any data set of boxes that detectors learn from; by default from the embedded scenes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from jaxaccum import data, draw, fields, models
from jaxaccum.accumulate import GroupBatchNorm, Groups, Objective, Output, Term
from jaxaccum.data import check
from jaxaccum.data.formats import packed
from jaxaccum.data.stream import say_lost
from jaxaccum.tasks import (
    Interface,
    PackedSplit,
    Predictor,
    Result,
    Sample,
    Task,
    Trained,
    files,
    packing,
)
from jaxaccum.tasks.evaluating import overlapped

# --- the config ---


def get_config() -> ml_collections.ConfigDict:
    """Every field with its default. The verbs find the task by its name, MODULE:CLASS."""
    c = ml_collections.ConfigDict()
    c.task = "classification:ClassificationTask"
    c.model = "plain-16"
    fields.recipe(c)
    c.nbs = 32
    c.bn_group = 8
    c.steps = 640
    c.optimizer.name = "adamw"
    c.optimizer.momentum = 0.9
    c.lr.update(base=3e-3, base_batch=32, warmup_epochs=0.0, decay="cosine")
    c.loss = ml_collections.ConfigDict({"smoothing": 0.1})
    c.data = ml_collections.ConfigDict(
        {
            "path": "",  # as detectors have it; "" for the embedded scenes
            "image_size": 64,
            "max_objects": 32,
            "on_error": "raise",
            "cache": "ram",
            "cache_gib": 1.0,
            "workers": 0,
            "prefetch": 2,
        }
    )
    fields.geometry(c)
    fields.run(c)
    c.ema.decay = 0.0
    c.log.every = 80
    c.eval.every = 160
    return c


def _check(c: ml_collections.ConfigDict) -> None:
    if c.remat == "blocks":
        raise fields.ConfigError("remat=blocks: this network has no blocks to compute again")


FIELDS = fields.Fields(
    get_config,
    lambda: ["plain-8", "plain-16"],
    ranges={
        "loss.smoothing": (0, 1), "data.image_size": (32, 1024), "data.max_objects": (1, 1000),
    },
    check=_check,
)  # fmt: skip


# --- the network ---


class Net(nn.Module):
    """(samples, S, S, 3) uint8 -> logits (samples, classes)."""

    width: int
    classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, groups=None):
        x = images.astype(self.dtype) / 255
        for factor in (1, 2, 4, 4):
            x = nn.Conv(factor * self.width, (3, 3), (2, 2), use_bias=False, dtype=self.dtype)(x)
            x = GroupBatchNorm(silu=True)(x, groups)
        return nn.Dense(self.classes, dtype=self.dtype)(x.max((1, 2)))


# --- the task ---


@dataclasses.dataclass(frozen=True)
class Classified(Result):
    """The class of an image."""

    sample: Sample
    name: str
    score: float

    def to_json(self) -> dict[str, Any]:
        """{"class", "score"}"""
        return {"class": self.name, "score": round(self.score, 5)}

    def plot(self) -> np.ndarray:
        """The image with its class at the top."""
        height, width = self.sample.value.shape[:2]
        whole = np.array([[0.0, 0.0, width, height]])
        return draw.draw_detections(self.sample.value, whole, np.zeros(1, int), (self.name,))

    def summary(self) -> str:
        """The class, and how sure it is."""
        return f"{self.name} ({self.score:.2f})"


@dataclasses.dataclass(frozen=True)
class ClassificationTask(Task):
    """A classifier in training; a batch is as of `DetectionTask`."""

    name: ClassVar[str] = "classification"
    fields: ClassVar[fields.Fields] = FIELDS
    unit: ClassVar[str] = "images"
    monitor: ClassVar[tuple[str, bool]] = ("accuracy", True)
    suffixes: ClassVar[frozenset[str]] = files.PICTURES
    results: ClassVar[str] = "classes.json"

    model: Net
    image_size: int
    max_objects: int
    smoothing: float
    names: tuple[str, ...] = ()

    @classmethod
    def open(
        cls, config: ml_collections.ConfigDict, split: str, names: Sequence[str] | None = None
    ) -> data.Source:
        """Images with boxes."""
        path, on_error = config.data.path, config.data.on_error
        if not path.startswith(packed.PREFIX):
            source = data.open_source(path, split, names=names, on_error=on_error)
            return check.checked(source, on_error)
        found = packed.PackedImages(packed.open_set(path, cls.name), split)
        if names is not None and tuple(names) != found.names:
            raise data.DataError(f"{path} has the classes {found.names}, expected {tuple(names)}")
        return found

    @classmethod
    def create(
        cls, config: ml_collections.ConfigDict, names: Sequence[str], dtype: Any
    ) -> ClassificationTask:
        """The task of a config."""
        width = int(config.model.rpartition("-")[2])
        return cls(
            Net(width, len(names), dtype), config.data.image_size, config.data.max_objects,
            config.loss.smoothing, tuple(names),
        )  # fmt: skip

    def initialise(self, seed: int, dtype: Any = np.float32) -> tuple[Any, Any]:
        """Initial (params, stats), on the host."""
        image = jax.ShapeDtypeStruct((1, self.image_size, self.image_size, 3), jnp.uint8)
        return models.initialise(self.model, image, seed, dtype=dtype)

    def objective(self, nbs: int) -> Objective:
        """The mean over the images that show an object."""
        del nbs
        return Objective((Term("entropy", 1.0, "images"),), {"images": 1.0})

    def forward(self, params: Any, stats: Any, batch: Any, groups: Groups | None) -> Output:
        """Sums over a microbatch."""
        logits, changed = self.model.apply(
            {"params": params, "batch_stats": stats}, batch["image"], groups, mutable=["moments"]
        )
        sides = batch["boxes"][..., 2:] - batch["boxes"][..., :2]
        areas = jnp.where(batch["valid"], sides[..., 0] * sides[..., 1], -1)
        largest = jnp.argmax(areas, axis=1)[:, None]
        wanted = jnp.take_along_axis(batch["classes"], largest, axis=1)[:, 0]
        wanted = optax.smooth_labels(jax.nn.one_hot(wanted, len(self.names)), self.smoothing)
        counts = batch["weight"] * batch["valid"].any(axis=1)
        entropy = optax.softmax_cross_entropy(logits.astype(counts.dtype), wanted)
        return Output(
            {"entropy": jnp.sum(counts * entropy)}, {"images": jnp.sum(counts)},
            changed.get("moments", {}),
        )  # fmt: skip

    def example(self, samples: int) -> Any:
        """Shapes of a batch."""

        def shape(*dims, dtype=jnp.float32):
            return jax.ShapeDtypeStruct((samples, *dims), dtype)

        return {
            "image": shape(self.image_size, self.image_size, 3, dtype=jnp.uint8),
            "boxes": shape(self.max_objects, 4),
            "classes": shape(self.max_objects, dtype=jnp.int32),
            "valid": shape(self.max_objects, dtype=jnp.bool_),
            "weight": shape(),
            "index": shape(dtype=jnp.int32),
            "epoch": shape(dtype=jnp.int32),
        }

    def stream(
        self, config: ml_collections.ConfigDict, source: Any, samples: int, plain: bool = False
    ) -> data.TrainStream:
        """The samples of a run."""
        del samples, plain
        return data.TrainStream(
            source, image_size=self.image_size, max_objects=self.max_objects,
            augment=data.Augment(mosaic=0.0, scale=0.1, translate=0.05), seed=config.seed,
            close_mosaic_at=0, cache=config.data.cache,
            cache_bytes=int(config.data.cache_gib * 2**30) // max(config.data.workers, 1),
            on_error=config.data.on_error,
        )  # fmt: skip

    def evaluation(self, samples: int):
        """What an evaluation computes."""
        return self.predict, (self.example(samples)["image"],)

    def evaluator(self, config: ml_collections.ConfigDict, source: Any):
        """The share of the images whose largest object is told."""
        predict = jax.jit(self.predict)

        def evaluate(params: Any, stats: Any, pictures: int = 0):
            right: list[bool] = []
            drawn: list[np.ndarray] = []

            def score(batch, output):
                for row in np.flatnonzero(batch["weight"] > 0):
                    index, found = int(batch["index"][row]), int(np.argmax(output[row]))
                    truth = source.objects(index)
                    if not len(truth):
                        continue
                    sides = truth.boxes[:, 2:] - truth.boxes[:, :2]
                    largest = np.argmax(sides.prod(axis=1))
                    right.append(int(truth.classes[largest]) == found)
                    if len(drawn) < pictures:
                        box = truth.boxes[largest : largest + 1]
                        drawn.append(
                            draw.draw_detections(
                                source.image(index), box, np.array([found]), self.names
                            )
                        )

            lost: list[str] | None = [] if config.data.on_error == "skip" else None
            batches = data.eval_batches(
                source, image_size=self.image_size, batch=config.eval.batch, lost=lost
            )
            overlapped(
                predict, params, stats, batches, lambda batch: (batch["image"],), score,
                len(source), "images",
            )  # fmt: skip
            say_lost(lost or [], len(source), "images")
            return {"accuracy": float(np.mean(right)) if right else float("nan")}, drawn

        return evaluate

    def summary(self, best: dict[str, Any]) -> str:
        """The metrics of an evaluation in a few words."""
        return f"accuracy {best['accuracy']:.4f}"

    def predict(self, params: Any, stats: Any, *inputs: jax.Array) -> jax.Array:
        """Class probabilities (N, classes) of images (N, S, S, 3)."""
        (images,) = inputs
        logits: Any = self.model.apply({"params": params, "batch_stats": stats}, images)
        return jax.nn.softmax(logits)

    def read_file(self, path: Path) -> Iterator[Sample]:
        """An image, or the frames of a GIF or a video."""
        return files.read_pictures(path)

    def sample(self, value: Any) -> Sample:
        """An image in memory."""
        return files.picture_of(value)

    def predictor(self, trained: Trained, **options: Any) -> Predictor:
        """The class of one image."""
        del options
        predict = jax.jit(self.predict)

        def classify(sample: Sample) -> Classified:
            square, _, _ = data.letterbox(sample.value, self.image_size)
            scores = np.asarray(predict(trained.params, trained.stats, square[None]))[0]
            return Classified(sample, self.names[int(np.argmax(scores))], float(scores.max()))

        return classify

    def interface(self, trained: Trained) -> Interface:
        """Images to class probabilities."""
        del trained
        image = jax.ShapeDtypeStruct((self.image_size, self.image_size, 3), jnp.uint8)
        facts = {"input": "images (N, S, S, 3) uint8 RGB", "output": "probabilities (N, classes)"}
        return Interface([image], facts, (["images"], ["probabilities"]))

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
