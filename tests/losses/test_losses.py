"""Assignment and loss against a plain reading of the papers, one image and one object at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxaccum.losses import detection
from jaxaccum.losses.boxes import complete_iou
from jaxaccum.models import yolo

STRIDES = (8, 16, 32)
ASSIGN = jax.jit(detection.assign, static_argnums=4)
OVERLAPS = jax.jit(complete_iou)


def test_complete_iou_of_two_boxes(x64):
    a, b = jnp.array([0, 0, 10, 20.0]), jnp.array([5, 5, 18, 21.0])
    assert float(complete_iou(a, b)) == pytest.approx(0.15775886513447468, rel=1e-9)


def test_distribution_focal_loss(x64):
    logits = 0.1 * jnp.arange(64.0)
    loss = detection.distribution_focal_loss(logits, jnp.array([0.3, 3.7, 14.995, 7.0]))
    assert float(loss.mean()) == pytest.approx(2.9769014478028932, rel=1e-12)


def detection_loss(predictions, anchors, targets):
    return jax.jit(lambda p, t: detection.detection_loss(p, anchors, t))(predictions, targets)


def scene(seed, samples=2, objects=5, classes=3, size=64, spread=1.0):
    """Random predictions near random objects."""
    rng = np.random.default_rng(seed)
    anchors = yolo.anchors(size, size, STRIDES)
    count = len(anchors.strides)
    boxes = rng.normal(0, spread, (samples, count, 64))
    scores = rng.normal(-1, 1.5, (samples, count, classes))
    corner = rng.uniform(0, size * 0.7, (samples, objects, 2))
    side = rng.uniform(2, size * 0.6, (samples, objects, 2))
    gt = np.concatenate([corner, np.minimum(corner + side, size)], -1)
    counts = rng.integers(0, objects + 1, samples)
    targets = detection.Targets(
        gt, rng.integers(0, classes, (samples, objects)).astype(np.int32),
        np.arange(objects) < counts[:, None], np.ones(samples),
    )  # fmt: skip
    return yolo.Predictions(jnp.asarray(boxes), jnp.asarray(scores)), anchors, targets


def plain_assignment(scores, boxes, centres, gt, classes, smallest):
    """The rule, in loops. scores are probabilities; one image; only real objects."""
    count, points = len(gt), len(centres)
    overlap, metric = np.zeros((count, points)), np.zeros((count, points))
    iou = np.asarray(OVERLAPS(jnp.asarray(gt)[:, None], jnp.asarray(boxes)[None]))
    for g, (box, c) in enumerate(zip(gt, classes, strict=True)):
        middle = (box[:2] + box[2:]) / 2
        half = np.maximum(box[2:] - box[:2], smallest) / 2
        low, high = middle - half, middle + half
        for p, centre in enumerate(centres):
            if min(*(centre - low), *(high - centre)) > 1e-9:
                o = max(iou[g, p], 0.0)
                overlap[g, p], metric[g, p] = o, scores[p, c] ** 0.5 * o**6
    chosen = np.zeros((count, points), bool)
    for g in range(count):
        best = np.argsort(-metric[g], kind="stable")[:10]
        chosen[g, best] = metric[g, best] > 0
    for p in np.flatnonzero(chosen.sum(0) > 1):
        chosen[:, p] = np.arange(count) == overlap[:, p].argmax()
    score = np.zeros(points)
    for g in range(count):
        mine = chosen[g]
        if mine.any():
            top = metric[g, mine].max()
            score[mine] = metric[g, mine] * overlap[g, mine].max() / (top + 1e-9)
    return chosen, score


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), objects=st.sampled_from([1, 5, 20]))
def test_assignment_is_the_plain_rule(seed, objects):
    with jax.enable_x64(True):
        predictions, anchors, targets = scene(seed, objects=objects)
        boxes, scores = yolo.decode(predictions, anchors)
        centres = anchors.centres * anchors.strides[:, None]
        found = ASSIGN(predictions.scores, boxes, jnp.asarray(centres), targets, 16.0)
        for i in range(2):
            n = int(targets.valid[i].sum())
            chosen, score = plain_assignment(
                np.asarray(scores[i]), np.asarray(boxes[i]), centres, targets.boxes[i, :n],
                targets.classes[i, :n], 16.0,
            )  # fmt: skip
            np.testing.assert_array_equal(found.foreground[i], chosen.any(0))
            np.testing.assert_allclose(found.score[i], score, rtol=1e-10, atol=1e-15)
            for p in np.flatnonzero(chosen.any(0)):
                assert found.object[i, p] == chosen[:, p].argmax()


@pytest.mark.parametrize("objects", [1, 20, 70, 130])
def test_gpus_assign_alike(x64, monkeypatch, objects):
    """There the chunks are larger, and all are compared, not as many as the fullest image needs."""
    predictions, anchors, targets = scene(7, objects=objects)
    boxes, _ = yolo.decode(predictions, anchors)
    centres = jnp.asarray(anchors.centres * anchors.strides[:, None])
    wanted = detection.assign(predictions.scores, boxes, centres, targets, 16.0)
    asked = []

    def on_cuda(*args, cuda, rocm, default):
        asked.append(cuda is rocm)
        return cuda(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", on_cuda)
    found = detection.assign(predictions.scores, boxes, centres, targets, 16.0)
    assert asked == [True] and int(found.foreground.sum()) > 0
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_terms_are_the_plain_sums(x64):
    predictions, anchors, targets = scene(4)
    numerators, denominators, assignment = detection_loss(predictions, anchors, targets)
    t = np.zeros(predictions.scores.shape)
    box = dfl = 0.0
    decoded = np.asarray(yolo.decode_boxes(predictions.boxes, anchors))
    for i, p in zip(*np.nonzero(assignment.foreground), strict=True):
        g, weight = int(assignment.object[i, p]), float(assignment.score[i, p])
        t[i, p, targets.classes[i, g]] = weight
        wanted = targets.boxes[i, g] / anchors.strides[p]
        box += weight * (1 - float(complete_iou(jnp.asarray(decoded[i, p]), jnp.asarray(wanted))))
        sides = np.concatenate([anchors.centres[p] - wanted[:2], wanted[2:] - anchors.centres[p]])
        logp = np.asarray(jax.nn.log_softmax(predictions.boxes[i, p].reshape(4, 16)))
        for side, distance in enumerate(np.clip(sides, 0, 14.99)):
            left = int(distance)
            dfl -= weight / 4 * (
                (left + 1 - distance) * logp[side, left] + (distance - left) * logp[side, left + 1]
            )  # fmt: skip
    p = 1 / (1 + np.exp(-np.asarray(predictions.scores)))
    cls = -(t * np.log(p) + (1 - t) * np.log(1 - p)).sum()
    assert float(numerators["box"]) == pytest.approx(box, rel=1e-10)
    assert float(numerators["dfl"]) == pytest.approx(dfl, rel=1e-10)
    assert float(numerators["cls"]) == pytest.approx(cls, rel=1e-10)
    assert float(denominators["target_scores"]) == pytest.approx(t.sum(), rel=1e-12)


def test_a_padded_sample_adds_nothing(x64):
    predictions, anchors, targets = scene(5, samples=3)
    padded = targets._replace(weight=np.array([1.0, 1.0, 0.0]))
    whole = detection_loss(predictions, anchors, padded)
    first = detection_loss(
        *jax.tree.map(lambda a: a[:2], (predictions,)), anchors,
        jax.tree.map(lambda a: a[:2], targets),
    )  # fmt: skip
    for a, b in zip(jax.tree.leaves(whole[:2]), jax.tree.leaves(first[:2]), strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-12)


def test_images_never_interact(x64):
    """Sums over one image at a time are the sums over the batch, padding of objects included."""
    predictions, anchors, targets = scene(6, samples=4, objects=40)
    whole = detection_loss(predictions, anchors, targets)[:2]
    loss = jax.jit(lambda p, t: detection.detection_loss(p, anchors, t))
    parts = [
        loss(*jax.tree.map(lambda a, i=i: a[i : i + 1], (predictions, targets)))[:2]
        for i in range(4)
    ]
    for total, *each in zip(*map(jax.tree.leaves, (whole, *parts)), strict=True):
        assert float(total) == pytest.approx(sum(map(float, each)), rel=1e-12)


def test_no_objects():
    predictions, anchors, targets = scene(7)
    empty = targets._replace(valid=np.zeros_like(targets.valid))
    gradient = jax.jit(jax.grad(lambda p: detection.detection_loss(p, anchors, empty)[0]["box"]))(
        predictions
    )
    numerators, denominators, assignment = detection_loss(predictions, anchors, empty)
    assert not assignment.foreground.any() and float(denominators["target_scores"]) == 0
    assert float(numerators["box"]) == float(numerators["dfl"]) == 0 < float(numerators["cls"])
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(gradient))


def test_memory_does_not_grow_with_objects():
    """A thousand objects an image take about the room of a hundred."""

    def temporary(objects):
        predictions, anchors, targets = scene(8, samples=1, objects=objects, size=320)
        step = jax.jit(lambda p, t: detection.detection_loss(p, anchors, t)[0])
        return step.lower(predictions, targets).compile().memory_analysis().temp_size_in_bytes

    assert temporary(1000) < 1.2 * temporary(100)
