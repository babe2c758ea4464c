"""Rectangular evaluation: what one image at a time in its rectangle gives, and few programs."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import tiny
import tiny_completion

from jaxaccum import config as configs
from jaxaccum import data, full_evaluation, tasks
from jaxaccum.data import Objects, Report
from jaxaccum.data import rectangles as choosing
from jaxaccum.metrics import detection as metrics
from jaxaccum.tasks.base import Trained
from jaxaccum.tasks.detection import Evaluator

SIZES = [(60, 100), (100, 60), (90, 90), (30, 120), (120, 25), (48, 64), (64, 50)]
COUNT = 63


class Pictures:
    """Bright boxes on noise, in images of many shapes."""

    names = ("a", "b")
    identity = "0" * 12

    def __init__(self):
        self.report = Report("pictures")

    def __len__(self):
        return COUNT

    def size(self, index):
        height, width = SIZES[index % len(SIZES)]
        return height + index // len(SIZES), width

    def objects(self, index):
        height, width = self.size(index)
        rng = np.random.default_rng([1, index])
        low = rng.uniform(0, 0.5, (2, 2)) * [width, height]
        high = low + rng.uniform(0.2, 0.5, (2, 2)) * [width, height]
        boxes = np.concatenate([low, high], axis=1).astype(np.float32)
        return Objects(boxes, rng.integers(0, 2, 2).astype(np.int32))

    def image(self, index):
        image = np.random.default_rng(index).integers(0, 90, (*self.size(index), 3), np.uint8)
        for x1, y1, x2, y2 in self.objects(index).boxes.astype(int):
            image[y1:y2, x1:x2] += 120
        return image

    def name(self, index):
        return f"{index}.png"


@pytest.fixture(autouse=True, scope="module")
def cheap_programs():
    """So that a set of 63 small images has several shapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "_COST", 0)
        yield


def a_task(model="tiny-t", noise=0.3, **changes):
    config = tiny.tiny_config(**{
        "model": model, "data.image_size": 128, "eval.batch": 4, "eval.conf": 0.0,
        "eval.max_det": 40, **changes,
    })  # fmt: skip
    task = tasks.of(config).create(config, Pictures.names, np.dtype(np.float32))
    params, stats = task.initialise(0)
    # Far from where it begins, where all scores are alike.
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: a + noise * rng.standard_normal(a.shape).astype(a.dtype), params
    )
    return config, task, params, stats


@pytest.fixture
def kept(monkeypatch):
    """What goes to the metrics: index -> detections."""
    found, add = {}, metrics.DetectionMetrics.add

    def seen(self, image, detections, *truth):
        found[int(image.split()[0])] = detections
        add(self, image, detections, *truth)

    monkeypatch.setattr(metrics.DetectionMetrics, "add", seen)
    return found


def one_by_one(task, params, stats, options, source, rectangles):
    """Every image alone in its rectangle, by the parts that an evaluation is made of."""
    predict = jax.jit(task.predict)
    for shape, indices in rectangles.groups():
        for index in indices:
            image = source.image(index)
            canvas, ratio, pad = data.letterbox(image, task.image_size, shape)
            arrays = [np.asarray(a[0]) for a in predict(params, stats, canvas[None])]
            limits = {"conf": options.conf, "max_det": options.max_det}
            if task.end_to_end:
                found = metrics.surest(*arrays, **limits)
            else:
                found = metrics.nms(*arrays, **limits, iou=options.iou, multi_label=True)
            boxes = metrics.unletterbox(found.boxes, ratio, pad, image.shape[:2])
            yield index, metrics.Detections(boxes, found.scores, found.classes)


@pytest.mark.parametrize(
    ("model", "noise", "changes"),
    [
        ("tiny-t", 0.3, {}),
        pytest.param("tiny-26-t", 0.05, {"eval.end_to_end": True}, marks=pytest.mark.slow),
    ],
)
def test_it_is_what_each_image_alone_gives(kept, capsys, model, noise, changes):
    config, task, params, stats = a_task(model, noise, **changes)
    source, options = Pictures(), config.eval.copy_and_resolve_references()
    options.rect = True
    evaluator = Evaluator(task, source, options)
    result, _ = evaluator(params, stats)
    ours, shapes = dict(kept), evaluator.rectangles.shapes
    assert f"rect: {len(shapes)} shapes" in capsys.readouterr().out
    assert 3 <= len(shapes) <= 8 and all(v % 32 == 0 for shape in shapes for v in shape)
    assert evaluator._predict._cache_size() == len(shapes)  # a program for each, and no other
    assert sorted(ours) == list(range(COUNT)) == sorted(evaluator.order)
    alone = metrics.DetectionMetrics(source.names)
    for index, found in one_by_one(task, params, stats, options, source, evaluator.rectangles):
        got = ours[index]
        assert len(got) == len(found) > 5
        np.testing.assert_allclose(got.scores, found.scores, atol=1e-5)
        same = np.abs(got.boxes - found.boxes).max(axis=1) < 0.05
        assert same.mean() > 0.9  # neighbours of one score may change places
        truth = source.objects(index)
        alone.add(f"{index} {source.name(index)}", found, truth.boxes, truth.classes,
                  source.size(index))  # fmt: skip
    expected = alone.compute()
    for name in ("map50", "map50_95", "precision", "recall"):
        assert result[name] == pytest.approx(expected[name], abs=2e-3, nan_ok=True)
    assert result["map50"] > 0
    # A second evaluation compiles nothing, and says nothing more.
    again, _ = evaluator(params, stats)
    assert again == result and evaluator._predict._cache_size() == len(shapes)
    assert "rect:" not in capsys.readouterr().out


def test_squares_are_what_they_were(kept):
    config, task, params, stats = a_task()
    evaluator = Evaluator(task, Pictures(), config.eval)
    evaluator(params, stats)
    assert evaluator.rectangles is None and evaluator.order == list(range(COUNT))
    assert evaluator._predict._cache_size() == 1
    square, source = dict(kept), Pictures()
    whole = choosing.Rectangles(128, ((128, 128),), (np.arange(COUNT),))
    for index, found in one_by_one(task, params, stats, config.eval, source, whole):
        np.testing.assert_allclose(square[index].scores, found.scores, atol=1e-5)


@pytest.mark.slow
def test_results_do_not_depend_on_the_batch(kept):
    config, task, params, stats = a_task()
    found = []
    for batch in (4, 16):
        options = config.eval.copy_and_resolve_references()
        options.update(rect=True, batch=batch)
        evaluator = Evaluator(task, Pictures(), options)
        evaluator(params, stats)
        found.append((dict(kept), evaluator.rectangles.shapes, evaluator.order))
    (one, shapes, order), (other, *rest) = found
    assert rest == [shapes, order]
    for index in range(COUNT):
        np.testing.assert_allclose(one[index].scores, other[index].scores, atol=1e-5)


def test_the_first_pictures_are_drawn():
    config, task, params, stats = a_task()
    options = config.eval.copy_and_resolve_references()
    squares = Evaluator(task, Pictures(), options)(params, stats, 3)[1]
    options.rect = True
    rect = Evaluator(task, Pictures(), options)(params, stats, 3)[1]
    assert [one.shape for one in rect] == [one.shape for one in squares] and len(rect) == 3


def trained(config, task, params, stats):
    return Trained(task, params, stats, config, Pictures.names, 0, "", {})


def test_asked_for_in_an_evaluation(monkeypatch, capsys):
    """As the verb and Python do; the result says so."""
    config, task, params, stats = a_task()
    monkeypatch.setattr(type(task), "open", classmethod(lambda *a: Pictures()))
    model = trained(config, task, params, stats)
    plain = full_evaluation.evaluate(model)
    assert "rect" not in plain and "rect:" not in capsys.readouterr().out
    assert plain["speed"]["at"] == "128 px"
    found = full_evaluation.evaluate(model, rect=True)
    assert found["rect"] is True and found["images"] == COUNT
    shapes = found["speed"]["at"].removesuffix(" px").split(", ")
    assert 3 <= len(shapes) <= 8 and "96 x 128" in shapes
    out = capsys.readouterr().out
    assert f"rect: {len(shapes)} shapes, height x width: " in out
    assert "(the first, compiling batch of each shape left out)" in out
    told = found["speed"]
    assert told["samples"] + told["left_out"] == COUNT and told["left_out"] <= 4 * len(shapes)
    json.dumps(found)
    # As the config of the run says; and against it.
    own = full_evaluation.with_rect(model, True)
    assert own.config.eval.rect and not model.config.eval.rect
    assert full_evaluation.evaluate(own)["rect"] is True
    assert "rect" not in full_evaluation.evaluate(own, rect=False)
    assert {k: v for k, v in found.items() if k not in ("speed", "rect")}.keys() == {
        k for k in plain if k != "speed"
    }


def test_it_is_no_part_of_the_recipe():
    """Nothing is learned from it: the fingerprint is that of before, and a run may be continued."""
    made = []
    for rect in (False, True):
        config = tiny.tiny_config(**{"eval.rect": rect})
        made.append(configs.recipe_of(config, 12, {}).fingerprint)
    assert made[0] == made[1]


def test_others_have_no_squares():
    for config in (tiny.tiny_config3d(), tiny_completion.tiny_config()):
        kind = tasks.of(config)
        model = Trained(kind.__new__(kind), {}, {}, config, (), 0, "", {})
        with pytest.raises(configs.ConfigError, match="rect is for detectors"):
            full_evaluation.with_rect(model, True)
        assert full_evaluation.with_rect(model, None) is model
        assert full_evaluation.with_rect(model, False) is model
