"""The one network that reads the tables of the YOLO families, its head, and what its output means.

The tables are in `models.families`, and known here by the same names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum.accumulate import Groups
from jaxaccum.models import blocks, boxes3d, ops
from jaxaccum.models.families import FAMILIES, REG_MAX, Family, names, parse

__all__ = [
    "FAMILIES",
    "REG_MAX",
    "Anchors",
    "Detect",
    "Family",
    "Found",
    "Predictions",
    "Yolo",
    "anchors",
    "decode",
    "decode_boxes",
    "initial_constants",
    "initial_deviation",
    "initial_twin",
    "names",
    "parse",
    "surest",
]


class Predictions(NamedTuple):
    """The raw output of a detector, anchors of all levels in one axis, fine to coarse, row-major.

    Attributes:
      boxes: (N, A, 4 * 16) logits of the distances left, top, right, bottom, side-major; or
        (N, A, 4) the distances themselves in cells, of any sign (YOLO26).
      scores: (N, A, classes) class logits.
      boxes3d: (N, A, outputs) logits of 3D boxes, see `models.boxes3d`; None of a 2D detector.
      one_to_one: of the branch that is trained to find every object once and needs no NMS; the
        other arrays are then of the branch that finds it many times. None without that branch.
    """

    boxes: jax.Array
    scores: jax.Array
    boxes3d: jax.Array | None = None
    one_to_one: Predictions | None = None


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
    """Raw boxes of `Predictions` to boxes (..., A, 4), x1 y1 x2 y2 in cells of each level.

    Of (..., A, 64) logits the distance to a side is the expectation over its 16 bins (Li et al.
    2020, arXiv:2006.04388). Distances (..., A, 4) are taken as they are: a negative one is no
    error, and may turn a box inside out.
    """
    distances = boxes
    if boxes.shape[-1] != 4:
        logits = boxes.reshape(*boxes.shape[:-1], 4, REG_MAX)
        bins = jnp.arange(REG_MAX, dtype=boxes.dtype)
        distances = jnp.sum(jax.nn.softmax(logits, axis=-1) * bins, axis=-1)
    centres = jnp.asarray(anchors.centres, boxes.dtype)
    return jnp.concatenate([centres - distances[..., :2], centres + distances[..., 2:]], axis=-1)


class Detect(nn.Module):
    """The head: a box branch and a class branch per level. Widths depend on the finest level.

    Attributes:
      bins: see `Family`.
      outputs3d: outputs of a third branch, for 3D boxes; 0 for none.
      one_to_one: a second set of box and class branches. It reads the features as they are given:
        its gradient goes no further than to its own parameters.
    """

    classes: int
    depthwise: bool = False
    dtype: Any = jnp.float32
    outputs3d: int = 0
    bins: int = REG_MAX
    one_to_one: bool = False

    @nn.compact
    def __call__(self, levels: list[jax.Array], groups: Groups | None) -> Predictions:
        found = self._branches(levels, groups, "")
        if self.outputs3d:
            found = found._replace(boxes3d=self._in_space(levels, groups))
        if self.one_to_one:
            given = [jax.lax.stop_gradient(level) for level in levels]
            found = found._replace(one_to_one=self._branches(given, groups, "one2one_"))
        return found

    def _branches(self, levels: list[jax.Array], groups: Groups | None, prefix: str) -> Predictions:
        """Boxes and classes by the modules of that prefix."""
        finest = levels[0].shape[-1]
        box = max(16, finest // 4, 4 * self.bins)
        hidden = max(finest, min(self.classes, 100))
        boxes, scores = [], []
        for i, level in enumerate(levels):
            name = f"{prefix}cv2.{i}"
            x = self._conv(box, 3, f"{name}.0")(level, groups)
            x = self._conv(box, 3, f"{name}.1")(x, groups)
            boxes.append(self._last(4 * self.bins, f"{name}.2")(x))
            x, name = level, f"{prefix}cv3.{i}"
            for j in range(2):
                if self.depthwise:
                    x = self._conv(x.shape[-1], 3, f"{name}.{j}.0", x.shape[-1])(x, groups)
                    x = self._conv(hidden, 1, f"{name}.{j}.1")(x, groups)
                else:
                    x = self._conv(hidden, 3, f"{name}.{j}")(x, groups)
            scores.append(self._last(self.classes, f"{name}.2")(x))
        return Predictions(_joined(boxes), _joined(scores))

    def _in_space(self, levels: list[jax.Array], groups: Groups | None) -> jax.Array:
        """Logits of boxes in space."""
        deep = max(levels[0].shape[-1] // 4, min(self.outputs3d, 512))
        found = []
        for i, level in enumerate(levels):
            x = self._conv(deep, 3, f"cv4.{i}.0")(level, groups)
            x = self._conv(deep, 3, f"cv4.{i}.1")(x, groups)
            found.append(self._last(self.outputs3d, f"cv4.{i}.2")(x))
        return _joined(found)

    def _last(self, features, name):
        # Class logits start near -10, where bfloat16 knows steps of 1/16.
        wide = jnp.promote_types(self.dtype, jnp.float32)
        return blocks.conv2d(features, 1, dtype=wide, name=name)

    def _conv(self, features, kernel, name, channel_groups=1):
        return blocks.Conv(
            features, kernel, channel_groups=channel_groups, dtype=self.dtype, name=name
        )


def _joined(levels: list[jax.Array]) -> jax.Array:
    """(N, H, W, C) of each level as (N, A, C) of all."""
    return jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in levels], axis=1)


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
        name = str(row.name)
        size, microbatches = (None, 1) if groups is None else (groups.size, groups.microbatches)
        writes = ["moments"] if self.is_mutable_collection("moments") else []
        row = row.clone(parent=None)  # as a function of its variables

        def function(params, inputs):
            x, stats, weight = inputs
            variables = {"params": params, "batch_stats": stats}
            groups = None if size is None else Groups(size, weight, microbatches)
            return row.apply(variables, _settled(x), groups, mutable=writes)

        params, stats = (self.variables[c][name] for c in ("params", "batch_stats"))
        inputs = (x, stats, groups and groups.weight)
        y, changed = blocks.rematerialised(function, params, inputs, microbatches > 1)
        for collection, values in changed.items():
            self.put_variable(collection, name, values)
        return y

    def _row(self, family, scale, name, repeats, kind, args):
        """A row as a function of (input, groups)."""
        if kind == "Upsample":
            return lambda x, groups: ops.upsample(x)
        if kind == "Concat":
            return lambda x, groups: jnp.concatenate(x, axis=-1)
        if kind in ("Detect", "Detect3D"):
            return Detect(
                self.classes, family.depthwise_head, self.dtype,
                self.outputs3d if kind == "Detect3D" else 0, family.bins, family.one_to_one,
                name=name,
            )  # fmt: skip
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
            options |= dict(zip(("c3k", "expansion", "attention"), args[1:], strict=False))
            options["c3k"] |= scale in "mlx"
            return blocks.C3k2(features, depth, **options)
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


def initial_deviation(model: Yolo) -> Callable[[str], float | None]:
    """Parameter path -> standard deviation of kernels that start from a normal distribution, else
    None. Those of the area blocks do."""
    family, _ = parse(model.model)
    area = "|".join(str(i) for i, row in enumerate(family.rows) if row[2] == "A2C2f")
    block = re.compile(rf"model\.({area})/m\.\d+\.\d+/(attn/|mlp\.).*/kernel")

    def deviation(path: str) -> float | None:
        return 0.02 if block.fullmatch(path) else None

    return deviation


def initial_twin(path: str) -> str:
    """Path of the parameter that one starts as a copy of: in the one-to-one branches, of the
    others; else its own."""
    return path.replace("/one2one_", "/")


def initial_constants(model: Yolo) -> dict[str, float]:
    """Parameters that start at a constant, by path.

    A class bias starts with five objects expected in a 640 x 640 image at every level; a box
    bias at two cells; the scale of a residual area stage at 0.01.
    """
    family, scale = parse(model.model)
    head = f"model.{len(family.rows) - 1}"
    priors = {}
    for i, stride in enumerate(model.strides):
        for prefix in ("", "one2one_") if family.one_to_one else ("",):
            priors[f"{head}/{prefix}cv2.{i}.2/bias"] = 2.0
            rare = math.log(5 / model.classes / (640 / stride) ** 2)
            priors[f"{head}/{prefix}cv3.{i}.2/bias"] = rare
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


class Found(NamedTuple):
    """The surest detections of each image, by descending score; nothing is suppressed.

    Attributes:
      boxes: (N, k, 4) x1 y1 x2 y2 in pixels.
      scores: (N, k) 0 to 1.
      classes: (N, k) int32.
    """

    boxes: jax.Array
    scores: jax.Array
    classes: jax.Array


def surest(predictions: Predictions, anchors: Anchors, most: int, agnostic: bool = False) -> Found:
    """What the one-to-one branch finds: no doubles are dropped, as it learns to make none.

    In two stages: the `most` anchors whose best class is surest, and of their classes the `most`
    surest. So an anchor can be there several times, with different classes. Of equal scores the
    first anchor, and the first class, comes first.

    Args:
      predictions: with that branch.
      most: detections of an image; k is that or the number of anchors, if there are fewer.
      agnostic: each anchor's best class alone.
    """
    if predictions.one_to_one is None:
        raise ValueError("the network has no one-to-one branch; use `decode` and suppress doubles")
    boxes, scores = decode(predictions.one_to_one, anchors)
    k = min(most, scores.shape[1])
    best, anchor = jax.lax.top_k(jnp.max(scores, axis=-1), k)
    scores = jnp.take_along_axis(scores, anchor[..., None], axis=1)
    if agnostic:
        label = jnp.argmax(scores, axis=-1)
    else:
        best, place = jax.lax.top_k(scores.reshape(scores.shape[0], -1), k)
        anchor = jnp.take_along_axis(anchor, place // scores.shape[-1], axis=1)
        label = place % scores.shape[-1]
    boxes = jnp.take_along_axis(boxes, anchor[..., None], axis=1)
    return Found(boxes, best, label.astype(jnp.int32))
