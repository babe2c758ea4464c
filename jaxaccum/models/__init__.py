"""What a network is: YOLO detectors, PoinTr and AdaPoinTr. Knows no loss and no data set."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxaccum.models import completion, yolo
from jaxaccum.models.init import initialise


def create(name: str, *, num_classes: int = 0, dtype: Any = jnp.float32) -> Any:
    """The model of that name ("yolov8-s", "adapointr-pcn"); `names()` lists them.

    Args:
      name: family-scale, or family-data set.
      num_classes: classes of a detector's head; a completion network has none.
      dtype: compute dtype.
    Raises:
      ValueError: unknown name, with the nearest ones.
    """
    if name in completion.names():
        return completion.create(name, dtype)
    yolo.parse(name)
    if num_classes < 1:
        raise ValueError(f"{name} is a detector: give num_classes, at least 1; got {num_classes}")
    return yolo.Yolo(name, num_classes, dtype)


def names(task: str = "") -> list[str]:
    """Every model name, or those for a task: "detection", "detection3d" or "completion"."""
    known = {
        "detection": yolo.names(), "detection3d": yolo.names(in_space=True),
        "completion": completion.names(),
    }  # fmt: skip
    if task and task not in known:
        raise ValueError(f"there are models for {' and '.join(known)}; got {task!r}")
    return [name for kind, listed in known.items() if task in ("", kind) for name in listed]


__all__ = ["create", "initialise", "names"]
