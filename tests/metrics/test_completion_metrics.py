"""Completion metrics: against the formulas written out in numpy, and at the edges."""

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jaxaccum.losses.chamfer import chamfer_l1, chamfer_l2
from jaxaccum.metrics import completion
from jaxaccum.metrics.completion import (
    CompletionMetrics,
    ScanMetrics,
    consistency,
    fidelity,
    measure,
    mmd,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import completion_baselines as baselines

NAMES = ("chair", "lamp", "table")


def cloud(seed, points=200, spread=1.0):
    return np.random.default_rng(seed).uniform(-spread, spread, (points, 3)).astype(np.float32)


def squared(a, b):
    """Squared distance of each point of a to the nearest of b, by brute force in float64."""
    difference = a.astype(np.float64)[:, None] - b.astype(np.float64)[None]
    return (difference**2).sum(-1).min(1)


def by_hand(prediction, target):
    """The scores without the rule about zeros."""
    p, t = squared(prediction, target), squared(target, prediction)
    precision, recall = (np.sqrt(p) < 0.01).mean(), (np.sqrt(t) < 0.01).mean()
    total = precision + recall
    return {
        "cd_l1": 1000 * (np.sqrt(p).mean() + np.sqrt(t).mean()) / 2,
        "cd_l2": 1000 * (p.mean() + t.mean()),
        "f_score": 2 * precision * recall / total if total else 0.0,
    }


@pytest.mark.parametrize("spread", [1.0, 0.05, 0.03])
def test_scores_are_the_formulas(spread):
    prediction, target = cloud(0, 300, spread), cloud(1, 250, spread)
    expected = by_hand(prediction, target)
    assert measure(prediction, target) == pytest.approx(expected, rel=1e-12)
    assert (0 < expected["f_score"] < 1) == (spread < 1)
    swapped = measure(target, prediction)
    assert swapped == pytest.approx(expected, rel=1e-12)


def test_the_distances_are_those_of_the_loss():
    prediction, target = cloud(60, 500), cloud(61, 400)
    expected = {
        "cd_l1": 1000 * float(chamfer_l1(prediction[None], target[None])[0]),
        "cd_l2": 1000 * float(chamfer_l2(prediction[None], target[None])[0]),
    }
    scores = measure(prediction, target)
    assert {key: scores[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_one_point_each():
    assert measure([[0.0, 0.3, 0.4]], [[0.0, 0.0, 0.0]], ignore_zeros=False) == pytest.approx(
        {"cd_l1": 500.0, "cd_l2": 2 * 250.0, "f_score": 0.0}
    )


def test_the_f_score_counts_strictly_below_one_percent():
    step = 2.0**-7  # exact in binary, and below 0.01
    target = np.array([[1.0, 0, 0], [1, 1, 0], [1, 2, 0], [1, 3, 0]])
    near = target + np.array([step, 0, 0])
    assert measure(near, target)["f_score"] == 1
    near[:3, 0] = 1 + 0.5
    # precision 1/4; recall 1/4: harmonic mean 1/4
    assert measure(near, target)["f_score"] == pytest.approx(0.25)
    two = np.concatenate([near[3:], target[:1] + 0.5])  # precision 1/2, recall 1/4
    assert measure(two, target)["f_score"] == pytest.approx(1 / 3)
    origin, edge = np.zeros((1, 3)), np.array([[0.01, 0.0, 0.0]])
    assert measure(edge, origin, ignore_zeros=False)["f_score"] == 0
    below = np.array([[np.nextafter(0.01, 0), 0.0, 0.0]])
    assert measure(below, origin, ignore_zeros=False)["f_score"] == 1


def test_points_that_sum_to_zero_are_left_out_of_the_distances_only():
    prediction, target = cloud(2), cloud(3)
    padding = np.zeros((50, 3), np.float32)
    on_the_plane = np.array([[0.5, -0.25, -0.25]], np.float32)
    padded = np.concatenate([prediction, padding, on_the_plane])
    for a, b, clean in (
        (padded, target, by_hand(prediction, target)),
        (prediction, np.concatenate([target, padding]), by_hand(prediction, target)),
    ):
        scores = measure(a, b)
        assert scores["cd_l1"] == pytest.approx(clean["cd_l1"], rel=1e-12)
        assert scores["cd_l2"] == pytest.approx(clean["cd_l2"], rel=1e-12)
        assert scores["f_score"] == pytest.approx(by_hand(a, b)["f_score"], rel=1e-12)
        assert measure(a, b, ignore_zeros=False) == pytest.approx(by_hand(a, b), rel=1e-12)
    same = np.concatenate([target, padding])
    assert measure(same, target)["f_score"] < 1  # the zeros are predictions like any other


def test_the_sum_is_taken_in_the_precision_of_the_cloud():
    point = np.array([[0.1, 0.2, -(np.float32(0.1) + np.float32(0.2))]], np.float32)
    assert point.sum() == 0 != point.astype(np.float64).sum()
    prediction, target = cloud(4), cloud(5)
    assert measure(np.concatenate([prediction, point]), target)["cd_l1"] == pytest.approx(
        by_hand(prediction, target)["cd_l1"], rel=1e-12
    )


def test_a_diverged_prediction_scores_nan():
    target, broken = cloud(6), cloud(7)
    for value in (np.nan, np.inf):
        broken[5, 1] = value
        assert all(math.isnan(v) for v in measure(broken, target).values())
    assert all(math.isnan(v) for v in measure(np.zeros((4, 3)), target).values())
    metrics = CompletionMetrics(NAMES)
    metrics.add_clouds([0, 1], ["good", "broken"], [target, broken], [target, target])
    result = metrics.compute()
    assert result["cd_l1/chair"] == 0
    assert math.isnan(result["cd_l1/lamp"])
    assert math.isnan(result["cd_l1"])


def test_what_cannot_be_scored_is_refused():
    good = cloud(8)
    with pytest.raises(ValueError, match=r"prediction: expected points of shape \(n, 3\), got"):
        measure(np.zeros((1, 4, 3)), good)
    with pytest.raises(ValueError, match=r"target: expected .* got \(0, 3\)"):
        measure(good, np.zeros((0, 3)))
    with pytest.raises(ValueError, match="target: 1 of 2 points are not finite"):
        measure(good, [[0, 0, np.nan], [1, 1, 1]])
    with pytest.raises(ValueError, match="each of its 3 points"):
        measure(good, np.zeros((3, 3)))


def filled(order):
    metrics = CompletionMetrics(NAMES)
    for i in order:
        metrics.add(SAMPLES[i][0], f"sample {i}", measure(*SAMPLES[i][1:]))
    return metrics


SAMPLES = [
    (c, cloud(20 + i, 64, 0.05), cloud(40 + i, 64, 0.05)) for i, c in enumerate([0, 0, 0, 2])
]


def test_the_overall_score_is_the_mean_of_the_categories():
    scores = [by_hand(*sample[1:]) for sample in SAMPLES]
    result = filled(range(4)).compute()
    for key in completion.SCORES:
        values = [s[key] for s in scores]
        assert result[f"{key}/chair"] == pytest.approx(np.mean(values[:3]), rel=1e-12)
        assert result[f"{key}/table"] == pytest.approx(values[3], rel=1e-12)
        assert result[key] == pytest.approx((np.mean(values[:3]) + values[3]) / 2, rel=1e-12)
        assert result[f"micro/{key}"] == pytest.approx(np.mean(values), rel=1e-12)
        assert f"{key}/lamp" not in result
    assert (result["samples"], result["categories"]) == (4, 2)
    assert (result["samples/chair"], result["samples/table"]) == (3, 1)
    assert all(type(v) is float for v in result.values())


def test_neither_the_order_nor_the_threads_change_a_bit():
    expected = filled(range(4)).compute()
    assert filled([3, 1, 0, 2]).compute() == expected
    threaded = CompletionMetrics(NAMES)
    categories, predictions, targets = zip(*SAMPLES, strict=True)
    names = [f"sample {i}" for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        scores = threaded.add_clouds(
            categories, names, np.stack(predictions), np.stack(targets), pool
        )
    assert threaded.compute() == expected
    assert scores == [measure(*sample[1:]) for sample in SAMPLES]


def test_metrics_refuse_what_does_not_fit_and_forget():
    with pytest.raises(ValueError, match="must differ"):
        CompletionMetrics(["a", "a"])
    metrics = filled([0])
    scores = measure(*SAMPLES[0][1:])
    with pytest.raises(ValueError, match="'sample 0' was added before"):
        metrics.add(0, "sample 0", scores)
    with pytest.raises(ValueError, match="new: category 3, but there are 3"):
        metrics.add(3, "new", scores)
    with pytest.raises(ValueError, match="new: category -1"):
        metrics.add(-1, "new", scores)
    with pytest.raises(ValueError, match=r"new: target: expected .* \(4, 2\)"):
        metrics.add_clouds([0], ["new"], [SAMPLES[0][1]], [np.ones((4, 2))])
    with pytest.raises(ValueError, match="got 1, 1, 2, 1 of them"):
        metrics.add_clouds([0], ["x"], [cloud(0), cloud(1)], [cloud(2)])
    assert metrics.compute()["samples"] == 1
    metrics.reset()
    empty = metrics.compute()
    assert empty["samples"] == empty["categories"] == 0
    assert math.isnan(empty["cd_l1"]) and math.isnan(empty["micro/f_score"])


def test_fidelity_is_one_sided():
    partial, prediction = cloud(9, 60), cloud(10, 400)
    assert fidelity(partial, prediction) == pytest.approx(
        1000 * squared(partial, prediction).mean()
    )
    assert fidelity(partial, np.concatenate([prediction, partial])) == 0
    with pytest.raises(ValueError, match="points: 1 of 60 points are not finite"):
        partial[0] = np.nan
        fidelity(partial, prediction)


def test_mmd_is_the_smallest_cd_l2():
    prediction = cloud(11, 100)
    references = [cloud(s, 150, spread) for s, spread in ((12, 1.0), (13, 0.5), (14, 2.0))]
    values = [
        1000 * (squared(r, prediction).mean() + squared(prediction, r).mean()) for r in references
    ]
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        assert mmd(prediction, (references[i] for i in order)) == pytest.approx(min(values))
    # the nearest by the first direction alone is not the nearest by both
    inside = prediction[:1]
    assert squared(inside, prediction).mean() == 0
    assert mmd(prediction, [inside, references[0]]) == pytest.approx(values[0])
    with pytest.raises(ValueError, match="needs references"):
        mmd(prediction, [])
    with pytest.raises(ValueError, match="reference 1: expected"):
        mmd(prediction, [references[0], np.zeros(3)])


def test_consistency_compares_consecutive_frames():
    frames = [cloud(s, 80) for s in (15, 16, 17)]
    pairs = [(frames[0], frames[1]), (frames[1], frames[2])]
    expected = np.mean([1000 * (squared(a, b).mean() + squared(b, a).mean()) for a, b in pairs])
    assert consistency(frames) == pytest.approx(expected, rel=1e-12)
    assert consistency([frames[0]] * 3) == 0
    with pytest.raises(ValueError, match="2 frames, got 1"):
        consistency(frames[:1])


def test_scans_are_averaged_and_their_padding_left_out():
    scans, predictions = [cloud(70, 30), cloud(71, 40)], [cloud(72, 90), cloud(73, 90)]
    padded = [np.concatenate([scan, np.zeros((9, 3), np.float32)]) for scan in scans]
    cars = [cloud(74), cloud(75)]
    metrics = ScanMetrics(lambda: iter(cars))
    metrics.add_clouds(["a"], padded[:1], predictions[:1])
    with ThreadPoolExecutor(2) as pool:
        metrics.add_clouds(["b"], padded[1:], predictions[1:], pool)
    result = metrics.compute()
    pairs = list(zip(scans, predictions, strict=True))
    whole = list(zip(padded, predictions, strict=True))
    assert result["fidelity"] == pytest.approx(np.mean([fidelity(s, p) for s, p in whole]))
    assert result["fidelity/scan"] == pytest.approx(np.mean([fidelity(s, p) for s, p in pairs]))
    assert result["mmd"] == pytest.approx(np.mean([mmd(p, cars) for p in predictions]))
    assert result["samples"] == 2
    without = ScanMetrics()
    without.add_clouds(["a"], padded[:1], predictions[:1])
    expected = {"fidelity": fidelity(*whole[0]), "fidelity/scan": fidelity(*pairs[0])}
    assert without.compute() == expected | {"samples": 1.0}
    assert math.isnan(ScanMetrics().compute()["fidelity"])


def moved(shapes, index, points=300):
    """A partial cloud of a shape: half of it, a little off, with padding."""
    half = shapes[index][shapes[index][:, 0] > 0][:points]
    return np.concatenate([half + np.float32(0.003), np.zeros((40, 3), np.float32)])


def test_the_nearest_shape_is_the_one_that_covers_the_partial_cloud():
    # Spheres of 20 sizes; at the origin, where padding lies, is only the smallest.
    direction = np.random.default_rng(18).normal(size=(800, 3)).astype(np.float32)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    clouds = [direction * np.float32(radius) for radius in np.linspace(0.02, 1, 20)]
    shapes = baselines.Shapes(clouds)
    for index in (3, 11, 19):
        assert shapes.nearest(moved(clouds, index)) == index
    # One-sided: what the shape has beyond the partial cloud costs nothing.
    everything = np.concatenate(clouds[5:])
    assert baselines.Shapes([clouds[0], everything, clouds[9]]).nearest(moved(clouds, 12)) == 1


class Source:
    """Two categories of one shape each, in two crops."""

    names = NAMES

    def __init__(self, shapes):
        self.shapes = shapes

    def __len__(self):
        return 4

    def category(self, index):
        return 2 * (index // 2)

    def name(self, index):
        return f"shape {index // 2}/{index % 2}"

    def sample(self, index, rng):
        assert rng is None
        return moved(self.shapes, index // 2, 100 + 50 * (index % 2)), self.shapes[index // 2]


def test_baselines_are_the_partial_cloud_and_the_nearest_training_shape():
    seen = [cloud(50), cloud(51)]
    training = [cloud(52), seen[1], seen[0] + np.float32(0.002)]
    partial, nearest = baselines.evaluate(Source(seen), baselines.Shapes(training), 2)
    crops = [measure(moved(seen, 0, n), seen[0])["cd_l1"] for n in (100, 150)]
    assert partial["cd_l1/chair"] == pytest.approx(np.mean(crops))
    assert nearest["cd_l1/chair"] == pytest.approx(measure(training[2], seen[0])["cd_l1"])
    assert nearest["cd_l1/table"] == 0
    assert partial["samples"] == nearest["samples"] == 4

    rows = [line.split() for line in baselines.table(NAMES, partial, nearest).splitlines()[2:]]
    assert [row[0] for row in rows] == ["chair", "table", "mean"]
    assert rows[0][1:3] == ["2", f"{partial['cd_l1/chair']:.2f}"]
    assert rows[2][-3:] == [
        f"{nearest['cd_l1']:.2f}",
        f"{nearest['cd_l2']:.3f}",
        f"{nearest['f_score']:.4f}",
    ]
    assert baselines.mean([partial, nearest])["cd_l1"] == pytest.approx(
        (partial["cd_l1"] + nearest["cd_l1"]) / 2
    )


def test_tables_have_a_line_for_every_category_of_every_split():
    of = {"cd_l1": 2.5, "cd_l2": 1.25, "f_score": 0.5}
    plain = of | {
        f"{k}/{name}": v * i for k, v in of.items() for i, name in enumerate(("car", "bed"))
    }
    assert completion.tables(plain | {"samples": 9.0, "micro/cd_l1": 7.0}) == [
        "distances x 1000               CD-L1         CD-L2       F-Score",
        "car                            0.000         0.000        0.0000",
        "bed                            2.500         1.250        0.5000",
        "mean of the categories         2.500         1.250        0.5000",
    ]
    modes = {
        f"{m}/{k}": i * v
        for i, m in enumerate(("easy", "median", "hard"))
        for k, v in plain.items()
    }
    found = {f"{p}{k}": v for p in ("", "unseen/") for k, v in (plain | modes).items()}
    lines = completion.tables(found)
    assert len(lines) == 8 and lines[4].startswith("unseen  ")
    assert lines[0].split()[3:] == [
        "easy", "CD-L1", "median", "CD-L1", "hard", "CD-L1", "CD-L1", "CD-L2", "F-Score"
    ]  # fmt: skip
    assert lines[6].split() == ["bed", "0.000", "2.500", "5.000", "2.500", "1.250", "0.5000"]
    scans = {"fidelity": 1.5, "fidelity/scan": 1.25, "samples": 3.0, "mmd": 0.5}
    assert [line.split()[-1] for line in completion.tables(scans)] == ["1.500", "1.250", "0.500"]
    assert completion.tables({"samples": 0.0}) == []
