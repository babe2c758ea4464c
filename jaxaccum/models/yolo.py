"""The YOLO families as tables, and the one network that reads them.

A family is data: a depth, a width and a channel cap per scale, and rows of
(from, repeats, block, arguments). `from` is the previous row (-1), a row's number, or several.
Sources: Ultralytics YOLOv8 (2023), in the tables of its public model descriptions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum.accumulate import Groups
from jaxaccum.models import blocks, ops

REG_MAX = 16
Row = tuple[Any, int, str, tuple]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of networks.

    Attributes:
      depth, width, max_channels: by scale letter.
      rows: the network; the last row is the head.
    """

    depth: Mapping[str, float]
    width: Mapping[str, float]
    max_channels: Mapping[str, int]
    rows: tuple[Row, ...]

    @property
    def scales(self) -> tuple[str, ...]:
        return tuple(self.depth)


def _scales(*values):
    return dict(zip("nsmlx", values, strict=True))


_V8_BODY: tuple[Row, ...] = (
    (-1, 1, "Conv", (64, 3, 2)),  # 0, stride 2
    (-1, 1, "Conv", (128, 3, 2)),  # 1, stride 4
    (-1, 3, "C2f", (128, True)),
    (-1, 1, "Conv", (256, 3, 2)),  # 3, stride 8
    (-1, 6, "C2f", (256, True)),
    (-1, 1, "Conv", (512, 3, 2)),  # 5, stride 16
    (-1, 6, "C2f", (512, True)),
    (-1, 1, "Conv", (1024, 3, 2)),  # 7, stride 32
    (-1, 3, "C2f", (1024, True)),
    (-1, 1, "SPPF", (1024, 5)),
    (-1, 1, "Upsample", ()),  # 10, the way up
    ((-1, 6), 1, "Concat", ()),
    (-1, 3, "C2f", (512, False)),
    (-1, 1, "Upsample", ()),
    ((-1, 4), 1, "Concat", ()),
    (-1, 3, "C2f", (256, False)),  # 15
)

FAMILIES: dict[str, Family] = {
    "yolov8": Family(
        depth=_scales(0.33, 0.33, 0.67, 1.0, 1.0),
        width=_scales(0.25, 0.5, 0.75, 1.0, 1.25),
        max_channels=_scales(1024, 1024, 768, 512, 512),
        rows=(
            *_V8_BODY,
            (-1, 1, "Conv", (256, 3, 2)),  # 16, the way down
            ((-1, 12), 1, "Concat", ()),
            (-1, 3, "C2f", (512, False)),
            (-1, 1, "Conv", (512, 3, 2)),
            ((-1, 9), 1, "Concat", ()),
            (-1, 3, "C2f", (1024, False)),
            ((15, 18, 21), 1, "Detect", ()),
        ),
    ),
}
FAMILIES["yolov8-p2"] = dataclasses.replace(
    FAMILIES["yolov8"],
    rows=(
        *_V8_BODY,
        (-1, 1, "Upsample", ()),  # 16, up to stride 4
        ((-1, 2), 1, "Concat", ()),
        (-1, 3, "C2f", (128, False)),
        (-1, 1, "Conv", (128, 3, 2)),
        ((-1, 15), 1, "Concat", ()),
        (-1, 3, "C2f", (256, False)),  # 21
        (-1, 1, "Conv", (256, 3, 2)),
        ((-1, 12), 1, "Concat", ()),
        (-1, 3, "C2f", (512, False)),  # 24
        (-1, 1, "Conv", (512, 3, 2)),
        ((-1, 9), 1, "Concat", ()),
        (-1, 3, "C2f", (1024, False)),  # 27
        ((18, 21, 24, 27), 1, "Detect", ()),
    ),
)


def names() -> list[str]:
    """Every model name, "family-scale"."""
    return [f"{name}-{scale}" for name, family in FAMILIES.items() for scale in family.scales]


def parse(name: str) -> tuple[Family, str]:
    """The family and the scale letter of a model name such as "yolov8-p2-m"."""
    family, _, scale = name.rpartition("-")
    if family not in FAMILIES or scale not in FAMILIES[family].scales:
        close = get_close_matches(name, names(), n=3, cutoff=0.4)
        raise ValueError(
            f"no model named {name!r}; a name is family-scale"
            + (f": did you mean {', '.join(close)}?" if close else f", one of {', '.join(names())}")
        )
    return FAMILIES[family], scale


class Predictions(NamedTuple):
    """The raw output of a detector, anchors of all levels in one axis, fine to coarse, row-major.

    Attributes:
      boxes: (N, A, 4 * 16) logits of the distances left, top, right, bottom, side-major.
      scores: (N, A, classes) class logits.
    """

    boxes: jax.Array
    scores: jax.Array


class Anchors(NamedTuple):
    """The anchor points that belong to `Predictions`, in its order.

    Attributes:
      centres: (A, 2) x, y in cells of the anchor's level.
      strides: (A,) pixels per cell.
    """

    centres: np.ndarray
    strides: np.ndarray


def anchors(height: int, width: int, strides: tuple[int, ...]) -> Anchors:
    """Anchor points of an image of that size in pixels; every side a multiple of every stride."""
    centres, sizes = [], []
    for stride in strides:
        x, y = np.meshgrid(np.arange(width // stride) + 0.5, np.arange(height // stride) + 0.5)
        centres.append(np.stack([x.ravel(), y.ravel()], axis=-1))
        sizes.append(np.full(x.size, stride))
    return Anchors(
        np.concatenate(centres).astype(np.float32), np.concatenate(sizes).astype(np.float32)
    )


def decode_boxes(boxes: jax.Array, anchors: Anchors) -> jax.Array:
    """Distance logits (..., A, 64) to boxes (..., A, 4), x1 y1 x2 y2 in cells of each level.

    The distance to a side is the expectation over its 16 bins (Li et al. 2020,
    arXiv:2006.04388).
    """
    logits = boxes.reshape(*boxes.shape[:-1], 4, REG_MAX)
    distances = jax.nn.softmax(logits, axis=-1) @ jnp.arange(REG_MAX, dtype=boxes.dtype)
    centres = jnp.asarray(anchors.centres, boxes.dtype)
    return jnp.concatenate([centres - distances[..., :2], centres + distances[..., 2:]], axis=-1)


class Detect(nn.Module):
    """The head: a box branch and a class branch per level. Widths depend on the finest level."""

    classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, levels: list[jax.Array], groups: Groups | None) -> Predictions:
        finest = levels[0].shape[-1]
        widths = {
            "cv2": (max(16, finest // 4, 4 * REG_MAX), 4 * REG_MAX),
            "cv3": (max(finest, min(self.classes, 100)), self.classes),
        }
        flat: dict[str, list[jax.Array]] = {"cv2": [], "cv3": []}
        for i, level in enumerate(levels):
            for branch, (hidden, out) in widths.items():
                x = blocks.Conv(hidden, 3, dtype=self.dtype, name=f"{branch}.{i}.0")(level, groups)
                x = blocks.Conv(hidden, 3, dtype=self.dtype, name=f"{branch}.{i}.1")(x, groups)
                x = blocks.conv2d(out, 1, dtype=self.dtype, name=f"{branch}.{i}.2")(x)
                flat[branch].append(x.reshape(x.shape[0], -1, out))
        return Predictions(*(jnp.concatenate(parts, axis=1) for parts in flat.values()))


class Yolo(nn.Module):
    """A network read from a family's rows.

    Attributes:
      model: its name, "family-scale".
      classes: number of classes.
      dtype: compute dtype; parameters and statistics stay as they are given.
    """

    model: str
    classes: int
    dtype: Any = jnp.float32

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per cell of each output level, fine to coarse."""
        family, _ = parse(self.model)
        stride: list[int] = []
        for source, _, kind, args in family.rows:
            first = source[0] if isinstance(source, tuple) else source
            before = stride[first] if stride else 1
            down = args[2] if kind == "Conv" and len(args) > 2 else 1
            stride.append(before // 2 if kind == "Upsample" else before * down)
        return tuple(stride[i] for i in family.rows[-1][0])

    @nn.compact
    def __call__(self, images: jax.Array, groups: Groups | None = None) -> Predictions:
        """Raw predictions.

        Args:
          images: (N, H, W, 3) RGB, uint8 or float in 0..1; sides are multiples of 32.
          groups: how samples share batch statistics; None for the running ones.
        """
        family, scale = parse(self.model)
        if images.dtype == jnp.uint8:
            images = images.astype(self.dtype) / 255
        outputs: list[Any] = []
        x: Any = images.astype(self.dtype)
        for i, (source, repeats, kind, args) in enumerate(family.rows):
            if isinstance(source, tuple):
                x = [outputs[j] for j in source]
            elif outputs:
                x = outputs[source]
            outputs.append(self._row(family, scale, f"model.{i}", repeats, kind, args)(x, groups))
        return outputs[-1]

    def _row(self, family, scale, name, repeats, kind, args):
        """A row as a function of (input, groups)."""
        if kind == "Upsample":
            return lambda x, groups: ops.upsample(x)
        if kind == "Concat":
            return lambda x, groups: jnp.concatenate(x, axis=-1)
        if kind == "Detect":
            return Detect(self.classes, self.dtype, name=name)
        cap, width = family.max_channels[scale], family.width[scale]
        features = math.ceil(min(args[0], cap) * width / 8) * 8
        options: dict[str, Any] = {"dtype": self.dtype, "name": name}
        if kind == "Conv":
            return blocks.Conv(features, *args[1:], **options)
        if kind == "C2f":
            depth = max(round(repeats * family.depth[scale]), 1)
            return blocks.C2f(features, depth, *args[1:], **options)
        if kind == "SPPF":
            return blocks.SPPF(features, *args[1:], **options)
        raise ValueError(f"row {name} names an unknown block {kind!r}")


def bias_priors(model: Yolo) -> dict[str, float]:
    """Initial biases of the head, by parameter path.

    A class bias starts with five objects expected in a 640 x 640 image at every level; a box
    bias at two cells.
    """
    family, _ = parse(model.model)
    head = f"model.{len(family.rows) - 1}"
    priors = {}
    for i, stride in enumerate(model.strides):
        priors[f"{head}/cv2.{i}.2/bias"] = 2.0
        priors[f"{head}/cv3.{i}.2/bias"] = math.log(5 / model.classes / (640 / stride) ** 2)
    return priors


def decode(predictions: Predictions, anchors: Anchors) -> tuple[jax.Array, jax.Array]:
    """Boxes (N, A, 4), x1 y1 x2 y2 in pixels, and class probabilities (N, A, classes)."""
    dtype = jnp.promote_types(predictions.boxes.dtype, jnp.float32)
    boxes = decode_boxes(predictions.boxes.astype(dtype), anchors)
    strides = jnp.asarray(anchors.strides, dtype)[:, None]
    return boxes * strides, jax.nn.sigmoid(predictions.scores.astype(dtype))
