"""COCO mAP of a detector during and after training."""

from __future__ import annotations

import contextlib
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import ml_collections
import numpy as np

from jaxaccum import data, draw
from jaxaccum.data.stream import say_lost
from jaxaccum.metrics import detection as metrics
from jaxaccum.tasks.evaluating import overlapped

PyTree = Any


class Evaluator:
    """COCO mAP of a detector on a source, as a function of its weights.

    The padded samples of the last batch are not counted. Results do not depend on the batch.
    """

    def __init__(
        self,
        task: Any,
        source: data.Source,
        options: ml_collections.ConfigDict,
        on_error: str = "raise",
    ):
        """on_error: "skip" leaves out images that cannot be read, and says so."""
        self.task, self.source, self.options = task, source, options
        self._forgiven = (data.DataError,) if on_error == "skip" else ()
        self._predict = jax.jit(task.predict)
        self.measured: metrics.DetectionMetrics | None = None  # by the last call
        self.order: list[int] = []  # indices of its images

    def __call__(
        self, params: PyTree, stats: PyTree, pictures: int = 0
    ) -> tuple[dict[str, float], list[np.ndarray]]:
        """Metrics, and of the first `pictures` images the labels beside the detections of score
        0.25 and more."""
        options = self.options
        result, order = metrics.DetectionMetrics(self.source.names), list[int]()
        drawn: list[np.ndarray] = []
        lost: list[str] | None = [] if self._forgiven else None
        batches = data.eval_batches(
            self.source, image_size=self.task.image_size, batch=options.batch, lost=lost
        )
        with ThreadPoolExecutor() as pool:
            overlapped(
                self._predict, params, stats, batches, lambda batch: (batch["image"],),
                functools.partial(self._score, pool, result, order, drawn, pictures),
                len(self.source), "images",
            )  # fmt: skip
        say_lost(lost or [], len(self.source), "images")
        self.measured, self.order = result, order
        return result.compute(), drawn

    def _score(self, pool, result, order, drawn, pictures, batch, output):
        arrays = [np.asarray(a) for a in output]
        options, limits = self.options, {k: self.options[k] for k in ("conf", "max_det")}

        def detect(i):
            one = [a[i] for a in arrays]
            if self.task.end_to_end:
                found = metrics.surest(*one, **limits)
            else:
                found = metrics.nms(*one, **limits, iou=options.iou, multi_label=True)
            original = metrics.unletterbox(
                found.boxes, batch["ratio"][i], batch["pad"][i], batch["size"][i]
            )
            return metrics.Detections(original, found.scores, found.classes)

        real = np.flatnonzero(batch["weight"] > 0)
        for i, found in zip(real, pool.map(detect, real), strict=True):
            index = int(batch["index"][i])
            order.append(index)
            truth = self.source.objects(index)
            height, width = (int(v) for v in batch["size"][i])
            result.add(
                f"{index} {self.source.name(index)}",
                found,
                truth.boxes,
                truth.classes,
                (height, width),
            )
            if len(drawn) < pictures:
                show = found.scores >= 0.25
                with contextlib.suppress(*self._forgiven):
                    image, names = self.source.image(index), self.source.names
                    seen = found.boxes[show], found.classes[show], names, found.scores[show]
                    both = (
                        draw.draw_detections(image, truth.boxes, truth.classes, names),
                        draw.draw_detections(image, *seen),
                    )
                    drawn.append(draw.contact_sheet(both, 2, gap=4))
