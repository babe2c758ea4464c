"""The loss of 3D boxes as terms: where, how large and which way, of the anchors that 2D assigns.

    x, y, z  = sum_a w_a (CE_a + metres * |expected - true|_a);   CE against the two nearest bins
    size     = sum_a w_a sum_hwl |predicted - true|_a
    heading  = sum_a w_a (smooth L1 of the sines + of the cosines)_a

with w_a the anchor's soft target, so that all terms share the denominator of the 2D loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum.accumulate import Term
from jaxaccum.losses.detection import TARGET_SCORES, Assignment
from jaxaccum.models import boxes3d
from jaxaccum.models.boxes3d import AXES, BINS, Coding


class Targets3D(NamedTuple):
    """3D boxes of the labelled objects, metres and radians in the frame of their camera.

    Attributes:
      locations: (N, M, 3) bottom centres x, y, z.
      sizes: (N, M, 3) height, width, length; not positive where an object has no 3D label.
      yaw: (N, M) rotation about y.
      weight: (N,) 1 for a real sample, 0 for a padded one.
      camera: (N, 3, 4) projection to pixels of the input.
    """

    locations: jax.Array
    sizes: jax.Array
    yaw: jax.Array
    weight: jax.Array
    camera: jax.Array


def terms(
    location: float, size: float, heading: float, published: bool = False
) -> tuple[tuple[Term, ...], Mapping[str, float]]:
    """The terms with their gains, and floors of denominators that only the published loss has."""
    by = {axis: f"{axis}_positives" if published else TARGET_SCORES for axis in AXES}
    each = (
        *(Term(axis, location, by[axis]) for axis in AXES),
        Term("size", size, TARGET_SCORES),
        Term("heading", heading, TARGET_SCORES),
    )
    return each, {by[axis]: 1.0 for axis in AXES} if published else {}


def boxes3d_loss(
    logits: jax.Array,
    assignment: Assignment,
    targets: Targets3D,
    coding: Coding,
    width: int,
    metres: float,
    published: bool = False,
):
    """Numerators, and denominators beyond those of the 2D loss.

    Args:
      logits: (N, A, outputs), see `models.boxes3d`.
      assignment: of anchors to objects.
      targets: the labelled objects.
      coding: what the logits mean. width: of the input in pixels.
      metres: of the distance in metres, beside the cross entropy.
      published: as YOLOv12-3D has it: every positive counts as one, an axis is a mean over
        positives and then divided by the target scores as well, bins are not shifted by half of
        one, and the softmax has temperature 1 here.
    Returns:
      ({"x", "y", "z", "size", "heading"}, {}), or as published ({...}, {"x_positives", ...}).
    """
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    bins, size_logits, heading_logits = boxes3d.split(logits.astype(dtype))
    if not published:
        bins = bins / coding.temperature
    real = targets.weight.astype(dtype)[:, None]
    weight = real * (assignment.foreground if published else assignment.score)

    def own(values):
        index = assignment.object[(...,) + (None,) * (values.ndim - 2)]
        return jnp.take_along_axis(values.astype(dtype), index, axis=1)

    where, size, world = (own(v) for v in (targets.locations, targets.sizes, targets.yaw))
    labelled = jnp.all(size > 0, axis=-1)
    x, y, z = jnp.moveaxis(where, -1, 0)
    heading = world - jnp.arctan2(x, z) if coding.heading == "seen" else world
    z = z / boxes3d.lens(targets.camera.astype(dtype), width, coding)[:, None]
    where = jnp.stack([x, y, z], axis=-1)

    offset = where - jnp.asarray(boxes3d.LOWEST, dtype)
    reach = boxes3d.WIDTH * BINS
    if published:
        limits = jnp.asarray([100.0, 100.0, 200.0], dtype)
        within = (jnp.abs(where) < limits) & (where > jnp.asarray([-100.0, -100.0, 0.0], dtype))
    else:
        within = (offset > 0) & (offset < reach) & labelled[..., None]
    entropy = bin_entropy(bins, offset / boxes3d.WIDTH - (0.0 if published else 0.5))
    distance = jnp.abs(boxes3d.expectation(bins) - where)
    counted = weight[..., None] * within
    axes = jnp.sum(jnp.where(within, counted * (entropy + metres * distance), 0), axis=(0, 1))

    size_error = jnp.sum(jnp.abs(coding.largest * jax.nn.sigmoid(size_logits) - size), axis=-1)
    turned = boxes3d.directions(heading_logits, coding)
    heading_error = jnp.sum(smooth_l1(turned - boxes3d.directions_of(heading, coding)), axis=-1)
    known = weight if published else weight * labelled
    numerators = {
        **{axis: axes[i] for i, axis in enumerate(AXES)},
        "size": jnp.sum(jnp.where(labelled, weight * size_error, 0)),
        "heading": jnp.sum(known * heading_error),
    }
    if not published:
        return numerators, {}
    scores = jnp.maximum(jnp.sum(assignment.score * real), 1)
    positives = jnp.sum(counted, axis=(0, 1)) * scores
    return numerators, {f"{axis}_positives": positives[i] for i, axis in enumerate(AXES)}


def bin_entropy(logits: jax.Array, place: jax.Array) -> jax.Array:
    """Cross entropy against the two bins around a place, weighted by closeness.

    Li et al. 2020, arXiv:2006.04388.

    Args:
      logits: (..., n). place: (...,) in bins, 0 the centre of the first; clamped to n - 1.001.
    """
    count = logits.shape[-1]
    place = jnp.clip(place, 0, count - 1 - 1e-3)
    left = jnp.floor(place)
    right = place - left
    logp = jax.nn.log_softmax(logits, axis=-1)
    index = left.astype(jnp.int32)[..., None]
    near = jnp.take_along_axis(logp, index, axis=-1)[..., 0]
    far = jnp.take_along_axis(logp, index + 1, axis=-1)[..., 0]
    return -((1 - right) * near + right * far)


def smooth_l1(x: jax.Array) -> jax.Array:
    """0.5 x^2 up to 1, |x| - 0.5 beyond (Girshick 2015, arXiv:1504.08083)."""
    size = jnp.abs(x)
    return jnp.where(size < 1, 0.5 * jnp.square(x), size - 0.5)
