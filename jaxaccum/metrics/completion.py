"""Completion metrics: how far a predicted point cloud is from the complete one, on the host.

`measure` compares two clouds, `CompletionMetrics` averages over a data set as the published tables
do, and `fidelity`, `mmd` and `consistency` judge scans without a ground truth (KITTI). Nearest
points are exact, in float64, by k-d trees. All scores that are distances are multiplied by 1000,
as in the published tables.

The earth mover's distance is left out: an exact assignment of 8192 points takes over a minute,
and the approximations in use (an auction cut off after 100 rounds) depend on their settings.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree  # type: ignore[import-untyped]

F_SCORE_DISTANCE = 0.01  # "F-Score@1%": of a unit cloud's size
SCORES = ("cd_l1", "cd_l2", "f_score")

Cloud = NDArray[np.floating[Any]]


def nearest_distances(points: ArrayLike, to: ArrayLike) -> NDArray[np.float64]:
    """Euclidean distance of each of (n, 3) `points` to the nearest of (m, 3) `to`: (n,) float64.

    In the clouds' own units, not multiplied by 1000. The GIL is released meanwhile.

    Raises:
      ValueError: if a cloud is not (n, 3), is empty or has a value that is not finite.
    """
    return _distances(_checked(points, "points"), _checked(to, "to"))


def measure(
    prediction: ArrayLike, target: ArrayLike, *, ignore_zeros: bool = True
) -> dict[str, float]:
    """Compares a predicted with the complete cloud.

    With p the distances of the predicted points to the target and t those of the target to the
    prediction:

      cd_l1: 1000 * (mean p + mean t) / 2.
      cd_l2: 1000 * (mean p^2 + mean t^2).
      f_score: harmonic mean of the shares of p and of t strictly below 0.01; 0 if both are 0
        (Tatarchenko et al. 2019, arXiv:1905.03678).

    Conventions of PoinTr (Yu et al. 2021, arXiv:2108.08839), whose tables others are compared with.

    Args:
      prediction: (P, 3), in the target's units.
      target: (Q, 3).
      ignore_zeros: leave points whose three coordinates sum to exactly 0 out of the two Chamfer
        distances (not of the F-Score), as the reference does in evaluation: zeros pad its clouds.

    Returns:
      The three scores; all nan if the prediction has a value that is not finite, or none but
      ignored points.

    Raises:
      ValueError: if a cloud is not (n, 3) or is empty, or the target is not finite or has none but
        ignored points.
    """
    prediction = _checked(prediction, "prediction", finite=False)
    target = _checked(target, "target")
    if not np.isfinite(prediction).all():
        return dict.fromkeys(SCORES, math.nan)
    real_p, real_t = prediction, target
    if ignore_zeros:  # in the clouds' own precision: a sum may be 0 in float32 and not in float64
        real_p, real_t = (cloud[cloud.sum(1) != 0] for cloud in (prediction, target))
    if not len(real_t):
        raise ValueError(f"target: the coordinates of each of its {len(target)} points sum to 0")
    if not len(real_p):
        return dict.fromkeys(SCORES, math.nan)
    p, t = _both_ways(prediction, target)
    precision, recall = (float((d < F_SCORE_DISTANCE).mean()) for d in (p, t))
    f_score = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    if len(real_p) < len(prediction) or len(real_t) < len(target):
        p, t = _both_ways(real_p, real_t)
    return {
        "cd_l1": 500 * float(p.mean() + t.mean()),
        "cd_l2": 1000 * float((p * p).mean() + (t * t).mean()),
        "f_score": f_score,
    }


class _Sample(NamedTuple):
    category: int
    scores: dict[str, float]


class CompletionMetrics:
    """Collects samples one by one and reports the means of a data set.

    The result does not depend on the order in which samples were added. `add` may be called from
    several threads.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """`names[c]` is the name of category c; they label the results and must differ."""
        self.names = tuple(names)
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"category names must differ, got {self.names}")
        self.reset()

    def reset(self) -> None:
        """Forgets every sample."""
        self._samples: dict[str, _Sample] = {}

    def add(self, category: int, name: str, scores: Mapping[str, float]) -> None:
        """Adds one sample.

        Args:
          category: index into the names.
          name: identifies the sample; each may be added once. The crops of one shape are samples.
          scores: what `measure` found for it.

        Raises:
          ValueError: on a repeated name or a category without a name.
        """
        if not 0 <= category < len(self.names):
            raise ValueError(
                f"{name}: category {category}, but there are {len(self.names)} category names"
            )
        sample = _Sample(int(category), {key: float(scores[key]) for key in SCORES})
        if self._samples.setdefault(name, sample) is not sample:
            raise ValueError(f"sample {name!r} was added before")

    def add_clouds(
        self,
        categories: Sequence[int],
        names: Sequence[str],
        predictions: Sequence[ArrayLike],
        targets: Sequence[ArrayLike],
        pool: Executor | None = None,
    ) -> list[dict[str, float]]:
        """Measures and adds several samples, in the threads of `pool` if one is given.

        Args:
          categories, names, predictions, targets: of the same length B; clouds may be one (B, P, 3)
            array or B arrays.
          pool: a ThreadPoolExecutor.

        Returns:
          The scores of each, in order.

        Raises:
          ValueError: on different lengths, and as `add` and `measure` do.
        """
        columns = (categories, names, predictions, targets)
        if len({len(column) for column in columns}) > 1:
            lengths = ", ".join(str(len(column)) for column in columns)
            raise ValueError(f"categories, names, predictions and targets: got {lengths} of them")

        def one(
            category: int, name: str, prediction: ArrayLike, target: ArrayLike
        ) -> dict[str, float]:
            try:
                scores = measure(prediction, target)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            self.add(category, name, scores)
            return scores

        return list((map if pool is None else pool.map)(one, *columns))

    def compute(self) -> dict[str, float]:
        """Means over all samples added so far; distances are multiplied by 1000.

        Returns:
          cd_l1, cd_l2, f_score: the mean over categories of each category's mean, as published.
          micro/cd_l1, ...: the mean over samples, whatever their category.
          cd_l1/<name>, ... and samples/<name>: the mean and the number of samples of each category
            that has any, in the order of the names.
          samples, categories: how many samples were scored, and of how many categories.

        Without any sample the means are nan; with one that scored nan, so are those it is part of.
        """
        columns: dict[int, list[dict[str, float]]] = {}
        for sample in self._samples.values():
            columns.setdefault(sample.category, []).append(sample.scores)
        per_category = {
            category: {key: _mean(scores[key] for scores in columns[category]) for key in SCORES}
            for category in sorted(columns)
        }
        everything = [sample.scores for sample in self._samples.values()]
        return {
            **{key: _mean(means[key] for means in per_category.values()) for key in SCORES},
            **{f"micro/{key}": _mean(scores[key] for scores in everything) for key in SCORES},
            **{
                f"{key}/{self.names[category]}": means[key]
                for key in SCORES
                for category, means in per_category.items()
            },
            **{f"samples/{self.names[c]}": float(len(columns[c])) for c in per_category},
            "samples": float(len(everything)),
            "categories": float(len(per_category)),
        }


class ScanMetrics:
    """Collects predictions of real scans, which have no complete cloud to compare with."""

    def __init__(self, references: Callable[[], Iterable[ArrayLike]] | None = None) -> None:
        """`references` reads the shapes of `mmd`; None leaves that out."""
        self._references = references
        self._samples: dict[str, tuple[float, float, Cloud]] = {}

    def add_clouds(
        self,
        names: Sequence[str],
        partials: Sequence[ArrayLike],
        predictions: Sequence[ArrayLike],
        pool: Executor | None = None,
    ) -> None:
        """Adds several samples, measured in the threads of `pool` if one is given.

        Raises:
          ValueError: on a repeated name, or a partial cloud that is not finite.
        """

        def one(name: str, partial: ArrayLike, prediction: ArrayLike) -> None:
            given, cloud = np.asarray(partial), np.asarray(prediction)
            kept = scan = math.nan
            if np.isfinite(cloud).all():
                kept = fidelity(given, cloud)
                scan = fidelity(given[(given != 0).any(axis=1)], cloud)
            if self._samples.setdefault(name, (kept, scan, cloud))[2] is not cloud:
                raise ValueError(f"sample {name!r} was added before")

        list((map if pool is None else pool.map)(one, names, partials, predictions))

    def compute(self) -> dict[str, float]:
        """Means over samples (* 1000), and how many these are.

        fidelity counts the zeros that fill a scan up, as the published figures do; fidelity/scan
        does not. mmd where there are references, which are read one after the other, each once.
        """
        found = {
            "fidelity": _mean(kept for kept, _, _ in self._samples.values()),
            "fidelity/scan": _mean(scan for _, scan, _ in self._samples.values()),
            "samples": float(len(self._samples)),
        }
        if self._references is None:
            return found
        if math.isnan(found["fidelity"]):
            return found | {"mmd": math.nan}
        clouds = [cloud for _, _, cloud in self._samples.values()]
        best = np.full(len(clouds), np.inf)
        for reference in self._references():
            best = np.minimum(best, [mmd(cloud, [reference]) for cloud in clouds])
        return found | {"mmd": float(best.mean())}


def tables(found: Mapping[str, float]) -> list[str]:
    """Metrics as lines of tables by category, one for each split.

    Args:
      found: as `CompletionMetrics.compute` has them, behind the prefixes "unseen/" and, where there
        are these modes, "easy/", "median/" and "hard/", with their means behind none.
    """
    lines: list[str] = []
    for split in ("", "unseen/"):
        if f"{split}cd_l1" not in found:
            continue
        modes = [m for m in ("easy/", "median/", "hard/") if f"{split}{m}cd_l1" in found]
        columns = [f"{split}{mode}cd_l1" for mode in modes] + [f"{split}{key}" for key in SCORES]
        titles = [f"{mode[:-1]} CD-L1" for mode in modes] + ["CD-L1", "CD-L2", "F-Score"]
        start = f"{split}cd_l1/"
        names = [key.removeprefix(start) for key in found if key.startswith(start)]
        lines.append(f"{split[:-1] or 'distances x 1000':22}" + "".join(f"{t:>14}" for t in titles))
        for name in [*names, ""]:
            values = [found[f"{key}/{name}" if name else key] for key in columns]
            cells = (f"{v:14.4f}" if k.endswith("f_score") else f"{v:14.3f}"
                     for k, v in zip(columns, values, strict=True))  # fmt: skip
            lines.append(f"{name or 'mean of the categories':22}" + "".join(cells))
    for key, said in _OF_SCANS.items():
        if key in found:
            lines.append(f"{said:50}{found[key]:8.3f}")
    return lines


_OF_SCANS = {
    "fidelity": "fidelity of real scans, x 1000",
    "fidelity/scan": "fidelity without the zeros that fill a scan up",
    "mmd": "minimal matching distance, x 1000",
    "retrieval": "captions found by the completed clouds",
    "retrieval_of_truth": "captions found by the true clouds",
}


def fidelity(partial: ArrayLike, prediction: ArrayLike) -> float:
    """How well a prediction keeps its input: 1000 * mean squared distance of the input to it.

    Published as the mean over samples. 0 for a model that copies its input into its output.

    Args:
      partial: (n, 3), as given to the model, padding included.
      prediction: (P, 3), in the same units.

    Raises:
      ValueError: if a cloud is not (n, 3), is empty or has a value that is not finite.
    """
    return 1000 * float((nearest_distances(partial, prediction) ** 2).mean())


def mmd(prediction: ArrayLike, references: Iterable[ArrayLike]) -> float:
    """Minimal matching distance to real shapes: the smallest CD-L2 (* 1000) to a reference.

    Published as the mean over samples, the references being all cars of PCN. Every point
    counts, zeros too.

    Args:
      prediction: (P, 3).
      references: at least one cloud (Q, 3), read one at a time.

    Raises:
      ValueError: without references, or if a cloud is not (n, 3), is empty or not finite.
    """
    prediction = _checked(prediction, "prediction").astype(np.float64)
    tree = cKDTree(prediction)
    best = math.inf
    for i, reference in enumerate(references):
        cloud = _checked(reference, f"reference {i}").astype(np.float64)
        distance = float((tree.query(cloud)[0] ** 2).mean())
        if distance < best:  # else the other direction cannot save it
            distance += float((_distances(prediction, cloud) ** 2).mean())
            best = min(best, distance)
    if best == math.inf:
        raise ValueError("mmd needs references, got none")
    return 1000 * best


def consistency(predictions: Sequence[ArrayLike]) -> float:
    """How steady predictions of one object are: the mean CD-L2 (* 1000) of consecutive frames.

    Published as the mean over objects. Every point counts, zeros too.

    Args:
      predictions: at least two clouds (P, 3) of one object in its own frame, in order of time.

    Raises:
      ValueError: on fewer clouds, or if one is not (n, 3), is empty or not finite.
    """
    if len(predictions) < 2:
        raise ValueError(f"consistency needs predictions of 2 frames, got {len(predictions)}")
    clouds = [_checked(cloud, f"frame {i}") for i, cloud in enumerate(predictions)]
    return _mean(
        1000 * sum(float((d**2).mean()) for d in _both_ways(before, after))
        for before, after in itertools.pairwise(clouds)
    )


def _checked(cloud: ArrayLike, what: str, *, finite: bool = True) -> Cloud:
    points = np.asarray(cloud)
    if points.ndim != 2 or points.shape[1] != 3 or not len(points):
        raise ValueError(f"{what}: expected points of shape (n, 3), got {points.shape}")
    if finite and not np.isfinite(points).all():
        bad = int((~np.isfinite(points)).any(1).sum())
        raise ValueError(f"{what}: {bad} of {len(points)} points are not finite")
    return points


def _distances(points: Cloud, to: Cloud) -> NDArray[np.float64]:
    tree = cKDTree(to.astype(np.float64))
    distance: NDArray[np.float64] = tree.query(points.astype(np.float64))[0]
    return distance


def _both_ways(a: Cloud, b: Cloud) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return _distances(a, b), _distances(b, a)


def _mean(values: Iterable[float]) -> float:
    """The mean, rounded once, so that it does not depend on the order; nan without values."""
    listed = list(values)
    return math.fsum(listed) / len(listed) if listed else math.nan
