"""Evaluation of a detector on a data set, and statistics recomputed for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxaccum import data, draw
from jaxaccum.accumulate import Groups, batchnorm
from jaxaccum.metrics import detection as metrics
from jaxaccum.tasks.detection import DetectionTask

PyTree = Any


class Evaluator:
    """COCO mAP of a detector on a source, as a function of its weights.

    The padded samples of the last batch are not counted. Results do not depend on the batch.
    """

    def __init__(
        self, task: DetectionTask, source: data.Source, options: ml_collections.ConfigDict
    ):
        self.task, self.source, self.options = task, source, options
        self._predict = jax.jit(task.predict)

    def __call__(
        self, params: PyTree, stats: PyTree, pictures: int = 0
    ) -> tuple[dict[str, float], list[np.ndarray]]:
        """Metrics and the first `pictures` images with detections of score 0.25 and more."""
        options = self.options
        # One device evaluates; weights that lie on all of them would have each do all of it.
        params, stats = jax.device_put((params, stats), jax.local_devices()[0])
        result = metrics.DetectionMetrics(self.source.names)
        drawn: list[np.ndarray] = []
        pending: Callable[[], None] | None = None
        batches = data.eval_batches(
            self.source, image_size=self.task.image_size, batch=options.batch
        )
        with ThreadPoolExecutor() as pool:
            for batch in batches:
                output = self._predict(params, stats, batch["image"])
                if pending is not None:  # the host works on a batch while the device is on the next
                    pending()
                pending = functools.partial(
                    self._score, pool, batch, output, result, drawn, pictures
                )
            if pending is not None:
                pending()
        return result.compute(), drawn

    def _score(self, pool, batch, output, result, drawn, pictures):
        boxes, scores = (np.asarray(a) for a in output)
        options = self.options

        def detect(i):
            found = metrics.nms(
                boxes[i], scores[i], conf=options.conf, iou=options.iou, max_det=options.max_det,
                multi_label=True,
            )  # fmt: skip
            original = metrics.unletterbox(
                found.boxes, batch["ratio"][i], batch["pad"][i], batch["size"][i]
            )
            return metrics.Detections(original, found.scores, found.classes)

        real = np.flatnonzero(batch["weight"] > 0)
        for i, found in zip(real, pool.map(detect, real), strict=True):
            index = int(batch["index"][i])
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
                drawn.append(
                    draw.draw_detections(
                        self.source.image(index), found.boxes[show], found.classes[show],
                        self.source.names, found.scores[show],
                    )
                )  # fmt: skip


def recompute_statistics(
    task: DetectionTask, params: PyTree, stats: PyTree, stream: data.TrainStream, samples: int
) -> PyTree:
    """Running statistics of the given weights over training samples ("precise batch norm").

    Wu and Johnson 2021, arXiv:2105.07576, section 3. Groups are the recipe's; moments of all
    groups are merged exactly.

    Args:
      stream: the run's samples, better without mosaic.
      samples: how many to use, from the start, rounded up to whole groups.
    Raises:
      ValueError: the recipe has no groups (bn_group "frozen").
    """
    if task.group is None:
        raise ValueError("eval.precise_bn needs batch statistics; this recipe's are frozen")
    moments_of, group = _moments_of(task), task.group
    total = None
    for batch in stream.windows(0, [group] * -(-samples // group)):
        new = moments_of(params, stats, batch["image"])
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    return batchnorm.move_statistics(stats, total, 1.0)


@functools.cache
def _moments_of(task: DetectionTask):
    """Compiled once per task: (params, stats, images of one group) -> moments."""

    @jax.jit
    def moments_of(params, stats, images):
        groups = Groups(len(images), jnp.ones(len(images)))
        _, changed = task.model.apply(
            {"params": params, "batch_stats": stats}, images, groups, mutable=["moments"]
        )
        return changed["moments"]

    return moments_of
