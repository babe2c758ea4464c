"""Boxes in the image and in space of files: drawn, as KITTI's label files and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxaccum import data
from jaxaccum.draw import boxes as draw
from jaxaccum.draw import boxes3d as draw_boxes3d
from jaxaccum.metrics import detection as metrics
from jaxaccum.metrics import kitti
from jaxaccum.tasks import files
from jaxaccum.tasks.base import Trained
from jaxaccum.tasks.detection3d.labels import to_labels


def detect3d(
    trained: Trained,
    source: Path,
    out: Path,
    conf: float = 0.25,
    iou: float = 0.7,
    calib: Path | None = None,
    failed: list[str] | None = None,
) -> list[dict[str, Any]]:
    """Detects boxes in the image and in space, draws both and writes KITTI's label files.

    Args:
      trained: a 3D detector.
      source: image, GIF, video or folder.
      out: folder for a picture per image (its boxes in space, and from above), data/NAME.txt in
        KITTI's submission format, and detections.json.
      conf: smallest score. iou: overlap above which the lesser box is dropped.
      calib: folder of KITTI calibration files NAME.txt; None looks for a folder `calib` beside
        that of the images. An image without one is taken for one of KITTI's usual camera.
      failed: takes a message for every file that could not be used.
    Returns:
      per image, or frame as in `detect`, {"file", "width", "height", "camera", "detections":
      [{"class", "name", "score", "box", "location", "dimensions", "rotation_y", "alpha"}]},
      pixels, metres and radians.
    """
    paths = files.find_files(source, files.PICTURES)
    files.spare(paths, (f"{target}.png" for target in files.targets_of(out, paths).values()))
    task: Any = trained.task
    forward = jax.jit(task.predict)
    (out / "data").mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    unreadable = [] if failed is None else failed
    no_camera = set[Path]()
    for picture in files.pictures(paths, out, unreadable):
        image = picture.pixels
        try:
            camera, known = _camera(picture.path, image.shape, calib)
        except (data.DataError, OSError) as error:
            if picture.path not in no_camera:  # else every frame would say it
                unreadable.append(files.why(picture.path, error))
            no_camera.add(picture.path)
            continue
        canvas, ratio, pad = data.letterbox3d(image, task.size)
        own = data.letterboxed_camera(camera, ratio, pad)
        output = forward(trained.params, trained.stats, canvas[None], own[None])
        boxes, scores, boxes3d = jax.tree.map(lambda a: np.asarray(a[0]), output)
        found = metrics.nms(boxes, scores, conf=conf, iou=iou, multi_label=False)
        original = metrics.unletterbox(found.boxes, ratio, pad, image.shape[:2])
        labels = to_labels(found, original, boxes3d, trained.names)
        target = picture.target
        drawn = draw_boxes3d.side_by_side(image, labels, camera)
        draw.save_image(target.with_name(f"{target.name}.png"), drawn)
        (out / "data" / f"{target.name}.txt").write_text(kitti.format(labels))
        results.append(
            {
                **picture.told,
                "width": image.shape[1],
                "height": image.shape[0],
                "camera": known,
                "detections": [
                    {
                        "class": int(found.classes[i]),
                        "name": labels.kinds[i],
                        "score": round(float(found.scores[i]), 5),
                        "box": [round(float(v), 2) for v in original[i]],
                        "location": [round(float(v), 3) for v in labels.locations[i]],
                        "dimensions": [round(float(v), 3) for v in labels.dimensions[i]],
                        "rotation_y": round(float(labels.yaw[i]), 4),
                        "alpha": round(float(labels.alpha[i]), 4),
                    }
                    for i in range(len(labels))
                ],
            }
        )
    files.report(unreadable, results, source)
    (out / "detections.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def _nearest(result: dict[str, Any]) -> str:
    """The detections of an image in words, the nearest first."""
    found = sorted(result["detections"], key=lambda d: d["location"][2])
    words = [f"{d['name']} at {d['location'][2]:.1f} m" for d in found]
    return ", ".join(words[:6]) + (f" and {len(words) - 6} more" if len(words) > 6 else "") or (
        "nothing"
    )


def _camera(path: Path, shape: Sequence[int], calib: Path | None) -> tuple[np.ndarray, str]:
    """The projection (3, 4) of an image, and where it is from."""
    folder = path.parent.parent / "calib" if calib is None else calib
    file = folder / f"{path.stem}.txt"
    if file.is_file():
        return data.read_calibration(file), file.name
    if calib is not None:
        raise data.DataError(f"{file}: no calibration of {path.name}", file=str(file))
    scale = shape[1] / 1242
    return data.DEFAULT_CAMERA * np.asarray([[scale], [scale], [1]], np.float32), "KITTI's usual"


def lines(results: list[dict[str, Any]], out: Path) -> list[str]:
    """What was found, in words."""
    return [
        *(f"{files.called(r)} (camera: {r['camera']}): {_nearest(r)}" for r in results),
        f"{len(results)} pictures, KITTI's label files in {out / 'data'}",
    ]
