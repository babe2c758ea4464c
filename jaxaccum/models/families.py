"""The YOLO families as tables: what is in a network, and how wide and deep by scale.

A family is data: a depth, a width and a channel cap per scale, and rows of
(from, repeats, block, arguments). `from` is the previous row (-1), a row's number, or several.
Sources: YOLOv8, YOLO11 and YOLO26 (Ultralytics 2023, 2024, 2026), YOLO12 (Tian et al. 2025,
arXiv:2502.12524), in the tables of their public model descriptions; the P2 variants of 11 and 12 by
analogy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

REG_MAX = 16  # bins of a side's distance, where it is a distribution
Row = tuple[Any, int, str, tuple]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of networks.

    Attributes:
      depth, width, max_channels: by scale letter.
      rows: the network; the last row is the head.
      depthwise_head: the class branch of the head is made of depthwise convolutions.
      bins: of the distance to each side of a box; 1: it is predicted as one number.
      one_to_one: the head has its branches twice; the second set is trained to find every object
        once, and needs no suppression of doubles.
      turbo: area attention in the form of the authors' later code.
      large_mlp_ratio: of the area blocks at scales l and x; 2 at the others.
    """

    depth: Mapping[str, float]
    width: Mapping[str, float]
    max_channels: Mapping[str, int]
    rows: tuple[Row, ...]
    depthwise_head: bool = False
    bins: int = REG_MAX
    one_to_one: bool = False
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

_V26_BODY: tuple[Row, ...] = (
    *_V11_BODY[:9],
    (-1, 1, "SPPF", (1024, 5, True)),  # residual
    (-1, 2, "C2PSA", (1024,)),  # 10
    (-1, 1, "Upsample", ()),  # the way up
    ((-1, 6), 1, "Concat", ()),
    (-1, 2, "C3k2", (512, True)),
    (-1, 1, "Upsample", ()),
    ((-1, 4), 1, "Concat", ()),
    (-1, 2, "C3k2", (256, True)),  # 16
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
_V26 = (
    (2, "C3k2", (256, True)),
    (2, "C3k2", (512, True)),
    (1, "C3k2", (1024, True, 0.5, True)),  # with attention
)
_V26_P2 = (2, "C3k2", (128, True))
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
    "yolo26": Family(
        **_V11_SIZES,
        bins=1,
        one_to_one=True,
        rows=(*_V26_BODY, *_down((13, 10), _V26), ((16, 19, 22), 1, "Detect", ())),
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
FAMILIES["yolo26-p2"] = dataclasses.replace(
    FAMILIES["yolo26"],
    rows=(
        *_V26_BODY,
        *_p2(_V26_P2),
        *_down((16, 13, 10), (_V26_P2, *_V26)),
        ((19, 22, 25, 28), 1, "Detect", ()),
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


def has_one_to_one(name: str) -> bool:
    """Whether a model of that name has one-to-one branches; False of unknown ones, too."""
    family = FAMILIES.get(name.rpartition("-")[0])
    return family is not None and family.one_to_one


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
