"""Detection metrics: from raw network outputs of one image to COCO mAP over a data set.

Three steps, each on its own: `nms` keeps the best boxes of one image (or `surest`, of a network
that makes no doubles), `unletterbox` moves them to
the original image's pixels, and `DetectionMetrics` scores them against the ground truth with
hotcoco, whose figures are pycocotools' to the last digit (tests/metrics/test_metrics.py). Boxes are
(n, 4) in pixels, xyxy: left, top, right, bottom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from hotcoco import COCO, COCOeval
from numpy.typing import ArrayLike, NDArray

MAX_DETECTIONS = 100  # per image and class, the COCO standard


@dataclass(frozen=True, eq=False)
class Detections:
    """The detections of one image, by descending score.

    Attributes:
      boxes: (n, 4) float32, xyxy pixels.
      scores: (n,) float32 in [0, 1].
      classes: (n,) int32.
      anchors: (n,) which of the candidates each was, where known.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.int32]
    anchors: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        n = len(self.scores)
        if self.boxes.shape != (n, 4) or self.scores.shape != (n,) or self.classes.shape != (n,):
            raise ValueError(
                "Detections need boxes (n, 4), scores (n,), classes (n,); got "
                f"{self.boxes.shape}, {self.scores.shape}, {self.classes.shape}"
            )

    def __len__(self) -> int:
        return len(self.scores)


def nms(
    boxes: ArrayLike,
    scores: ArrayLike,
    *,
    conf: float,
    iou: float,
    max_det: int = 300,
    max_nms: int = 30000,
    multi_label: bool,
    agnostic: bool = False,
) -> Detections:
    """Class-aware greedy non-maximum suppression of one image.

    A box is suppressed by a better box of its class if their IoU is above `iou`. For validation
    use conf 0.001, iou 0.7, multi_label; for prediction conf 0.25, iou 0.7, best class only.
    There is no time limit, so the result depends on nothing but the arguments.

    Args:
      boxes: (anchors, 4) xyxy pixels. Boxes that are not finite or have no area match nothing and
        are dropped.
      scores: (anchors, classes) probabilities.
      conf: keep scores strictly above this.
      iou: suppress above this overlap, in [0, 1].
      max_det: detections to return at most.
      max_nms: candidates to consider at most, the best by score.
      multi_label: every class above `conf` is a detection of its own; otherwise only the best class
        of each anchor is.
      agnostic: a box is suppressed by better boxes of all classes.

    Raises:
      ValueError: on shapes or thresholds that do not fit.
    """
    boxes = np.asarray(boxes, np.float32)
    scores = np.asarray(scores, np.float32)
    if scores.ndim != 2 or boxes.shape != (len(scores), 4):
        raise ValueError(
            f"nms needs boxes (A, 4) and scores (A, classes), got {boxes.shape}, {scores.shape}"
        )
    if not (0 <= conf <= 1 and 0 <= iou <= 1 and max_det > 0 and max_nms > 0):
        raise ValueError(
            "nms needs conf and iou in [0, 1] and positive max_det and max_nms, got "
            f"{conf=}, {iou=}, {max_det=}, {max_nms=}"
        )
    usable = np.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    candidate = (scores > conf) & usable[:, None]
    if not multi_label and scores.size:
        candidate &= np.arange(scores.shape[1]) == scores.argmax(1)[:, None]
    anchor, label = np.nonzero(candidate)
    best_first = np.argsort(-scores[anchor, label], kind="stable")[:max_nms]
    anchor, label = anchor[best_first], label[best_first]
    boxes, scores, classes = boxes[anchor], scores[anchor, label], label.astype(np.int32)
    kept = _greedy(boxes, scores, 0 * classes if agnostic else classes, iou, max_det)
    return Detections(boxes[kept], scores[kept], classes[kept], anchor[kept])


def surest(
    boxes: ArrayLike,
    scores: ArrayLike,
    classes: ArrayLike,
    *,
    conf: float,
    max_det: int = 300,
    wanted: NDArray[np.bool_] | None = None,
) -> Detections:
    """The detections of one image that a network made end to end, without any suppression.

    Args:
      boxes: (k, 4) xyxy pixels, scores: (k,), classes: (k,) integers; by descending score, see
        `models.yolo.surest`. Boxes that are not finite or have no area are dropped, as by `nms`.
      conf: keep scores strictly above this.
      max_det: detections to return at most.
      wanted: (classes,) which classes to keep; None for all.
    """
    boxes, scores = np.asarray(boxes, np.float32), np.asarray(scores, np.float32)
    classes = np.asarray(classes, np.int32)
    usable = np.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    keep = usable & (scores > conf)
    if wanted is not None:
        keep &= wanted[classes]
    kept = np.flatnonzero(keep)[:max_det]
    return Detections(boxes[kept], scores[kept], classes[kept], kept)


def _greedy(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    classes: NDArray[np.int32],
    iou: float,
    max_det: int,
) -> NDArray[np.intp]:
    """Indices of the first `max_det` survivors among candidates sorted by descending score."""
    if not len(scores):
        return np.zeros(0, np.intp)
    # OpenCV keeps classes apart by shifting each beyond the largest coordinate, which separates
    # them only if no coordinate is negative.
    corners = boxes.astype(np.float64) - boxes.min()
    xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    # What survives among the best k candidates does not depend on the rest: grow k until enough do.
    suppress: Any = cv2.dnn.NMSBoxesBatched  # its stubs ask for nested lists, it takes arrays
    k = 4 * max_det
    while True:
        kept = suppress(xywh[:k], scores[:k], classes[:k], 0.0, iou)
        if len(kept) >= max_det or k >= len(scores):
            return np.asarray(kept, np.intp)[:max_det]
        k *= 2


def unletterbox(
    boxes: ArrayLike, ratio: ArrayLike, pad: ArrayLike, size: tuple[int, int]
) -> NDArray[np.float32]:
    """Boxes of the letterboxed image, moved back to the original image and clipped to it.

    Args:
      boxes: (n, 4) xyxy in network pixels.
      ratio: (2,) network pixels per original pixel, (x, y).
      pad: (2,) border in network pixels left and above the image, (x, y).
      size: (height, width) of the original image.

    Returns:
      (n, 4) float32 xyxy in original pixels.
    """
    height, width = size
    scale, border = np.tile(np.asarray([ratio, pad], np.float64), 2)
    original: NDArray[np.float64] = (np.asarray(boxes).reshape(-1, 4) - border) / scale
    limit = np.array([width, height, width, height], np.float64)
    return original.clip(0, limit).astype(np.float32)


class Curves(NamedTuple):
    """What threshold of confidence gives what, at IoU 0.5; nan of classes without ground truth.

    Attributes:
      grid: (1001,) confidences from 0 to 1.
      precision, recall: (classes, 1001) of the detections at each and above.
      best: the confidence of the best mean F1, smoothed; nan without ground truth.
    """

    grid: NDArray[np.float64]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    best: float

    @property
    def f1(self) -> NDArray[np.float64]:
        """(classes, 1001)"""
        return 2 * self.precision * self.recall / np.maximum(self.precision + self.recall, 1e-16)

    def at_best(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Precision and recall (classes,) at the best confidence."""
        at = 0 if np.isnan(self.best) else int(np.searchsorted(self.grid, self.best))
        return self.precision[:, at], self.recall[:, at]


class _Image(NamedTuple):
    detections: Detections
    gt_boxes: NDArray[np.float64]
    gt_classes: NDArray[np.int64]
    size: tuple[int, int]


class DetectionMetrics:
    """Collects images one by one and reports COCO mAP (hotcoco, boxes, all areas).

    The result does not depend on the order in which images were added.

    Attributes:
      curves: of precision and recall, of the last `compute`; None before.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """`names[c]` is the name of class c; they label the per-class results and must differ."""
        self.names = tuple(names)
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"class names must differ, got {self.names}")
        self.reset()

    def reset(self) -> None:
        """Forgets every image."""
        self._images: dict[str, _Image] = {}
        self.curves: Curves | None = None

    def add(
        self,
        name: str,
        detections: Detections,
        gt_boxes: ArrayLike,
        gt_classes: ArrayLike,
        size: tuple[int, int],
    ) -> None:
        """Adds one image.

        Args:
          name: identifies the image; each may be added once.
          detections: in original pixels; the best 100 of each class count.
          gt_boxes: (n, 4) xyxy in original pixels.
          gt_classes: (n,) integers.
          size: (height, width) in original pixels.

        Raises:
          ValueError: on a repeated name, shapes that do not fit or a class without a name.
        """
        if name in self._images:
            raise ValueError(f"image {name!r} was added before")
        gt_boxes = np.asarray(gt_boxes, np.float64).reshape(-1, 4)
        gt_classes = np.asarray(gt_classes, np.int64).reshape(-1)
        if len(gt_boxes) != len(gt_classes):
            raise ValueError(f"{name}: {len(gt_boxes)} boxes but {len(gt_classes)} classes")
        for what, classes in ("ground truth", gt_classes), ("detections", detections.classes):
            if len(classes) and (classes.min() < 0 or classes.max() >= len(self.names)):
                raise ValueError(
                    f"{name}: {what} has classes {classes.min()}..{classes.max()}, "
                    f"but there are {len(self.names)} names"
                )
        self._images[name] = _Image(detections, gt_boxes, gt_classes, size)

    def compute(self) -> dict[str, float]:
        """Scores all images added so far.

        Returns:
          map50_95, map50, map75: mean AP over the classes that occur in the ground truth.
          precision, recall, confidence: at IoU 0.5, the mean over those classes at the confidence
            where their mean F1, smoothed over a tenth of the confidence range, is best. A class
            without a detection at that confidence has precision 0.
          ap50/<name>, ap/<name>: AP at IoU 0.5, and the mean over all IoUs, of each class, in the
            order of the names; precision/<name>, recall/<name>: at the same confidence as above;
            objects/<name>: ground-truth boxes.
          images, objects: how many images and ground-truth boxes were scored.

        A class without ground truth has no AP: its value is nan, and without any ground truth so
        are all scores. Ground truth without any detection scores 0.
        """
        evaluator = self._evaluator()
        precision = _precision(evaluator)  # (IoU, recall, class), -1 if no truth
        average = np.where(precision[:, 0] < 0, np.nan, precision.mean(1))  # (IoU, class)
        present = ~np.isnan(average[0])
        mean = average[:, present].mean(1) if present.any() else np.full(len(average), np.nan)
        self.curves = _curves(evaluator, present)
        precisions, recalls = self.curves.at_best()
        classes = [image.gt_classes for image in self._images.values()]
        objects = np.bincount(np.concatenate([np.zeros(0, int), *classes]), minlength=len(present))
        each = {
            "ap50": average[0], "ap": average.mean(0), "objects": objects,
            "precision": precisions, "recall": recalls,
        }  # fmt: skip
        return {
            "map50_95": float(mean.mean()),
            "map50": float(mean[0]),
            "map75": float(mean[5]),
            "precision": _mean(precisions[present]),
            "recall": _mean(recalls[present]),
            "confidence": self.curves.best,
            **{
                f"{name}/{n}": value
                for name, values in each.items()
                for n, value in zip(self.names, values.tolist(), strict=True)
            },
            "images": len(self._images),
            "objects": int(objects.sum()),
        }

    def confusion(self, conf: float = 0.25, iou: float = 0.45) -> NDArray[np.int64]:
        """What was taken for what.

        A detection belongs to the object that it overlaps most, whatever their classes, of those
        that no better pair has taken.

        Args:
          conf: smallest score. iou: smallest overlap.
        Returns:
          (classes + 1, classes + 1): rows by what was predicted, columns by what was there; the
          last of each is nothing.
        """
        nothing = len(self.names)
        matrix = np.zeros((nothing + 1, nothing + 1), np.int64)
        for image in self._images.values():
            shown = image.detections.scores >= conf
            boxes, found = image.detections.boxes[shown], image.detections.classes[shown]
            overlap = _overlaps(boxes.astype(np.float64), image.gt_boxes)
            free_found, free_truth = np.ones(len(found), bool), np.ones(len(image.gt_boxes), bool)
            pairs = np.argwhere(overlap >= iou)
            for i, j in pairs[np.argsort(-overlap[tuple(pairs.T)], kind="stable")]:
                if free_found[i] and free_truth[j]:
                    free_found[i] = free_truth[j] = False
                    matrix[found[i], image.gt_classes[j]] += 1
            matrix[:-1, nothing] += np.bincount(found[free_found], minlength=nothing)
            matrix[nothing, :-1] += np.bincount(image.gt_classes[free_truth], minlength=nothing)
        return matrix

    def as_coco(
        self, image_ids: Sequence[Any] | None = None, category_ids: Sequence[Any] | None = None
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """All images added so far as COCO's tools read them: results, and the data set that they
        are of, without crowds.

        Args:
          image_ids: of the images, in the order in which they were added; None counts them from 1.
          category_ids: of the classes; None counts them from 1. A class whose id is None is left
            out.
        """
        ids = range(1, len(self._images) + 1) if image_ids is None else image_ids
        kinds = range(1, len(self.names) + 1) if category_ids is None else category_ids
        results, truth, records = list[dict[str, Any]](), list[dict[str, Any]](), []
        for key, (name, image) in zip(ids, self._images.items(), strict=True):
            found = image.detections
            for row in _annotations(key, found.boxes, found.classes, found.scores):
                if kinds[row["category_id"]] is None:
                    continue
                box = [round(side, 3) for side in row["bbox"]]
                results.append({
                    "image_id": key, "category_id": kinds[row["category_id"]], "bbox": box,
                    "score": round(row["score"], 6),
                })  # fmt: skip
            for row in _annotations(key, image.gt_boxes, image.gt_classes):
                category = kinds[row["category_id"]]
                truth.append({"id": len(truth) + 1, **row, "category_id": category})
            height, width = image.size
            file = name.partition(" ")[2] or name
            records.append({"id": key, "file_name": file, "height": height, "width": width})
        named = [(k, n) for k, n in zip(kinds, self.names, strict=True) if k is not None]
        categories = [{"id": k, "name": n} for k, n in named]
        return results, {"images": records, "annotations": truth, "categories": categories}

    def _evaluator(self) -> COCOeval:
        """hotcoco with the images, sorted by name; nothing is evaluated yet."""
        images = [image for _, image in sorted(self._images.items())]
        boxes = _xywh(np.concatenate([np.zeros((0, 4)), *(image.gt_boxes for image in images)]))
        truth = COCO.from_arrays(
            [
                {"id": i, "height": image.size[0], "width": image.size[1]}
                for i, image in enumerate(images)
            ],
            [{"id": c, "name": name} for c, name in enumerate(self.names)],
            np.repeat(np.arange(len(images)), [len(image.gt_boxes) for image in images]),
            np.concatenate([np.zeros(0, np.int64), *(image.gt_classes for image in images)]),
            boxes,
            area=boxes[:, 2] * boxes[:, 3],
        )
        found = [
            np.column_stack([np.full(len(d), i), _xywh(d.boxes), d.scores, d.classes])
            for i, d in enumerate(image.detections for image in images)
        ]
        rows = np.concatenate([np.zeros((0, 7)), *found])
        evaluator = COCOeval(truth, truth.load_res(rows), "bbox")
        # hotcoco's parameters are copies when read, so that each is given whole.
        evaluator.params.max_dets = [MAX_DETECTIONS]
        evaluator.params.area_rng = evaluator.params.area_rng[:1]
        evaluator.params.area_rng_lbl = evaluator.params.area_rng_lbl[:1]
        return evaluator


def _annotations(
    image_id: int,
    boxes: NDArray[Any],
    classes: NDArray[Any],
    scores: NDArray[Any] | None = None,
) -> list[dict[str, Any]]:
    """COCO annotation records (without ids) of one image."""
    records = [
        {"image_id": image_id, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": 0}
        for c, b in zip(classes.tolist(), _xywh(boxes).tolist(), strict=True)
    ]
    if scores is not None:
        for record, score in zip(records, scores.tolist(), strict=True):
            record["score"] = score
    return records


def _xywh(boxes: NDArray[Any]) -> NDArray[np.float64]:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).astype(np.float64)


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _overlaps(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, m) intersection over union of boxes (n, 4) and (m, 4)."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.prod(np.maximum(high - low, 0), axis=-1)
    areas = [np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=-1) for boxes in (a, b)]
    return both / np.maximum(areas[0][:, None] + areas[1][None] - both, 1e-12)


def _precision(evaluator: COCOeval) -> NDArray[np.float64]:
    """(IoU, recall, class), -1 of classes without ground truth."""
    evaluator.evaluate()
    evaluator.accumulate()
    result = evaluator.eval
    assert result is not None  # it was accumulated
    precision: NDArray[np.float64] = result["precision"][..., 0, 0]
    return precision


def _matches(evaluator: COCOeval, c: int) -> tuple[NDArray[np.float64], NDArray[np.bool_], int]:
    """The scores of the detections of class `c`, which of them found an object at IoU 0.5, and how
    many objects there are."""
    evaluator.params.iou_thrs = [0.5]
    evaluator.params.cat_ids = [c]  # one by one: what all have at once takes much memory
    evaluator.evaluate()
    images = [image for image in evaluator.eval_imgs if image is not None]
    scores = np.concatenate([image["dtScores"] for image in images])
    correct = np.concatenate([image["dtMatched"][0] for image in images])
    return scores, correct.astype(bool), sum(len(image["gtIds"]) for image in images)


def _curves(evaluator: COCOeval, present: NDArray[np.bool_]) -> Curves:
    """Precision and recall of the `present` classes, and the confidence of their best mean F1."""
    grid = np.linspace(0, 1, 1001)
    all_precision, all_recall = np.full((2, len(present), len(grid)), np.nan)
    if not present.any():
        return Curves(grid, all_precision, all_recall, float("nan"))
    precision, recall, f1 = np.zeros((3, np.count_nonzero(present), len(grid)))
    for row, c in enumerate(np.flatnonzero(present).tolist()):
        scores, correct, objects = _matches(evaluator, c)
        best_first = np.argsort(-scores, kind="stable")
        found = np.searchsorted(-scores[best_first], -grid, side="right")  # detections >= grid
        true = np.concatenate([[0], np.cumsum(correct[best_first])])[found]
        precision[row] = true / np.maximum(found, 1)
        recall[row] = true / objects
        f1[row] = 2 * true / (found + objects)
    half = len(grid) // 20
    smooth = np.convolve(
        np.pad(f1.mean(0), half, mode="edge"), np.full(2 * half + 1, 1 / (2 * half + 1)), "valid"
    )
    best = int(smooth.round(12).argmax())  # rounded, so that a plateau's first point wins
    all_precision[present], all_recall[present] = precision, recall
    return Curves(grid, all_precision, all_recall, float(grid[best]))
