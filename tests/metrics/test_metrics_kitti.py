"""KITTI metrics: hand-made cases with exact answers, and a plain scalar version of the protocol."""

import dataclasses
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxaccum.data.base import DataError
from jaxaccum.metrics import kitti
from jaxaccum.metrics.kitti import Labels, evaluate
from jaxaccum.metrics.kitti_overlap import iou_2d, iou_3d, iou_bev

CAR = (1.5, 1.6, 3.9)
LINE = "Car 0.00 0 1.85 387.63 181.54 423.81 203.12 1.67 1.87 3.69 -16.53 2.39 58.49 1.57"


def row(kind="Car", box=(100, 100, 200, 160), score=None, **other):
    default = {"truncation": 0, "occlusion": 0, "alpha": 0, "yaw": 0}
    place = {"dimensions": CAR, "locations": (box[0] / 10, 1.6, 20)}
    return default | place | other | {"kind": kind, "box": box, "score": score}


def labels(*rows):
    def column(name, *shape, dtype=np.float32):
        return np.array([r[name] for r in rows], dtype).reshape(-1, *shape)

    scored = bool(rows) and rows[0]["score"] is not None
    return Labels(
        kinds=tuple(r["kind"] for r in rows),
        truncation=column("truncation"),
        occlusion=column("occlusion", dtype=np.int32),
        alpha=column("alpha"),
        boxes=column("box", 4),
        dimensions=column("dimensions", 3),
        locations=column("locations", 3),
        yaw=column("yaw"),
        scores=column("score") if scored else None,
    )


def scored(truth, scores=None):
    """The truths as detections."""
    scores = np.linspace(0.9, 0.5, len(truth)) if scores is None else scores
    return dataclasses.replace(truth, scores=np.asarray(scores, np.float32))


def cars(n):
    """n images of one car each."""
    return [labels(row()) for _ in range(n)]


def score_cars(truths, found, **options):
    return evaluate(truths, found, classes=("Car",), **options)


# Files


def test_a_line_is_read_field_by_field():
    text = f"{LINE}\n\nDontCare -1 -1 -10 5 6 7 8 -1 -1 -1 -1000 -1000 -1000 -10\r\n"
    read = kitti.parse(text, "a.txt")
    assert read.kinds == ("Car", "DontCare") and len(read) == 2
    assert read.scores is None
    np.testing.assert_array_equal(read.occlusion, [0, -1])
    np.testing.assert_array_equal(read.truncation, np.float32([0, -1]))
    np.testing.assert_array_equal(read.alpha, np.float32([1.85, -10]))
    np.testing.assert_array_equal(read.boxes[0], np.float32([387.63, 181.54, 423.81, 203.12]))
    np.testing.assert_array_equal(read.dimensions[0], np.float32([1.67, 1.87, 3.69]))
    np.testing.assert_array_equal(read.locations[0], np.float32([-16.53, 2.39, 58.49]))
    np.testing.assert_array_equal(read.yaw, np.float32([1.57, -10]))
    expected = np.float32([1.67, 1.87, 3.69, -16.53, 2.39, 58.49, 1.57])
    np.testing.assert_array_equal(read.boxes3d[0], expected.astype(float))
    assert len(kitti.parse("\n", "a.txt")) == 0


def test_a_submission_has_16_fields_and_claims_no_truncation_or_occlusion():
    fields = kitti.format(scored(kitti.parse(LINE, "a.txt"), [0.123456])).split()
    assert fields[:4] == ["Car", "-1", "-1", "1.8500"]
    assert fields[4:8] == ["387.63", "181.54", "423.81", "203.12"]
    assert fields[8:] == ["1.67", "1.87", "3.69", "-16.53", "2.39", "58.49", "1.5700", "0.1235"]
    assert kitti.format(labels()) == ""


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 5), submission=st.booleans())
def test_writing_then_reading_loses_nothing_but_decimals(seed, n, submission):
    draw = np.random.default_rng(seed)
    made = labels(
        *(
            row(
                str(draw.choice(["Car", "Van", "DontCare"])),
                np.sort(draw.uniform(0, 1200, (2, 2)), axis=0).reshape(-1),
                float(draw.random()) if submission else None,
                truncation=-1 if submission else draw.random(),
                occlusion=-1 if submission else draw.integers(0, 4),
                alpha=draw.uniform(-math.pi, math.pi),
                yaw=draw.uniform(-math.pi, math.pi),
                dimensions=draw.uniform(0, 20, 3),
                locations=draw.uniform(-80, 80, 3),
            )
            for _ in range(n)
        )
    )
    read = kitti.parse(kitti.format(made), "a.txt")
    assert read.kinds == made.kinds
    for field in dataclasses.fields(Labels)[1:]:
        before, after = getattr(made, field.name), getattr(read, field.name)
        if before is None:
            assert after is None
            continue
        decimals = 4 if field.name in ("alpha", "yaw", "scores") else 2
        np.testing.assert_allclose(after, before, rtol=0, atol=0.502 * 10**-decimals)
    assert kitti.format(read) == kitti.format(made)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (LINE[:-5], 1, "14 fields"),
        (LINE + "\n" + LINE + " 0.5 1", 2, "17 fields"),
        (LINE + "\n\n" + LINE + " 0.5", 3, "a score or none"),
        (LINE.replace("1.85", "x"), 1, "'x'"),
        (LINE.replace("1.85", "nan"), 1, "not finite"),
        (LINE.replace(" 0 ", " 4 "), 1, "occlusion is 4"),
        (LINE.replace("423.81", "300"), 1, "left, top, right, bottom"),
    ],
)
def test_faults_of_a_file_are_named(text, line, message):
    with pytest.raises(DataError, match=message) as caught:
        kitti.parse(text, "labels/7.txt")
    assert f"labels/7.txt:{line}" in str(caught.value)
    assert (caught.value.file, caught.value.line) == ("labels/7.txt", line)


def test_labels_of_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"boxes \(1, 3\) for \(1, 4\)"):
        dataclasses.replace(labels(row()), boxes=np.zeros((1, 3), np.float32))
    with pytest.raises(ValueError, match="scores"):
        dataclasses.replace(labels(row()), scores=np.zeros(2, np.float32))


# Overlap


def box(x=0.0, z=20.0, yaw=0.0, dimensions=CAR, y=1.6):
    return [*dimensions, x, y, z, yaw]


def outline(b):
    """Corners on the ground, (x, z), from the definition of the frame."""
    _, width, length, x, _, z, yaw = b
    turn = np.array([[math.cos(yaw), math.sin(yaw)], [-math.sin(yaw), math.cos(yaw)]])
    signs = ((1, 1), (1, -1), (-1, -1), (-1, 1))
    return [(turn @ (i * length / 2, j * width / 2) + (x, z)).tolist() for i, j in signs]


def plain_shared_area(a, b):
    """Polygon clipping, edge by edge (Sutherland, Hodgman 1974)."""
    shape, window = outline(a), outline(b)
    for (x0, z0), (x1, z1) in zip(window, window[1:] + window[:1], strict=True):

        def inside(p, x0=x0, z0=z0, x1=x1, z1=z1):
            return (x1 - x0) * (p[1] - z0) - (z1 - z0) * (p[0] - x0)

        centre = [b[3], b[5]]
        sign = 1 if inside(centre) > 0 else -1
        kept = []
        for p, q in zip(shape, shape[1:] + shape[:1], strict=True):
            dp, dq = sign * inside(p), sign * inside(q)
            if dp >= 0:
                kept.append(p)
            if (dp > 0 > dq) or (dp < 0 < dq):
                t = dp / (dp - dq)
                kept.append([p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])])
        shape = kept
    pairs = zip(shape, shape[1:] + shape[:1], strict=True)
    return abs(sum(p[0] * q[1] - q[0] * p[1] for p, q in pairs)) / 2


def plain_iou(a, b, metric):
    if metric == 0:
        sides = [max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
        area = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
        return sides[0] * sides[1] / (area - sides[0] * sides[1])
    both = plain_shared_area(a, b)
    if metric == 1:
        return both / (a[1] * a[2] + b[1] * b[2] - both)
    both *= max(0.0, min(a[4], b[4]) - max(a[4] - a[0], b[4] - b[0]))
    return both / (math.prod(a[:3]) + math.prod(b[:3]) - both)


def random_boxes(draw, n, spread=4.0):
    low, high = (1, 0.4, 0.5), (2, 2.5, 6)
    columns = (draw.uniform(low, high, (n, 3)), draw.uniform(-spread, spread, (n, 3)))
    return np.concatenate([*columns, draw.uniform(-7, 7, (n, 1))], axis=1)


def test_overlaps_known_exactly():
    crossed = 1.6**2 / (2 * 1.6 * 3.9 - 1.6**2)  # the shared part is a square of the width
    assert crossed == pytest.approx(0.258, abs=1e-3)
    cases = [
        (box(yaw=math.pi / 4), box(yaw=3 * math.pi / 4), crossed),
        (box(yaw=0), box(yaw=math.pi / 2), crossed),
        (box(), box(x=3.9 / 2), 1 / 3),
        (box(yaw=math.pi / 2), box(z=20 + 3.9 / 2, yaw=-math.pi / 2), 1 / 3),
        (box(), box(z=20.8), 1 / 3),
        (box(), box(x=1.95, z=20.8), 1 / 7),
        (box(), box(x=3.9), 0),
        (box(), box(x=30), 0),
        (box(), box(dimensions=(1.5, 0.8, 1.3)), 1 / 6),
        # A unit square and itself turned by 45 degrees share a regular octagon.
        (
            box(dimensions=(1, 1, 1)),
            box(dimensions=(1, 1, 1), yaw=math.pi / 4),
            (2 * math.sqrt(2) - 2) / (2 - (2 * math.sqrt(2) - 2)),
        ),
        # A corner of a diamond reaches half of its half diagonal into the square.
        (
            box(dimensions=(1, 2, 2)),
            box(x=1 + 0.5, dimensions=(1, math.sqrt(2), math.sqrt(2)), yaw=math.pi / 4),
            0.25 / (4 + 2 - 0.25),
        ),
    ]
    for a, b, expected in cases:
        assert iou_bev([a], [b])[0, 0] == pytest.approx(expected, abs=1e-12)
        assert iou_3d([a], [b])[0, 0] == pytest.approx(expected, abs=1e-12)


def test_a_box_stands_on_its_location():
    assert iou_3d([box()], [box(y=1.6 + 0.75)])[0, 0] == pytest.approx(1 / 3)
    half = box(dimensions=(0.75, 1.6, 3.9))
    assert iou_3d([box()], [half])[0, 0] == pytest.approx(1 / 2)
    assert iou_3d([box()], [box(y=1.6 + 1.5)])[0, 0] == 0
    assert iou_bev([box()], [box(y=99)])[0, 0] == 1


def test_image_overlap():
    a = [[0, 0, 10, 10], [0, 0, 0, 10]]
    b = [[5, 0, 15, 10], [0, 0, 10, 10], [10, 0, 20, 10], [8, 8, 8, 8]]
    np.testing.assert_allclose(iou_2d(a, b), [[1 / 3, 1, 0, 0], [0, 0, 0, 0]])


def test_boxes_without_extent_overlap_nothing_and_shapes_are_checked():
    unknown = [-1, -1, -1, -1000, -1000, -1000, -10]
    assert iou_bev([unknown], [unknown])[0, 0] == 0
    assert iou_3d([box(dimensions=(0, 1, 1))], [box()])[0, 0] == 0
    assert iou_3d(np.zeros((0, 7)), [box()]).shape == (0, 1)
    with pytest.raises(ValueError, match=r"\(n, 7\), got \(1, 4\)"):
        iou_bev([[0, 0, 1, 1]], [box()])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_overlap_equals_plain_clipping_and_is_symmetric(seed):
    draw = np.random.default_rng(seed)
    a, b = random_boxes(draw, 6), random_boxes(draw, 5)
    b[0] = a[0]
    b[1] = a[1] + [0, 0, 0, 0, 0, 0, math.pi]  # edges coincide
    b[2, 6] = a[2, 6] + math.pi / 2  # edges are parallel
    for metric, function in ((1, iou_bev), (2, iou_3d)):
        result = function(a, b)
        expected = [[plain_iou(p, q, metric) for q in b.tolist()] for p in a.tolist()]
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-11)
        np.testing.assert_allclose(function(b, a), result.T, rtol=0, atol=1e-12)
        assert result.max() <= 1


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    turn=st.floats(-4, 4),
    x=st.floats(-50, 50),
    z=st.floats(-50, 50),
)
def test_overlap_does_not_change_under_a_motion_on_the_ground(seed, turn, x, z):
    draw = np.random.default_rng(seed)
    a, b = random_boxes(draw, 6), random_boxes(draw, 6)

    def moved(boxes):
        boxes = boxes.copy()
        cos, sin = math.cos(turn), math.sin(turn)
        boxes[:, [3, 5]] = boxes[:, [3, 5]] @ np.array([[cos, -sin], [sin, cos]]) + (x, z)
        boxes[:, 6] += turn
        return boxes

    for function in (iou_bev, iou_3d):
        np.testing.assert_allclose(function(moved(a), moved(b)), function(a, b), atol=1e-11)
        np.testing.assert_allclose(np.diag(function(moved(a), moved(a))), 1, atol=1e-12)


def test_many_pairs_are_fast():
    draw = np.random.default_rng(0)
    a, b = random_boxes(draw, 1000, 30), random_boxes(draw, 50, 30)
    start = time.perf_counter()
    iou_3d(a, b)
    assert time.perf_counter() - start < 1  # 0.01 s on a quiet machine


# Average precision


@pytest.mark.parametrize("n", [1, 7, 40, 41, 53])
def test_perfect_detections_score_100_whatever_their_number(n):
    truths = cars(n)
    found = [scored(t, [0.3 + 0.01 * i]) for i, t in enumerate(truths)]
    result = score_cars(truths, found)
    for level in kitti.LEVELS:
        for score in kitti.SCORES:
            assert result[f"{score}/Car/{level}"] == pytest.approx(100, abs=1e-9), (score, level)
        assert result[f"truths/Car/{level}"] == n


def test_a_curve_computed_by_hand():
    """Right, wrong, right, right; one of four missed: precisions 1, 2/3, 3/4 at 1/4, 1/2, 3/4."""
    truths = cars(4)
    elsewhere = row(box=(500, 100, 600, 160), score=0.8)
    found = [scored(t, [s]) for t, s in zip(truths[:3], (0.9, 0.7, 0.6), strict=True)]
    found.append(labels(elsewhere))
    result = score_cars(truths, found)
    for metric in ("2d", "bev", "3d"):
        value = result[f"ap40_{metric}/Car/moderate"]
        assert value == pytest.approx(100 * (10 * 1 + 20 * 0.75) / 40)
        value = result[f"ap11_{metric}/Car/moderate"]
        assert value == pytest.approx(100 * (3 * 1 + 5 * 0.75) / 11)


def test_one_wrong_detection_above_eighty_right_ones():
    truths = cars(80)
    found = [scored(t, [0.8 - 0.005 * i]) for i, t in enumerate(truths)]
    found[0] = labels(row(score=0.8), row(box=(500, 100, 600, 160), score=0.9))
    result = score_cars(truths, found)
    assert result["ap40_3d/Car/easy"] == pytest.approx(100 * 80 / 81)


@pytest.mark.parametrize(("n", "expected"), [(5, 80), (50, 97.5)])
def test_one_missed_of_n(n, expected):
    """49 of 50 reach recall 0.98: the recalls up to 39/40 are taken. 4 of 5 reach 32/40."""
    truths = cars(n)
    found = [scored(t, [0.9 - 0.01 * i]) for i, t in enumerate(truths)]
    found[-1] = labels()
    assert score_cars(truths, found)["ap40_2d/Car/easy"] == pytest.approx(expected)


def test_a_class_without_truths_has_no_score_and_one_never_found_has_zero():
    truths = [labels(row(), row("Pedestrian", (300, 100, 330, 190)))]
    result = evaluate(truths, [labels(row(score=0.9))])
    for score in kitti.SCORES:
        assert result[f"{score}/Car/hard"] == pytest.approx(100)
        assert result[f"{score}/Pedestrian/hard"] == 0
        assert math.isnan(result[f"{score}/Cyclist/hard"])
        assert result[f"{score}/mean/hard"] == pytest.approx(50)
    nothing = evaluate([labels()], [labels()])
    assert math.isnan(nothing["ap40_3d/mean/easy"]) and nothing["truths/Car/easy"] == 0


@pytest.mark.parametrize(("own", "neutral"), [("Car", "Van"), ("Pedestrian", "Person_sitting")])
def test_neighbouring_types_are_neither_right_nor_wrong(own, neutral):
    both = row(own), row(neutral, (500, 100, 600, 160), score=0.95)
    found = [labels(row(own, score=0.9), both[1] | {"kind": own})]
    result = evaluate([labels(*both)], found, classes=(own,))
    assert result[f"ap40_2d/{own}/easy"] == pytest.approx(100)
    assert result[f"truths/{own}/easy"] == 1
    stranger = both[1] | {"kind": "Truck"}
    result = evaluate([labels(both[0], stranger)], found, classes=(own,))
    assert result[f"ap40_2d/{own}/easy"] == pytest.approx(50)


@pytest.mark.parametrize(
    ("other", "easy", "moderate", "hard"),
    [
        ({"box": (100, 100, 200, 140)}, 0, 1, 1),  # exactly 40 pixels are too low
        ({"box": (100, 100.3, 200, 140.31)}, 1, 1, 1),
        ({"box": (100, 100, 200, 125)}, 0, 0, 0),
        ({"box": (100, 100, 200, 125.01)}, 0, 1, 1),
        ({"truncation": 0.15}, 1, 1, 1),
        ({"truncation": 0.16}, 0, 1, 1),
        ({"truncation": 0.3}, 0, 1, 1),
        ({"truncation": 0.31}, 0, 0, 1),
        ({"truncation": 0.5}, 0, 0, 1),
        ({"truncation": 0.51}, 0, 0, 0),
        ({"occlusion": 1}, 0, 1, 1),
        ({"occlusion": 2}, 0, 0, 1),
        ({"occlusion": 3}, 0, 0, 0),
    ],
)
def test_levels(other, easy, moderate, hard):
    truth = labels(row(**other))
    result = score_cars([truth], [scored(truth)])
    assert [result[f"truths/Car/{level}"] for level in kitti.LEVELS] == [easy, moderate, hard]
    # Found or not, a truth that does not count changes nothing.
    plain = row(box=(600, 100, 700, 160))
    both = labels(plain, row(**other))
    for found in (scored(both), labels(plain | {"score": 0.9})):
        if not easy:
            value = score_cars([both], [found])["ap40_2d/Car/easy"]
            assert value == pytest.approx(100)


def test_low_detections_are_no_mistakes():
    truth = [labels(row())]
    for height, easy, moderate in ((39, 100, 50), (24, 100, 100), (40, 50, 50)):
        low = row(box=(500, 100, 600, 100 + height), score=0.95)
        result = score_cars(truth, [labels(row(score=0.9), low)])
        assert result["ap40_2d/Car/easy"] == pytest.approx(easy)
        assert result["ap40_2d/Car/moderate"] == pytest.approx(moderate)


def test_a_low_detection_of_any_class_takes_a_truth_of_a_better_score_away():
    truth = [labels(row(box=(100, 100, 140, 126)))]
    low = row("Pedestrian", (100, 101, 140, 125), 0.9)
    found = row(box=(100, 100, 140, 126), score=0.5)
    assert score_cars(truth, [labels(found)])["ap40_2d/Car/hard"] == pytest.approx(100)
    assert score_cars(truth, [labels(found, low)])["ap40_2d/Car/hard"] == 0
    # With the worse score it takes nothing, though it is at hand: the truth prefers valid ones.
    weak = low | {"score": 0.4}
    assert score_cars(truth, [labels(weak, found)])["ap40_2d/Car/hard"] == pytest.approx(100)


def test_dont_care_areas_excuse_in_the_image_only():
    area = row(
        "DontCare",
        (480, 90, 620, 170),
        dimensions=(-1, -1, -1),
        locations=(-1000, -1000, -1000),
        yaw=-10,
    )
    found = [labels(row(score=0.5), row(box=(500, 100, 600, 160), score=0.9))]
    result = score_cars([labels(row(), area)], found)
    assert result["ap40_2d/Car/easy"] == pytest.approx(100)
    assert result["aos40/Car/easy"] == pytest.approx(100)
    assert result["ap40_bev/Car/easy"] == pytest.approx(50)
    assert result["ap40_3d/Car/easy"] == pytest.approx(50)
    # Of the detection 0.7 must lie inside, more than of their union.
    for right, expected in ((571, 100), (569, 50)):
        part = area | {"box": (300, 90, right, 170)}
        result = score_cars([labels(row(), part)], found)
        assert result["ap40_2d/Car/easy"] == pytest.approx(expected)


def test_dont_care_areas_excuse_a_second_detection_of_a_truth():
    twice = [labels(row(score=0.5), row(score=0.9, box=(100, 100, 190, 160)))]
    assert score_cars([labels(row())], twice)["ap40_2d/Car/easy"] == pytest.approx(100)
    both = labels(row(), row(box=(500, 100, 600, 160)))
    twice = [labels(row(score=0.8), row(score=0.9), row(score=0.5, box=both.boxes[1]))]
    # At 0.5 the second detection of the first truth is wrong, but for the area.
    expected = 100 * (20 * 1 + 20 * 2 / 3) / 40
    assert score_cars([both], twice)["ap40_2d/Car/easy"] == pytest.approx(expected)
    area = row("DontCare", (90, 90, 210, 170), dimensions=(-1, -1, -1))
    excused = labels(row(), row(box=(500, 100, 600, 160)), area)
    assert score_cars([excused], twice)["ap40_2d/Car/easy"] == pytest.approx(100)


def test_a_match_must_exceed_the_threshold():
    truth = [labels(row(box=(0, 0, 100, 100)))]
    at, above = row(box=(0, 0, 100, 70), score=0.9), row(box=(0, 0, 100, 70.01), score=0.9)
    assert score_cars(truth, [labels(at)])["ap40_2d/Car/easy"] == 0
    assert score_cars(truth, [labels(above)])["ap40_2d/Car/easy"] == pytest.approx(100)


def test_loose_thresholds_are_loose_on_the_ground_only():
    truth = [labels(row())]
    shifted = [labels(row(score=0.9, locations=(11, 1.6, 20)))]  # IoU 2.9 / 4.9
    strict, loose = score_cars(truth, shifted), score_cars(truth, shifted, thresholds=kitti.LOOSE)
    for metric in ("bev", "3d"):
        assert strict[f"ap40_{metric}/Car/easy"] == 0
        assert loose[f"ap40_{metric}/Car/easy"] == pytest.approx(100)
    low = [labels(row(score=0.9, box=(100, 100, 200, 140)))]
    assert score_cars(truth, low, thresholds=kitti.LOOSE)["ap40_2d/Car/easy"] == 0


def test_equal_scores():
    twice = labels(row(score=0.9), row(score=0.9))
    assert score_cars([labels(row())], [twice])["ap40_2d/Car/easy"] == pytest.approx(50)
    truths = [labels(row(), row(box=(500, 100, 600, 160)))]
    same = scored(truths[0], [0.9, 0.9])
    assert score_cars(truths, [same])["ap40_2d/Car/easy"] == pytest.approx(100)


def test_the_best_overlap_is_right_once_lower_scores_count():
    """At 0.9 the truth has only the flipped detection; at 0.5 a better one takes its place."""
    loose = row(box=(100, 100, 180, 160), score=0.9, alpha=math.pi)
    exact = row(score=0.8)
    other = row(box=(500, 100, 600, 160))
    found = [labels(loose, exact, other | {"score": 0.5})]
    result = score_cars([labels(row(), other)], found)
    assert result["ap40_2d/Car/easy"] == pytest.approx(100 * (20 * 1 + 20 * 2 / 3) / 40)
    assert result["aos40/Car/easy"] == pytest.approx(100 * 2 / 3)


@pytest.mark.parametrize(("turn", "expected"), [(0, 100), (math.pi / 2, 50), (math.pi, 0)])
def test_orientation(turn, expected):
    truths = [labels(row(alpha=1.2, yaw=0.3)) for _ in range(3)]
    found = [scored(dataclasses.replace(t, alpha=t.alpha + np.float32(turn))) for t in truths]
    result = score_cars(truths, found)
    assert result["aos40/Car/easy"] == pytest.approx(expected, abs=1e-5)
    assert result["aos11/Car/easy"] == pytest.approx(expected, abs=1e-5)
    assert result["ap40_3d/Car/easy"] == pytest.approx(100)
    found[0] = dataclasses.replace(found[0], alpha=np.float32([kitti.NO_ALPHA]))
    result = score_cars(truths, found)
    assert math.isnan(result["aos40/Car/easy"]) and math.isnan(result["aos40/mean/easy"])


def test_misuse_is_named():
    truth = labels(row())
    with pytest.raises(ValueError, match="2 images but detections of 1"):
        evaluate([truth, truth], [scored(truth)])
    with pytest.raises(ValueError, match="image 0 need a finite score"):
        evaluate([truth], [truth])
    with pytest.raises(ValueError, match="image 0 need a finite score"):
        kitti.errors([truth], [scored(truth, [np.nan])])
    with pytest.raises(ValueError, match=r"no overlap thresholds for \['Tram'\]"):
        evaluate([truth], [scored(truth)], classes=("Tram",))


# The protocol once more, one truth, detection and threshold at a time


def plain_average(truths, found, kind, level, metric, least):
    """(AP over 40 recalls, AOS over 40 recalls) of one class, level and metric."""
    min_height, max_occlusion, max_truncation = {
        "easy": (40, 0, 0.15), "moderate": (25, 1, 0.3), "hard": (25, 2, 0.5)
    }[level]  # fmt: skip
    neutral = {"Car": "Van", "Pedestrian": "Person_sitting"}.get(kind)

    def flag_truth(t):
        if t["kind"] not in (kind, neutral):
            return -1
        hard = t["box"][3] - t["box"][1] <= min_height
        hard = hard or t["occlusion"] > max_occlusion or t["truncation"] > max_truncation
        return 1 if hard or t["kind"] == neutral else 0

    def flag_found(d):
        if d["box"][3] - d["box"][1] < min_height:
            return 1
        return 0 if d["kind"] == kind else -1

    def solid(r):
        return r["box"] if metric == 0 else [*r["dimensions"], *r["locations"], r["yaw"]]

    def run(threshold):
        """Scores of the right, number of the wrong, and similarities, over all images."""
        right, wrong, similar = [], 0, 0.0
        for ts, ds in zip(truths, found, strict=True):
            used = [threshold is not None and d["score"] < threshold for d in ds]
            gone = list(used)
            for t in ts:
                if flag_truth(t) == -1 or t["kind"] == "DontCare":
                    continue
                options = []
                for j, d in enumerate(ds):
                    if gone[j] or flag_found(d) == -1:
                        continue
                    overlap = plain_iou(solid(t), solid(d), metric)
                    if overlap > least:
                        options.append((j, overlap))
                if not options:
                    continue
                if threshold is None:
                    best = max(options, key=lambda o: (ds[o[0]]["score"], -o[0]))[0]
                else:
                    valid = [o for o in options if flag_found(ds[o[0]]) == 0]
                    best = max(valid, key=lambda o: (o[1], -o[0]))[0] if valid else options[0][0]
                gone[best] = True
                if flag_truth(t) == 0 and flag_found(ds[best]) == 0:
                    right.append(ds[best]["score"])
                    similar += (1 + math.cos(t["alpha"] - ds[best]["alpha"])) / 2
            for j, d in enumerate(ds):
                if gone[j] or flag_found(d) != 0:
                    continue
                excused = False
                for area in (t["box"] for t in ts if t["kind"] == "DontCare" and metric == 0):
                    b = d["box"]
                    sides = [
                        max(0, min(b[i + 2], area[i + 2]) - max(b[i], area[i])) for i in (0, 1)
                    ]
                    part = sides[0] * sides[1] / ((b[2] - b[0]) * (b[3] - b[1]))
                    excused = excused or part > least
                wrong += not excused
        return right, wrong, similar

    n = sum(flag_truth(t) == 0 for ts in truths for t in ts)
    if not n:
        return math.nan, math.nan
    scores = sorted(run(None)[0], reverse=True)
    thresholds, recall = [], 0.0
    if n > 40:
        for i, score in enumerate(scores):
            below, above = (i + 1) / n, (i + 2) / n
            if i < len(scores) - 1 and above - recall < recall - below:
                continue
            thresholds.append(score)
            recall += 1 / 40
    else:
        for k in range(41):
            reached = [s for i, s in enumerate(scores, start=1) if 40 * i >= k * n]
            thresholds += reached[:1]
    values = []
    for threshold in thresholds:
        right, wrong, similar = run(threshold)
        total = max(len(right) + wrong, 1)
        values.append((len(right) / total, similar / total))
    values += [(0.0, 0.0)] * (41 - len(values))
    return tuple(
        100 * sum(max(v[c] for v in values[k:]) for k in range(1, 41)) / 40 for c in (0, 1)
    )


def random_scene(draw, images):
    """Truths and noisy detections of them, with every rule of the protocol in play."""
    truths, found = [], []
    for _ in range(images):
        ts, ds = [], []
        for slot in range(int(draw.integers(0, 4))):
            left, height = 60.0 + 300 * slot, float(draw.choice([24, 26, 38, 45, 80]))
            kind = str(draw.choice(["Car", "Car", "Car", "Van", "Pedestrian", "Person_sitting"]))
            t = row(
                kind,
                (left, 100.0, left + 100, 100.0 + height),
                alpha=float(draw.uniform(-3, 3)),
                yaw=float(draw.uniform(-3, 3)),
                occlusion=int(draw.choice([0, 0, 0, 1, 2, 3])),
                truncation=float(draw.choice([0, 0, 0.2, 0.4, 0.6])),
                locations=(left / 10, 1.6, float(draw.uniform(5, 50))),
            )
            area = {"dimensions": (-1, -1, -1), "locations": (-1000, -1000, -1000), "yaw": -10}
            dont_care = draw.random() < 0.15
            ts.append(t | {"kind": "DontCare"} | area if dont_care else t)
            for _ in range(int(draw.integers(0, 4))):
                jitter = draw.uniform(-1, 1, 4) * draw.choice([0, 4, 12], 4)
                d = t | {
                    "kind": kind if draw.random() < 0.8 else str(draw.choice(["Car", "Truck"])),
                    "box": tuple((np.array(t["box"]) + jitter).tolist()),
                    "locations": tuple(
                        (np.array(t["locations"]) + draw.normal(0, 0.2, 3)).tolist()
                    ),
                    "yaw": t["yaw"] + float(draw.normal(0, 0.1)),
                    "alpha": t["alpha"] + float(draw.normal(0, 0.5)),
                    "score": float(draw.integers(1, 30)) / 32,  # exact, with ties
                }
                ds.append(d)
        truths.append(ts)
        found.append(ds)
    return truths, found


def check_against_plain(seed, images):
    truths, found = random_scene(np.random.default_rng(seed), images)
    # What float32 holds is what both compute with.
    for r in (r for rows in (*truths, *found) for r in rows):
        for name in ("box", "dimensions", "locations"):
            r[name] = tuple(np.float32(r[name]).astype(float).tolist())
        for name in ("yaw", "alpha"):
            r[name] = float(np.float32(r[name]))
    ours = evaluate(
        [labels(*rows) for rows in truths],
        [labels(*rows) for rows in found],
        classes=("Car", "Pedestrian"),
        thresholds=kitti.LOOSE,
    )
    count = 0
    for kind in ("Car", "Pedestrian"):
        for level in kitti.LEVELS:
            for metric, name in enumerate(kitti.METRICS):
                least = kitti.LOOSE[kind][metric]
                expected, aos = plain_average(truths, found, kind, level, metric, least)
                np.testing.assert_allclose(ours[f"ap40_{name}/{kind}/{level}"], expected, 1e-9)
                if metric == 0:
                    np.testing.assert_allclose(ours[f"aos40/{kind}/{level}"], aos, 1e-9)
                count += expected > 0
    return ours, count


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_plain_protocol_on_small_sets(seed):
    assert check_against_plain(seed, 12)[1] > 4


@pytest.mark.slow
def test_equals_the_plain_protocol_above_40_truths():
    ours, _ = check_against_plain(11, 250)
    assert ours["truths/Car/easy"] < 40
    assert ours["truths/Car/moderate"] > 40 and ours["truths/Car/hard"] > 80


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_order_of_images_and_rows_does_not_matter(seed):
    draw = np.random.default_rng(seed)
    truths, found = random_scene(draw, 8)
    for i, rows in enumerate(found):  # ties within an image are settled by order
        for j, r in enumerate(rows):
            r["score"] += (8 * i + j) / 1000
    images = draw.permutation(8)

    def shuffled(rows):
        return labels(*(rows[i] for i in draw.permutation(len(rows))))

    before = evaluate([labels(*r) for r in truths], [labels(*r) for r in found])
    after = evaluate([shuffled(truths[i]) for i in images], [shuffled(found[i]) for i in images])
    assert before.keys() == after.keys()
    np.testing.assert_allclose(list(after.values()), list(before.values()), 1e-12)


def test_real_truths_against_themselves(shared):
    files = sorted((shared / "data/detect3d/kitti/training/label_2").glob("*.txt"))
    assert files
    truths = [kitti.parse(file.read_text(), str(file)) for file in files]
    result = evaluate(truths, [scored(t) for t in truths])
    seen = 0
    for kind in kitti.CLASSES:
        for level in kitti.LEVELS:
            if result[f"truths/{kind}/{level}"]:
                seen += 1
                for score in kitti.SCORES:
                    assert result[f"{score}/{kind}/{level}"] == pytest.approx(100)
    assert seen == 9
    again = [kitti.parse(kitti.format(t), "copy") for t in truths]
    for a, b in zip(truths, again, strict=True):
        assert a.kinds == b.kinds
        np.testing.assert_array_equal(a.boxes3d, b.boxes3d)
        np.testing.assert_array_equal(a.boxes, b.boxes)
        np.testing.assert_array_equal(a.occlusion, b.occlusion)
        np.testing.assert_array_equal(a.truncation, b.truncation)
        np.testing.assert_array_equal(a.alpha, b.alpha)


# The table and the errors


def test_the_table_shows_scores_and_gaps():
    result = evaluate([labels(row())], [labels(row(score=0.9, alpha=math.pi / 2))])
    lines = kitti.summary(result).splitlines()
    assert lines[0].split()[-3:] == ["easy", "moderate", "hard"]
    assert lines[1].split() == ["Car", "2D", "0.70", "100.00", "100.00", "100.00"]
    assert lines[4].split()[-3:] == ["50.00"] * 3
    assert lines[5].split() == ["Pedestrian", "2D", "0.50", "-", "-", "-"]
    assert len(lines) == 1 + 4 * 4 and len({len(line) for line in lines}) == 1


def test_errors_of_known_differences():
    truths = [labels(row(yaw=3.1), row(box=(500, 100, 600, 160), yaw=0.5), row("Van"))]
    close = row(
        score=0.9,
        yaw=-3.1,
        dimensions=(1.7, 1.5, 4.2),
        locations=(9.5, 1.9, 22),
        box=(100, 100, 200, 150),
    )
    flipped = row(box=(500, 100, 600, 160), score=0.6, yaw=0.5 - math.pi)
    result = kitti.errors(truths, [labels(close, flipped)])
    expected = {
        "depth": 2 / 2,
        "lateral": 0.5 / 2,
        "vertical": 0.3 / 2,
        "height": 0.2 / 2,
        "width": 0.1 / 2,
        "length": 0.3 / 2,
        "yaw": (2 * math.pi - 6.2 + math.pi) / 2,
        "yaw_mod_pi": (2 * math.pi - 6.2) / 2,
        "matched": 2,
        "truths": 2,
    }
    for name, value in expected.items():
        assert result[f"{name}/Car"] == pytest.approx(value, abs=1e-5), name
        assert result[f"{name}/all"] == pytest.approx(value, abs=1e-5), name
    assert math.isnan(result["depth/Cyclist"]) and result["matched/Cyclist"] == 0
    only = kitti.errors(truths, [labels(close, flipped)], score=0.7)
    assert only["matched/Car"] == 1 and only["depth/Car"] == pytest.approx(2, abs=1e-5)
    assert only["truths/Car"] == 2


def test_errors_take_the_better_score_first_and_each_truth_once():
    truths = [labels(row(locations=(0, 1.6, 20)))]
    better = row(score=0.9, locations=(0, 1.6, 23), box=(100, 100, 190, 160))
    worse = row(score=0.5, locations=(0, 1.6, 20))
    half = row(score=0.99, box=(100, 100, 150, 160), locations=(0, 1.6, 90))  # IoU 0.5: no match
    result = kitti.errors(truths, [labels(worse, half, better)])
    assert result["matched/Car"] == 1
    assert result["depth/Car"] == pytest.approx(3)
    nothing = kitti.errors([labels()], [labels()])
    assert nothing["matched/all"] == 0 and math.isnan(nothing["yaw/all"])
