"""python -m jaxaccum.predict --workdir=DIR --source=IMAGE_OR_FOLDER --out=DIR [--conf=0.25]

Draws the detections of a run's best weights, and writes them to detections.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from jaxaccum import data, draw, run
from jaxaccum.inference import load
from jaxaccum.metrics import detection as metrics


def find_images(source: Path) -> list[Path]:
    """The image, or all images of a folder, sorted.

    Raises:
      DataError: nothing there.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise data.DataError(f"--source={source} is neither a file nor a folder")
    found = sorted(p for p in source.iterdir() if p.suffix.lower() in data.SUFFIXES)
    if not found:
        raise data.DataError(
            f"--source={source} holds no image (looked for {', '.join(sorted(data.SUFFIXES))})"
        )
    return found


def predict(
    workdir: Path, source: Path, out: Path, conf: float = 0.25, iou: float = 0.7
) -> list[dict[str, Any]]:
    """Detects, draws and writes.

    Args:
      workdir: of the run.
      source: image or folder.
      out: folder for a drawn image per image and detections.json.
      conf: smallest score. iou: overlap above which the lesser box is dropped.
    Returns:
      per image {"file", "width", "height", "detections": [{"class", "name", "score",
      "box": [x1, y1, x2, y2] in pixels}]}.
    """
    paths = find_images(source)
    trained = load(workdir)
    forward = jax.jit(trained.task.predict)
    out.mkdir(parents=True, exist_ok=True)
    results, unreadable = [], []
    for path in paths:
        try:
            image = data.read_image(path)
        except data.DataError as error:
            unreadable.append(str(error))
            continue
        square, ratio, pad = data.letterbox(image, trained.task.image_size)
        boxes, scores = forward(trained.params, trained.stats, square[None])
        found = metrics.nms(
            np.asarray(boxes[0]), np.asarray(scores[0]), conf=conf, iou=iou, multi_label=False
        )
        boxes = metrics.unletterbox(found.boxes, ratio, pad, image.shape[:2])
        drawn = draw.draw_detections(image, boxes, found.classes, trained.names, found.scores)
        # a.jpg and a.png are two pictures
        single = sum(other.stem == path.stem for other in paths) == 1
        draw.save_image(out / f"{path.stem if single else path.name}.png", drawn)
        results.append(
            {
                "file": path.name,
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
    for message in unreadable:
        print(f"skipped: {message}")
    if not results:
        raise data.DataError(f"none of the {len(paths)} images of {source} could be read")
    (out / "detections.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    from jaxaccum.train import main_with_clear_errors

    _WORKDIR = flags.DEFINE_string("workdir", None, "the run whose weights to use", required=True)
    _SOURCE = flags.DEFINE_string("source", None, "an image or a folder of images", required=True)
    _OUT = flags.DEFINE_string("out", None, "where to write", required=True)
    _CONF = flags.DEFINE_float("conf", 0.25, "smallest score", 0.0, 1.0)
    _IOU = flags.DEFINE_float("iou", 0.7, "overlap above which the lesser box is dropped", 0.0, 1.0)

    def main(_) -> int:
        logging.set_verbosity(logging.ERROR)
        run.use_compilation_cache()
        out = Path(_OUT.value)
        results = predict(Path(_WORKDIR.value), Path(_SOURCE.value), out, _CONF.value, _IOU.value)
        for result in results:
            names = [d["name"] for d in result["detections"]]
            counts = ", ".join(f"{names.count(n)} {n}" for n in dict.fromkeys(names)) or "nothing"
            print(f"{result['file']}: {counts}")
        print(f"{len(results)} drawn images and detections.json in {out}")
        return 0

    main_with_clear_errors(main)
