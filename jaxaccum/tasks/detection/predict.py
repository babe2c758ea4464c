"""Detections of files: drawn, and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxaccum import data
from jaxaccum.draw import boxes as draw
from jaxaccum.metrics import detection as metrics
from jaxaccum.tasks import files
from jaxaccum.tasks.base import Trained


def detect(
    trained: Trained,
    source: Path,
    out: Path,
    conf: float = 0.25,
    iou: float = 0.7,
    failed: list[str] | None = None,
) -> list[dict[str, Any]]:
    """Detects, draws and writes.

    Args:
      trained: a detector.
      source: image, GIF, video or folder.
      out: folder for a drawn image per image and detections.json.
      conf: smallest score. iou: overlap above which the lesser box is dropped.
      failed: takes a message for every file that could not be used.
    Returns:
      per image {"file", "width", "height", "detections": [{"class", "name", "score",
      "box": [x1, y1, x2, y2] in pixels}]}; of a GIF or a video per frame, with its number "frame",
      counted from 1.
    """
    task: Any = trained.task
    paths = files.find_files(source, files.PICTURES)
    files.spare(paths, (f"{target}.png" for target in files.targets_of(out, paths).values()))
    forward = jax.jit(task.predict)
    out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    unreadable = [] if failed is None else failed
    for picture in files.pictures(paths, out, unreadable):
        image = picture.pixels
        square, ratio, pad = data.letterbox(image, task.image_size)
        boxes, scores = forward(trained.params, trained.stats, square[None])
        found = metrics.nms(
            np.asarray(boxes[0]), np.asarray(scores[0]), conf=conf, iou=iou, multi_label=False
        )
        boxes = metrics.unletterbox(found.boxes, ratio, pad, image.shape[:2])
        drawn = draw.draw_detections(image, boxes, found.classes, trained.names, found.scores)
        target = picture.target
        draw.save_image(target.with_name(f"{target.name}.png"), drawn)
        results.append(
            {
                **picture.told,
                "width": image.shape[1],
                "height": image.shape[0],
                "detections": [
                    {
                        "class": int(c),
                        "name": trained.names[c],
                        "score": round(float(s), 5),
                        "box": [round(float(v), 2) for v in b],
                    }
                    for b, s, c in zip(boxes, found.scores, found.classes, strict=True)
                ],
            }
        )
    files.report(unreadable, results, source)
    (out / "detections.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def lines(results: list[dict[str, Any]], out: Path) -> list[str]:
    """What was found, in words."""
    found = []
    for result in results:
        names = [d["name"] for d in result["detections"]]
        counts = ", ".join(f"{names.count(n)} {n}" for n in dict.fromkeys(names)) or "nothing"
        found.append(f"{files.called(result)}: {counts}")
    return [*found, f"{len(results)} drawn images and detections.json in {out}"]
