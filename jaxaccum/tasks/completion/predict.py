"""Clouds completed: as arrays, written, drawn, and told as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxaccum import data
from jaxaccum.data.formats.cloud_arrays import checked
from jaxaccum.data.formats.cloud_files import Points, read_valid
from jaxaccum.draw import clouds as draw_clouds
from jaxaccum.fields import ConfigError
from jaxaccum.tasks.base import Trained
from jaxaccum.tasks.completion import captioned
from jaxaccum.tasks.results import Predictor, Result, Sample
from jaxaccum.tasks.speed import Phases


@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no one answer
class Completed(Result):
    """A cloud, completed.

    Attributes:
      sample: what there was of it.
      cloud: (P, 3) float32, completed, in the frame of the sample.
      normalised: whether the network saw it in the frame of ShapeNet's.
      format: of the file that is written, "ply" or "npy".
      up: the axis that points up in the picture, "y" or "z".
      speed: milliseconds of "preparation", "network" and "restoring" the frame.
    """

    sample: Sample
    cloud: Points
    normalised: bool
    format: str = "ply"
    up: str = "y"
    speed: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """{"points", "normalised"}; "written" is added where it is."""
        return {"points": len(self.sample.value), "normalised": self.normalised}

    def plot(self) -> np.ndarray:
        """The partial and the completed cloud, side by side."""
        # Drawn with y up. Of z, x stays to the right, and y goes away from the viewer.
        turned = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]]).T if self.up == "z" else np.eye(3)
        return draw_clouds.draw_completion(self.sample.value @ turned, self.cloud @ turned)

    def save(self, target: Path) -> dict[str, Any]:
        """Also writes the cloud."""
        written = target.with_name(f"{target.name}.{self.format}")
        data.write_cloud(written, self.cloud)
        return {**super().save(target), "written": written.name}

    def summary(self) -> str:
        """What was taken, and how."""
        frame = "ShapeNet's frame" if self.normalised else "its own frame"
        given, made = len(self.sample.value), len(self.cloud)
        without = self.sample.facts.get("left_out", 0)
        told = f" ({without} more are not finite and left out)" if without else ""
        return f"{given} points{told}, taken in {frame}, completed to {made}"


def read_cloud(path: Path) -> Iterator[Sample]:
    """A cloud of a file, without its invalid points, of which its facts have the number as
    "left_out" if there are some.

    Raises:
      DataError: it cannot be read.
    """
    points, invalid = read_valid(path)
    facts = {"file": path.name} | ({"left_out": invalid} if invalid else {})
    yield Sample(points, facts, path)


def cloud_of(value: Any) -> Sample:
    """A cloud as a user has it: an array (N, 3) of numbers.

    Raises:
      DataError: it is none.
    """
    points = np.asarray(value)
    if (
        points.dtype.kind not in "fiu"
        or points.ndim != 2
        or points.shape[1] != 3
        or not len(points)
    ):
        turned = points.ndim == 2 and points.shape[0] == 3
        raise data.DataError(
            f"a cloud is an array (points, 3) of numbers; got {points.dtype} {points.shape}"
            + (": give its transpose, array.T" if turned else "")
        )
    try:
        return Sample(checked(points))
    except ValueError as error:
        raise data.DataError(f"a cloud: {error}.") from None


def predictor(
    trained: Trained,
    format: str = "ply",
    normalise: str = "auto",
    caption: str = "",
    up: str = "y",
) -> Predictor:
    """Completes one cloud.

    Args:
      trained: a completion network.
      format: of the clouds that are written, "ply" or "npy".
      normalise: "yes" brings every cloud to the frame of ShapeNet's (mean at the origin, largest
        radius 1) before, and what is predicted back after; "auto" does as in the training.
      caption: of what is in the clouds, for a network that takes captions; "" for none.
      up: "y" or "z", the axis that points up in pictures; LiDAR scans have z.
    Raises:
      ConfigError: a caption for a network that takes none, or another word.
    """
    words = {"format": ("ply", "npy"), "normalise": ("auto", "yes", "no"), "up": ("y", "z")}
    for (name, known), value in zip(words.items(), (format, normalise, up), strict=True):
        if value not in known:
            raise ConfigError(f"{name} is one of {', '.join(known)}; got {value!r}")
    text = _vector(trained, caption)
    framed = {"auto": bool(trained.facts["normalised"]), "yes": True, "no": False}[normalise]
    forward = jax.jit(trained.task.predict)

    def complete(sample: Sample) -> Completed:
        cloud, phases = sample.value, Phases()
        radius = float(np.linalg.norm(cloud, axis=1).max())
        if not framed and radius > 2:
            print(
                f"{sample or 'a cloud'}: reaches {radius:.3g} from the origin, far beyond the "
                "clouds that the network knows; bring it to their frame, or try --normalise=yes"
            )
        partial, pose = data.prepare_partial(cloud, framed)
        phases.end("preparation")
        output = np.asarray(forward(trained.params, trained.stats, partial[None], text))
        phases.end("network")
        predicted = pose.restore(output[0])
        phases.end("restoring")
        if not np.isfinite(predicted).all():
            raise data.DataError(f"{sample}: the network's prediction is not finite")
        return Completed(sample, predicted, framed, format, up, phases.milliseconds)

    return complete


def _vector(trained: Trained, caption: str) -> jax.Array | None:
    """The vector (1, T) of a caption; None for none."""
    encoder = trained.config.text.encoder
    if caption and not encoder:
        raise ConfigError("--caption: these weights were learned without captions")
    if not caption:
        if encoder:
            print(
                "no --caption: queries are made without one, by a layer that this run's captions "
                "have not trained"
            )
        return None
    return captioned.vectors_of(encoder, caption, 1)
