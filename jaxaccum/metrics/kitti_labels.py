"""KITTI's label files: what their rows hold, reading them with every value checked, writing them.

Everything is in the camera frame of KITTI: x right, y down, z forward, in metres; angles are in
radians. A box stands on its `location`, the centre of its bottom face.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxaccum.data.base import DataError
from jaxaccum.data.texts import lines, number, shown, shown_path

Matrix = NDArray[np.float64]

DONT_CARE = "DontCare"
NO_ALPHA = -10.0  # a detection's alpha where the detector has none


class _Field(NamedTuple):
    """A number of a row: its name, the range it must lie in, what stands for unknown, a hint."""

    name: str
    lowest: float
    highest: float
    unknown: float | None = None
    hint: str = ""


_PIXELS = 100_000
# KITTI's own values lie well inside these; what does not is another unit, another column or
# damage. Unwrapped angles pass, degrees do not.
FIELDS = (
    _Field("truncation", 0, 1, -1, "the tracking benchmark's 0, 1, 2 become 0, 0.5, 1"),
    _Field("occlusion", 0, 3, -1),
    _Field("alpha", -10, 10, None, "in radians, -10 where unknown"),
    *(
        _Field(f"{side} of the box", -_PIXELS, _PIXELS, None, "in pixels")
        for side in ("left", "top", "right", "bottom")
    ),
    *(_Field(name, 0, 100, -1, "in metres") for name in ("height", "width", "length")),
    *(_Field(f"{axis} of the location", -1000, 1000, None, "in metres") for axis in "xyz"),
    _Field("rotation_y", -10, 10, None, "in radians, -10 where unknown"),
    _Field("score", -1e30, 1e30),
)


@dataclass(frozen=True, eq=False)
class Labels:
    """All rows of one image's label file, ground truth or detections.

    Attributes:
      kinds: n KITTI types: "Car", "Van", ..., "DontCare".
      truncation: (n,) float32, 0 to 1; -1 where unknown.
      occlusion: (n,) int32, 0 (none) to 3 (unknown); -1 where not given.
      alpha: (n,) float32 observation angle in radians; -10 where not given.
      boxes: (n, 4) float32, xyxy in pixels of the original image.
      dimensions: (n, 3) float32 height, width, length in metres; -1 where not given.
      locations: (n, 3) float32 x, y, z of the bottom centre in metres; -1000 where not given.
      yaw: (n,) float32 rotation_y in radians; -10 where not given.
      scores: (n,) float32, or None for ground truth.
    """

    kinds: tuple[str, ...]
    truncation: NDArray[np.float32]
    occlusion: NDArray[np.int32]
    alpha: NDArray[np.float32]
    boxes: NDArray[np.float32]
    dimensions: NDArray[np.float32]
    locations: NDArray[np.float32]
    yaw: NDArray[np.float32]
    scores: NDArray[np.float32] | None

    def __post_init__(self) -> None:
        n = len(self.kinds)
        given = {
            "truncation": (self.truncation.shape, (n,)),
            "occlusion": (self.occlusion.shape, (n,)),
            "alpha": (self.alpha.shape, (n,)),
            "boxes": (self.boxes.shape, (n, 4)),
            "dimensions": (self.dimensions.shape, (n, 3)),
            "locations": (self.locations.shape, (n, 3)),
            "yaw": (self.yaw.shape, (n,)),
        }
        if self.scores is not None:
            given["scores"] = (self.scores.shape, (n,))
        wrong = [f"{k} {is_} for {due}" for k, (is_, due) in given.items() if is_ != due]
        if wrong:
            raise ValueError(f"Labels of {n} kinds have {', '.join(wrong)}")

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def boxes3d(self) -> Matrix:
        """(n, 7) height, width, length, x, y, z, yaw: as `iou_bev` and `iou_3d` take them."""
        columns = [self.dimensions, self.locations, self.yaw[:, None]]
        return np.concatenate(columns, axis=1).astype(np.float64)


def parse(text: str, file: str) -> Labels:
    """Reads a label file: 15 fields a line, or 16 with a score; empty lines are passed over.

    Args:
      text: what the file holds.
      file: its name, for messages.

    Returns:
      The labels in the file's order. Without any line there are no scores.

    Raises:
      DataError: naming file and line, on a wrong number of fields, one that is not a number or
        not in the range of `FIELDS`, a box with right < left or bottom < top, or scores on some
        lines only.
    """
    kinds: list[str] = []
    rows: list[list[float]] = []
    for line, raw in enumerate(lines(text), start=1):
        fields = raw.split()
        if not fields:
            continue
        where = f"{shown_path(file)}:{line}"
        if len(fields) not in (15, 16):
            raise DataError(
                f"{where}: {len(fields)} fields, but a KITTI label has 15 (type, truncation, "
                "occlusion, alpha, 4 of the box, 3 dimensions, 3 of the location, rotation_y), "
                "or 16 with a score",
                file=file,
                line=line,
            )
        if rows and len(fields) - 1 != len(rows[0]):
            raise DataError(
                f"{where}: {len(fields)} fields, but the lines before it have "
                f"{len(rows[0]) + 1}: give all lines a score or none",
                file=file,
                line=line,
            )
        try:
            row = [number(field) for field in fields[1:]]
        except ValueError as error:
            raise DataError(
                f"{where}: {error}; after the type there must be numbers", file=file, line=line
            ) from None
        fault = _fault(row)
        if fault:
            raise DataError(f"{where}: {fault}. Correct the row.", file=file, line=line)
        kinds.append(fields[0])
        rows.append(row)
    table = np.array(rows, np.float32) if rows else np.zeros((0, 14), np.float32)
    return Labels(
        kinds=tuple(kinds),
        truncation=table[:, 0],
        occlusion=table[:, 1].astype(np.int32),
        alpha=table[:, 2],
        boxes=table[:, 3:7],
        dimensions=table[:, 7:10],
        locations=table[:, 10:13],
        yaw=table[:, 13],
        scores=table[:, 14] if table.shape[1] == 15 else None,
    )


def _fault(row: list[float]) -> str:
    """What is wrong with the numbers of a row, or ""."""
    for field, value in zip(FIELDS, row, strict=False):  # the score may be absent
        if field.lowest <= value <= field.highest or value == field.unknown:
            continue
        if not np.isfinite(value):
            return f"{field.name} is {value:g}, which is not finite"
        other = "" if field.unknown is None else f" or {field.unknown:g} for unknown"
        hint = f" ({field.hint})" if field.hint else ""
        return (
            f"{field.name} is {value:g}, expected {field.lowest:g} to {field.highest:g}"
            f"{other}{hint}"
        )
    _, occlusion, _, left, top, right, bottom = row[:7]
    if not occlusion.is_integer():
        return f"occlusion is {occlusion:g}, expected a whole number from 0 to 3, or -1"
    if right < left or bottom < top:
        return f"box {shown(row[3:7])} is not left, top, right, bottom"
    return ""


def format(labels: Labels) -> str:
    """The text of a label file, which `parse` reads back.

    Pixels and metres get 2 decimals, as in the benchmark's own files; angles and scores get 4.
    With scores it is a submission: truncation and occlusion, which it does not claim to know, are
    -1, and the score comes last.
    """
    lines = []
    for i, kind in enumerate(labels.kinds):
        known = "-1 -1"
        if labels.scores is None:
            known = f"{labels.truncation[i]:.2f} {labels.occlusion[i]}"
        lengths = np.concatenate([labels.boxes[i], labels.dimensions[i], labels.locations[i]])
        fields = [kind, known, f"{labels.alpha[i]:.4f}", *(f"{value:.2f}" for value in lengths)]
        fields.append(f"{labels.yaw[i]:.4f}")
        if labels.scores is not None:
            fields.append(f"{labels.scores[i]:.4f}")
        lines.append(" ".join(fields) + "\n")
    return "".join(lines)
