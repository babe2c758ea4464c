"""Scores two completions that learn nothing, for a trained network to be compared with.

python scripts/completion_baselines.py PATH [--split=val] [--modes=easy,median,hard] [--shapes=N]

  partial   the partial cloud itself
  nearest   the complete cloud of the training shape that covers the partial cloud best: the one
            with the smallest mean distance from the partial cloud's points to it (one-sided: the
            shape may extend where nothing is seen). The first 64 points choose 16 shapes, all
            points the one.

PATH is that of jaxaccum.data.open_clouds, such as "DIR:ShapeNet-34"; none for the embedded shapes.
Prints CD-L1 and CD-L2 (both x 1000) and F-Score at 1 %, of each category and their mean, for each
mode of cropping (sets with partial clouds of their own have none); for several modes also the mean
over them. --shapes limits the training shapes to the first N of a random order.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from scipy.spatial import cKDTree

from jaxaccum import data
from jaxaccum.data.cloud_sources import CroppedClouds
from jaxaccum.metrics import completion as metrics

PREVIEW, CANDIDATES = 64, 16


class Shapes:
    """Complete clouds, searched for the one that covers a partial cloud best."""

    def __init__(self, clouds: Sequence[np.ndarray]):
        """`clouds`: (Q, 3) each."""
        self.clouds = clouds
        self._trees = [cKDTree(cloud) for cloud in clouds]

    def nearest(self, partial: np.ndarray) -> int:
        """The index of the cloud that (n, 3) points are nearest to on average.

        All-zero points, which are padding, do not count.
        """
        points = partial[partial.any(1)]
        candidates = np.argsort(self._distances(points[:PREVIEW], range(len(self._trees))))
        candidates = candidates[:CANDIDATES]
        return int(candidates[self._distances(points, candidates).argmin()])

    def _distances(self, points, among):
        return np.array([self._trees[i].query(points)[0].mean() for i in among])


def evaluate(
    source: data.CloudSource, shapes: Shapes, threads: int
) -> tuple[dict[str, float], dict[str, float]]:
    """The metrics of both baselines on a source."""
    results = [metrics.CompletionMetrics(source.names) for _ in range(2)]

    def measure(index):
        partial, complete = source.sample(index, None)
        predictions = partial, shapes.clouds[shapes.nearest(partial)]
        for result, prediction in zip(results, predictions, strict=True):
            result.add(
                source.category(index), source.name(index), metrics.measure(prediction, complete)
            )

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(measure, range(len(source))):
            pass
    partial, nearest = (result.compute() for result in results)
    return partial, nearest


def table(names: Sequence[str], partial: dict[str, float], nearest: dict[str, float]) -> str:
    """Both baselines, one row for each category and one for their mean."""
    lines = [
        f"{'':20} {'':7}   {'partial':^23}   {'nearest':^23}",
        f"{'category':20} {'samples':>7}" + 2 * f"   {'CD-L1':>7} {'CD-L2':>7} {'F':>7}",
    ]
    suffixes = [f"/{name}" for name in names if f"samples/{name}" in partial]
    for suffix in [*suffixes, ""]:
        line = f"{suffix[1:] or 'mean of categories':20} {partial['samples' + suffix]:7.0f}"
        for found in (partial, nearest):
            cd_l1, cd_l2, f_score = (found[key + suffix] for key in metrics.SCORES)
            line += f"   {cd_l1:7.2f} {cd_l2:7.3f} {f_score:7.4f}"
        lines.append(line)
    return "\n".join(lines)


def mean(results: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each value over results that have the same ones."""
    return {key: float(np.mean([result[key] for result in results])) for key in results[0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", nargs="?", default="")
    parser.add_argument("--split", default="val")
    parser.add_argument("--modes", default="easy,median,hard")
    parser.add_argument("--shapes", type=int, default=None)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()

    try:
        train = data.open_clouds(args.path, "train")
        sources = {}
        for mode in args.modes.split(","):
            source = data.open_clouds(args.path, args.split, mode=mode)
            cropped = isinstance(source, CroppedClouds)
            sources[mode if cropped else "partial clouds of the data set"] = source
    except data.DataError as error:
        parser.exit(1, f"{error}\n")
    order = np.random.default_rng(0).permutation(len(train))[: args.shapes]
    rng = np.random.default_rng(0)  # of the partial clouds, which are not used
    shapes = Shapes([train.sample(int(i), rng)[1] for i in order])
    print(f"{len(shapes.clouds)} training shapes; {args.split}:")
    found = []
    for mode, source in sources.items():
        if not source.points:
            parser.exit(1, f"{source.report.where}: no complete clouds to compare with\n")
        started = time.perf_counter()
        found.append(evaluate(source, shapes, args.threads))
        seconds = time.perf_counter() - started
        print(f"\n{mode}: {source.report.summary()}, {seconds:.0f} s")
        print(table(source.names, *found[-1]), flush=True)
    if len(found) > 1:
        print(f"\nmean of {', '.join(sources)}")
        print(table(source.names, *(mean(of_modes) for of_modes in zip(*found, strict=True))))


if __name__ == "__main__":
    main()
