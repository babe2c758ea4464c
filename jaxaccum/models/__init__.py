"""What a network is: YOLO detectors. Knows no loss and no data set."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxaccum.models import yolo
from jaxaccum.models.init import initialise


def create(name: str, *, num_classes: int, dtype: Any = jnp.float32) -> yolo.Yolo:
    """The model of that name ("yolov8-s"); `names()` lists them.

    Args:
      name: family-scale.
      num_classes: classes of the head.
      dtype: compute dtype.
    Raises:
      ValueError: unknown name, with the nearest ones.
    """
    yolo.parse(name)
    return yolo.Yolo(name, num_classes, dtype)


names = yolo.names

__all__ = ["create", "initialise", "names"]
