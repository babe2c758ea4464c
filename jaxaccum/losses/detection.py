"""The YOLO detection loss as terms: task-aligned assignment, CIoU, distribution focal or L1, BCE.

Everything is a sum over the samples of a microbatch, so it adds up over microbatches exactly:
images never interact, and the targets carry no gradient.

A head of two sets of branches (YOLO26) has the loss twice, each with an assignment, soft targets
and a denominator of its own: one-to-many as ever, and one-to-one, where an object has one anchor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum.accumulate import Term
from jaxaccum.losses.boxes import complete_iou
from jaxaccum.models.yolo import REG_MAX, Anchors, Predictions, decode_boxes

TARGET_SCORES = "target_scores"
ONE_TO_MANY, ONE_TO_ONE = "one_to_many", "one_to_one"  # denominators of a head of two sets
TOP_K, ALPHA, BETA, EPS = 10, 0.5, 6.0, 1e-9
TOP_K_ONE = 7  # that an object of one-to-one chooses among, before it keeps one
CHUNK = 16  # objects compared with all anchors at a time
GPU_CHUNK = 64  # there each chunk costs a dozen kernels, used or not


class Targets(NamedTuple):
    """Labelled objects, padded to a fixed number; real ones first.

    Attributes:
      boxes: (N, M, 4) x1 y1 x2 y2 in pixels of the network's input.
      classes: (N, M) int32.
      valid: (N, M) bool.
      weight: (N,) 1 for a real sample, 0 for a padded one.
    """

    boxes: jax.Array
    classes: jax.Array
    valid: jax.Array
    weight: jax.Array


class Choice(NamedTuple):
    """How many anchors an object takes.

    Attributes:
      most: those of the best alignment, before an anchor of several objects is given to one.
      single: of those that it has then only the best.
    """

    most: int = TOP_K
    single: bool = False


class Assignment(NamedTuple):
    """What each anchor is to predict.

    Attributes:
      object: (N, A) int32 index into the targets; meaningless where not foreground.
      foreground: (N, A) bool.
      score: (N, A) soft target of the object's class, 0 where not foreground.
    """

    object: jax.Array
    foreground: jax.Array
    score: jax.Array


def terms(box: float = 7.5, cls: float = 0.5, dfl: float = 1.5) -> tuple[Term, ...]:
    """The terms of the loss with their gains; all divided by the sum of target scores."""
    gains = {"box": box, "cls": cls, "dfl": dfl}
    return tuple(Term(name, gain, TARGET_SCORES) for name, gain in gains.items())


def terms_of_two(box: float = 7.5, cls: float = 0.5, l1: float = 1.5) -> tuple[Term, ...]:
    """The terms of a head of two sets of branches: "box", ... over the target scores of
    one-to-many, and "one_to_one_box", ... over those of one-to-one, with the same gains."""
    gains = {"box": box, "cls": cls, "l1": l1}
    many = (Term(name, gain, ONE_TO_MANY) for name, gain in gains.items())
    one = (Term(f"one_to_one_{name}", gain, ONE_TO_ONE) for name, gain in gains.items())
    return (*many, *one)


def owner_of(path: str) -> str:
    """Whose terms a parameter ("model.23/one2one_cv2.0.0/conv/kernel") of such a network learns
    from: one-to-one reads the features and does not teach what made them."""
    return ONE_TO_ONE if "/one2one_" in path else ONE_TO_MANY


def loss_of_two(
    predictions: Predictions,
    anchors: Anchors,
    targets: Targets,
    class_weights: Sequence[float] = (),
):
    """Numerators and denominators of `terms_of_two`.

    Args:
      predictions: with those of `one_to_one`; see `detection_loss`.
      anchors: their points.
      targets: the labelled objects.
      class_weights: of both branches.
    Returns:
      (numerators, denominators, (Assignment of one-to-many, Assignment of one-to-one)).
    """
    assert predictions.one_to_one is not None
    many, many_scores, many_assigned = detection_loss(
        predictions, anchors, targets, class_weights=class_weights
    )
    one, one_scores, one_assigned = detection_loss(
        predictions.one_to_one, anchors, targets, choice=Choice(TOP_K_ONE, single=True),
        class_weights=class_weights,
    )  # fmt: skip
    numerators = many | {f"one_to_one_{name}": value for name, value in one.items()}
    denominators = {ONE_TO_MANY: many_scores[TARGET_SCORES], ONE_TO_ONE: one_scores[TARGET_SCORES]}
    return numerators, denominators, (many_assigned, one_assigned)


def detection_loss(
    predictions: Predictions,
    anchors: Anchors,
    targets: Targets,
    enlarge_small: bool = True,
    choice: Choice = Choice(),  # noqa: B008
    class_weights: Sequence[float] = (),
):
    """Numerators and the denominator of the detection loss.

        box = sum_a w_a (1 - CIoU_a);   cls = sum BCE;   dfl = sum_a w_a mean_sides DFL_a

    with w_a the soft target of anchor a, and sum_a w_a the denominator. Of distances that are
    predicted as they are

        l1 = sum_a w_a mean_sides |d_a - d*_a| s_a / side of the input

    in the place of dfl, with s_a the anchor's stride: in fractions of the input's width and height.
    Such a distance may be negative and a box inside out, and so is its CIoU (no clamp).

    Args:
      predictions: boxes (N, A, 64), logits, or (N, A, 4), distances in cells; and scores
        (N, A, classes), logits.
      anchors: their points.
      targets: the labelled objects.
      enlarge_small: objects shorter than the second finest stride are taken as that long when
        asking which anchors are inside; the reference trainer before 2025 did not.
      choice: how many anchors an object takes.
      class_weights: (classes,); the BCE of a class, of all anchors, is multiplied by its weight. No
        denominator knows of them, so that sums of microbatches stay those of the batch. () for 1.
    Returns:
      (numerators {"box", "cls", "dfl" or "l1"}, denominators {"target_scores"}, Assignment).
    """
    dtype = jnp.promote_types(predictions.boxes.dtype, jnp.float32)
    raw, scores = predictions.boxes.astype(dtype), predictions.scores.astype(dtype)
    direct = raw.shape[-1] == 4
    strides = jnp.asarray(anchors.strides, dtype)[:, None]
    boxes = decode_boxes(raw, anchors)  # cells of each level
    assignment = assign(
        *jax.lax.stop_gradient((scores, boxes * strides)),
        jnp.asarray(anchors.centres, dtype) * strides,
        targets._replace(boxes=targets.boxes.astype(dtype)),
        smallest=_second_stride(anchors) if enlarge_small else 0.0,
        choice=choice,
        inverted=direct,
    )
    real = targets.weight.astype(dtype)[:, None]
    weight = assignment.score * real

    wanted = _pick(targets.boxes.astype(dtype), assignment.object) / strides
    box = jnp.sum(weight * (1 - complete_iou(boxes, wanted, inverted=direct)))

    classes = jnp.take_along_axis(targets.classes, assignment.object, axis=1)
    hit = jnp.take_along_axis(scores, classes[..., None], axis=-1)[..., 0]
    nothing = jax.nn.softplus(scores)  # BCE against 0, of which a target t takes t * logit
    if len(class_weights):
        factors = jnp.asarray(class_weights, dtype)
        nothing, hit = nothing * factors, hit * factors[classes]
    cls = jnp.sum(real * jnp.sum(nothing, axis=-1)) - jnp.sum(weight * hit)

    centres = jnp.asarray(anchors.centres, dtype)
    distances = jnp.concatenate([centres - wanted[..., :2], wanted[..., 2:] - centres], axis=-1)
    if direct:
        sides = _input_size(anchors).astype(dtype)
        error = jnp.abs(raw - distances) * strides / jnp.concatenate([sides, sides])
        last = {"l1": jnp.sum(weight * jnp.mean(error, axis=-1))}
    else:
        dfl = jnp.mean(distribution_focal_loss(raw, distances), axis=-1)
        last = {"dfl": jnp.sum(weight * dfl)}
    return {"box": box, "cls": cls, **last}, {TARGET_SCORES: jnp.sum(weight)}, assignment


def distribution_focal_loss(logits: jax.Array, distances: jax.Array) -> jax.Array:
    """Cross entropy against the two bins around a distance, weighted by closeness.

    Li et al. 2020, arXiv:2006.04388.

    Args:
      logits: (..., 4 * 16) side-major. distances: (..., 4) in cells, clamped to [0, 14.99].
    Returns:
      (..., 4).
    """
    logp = jax.nn.log_softmax(logits.reshape(*logits.shape[:-1], 4, REG_MAX), axis=-1)
    distances = jnp.clip(distances, 0, REG_MAX - 1 - 0.01)[..., None]
    bins = jnp.arange(REG_MAX, dtype=logits.dtype)
    return -jnp.sum(jnp.maximum(1 - jnp.abs(bins - distances), 0) * logp, axis=-1)


def assign(
    scores: jax.Array,
    boxes: jax.Array,
    centres: jax.Array,
    targets: Targets,
    smallest: float,
    choice: Choice = Choice(),  # noqa: B008
    inverted: bool = False,
) -> Assignment:
    """Task-aligned assignment of objects to anchors.

    An object takes the 10 anchors inside of it with the largest
    score^0.5 * CIoU^6; an anchor taken by several goes to the object it overlaps most. Feng et
    al. 2021, arXiv:2108.07755. A single one is the best of those that are left to the object then,
    the first of equals; it may be none.

    Objects are compared with the anchors a chunk at a time, so memory does not grow with the number
    of objects: as many chunks as the fullest image needs; on a GPU larger ones and all of them, as
    the host would wait for the device to learn how many.

    Args:
      scores: (N, A, classes) class logits. boxes: (N, A, 4) in pixels. centres: (A, 2) pixels.
      targets: the labelled objects.
      smallest: sides shorter than this are taken as this long when asking which anchors are
        inside of an object, in pixels.
      choice: how many anchors an object takes.
      inverted: boxes may be inside out.
    """
    samples, anchors = scores.shape[:2]
    count = targets.boxes.shape[1]
    padding = -count % GPU_CHUNK
    objects = jax.tree.map(
        lambda a: jnp.pad(a, ((0, 0), (0, padding), *((0, 0),) * (a.ndim - 2))),
        (targets.boxes, targets.classes, targets.valid & (targets.weight > 0)[:, None]),
    )
    by_class = jnp.swapaxes(scores, 1, 2)

    def compare(gt, classes, valid):
        """Overlap and alignment of objects (N, c) with all anchors, (N, c, A)."""
        inside = _inside(gt, centres, smallest) & valid[..., None]
        overlap = complete_iou(gt[:, :, None], boxes[:, None], inverted=inverted)
        overlap = jnp.where(inside, jnp.maximum(overlap, 0), 0)
        score = jax.nn.sigmoid(jnp.take_along_axis(by_class, classes[..., None], axis=1))
        return overlap, score**ALPHA * overlap**BETA

    def chosen_by(size, chunks):
        """Counts of takers, a taker, and the object of the largest overlap, each (N, A)."""

        def body(i, carry):
            taken, taker, best, best_object = carry
            start = jnp.asarray(i * size, jnp.int32)
            chunk = (jax.lax.dynamic_slice_in_dim(a, start, size, axis=1) for a in objects)
            overlap, alignment = compare(*chunk)
            value, anchor = jax.lax.top_k(alignment, min(choice.most, anchors))
            chosen = (value > 0).astype(jnp.int32)
            row = jnp.arange(samples)[:, None, None]
            index = start + jnp.arange(size, dtype=jnp.int32)[None, :, None]
            taken = taken.at[row, anchor].add(chosen)
            taker = taker.at[row, anchor].add(chosen * index)
            most = jnp.max(overlap, axis=1)
            better = most > best
            first = start + jnp.argmax(overlap, axis=1).astype(jnp.int32)
            return taken, taker, jnp.maximum(best, most), jnp.where(better, first, best_object)

        empty = jnp.zeros_like(boxes[..., 0])
        none = jnp.zeros_like(empty, jnp.int32)
        taken, taker, _, best = jax.lax.fori_loop(0, chunks, body, (none, none, empty, none))
        return taken, taker, best

    taken, taker, best_object = _in_chunks(chosen_by, objects[2])
    foreground = taken > 0
    object_ = jnp.where(taken == 1, taker, best_object)

    overlap, alignment = _compare_assigned(
        scores, boxes, centres, targets, object_, smallest, inverted
    )
    if choice.single:
        foreground = _best_of_each(foreground, object_, alignment, objects[2])
    row = jnp.arange(samples)[:, None]
    most = jnp.zeros_like(targets.boxes[..., 0])
    top_alignment = most.at[row, object_].max(jnp.where(foreground, alignment, 0))
    top_overlap = most.at[row, object_].max(jnp.where(foreground, overlap, 0))
    scale = top_overlap / (top_alignment + EPS)
    score = jnp.where(foreground, alignment * jnp.take_along_axis(scale, object_, axis=1), 0)
    return Assignment(object_, foreground, score)


def _in_chunks(function: Callable[[int, Any], Any], valid: jax.Array) -> Any:
    """function(size, chunks) of the objects, valid (N, padded to a multiple of either size)."""
    count = valid.shape[1]

    def on_gpu(valid):
        del valid
        return function(GPU_CHUNK, count // GPU_CHUNK)

    def default(valid):
        numbers = jnp.arange(1, count + 1, dtype=jnp.int32)
        last = jnp.max(jnp.where(valid, numbers, 0))
        return function(CHUNK, (last + CHUNK - 1) // CHUNK)

    return jax.lax.platform_dependent(valid, cuda=on_gpu, rocm=on_gpu, default=default)


def _best_of_each(
    foreground: jax.Array, object_: jax.Array, alignment: jax.Array, valid: jax.Array
) -> jax.Array:
    """Of the foreground (N, A) the anchor of the largest alignment of each object.

    By an argmax: to ask which anchor *equals* the largest fails where XLA computes the alignment
    twice, and rounds it differently.
    """
    samples, anchors = foreground.shape

    def best(size, chunks):
        def body(i, kept):
            start = jnp.asarray(i * size, jnp.int32)
            index = start + jnp.arange(size, dtype=jnp.int32)[:, None]
            own = foreground[:, None] & (object_[:, None] == index)
            anchor = jnp.argmax(jnp.where(own, alignment[:, None], -1), axis=-1)
            row = jnp.arange(samples)[:, None]
            anchor = jnp.where(jnp.any(own, axis=-1), anchor, anchors)  # of none: beyond the last
            return kept.at[row, anchor].set(True, mode="drop")

        return jax.lax.fori_loop(0, chunks, body, jnp.zeros_like(foreground))

    return _in_chunks(best, valid)


def _compare_assigned(scores, boxes, centres, targets, object_, smallest, inverted):
    """Overlap and alignment of each anchor with its own object, (N, A)."""
    gt = _pick(targets.boxes, object_)
    classes = jnp.take_along_axis(targets.classes, object_, axis=1)
    inside = _inside_pairs(gt, centres, smallest)
    overlap = complete_iou(gt, boxes, inverted=inverted)
    overlap = jnp.where(inside, jnp.maximum(overlap, 0), 0)
    logits = jnp.take_along_axis(scores, classes[..., None], axis=-1)[..., 0]
    return overlap, jax.nn.sigmoid(logits) ** ALPHA * overlap**BETA


def _inside(gt, centres, smallest):
    """Whether anchors (A, 2) lie inside of objects (N, c, 4), (N, c, A)."""
    return _inside_pairs(gt[:, :, None], centres, smallest)


def _inside_pairs(gt, centres, smallest):
    middle = (gt[..., :2] + gt[..., 2:]) / 2
    half = jnp.maximum(gt[..., 2:] - gt[..., :2], smallest) / 2
    gap = jnp.minimum(centres - (middle - half), (middle + half) - centres)
    return jnp.min(gap, axis=-1) > EPS


def _pick(values, index):
    """values (N, M, ...) at index (N, A) -> (N, A, ...)."""
    return jnp.take_along_axis(values, index[..., None], axis=1)


def _input_size(anchors: Anchors) -> np.ndarray:
    """Width and height of the network's input in pixels, (2,)."""
    return np.max((anchors.centres + 0.5) * anchors.strides[:, None], axis=0)


def _second_stride(anchors: Anchors) -> float:
    sizes = sorted(set(anchors.strides.tolist()))
    return sizes[min(1, len(sizes) - 1)]
