"""Boxes in the image and in space: as arrays, drawn, as KITTI's label files and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxaccum import data
from jaxaccum.data.formats.kitti_files import TEXTS, frame_file
from jaxaccum.data.texts import shown_path
from jaxaccum.draw import boxes3d as draw_boxes3d
from jaxaccum.metrics import detection as metrics
from jaxaccum.metrics import kitti
from jaxaccum.tasks.base import Trained
from jaxaccum.tasks.detection3d.labels import to_labels
from jaxaccum.tasks.results import Predictor, Result, Sample
from jaxaccum.tasks.speed import Phases


@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no one answer
class Detected3D(Result):
    """The objects found in an image, where they stand and which way they face.

    Attributes:
      sample: the image.
      labels: the objects as KITTI's label files have them, the surest first; pixels, metres and
        radians.
      classes: (n,) int32.
      camera: (3, 4) the projection. camera_of: where that is from.
      highest: score of any box of the network, also of those that were left out.
      conf: smallest score that was asked for.
      speed: milliseconds of "preparation", "network" and "NMS".
    """

    sample: Sample
    labels: kitti.Labels
    classes: np.ndarray
    camera: np.ndarray
    camera_of: str
    highest: float
    conf: float
    speed: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def to_json(self) -> dict[str, Any]:
        """{"width", "height", "camera", "detections": [{"class", "name", "score", "box",
        "location", "dimensions", "rotation_y", "alpha"}]}, pixels, metres and radians."""
        height, width = self.sample.value.shape[:2]
        found = self.labels
        return {
            "width": width,
            "height": height,
            "camera": self.camera_of,
            "detections": [
                {
                    "class": int(self.classes[i]),
                    "name": found.kinds[i],
                    "score": round(float(np.asarray(found.scores)[i]), 5),
                    "box": [round(float(v), 2) for v in found.boxes[i]],
                    "location": [round(float(v), 3) for v in found.locations[i]],
                    "dimensions": [round(float(v), 3) for v in found.dimensions[i]],
                    "rotation_y": round(float(found.yaw[i]), 4),
                    "alpha": round(float(found.alpha[i]), 4),
                }
                for i in range(len(found))
            ],
        }

    def plot(self) -> np.ndarray:
        """The image with the boxes in space, and these from above."""
        return draw_boxes3d.side_by_side(self.sample.value, self.labels, self.camera)

    def frame(self) -> np.ndarray:
        """The image with the boxes in space, in its own size."""
        return draw_boxes3d.draw(self.sample.value, self.labels, self.camera)

    def save(self, target: Path) -> dict[str, Any]:
        """Also writes data/NAME.txt in KITTI's submission format."""
        folder = target.parent / "data"
        folder.mkdir(exist_ok=True)
        (folder / f"{target.name}.txt").write_text(kitti.format(self.labels))
        return super().save(target)

    def summary(self) -> str:
        """What stands where, the nearest first."""
        order = np.argsort(self.labels.locations[:, 2], kind="stable")
        words = [f"{self.labels.kinds[i]} at {self.labels.locations[i, 2]:.1f} m" for i in order]
        more = f" and {len(words) - 6} more" if len(words) > 6 else ""
        nothing = f"nothing (highest score {self.highest:.2g}, --conf={self.conf:g})"
        return f"camera: {shown_path(self.camera_of)}; {', '.join(words[:6]) + more or nothing}"


def predictor(
    trained: Trained, conf: float = 0.25, iou: float = 0.7, calib: str | Path = ""
) -> Predictor:
    """Detects the objects of one image.

    Args:
      trained: a 3D detector.
      conf: smallest score. iou: overlap above which the lesser box is dropped.
      calib: folder of KITTI calibration files NAME.txt; "" looks for a folder `calib` beside that
        of the image. An image without one is taken for one of KITTI's usual camera.
    """
    task: Any = trained.task
    forward = jax.jit(task.predict)
    folder = Path(calib) if calib else None

    def detect(sample: Sample) -> Detected3D:
        image, phases = sample.value, Phases()
        try:
            camera, known = _camera(sample.path, image.shape, folder)
        except OSError as error:
            raise data.DataError(f"{sample}: its calibration cannot be read ({error})") from error
        canvas, ratio, pad = data.letterbox3d(image, task.size)
        own = data.letterboxed_camera(camera, ratio, pad)
        phases.end("preparation")
        output = forward(trained.params, trained.stats, canvas[None], own[None])
        boxes, scores, boxes3d = jax.tree.map(lambda a: np.asarray(a[0]), output)
        phases.end("network")
        found = metrics.nms(boxes, scores, conf=conf, iou=iou, multi_label=False)
        original = metrics.unletterbox(found.boxes, ratio, pad, image.shape[:2])
        labels = to_labels(found, original, boxes3d, trained.names)
        phases.end("NMS")
        return Detected3D(
            sample, labels, found.classes, camera, known, float(scores.max()), conf,
            phases.milliseconds,
        )  # fmt: skip

    return detect


def _camera(path: Path | None, shape: Sequence[int], calib: Path | None) -> tuple[np.ndarray, str]:
    """The projection (3, 4) of an image, and where it is from."""
    if path is not None:
        folder = path.parent.parent / "calib" if calib is None else calib
        if file := frame_file(folder, "", path.stem, TEXTS):
            return data.read_calibration(file), file.name
        if calib is not None:
            missing = folder / f"{path.stem}.txt"
            raise data.DataError(
                f"{shown_path(missing)}: no calibration of {shown_path(path.name)}",
                file=str(missing),
            )
    scale = shape[1] / 1242
    return data.DEFAULT_CAMERA * np.asarray([[scale], [scale], [1]], np.float32), "KITTI's usual"
