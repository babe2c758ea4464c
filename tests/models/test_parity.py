"""The reference's numbers: fixtures where the development data is, through scripts/parity.py."""

from __future__ import annotations

import functools
import os
import re
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import parity
from test_completion_models import TINY

from jaxaccum import models
from jaxaccum.accumulate import GroupBatchNorm, batchnorm
from jaxaccum.models import blocks, completion, yolo
from jaxaccum.weights import transfer as weights

SHARED = Path(os.environ.get("JAXACCUM_SHARED", Path(__file__).parents[3] / "shared"))
# Every fixture there is, so that none that is added stays out.
FIXTURES = [str(path.relative_to(SHARED)) for path in parity.found_in(SHARED / "parity")]
LOSSES = [name for name in FIXTURES if "/loss_" in name]
NETWORKS = [name for name in FIXTURES if "/loss_" not in name]
LONG = re.compile(r"-m\.npz$|-shapenet55\.npz$|yolo12-s\.npz$")  # minutes each


def checked(path):
    try:
        return parity.check(path)
    except parity.UnknownFamily as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("name", LOSSES)
def test_losses(shared, name):
    result = checked(shared / name)
    assert result.passed, str(result)
    assert len(result.verdicts) == (17 if "detection26" in name else 5)
    assert not result.notes, str(result)  # nothing of the fixture is left unjudged


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long if LONG.search(name) else ()) for name in NETWORKS],
)
def test_networks(shared, name):
    result = checked(shared / name)
    assert result.passed, str(result)
    print(f"{name}: {result}")
    solid, points = ("3d-" in name, name.startswith("parity/completion"))
    assert ("eval_decoded_heading" in result.verdicts) == solid
    assert ("eval_cdl1" in result.verdicts) == points
    assert ("target_gt_o2o" in result.verdicts) == ("detection26" in name)
    assert {"parameters", "grad_norm_rms", "grad_probe_max"} <= set(result.verdicts)


def test_wrong_numbers_of_two_branches_are_not_excused(shared):
    """Each alone: the sum of the other branch, an object left out, one side of one gradient."""
    path = shared / "parity" / "detection26" / "loss_typical.npz"
    data = dict(np.load(path))
    anchor = np.flatnonzero(data["target_gt_o2o"][0] >= 0)[0]

    def changed(name, place, value):
        array = np.array(data[name])
        array[place] = value
        return {name: array}

    for wrong, found in (
        ({"target_sum_o2o": data["target_sum_o2m"]}, {"target_sum_o2o"}),
        (changed("target_gt_o2o", (0, anchor), -1), {"target_gt_o2o"}),
        (changed("grad_boxes_o2m", (0, 2, 5), 1.0), {"grad_boxes_o2m"}),
        (changed("e2e_max50", (1, 7, 5), 11), {"e2e_classes"}),
        ({"branch_weights": np.array([0.8, 0.2])}, {"branch_weights"}),
    ):
        result = parity.TwoBranchLossFixture({}, data | wrong).compare()
        assert set(result.beyond) == found, str(result)


def test_rows_that_change_places():
    rng = np.random.default_rng(0)
    boxes, scores = rng.uniform(0, 99, (1, 6, 4)), np.linspace(0.9, 0.4, 6)[None, :, None]
    rows = np.concatenate([boxes, scores, np.array([0, 1, 0, 2, 1, 0])[None, :, None]], axis=-1)
    assert parity.rows_apart(rows[:, ::-1], rows) == 0
    other = rows.copy()
    other[0, 5, :4] += 9  # the last may be another
    assert parity.rows_apart(other, rows) == 0
    other[0, 1, 0] += 0.099 * boxes.max()
    assert parity.rows_apart(other, rows) == pytest.approx(0.099)
    other[0, 2, 5] = 2  # a row of another class is another row
    assert parity.rows_apart(other, rows) > 0.1
    with pytest.raises(ValueError, match="all rows have one score"):
        parity.rows_apart(rows, np.ones((1, 6, 6)))


def test_the_rule_at_its_edges():
    def passed(*values, **options):
        return parity.Verdict(*values, **options).passed

    assert passed(1e-4) and not passed(1.001e-4)
    assert passed(1e-4, 0.0, 0.0)  # the first half needs no second
    assert passed(4e-3, 1e-3, 3e-3) and not passed(4.001e-3, 1e-3, 3e-3)
    inf, nan = float("inf"), float("nan")
    assert not any(passed(*values) for values in ((inf, inf, inf), (nan, nan, nan), (nan,)))
    assert not passed(2e-4, nan, 2e-4) and not passed(2e-4, inf, 2e-4)
    # A run of less precision than float32 is no measure of rounding.
    assert passed(1e-2, 1e-2, 1e-4) and not passed(1e-2, 1e-2, 0.99e-4)
    assert passed(1e-2, 1e-2, 1e-6, jumps=True)
    assert passed(1e-2, 1e-2, 1e-9, 1e-4) and not passed(1e-2, 1e-2, 1e-9, 0.99e-4)
    assert not parity.Comparison({}).passed


@pytest.mark.parametrize(
    ("decides", "at", "runs", "passed"),
    [(True, 5, 6, True), (True, 1, 3, True), (True, 99, 9, False), (False, 5, 3, False)],
)
def test_a_jump_that_one_run_of_several_makes(decides, at, runs, passed):
    """More runs are made only of what decides, and only until nothing is beyond the rule."""

    class Jumping(parity.Fixture):
        def numbers(self, dtype):
            if dtype == jnp.float64:
                return {"value": 1.0}
            return {"value": 1.001 if self.jitter and self.draw == at else 1.0 + 1e-6}

        def distances(self, ours, theirs):
            return {"value": abs(ours["value"] - theirs["value"])}

        def jumps(self, a, b):
            return {"value"} if decides else set()

    result = Jumping({"state": {}}, {"value": 1.003}).compare()
    assert result.passed == passed
    assert f"rounding is the largest of {runs} float32 runs" in result.notes


def test_distances():
    assert parity.distance([1.0, 2.0], [1.0, 2.001]) == pytest.approx(0.001 / 2.001)
    assert parity.distance([np.nan], [1.0]) == float("inf")
    with pytest.raises(ValueError, match="shape"):
        parity.distance([1.0], [1.0, 2.0])


def synthetic(variant, classes):
    """A fixture of our own, by float64; not of a network that we have from elsewhere."""
    shapes = {k: list(s) for k, s in weights.shapes(variant, classes).items()}
    stats = [key for key in shapes if "running_" in key]
    trained = [key for key in shapes if key not in stats]
    shapes["model.5.dfl.conv.weight"] = [1, 16, 1, 1]
    size = sum(int(np.prod(s)) for key, s in shapes.items() if key not in stats)
    facts = {
        "variant": variant, "nc": classes, "state": shapes, "parameters": size,
        "grad_names": trained, "stat_names": stats,
    }  # fmt: skip
    rng = np.random.default_rng(0)
    data = {
        "seed": np.asarray(5), "batch_idx": np.asarray([0, 0, 0, 1]),
        "cls": rng.integers(0, classes, 4), "bboxes": rng.uniform(0.2, 0.6, (4, 4)),
        "target_location_3d": rng.uniform(1, 9, (4, 3)),
        "target_dimensions_3d": rng.uniform(1, 3, (4, 3)),
        "target_rotation_y": rng.uniform(-1, 1, 4),
    }  # fmt: skip
    with parity.quick_compiler(), jax.enable_x64(True):
        numbers = parity.DetectorFixture(facts, data).numbers(jnp.float64)
    loose = ("decisions", "parameters")
    data |= {k: np.float32(v) for k, v in numbers.items() if k not in loose}
    return facts, data


@pytest.fixture(scope="module")
def tiny_fixture():
    return synthetic("tiny-t", 5)


@pytest.mark.slow
def test_a_detector_of_our_own(tiny_fixture):
    result = parity.DetectorFixture(*tiny_fixture).compare(x64=True)
    assert result.passed, str(result)
    assert all(verdict.rounding < 1e-4 for verdict in result.verdicts.values()), str(result)
    assert "loss_vector" in result.verdicts
    assert not any("not judged" in note for note in result.notes), str(result)


@pytest.mark.slow
def test_wrong_numbers_are_not_excused(tiny_fixture):
    facts, data = tiny_fixture
    norms, boxes, vector = (np.array(data[k]) for k in ("grad_norm", "eval_boxes", "loss_vector"))
    norms[20] *= 1.01
    boxes[0, 3, 5] += 1e-3 * np.abs(boxes).max()
    vector[1] *= 1.001
    wrong = {"grad_norm": norms, "eval_boxes": boxes, "loss_vector": vector, "more": norms}
    result = parity.DetectorFixture(facts, data | wrong).compare()
    found = {"grad_norm_rms", "grad_norm_max", "eval_boxes", "loss_vector"}
    assert set(result.beyond) == found, str(result)
    assert "not judged: more" in str(result)


@pytest.mark.parametrize("name", ["tiny-t", "adapointr-small"])
def test_tensors_on_one_side_are_named(name):
    detector = name == "tiny-t"
    needed = weights.shapes(name, 5 * detector)
    stats = [k for k in needed if "running_" in k]
    state = {k: list(s) for k, s in needed.items()}
    state |= {k.replace("running_var", "num_batches_tracked"): [] for k in stats if "_var" in k}
    state |= {"model.5.dfl.conv.weight": [1, 16, 1, 1]} if detector else {}
    facts = {"variant": name, "nc": 5, "points": 4096, "state": state, "stat_names": stats,
             "parameters": 0, "grad_names": []}  # fmt: skip
    beside = ["model.5.dfl.conv.weight"] * detector
    parity.require_tensors(facts, needed, beside)

    def stopped(message, **changed):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            if detector:
                parity.DetectorFixture(facts | changed, {"seed": 0}).numbers(jnp.float32)
            else:
                parity.CompletionFixture(facts | changed, {"seed": 0}, jnp.float32)

    key, *others = stats
    for lost in (key, *beside):
        less = {k: s for k, s in state.items() if k != lost}
        stopped(f"weights that only the model has: {lost}", state=less)
    stopped(
        "weights that only the fixture has: model.2.gamma", state=state | {"model.2.gamma": [8]}
    )
    stopped(f"weights of another shape: {key}", state=state | {key: [3]})
    stopped("statistics that only the fixture has: a", stat_names=[*stats, "a"])
    stopped(f"statistics that only the model has: {key}", stat_names=others)
    if not detector:
        lost = "base_model.coarse_pred.2.weight"
        less = {k: s for k, s in state.items() if k != lost}
        stopped(f"no model we know has the fixture's {lost}: missing", state=less)


def test_targets_of_images_without_objects():
    none = np.zeros(0, np.float32)
    data = {"target_location_3d": np.zeros((0, 3)), "target_dimensions_3d": np.zeros((0, 3)),
            "target_rotation_y": np.zeros((0, 1))}  # fmt: skip
    flat = parity.padded_targets(none, none, np.zeros((0, 4)), 2, 128, 128)
    solid = parity.padded_boxes3d(data, none)
    assert flat.boxes.shape[:2] == solid.locations.shape[:2] == (2, 1)


@pytest.mark.slow
def test_a_wrong_weight_is_not_excused(tiny_fixture, monkeypatch):
    """Half a percent of one kernel of many, in float32 and in float64 alike."""
    right = parity.rule_weight

    def wrong(key, shape):
        return right(key, shape) * (1.005 if key == "model.3.m.0.cv2.bn.weight" else 1)

    monkeypatch.setattr(parity, "rule_weight", wrong)
    result = parity.DetectorFixture(*tiny_fixture).compare()
    assert {"eval_boxes", "train_boxes_rms", "grad_norm_rms"} <= set(result.beyond), str(result)
    assert "BEYOND: " in str(result)


@pytest.mark.slow
def test_a_wrong_formula_is_not_excused(tiny_fixture, monkeypatch):
    """The batch norms' epsilon, PyTorch's own in place of the YOLOs'."""
    monkeypatch.setattr(blocks, "GroupBatchNorm", functools.partial(GroupBatchNorm, eps=1e-5))
    parity._unit.clear_cache()  # its programs are known by their modules' fields
    try:
        result = parity.DetectorFixture(*tiny_fixture).compare()
    finally:
        parity._unit.clear_cache()
    assert {"eval_boxes", "train_boxes_rms", "grad_norm_rms"} <= set(result.beyond), str(result)


@pytest.mark.slow
@pytest.mark.long
def test_half_precision_does_not_excuse_itself(tiny_fixture):
    """As far from float64 as from the fixture: four times the one allows the other."""

    class Half(parity.DetectorFixture):
        def numbers(self, dtype):
            return super().numbers(jnp.bfloat16 if dtype == jnp.float32 else dtype)

    result = Half(*tiny_fixture).compare()
    verdict = result.verdicts["eval_boxes"]
    assert verdict.error <= 4 * verdict.rounding and verdict.coarse, str(result)
    assert verdict.grain is not None
    assert "eval_boxes" in result.beyond and "not rounding of float32" in str(result)


# Other tests register families of their own, before this line or after it.
SCALES = [
    name for task in ("detection", "detection3d") for name in models.names(task) if "yolo" in name
]


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.long] * (name[-1] not in "nx")) for name in SCALES
])  # fmt: skip
def test_every_parameter_of_every_scale_has_its_value(name, monkeypatch):
    """From the start and from a state dict."""

    class Cheap:
        def normal(self, mean, deviation, shape):
            return np.broadcast_to(deviation, shape)

        def uniform(self, low, high, shape):
            return np.broadcast_to(high, shape)

    model = models.create(name, num_classes=8)
    example = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    constants = yolo.initial_constants(model)
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "default_rng", lambda seed: Cheap())
        trees = models.initialise(model, example, 0, constants, yolo.initial_deviation(model))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trees))
    gammas = [k for k in weights.to_reference(trees[0]) if k.endswith("gamma")]
    assert bool(gammas) == (name[-1] in "lx" and "12" in name)
    shapes = weights.reference_shapes(trees[0]) | weights.reference_shapes(trees[1])
    state = {k: np.broadcast_to(np.float32(7), s) for k, s in shapes.items()}
    filled = weights.from_reference(state, *trees)
    assert all(np.all(leaf == 7) for leaf in jax.tree.leaves(filled))


@pytest.mark.slow
def test_a_parameter_without_a_value_is_named():
    model = models.create("yolo12-l", num_classes=8)
    example = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    with pytest.raises(KeyError, match=r"gamma.*constants"):
        models.initialise(model, example, 0)


def test_the_script_says_what_it_lacks(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        parity.main([str(tmp_path / "nowhere")])
    assert stop.value.code == 2
    assert "no such folder or fixture" in capsys.readouterr().err
    assert parity.main([str(tmp_path)]) == 1
    assert "0 passed, 0 failed" in capsys.readouterr().out

    (tmp_path / "yolo99-n.json").write_text('{"variant": "yolo99-n"}')
    assert parity.main([str(tmp_path)]) == 1  # the facts alone are no fixture
    assert "FAILED" in capsys.readouterr().out
    np.savez(tmp_path / "yolo99-n.npz", seed=0)
    np.savez(tmp_path / "loss_two.npz", boxes_a=0, boxes_b=0)
    assert parity.main([str(tmp_path)]) == 1  # nothing ran
    text = capsys.readouterr().out
    assert "no such family yet: yolo99-n" in text and "0 passed, 0 failed, 2 skipped" in text
    (tmp_path / "yolo12-n.json").write_text('{"variant": "yolo12-q"}')
    np.savez(tmp_path / "yolo12-n.npz", seed=0)
    assert parity.main([str(tmp_path / "yolo12-n.json")]) == 1  # a family we have
    assert "1 failed" in capsys.readouterr().out


def test_the_script_runs_single_fixtures(shared, capsys):
    path = shared / "parity" / "detection" / "loss_no_objects.npz"
    assert parity.main([str(path), str(path)]) == 0
    text = capsys.readouterr().out
    assert "within 1e-4: loss" in text and text.endswith("2 passed, 0 failed\n")


def completion_facts(name):
    """Facts of a fixture of a completion network, and the numbers that it starts from."""
    shapes = weights.shapes(name)
    table = completion.MODELS[name]
    points = table.queries * table.points_per_query
    stats = [key for key in shapes if "running_" in key]
    dead = ("base_model.query_ranking", "base_model.encoder.norm")
    trained = [k for k in shapes if k not in stats and not k.startswith(dead)]
    rng = np.random.default_rng(1)
    partial = rng.uniform(-0.5, 0.5, (2, table.num_input, 3)).astype(np.float32)
    rng.uniform(-0.5, 0.5, (2, points, 3))
    noise = 0.01 * rng.standard_normal((2, table.denoise, 3))
    facts = {
        "variant": name, "points": points, "state": {k: list(s) for k, s in shapes.items()},
        "parameters": sum(int(np.prod(s)) for k, s in shapes.items() if k not in stats),
        "grad_names": trained, "stat_names": stats,
    }  # fmt: skip
    return facts, {"seed": 0, "partial": partial, "denoise_noise": noise.astype(np.float32)}


@pytest.mark.slow
@pytest.mark.long
def test_a_turned_neighbour_is_found(monkeypatch):
    """In a fixture of our own, in which one query has another neighbour."""
    monkeypatch.setitem(completion.MODELS, "tiny", TINY)
    facts, data = completion_facts("tiny")
    with jax.enable_x64(True):
        ours = parity.CompletionFixture(facts, data, jnp.float64)
        turned = [np.zeros(r.shape, bool) for r in ours.evaluate()[1]]
        plain, risks = ours.evaluate(turned)
        of_centres = np.asarray(risks[6])  # queries and centres, the last call
        risk = np.sort(of_centres, axis=None)[2]
        turned[6][of_centres == risk] = True
        clouds, _ = ours.evaluate(turned)
        data["eval_coarse"] = np.asarray(clouds.coarse)
        data["eval_fine"] = np.asarray(clouds.fine)[:, ::16]
        assert ours.errors(plain)["eval_fine"].max() > parity.TOLERANCE
        assert ours.errors(clouds)["eval_fine"].max() == 0
        assert not any(map(np.any, ours.turns(risk=0.99 * risk)))
        assert all(map(np.array_equal, ours.turns(risk=1.01 * risk), turned))


def test_neighbours_are_turned_within_the_limit():
    cloud = jnp.asarray([[[0.0, 0, 1], [0, 1, 1e-3], [3, 0, 1]]])  # the second near the first
    query = jnp.zeros((1, 1, 3))
    for limit, nearest in ((1e-8, 0), (1e-5, 1)):
        with parity.Turned([jnp.ones((1, 1), bool)], limit) as decisions:
            assert int(parity.points.nearest(query, cloud, 1).squeeze()) == nearest
        assert 1e-8 < float(decisions.risks[0].squeeze()) < 1e-5


@pytest.mark.slow
@pytest.mark.long
def test_an_error_of_a_completion_model_is_not_excused(monkeypatch):
    monkeypatch.setitem(completion.MODELS, "tiny", TINY)
    facts, data = completion_facts("tiny")
    ours = parity.CompletionFixture(facts, data, jnp.float32)
    clouds, _ = ours.evaluate()
    items, moments, gradient = ours.train()
    l1, l2 = ours.distances(clouds)
    moved = weights.to_reference(batchnorm.move_statistics(ours.stats, moments, 0.1))
    gradient = weights.to_reference(gradient)
    probes = {k: np.random.default_rng(zlib.crc32(f"{k}#probe".encode())) for k in gradient}
    names = facts["grad_names"]
    data |= {
        "eval_coarse": np.array(clouds.coarse),
        "eval_fine": np.array(clouds.fine)[:, ::16],
        "eval_cdl1": np.asarray(l1),
        "eval_cdl2": np.asarray(l2),
        "train_losses": np.asarray(items),
        "stat_norm": np.array([np.linalg.norm(moved[k]) for k in facts["stat_names"]]),
        "grad_norm": np.array([np.linalg.norm(gradient[k]) for k in names]),
        "grad_probe": np.array(
            [np.vdot(gradient[k], probes[k].standard_normal(gradient[k].shape)) for k in names]
        ),
    }
    result = parity.CompletionNumbers(facts, data).compare()
    assert result.passed and result.verdicts["eval_fine"].close, str(result)
    data["eval_fine"][1, 2] += 1e-3 * np.abs(data["eval_fine"]).max()
    result = parity.CompletionNumbers(facts, data).compare()
    assert "eval_fine" in result.beyond, str(result)
    assert set(result.beyond) <= {"eval_fine", "eval_fine_sorted"}, str(result)


def test_queries_that_are_ranked_alike_may_change_places():
    table = completion.MODELS["adapointr-small"]
    rng = np.random.default_rng(0)
    coarse, fine = rng.normal(size=(2, 256, 3)), rng.normal(size=(2, 256 * 16, 3))
    swapped, moved = coarse.copy(), fine.reshape(2, 256, 16, 3).copy()
    swapped[1, [7, 8]], moved[1, [7, 8]] = coarse[1, [8, 7]], moved[1, [8, 7]]
    clouds = completion.Clouds(jnp.asarray(coarse), jnp.asarray(fine))
    a, b = parity.aligned(clouds, swapped, table)
    np.testing.assert_allclose(a, swapped, atol=1e-6)
    np.testing.assert_allclose(b, moved.reshape(fine.shape), atol=1e-6)
    many = coarse[:, ::-1]  # not these
    np.testing.assert_allclose(parity.aligned(clouds, many, table)[0], coarse, atol=1e-6)
