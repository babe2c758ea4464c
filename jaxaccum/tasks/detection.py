"""2D detection: a YOLO model, its loss terms and its batch format."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum import models
from jaxaccum.accumulate import Groups, Objective, Output
from jaxaccum.losses import detection
from jaxaccum.models import yolo

PyTree = Any


@dataclasses.dataclass(frozen=True)
class DetectionTask:
    """A detector in training.

    A batch is a dict with a leading axis of samples: `image` (S, S, 3) uint8 RGB, `boxes` (M, 4)
    x1 y1 x2 y2 in pixels, `classes` (M,) int32, `valid` (M,) bool, `weight` () 1 for a real
    sample; `index` and `epoch` name the sample.

    Attributes:
      model: the network.
      image_size: side of the square input in pixels, a multiple of 32.
      group: samples that share batch statistics; None to use the running ones.
      gains: of the terms box, cls, dfl.
    """

    model: yolo.Yolo
    image_size: int
    group: int | None
    gains: tuple[float, float, float] = (7.5, 0.5, 1.5)

    @property
    def anchors(self) -> yolo.Anchors:
        return yolo.anchors(self.image_size, self.image_size, self.model.strides)

    def initialise(self, seed: int, dtype: Any = np.float32) -> tuple[PyTree, PyTree]:
        """Initial (params, stats), on the host."""
        size = self.image_size
        example = jax.ShapeDtypeStruct((1, size, size, 3), self.model.dtype)
        return models.initialise(
            self.model, example, seed, yolo.initial_constants(self.model), yolo.initial_deviation,
            dtype,
        )  # fmt: skip

    def objective(self, nbs: int, compat: bool = False) -> Objective:
        """The loss; its gradient is scaled by the effective batch, as the recipes expect."""
        return Objective(
            detection.terms(*self.gains), {detection.TARGET_SCORES: 1.0}, float(nbs), compat
        )

    def forward(self, params: PyTree, stats: PyTree, batch: PyTree) -> Output:
        """Numerators, denominators and moments of a microbatch."""
        weight = batch["weight"]
        groups = None if self.group is None else Groups(self.group, weight)
        predictions, changed = self.model.apply(
            {"params": params, "batch_stats": stats}, batch["image"], groups, mutable=["moments"]
        )
        # XLA's CPU backend would compute the last layers anew in every part of the loss that it
        # fuses them into, half as long again as the whole model.
        predictions = yolo.Predictions(*jax.lax.optimization_barrier(tuple(predictions)))
        targets = detection.Targets(batch["boxes"], batch["classes"], batch["valid"], weight)
        numerators, denominators, _ = detection.detection_loss(predictions, self.anchors, targets)
        return Output(numerators, denominators, changed.get("moments", {}))

    def predict(self, params: PyTree, stats: PyTree, images: jax.Array):
        """Boxes (N, A, 4) in pixels of the input and class probabilities (N, A, classes)."""
        predictions: Any = self.model.apply({"params": params, "batch_stats": stats}, images)
        return yolo.decode(predictions, self.anchors)

    def example(self, samples: int, max_objects: int) -> PyTree:
        """Shapes of a batch."""

        def shape(*dims, dtype=jnp.float32):
            return jax.ShapeDtypeStruct((samples, *dims), dtype)

        size = self.image_size
        return {
            "image": shape(size, size, 3, dtype=jnp.uint8),
            "boxes": shape(max_objects, 4),
            "classes": shape(max_objects, dtype=jnp.int32),
            "valid": shape(max_objects, dtype=jnp.bool_),
            "weight": shape(),
            "index": shape(dtype=jnp.int32),
            "epoch": shape(dtype=jnp.int32),
        }
