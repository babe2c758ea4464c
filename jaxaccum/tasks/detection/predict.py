"""Detections of an image: as arrays, drawn, and as JSON."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxaccum import data, draw
from jaxaccum.fields import ConfigError
from jaxaccum.metrics import detection as metrics
from jaxaccum.tasks.base import Trained
from jaxaccum.tasks.results import Predictor, Result, Sample
from jaxaccum.tasks.speed import Phases


@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no one answer
class Detected(Result):
    """The objects found in an image, the surest first.

    Attributes:
      sample: the image.
      boxes: (n, 4) float32, x1 y1 x2 y2 in its pixels.
      scores: (n,) float32, 0 to 1. classes: (n,) int32.
      names: of all classes.
      highest: score of any box of the network, also of those that were left out.
      conf: smallest score that was asked for.
      also: what `save` writes beside the picture: "txt", "crop".
      choices: how the network was used; see `Task.choices`.
      speed: milliseconds of "preparation", "network" and "NMS", end to end "choosing".
    """

    sample: Sample
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    names: tuple[str, ...]
    highest: float
    conf: float
    also: tuple[str, ...] = ()
    choices: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    speed: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.boxes)

    def to_text(self) -> str:
        """A YOLO label file: class, centre x, y, width, height over the image's, score."""
        height, width = self.sample.value.shape[:2]
        low, high = self.boxes[:, :2], self.boxes[:, 2:]
        shares = np.concatenate([(low + high) / 2, high - low], axis=1)
        rows = zip(self.classes, shares / (2 * [width, height]), self.scores, strict=True)
        return "".join(f"{c} {' '.join(f'{v:.6f}' for v in box)} {s:.5f}\n" for c, box, s in rows)

    def crops(self) -> list[np.ndarray]:
        """The part of the image in each box, (h, w, 3) uint8 RGB; at least one pixel."""
        corners = np.concatenate([np.floor(self.boxes[:, :2]), np.ceil(self.boxes[:, 2:])], axis=1)
        found = []
        for x1, y1, x2, y2 in corners.astype(int):
            found.append(self.sample.value[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)].copy())
        return found

    def save(self, target: Path) -> dict[str, Any]:
        """Writes the picture, and in folders beside it labels/NAME.txt and crops/CLASS/NAME_N.png
        where these were asked for."""
        if "txt" in self.also:
            (target.parent / "labels").mkdir(exist_ok=True)
            (target.parent / "labels" / f"{target.name}.txt").write_text(self.to_text())
        if "crop" in self.also:
            for number, (c, crop) in enumerate(zip(self.classes, self.crops(), strict=True), 1):
                kind = re.sub(r"[^\w -]", "_", self.names[c])
                file = target.parent / "crops" / kind / f"{target.name}_{number}.png"
                draw.save_image(file, crop)
        return super().save(target)

    def to_json(self) -> dict[str, Any]:
        """{"width", "height", "detections": [{"class", "name", "score", "box": [x1, y1, x2, y2] in
        pixels}]}; of networks with two sets of branches also "end_to_end"."""
        height, width = self.sample.value.shape[:2]
        return {
            "width": width,
            "height": height,
            **self.choices,
            "detections": [
                {
                    "class": int(c),
                    "name": self.names[c],
                    "score": round(float(s), 5),
                    "box": [round(float(v), 2) for v in b],
                }
                for b, s, c in zip(self.boxes, self.scores, self.classes, strict=True)
            ],
        }

    def to_supervision(self) -> Any:
        """A `supervision.Detections`; needs the package supervision."""
        import supervision  # type: ignore[import-not-found, unused-ignore]

        return supervision.Detections(
            xyxy=self.boxes.astype(np.float32), confidence=self.scores.astype(np.float32),
            class_id=self.classes.astype(int),
            data={"class_name": np.array([self.names[c] for c in self.classes], dtype=str)},
        )  # fmt: skip

    def plot(self) -> np.ndarray:
        """The image with its boxes."""
        return draw.draw_detections(
            self.sample.value, self.boxes, self.classes, self.names, self.scores
        )

    def frame(self) -> np.ndarray:
        """The image with its boxes, in its own size."""
        return draw.draw_detections(
            self.sample.value, self.boxes, self.classes, self.names, self.scores, enlarge=False
        )

    def summary(self) -> str:
        """How many of which."""
        found = [self.names[c] for c in self.classes]
        counts = ", ".join(f"{found.count(n)} {n}" for n in dict.fromkeys(found))
        return counts or f"nothing (highest score {self.highest:.2g}, --conf={self.conf:g})"


def predictor(
    trained: Trained,
    conf: float = 0.25,
    iou: float = 0.7,
    classes: Sequence[str] = (),
    max_det: int = 300,
    agnostic: bool = False,
    save_txt: bool = False,
    save_crop: bool = False,
    end_to_end: bool | None = None,
) -> Predictor:
    """Detects the objects of one image.

    Args:
      trained: a detector.
      conf: smallest score. iou: overlap above which the lesser box is dropped, but end to end.
      classes: names or numbers of those to look for; () for all.
      max_det: objects in an image at most.
      agnostic: lesser boxes are dropped whatever their class; end to end those of one anchor.
      save_txt, save_crop: also write labels and parts of the image.
      end_to_end: by the one-to-one branch and without NMS, or not; None: as its config says.
    Raises:
      ConfigError: there is no such class, or no such branch.
    """
    wanted = _numbers(classes, trained.names)
    also = ("txt",) * save_txt + ("crop",) * save_crop
    trained = trained.with_end_to_end(end_to_end)
    task: Any = trained.task
    if task.end_to_end:  # more than are asked for, so that classes are chosen before they are cut
        task = dataclasses.replace(task, max_det=max(max_det, 300), agnostic=agnostic)
    forward = jax.jit(task.predict)

    def detect(sample: Sample) -> Detected:
        image, phases = sample.value, Phases()
        square, ratio, pad = data.letterbox(image, task.image_size)
        phases.end("preparation")
        boxes, scores, *labels = (np.asarray(a[0]) for a in forward(
            trained.params, trained.stats, square[None]
        ))  # fmt: skip
        phases.end("network")
        if wanted is not None:
            scores = np.where(wanted[labels[0]] if task.end_to_end else wanted, scores, 0)
        if task.end_to_end:
            found = metrics.surest(
                boxes, scores, *labels, conf=conf, max_det=max_det, wanted=wanted
            )
        else:
            found = metrics.nms(
                boxes, scores, conf=conf, iou=iou, max_det=max_det, multi_label=False,
                agnostic=agnostic,
            )  # fmt: skip
        own = metrics.unletterbox(found.boxes, ratio, pad, image.shape[:2])
        phases.end("choosing" if task.end_to_end else "NMS")
        return Detected(
            sample, own, found.scores, found.classes, trained.names, float(scores.max()), conf,
            also, task.choices(), phases.milliseconds,
        )  # fmt: skip

    return detect


def _numbers(classes: Sequence[str], names: Sequence[str]) -> np.ndarray | None:
    """(all classes,) bool, which of them are meant; None for all."""
    if not classes:
        return None
    found = np.zeros(len(names), bool)
    for one in map(str, classes):
        if one in names:
            found[names.index(one)] = True
        elif one.isascii() and one.isdecimal() and int(one) < len(names):
            found[int(one)] = True
        else:
            close = get_close_matches(one, names, n=1, cutoff=0.5)
            meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(names[:20])}"
            raise ConfigError(f"classes: {one!r} is no class of this model: {meant}")
    return found
