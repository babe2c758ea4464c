"""The YOLO families as tables, and the one network that reads them.

A family is data: a depth, a width and a channel cap per scale, and rows of
(from, repeats, block, arguments). `from` is the previous row (-1), a row's number, or several.
Sources: YOLOv8 and YOLO11 (Ultralytics 2023, 2024), YOLO12 (Tian et al. 2025, arXiv:2502.12524),
in the tables of their public model descriptions; the P2 variants of 11 and 12 by analogy.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum.accumulate import Groups
from jaxaccum.models import blocks, boxes3d, ops

REG_MAX = 16
Row = tuple[Any, int, str, tuple]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of networks.

    Attributes:
      depth, width, max_channels: by scale letter.
      rows: the network; the last row is the head.
      depthwise_head: the class branch of the head is made of depthwise convolutions.
      turbo: area attention in the form of the authors' later code.
      large_mlp_ratio: of the area blocks at scales l and x; 2 at the others.
    """

    depth: Mapping[str, float]
    width: Mapping[str, float]
    max_channels: Mapping[str, int]
    rows: tuple[Row, ...]
    depthwise_head: bool = False
    turbo: bool = False
    large_mlp_ratio: float = 1.2

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

_V11_BODY: tuple[Row, ...] = (
    (-1, 1, "Conv", (64, 3, 2)),  # 0, stride 2
    (-1, 1, "Conv", (128, 3, 2)),  # 1, stride 4
    (-1, 2, "C3k2", (256, False, 0.25)),
    (-1, 1, "Conv", (256, 3, 2)),  # 3, stride 8
    (-1, 2, "C3k2", (512, False, 0.25)),
    (-1, 1, "Conv", (512, 3, 2)),  # 5, stride 16
    (-1, 2, "C3k2", (512, True)),
    (-1, 1, "Conv", (1024, 3, 2)),  # 7, stride 32
    (-1, 2, "C3k2", (1024, True)),
    (-1, 1, "SPPF", (1024, 5)),
    (-1, 2, "C2PSA", (1024,)),  # 10
    (-1, 1, "Upsample", ()),  # the way up
    ((-1, 6), 1, "Concat", ()),
    (-1, 2, "C3k2", (512, False)),
    (-1, 1, "Upsample", ()),
    ((-1, 4), 1, "Concat", ()),
    (-1, 2, "C3k2", (256, False)),  # 16
)

_V12_BODY: tuple[Row, ...] = (
    (-1, 1, "Conv", (64, 3, 2)),  # 0, stride 2
    (-1, 1, "Conv", (128, 3, 2)),  # 1, stride 4
    (-1, 2, "C3k2", (256, False, 0.25)),
    (-1, 1, "Conv", (256, 3, 2)),  # 3, stride 8
    (-1, 2, "C3k2", (512, False, 0.25)),
    (-1, 1, "Conv", (512, 3, 2)),  # 5, stride 16
    (-1, 4, "A2C2f", (512, 4)),  # four stripes
    (-1, 1, "Conv", (1024, 3, 2)),  # 7, stride 32
    (-1, 4, "A2C2f", (1024, 1)),
    (-1, 1, "Upsample", ()),  # 9, the way up
    ((-1, 6), 1, "Concat", ()),
    (-1, 2, "A2C2f", (512, 0)),  # without attention
    (-1, 1, "Upsample", ()),
    ((-1, 4), 1, "Concat", ()),
    (-1, 2, "A2C2f", (256, 0)),  # 14
)

_V11_SIZES: dict[str, Any] = {
    "depth": _scales(0.5, 0.5, 0.5, 1.0, 1.0),
    "width": _scales(0.25, 0.5, 1.0, 1.0, 1.5),
    "max_channels": _scales(1024, 1024, 512, 512, 512),
    "depthwise_head": True,
}


def _down(skips: tuple[int, ...], outputs: tuple[tuple, ...]) -> tuple[Row, ...]:
    """The way down: a strided convolution, a skip and a block, for each output after the first."""
    rows: list[Row] = []
    width = outputs[0]
    for skip, block in zip(skips, outputs[1:], strict=True):
        rows += [(-1, 1, "Conv", (width[2][0], 3, 2)), ((-1, skip), 1, "Concat", ()), (-1, *block)]
        width = block
    return tuple(rows)


def _p2(block: tuple, skip: int = 2) -> tuple[Row, ...]:
    """One more step of the way up, to stride 4."""
    return ((-1, 1, "Upsample", ()), ((-1, skip), 1, "Concat", ()), (-1, *block))


_V8 = ((3, "C2f", (256, False)), (3, "C2f", (512, False)), (3, "C2f", (1024, False)))
_V11 = ((2, "C3k2", (256, False)), (2, "C3k2", (512, False)), (2, "C3k2", (1024, True)))
_V12 = ((2, "A2C2f", (256, 0)), (2, "A2C2f", (512, 0)), (2, "C3k2", (1024, True)))
_V8_P2, _V11_P2 = (3, "C2f", (128, False)), (2, "C3k2", (128, False))

FAMILIES: dict[str, Family] = {
    "yolov8": Family(
        depth=_scales(0.33, 0.33, 0.67, 1.0, 1.0),
        width=_scales(0.25, 0.5, 0.75, 1.0, 1.25),
        max_channels=_scales(1024, 1024, 768, 512, 512),
        rows=(*_V8_BODY, *_down((12, 9), _V8), ((15, 18, 21), 1, "Detect", ())),
    ),
    "yolo11": Family(
        **_V11_SIZES,
        rows=(*_V11_BODY, *_down((13, 10), _V11), ((16, 19, 22), 1, "Detect", ())),
    ),
    "yolo12": Family(
        **_V11_SIZES,
        rows=(*_V12_BODY, *_down((11, 8), _V12), ((14, 17, 20), 1, "Detect", ())),
    ),
}
FAMILIES["yolov8-p2"] = dataclasses.replace(
    FAMILIES["yolov8"],
    rows=(
        *_V8_BODY,
        *_p2(_V8_P2),
        *_down((15, 12, 9), (_V8_P2, *_V8)),
        ((18, 21, 24, 27), 1, "Detect", ()),
    ),
)
FAMILIES["yolo11-p2"] = dataclasses.replace(
    FAMILIES["yolo11"],
    rows=(
        *_V11_BODY,
        *_p2(_V11_P2),
        *_down((16, 13, 10), (_V11_P2, *_V11)),
        ((19, 22, 25, 28), 1, "Detect", ()),
    ),
)
FAMILIES["yolo12-p2"] = dataclasses.replace(
    FAMILIES["yolo12"],
    rows=(
        *_V12_BODY,
        *_p2(_V11_P2),
        *_down((14, 11, 8), (_V11_P2, *_V12)),
        ((17, 20, 23, 26), 1, "Detect", ()),
    ),
)
# The authors' later form: grouped convolutions in the stem, and area attention of its own.
FAMILIES["yolov12-turbo"] = dataclasses.replace(
    FAMILIES["yolo12"],
    turbo=True,
    large_mlp_ratio=1.5,
    rows=tuple(
        {1: (-1, 1, "Conv", (128, 3, 2, 2)), 3: (-1, 1, "Conv", (256, 3, 2, 4))}.get(i, row)
        for i, row in enumerate(FAMILIES["yolo12"].rows)
    ),
)
FAMILIES["yolov12-3d"] = dataclasses.replace(
    FAMILIES["yolov12-turbo"],
    rows=(*FAMILIES["yolov12-turbo"].rows[:-1], ((14, 17, 20), 1, "Detect3D", ())),
)


def names(in_space: bool = False) -> list[str]:
    """Every model name, "family-scale": those that find boxes in the image, or also in space."""
    return [
        f"{name}-{scale}"
        for name, family in FAMILIES.items()
        for scale in family.scales
        if (family.rows[-1][2] == "Detect3D") == in_space
    ]


def parse(name: str) -> tuple[Family, str]:
    """The family and the scale letter of a model name such as "yolov8-p2-m"."""
    family, _, scale = name.rpartition("-")
    if family not in FAMILIES or scale not in FAMILIES[family].scales:
        known = names() + names(in_space=True)
        close = get_close_matches(name, known, n=3, cutoff=0.4)
        raise ValueError(
            f"no model named {name!r}; a name is family-scale"
            + (f": did you mean {', '.join(close)}?" if close else f", one of {', '.join(known)}")
        )
    return FAMILIES[family], scale


class Predictions(NamedTuple):
    """The raw output of a detector, anchors of all levels in one axis, fine to coarse, row-major.

    Attributes:
      boxes: (N, A, 4 * 16) logits of the distances left, top, right, bottom, side-major.
      scores: (N, A, classes) class logits.
      boxes3d: (N, A, outputs) logits of 3D boxes, see `models.boxes3d`; None of a 2D detector.
    """

    boxes: jax.Array
    scores: jax.Array
    boxes3d: jax.Array | None = None


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
    bins = jnp.arange(REG_MAX, dtype=boxes.dtype)
    distances = jnp.sum(jax.nn.softmax(logits, axis=-1) * bins, axis=-1)
    centres = jnp.asarray(anchors.centres, boxes.dtype)
    return jnp.concatenate([centres - distances[..., :2], centres + distances[..., 2:]], axis=-1)


class Detect(nn.Module):
    """The head: a box branch and a class branch per level. Widths depend on the finest level.

    Attributes:
      outputs3d: outputs of a third branch, for 3D boxes; 0 for none.
    """

    classes: int
    depthwise: bool = False
    dtype: Any = jnp.float32
    outputs3d: int = 0

    @nn.compact
    def __call__(self, levels: list[jax.Array], groups: Groups | None) -> Predictions:
        # Class logits start near -10, where bfloat16 knows steps of 1/16.
        wide = jnp.promote_types(self.dtype, jnp.float32)
        finest = levels[0].shape[-1]
        box = max(16, finest // 4, 4 * REG_MAX)
        hidden = max(finest, min(self.classes, 100))
        deep = max(finest // 4, min(self.outputs3d, 512))
        boxes, scores, more = [], [], []
        for i, level in enumerate(levels):
            x = self._conv(box, 3, f"cv2.{i}.0")(level, groups)
            x = self._conv(box, 3, f"cv2.{i}.1")(x, groups)
            x = blocks.conv2d(4 * REG_MAX, 1, dtype=wide, name=f"cv2.{i}.2")(x)
            boxes.append(x.reshape(x.shape[0], -1, 4 * REG_MAX))
            x = level
            for j in range(2):
                if self.depthwise:
                    x = self._conv(x.shape[-1], 3, f"cv3.{i}.{j}.0", x.shape[-1])(x, groups)
                    x = self._conv(hidden, 1, f"cv3.{i}.{j}.1")(x, groups)
                else:
                    x = self._conv(hidden, 3, f"cv3.{i}.{j}")(x, groups)
            x = blocks.conv2d(self.classes, 1, dtype=wide, name=f"cv3.{i}.2")(x)
            scores.append(x.reshape(x.shape[0], -1, self.classes))
            if self.outputs3d:
                x = self._conv(deep, 3, f"cv4.{i}.0")(level, groups)
                x = self._conv(deep, 3, f"cv4.{i}.1")(x, groups)
                x = blocks.conv2d(self.outputs3d, 1, dtype=wide, name=f"cv4.{i}.2")(x)
                more.append(x.reshape(x.shape[0], -1, self.outputs3d))
        return Predictions(
            jnp.concatenate(boxes, axis=1),
            jnp.concatenate(scores, axis=1),
            jnp.concatenate(more, axis=1) if more else None,
        )

    def _conv(self, features, kernel, name, channel_groups=1):
        return blocks.Conv(
            features, kernel, channel_groups=channel_groups, dtype=self.dtype, name=name
        )


class Yolo(nn.Module):
    """A network read from a family's rows.

    Attributes:
      model: its name, "family-scale".
      classes: number of classes.
      dtype: compute dtype; parameters and statistics stay as they are given.
      remat: keep only what goes from row to row, and compute the rest anew for the gradient.
      outputs3d: logits of a 3D box, see `models.boxes3d`.
    """

    model: str
    classes: int
    dtype: Any = jnp.float32
    remat: bool = False
    outputs3d: int = boxes3d.OUTPUTS

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
            row = self._row(family, scale, f"model.{i}", repeats, kind, args)
            if not self.remat or self.is_initializing():
                outputs.append(row(x, groups))
            elif isinstance(row, nn.Module):
                outputs.append(self._rematerialised(row, x, groups))
            else:  # part of the rows that take it, as its output need not be kept either
                outputs.append(jax.tree_util.Partial(row, x, None))
        return outputs[-1]

    def _rematerialised(self, row: nn.Module, x: Any, groups: Groups | None) -> Any:
        """row(x, groups), what is inside of it computed anew for the gradient."""
        name, size = str(row.name), groups and groups.size
        writes = ["moments"] if self.is_mutable_collection("moments") else []
        row = row.clone(parent=None)  # as a function of its variables

        def function(params, inputs):
            x, stats, weight = inputs
            variables = {"params": params, "batch_stats": stats}
            groups = None if size is None else Groups(size, weight)
            return row.apply(variables, _settled(x), groups, mutable=writes)

        params, stats = (self.variables[c][name] for c in ("params", "batch_stats"))
        inputs = (x, stats, groups and groups.weight)
        y, changed = blocks.rematerialised(function, params, inputs)
        for collection, values in changed.items():
            self.put_variable(collection, name, values)
        return y

    def _row(self, family, scale, name, repeats, kind, args):
        """A row as a function of (input, groups)."""
        if kind == "Upsample":
            return lambda x, groups: ops.upsample(x)
        if kind == "Concat":
            return lambda x, groups: jnp.concatenate(x, axis=-1)
        if kind == "Detect":
            return Detect(self.classes, family.depthwise_head, self.dtype, name=name)
        if kind == "Detect3D":
            return Detect(
                self.classes, family.depthwise_head, self.dtype, self.outputs3d, name=name
            )
        cap, width = family.max_channels[scale], family.width[scale]
        features = math.ceil(min(args[0], cap) * width / 8) * 8
        depth = max(round(repeats * family.depth[scale]), 1)
        options: dict[str, Any] = {"dtype": self.dtype, "name": name}
        if kind == "Conv":
            return blocks.Conv(features, *args[1:], **options)
        if kind == "SPPF":
            return blocks.SPPF(features, *args[1:], **options)
        if kind == "C2f":
            return blocks.C2f(features, depth, *args[1:], **options)
        if kind == "C3k2":
            c3k, expansion = args[1] or scale in "mlx", args[2] if len(args) > 2 else 0.5
            return blocks.C3k2(features, depth, c3k=c3k, expansion=expansion, **options)
        if kind == "C2PSA":
            return blocks.C2PSA(features, depth, **options)
        if kind == "A2C2f":
            large = scale in "lx"
            options |= {"residual": large, "mlp_ratio": family.large_mlp_ratio if large else 2.0}
            return blocks.A2C2f(features, depth, args[1], turbo=family.turbo, **options)
        raise ValueError(f"row {name} names an unknown block {kind!r}")


def _settled(x: Any) -> Any:
    """Arrays for the rows in `x` that were put off."""
    if isinstance(x, jax.tree_util.Partial):
        return x.func(*_settled(x.args))
    return type(x)(map(_settled, x)) if isinstance(x, list | tuple) else x


def initial_deviation(path: str) -> float | None:
    """Standard deviation of kernels that start from a normal distribution, else None.

    Those of the area blocks do.
    """
    return 0.02 if re.search(r"/m\.\d+\.\d+/(attn/|mlp\.).*/kernel$", path) else None


def initial_constants(model: Yolo) -> dict[str, float]:
    """Parameters that start at a constant, by path.

    A class bias starts with five objects expected in a 640 x 640 image at every level; a box
    bias at two cells; the scale of a residual area stage at 0.01.
    """
    family, scale = parse(model.model)
    head = f"model.{len(family.rows) - 1}"
    priors = {}
    for i, stride in enumerate(model.strides):
        priors[f"{head}/cv2.{i}.2/bias"] = 2.0
        priors[f"{head}/cv3.{i}.2/bias"] = math.log(5 / model.classes / (640 / stride) ** 2)
    if scale in "lx":
        priors |= {f"model.{i}/gamma": 0.01 for i, row in enumerate(family.rows)
                   if row[2] == "A2C2f" and row[3][1]}  # fmt: skip
    return priors


def decode(predictions: Predictions, anchors: Anchors) -> tuple[jax.Array, jax.Array]:
    """Boxes (N, A, 4), x1 y1 x2 y2 in pixels, and class probabilities (N, A, classes)."""
    dtype = jnp.promote_types(predictions.boxes.dtype, jnp.float32)
    boxes = decode_boxes(predictions.boxes.astype(dtype), anchors)
    strides = jnp.asarray(anchors.strides, dtype)[:, None]
    return boxes * strides, jax.nn.sigmoid(predictions.scores.astype(dtype))
