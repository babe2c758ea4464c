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

_V8_SIZES: dict[str, Any] = {
    "depth": _scales(0.33, 0.33, 0.67, 1.0, 1.0),
    "width": _scales(0.25, 0.5, 0.75, 1.0, 1.25),
    "max_channels": _scales(1024, 1024, 768, 512, 512),
}
_V11_SIZES: dict[str, Any] = {
    "depth": _scales(0.5, 0.5, 0.5, 1.0, 1.0),
    "width": _scales(0.25, 0.5, 1.0, 1.0, 1.5),
    "max_channels": _scales(1024, 1024, 512, 512, 512),
    "depthwise_head": True,
}

Output = tuple[int, str, tuple]  # repeats, block and arguments of a row that the head reads


@dataclasses.dataclass(frozen=True)
class _Neck:
    """What follows a body, whose last row is the head's first input, of stride 8.

    Attributes:
      skips: rows that the way down takes up again.
      outputs: the rows that the head reads, finest first; the first is the body's last.
      finer: the one of stride 4 before them, in a network with P2.
    """

    skips: tuple[int, ...]
    outputs: tuple[Output, ...]
    finer: Output

    def rows(self, body: tuple[Row, ...], p2: bool) -> tuple[Row, ...]:
        """The body, one more step of the way up for P2, the way down, and the head."""
        rows, skips, outputs = list(body), self.skips, self.outputs
        if p2:
            skips, outputs = (len(body) - 1, *skips), (self.finer, *outputs)
            rows += [(-1, 1, "Upsample", ()), ((-1, 2), 1, "Concat", ()), (-1, *self.finer)]
        read = [len(rows) - 1]
        for skip, before, block in zip(skips, outputs, outputs[1:], strict=False):
            rows += [(-1, 1, "Conv", (before[2][0], 3, 2)), ((-1, skip), 1, "Concat", ())]
            read.append(len(rows))
            rows.append((-1, *block))
        return (*rows, (tuple(read), 1, "Detect", ()))


_NECKS = {
    "yolov8": _Neck(
        (12, 9),
        ((3, "C2f", (256, False)), (3, "C2f", (512, False)), (3, "C2f", (1024, False))),
        (3, "C2f", (128, False)),
    ),
    "yolo11": _Neck(
        (13, 10),
        ((2, "C3k2", (256, False)), (2, "C3k2", (512, False)), (2, "C3k2", (1024, True))),
        (2, "C3k2", (128, False)),
    ),
    "yolo12": _Neck(
        (11, 8),
        ((2, "A2C2f", (256, 0)), (2, "A2C2f", (512, 0)), (2, "C3k2", (1024, True))),
        (2, "C3k2", (128, False)),
    ),
    "yolo26": _Neck(
        (13, 10),
        (
            (2, "C3k2", (256, True)),
            (2, "C3k2", (512, True)),
            (1, "C3k2", (1024, True, 0.5, True)),  # with attention
        ),
        (2, "C3k2", (128, True)),
    ),
}
_BODIES: dict[str, tuple[tuple[Row, ...], dict[str, Any]]] = {
    "yolov8": (_V8_BODY, _V8_SIZES),
    "yolo11": (_V11_BODY, _V11_SIZES),
    "yolo12": (_V12_BODY, _V11_SIZES),
    "yolo26": (_V26_BODY, {**_V11_SIZES, "bins": 1, "one_to_one": True}),
}
FAMILIES: dict[str, Family] = {
    name + suffix: Family(**form, rows=_NECKS[name].rows(body, p2=bool(suffix)))
    for suffix in ("", "-p2")
    for name, (body, form) in _BODIES.items()
}
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
