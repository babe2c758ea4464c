"""YOLO26: its sizes, what both sets of branches compute, what is found end to end, its weights.

The numbers are of the reference package: counts, and forward passes in float64 on weights and
images that follow from formulas.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from accumulate import test_golden as golden
from safetensors.numpy import load_file, save_file
from tiny import tiny_config
from weights.test_convert import CLASSES, TorchFile, checkpoint

import jaxaccum
from jaxaccum import config as configs
from jaxaccum import convert, data, draw, export, models, tasks
from jaxaccum.accumulate import Groups
from jaxaccum.config import ConfigError
from jaxaccum.metrics import detection as metrics
from jaxaccum.models import yolo
from jaxaccum.models.families import has_one_to_one
from jaxaccum.tasks.detection import Evaluator
from jaxaccum.training import inference, measuring
from jaxaccum.training.checkpoint import Checkpoints
from jaxaccum.weights import branches, initial
from jaxaccum.weights import transfer as weights
from jaxaccum.weights.transfer import Weights, WeightsError

# Parameters of each row with 80 classes, at scales n, s, m, l and x. The first 16 rows are the
# same in both families.
ROWS = {
    "yolo26": {
        0: (464, 928, 1_856, 1_856, 2_784),
        1: (4_672, 18_560, 73_984, 73_984, 166_272),
        2: (6_640, 26_080, 111_872, 173_824, 389_760),
        3: (36_992, 147_712, 590_336, 590_336, 1_327_872),
        4: (26_080, 103_360, 444_928, 691_712, 1_553_664),
        5: (147_712, 590_336, 2_360_320, 2_360_320, 5_309_952),
        6: (87_040, 346_112, 1_380_352, 2_234_368, 5_022_720),
        7: (295_424, 1_180_672, 2_360_320, 2_360_320, 5_309_952),
        8: (346_112, 1_380_352, 1_380_352, 2_234_368, 5_022_720),
        9: (164_608, 656_896, 656_896, 656_896, 1_476_864),
        10: (249_728, 990_976, 990_976, 1_455_616, 3_264_768),
        13: (119_808, 477_184, 1_642_496, 2_496_512, 5_612_544),
        16: (34_304, 136_192, 542_720, 756_736, 1_700_352),
        17: (36_992, 147_712, 590_336, 590_336, 1_327_872),
        19: (95_232, 378_880, 1_511_424, 2_365_440, 5_317_632),
        20: (147_712, 590_336, 2_360_320, 2_360_320, 5_309_952),
        22: (463_104, 1_843_712, 1_974_784, 1_974_784, 4_436_736),
        23: (309_656, 993_784, 2_921_976, 2_921_976, 6_440_952),
    },
    "yolo26-p2": {
        19: (8_704, 34_304, 136_192, 189_952, 426_240),
        20: (9_280, 36_992, 147_712, 147_712, 332_160),
        22: (24_064, 95_232, 378_880, 592_896, 1_331_712),
        23: (36_992, 147_712, 590_336, 590_336, 1_327_872),
        25: (95_232, 378_880, 1_511_424, 2_365_440, 5_317_632),
        26: (147_712, 590_336, 2_360_320, 2_360_320, 5_309_952),
        28: (463_104, 1_843_712, 1_974_784, 1_974_784, 4_436_736),
        29: (357_728, 583_328, 1_507_232, 1_507_232, 3_292_704),
    },
}
ROWS["yolo26-p2"] |= {row: counts for row, counts in ROWS["yolo26"].items() if row < 17}
# Parameters of the one-to-one branches, entries of the state dict, and of these branches alone.
BRANCHES = {
    "yolo26-n": (154_828, 708, 120), "yolo26-s": (496_892, 708, 120),
    "yolo26-m": (1_460_988, 768, 120), "yolo26-l": (1_460_988, 1092, 120),
    "yolo26-x": (3_220_476, 1092, 120), "yolo26-p2-n": (178_864, 902, 160),
    "yolo26-p2-s": (291_664, 902, 160), "yolo26-p2-m": (753_616, 962, 160),
    "yolo26-p2-l": (753_616, 1370, 160), "yolo26-p2-x": (1_646_352, 1370, 160),
}  # fmt: skip


@functools.cache
def shapes(name: str, classes: int = 80) -> dict[str, tuple[int, ...]]:
    """Of every parameter and statistic, by the reference's keys."""
    return weights.shapes(name, classes)


def size(kinds: dict[str, tuple[int, ...]]) -> int:
    """Values in parameters."""
    return sum(math.prod(s) for key, s in kinds.items() if ".running_" not in key)


@pytest.mark.parametrize(
    "name", [n if n == "yolo26-n" else pytest.param(n, marks=pytest.mark.slow) for n in BRANCHES]
)
def test_sizes(name):
    found = shapes(name)
    family, _, scale = name.rpartition("-")
    rows: dict[int, dict[str, tuple[int, ...]]] = {}
    for key, shape in found.items():
        rows.setdefault(int(key.split(".")[1]), {})[key] = shape
    place = "nsmlx".index(scale)
    assert {row: size(part) for row, part in sorted(rows.items())} == {
        row: counts[place] for row, counts in sorted(ROWS[family].items())
    }
    own = {key: shape for key, shape in found.items() if ".one2one_" in key}
    batches = [sum(k.endswith("running_var") for k in kinds) for kinds in (found, own)]
    assert (size(own), len(found) + batches[0], len(own) + batches[1]) == BRANCHES[name]


def test_the_state_dict_is_whole(shared):
    """Keys and shapes are those of the reference, so that its strict loading takes them."""
    facts = json.loads((shared / "parity/detection26/yolo26-n.json").read_text())
    model = models.create(facts["variant"], num_classes=facts["nc"])
    assert list(model.strides) == facts["strides"]
    state = weights.for_pytorch(model, *task_of(facts["variant"], facts["nc"]).initialise(0))
    assert {k: list(v.shape) for k, v in state.items()} == facts["state"]


def test_keys_of_the_attention_row():
    found = shapes("yolo26-n")
    assert found["model.22.m.0.0.cv1.conv.weight"] == (64, 128, 3, 3)
    assert found["model.22.m.0.1.attn.qkv.conv.weight"] == (256, 128, 1, 1)
    assert found["model.22.m.0.1.ffn.1.conv.weight"] == (128, 256, 1, 1)
    assert found["model.22.cv2.conv.weight"] == (256, 384, 1, 1)
    assert found["model.23.one2one_cv2.0.0.conv.weight"] == (16, 64, 3, 3)
    assert found["model.23.one2one_cv2.0.2.weight"] == (4, 16, 1, 1)
    assert found["model.23.one2one_cv3.0.2.weight"] == (80, 80, 1, 1)


# --- Initial values ---


def task_of(name: str, classes: int = 3, **changes) -> tasks.Task:
    names = tuple(f"c{i}" for i in range(classes))
    config = tiny_config(model=name, **changes)
    return tasks.of(config).create(config, names, np.dtype(np.float32))


def test_both_sets_of_branches_start_the_same():
    params, stats = task_of("tiny-26-t").initialise(0)
    head = params["model.6"] | stats["model.6"]
    many = {k: v for k, v in head.items() if not k.startswith("one2one_")}
    assert {f"one2one_{key}" for key in many} == head.keys() - many.keys()
    for key in many:
        for a, b in zip(
            jax.tree.leaves(head[key]), jax.tree.leaves(head[f"one2one_{key}"]), strict=True
        ):
            np.testing.assert_array_equal(a, b, key)
    for prefix in ("", "one2one_"):
        assert (head[f"{prefix}cv2.1.2"]["bias"] == 2).all()
        rare = math.log(5 / 3 / (640 / 16) ** 2)
        assert head[f"{prefix}cv3.1.2"]["bias"] == pytest.approx(rare)


def test_initial_class_biases_are_those_of_the_reference():
    found = yolo.initial_constants(models.create("yolo26-p2-n", num_classes=80))
    for prefix in ("", "one2one_"):
        biases = [found[f"model.29/{prefix}cv3.{i}.2/bias"] for i in range(4)]
        np.testing.assert_allclose(biases, [-12.9229, -11.5366, -10.1503, -8.7641], atol=5e-5)


def test_its_attention_does_not_start_as_that_of_yolo12():
    """The keys of both look alike: m.0.1.attn.qkv."""
    path = "/m.0.1/attn/qkv/conv/kernel"
    for name, row, expected in (("yolo26-n", 22, None), ("yolo12-n", 6, 0.02)):
        deviation = yolo.initial_deviation(models.create(name, num_classes=1))
        assert deviation(f"model.{row}{path}") == expected


# --- What it computes ---


@dataclasses.dataclass(frozen=True)
class Golden:
    """Forward passes of the reference by running statistics.

    Attributes:
      boxes, logits: sums of the absolute raw outputs, one-to-many and one-to-one.
      first, last: centre and size of the first box of the first image and the last of the second,
        one-to-many. scores: sum of its probabilities of classes 0 to 7.
      found: rows 0 and 9 of the first image and 0 of the second, end to end: corners, score, class.
      found_scores: sum of all 2 x 300 scores.
    """

    boxes: tuple[float, float]
    logits: tuple[float, float]
    first: tuple[float, float, float, float]
    last: tuple[float, float, float, float]
    scores: float
    found: tuple[tuple[float, ...], ...]
    found_scores: float


GOLDEN = {
    "yolo26-n": Golden(
        boxes=(5320.061303351, 5326.729957161),
        logits=(3630.742288540, 3480.305828698),
        first=(4.419575836, 3.934510283, 31.576907846, 31.686426089),
        last=(111.752527912, 112.758363851, 131.893871987, 130.703401443),
        scores=2655.676047631,
        found=(
            (99.471667908, -12.205723708, 131.412576146, 19.223831187, 0.546592042, 27),
            (59.468997283, -12.190547651, 91.405036741, 19.224106271, 0.546331092, 27),
            (99.471820445, -12.204965223, 131.412076564, 19.224697982, 0.54658965, 27),
        ),
        found_scores=326.467419406,
    ),
    "yolo26-s": Golden(
        boxes=(5304.525064785, 5309.290910459),
        logits=(3055.237574415, 3179.686064304),
        first=(4.600115851, 4.31812606, 31.595841964, 31.87898505),
        last=(110.760957102, 112.784713479, 131.456276142, 131.214074728),
        scores=2695.281955327,
        found=(
            (14.306613997, 50.988811429, 143.389500684, 175.115891425, 0.550364761, 38),
            (-17.59110579, -45.250069793, 110.702792776, 78.179166628, 0.548376588, 38),
            (14.306647636, 50.988827406, 143.389509063, 175.115897108, 0.550364857, 38),
        ),
        found_scores=327.721600457,
    ),
    "yolo26-m": Golden(
        boxes=(5259.590670144, 5295.690507904),
        logits=(3418.690897388, 3253.128327158),
        first=(4.470267634, 3.693735778, 31.655298447, 31.092445786),
        last=(111.045308118, 111.910956945, 130.243050778, 129.241642659),
        scores=2684.001462800,
        found=(
            (-16.817183275, 47.98774391, 112.51920871, 177.511752616, 0.549748933, 42),
            (15.785042985, -16.895039451, 144.175949824, 113.212127872, 0.546131256, 42),
            (-16.817220289, 47.987712637, 112.519195045, 177.511772255, 0.549748976, 42),
        ),
        found_scores=323.793987028,
    ),
    "yolo26-l": Golden(
        boxes=(5263.212406670, 5282.849818546),
        logits=(3408.869256378, 3244.580790021),
        first=(4.449852289, 3.714840449, 31.712416627, 31.10892943),
        last=(110.91609079, 111.977122352, 130.085074722, 129.166359391),
        scores=2683.337204735,
        found=(
            (-16.944909958, 48.135056516, 112.614306021, 177.289812459, 0.549477017, 42),
            (47.832203471, 15.701023532, 176.241575065, 144.905384594, 0.546707149, 42),
            (-16.944895755, 48.135045132, 112.614291796, 177.289806979, 0.549477059, 42),
        ),
        found_scores=324.132576007,
    ),
    "yolo26-x": Golden(
        boxes=(5323.181926516, 5260.253301891),
        logits=(3293.150818999, 3448.788562923),
        first=(4.521050481, 3.624144524, 31.28084017, 32.021832423),
        last=(111.47391408, 111.095170247, 130.5356931, 126.99187773),
        scores=2690.084373008,
        found=(
            (107.551305522, 108.115672008, 139.491385325, 139.069234353, 0.548563935, 12),
            (59.675049473, 108.157066515, 91.433177703, 139.029001531, 0.547649646, 12),
            (107.551183925, 108.115939453, 139.490894812, 139.069137, 0.548564337, 12),
        ),
        found_scores=327.057729715,
    ),
    "yolo26-p2-n": Golden(
        boxes=(21379.891905879, 21567.136905001),
        logits=(14359.534381340, 13069.642142008),
        first=(2.507701998, 1.816312891, 15.533221239, 15.614649113),
        last=(112.89575061, 115.366527635, 129.690114014, 125.190380034),
        scores=10797.151357338,
        found=(
            (-11.868879711, 100.166708713, 18.985273104, 132.351494359, 0.546288544, 53),
            (-11.893140985, 52.151975456, 19.006952703, 84.390159156, 0.546272348, 53),
            (-11.868623033, 100.167332992, 18.985400386, 132.351288635, 0.546288901, 53),
        ),
        found_scores=326.503381265,
    ),
}


def weights_of(name: str, dtype) -> tuple:
    """The model, and parameters and statistics by the rule of the reference's golden values."""
    model = models.create(name, num_classes=80, dtype=dtype)
    example = jax.ShapeDtypeStruct((1, 64, 64, 3), dtype)
    params, stats = models.initialise(
        model, example, 0, yolo.initial_constants(model), dtype=np.dtype(dtype)
    )
    blank = weights.to_reference(params) | weights.to_reference(stats)
    state = {key: golden.hashed(key, value.shape) for key, value in blank.items()}
    for key in state:  # else boxes would have hardly any size
        if "cv2." in key.split("model.")[1] and key.endswith(".2.bias"):
            state[key] = 2 + state[key]
    return model, *weights.from_reference(state, params, stats)


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
def test_networks(x64, name):
    expected = GOLDEN[name]
    model, params, stats = weights_of(name, jnp.float64)
    anchors = yolo.anchors(golden.SIZE, golden.SIZE, model.strides)

    @jax.jit
    def forward(params, stats, images):
        raw = model.apply({"params": params, "batch_stats": stats}, images)
        return raw, yolo.decode(raw, anchors), yolo.surest(raw, anchors, 300)

    raw, (corners, scores), found = jax.device_get(forward(params, stats, golden.image()))
    assert raw.one_to_one.one_to_one is None
    low, high = corners[..., :2], corners[..., 2:]
    decoded = np.concatenate([(low + high) / 2, high - low], axis=-1)
    rows = np.concatenate([found.boxes, found.scores[..., None], found.classes[..., None]], axis=-1)
    ours = Golden(
        boxes=[np.abs(one.boxes).sum() for one in (raw, raw.one_to_one)],
        logits=[np.abs(one.scores).sum() for one in (raw, raw.one_to_one)],
        first=decoded[0, 0], last=decoded[1, -1], scores=scores[..., :8].sum(),
        found=rows[[0, 0, 1], [0, 9, 0]], found_scores=found.scores.sum(),
    )  # fmt: skip
    assert found.boxes.shape == (2, 300, 4)
    for field in dataclasses.fields(Golden):
        # The sheet prints nine decimals.
        np.testing.assert_allclose(
            getattr(ours, field.name), getattr(expected, field.name), rtol=1e-9, atol=5.1e-10,
            err_msg=field.name,
        )  # fmt: skip


@pytest.mark.slow
def test_the_one_to_one_branch_gives_no_gradient_to_what_it_reads():
    task = task_of("tiny-26-t")
    params, stats = task.initialise(0)
    images = np.random.default_rng(0).random((2, 64, 64, 3)).astype(np.float32)

    def total(params, once: bool, remat: bool):
        model = task.model.clone(remat=remat)
        raw, _ = model.apply(
            {"params": params, "batch_stats": stats}, images, Groups(2, jnp.ones(2)),
            mutable=["moments"],
        )  # fmt: skip
        raw = raw.one_to_one if once else raw
        return jnp.sum(raw.boxes**2) + jnp.sum(raw.scores**2)

    for remat in (False, True):
        for once in (True, False):
            gradient = weights.to_reference(jax.grad(total)(params, once, remat))
            moved = {key for key, value in gradient.items() if np.any(value)}
            own = {key for key in gradient if ".one2one_" in key}
            assert moved <= (own if once else gradient.keys() - own)
            some = "model.6.one2one_cv2.0.0.conv.weight" if once else "model.0.conv.weight"
            assert some in moved


def test_distances_are_taken_as_they_are():
    anchors = yolo.anchors(16, 16, (8,))
    raw = jnp.asarray([[1.0, 2, 3, 4], [-1, 0, 0.5, -2], [0, 0, 0, 0], [9, 9, 9, 9]])
    boxes = yolo.decode_boxes(raw, anchors)
    np.testing.assert_array_equal(boxes[0], [-0.5, -1.5, 3.5, 4.5])
    np.testing.assert_array_equal(boxes[1], [2.5, 0.5, 2, -1.5])  # inside out


# --- What is found end to end ---


def predictions(scores: list[list[float]]) -> tuple[yolo.Predictions, yolo.Anchors]:
    """Of one image with four anchors, the boxes by their places."""
    logits = jnp.log(jnp.asarray([scores])) - jnp.log1p(-jnp.asarray([scores]))
    boxes = jnp.ones((1, 4, 4)) * jnp.arange(1, 5)[None, :, None] / 4
    once = yolo.Predictions(boxes, logits)
    return yolo.Predictions(boxes * jnp.nan, logits * 0, None, once), yolo.anchors(16, 16, (8,))


def test_one_anchor_may_be_found_with_several_classes():
    raw, anchors = predictions([[0.1, 0.2], [0.9, 0.8], [0.3, 0.1], [0.4, 0.6]])
    found = yolo.surest(raw, anchors, 3)
    np.testing.assert_allclose(found.scores[0], [0.9, 0.8, 0.6], rtol=1e-6)
    np.testing.assert_array_equal(found.classes[0], [0, 1, 1])
    once = yolo.decode(raw.one_to_one, anchors)[0][0]
    np.testing.assert_array_equal(found.boxes[0], once[jnp.asarray([1, 1, 3])])
    single = yolo.surest(raw, anchors, 3, agnostic=True)
    np.testing.assert_allclose(single.scores[0], [0.9, 0.6, 0.3], rtol=1e-6)
    np.testing.assert_array_equal(single.classes[0], [0, 1, 0])
    np.testing.assert_array_equal(single.boxes[0], once[jnp.asarray([1, 3, 2])])
    assert found.classes.dtype == single.classes.dtype == jnp.int32


def test_anchors_are_chosen_before_classes():
    """The third of all pairs is of an anchor that is not among the two best."""
    raw, anchors = predictions([[0.9, 0.1], [0.8, 0.2], [0.7, 0.6], [0.1, 0.1]])
    found = yolo.surest(raw, anchors, 2)
    np.testing.assert_allclose(found.scores[0], [0.9, 0.8], rtol=1e-6)
    assert yolo.surest(raw, anchors, 300).scores.shape == (1, 4)  # as many as anchors


def test_of_equal_scores_the_first_anchor_and_class_comes_first():
    raw, anchors = predictions([[0.5, 0.5]] * 4)
    found = yolo.surest(raw, anchors, 3)
    np.testing.assert_array_equal(found.classes[0], [0, 1, 0])
    boxes = yolo.decode(raw.one_to_one, anchors)[0][0]
    np.testing.assert_array_equal(found.boxes[0], boxes[jnp.asarray([0, 0, 1])])


def test_a_network_without_the_branch():
    raw, anchors = predictions([[0.5]] * 4)
    with pytest.raises(ValueError, match="no one-to-one branch"):
        yolo.surest(raw.one_to_one, anchors, 3)
    assert has_one_to_one("yolo26-p2-x") and not has_one_to_one("yolo11-n")
    assert not has_one_to_one("resnet")


def test_what_is_kept_of_it():
    """Nothing overlaps too much: doubles stay. Boxes that are inside out or not finite do not."""
    boxes = np.float32([[0, 0, 4, 4]] * 3 + [[4, 0, 0, 4], [0, 0, np.inf, 4], [1, 1, 2, 2]])
    scores, classes = np.float32([0.9, 0.8, 0.7, 0.6, 0.5, 0.25]), [0, 1, 0, 0, 0, 1]
    found = metrics.surest(boxes, scores, classes, conf=0.25)
    np.testing.assert_array_equal(found.anchors, [0, 1, 2])
    found = metrics.surest(boxes, scores, classes, conf=0.2, max_det=2)
    np.testing.assert_array_equal(found.anchors, [0, 1])
    wanted = np.asarray([False, True])
    found = metrics.surest(boxes, scores, classes, conf=0.2, max_det=2, wanted=wanted)
    np.testing.assert_array_equal(found.anchors, [1, 5])
    np.testing.assert_array_equal(found.classes, [1, 1])


# --- Inference, by one field ---

NAMES = data.Scenes("val").names


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of the tiny network: weights at their initial values, scores high enough to be seen,
    the branches unlike."""
    return a_run(tmp_path_factory.mktemp("26"), "tiny-26-t")


def a_run(folder, model):
    config = tiny_config(model=model)
    task = tasks.of(config).create(config, NAMES, np.dtype(np.float32))
    params, stats = task.initialise(0)
    rng = np.random.default_rng(0)
    head = params[max(params, key=lambda name: int(name.split(".")[1]))]
    for name, layer in head.items():
        if name.endswith(".2"):  # anchors and branches unlike
            layer["kernel"] = layer["kernel"] * np.float32(4 if "cv3" in name else 1)
            noise = rng.normal(0, 0.3, layer["bias"].shape).astype(np.float32)
            layer["bias"] = layer["bias"] * ("cv2" in name) + noise
    # What the layers say does not fade on its way.
    stats = jax.tree_util.tree_map_with_path(
        lambda path, a: a * np.float32(0.15) if path[-1].key == "var" else a, stats
    )
    meta = {"fingerprint": "", "config": config.to_dict(), "names": list(NAMES), "facts": {}}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save_best(0, {"params": params, "stats": stats}, meta)
    return folder


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)


def test_the_field_chooses_the_branch(workdir):
    trained = inference.load(workdir)
    both = {flag: trained.with_end_to_end(flag) for flag in (False, True)}
    assert both[False] is trained and trained.with_end_to_end(None) is trained
    assert both[True].config.eval.end_to_end and both[True].task.choices() == {"end_to_end": True}
    raw = trained.task.model.apply(
        {"params": trained.params, "batch_stats": trained.stats}, image(0)[None]
    )
    boxes, scores = both[False].task.predict(trained.params, trained.stats, image(0)[None])
    expected = yolo.decode(raw, trained.task.anchors)
    np.testing.assert_allclose(boxes, expected[0], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(scores, expected[1], rtol=1e-5)
    found = both[True].task.predict(trained.params, trained.stats, image(0)[None])
    expected = yolo.surest(raw, trained.task.anchors, trained.config.eval.max_det)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)
    assert found.scores.shape == (1, 80)


def test_prediction(workdir):
    model = jaxaccum.Model(inference.load(workdir))
    many, once = (
        model.predict(image(0), conf=0.3, iou=0.2, end_to_end=flag)[0] for flag in (False, True)
    )
    assert many.to_json()["end_to_end"] is False and once.to_json()["end_to_end"] is True
    assert model.predict(image(0), conf=0.3, iou=0.2)[0].to_json() == many.to_json()
    raw = model.trained.with_end_to_end(True).task.predict(
        model.trained.params, model.trained.stats, image(0)[None]
    )
    boxes, scores, classes = (np.asarray(a[0]) for a in raw)
    kept = (scores > 0.3) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    assert kept.sum() == len(once) > len(many)  # the overlapping ones are all there
    np.testing.assert_array_equal(once.classes, classes[kept])
    # Of a class the best, also where the best of all are of others.
    rare = int(classes[kept][-1])
    few = model.predict(image(0), conf=0.3, end_to_end=True, classes=[rare], max_det=2)[0]
    np.testing.assert_allclose(few.scores, scores[kept & (classes == rare)][:2], rtol=1e-5)
    assert set(few.classes) == {rare}
    # One row for each of the 80 anchors.
    task = dataclasses.replace(model.trained.with_end_to_end(True).task, agnostic=True)
    boxes, scores, _ = task.predict(model.trained.params, model.trained.stats, image(0)[None])
    kept = np.asarray(boxes[..., 2:] > boxes[..., :2]).all(-1)
    alone = model.predict(image(0), conf=0, end_to_end=True, agnostic=True)[0]
    assert len(alone) == kept.sum() > 40
    np.testing.assert_allclose(alone.scores, scores[kept], rtol=1e-5)


def test_evaluation_says_by_which(workdir, capsys):
    trained = inference.load(workdir)
    found = {flag: measuring.measure(trained, end_to_end=flag) for flag in (None, True)}
    assert found[None]["end_to_end"] is False and found[True]["end_to_end"] is True
    printed = capsys.readouterr().out
    assert "by the one-to-many branch and NMS" in printed
    assert "by the one-to-one branch, without NMS" in printed
    assert {**found[None], "end_to_end": True} != found[True]


def test_the_evaluator_uses_no_nms(workdir, monkeypatch):
    trained = inference.load(workdir).with_end_to_end(True)
    source = trained.task.open(trained.config, "val", trained.names)
    monkeypatch.setattr(metrics, "nms", None)
    evaluator = trained.task.evaluator(trained.config, source)
    assert isinstance(evaluator, Evaluator)
    assert evaluator(trained.params, trained.stats)[0]["images"] == len(source)


@pytest.mark.slow
def test_a_run_is_validated_as_its_config_says(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "nms", None)
    config = tiny_config(model="tiny-26-t", steps=2, **{"eval.every": 2, "eval.end_to_end": True})
    trained = jaxaccum.train(config, tmp_path / "run").trained
    assert trained.task.end_to_end and trained.step == 2
    assert "by the one-to-one branch, without NMS" in capsys.readouterr().out


def test_other_families_have_no_such_branch(tmp_path):
    for change in ({"model": "yolo11-n"}, {"model": "tiny-t"}):
        config = tiny_config(**change, **{"eval.end_to_end": True})
        with pytest.raises(ConfigError, match=r"one-to-one branch: .*yolo26, yolo26-p2.*; got"):
            configs.validate(config)
    configs.validate(tiny_config(model="yolo26-n", **{"eval.end_to_end": True}))
    with pytest.raises(ConfigError, match="there is no 'yolo26-q'"):
        configs.validate(tiny_config(model="yolo26-q", **{"eval.end_to_end": True}))
    model = jaxaccum.Model(inference.load(a_run(tmp_path / "run", "tiny-t")))
    assert "end_to_end" not in model.predict(image(0), end_to_end=False)[0].to_json()
    for use in (
        lambda: model.predict(image(0), end_to_end=True),
        lambda: model.evaluate(end_to_end=True),
        lambda: model.export(tmp_path / "x.stablehlo", end_to_end=True),
    ):
        with pytest.raises(ConfigError, match="one-to-one branch"):
            use()
    assert "end_to_end" not in configs.detection3d().eval
    with pytest.raises(ConfigError, match="end_to_end is True or False; got 'yes'"):
        model.predict(image(0), end_to_end="yes")


def test_the_field_is_no_part_of_the_recipe():
    recipes = {
        configs.recipe_of(tiny_config(**{"eval.end_to_end": flag}), 5, {}).fingerprint
        for flag in (False, True)
    }
    assert len(recipes) == 1


@pytest.mark.parametrize("flag", [False, True])
def test_the_exported_program(workdir, tmp_path, flag):
    file = tmp_path / "program.stablehlo"
    facts = export.export(workdir, file, end_to_end=flag)
    assert facts["end_to_end"] is flag
    assert facts == json.loads(file.with_name("program.stablehlo.json").read_text())
    assert ("scores (N, K), the highest first" in facts["output"]) == flag
    trained = inference.load(workdir).with_end_to_end(flag)
    images = np.stack([image(0), image(1)])
    expected = jax.jit(trained.task.predict)(trained.params, trained.stats, images)
    program = export.load_exported(file)
    for count in (1, 2):
        found = program(images[:count])
        assert len(found) == (3 if flag else 2)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b[:count], rtol=1e-4, atol=1e-4)


def test_the_program_as_onnx(workdir, tmp_path):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    file = tmp_path / "program.onnx"
    export.export(workdir, file, batch=2, end_to_end=True)
    trained = inference.load(workdir).with_end_to_end(True)
    images = np.stack([image(0), image(1)])
    boxes, scores, classes = onnxruntime.InferenceSession(file).run(
        ["boxes", "scores", "classes"], {"images": images}
    )
    expected = jax.jit(trained.task.predict)(trained.params, trained.stats, images)
    np.testing.assert_allclose(scores, expected.scores, rtol=1e-4, atol=1e-6)
    # Scores that are the same up to rounding may change places.
    steps = -np.diff(np.asarray(expected.scores), axis=1, prepend=2, append=-1)
    alone = (steps[:, :-1] > 1e-5) & (steps[:, 1:] > 1e-5)
    assert alone.mean() > 0.5
    np.testing.assert_array_equal(classes[alone], expected.classes[alone])
    np.testing.assert_allclose(boxes[alone], expected.boxes[alone], rtol=1e-4, atol=1e-3)


# --- Weights ---


def network(classes: int = 3, seed: int = 0):
    """The tiny one, its branches unlike, and its state dict."""
    task = task_of("tiny-26-t", classes)
    params, stats = task.initialise(seed)
    rng = np.random.default_rng(seed)
    params, stats = jax.tree.map(
        lambda a: rng.uniform(0.5, 1.5, a.shape).astype(a.dtype), (params, stats)
    )
    return task.model, params, stats, weights.for_pytorch(task.model, params, stats, 7)


def without(state, branch: str):
    head = f"model.{branches.last_row(state)}."
    gone = ("one2one_",) if branch == "one-to-one" else ("cv2.", "cv3.")
    return {k: v for k, v in state.items() if not k.startswith(tuple(f"{head}{g}" for g in gone))}


def folded(state):
    """As others make it for inference."""
    found = {}
    for key, value in state.items():
        module = key.removesuffix(".conv.weight")
        if f"{module}.bn.weight" in state and key != module:
            scale = state[f"{module}.bn.weight"] / np.sqrt(
                state[f"{module}.bn.running_var"] + np.float32(1e-3)
            )
            found[key] = value * scale[:, None, None, None]
            found[f"{module}.conv.bias"] = (
                state[f"{module}.bn.bias"] - state[f"{module}.bn.running_mean"] * scale
            )
        elif ".bn." not in key:
            found[key] = value
    return found


def test_a_training_checkpoint_there_and_back(tmp_path):
    *_, state = network()
    file = TorchFile()
    path = file.write(tmp_path / "x.pt", checkpoint(file, state, True))
    report, adopted = convert.convert(path, tmp_path / "run")
    assert report.complete and not report.absent_branch and adopted.config.model == "tiny-26-t"
    out = tmp_path / "out.safetensors"
    assert convert.write(tmp_path / "run", out) == len(state)
    got = load_file(out)
    assert got.keys() == state.keys() and not any(".dfl." in key for key in got)
    for key, value in got.items():
        if value.dtype == np.float32:
            np.testing.assert_array_equal(value, np.float32(np.float16(state[key])), key)


@pytest.mark.parametrize("absent", ["one-to-one", "one-to-many"])
def test_a_file_with_one_set_of_branches(tmp_path, absent):
    *_, state = network()
    save_file(without(state, absent), tmp_path / "x.safetensors", {"names": json.dumps(CLASSES)})
    report, adopted = convert.convert(tmp_path / "x.safetensors", tmp_path / "run")
    assert report.complete and report.absent_branch == absent
    assert f"the file has no {absent} branch: it starts as a copy" in "\n".join(report.lines())
    assert adopted.config.model == "tiny-26-t"
    trained = inference.load(tmp_path / "run")
    has = absent == "one-to-many"
    assert trained.task.end_to_end is has
    with pytest.raises(ConfigError, match=f"without the {absent} branch: use end_to_end={has}"):
        trained.with_end_to_end(not has)
    got = weights.to_reference(trained.params) | weights.to_reference(trained.stats)
    for key, value in got.items():
        plain = key.replace(".one2one_", ".")
        twin = plain if has is False else plain.replace("model.6.cv", "model.6.one2one_cv")
        source = twin if plain.startswith(("model.6.cv2", "model.6.cv3")) else key
        np.testing.assert_array_equal(value, state[source], key)


@pytest.mark.parametrize("absent", ["", "one-to-one", "one-to-many"])
def test_a_file_whose_batch_norms_were_folded(tmp_path, absent):
    model, params, stats, state = network()
    anchors = yolo.anchors(64, 64, model.strides)
    small = jax.tree.map(lambda a: a * np.float32(0.1), params)  # outputs of a size to compare
    state = weights.for_pytorch(model, small, stats)
    save_file(
        without(folded(state), absent) if absent else folded(state), tmp_path / "x.safetensors"
    )
    report, _ = convert.convert(tmp_path / "x.safetensors", tmp_path / "run")
    assert report.complete and report.folded and report.absent_branch == absent
    assert "bn_group=frozen" in "\n".join(report.lines())
    trained = inference.load(tmp_path / "run")
    raw, ours = (
        model.apply({"params": p, "batch_stats": s}, image(0)[None])
        for p, s in ((small, stats), (trained.params, trained.stats))
    )
    if absent == "one-to-many":
        raw, ours = raw.one_to_one, ours.one_to_one
    for a, b in zip(yolo.decode(raw, anchors), yolo.decode(ours, anchors), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_other_classes():
    """The last layers of both class branches follow the names; both box branches are kept."""
    *_, state = network()
    ours = ("cat", "bird", "person", "fish")
    task = task_of("tiny-26-t", 4)
    params, stats = task.initialise(1)
    new, _, report = weights.transfer(Weights(state, CLASSES), task.model, params, stats, ours)
    assert set(report.remapped) == {
        f"model.6.{prefix}cv3.{i}.2.{leaf}"
        for prefix in ("", "one2one_") for i in range(2) for leaf in ("weight", "bias")
    }  # fmt: skip
    got, before = weights.to_reference(new), weights.to_reference(params)
    for prefix in ("", "one2one_"):
        key = f"model.6.{prefix}cv3.1.2.bias"
        np.testing.assert_array_equal(got[key][[0, 2]], state[key][[2, 0]])
        np.testing.assert_array_equal(got[key][[1, 3]], before[key][[1, 3]])
        key = f"model.6.{prefix}cv2.1.2.bias"
        np.testing.assert_array_equal(got[key], state[key])


def test_a_class_branch_of_another_width():
    *_, state = network(80)
    task = task_of("tiny-26-t", 3)
    params, stats = task.initialise(1)
    names = tuple(f"c{i}" for i in range(80))
    *_, report = weights.transfer(Weights(state, names), task.model, params, stats, CLASSES)
    assert {key.split(".")[2] for key in report.left} == {"cv3", "one2one_cv3"}
    assert not report.unused


@pytest.mark.slow
@pytest.mark.parametrize(("of", "into"), [("yolo26-n", "yolo11-n"), ("yolo11-n", "yolo26-n")])
def test_weights_of_the_other_family(tmp_path, of, into):
    """SPPF and most of the backbone look alike and do not compute the same: it is said."""
    state = {k: np.broadcast_to(np.float32(1), s) for k, s in shapes(of, 3).items()}
    assert weights.guess_model(Weights(state)) == of
    task = task_of(into)
    *_, report = weights.transfer(Weights(state, CLASSES), task.model, *task.initialise(0), CLASSES)
    assert not report.complete and f"the file fits {of} whole" in report.lines()[-1]
    save_file({k: np.array(v) for k, v in state.items()}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=f"fits {of} whole"):
        convert.convert(tmp_path / "x.safetensors", tmp_path / "run", into)
    assert not (tmp_path / "run").exists()
    assert initial.read(tmp_path / "x.safetensors").classes == 3


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["", "--end_to_end", "--noend_to_end"])
def test_the_verbs(workdir, tmp_path, flag):
    """The tiny family is registered by the tests alone."""
    draw.save_image(tmp_path / "a.png", image(0))

    def run(verb, *args):
        code = f"import runpy, tiny; runpy.run_module('jaxaccum.{verb}', run_name='__main__')"
        tests = Path(__file__).parents[1]
        environment = {**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}"}
        words = [f"--workdir={workdir}", *args, *filter(None, [flag])]
        return subprocess.run(
            [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True,
            check=True,
        ).stdout  # fmt: skip

    chosen = flag == "--end_to_end"
    said = run("evaluate").splitlines()
    assert json.loads(said[-1])["end_to_end"] is chosen
    way = "by the one-to-one branch" if chosen else "by the one-to-many branch and NMS"
    assert any(way in line for line in said)
    run("predict", f"--source={tmp_path / 'a.png'}", f"--out={tmp_path / 'out'}", "--conf=0.3")
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert found[0]["end_to_end"] is chosen and found[0]["detections"]
    run("export", f"--out={tmp_path / 'x.stablehlo'}")
    facts = json.loads((tmp_path / "x.stablehlo.json").read_text())
    assert facts["end_to_end"] is chosen
