"""The YOLO detection loss as terms: task-aligned assignment, CIoU, distribution focal, BCE.

Everything is a sum over the samples of a microbatch, so it adds up over microbatches exactly:
images never interact, and the targets carry no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum.accumulate import Term
from jaxaccum.losses.boxes import complete_iou
from jaxaccum.models.yolo import REG_MAX, Anchors, Predictions, decode_boxes

TARGET_SCORES = "target_scores"
TOP_K, ALPHA, BETA, EPS = 10, 0.5, 6.0, 1e-9
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


def detection_loss(
    predictions: Predictions, anchors: Anchors, targets: Targets, enlarge_small: bool = True
):
    """Numerators and the denominator of the detection loss.

        box = sum_a w_a (1 - CIoU_a);   cls = sum BCE;   dfl = sum_a w_a mean_sides DFL_a

    with w_a the soft target of anchor a, and sum_a w_a the denominator.

    Args:
      predictions: boxes (N, A, 64) and scores (N, A, classes), logits.
      anchors: their points.
      targets: the labelled objects.
      enlarge_small: objects shorter than the second finest stride are taken as that long when
        asking which anchors are inside; the reference trainer before 2025 did not.
    Returns:
      (numerators {"box", "cls", "dfl"}, denominators {"target_scores"}, Assignment).
    """
    dtype = jnp.promote_types(predictions.boxes.dtype, jnp.float32)
    logits, scores = predictions.boxes.astype(dtype), predictions.scores.astype(dtype)
    strides = jnp.asarray(anchors.strides, dtype)[:, None]
    boxes = decode_boxes(logits, anchors)  # cells of each level
    assignment = assign(
        *jax.lax.stop_gradient((scores, boxes * strides)),
        jnp.asarray(anchors.centres, dtype) * strides,
        targets._replace(boxes=targets.boxes.astype(dtype)),
        smallest=_second_stride(anchors) if enlarge_small else 0.0,
    )
    real = targets.weight.astype(dtype)[:, None]
    weight = assignment.score * real

    wanted = _pick(targets.boxes.astype(dtype), assignment.object) / strides
    box = jnp.sum(weight * (1 - complete_iou(boxes, wanted)))

    classes = jnp.take_along_axis(targets.classes, assignment.object, axis=1)
    hit = jnp.take_along_axis(scores, classes[..., None], axis=-1)[..., 0]
    cls = jnp.sum(real * jnp.sum(jax.nn.softplus(scores), axis=-1)) - jnp.sum(weight * hit)

    centres = jnp.asarray(anchors.centres, dtype)
    distances = jnp.concatenate([centres - wanted[..., :2], wanted[..., 2:] - centres], axis=-1)
    dfl = jnp.sum(weight * jnp.mean(distribution_focal_loss(logits, distances), axis=-1))
    return {"box": box, "cls": cls, "dfl": dfl}, {TARGET_SCORES: jnp.sum(weight)}, assignment


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
    scores: jax.Array, boxes: jax.Array, centres: jax.Array, targets: Targets, smallest: float
) -> Assignment:
    """Task-aligned assignment of objects to anchors.

    An object takes the 10 anchors inside of it with the largest
    score^0.5 * CIoU^6; an anchor taken by several goes to the object it overlaps most. Feng et
    al. 2021, arXiv:2108.07755. Objects are compared with the anchors a chunk at a time, so memory
    does not grow with the number of objects: as many chunks as the fullest image needs; on a GPU
    larger ones and all of them, as the host would wait for the device to learn how many.

    Args:
      scores: (N, A, classes) class logits. boxes: (N, A, 4) in pixels. centres: (A, 2) pixels.
      targets: the labelled objects.
      smallest: sides shorter than this are taken as this long when asking which anchors are
        inside of an object, in pixels.
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
        overlap = complete_iou(gt[:, :, None], boxes[:, None])
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
            value, anchor = jax.lax.top_k(alignment, min(TOP_K, anchors))
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

    def on_gpu(valid):
        del valid
        return chosen_by(GPU_CHUNK, (count + padding) // GPU_CHUNK)

    def default(valid):
        numbers = jnp.arange(1, count + padding + 1, dtype=jnp.int32)
        last = jnp.max(jnp.where(valid, numbers, 0))
        return chosen_by(CHUNK, (last + CHUNK - 1) // CHUNK)

    taken, taker, best_object = jax.lax.platform_dependent(
        objects[2], cuda=on_gpu, rocm=on_gpu, default=default
    )
    foreground = taken > 0
    object_ = jnp.where(taken == 1, taker, best_object)

    overlap, alignment = _compare_assigned(scores, boxes, centres, targets, object_, smallest)
    row = jnp.arange(samples)[:, None]
    most = jnp.zeros_like(targets.boxes[..., 0])
    top_alignment = most.at[row, object_].max(jnp.where(foreground, alignment, 0))
    top_overlap = most.at[row, object_].max(jnp.where(foreground, overlap, 0))
    scale = top_overlap / (top_alignment + EPS)
    score = jnp.where(foreground, alignment * jnp.take_along_axis(scale, object_, axis=1), 0)
    return Assignment(object_, foreground, score)


def _compare_assigned(scores, boxes, centres, targets, object_, smallest):
    """Overlap and alignment of each anchor with its own object, (N, A)."""
    gt = _pick(targets.boxes, object_)
    classes = jnp.take_along_axis(targets.classes, object_, axis=1)
    inside = _inside_pairs(gt, centres, smallest)
    overlap = jnp.where(inside, jnp.maximum(complete_iou(gt, boxes), 0), 0)
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


def _second_stride(anchors: Anchors) -> float:
    sizes = sorted(set(anchors.strides.tolist()))
    return sizes[min(1, len(sizes) - 1)]
