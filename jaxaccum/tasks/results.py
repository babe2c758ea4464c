"""What a network takes and gives, one sample at a time: a `Sample` in, a `Result` out."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np

from jaxaccum import draw
from jaxaccum.data.texts import shown_path


@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no one answer
class Sample:
    """An image, a frame of a GIF or a video, or a cloud.

    Attributes:
      value: (H, W, 3) uint8 RGB, or (N, 3) float.
      facts: what results say of it: the "file" it is of, the number of the "frame".
      path: of the file; None if it is of none.
    """

    value: np.ndarray
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    path: Path | None = None

    def __str__(self) -> str:
        """The file, and the frame of it; "" for a sample of no file."""
        frame = f" frame {self.facts['frame']}" if "frame" in self.facts else ""
        return f"{shown_path(self.facts.get('file', ''))}{frame}"


class Result(abc.ABC):
    """What a network made of a sample.

    Attributes:
      sample: of which.
      speed: milliseconds of each phase, from the sample to this, by its name; of a network's first
        sample with the compilation.
    """

    sample: Sample
    speed: Mapping[str, float] = MappingProxyType({})

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]:
        """It in plain values, that go to a JSON file; without the sample's facts."""

    @abc.abstractmethod
    def plot(self) -> np.ndarray:
        """A picture of it, (H, W, 3) uint8 RGB."""

    def frame(self) -> np.ndarray:
        """A picture of it in the size of the sample, (H, W, 3) uint8 RGB, for a video."""
        height, width = self.sample.value.shape[:2]
        drawn = self.plot()
        if drawn.shape[:2] != (height, width):
            drawn = np.asarray(cv2.resize(drawn, (width, height), interpolation=cv2.INTER_AREA))
        return drawn

    @abc.abstractmethod
    def summary(self) -> str:
        """It in a few words."""

    def save(self, target: Path) -> dict[str, Any]:
        """Writes what the verb `predict` writes of it: its picture.

        Args:
          target: path of what is written, without a suffix.
        Returns:
          what more is to be told of it in JSON.
        """
        draw.save_image(target.with_name(f"{target.name}.png"), self.plot())
        return {}

    def __str__(self) -> str:
        return ": ".join(filter(None, (str(self.sample), self.summary())))


Predictor = Callable[[Sample], Result]
