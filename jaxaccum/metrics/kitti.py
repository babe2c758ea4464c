"""KITTI's own metrics: AP in the image, in bird's-eye view and in 3D.

Everything is in the camera frame of KITTI: x right, y down, z forward, in metres. A box stands on
its `location`, the centre of its bottom face; its length lies along (cos yaw, -sin yaw) and its
width along (sin yaw, cos yaw) in (x, z). Protocol: Geiger, Lenz, Urtasun, "Are we ready for
autonomous driving? The KITTI vision benchmark suite", CVPR 2012; 40 recall points: Simonelli et
al., "Disentangling monocular 3D object detection", ICCV 2019.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxaccum.metrics.kitti_labels import DONT_CARE, NO_ALPHA, Labels
from jaxaccum.metrics.kitti_labels import format as format
from jaxaccum.metrics.kitti_labels import parse as parse
from jaxaccum.metrics.kitti_overlap import (
    Matrix,
    area_2d,
    intersection_2d,
    iou_2d,
    iou_3d,
    iou_bev,
    ratio,
)

CLASSES = ("Car", "Pedestrian", "Cyclist")
NEUTRAL = {"Car": "Van", "Pedestrian": "Person_sitting"}  # finding these is neither right nor wrong
METRICS = ("2d", "bev", "3d")
# What `evaluate` reports: ap40_2d, ..., aos40, ap11_2d, ..., aos11.
SCORES = tuple(
    name for points in (40, 11) for name in (*(f"ap{points}_{m}" for m in METRICS), f"aos{points}")
)
# Least overlap of a match, exclusive, for each of METRICS.
Thresholds = Mapping[str, tuple[float, float, float]]
OFFICIAL: Thresholds = {
    "Car": (0.7, 0.7, 0.7),
    "Pedestrian": (0.5, 0.5, 0.5),
    "Cyclist": (0.5, 0.5, 0.5),
}
LOOSE: Thresholds = {
    "Car": (0.7, 0.5, 0.5),
    "Pedestrian": (0.5, 0.25, 0.25),
    "Cyclist": (0.5, 0.25, 0.25),
}
STEPS = 40  # recall steps: precision is sampled at STEPS + 1 recalls


class _Level(NamedTuple):
    height: float  # px of the 2D box: truths must be above, detections not below
    occlusion: int  # largest allowed
    truncation: float  # largest allowed


LEVELS: Mapping[str, _Level] = {
    "easy": _Level(40, 0, 0.15),
    "moderate": _Level(25, 1, 0.30),
    "hard": _Level(25, 2, 0.50),
}


class _Image(NamedTuple):
    """One image, as far as it is the same for every class and level."""

    truth_kinds: NDArray[np.str_]
    truth_heights: Matrix
    occlusion: NDArray[np.int32]
    truncation: NDArray[np.float32]
    found_kinds: NDArray[np.str_]
    found_heights: Matrix
    scores: Matrix
    overlaps: Matrix  # (metric, truth, detection)
    similarity: Matrix  # (truth, detection), of the headings: 1 equal, 0 opposite
    covered: Matrix  # (detection,) largest part of its 2D box inside one DontCare area


def _image(truth: Labels, found: Labels) -> _Image:
    kinds = np.array(truth.kinds, np.str_)
    real = kinds != DONT_CARE
    area = intersection_2d(found.boxes.astype(np.float64), truth.boxes[~real].astype(np.float64))
    covered = ratio(area, area_2d(found.boxes.astype(np.float64))[:, None])
    solid = truth.boxes3d[real], found.boxes3d
    turn = truth.alpha[real].astype(np.float64)[:, None] - found.alpha
    return _Image(
        truth_kinds=kinds[real],
        truth_heights=_heights(truth.boxes[real]),
        occlusion=truth.occlusion[real],
        truncation=truth.truncation[real],
        found_kinds=np.array(found.kinds, np.str_),
        found_heights=_heights(found.boxes),
        scores=np.zeros(0) if found.scores is None else found.scores.astype(np.float64),
        overlaps=np.stack(
            [iou_2d(truth.boxes[real], found.boxes), iou_bev(*solid), iou_3d(*solid)]
        ),
        similarity=(1 + np.cos(turn)) / 2,
        covered=covered.max(1, initial=0),
    )


def _heights(boxes: NDArray[np.float32]) -> Matrix:
    """In pixels, without the rounding of float32, which must not decide what is 40 pixels high."""
    return (boxes[:, 3].astype(np.float64) - boxes[:, 1]).round(3)


class _Case(NamedTuple):
    """What of an image competes for matches, in the eyes of one class, level and metric.

    Only truths and detections that overlap enough with some counterpart are here.
    """

    overlaps: Matrix  # (truth, detection), 0 where too small for a match
    similarity: Matrix
    scores: Matrix
    neutral_truths: NDArray[np.bool_]
    neutral_found: NDArray[np.bool_]  # too low for the level
    covered: NDArray[np.bool_]  # by a DontCare area


class _View(NamedTuple):
    """The whole data set, in the eyes of one class, level and metric."""

    truths: int  # that count
    cases: list[_Case]
    strays: Matrix  # scores of detections that overlap no truth: wrong at any threshold


def _view(images: Sequence[_Image], kind: str, level: _Level, metric: int, least: float) -> _View:
    truths, cases, strays = 0, [], [np.zeros(0)]
    for image in images:
        hard = image.truth_heights <= level.height
        hard |= image.occlusion > level.occlusion
        # The limit in float32, as the truncation: 0.15 must not be above 0.15.
        hard |= image.truncation > np.float32(level.truncation)
        own = image.truth_kinds == kind
        rows = np.flatnonzero(own | (image.truth_kinds == NEUTRAL.get(kind, kind)))
        valid = (own & ~hard)[rows]
        truths += int(valid.sum())
        low = image.found_heights < level.height
        # As in the benchmark's own program, low detections of any class can take a truth of this
        # one, which then counts neither as found nor as missed.
        columns = np.flatnonzero((image.found_kinds == kind) | low)
        low = low[columns]
        scores = image.scores[columns]
        covered = (image.covered[columns] > least) & (METRICS[metric] == "2d")
        overlaps = image.overlaps[metric][np.ix_(rows, columns)]
        overlaps = np.where(overlaps > least, overlaps, 0)
        met = overlaps.any(0)
        strays.append(scores[~met & ~low & ~covered])
        if met.any():
            there = overlaps.any(1)
            cases.append(
                _Case(
                    overlaps[there][:, met],
                    image.similarity[np.ix_(rows[there], columns[met])],
                    scores[met],
                    ~valid[there],
                    low[met],
                    covered[met],
                )
            )
    return _View(truths, cases, np.concatenate(strays))


def _true_scores(case: _Case) -> Iterator[float]:
    """Scores of the right detections, without any threshold: each truth takes the best score."""
    free = np.ones(len(case.scores), bool)
    for overlaps, neutral in zip(case.overlaps, case.neutral_truths, strict=True):
        key = np.where(free & (overlaps > 0), case.scores, -np.inf)
        best = int(key.argmax())
        if key[best] > -np.inf:
            free[best] = False
            if not neutral and not case.neutral_found[best]:
                yield float(case.scores[best])


def _count(case: _Case, thresholds: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Right and wrong detections, and the sum of the right ones' similarity, at each threshold.

    Each truth in turn takes the free detection that overlaps it most; a neutral one only if there
    is no other, and of these the first.
    """
    right, similarity = np.zeros((2, len(thresholds)))
    step = np.arange(len(thresholds))
    free = case.scores >= thresholds[:, None]
    last = np.where(case.overlaps > 0, 1e-9, 0)  # behind any overlap that counts
    preference = np.where(case.neutral_found, last, case.overlaps)
    for i, neutral in enumerate(case.neutral_truths):
        key = np.where(free, preference[i], 0)
        best = key.argmax(1)
        taken = key[step, best] > 0
        free[step[taken], best[taken]] = False
        if not neutral:
            hit = taken & ~case.neutral_found[best]
            right += hit
            similarity += np.where(hit, case.similarity[i][best], 0)
    wrong = (free & ~case.neutral_found & ~case.covered).sum(1)
    return right, wrong.astype(np.float64), similarity


def _sample(scores: Matrix, truths: int) -> Matrix:
    """Thresholds for the recalls 0, 1/40, ..., 1, as far as the right detections reach.

    Above 40 truths as the benchmark does: going down the scores, the next recall takes the
    detection that brings recall nearest to it, and the last detection is always taken. That never
    takes a detection twice, so it cannot fill 41 recalls from fewer truths, and even perfect
    detections would score below 100; there each recall takes the first detection that reaches it.
    """
    scores = -np.sort(-scores)
    if truths <= STEPS:
        first = np.maximum(-(-np.arange(STEPS + 1) * truths // STEPS) - 1, 0)
        return scores[first[first < len(scores)]]
    taken: list[float] = []
    recall = 0.0  # summed up with the benchmark's rounding: it decides between equally near ones
    for i, score in enumerate(scores, start=1):
        if i == len(scores) or (i + 1) / truths - recall >= recall - i / truths:
            taken.append(score)
            recall += 1 / STEPS
    return np.array(taken)


def _curves(view: _View) -> tuple[Matrix, Matrix]:
    """Best precision, and best mean similarity, at each of 41 recalls or any above it."""
    scores = np.array([score for case in view.cases for score in _true_scores(case)])
    thresholds = _sample(scores, view.truths)
    counts = np.zeros((3, len(thresholds)))
    for case in view.cases:
        counts += _count(case, thresholds)
    right, wrong, similarity = counts
    # Strays at or above each threshold.
    wrong = wrong + len(view.strays) - np.searchsorted(np.sort(view.strays), thresholds)
    curves = np.zeros((2, STEPS + 1))
    curves[:, : len(thresholds)] = np.stack([right, similarity]) / np.maximum(right + wrong, 1)
    precision, orientation = np.maximum.accumulate(curves[:, ::-1], axis=1)[:, ::-1]
    return precision, orientation


def _averages(curve: Matrix) -> dict[str, float]:
    """In percent, over 40 recalls (without recall 0) and over 11 (with it)."""
    return {"40": float(100 * curve[1:].mean()), "11": float(100 * curve[::4].mean())}


def evaluate(
    truths: Sequence[Labels],
    detections: Sequence[Labels],
    *,
    classes: Sequence[str] = CLASSES,
    thresholds: Thresholds = OFFICIAL,
) -> dict[str, float]:
    """Average precision by the protocol of the KITTI benchmark.

    A truth counts at a level if its 2D box is higher and it is occluded and truncated no more than
    the level allows; harder ones and neutral types (Van for Car, Person_sitting for Pedestrian)
    may be found or not. So may detections too low for the level, and in 2D those in DontCare
    areas. Where several truths could take a detection the first row does, as in the benchmark's
    own program. Data sets of at most 40 truths are sampled by exact recall instead (`_sample`).

    Args:
      truths: one for each image.
      detections: one for each image, in the same order, with scores.
      classes: types to evaluate.
      thresholds: type -> overlap that a match must exceed, for 2D, BEV and 3D; `OFFICIAL`,
        `LOOSE` or your own.

    Returns:
      In percent, for each class (and "mean", over the classes with truths) and level (easy,
      moderate, hard): "ap40_2d/Car/easy", likewise ap40_bev, ap40_3d and aos40, and the older
      11-point averages ap11_2d, ap11_bev, ap11_3d, aos11. "truths/Car/easy": how many truths
      count. Without truths a score is nan; without right detections 0. aos is nan if any
      detection has no alpha (-10).

    Raises:
      ValueError: if the lists differ in length, a detection has no finite score, or a class has
        no thresholds.
    """
    _check_pairs(truths, detections)
    unknown = [kind for kind in classes if kind not in thresholds]
    if unknown:
        raise ValueError(f"no overlap thresholds for {unknown}, only for {list(thresholds)}")
    images = [_image(truth, found) for truth, found in zip(truths, detections, strict=True)]
    headed = not any(
        alpha == NO_ALPHA and kind in classes
        for found in detections
        for alpha, kind in zip(found.alpha.tolist(), found.kinds, strict=True)
    )
    result: dict[str, float] = {}
    for level_name, level in LEVELS.items():
        for kind in classes:
            place = f"{kind}/{level_name}"
            for metric, least in enumerate(thresholds[kind]):
                view = _view(images, kind, level, metric, least)
                precision, orientation = (
                    _curves(view) if view.truths else np.full((2, STEPS + 1), np.nan)
                )
                for points, value in _averages(precision).items():
                    result[f"ap{points}_{METRICS[metric]}/{place}"] = value
                if METRICS[metric] == "2d":
                    result[f"truths/{place}"] = view.truths
                    for points, value in _averages(orientation).items():
                        result[f"aos{points}/{place}"] = value if headed else np.nan
        for score in SCORES:
            values = [result[f"{score}/{kind}/{level_name}"] for kind in classes]
            present = [v for v in values if not np.isnan(v)]
            result[f"{score}/mean/{level_name}"] = float(np.mean(present)) if present else np.nan
    return result


def _check_pairs(truths: Sequence[Labels], detections: Sequence[Labels]) -> None:
    if len(truths) != len(detections):
        raise ValueError(f"truths of {len(truths)} images but detections of {len(detections)}")
    for i, found in enumerate(detections):
        if len(found) and (found.scores is None or not np.isfinite(found.scores).all()):
            raise ValueError(f"detections of image {i} need a finite score each")


def summary(
    result: Mapping[str, float],
    *,
    classes: Sequence[str] = CLASSES,
    thresholds: Thresholds = OFFICIAL,
) -> str:
    """The usual table of what `evaluate` returned for the same classes and thresholds."""
    head = f"{'AP, 40 recalls (%)':28}" + "".join(f"{level:>10}" for level in LEVELS)
    lines = [head]
    rows = ("ap40_2d", "ap40_bev", "ap40_3d", "aos40")
    titles = ("2D", "BEV", "3D", "orientation")
    for kind in (*classes, "mean"):
        for i, (score, title) in enumerate(zip(rows, titles, strict=True)):
            least = "" if kind == "mean" else f"{thresholds[kind][i % 3]:.2f}"
            values = (result[f"{score}/{kind}/{level}"] for level in LEVELS)
            cells = "".join(f"{'-' if np.isnan(v) else f'{v:.2f}':>10}" for v in values)
            lines.append(f"{kind if not i else '':12}{title:12}{least:4}{cells}")
    return "\n".join(lines)


# What `errors` reports.
ERRORS = ("depth", "lateral", "vertical", "height", "width", "length", "yaw", "yaw_mod_pi")


def errors(
    truths: Sequence[Labels],
    detections: Sequence[Labels],
    *,
    classes: Sequence[str] = CLASSES,
    score: float = 0.25,
    iou: float = 0.5,
) -> dict[str, float]:
    """Mean absolute 3D errors of the detections that are right in the image.

    Within a class and an image, by descending score, each detection takes the free truth (of any
    difficulty) that its 2D box overlaps most, if by more than `iou`.

    Args:
      truths: one for each image.
      detections: one for each image, in the same order.
      classes: types to compare.
      score: only detections with a score above this.
      iou: overlap in the image that a match must exceed.

    Returns:
      For each class and "all": "depth/Car" (z), lateral (x), vertical (y), height, width and
      length in metres; yaw in radians, in [0, pi]; yaw_mod_pi, as if front and back were the
      same, in [0, pi/2]; "matched/Car": detections compared; "truths/Car". Without a match an
      error is nan.

    Raises:
      ValueError: as `evaluate`.
    """
    _check_pairs(truths, detections)
    result: dict[str, float] = {}
    collected = []
    for kind in classes:
        count, parts = 0, [np.zeros((0, len(ERRORS)))]
        for truth, found in zip(truths, detections, strict=True):
            own = np.flatnonzero(np.array(truth.kinds, np.str_) == kind)
            count += len(own)
            if found.scores is None:
                continue
            named = np.array(found.kinds, np.str_) == kind
            mine = np.flatnonzero(named & (found.scores > score))
            mine = mine[np.argsort(-found.scores[mine], kind="stable")]
            i, j = _best_pairs(iou_2d(truth.boxes[own], found.boxes[mine]), iou)
            parts.append(_differences(truth.boxes3d[own[i]], found.boxes3d[mine[j]]))
        collected.append(np.concatenate(parts))
        result |= _means(collected[-1], count, kind)
    count = sum(int(result[f"truths/{kind}"]) for kind in classes)
    return result | _means(np.concatenate([np.zeros((0, len(ERRORS))), *collected]), count, "all")


def _best_pairs(overlaps: Matrix, least: float) -> tuple[list[int], list[int]]:
    """Rows and columns that match: each column in turn takes the free row it overlaps most."""
    pairs: list[tuple[int, int]] = []
    free = overlaps.copy()
    for column in range(overlaps.shape[1] if len(overlaps) else 0):
        row = int(free[:, column].argmax())
        if free[row, column] > least:
            pairs.append((row, column))
            free[row] = 0
    return [row for row, _ in pairs], [column for _, column in pairs]


def _differences(truth: Matrix, found: Matrix) -> Matrix:
    """(n, len(ERRORS)) absolute differences of (n, 7) boxes."""
    height, width, length, x, y, z, yaw = np.abs(found - truth).T
    turn = np.abs((yaw + np.pi) % (2 * np.pi) - np.pi)
    return np.stack([z, x, y, height, width, length, turn, np.minimum(turn, np.pi - turn)], axis=1)


def _means(differences: Matrix, truths: int, kind: str) -> dict[str, float]:
    empty = not len(differences)
    means = np.full(len(ERRORS), np.nan) if empty else differences.mean(0)
    values = {f"{name}/{kind}": float(v) for name, v in zip(ERRORS, means, strict=True)}
    return {**values, f"matched/{kind}": len(differences), f"truths/{kind}": truths}
