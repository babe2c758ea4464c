"""3D boxes as a detector predicts them: bins of location, sizes, a heading; to metres and radians.

An anchor has 3 * 400 logits of where the bottom centre of its box is, along x, y and z in turn, one
for its height, width and length each, and one or four for its heading. Camera frame of KITTI: x
right, y down, z forward (Geiger et al. 2012). The bins are those of YOLOv12-3D's checkpoints.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

AXES = ("x", "y", "z")
BINS = 400
WIDTH = 0.25  # metres
LOWEST = np.asarray([-50.0, -50.0, 0.0])  # where the bins of every axis begin, metres
OUTPUTS = len(AXES) * BINS + 4  # of the checkpoints, whose heading is one


class Boxes3D(NamedTuple):
    """3D boxes; leading axes as of the logits.

    Attributes:
      locations: (..., 3) bottom centres x, y, z in metres.
      sizes: (..., 3) height, width, length in metres.
      yaw: (...,) rotation about y in radians, or as `Coding.heading` has it.
    """

    locations: jax.Array
    sizes: jax.Array
    yaw: jax.Array


@dataclasses.dataclass(frozen=True)
class Coding:
    """What the outputs mean. The defaults are ours; `ORIGINAL` is that of the checkpoints.

    Attributes:
      temperature: of the softmax over bins, in the loss and in predictions alike.
      largest: size in metres of a logit of plus infinity.
      heading: "seen", the angle to the ray from the camera (KITTI's alpha), which is what pixels
        show, or "world", the rotation about y.
      turn: "axis", four outputs: the sine and the cosine of the heading and of twice the heading.
        The latter give the axis that an object lies along, the former which end of it is its front:
        two looks half a turn apart are hard to tell apart, and one doubt should not blur the other
        (Yan et al. 2018, SECOND, has an angle and a class). Or one output: "free", the heading in
        radians, however many turns, or "bounded", between -pi and pi, whose ends do not meet and
        where an output that has run into one hardly learns.
      focal: focal length over the width of the input for which depths are meant. Seen through a
        longer lens, an object looks nearer by the ratio; so depth is predicted as if every lens
        were this one. 0: metres whatever the lens.
      place: where x and y come from: "predicted", or "projected", through the centre of the 2D box
        and the depth.
    """

    temperature: float = 1.0
    largest: float = 20.0
    heading: Literal["seen", "world"] = "seen"
    turn: Literal["axis", "free", "bounded"] = "axis"
    focal: float = 0.58
    place: Literal["predicted", "projected"] = "projected"


ORIGINAL = Coding(0.5, 10.0, "world", "bounded", 0.0, "predicted")


def outputs(coding: Coding) -> int:
    """How many logits an anchor has."""
    return OUTPUTS + 3 * (coding.turn == "axis")


def split(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(..., outputs) -> location (..., 3, 400), sizes (..., 3), heading (..., 1 or 4)."""
    bins, sizes, heading = jnp.split(logits, (len(AXES) * BINS, len(AXES) * BINS + 3), axis=-1)
    return bins.reshape(*logits.shape[:-1], len(AXES), BINS), sizes, heading


def expectation(bins: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Bins (..., 3, 400) to the mean of their centres, (..., 3) metres."""
    places = jnp.asarray(WIDTH * (np.arange(BINS) + 0.5), bins.dtype)
    share = jax.nn.softmax(bins / temperature, axis=-1)
    return jnp.sum(share * places, axis=-1) + jnp.asarray(LOWEST, bins.dtype)


def decode(logits: jax.Array, coding: Coding = ORIGINAL) -> Boxes3D:
    """What the logits (..., outputs) say, before cameras come in: see `in_camera`."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    bins, sizes, heading = split(logits)
    return Boxes3D(
        expectation(bins, coding.temperature),
        coding.largest * jax.nn.sigmoid(sizes),
        turned(heading, coding),
    )


def turned(output: jax.Array, coding: Coding) -> jax.Array:
    """The headings (...,) in radians that outputs (..., 1 or 4) stand for."""
    if coding.turn == "axis":
        sine, cosine = output[..., 0], output[..., 1]
        axis = jnp.arctan2(output[..., 2], output[..., 3]) / 2
        ahead = sine * jnp.sin(axis) + cosine * jnp.cos(axis) >= 0
        return wrapped(jnp.where(ahead, axis, axis + jnp.pi))
    output = output[..., 0]
    if coding.turn == "free":
        return wrapped(output)
    return (jax.nn.sigmoid(output) - 0.5) * 2 * jnp.pi


def directions(output: jax.Array, coding: Coding) -> jax.Array:
    """What outputs (..., 1 or 4) are compared in: (..., 2 or 4), as `directions_of` a heading.

    Of four they are these themselves: an angle has no gradient along its vector.
    """
    return output if coding.turn == "axis" else directions_of(turned(output, coding), coding)


def directions_of(heading: jax.Array, coding: Coding) -> jax.Array:
    """Sine and cosine of headings (...,), and of twice these where the coding asks for them."""
    angles = (heading, 2 * heading) if coding.turn == "axis" else (heading,)
    return jnp.stack([f(angle) for angle in angles for f in (jnp.sin, jnp.cos)], axis=-1)


def lens(camera: jax.Array, width: int, coding: Coding) -> jax.Array:
    """What to divide metric depths (N,) by to have those predicted, by camera (N, 3, 4)."""
    if not coding.focal:
        return jnp.ones_like(camera[..., 0, 0])
    return camera[..., 0, 0] / (coding.focal * width)


def in_camera(
    boxes3d: Boxes3D, boxes: jax.Array, camera: jax.Array, width: int, coding: Coding
) -> Boxes3D:
    """3D boxes in metres and radians of the camera's frame.

    Args:
      boxes3d: as decoded, leading axes (N, A).
      boxes: (N, A, 4) x1 y1 x2 y2 in pixels of the input.
      camera: (N, 3, 4) projection to pixels of the input: (u, v, 1) ~ camera (x, y, z, 1).
      width: of the input in pixels.
    """
    x, y, z = jnp.moveaxis(boxes3d.locations, -1, 0)
    z = z * lens(camera, width, coding)[:, None]
    if coding.place == "projected":
        x, y = back_projected(boxes, z, camera)
        y = y + boxes3d.sizes[..., 0] / 2
    yaw = boxes3d.yaw
    if coding.heading == "seen":
        yaw = wrapped(yaw + jnp.arctan2(x, z))
    return Boxes3D(jnp.stack([x, y, z], axis=-1), boxes3d.sizes, yaw)


def back_projected(
    boxes: jax.Array, depth: jax.Array, camera: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """x and y (N, A) of the points at a depth (N, A) that are seen at the centres of boxes."""
    matrix = camera[:, None]
    u, v = ((boxes[..., i] + boxes[..., i + 2]) / 2 for i in (0, 1))
    w = depth + matrix[..., 2, 3]  # KITTI's rectified cameras have a third row (0, 0, 1, t)
    x = (u * w - matrix[..., 0, 2] * depth - matrix[..., 0, 3]) / matrix[..., 0, 0]
    y = (v * w - matrix[..., 1, 2] * depth - matrix[..., 1, 3]) / matrix[..., 1, 1]
    return x, y


def wrapped(angle: jax.Array) -> jax.Array:
    """The same angle in [-pi, pi)."""
    return jnp.mod(angle + jnp.pi, 2 * jnp.pi) - jnp.pi
