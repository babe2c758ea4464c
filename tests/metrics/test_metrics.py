"""Detection metrics against hand-made cases and a plain greedy NMS."""

import json
import time

import hotcoco
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from jaxaccum.metrics import detection
from jaxaccum.metrics.detection import DetectionMetrics, Detections, nms, unletterbox

A, B, C = [10, 10, 50, 50], [100, 100, 180, 160], [200, 20, 240, 90]


def detections(*rows):
    """Rows of (box, score, class)."""
    return Detections(
        np.array([row[0] for row in rows], np.float32).reshape(-1, 4),
        np.array([row[1] for row in rows], np.float32),
        np.array([row[2] for row in rows], np.int32),
    )


def score(found, boxes, classes, names=("cat", "dog")):
    metrics = DetectionMetrics(names)
    metrics.add("image", found, boxes, classes, (300, 400))
    return metrics.compute()


def iou_of(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (area - width * height)


def plain_nms(boxes, scores, conf, iou, max_det, multi_label):
    candidates = [
        (-p, anchor, label)
        for anchor, row in enumerate(scores.tolist())
        for label, p in enumerate(row)
        if p > conf and (multi_label or label == int(np.argmax(row)))
    ]
    kept = []
    for negative, anchor, label in sorted(candidates):
        box = boxes[anchor].tolist()
        if all(label != other or iou_of(box, rival) <= iou for rival, _, other in kept):
            kept.append((box, -negative, label))
    return kept[:max_det]


# Coordinates are whole, so that no IoU falls within rounding of these thresholds unless it is one
# half exactly, which is representable and must not suppress.
@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    anchors=st.integers(0, 40),
    classes=st.integers(1, 4),
    iou=st.sampled_from([0.2001, 0.5, 0.7001]),
    max_det=st.sampled_from([1, 3, 300]),
    shift=st.sampled_from([0, -200]),
    multi_label=st.booleans(),
)
def test_nms_equals_plain_greedy(seed, anchors, classes, iou, max_det, shift, multi_label):
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, 20, (anchors, 2))
    boxes = np.concatenate([corner, corner + rng.integers(1, 20, (anchors, 2))], axis=1) + shift
    # few distinct scores: ties happen, and the earlier anchor wins
    scores = (rng.integers(0, 200, (anchors, classes)) / 200).astype(np.float32)

    found = nms(boxes, scores, conf=0.25, iou=iou, max_det=max_det, multi_label=multi_label)

    expected = plain_nms(boxes, scores, 0.25, iou, max_det, multi_label)
    assert found.boxes.tolist() == [box for box, _, _ in expected]
    assert found.scores.tolist() == [p for _, p, _ in expected]
    assert found.classes.tolist() == [label for _, _, label in expected]
    assert (found.boxes.dtype, found.scores.dtype) == (np.float32, np.float32)
    assert found.classes.dtype == np.int32


def test_nms_multi_label_keeps_every_class_of_an_anchor():
    scores = [[0.9, 0.6]]
    both = nms([A], scores, conf=0.25, iou=0.7, multi_label=True)
    best = nms([A], scores, conf=0.25, iou=0.7, multi_label=False)
    assert both.classes.tolist() == [0, 1]
    assert best.classes.tolist() == [0]


def test_nms_thresholds_are_strict():
    assert len(nms([A], [[0.5]], conf=0.5, iou=0.7, multi_label=True)) == 0
    halves = [[0, 0, 10, 10], [0, 0, 10, 5]]
    assert len(nms(halves, [[0.9], [0.8]], conf=0.1, iou=0.5, multi_label=True)) == 2
    assert len(nms(halves, [[0.9], [0.8]], conf=0.1, iou=0.49, multi_label=True)) == 1


def test_nms_keeps_classes_apart_at_negative_coordinates():
    # OpenCV by itself shifts class 1 by one pixel here and suppresses it.
    boxes = [[-100, -100, -90, -90], [-11, -11, -1, -1]]
    scores = [[0.9, 0.0], [0.0, 0.8]]
    assert len(nms(boxes, scores, conf=0.1, iou=0.3, multi_label=True)) == 2


def test_nms_drops_boxes_without_area_and_without_numbers():
    boxes = [[5, 5, 5, 9], [9, 9, 5, 5], [np.nan, 0, 5, 5], [0, 0, np.inf, 5], A]
    found = nms(boxes, np.full((5, 1), 0.9), conf=0.1, iou=0.7, multi_label=True)
    assert found.boxes.tolist() == [A]


def test_nms_considers_only_the_best_candidates():
    found = nms([A, B, C], [[0.3], [0.9], [0.5]], conf=0.1, iou=0.7, max_nms=2, multi_label=True)
    assert found.boxes.tolist() == [B, C]


def test_nms_looks_past_the_first_block_of_suppressed_candidates():
    boxes = [A] * 50 + [B]
    scores = np.linspace(0.9, 0.5, 51)[:, None]
    found = nms(boxes, scores, conf=0.1, iou=0.7, max_det=2, multi_label=False)
    assert found.boxes.tolist() == [A, B]


@pytest.mark.parametrize("change", [{"conf": -0.1}, {"iou": 1.5}, {"max_det": 0}])
def test_nms_refuses_thresholds_out_of_range(change):
    with pytest.raises(ValueError, match="nms needs"):
        nms([A], [[0.5]], **{"conf": 0.1, "iou": 0.7, "multi_label": True, **change})


def test_nms_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(A, classes\)"):
        nms([A, B], [[0.5]], conf=0.1, iou=0.7, multi_label=True)


def test_unletterbox_inverts_the_letterbox_and_clips():
    boxes = np.array([[20, 30, 90, 110]], np.float32)
    ratio, pad = np.array([0.5, 0.25]), np.array([7, 3])
    letterboxed = boxes * np.tile(ratio, 2) + np.tile(pad, 2)
    np.testing.assert_allclose(unletterbox(letterboxed, ratio, pad, (200, 300)), boxes)
    clipped = unletterbox(letterboxed, ratio, pad, (100, 80))
    np.testing.assert_allclose(clipped, [[20, 30, 80, 100]])
    assert clipped.dtype == np.float32
    assert unletterbox(np.zeros((0, 4)), ratio, pad, (100, 80)).shape == (0, 4)


def test_perfect_detections_score_one():
    result = score(detections((A, 0.9, 0), (B, 0.8, 1)), [A, B], [0, 1])
    for key in ("map50", "map75", "map50_95", "precision", "recall", "ap50/cat", "ap50/dog"):
        assert result[key] == pytest.approx(1.0, abs=1e-9), key
    assert (result["images"], result["objects"]) == (1, 2)


def test_every_class_has_its_own():
    result = score(detections((A, 0.9, 0)), [A, B, B], [0, 1, 1])
    found = {key: (result[f"{key}/cat"], result[f"{key}/dog"]) for key in (
        "ap50", "ap", "precision", "recall", "objects"
    )}  # fmt: skip
    assert found == {
        "ap50": (pytest.approx(1.0), 0.0), "ap": (pytest.approx(1.0), 0.0),
        "precision": (1.0, 0.0), "recall": (1.0, 0.0), "objects": (1, 2),
    }  # fmt: skip
    for mean, of in (("map50_95", "ap"), ("precision", "precision"), ("recall", "recall")):
        assert result[mean] == pytest.approx((result[f"{of}/cat"] + result[f"{of}/dog"]) / 2)
    absent = score(detections((A, 0.9, 0)), [A], [0])
    assert np.isnan([absent[f"{key}/dog"] for key in ("ap50", "ap", "precision", "recall")]).all()
    assert absent["objects/dog"] == 0


def test_one_of_two_objects_found():
    result = score(detections((A, 0.9, 0)), [A, B], [0, 0])
    assert result["map50"] == pytest.approx(51 / 101, abs=1e-9)  # 0.50495
    assert result["map50_95"] == pytest.approx(51 / 101, abs=1e-9)
    assert result["precision"] == 1.0
    assert result["recall"] == 0.5


def test_a_shifted_box_counts_up_to_its_iou():
    shifted = [10, 10, 50, 40]  # IoU with A is 0.75 exactly, reached by six of ten thresholds
    result = score(detections((shifted, 0.9, 0)), [A], [0])
    assert result["map50"] == result["map75"] == pytest.approx(1.0, abs=1e-9)
    assert result["map50_95"] == pytest.approx(0.6, abs=1e-9)


def test_the_wrong_class_does_not_match():
    result = score(detections((A, 0.9, 1)), [A], [0])
    assert result["map50"] == result["ap50/cat"] == 0.0
    assert np.isnan(result["ap50/dog"])  # no ground truth, so not part of the mean


def test_a_duplicate_is_a_false_positive():
    # Ahead of the second object's match: precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1.
    result = score(detections((A, 0.9, 0), (A, 0.8, 0), (B, 0.7, 0)), [A, B], [0, 0])
    assert result["map50"] == pytest.approx((51 + 50 * 2 / 3) / 101, abs=1e-9)


def test_precision_and_recall_are_taken_at_the_best_confidence():
    wrong = [(C, 0.2 - i / 1000, 0) for i in range(20)]
    result = score(detections((A, 0.9, 0), (B, 0.8, 0), *wrong), [A, B], [0, 0])
    assert 0.2 < result["confidence"] <= 0.8
    assert (result["precision"], result["recall"]) == (1.0, 1.0)


def test_the_best_confidence_is_the_middle_of_a_plateau_not_a_narrow_peak():
    # F1 is 1 between confidences 0.79 and 0.8 alone, and 0.8 everywhere below.
    found = detections((A, 0.9, 0), (B, 0.8, 0), (C, 0.79, 0))
    result = score(found, [A, B], [0, 0])
    assert result["confidence"] < 0.78
    assert (result["precision"], result["recall"]) == (pytest.approx(2 / 3), 1.0)


def test_the_mean_is_over_classes_not_over_objects():
    result = score(detections((A, 0.9, 0)), [A, B, C], [0, 1, 1])
    assert result["map50"] == pytest.approx(0.5, abs=1e-9)
    assert (result["precision"], result["recall"]) == (0.5, 0.5)


def test_no_detections_score_zero(capfd):
    result = score(detections(), [A, B], [0, 1])
    assert [result[key] for key in ("map50", "map50_95", "precision", "recall")] == [0.0] * 4
    assert capfd.readouterr().out == ""


def test_no_ground_truth_has_no_score():
    result = score(detections((A, 0.9, 0)), [], [])
    assert all(np.isnan(result[key]) for key in ("map50", "map50_95", "map75", "precision"))
    assert (result["images"], result["objects"]) == (1, 0)


def test_nothing_at_all_has_no_score():
    result = DetectionMetrics(["cat"]).compute()
    assert np.isnan(result["map50"])
    assert result["images"] == 0


def random_image(rng, n, classes):
    corner = rng.uniform(0, 300, (n, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(10, 90, (n, 2))], axis=1)
    return boxes, rng.integers(0, classes, n)


def test_the_order_of_images_does_not_matter_and_reset_forgets():
    rng = np.random.default_rng(0)
    images = []
    for name in "abcdef":
        boxes, classes = random_image(rng, 8, 2)
        noisy = boxes + rng.normal(0, 4, boxes.shape)
        # equal scores across images: only a fixed order of images breaks the ties the same way
        found = detections(*zip(noisy, [0.9, 0.8, 0.7, 0.6] * 2, classes, strict=True))
        images.append((name, found, boxes, classes, (400, 400)))
    metrics = DetectionMetrics(["cat", "dog"])
    results = []
    for order in (images, images[::-1]):
        metrics.reset()
        for image in order:
            metrics.add(*image)
        results.append(metrics.compute())
    assert results[0] == results[1]
    assert 0.1 < results[0]["map50_95"] < 0.9


def test_a_validation_set_is_scored_quickly():
    rng = np.random.default_rng(0)
    metrics = DetectionMetrics(["a", "b", "c"])
    for i in range(65):
        boxes, classes = random_image(rng, 300, 3)
        order = np.sort(rng.uniform(0, 1, 300))[::-1]
        found = detections(*zip(boxes, order, classes, strict=True))
        metrics.add(str(i), found, *random_image(rng, 14, 3), (400, 400))
    begin = time.process_time()
    metrics.compute()
    assert time.process_time() - begin < 2


def test_add_refuses_what_does_not_fit():
    metrics = DetectionMetrics(["cat"])
    metrics.add("image", detections(), [A], [0], (300, 400))
    with pytest.raises(ValueError, match="added before"):
        metrics.add("image", detections(), [A], [0], (300, 400))
    with pytest.raises(ValueError, match="ground truth has classes 1"):
        metrics.add("other", detections(), [A], [1], (300, 400))
    with pytest.raises(ValueError, match="detections has classes"):
        metrics.add("other", detections((A, 0.5, 3)), [A], [0], (300, 400))
    with pytest.raises(ValueError, match="2 boxes but 1 classes"):
        metrics.add("other", detections(), [A, B], [0], (300, 400))
    with pytest.raises(ValueError, match="must differ"):
        DetectionMetrics(["cat", "cat"])


def test_the_confusion_matrix():
    metrics = DetectionMetrics(("cat", "dog"))
    near_b = [B[0] + 1, B[1], B[2], B[3]]
    metrics.add(
        "a", detections((A, 0.9, 0), (A, 0.8, 1), (near_b, 0.7, 0), (B, 0.1, 1)),
        [A, B, [200, 200, 210, 210]], [0, 1, 1], (300, 300),
    )  # fmt: skip
    # A is a cat and found as one, the second detection of it is nothing; B, a dog, is taken for a
    # cat; a dog is missed; what has too low a score does not count.
    assert metrics.confusion().tolist() == [[1, 1, 0], [0, 0, 1], [0, 1, 0]]
    assert metrics.confusion(conf=0.05).tolist() == [[1, 0, 1], [0, 1, 1], [0, 1, 0]]
    assert DetectionMetrics(("cat",)).confusion().sum() == 0


def test_the_curves_are_those_of_the_numbers():
    metrics = DetectionMetrics(("cat", "dog"))
    metrics.add("a", detections((A, 0.9, 0), (B, 0.4, 0)), [A], [0], (300, 300))
    assert metrics.curves is None
    found, curves = metrics.compute(), metrics.curves
    assert curves.best == found["confidence"]
    assert curves.precision[0, [100, 500, 950]].tolist() == [0.5, 1.0, 0.0]
    assert curves.recall[0, [100, 500, 950]].tolist() == [1.0, 1.0, 0.0]
    assert curves.f1[0, 100] == pytest.approx(2 / 3) and np.isnan(curves.f1[1]).all()


@pytest.mark.parametrize("ids", [None, [70, 10, 40, 20, 30]])
def test_cocos_own_tools_find_the_same_in_what_is_saved(tmp_path, ids):
    """Written, read by pycocotools as any file, and measured: our mAP."""
    rng = np.random.default_rng(0)
    measured = DetectionMetrics(("a", "b", "c"))
    for i in range(5):
        truth = np.sort(rng.uniform(0, 90, (4, 2, 2)), axis=1).reshape(4, 4)
        truth += np.array([0, 0, 5, 5])
        near = np.repeat(truth, 3, axis=0) + rng.normal(0, 3, (12, 4))
        classes = rng.integers(0, 2, 4)
        found = Detections(
            np.float32(near), np.float32(rng.uniform(0.1, 0.9, 12)), np.repeat(classes, 3)
        )
        measured.add(f"{i} {i}.png", found, truth, classes, (100, 100))
    kinds = None if ids is None else [5, 3, None]
    results, data_set = measured.as_coco(ids, kinds)
    for name, content in (("found", results), ("truth", data_set)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    truth = COCO(str(tmp_path / "truth.json"))
    assert sorted(truth.imgs) == sorted(ids or range(1, 6))
    assert truth.imgs[(ids or [1])[0]]["file_name"] == "0.png"
    tool = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), "bbox")
    tool.evaluate()
    tool.accumulate()
    tool.summarize()
    ours = measured.compute()
    assert 0.1 < ours["map50_95"] < 0.9
    assert tool.stats[:3] == pytest.approx(
        [ours["map50_95"], ours["map50"], ours["map75"]], abs=1e-3
    )


def random_set(seed, images=30, classes=6):
    """(found, boxes, classes) of each image: boxes of all sizes, half of them on a grid so that
    overlaps are equal and are thresholds, some without area; equal scores; more detections of one
    class in one image than count; images without objects and without detections; a class without
    objects."""
    rng = np.random.default_rng(seed)
    for i in range(images):
        n = rng.integers(1, 9) * (i % 5 > 0)
        m = 260 if i == 1 else rng.integers(1, 60) * (i % 7 > 0)
        corner, side = rng.uniform(0, 300, (n + m, 2)), np.exp(rng.uniform(1, 5.5, (n + m, 2)))
        boxes = np.concatenate([corner, corner + side], axis=1)
        if i % 2:
            boxes = (boxes / 8).round() * 8
        kinds = rng.integers(0, classes - 1, n)
        labels = rng.integers(0, classes, m)
        if i == 1:
            labels[:] = kinds[:] = 0
        if n:
            to, near = rng.integers(0, n, m), rng.random(m) < 0.6
            noise = rng.normal(0, 1, (m, 4)) * rng.choice([0, 1, 4, 15], (m, 1))
            boxes[n:][near] = (boxes[to] + noise)[near]
            labels[near] = kinds[to][near]
        scores = (near if n else 0) * 0.3 + rng.uniform(0, 0.7, m).round(2)
        yield detections(*zip(boxes[n:], scores, labels, strict=True)), boxes[:n], kinds


def by_tool(coco, evaluation, images, crowds=(), **parameters):
    """The tool's evaluation of what `random_set` gave; `crowds` are the numbers of objects."""
    truth, found, sizes = [], [], []
    for i, (dt, boxes, kinds) in enumerate(images):
        sizes.append({"id": i, "height": 900, "width": 900})
        for annotations, of, labels in (truth, boxes, kinds), (found, dt.boxes, dt.classes):
            xywh = np.concatenate([of[:, :2], of[:, 2:] - of[:, :2]], axis=1).astype(float)
            annotations += [
                {"image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": 0}
                for b, c in zip(xywh.tolist(), labels.tolist(), strict=True)
            ]
        for annotation, value in zip(found[len(found) - len(dt) :], dt.scores, strict=True):
            annotation["score"] = float(value)
    for number in crowds:
        truth[number]["iscrowd"] = 1
    data = []
    for annotations in truth, found:
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number
        data.append(coco())
        categories = [{"id": c, "name": str(c)} for c in range(6)]
        data[-1].dataset = {"images": sizes, "categories": categories, "annotations": annotations}
        data[-1].createIndex()
    tool = evaluation(*data, "bbox")
    for name, value in parameters.items():
        setattr(tool.params, name, value)
    tool.evaluate()
    tool.accumulate()
    return tool


@pytest.mark.parametrize("seed", range(6))
def test_hotcoco_finds_what_pycocotools_finds(seed):
    """The twelve figures and what they are of, with crowds, to the last digit."""
    images = list(random_set(seed))
    crowds = np.random.default_rng(seed).choice(sum(len(kinds) for *_, kinds in images), 9, False)
    tool, oracle = (
        by_tool(coco, evaluation, images, crowds.tolist())
        for coco, evaluation in ((hotcoco.COCO, hotcoco.COCOeval), (COCO, COCOeval))
    )
    for each in tool, oracle:
        each.summarize()
    assert len(oracle.stats) == 12 and oracle.stats.min() > 0.1 and oracle.stats.max() < 0.95
    assert tool.stats.tolist() == oracle.stats.tolist()
    for name in "precision", "recall", "scores":
        np.testing.assert_array_equal(tool.eval[name], oracle.eval[name], name)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_reported_is_the_same_by_pycocotools(monkeypatch, seed):
    """Every number, those of each class and the curves, to the last digit."""
    images = list(random_set(seed))
    metrics = DetectionMetrics([f"class {c}" for c in range(6)])
    for i, image in enumerate(images):
        metrics.add(f"{i:03d}", *image, (900, 900))
    ours, curves = metrics.compute(), metrics.curves
    oracle = by_tool(COCO, COCOeval, images, maxDets=[100], areaRng=[[0, 1e10]], areaRngLbl=["all"])
    results = np.array(oracle.evalImgs, object).reshape(6, len(images))

    def matches(_, c):
        of = [result for result in results[c] if result is not None]
        scores = np.concatenate([result["dtScores"] for result in of])
        correct = np.concatenate([result["dtMatches"][0] > 0 for result in of])
        return scores, correct, sum(len(result["gtIds"]) for result in of)

    monkeypatch.setattr(detection, "_precision", lambda _: oracle.eval["precision"][..., 0, 0])
    monkeypatch.setattr(detection, "_matches", matches)
    theirs = metrics.compute()
    assert 0.1 < theirs["map50_95"] < 0.9 and np.isnan(theirs["ap/class 5"])
    assert list(ours) == list(theirs)
    np.testing.assert_array_equal(list(ours.values()), list(theirs.values()))
    for found, wanted in zip(curves, metrics.curves, strict=True):
        np.testing.assert_array_equal(found, wanted)
