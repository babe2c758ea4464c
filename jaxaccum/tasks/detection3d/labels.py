"""Detections as KITTI's label files have them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxaccum.metrics import detection as metrics
from jaxaccum.metrics import kitti
from jaxaccum.models import boxes3d


def to_labels(
    found: metrics.Detections, boxes: np.ndarray, own: boxes3d.Boxes3D, names: Sequence[str]
) -> kitti.Labels:
    """Detections of an image as KITTI writes them.

    Args:
      found: of one image. boxes: (n, 4) theirs in pixels of the original image.
      own: 3D boxes of all anchors of the image. names: of the classes.
    """
    rows = np.zeros(0, int) if found.anchors is None else found.anchors
    where, sizes, yaw = (np.asarray(a, np.float32)[rows] for a in own)
    alpha = yaw - np.arctan2(where[:, 0], where[:, 2])
    return kitti.Labels(
        tuple(names[c] for c in found.classes),
        np.full(len(rows), -1, np.float32),
        np.full(len(rows), -1, np.int32),
        ((alpha + np.pi) % (2 * np.pi) - np.pi).astype(np.float32),
        np.asarray(boxes, np.float32),
        sizes,
        where,
        yaw,
        found.scores,
    )


def chosen(labels: kitti.Labels, rows: np.ndarray) -> kitti.Labels:
    """Some rows, by (n,) bool."""
    values: dict[str, Any] = {
        f.name: getattr(labels, f.name)[rows] for f in dataclasses.fields(labels)[1:]
    }
    kinds = tuple(kind for kind, keep in zip(labels.kinds, rows, strict=True) if keep)
    return kitti.Labels(kinds, **values)


def of_sample(batch: Mapping[str, Any], row: int, names: Sequence[str]) -> kitti.Labels:
    """The objects of a sample as the network learns them.

    Args:
      batch: of training. row: of the sample. names: of the classes.
    """
    real = np.asarray(batch["valid"][row], bool)
    boxes, classes, where, sizes, yaw = (
        np.asarray(batch[key][row])[real]
        for key in ("boxes", "classes", "locations", "dimensions", "yaw")
    )
    n, kinds = len(yaw), tuple(names[c] for c in classes)
    unknown, alpha = np.full(n, -1, np.float32), np.full(n, -10, np.float32)
    return kitti.Labels(
        kinds, unknown, unknown.astype(np.int32), alpha, boxes, sizes, where, yaw, None
    )


def none() -> kitti.Labels:
    """No detections."""
    flat, triples = np.zeros(0, np.float32), np.zeros((0, 3), np.float32)
    corners = np.zeros((0, 4), np.float32)
    return kitti.Labels(
        (), flat, np.zeros(0, np.int32), flat, corners, triples, triples, flat, flat
    )  # fmt: skip
