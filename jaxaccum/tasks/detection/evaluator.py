"""COCO mAP of a detector during and after training."""

from __future__ import annotations

import contextlib
import functools
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import ml_collections
import numpy as np

from jaxaccum import data, draw
from jaxaccum.data import rectangles
from jaxaccum.data.rectangles import Rectangles
from jaxaccum.data.stream import say_lost
from jaxaccum.metrics import detection as metrics
from jaxaccum.tasks import speed as speeds
from jaxaccum.tasks.evaluating import overlapped

PyTree = Any


class Evaluator:
    """COCO mAP of a detector on a source, as a function of its weights.

    The padded samples of the last batch are not counted. Results do not depend on the batch.

    Attributes:
      measured: by the last call. order: indices of its images, in the order of its results.
      rectangles: that images are letterboxed into, from the first call on; None: into squares.
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
        self.measured: metrics.DetectionMetrics | None = None
        self.order: list[int] = []
        self.rectangles: Rectangles | None = None

    def __call__(
        self, params: PyTree, stats: PyTree, pictures: int = 0
    ) -> tuple[dict[str, float], list[np.ndarray]]:
        """Metrics, and of the first `pictures` images the labels beside the detections of score
        0.25 and more."""
        options = self.options
        if options.get("rect", False) and self.rectangles is None:
            lenient = bool(self._forgiven)
            self.rectangles = rectangles.of_source(self.source, self.task.image_size, lenient)
            print(self.rectangles.line())
        result, order = metrics.DetectionMetrics(self.source.names), list[int]()
        drawn: dict[int, np.ndarray] = {}
        lost: list[str] | None = [] if self._forgiven else None
        speed = speeds.of_evaluation("images", self._size())
        batches = data.eval_batches(
            self.source, image_size=self.task.image_size, batch=options.batch, lost=lost,
            rectangles=self.rectangles, prepared=speed.prepared,
        )  # fmt: skip
        with ThreadPoolExecutor() as pool:
            overlapped(
                self._predict, params, stats, batches, lambda batch: (batch["image"],),
                functools.partial(self._score, pool, result, order, drawn, pictures),
                len(self.source), "images", speed,
            )  # fmt: skip
        say_lost(lost or [], len(self.source), "images")
        self.measured, self.order = result, order
        return result.compute(), [drawn[index] for index in sorted(drawn)]

    def _size(self) -> str:
        """Of the network's images, in words."""
        if self.rectangles is None:
            return f"{self.task.image_size} px"
        shapes = [f"{height} x {width}" for height, width in self.rectangles.shapes]
        return f"{', '.join(shapes)} px"

    def _score(self, pool, result, order, drawn, pictures, batch, output):
        arrays = [np.asarray(a) for a in output]
        options, limits = self.options, {k: self.options[k] for k in ("conf", "max_det")}

        def detect(i):
            since = time.thread_time()
            one = [a[i] for a in arrays]
            if self.task.end_to_end:
                found = metrics.surest(*one, **limits)
            else:
                found = metrics.nms(*one, **limits, iou=options.iou, multi_label=True)
            original = metrics.unletterbox(
                found.boxes, batch["ratio"][i], batch["pad"][i], batch["size"][i]
            )
            took = 1e3 * (time.thread_time() - since)
            return metrics.Detections(original, found.scores, found.classes), took

        real, spent = np.flatnonzero(batch["weight"] > 0), 0.0
        for i, (found, took) in zip(real, pool.map(detect, real), strict=True):
            index = int(batch["index"][i])
            spent += took
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
            # Rectangles come in an order of their own, in which the first are the narrowest.
            wanted = len(drawn) < pictures if self.rectangles is None else index < pictures
            if wanted:
                with contextlib.suppress(*self._forgiven):
                    drawn[index] = self._drawn(index, found, truth)
        return {"choosing" if self.task.end_to_end else "NMS": spent}

    def _drawn(self, index: int, found: metrics.Detections, truth: data.Objects) -> np.ndarray:
        """The labels of an image beside what was found."""
        show = found.scores >= 0.25
        image, names = self.source.image(index), self.source.names
        seen = found.boxes[show], found.classes[show], names, found.scores[show]
        both = (
            draw.draw_detections(image, truth.boxes, truth.classes, names),
            draw.draw_detections(image, *seen),
        )
        return draw.contact_sheet(both, 2, gap=4)
