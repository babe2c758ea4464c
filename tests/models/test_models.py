"""Models: sizes, names, initial values, weights under the reference's keys."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccum import models
from jaxaccum.models import init, yolo
from jaxaccum.weights import transfer as weights

# Trainable parameters with 80 classes, and batch-norm layers.
SIZES = {
    "yolov8-n": (3_157_184, 57), "yolov8-s": (11_166_544, 57), "yolov8-m": (25_902_624, 77),
    "yolov8-l": (43_691_504, 97), "yolov8-x": (68_229_632, 97),
    "yolov8-p2-n": (3_354_128, 70), "yolov8-p2-s": (10_884_320, 70),
    "yolov8-p2-m": (25_082_480, 94), "yolov8-p2-l": (42_888_064, 118),
    "yolov8-p2-x": (66_637_520, 118),
    "yolo11-n": (2_624_064, 81), "yolo11-s": (9_458_736, 81), "yolo11-m": (20_114_672, 106),
    "yolo11-l": (25_372_144, 167), "yolo11-x": (56_966_160, 167),
    "yolo11-p2-n": (2_740_016, 96), "yolo11-p2-s": (9_625_952, 96),
    "yolo11-p2-m": (20_591_104, 131), "yolo11-p2-l": (26_116_352, 206),
    "yolo11-p2-x": (57_849_440, 206),
    "yolo12-n": (2_602_272, 113), "yolo12-s": (9_284_080, 113), "yolo12-m": (20_199_152, 123),
    "yolo12-l": (26_450_768, 205), "yolo12-x": (59_210_768, 205),
    "yolo12-p2-n": (2_715_248, 133), "yolo12-p2-s": (9_439_200, 133),
    "yolo12-p2-m": (20_593_408, 148), "yolo12-p2-l": (27_112_800, 244),
    "yolo12-p2-x": (59_909_344, 244),
    "yolov12-turbo-n": (2_553_888, 121), "yolov12-turbo-s": (9_127_408, 121),
    "yolov12-turbo-m": (19_670_768, 131), "yolov12-turbo-l": (26_506_480, 221),
    "yolov12-turbo-x": (59_414_160, 221),
    "yolo26-n": (2_572_280, 114), "yolo26-s": (10_009_784, 114), "yolo26-m": (21_896_248, 124),
    "yolo26-l": (26_299_704, 178), "yolo26-x": (58_993_368, 178),
    "yolo26-p2-n": (2_662_400, 145), "yolo26-p2-s": (9_765_856, 145),
    "yolo26-p2-m": (21_144_288, 155), "yolo26-p2-l": (25_815_520, 223),
    "yolo26-p2-x": (57_935_232, 223),
}  # fmt: skip


def shapes(name, classes=80):
    model = models.create(name, num_classes=classes)
    example = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return model, jax.eval_shape(lambda x: model.init(jax.random.key(0), x), example)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    _, variables = shapes(name)
    leaves = jax.tree.leaves(variables["params"])
    layers = len(jax.tree.leaves(variables["batch_stats"])) // 2
    assert (sum(math.prod(a.shape) for a in leaves), layers) == SIZES[name]


def test_strides():
    assert models.create("yolov8-n", num_classes=1).strides == (8, 16, 32)
    assert models.create("yolov8-p2-n", num_classes=1).strides == (4, 8, 16, 32)


@pytest.mark.parametrize("name", ["yolov8-q", "yolo8-n", "resnet"])
def test_an_unknown_name_suggests(name):
    with pytest.raises(ValueError, match=r"yolov8-n"):
        models.create(name, num_classes=3)


def test_initial_values():
    model = models.create("tiny-t", num_classes=3)
    example = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    params, stats = models.initialise(model, example, 0, yolo.initial_constants(model))
    kernel = params["model.1"]["conv"]["kernel"]
    bound = 1 / math.sqrt(math.prod(kernel.shape[:-1]))
    assert np.abs(kernel).max() <= bound
    assert kernel.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert (stats["model.0"]["bn"]["var"] == 1).all()
    head = params["model.5"]
    assert (head["cv2.0.2"]["bias"] == 2).all()
    assert head["cv3.1.2"]["bias"][0] == pytest.approx(math.log(5 / 3 / (640 / 16) ** 2))
    again, _ = models.initialise(model, example, 0, yolo.initial_constants(model))
    other, _ = models.initialise(model, example, 1, yolo.initial_constants(model))
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(again)))
    assert not np.array_equal(kernel, other["model.1"]["conv"]["kernel"])


def test_initial_logits_expect_five_objects():
    """The sum of class probabilities of an empty image starts near 5 per level and class set."""
    model = models.create("tiny-t", num_classes=80)
    params, stats = models.initialise(
        model, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32), 0, yolo.initial_constants(model)
    )
    out = model.apply({"params": params, "batch_stats": stats}, jnp.zeros((1, 640, 640, 3)))
    assert 4 < float(jax.nn.sigmoid(out.scores).sum()) < 20


def test_uint8_is_scaled():
    model = models.create("tiny-t", num_classes=3)
    params, stats = models.initialise(model, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32), 0)
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    variables = {"params": params, "batch_stats": stats}
    a, b = model.apply(variables, image), model.apply(variables, image / np.float32(255))
    np.testing.assert_allclose(a.scores, b.scores, rtol=1e-5, atol=1e-5)


def test_reference_names_round_trip():
    model = models.create("tiny-t", num_classes=3)
    example = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params, stats = models.initialise(model, example, 0)
    state = weights.to_reference(params) | weights.to_reference(stats)
    assert state["model.3.m.0.cv1.conv.weight"].shape == (8, 8, 3, 3)
    assert state["model.5.cv3.1.2.bias"].shape == (3,)
    blank = jax.tree.map(np.zeros_like, (params, stats))
    filled = weights.from_reference(state, *blank)
    assert all(map(np.array_equal, jax.tree.leaves(filled), jax.tree.leaves((params, stats))))
    del state["model.0.bn.bias"]
    with pytest.raises(KeyError, match=r"model\.0\.bn\.bias"):
        weights.from_reference(state, *blank)


def test_anchors_are_row_major_fine_to_coarse():
    points = yolo.anchors(32, 64, (16, 32))
    np.testing.assert_array_equal(points.centres[:5], [[.5, .5], [1.5, .5], [2.5, .5], [3.5, .5], [.5, 1.5]])  # fmt: skip  # noqa: E501
    np.testing.assert_array_equal(points.strides, [16] * 8 + [32] * 2)


def test_count():
    assert init.count({"a": np.zeros((2, 3)), "b": {"c": np.zeros(4)}}) == 10
