"""Overlaps of KITTI's boxes: in the image, of their footprints on the ground, and in 3D.

The frame and the boxes are those of `jaxaccum.metrics.kitti`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]


def iou_2d(a: ArrayLike, b: ArrayLike) -> Matrix:
    """Overlap of upright boxes in the image: intersection over union.

    Args:
      a: (n, 4) xyxy.
      b: (m, 4) xyxy.

    Returns:
      (n, m) float64 in [0, 1]. Boxes without area overlap nothing.
    """
    a, b = _rows(a, 4), _rows(b, 4)
    both = intersection_2d(a, b)
    return ratio(both, area_2d(a)[:, None] + area_2d(b) - both)


def iou_bev(a: ArrayLike, b: ArrayLike) -> Matrix:
    """Overlap of the boxes' footprints on the ground, rotated as they are.

    Args:
      a: (n, 7) height, width, length, x, y, z, yaw (`Labels.boxes3d`).
      b: (m, 7).

    Returns:
      (n, m) float64 in [0, 1]. Boxes with a dimension that is not positive overlap nothing.
    """
    a, b = _rows(a, 7), _rows(b, 7)
    both = _intersection_bev(a, b)
    area_a, area_b = a[:, 1] * a[:, 2], b[:, 1] * b[:, 2]
    return ratio(both, area_a[:, None] + area_b - both)


def iou_3d(a: ArrayLike, b: ArrayLike) -> Matrix:
    """Overlap of volumes; arguments and result as of `iou_bev`."""
    a, b = _rows(a, 7), _rows(b, 7)
    # y points down and a location is the bottom: a box spans y - height .. y.
    bottom = np.minimum(a[:, None, 4], b[:, 4])
    top = np.maximum((a[:, 4] - a[:, 0])[:, None], b[:, 4] - b[:, 0])
    both = _intersection_bev(a, b) * np.maximum(bottom - top, 0)
    return ratio(both, a[:, :3].prod(1)[:, None] + b[:, :3].prod(1) - both)


def _rows(boxes: ArrayLike, columns: int) -> Matrix:
    boxes = np.asarray(boxes, np.float64)
    if boxes.ndim != 2 or boxes.shape[1] != columns:
        raise ValueError(f"expected boxes (n, {columns}), got {boxes.shape}")
    return boxes


def ratio(part: Matrix, whole: Matrix) -> Matrix:
    """part / whole, 0 where there is no part; rounding must not raise it above 1."""
    there = part > 0
    return np.minimum(np.where(there, part, 0) / np.where(there, whole, 1), 1)


def area_2d(boxes: Matrix) -> Matrix:
    """(n,) square pixels of boxes (n, 4)."""
    return (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1)


def intersection_2d(a: Matrix, b: Matrix) -> Matrix:
    """(n, m) square pixels that the boxes share."""
    far = np.minimum(a[:, None, 2:], b[:, 2:])
    near = np.maximum(a[:, None, :2], b[:, :2])
    return (far - near).clip(0).prod(2)


def _intersection_bev(a: Matrix, b: Matrix) -> Matrix:
    """(n, m) square metres that the footprints share; 0 where a dimension is not positive."""
    # Only boxes whose circumscribed circles meet can share anything.
    radius_a, radius_b = np.hypot(a[:, 1], a[:, 2]) / 2, np.hypot(b[:, 1], b[:, 2]) / 2
    distance = np.hypot(a[:, None, 3] - b[:, 3], a[:, None, 5] - b[:, 5])
    solid = (a[:, :3].min(1) > 0)[:, None] & (b[:, :3].min(1) > 0)
    i, j = np.nonzero(solid & (distance < radius_a[:, None] + radius_b))
    both = np.zeros((len(a), len(b)))
    both[i, j] = _shared_area(a[i], b[j])
    return both


def _shared_area(a: Matrix, b: Matrix) -> Matrix:
    """(p,) square metres that the footprints of row k of `a` and row k of `b` share.

    In b's own axes b is an upright rectangle. Pulling a's outline in to that rectangle, coordinate
    by coordinate, moves what lies outside onto the border, where it encloses nothing, so the
    pulled outline encloses just the shared area. It is straight between the points where a's edges
    cross the border's four lines. No case is special: the result is continuous in the boxes, also
    where edges coincide.
    """
    half = b[:, None, [2, 1]] / 2  # (p, 1, 2)
    across, along = a[:, 3] - b[:, 3], a[:, 5] - b[:, 5]
    sin, cos = np.sin(b[:, 6]), np.cos(b[:, 6])
    centre = np.stack([across * cos - along * sin, across * sin + along * cos], axis=1)
    turn = a[:, 6] - b[:, 6]
    sin, cos = np.sin(turn), np.cos(turn)
    length = np.stack([cos, -sin], axis=1) * a[:, 2, None] / 2
    width = np.stack([sin, cos], axis=1) * a[:, 1, None] / 2
    corners = centre[:, None] + np.stack(
        [length + width, length - width, -length - width, -length + width], axis=1
    )
    edges = np.roll(corners, -1, axis=1) - corners  # (p, 4, 2)
    crossings = np.concatenate([half - corners, -half - corners], axis=2)  # (p, 4, 4)
    steps = np.concatenate([edges, edges], axis=2)
    moving = steps != 0
    when = np.where(moving, crossings, 0) / np.where(moving, steps, 1)
    when = np.sort(when.clip(0, 1), axis=2)  # along the edge, from 0 to 1
    when = np.concatenate([np.zeros_like(when[..., :1]), when], axis=2)
    points = corners[:, :, None] + when[..., None] * edges[:, :, None]  # (p, 4, 5, 2)
    points = points.reshape(len(a), 20, 2)
    x, z = np.moveaxis(np.clip(points, -half, half), 2, 0)
    return np.abs((x * np.roll(z, -1, 1) - z * np.roll(x, -1, 1)).sum(1)) / 2
