"""The loss of two sets of branches against a plain reading of its rules, an object at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from losses.test_losses import OVERLAPS, STRIDES

from jaxaccum.losses import detection
from jaxaccum.losses.boxes import complete_iou
from jaxaccum.models import yolo

ONE = detection.Choice(detection.TOP_K_ONE, single=True)
ASSIGN = jax.jit(detection.assign, static_argnums=(4, 5, 6))


def loss(predictions, anchors, targets):
    return jax.jit(lambda p, t: detection.loss_of_two(p, anchors, t))(predictions, targets)


def scene(seed, samples=2, objects=5, classes=3, size=(64, 96), smallest=2.0):
    """Distances and classes near random objects; some boxes are inside out."""
    rng = np.random.default_rng(seed)
    height, width = size
    anchors = yolo.anchors(height, width, STRIDES)
    side = np.array([width, height])
    corner = rng.uniform(0, 0.7, (samples, objects, 2)) * side
    length = rng.uniform(smallest, 0.6 * height, (samples, objects, 2))
    gt = np.concatenate([corner, np.minimum(corner + length, side)], -1)
    counts = rng.integers(0, objects + 1, samples)
    counts[0] = objects
    targets = detection.Targets(
        gt, rng.integers(0, classes, (samples, objects)).astype(np.int32),
        np.arange(objects) < counts[:, None], np.ones(samples),
    )  # fmt: skip

    def branch():
        boxes = rng.normal(1.5, 1.5, (samples, len(anchors.strides), 4))
        scores = rng.normal(-1, 1.5, (samples, len(anchors.strides), classes))
        return yolo.Predictions(jnp.asarray(boxes), jnp.asarray(scores))

    return branch()._replace(one_to_one=branch()), anchors, targets


def plain_single(scores, boxes, centres, gt, classes, smallest, most=7):
    """One-to-one, in loops: the anchor of each object or None, of one image's real objects, and the
    soft target of each anchor."""
    count, points = len(gt), len(centres)
    overlap, metric = np.zeros((count, points)), np.zeros((count, points))
    iou = np.asarray(OVERLAPS(jnp.asarray(gt)[:, None], jnp.asarray(boxes)[None]))
    for g in range(count):
        middle, half = (gt[g, :2] + gt[g, 2:]) / 2, np.maximum(gt[g, 2:] - gt[g, :2], smallest) / 2
        inside = np.all(np.abs(centres - middle) < half - 1e-9, axis=1)
        overlap[g] = np.where(inside, np.maximum(iou[g], 0), 0)
        metric[g] = scores[:, classes[g]] ** 0.5 * overlap[g] ** 6
    takers: dict[int, list[int]] = {}
    for g in range(count):
        for p in np.argsort(-metric[g], kind="stable")[:most]:
            if metric[g, p] > 0:
                takers.setdefault(int(p), []).append(g)
    held: dict[int, list[int]] = {}
    for p, own in sorted(takers.items()):
        g = own[0] if len(own) == 1 else int(overlap[:, p].argmax())
        held.setdefault(g, []).append(p)
    target, kept = np.zeros(points), {}
    for g, own in held.items():
        best = max(own, key=lambda p: (metric[g, p], -p))
        kept[g] = best
        target[best] = metric[g, best] * overlap[g, best] / (metric[g, best] + 1e-9)
    return kept, target


@pytest.mark.parametrize("objects", [1, 5, 20])
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_one_to_one_is_the_plain_rule(objects, seed):
    with jax.enable_x64(True):
        predictions, anchors, targets = scene(seed, objects=objects)
        boxes, scores = yolo.decode(predictions, anchors)
        centres = anchors.centres * anchors.strides[:, None]
        found = ASSIGN(predictions.scores, boxes, jnp.asarray(centres), targets, 16.0, ONE, True)
        for i in range(2):
            n = int(targets.valid[i].sum())
            kept, target = plain_single(
                np.asarray(scores[i]), np.asarray(boxes[i]), centres, targets.boxes[i, :n],
                targets.classes[i, :n], 16.0,
            )  # fmt: skip
            ours = np.flatnonzero(found.foreground[i])
            assert {int(found.object[i, p]): int(p) for p in ours} == kept
            assert len(ours) == len(kept)  # none has two
            np.testing.assert_allclose(found.score[i], target, rtol=1e-10, atol=1e-15)


def test_the_conflicts_come_before_the_choice(x64):
    """Seven, then one: a plain top-1 gives another assignment in a crowd."""
    predictions, anchors, targets = scene(3, objects=20)
    boxes, _ = yolo.decode(predictions, anchors)
    centres = jnp.asarray(anchors.centres * anchors.strides[:, None])
    seven, one = (
        ASSIGN(predictions.scores, boxes, centres, targets, 16.0, choice, True)
        for choice in (ONE, detection.Choice(1, single=True))
    )
    assert not np.array_equal(seven.foreground, one.foreground)


def test_of_equal_anchors_the_first(x64):
    """Two anchors with the same box and score in one object."""
    anchors = yolo.Anchors(np.float32([[0.5, 0.5], [1.5, 0.5], [2.5, 0.5]]), np.float32([8] * 3))
    targets = detection.Targets(
        np.array([[[0.0, 0, 24, 8]]]), np.zeros((1, 1), np.int32), np.ones((1, 1), bool), np.ones(1)
    )
    boxes = jnp.asarray([[[0.0, 0, 20, 8], [0.0, 0, 22, 8], [0.0, 0, 22, 8]]])
    found = detection.assign(
        jnp.zeros((1, 3, 1)), boxes, jnp.asarray(anchors.centres * 8), targets, 0.0, ONE
    )
    assert found.foreground.tolist() == [[False, True, False]]


@pytest.mark.parametrize("objects", [1, 20, 70, 130])
def test_gpus_assign_alike(x64, monkeypatch, objects):
    predictions, anchors, targets = scene(7, objects=objects)
    boxes, _ = yolo.decode(predictions, anchors)
    centres = jnp.asarray(anchors.centres * anchors.strides[:, None])
    wanted = detection.assign(predictions.scores, boxes, centres, targets, 16.0, ONE)
    asked = []

    def on_cuda(*args, cuda, rocm, default):
        asked.append(cuda is rocm)
        return cuda(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", on_cuda)
    found = detection.assign(predictions.scores, boxes, centres, targets, 16.0, ONE)
    assert asked == [True, True] and int(found.foreground.sum()) > 0
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_terms_are_the_plain_sums(x64):
    """Of both branches; an input that is wider than high."""
    predictions, anchors, targets = scene(4)
    found, sums, both = loss(predictions, anchors, targets)
    for prefix, branch, name, assigned in (
        ("", predictions, "one_to_many", both[0]),
        ("one_to_one_", predictions.one_to_one, "one_to_one", both[1]),
    ):
        decoded = np.asarray(yolo.decode_boxes(branch.boxes, anchors))
        t, box, l1 = np.zeros(branch.scores.shape), 0.0, 0.0
        for i, p in zip(*np.nonzero(assigned.foreground), strict=True):
            g, weight = int(assigned.object[i, p]), float(assigned.score[i, p])
            t[i, p, targets.classes[i, g]] = weight
            stride = anchors.strides[p]
            wanted = targets.boxes[i, g] / stride
            box += weight * (1 - float(OVERLAPS(jnp.asarray(decoded[i, p]), jnp.asarray(wanted))))
            sides = np.concatenate(
                [anchors.centres[p] - wanted[:2], wanted[2:] - anchors.centres[p]]
            )
            error = stride * np.abs(np.asarray(branch.boxes)[i, p] - sides)
            l1 += weight / 4 * np.sum(error / [96, 64, 96, 64])
        p = 1 / (1 + np.exp(-np.asarray(branch.scores)))
        cls = -(t * np.log(p) + (1 - t) * np.log(1 - p)).sum()
        assert l1 > 0 and t.sum() > 0
        for term, value in (("box", box), ("cls", cls), ("l1", l1)):
            assert float(found[prefix + term]) == pytest.approx(value, rel=1e-10)
        assert float(sums[name]) == pytest.approx(t.sum(), rel=1e-12)
    assert found.keys() == {t.name for t in detection.terms_of_two()}


def test_each_branch_has_its_own_targets(x64):
    """Of one branch's predictions the other's terms know nothing."""
    predictions, anchors, targets = scene(5)
    other = scene(6)[0]
    first = loss(predictions, anchors, targets)
    second = loss(predictions._replace(one_to_one=other.one_to_one), anchors, targets)
    changed = {k for k in first[0] if float(first[0][k]) != float(second[0][k])}
    assert changed == {"one_to_one_box", "one_to_one_cls", "one_to_one_l1"}


def test_an_object_alone_is_below_the_floor(x64):
    """A soft target of one-to-one is its overlap, below 1; one-to-many's add up."""
    predictions, anchors, targets = scene(8, samples=1, objects=1, smallest=30.0)
    _, sums, assigned = loss(predictions, anchors, targets)
    assert int(assigned[1].foreground.sum()) == 1 < int(assigned[0].foreground.sum()) <= 10
    assert 0 < float(sums["one_to_one"]) < 1


def test_no_objects():
    predictions, anchors, targets = scene(7)
    empty = targets._replace(valid=np.zeros_like(targets.valid))

    def total(p):
        found = loss(p, anchors, empty)
        return sum(found[0].values()), found

    (_, (numerators, sums, assigned)), gradient = jax.value_and_grad(total, has_aux=True)(
        predictions
    )
    assert not any(one.foreground.any() for one in assigned)
    assert all(float(value) == 0 for value in sums.values())
    for prefix in ("", "one_to_one_"):
        assert float(numerators[f"{prefix}box"]) == float(numerators[f"{prefix}l1"]) == 0
        assert float(numerators[f"{prefix}cls"]) > 0
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(gradient))


@pytest.mark.parametrize("shape", ["height", "union"])
def test_boxes_inside_out_have_finite_overlaps(x64, shape):
    """Where the formula divides by zero: a height of exactly -eps, a union of exactly zero."""
    eps = 2.0**-20
    inside_out = {
        "height": [0.0, eps, 2.0, 0.0],  # height -eps + eps
        "union": [0.0, 0.0, 2.0, -1.0 - eps],  # area 2 * -1, beside one of 1 * (2 - eps)
    }[shape]
    other = [5.0, 5.0, 6.0, 7.0 - 2 * eps]

    def overlap(box):
        return complete_iou(box, jnp.asarray(other), eps=eps, inverted=True)

    value, gradient = jax.value_and_grad(overlap)(jnp.asarray(inside_out))
    assert np.isfinite(value) and np.isfinite(gradient).all()
    plain = jax.value_and_grad(lambda b: complete_iou(b, jnp.asarray(other), eps=eps))
    assert not all(np.isfinite(a).all() for a in plain(jnp.asarray(inside_out)))


def test_the_guard_changes_no_other_overlap(x64):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 1000, 4))
    plain, guarded = (complete_iou(a, b, inverted=flag) for flag in (False, True))
    np.testing.assert_array_equal(plain, guarded)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("model.23/one2one_cv2.0.0/conv/kernel", "one_to_one"),
        ("model.23/one2one_cv3.2.2/bias", "one_to_one"),
        ("model.23/cv2.0.0/conv/kernel", "one_to_many"),
        ("model.9/cv1/bn/bias", "one_to_many"),
    ],
)
def test_who_owns_a_parameter(path, name):
    assert detection.owner_of(path) == name
