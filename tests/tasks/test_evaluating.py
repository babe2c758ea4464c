"""Several devices evaluate as one does: the same numbers, to the last digit."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny
import tiny_completion

from jaxaccum import tasks
from jaxaccum.tasks import evaluating


def evaluated(config, monkeypatch, number):
    monkeypatch.setattr(evaluating, "of_evaluation", lambda: jax.local_devices()[:number])
    kind = tasks.of(config)
    source = kind.open(config, "val")
    names = source.names
    task = kind.create(config, names, np.dtype(np.float32))
    rng = np.random.default_rng(0)
    params, stats = task.initialise(0)
    # Away from the start, where a detector finds the same everywhere.
    params = jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape).astype(a.dtype), params)
    evaluator = task.evaluator(config, source)
    found, pictures = evaluator(params, stats, 3)
    measured = getattr(evaluator, "measured", None)
    boxes = {name: row.detections for name, row in getattr(measured, "_images", {}).items()}
    return found, pictures, boxes


def same(first, second):
    (one, drawn, boxes), (other, also, others) = first, second
    assert one.keys() == other.keys() and len(one) > 5
    np.testing.assert_array_equal(list(one.values()), list(other.values()))
    assert boxes.keys() == others.keys()
    for name in boxes:
        for part in ("boxes", "scores", "classes"):
            a, b = (getattr(of[name], part) for of in (boxes, others))
            np.testing.assert_array_equal(a, b)
    assert len(drawn) == len(also) > 0
    for a, b in zip(drawn, also, strict=True):
        np.testing.assert_array_equal(a, b)


CONFIGS = {
    "boxes": lambda **more: tiny.tiny_config(**{"eval.conf": 0.0, "eval.batch": 14} | more),
    "rectangles": lambda **more: tiny.tiny_config(
        **{"eval.conf": 0.0, "eval.batch": 6, "eval.rect": True} | more
    ),
    "one to one": lambda **more: tiny.tiny_config(
        **{"model": "tiny-26-t", "eval.end_to_end": True, "eval.conf": 0.0, "eval.batch": 14} | more
    ),
    "streets": lambda **more: tiny.tiny_config3d(**{"eval.conf": 0.0, "eval.batch": 6} | more),
    "clouds": lambda **more: tiny_completion.tiny_config(**{"eval.batch": 6} | more),
    "captions": lambda **more: tiny_completion.tiny_config(
        **{"eval.batch": 6} | tiny_completion.CAPTIONED | more
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.long] * (k == "captions")) for k in CONFIGS]
)
def test_four_devices_find_what_one_does(kind, monkeypatch):
    config = CONFIGS[kind]()
    one = evaluated(config, monkeypatch, 1)
    same(one, evaluated(config, monkeypatch, 4))
    if config.task == "detection":
        assert sum(len(found.scores) for found in one[2].values()) > 100
    if config.task == "completion":
        assert 0 < one[0]["cd_l1"] < np.inf


def batch(size, start, side=2):
    rows = np.arange(start, start + size)
    return {
        "image": np.repeat(rows, side).reshape(size, side), "index": rows,
        "weight": np.ones(size, np.float32),
    }  # fmt: skip


def test_batches_of_one_shape_are_joined():
    given = [batch(2, 0), batch(2, 2), batch(2, 4), batch(2, 6, side=3)]
    first, second, third = evaluating._merged(given, 2)
    assert first["index"].tolist() == [0, 1, 2, 3] and first["image"].shape == (4, 2)
    assert second["index"].tolist() == [4, 5, -1, -1]
    assert second["weight"].tolist() == [1, 1, 0, 0]
    np.testing.assert_array_equal(second["image"][2:], second["image"][:2])
    assert third["image"].shape == (4, 3) and third["index"].tolist() == [6, 7, -1, -1]
    assert all(g["index"].min() >= 0 for g in given)  # what was given is as it was


def test_a_cpu_evaluates_by_one_device():
    assert len(jax.local_devices()) == 4
    assert list(evaluating.of_evaluation()) == jax.local_devices()[:1]


@pytest.mark.parametrize("rows", [4, 8])
def test_every_device_predicts_its_part(monkeypatch, rows):
    monkeypatch.setattr(evaluating, "of_evaluation", jax.local_devices)
    seen, lowered = [], []

    @jax.jit
    def predict(params, stats, image):
        lowered.append(image.shape)
        return params * image.sum(1) + stats

    batches = [batch(rows // 4, rows // 4 * i) for i in range(6)]
    evaluating.overlapped(
        predict, np.float32(3), np.float32(1), batches, lambda b: (b["image"],),
        lambda b, output: seen.append((b["index"], output)), 6 * rows // 4, "rows",
    )  # fmt: skip
    assert [index.shape for index, _ in seen] == [(rows,)] * 2
    assert all(len(output.sharding.device_set) == 4 for _, output in seen)
    assert lowered == [(rows // 4, 2)]  # once, and each device a batch as it was given
    index = np.concatenate([index for index, _ in seen])
    found = np.concatenate([np.asarray(output) for _, output in seen])
    real = index >= 0
    assert index[real].tolist() == list(range(6 * rows // 4))
    np.testing.assert_array_equal(found[real], 6.0 * index[real] + 1)
