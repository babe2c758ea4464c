"""Detections of an image: as arrays, drawn, and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxaccum import data, draw
from jaxaccum.metrics import detection as metrics
from jaxaccum.tasks.base import Trained
from jaxaccum.tasks.results import Predictor, Result, Sample


@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no one answer
class Detected(Result):
    """The objects found in an image, the surest first.

    Attributes:
      sample: the image.
      boxes: (n, 4) float32, x1 y1 x2 y2 in its pixels.
      scores: (n,) float32, 0 to 1. classes: (n,) int32.
      names: of all classes.
      highest: score of any box of the network, also of those that were left out.
      conf: smallest score that was asked for.
    """

    sample: Sample
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    names: tuple[str, ...]
    highest: float
    conf: float

    def __len__(self) -> int:
        return len(self.boxes)

    def to_json(self) -> dict[str, Any]:
        """{"width", "height", "detections": [{"class", "name", "score", "box": [x1, y1, x2, y2] in
        pixels}]}"""
        height, width = self.sample.value.shape[:2]
        return {
            "width": width,
            "height": height,
            "detections": [
                {
                    "class": int(c),
                    "name": self.names[c],
                    "score": round(float(s), 5),
                    "box": [round(float(v), 2) for v in b],
                }
                for b, s, c in zip(self.boxes, self.scores, self.classes, strict=True)
            ],
        }

    def to_supervision(self) -> Any:
        """A `supervision.Detections`; needs the package supervision."""
        import supervision  # type: ignore[import-not-found, unused-ignore]

        return supervision.Detections(
            xyxy=self.boxes.astype(np.float32), confidence=self.scores.astype(np.float32),
            class_id=self.classes.astype(int),
            data={"class_name": np.array([self.names[c] for c in self.classes], dtype=str)},
        )  # fmt: skip

    def plot(self) -> np.ndarray:
        """The image with its boxes."""
        return draw.draw_detections(
            self.sample.value, self.boxes, self.classes, self.names, self.scores
        )

    def summary(self) -> str:
        """How many of which."""
        found = [self.names[c] for c in self.classes]
        counts = ", ".join(f"{found.count(n)} {n}" for n in dict.fromkeys(found))
        return counts or f"nothing (highest score {self.highest:.2g}, --conf={self.conf:g})"


def predictor(trained: Trained, conf: float = 0.25, iou: float = 0.7) -> Predictor:
    """Detects the objects of one image.

    Args:
      trained: a detector.
      conf: smallest score. iou: overlap above which the lesser box is dropped.
    """
    task: Any = trained.task
    forward = jax.jit(task.predict)

    def detect(sample: Sample) -> Detected:
        image = sample.value
        square, ratio, pad = data.letterbox(image, task.image_size)
        boxes, scores = (np.asarray(a[0]) for a in forward(
            trained.params, trained.stats, square[None]
        ))  # fmt: skip
        found = metrics.nms(boxes, scores, conf=conf, iou=iou, multi_label=False)
        own = metrics.unletterbox(found.boxes, ratio, pad, image.shape[:2])
        return Detected(
            sample, own, found.scores, found.classes, trained.names, float(scores.max()), conf
        )

    return detect
