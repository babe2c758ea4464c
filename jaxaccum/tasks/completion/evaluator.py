"""Chamfer distances and F-Score of a completion network during and after training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import ml_collections
import numpy as np

from jaxaccum import data
from jaxaccum.data.cloud_sources import PairedClouds
from jaxaccum.data.stream import say_lost
from jaxaccum.draw import clouds as draw_clouds
from jaxaccum.metrics import completion as metrics
from jaxaccum.tasks import speed as speeds
from jaxaccum.tasks.completion import captioned
from jaxaccum.tasks.evaluating import overlapped

PyTree = Any


class Evaluator:
    """Metrics of a completion network on sources, as a function of its weights.

    The padded samples of the last batch are not counted. Results do not depend on the batch.
    """

    def __init__(
        self,
        task: Any,
        sources: dict[str, data.CloudSource],
        batch: int,
        cars: Callable[[], Iterator[np.ndarray]] | None = None,
        lenient: bool = False,
    ):
        """Args:
        task: the model.
        sources: prefix of the metrics' names -> what to evaluate on.
        batch: clouds to predict at once.
        cars: complete clouds to compare predictions of real scans with, which have no target.
        lenient: leave out samples that cannot be read, and say so.
        """
        self.task, self.sources, self.batch, self.cars = task, sources, batch, cars
        self._lenient = lenient
        self._predict = jax.jit(task.predict_and_embed)

    def __call__(
        self, params: PyTree, stats: PyTree, pictures: int = 0
    ) -> tuple[dict[str, float], list[np.ndarray]]:
        """Metrics, with each source's prefix, and `pictures` drawings from each.

        Modes of one set ("easy/", "median/", "hard/") are followed by their mean, as published.
        """
        found: dict[str, float] = {}
        drawn: list[np.ndarray] = []
        speed = speeds.of_evaluation("clouds", self.task.input_size())
        for prefix, source in self.sources.items():
            result: Any = (
                metrics.CompletionMetrics(source.names)
                if source.points
                else metrics.ScanMetrics(self.cars)
            )
            # Spread over the source, which lists one category after the other.
            shown = set(np.linspace(0, len(source) - 1, pictures).astype(int).tolist())
            with ThreadPoolExecutor() as pool:
                clouds, texts = captioned.parts(source)
                vectors: list[Any] = []
                lost: list[str] | None = [] if self._lenient else None
                score = functools.partial(
                    self._score, pool, prefix, source, result, vectors, drawn, shown
                )
                overlapped(
                    self._predict, params, stats,
                    data.cloud_batches(
                        clouds, batch=self.batch, texts=texts, lost=lost, prepared=speed.prepared
                    ),
                    lambda batch: (batch,), score, len(source), f"{prefix}clouds", speed,
                )  # fmt: skip
            say_lost(lost or [], len(source), f"samples of {source.report.where}")
            scores = result.compute()
            if texts is not None and vectors:
                real, *found_ = (np.concatenate(v) for v in zip(*vectors, strict=True))
                ids, ours, true = (a[real] for a in found_)
                scores |= captioned.retrieval(ours, ids, texts.vectors)
                best = captioned.retrieval(true, ids, texts.vectors)
                scores["retrieval_of_truth"] = best["retrieval"]
            found |= {f"{prefix}{k}": v for k, v in scores.items()}
        return _means_over_modes(found) | found, drawn

    def _score(self, pool, prefix, source, result, vectors, drawn, shown, batch, output):
        clouds, embedded = output
        if embedded is not None:
            vectors.append((batch["weight"] > 0, batch["caption"], *embedded))
        predicted = np.asarray(clouds, np.float32)
        real = np.flatnonzero(batch["weight"] > 0)
        indices = [int(i) for i in batch["index"][real]]
        partial, target = batch["partial"][real], batch["complete"][real]
        if source.points:
            result.add_clouds(
                [source.category(i) for i in indices], [source.name(i) for i in indices],
                predicted[real], target, pool,
            )  # fmt: skip
        else:
            names = [source.name(i) for i in indices]
            result.add_clouds(names, partial, predicted[real], pool)
        for row, index in enumerate(indices):
            if index in shown and np.isfinite(predicted[real[row]]).all():
                drawn.append(
                    draw_clouds.draw_completion(
                        partial[row], predicted[real[row]], target[row] if source.points else None,
                        title=prefix.replace("/", " ") + source.names[source.category(index)],
                        errors=True,
                    )
                )  # fmt: skip


def _means_over_modes(found: dict[str, float]) -> dict[str, float]:
    """Metrics that exist for the modes easy, median and hard, averaged over them."""
    means = {}
    for name in found:
        before, middle, after = name.partition("easy/")
        if middle and not after.startswith("samples") and after != "categories":
            modes = [found[f"{before}{mode}/{after}"] for mode in ("easy", "median", "hard")]
            means[before + after] = float(np.mean(modes))
    return means


def references(config: ml_collections.ConfigDict) -> Callable[[], Iterator[np.ndarray]] | None:
    """The cars of `eval.references`, a PCN folder, all splits, to be read one after the other.

    Raises:
      DataError: it cannot be used, or holds no cars.
    """
    path = config.eval.references
    if not path:
        return None
    opened = [data.open_clouds(path, split) for split in ("train", "val", "test")]
    sources = [s for s in opened if isinstance(s, PairedClouds) and "car" in s.names]
    if not sources:
        raise data.DataError(f"{path}: no complete clouds of the category 'car' on disk", file=path)

    def cars():
        for source in sources:
            for i in range(len(source)):
                if source.names[source.category(i)] == "car":
                    yield source.complete(i)

    return cars
