"""KITTI's metrics of a 3D detector during and after training."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import ml_collections
import numpy as np

from jaxaccum import data
from jaxaccum.data.stream import say_lost
from jaxaccum.draw import boxes3d as draw_boxes3d
from jaxaccum.metrics import detection as metrics
from jaxaccum.metrics import kitti
from jaxaccum.models import boxes3d
from jaxaccum.tasks import speed as speeds
from jaxaccum.tasks.detection3d.labels import chosen, none, to_labels
from jaxaccum.tasks.evaluating import overlapped

PyTree = Any


class Evaluator:
    """KITTI's metrics of a 3D detector on a source, as a function of its weights.

    The padded samples of the last batch are not counted. Results do not depend on the batch.
    """

    def __init__(
        self,
        task: Any,
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
        if np.isnan(kitti.evaluate(self._truths, [none()] * len(source))[metric]):
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
        seen: list[int] = []
        labels: list[kitti.Labels] = []
        lost: list[str] | None = [] if self._forgiven else None
        speed = speeds.of_evaluation("images", "{} x {} px".format(*self.task.size))
        batches = data.eval_batches3d(
            self.source, size=self.task.size, batch=self.options.batch, lost=lost,
            prepared=speed.prepared,
        )  # fmt: skip
        with ThreadPoolExecutor() as pool:
            overlapped(
                self._predict, params, stats, batches,
                lambda batch: (batch["image"], batch["camera"]),
                functools.partial(self._detect, pool, seen, labels), len(self.source), "images",
                speed,
            )  # fmt: skip
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

    def _detect(self, pool, seen, labels, batch, output):
        seen.extend(int(i) for i in batch["index"][batch["weight"] > 0])
        boxes, scores, found_3d = jax.tree.map(np.asarray, output)
        options = self.options

        def detect(i):
            since = time.thread_time()
            found = metrics.nms(
                boxes[i], scores[i], conf=options.conf, iou=options.iou, max_det=options.max_det,
                multi_label=False,
            )  # fmt: skip
            original = metrics.unletterbox(
                found.boxes, batch["ratio"][i], batch["pad"][i], batch["size"][i]
            )
            own = boxes3d.Boxes3D(*(a[i] for a in found_3d))
            one = to_labels(found, original, own, self.task.names)
            return one, 1e3 * (time.thread_time() - since)

        spent = 0.0
        for one, took in pool.map(detect, np.flatnonzero(batch["weight"] > 0)):
            labels.append(one)
            spent += took
        return {"NMS": spent}

    def _drawn(self, index: int, labels: kitti.Labels) -> np.ndarray:
        image, camera = self.source.image(index), self.source.camera(index)
        shown = chosen(labels, np.asarray(labels.scores) >= 0.25)
        return draw_boxes3d.side_by_side(image, shown, camera, self.source.labels(index))
