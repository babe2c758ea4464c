"""python -m jaxaccum.predict --workdir=DIR --source=FILE_OR_FOLDER --out=DIR

Uses a run's best weights. A detector takes images, draws its detections [--conf=0.25] and writes
them to detections.json. A 3D detector also draws boxes in space and from above, and writes KITTI's
label files [--calib=FOLDER]. A completion network takes clouds (.pcd, .ply, .npy), writes what it
makes of them [--format=ply] [--caption="a chair"] and draws it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from jaxaccum import data, draw, draw_boxes3d, draw_clouds, known_answers, run
from jaxaccum.config import ConfigError
from jaxaccum.inference import Trained, load
from jaxaccum.metrics import detection as metrics
from jaxaccum.metrics import kitti
from jaxaccum.tasks import captioned
from jaxaccum.tasks.detection3d import to_labels

CLOUDS = (".npy", ".pcd", ".ply")


def find_files(source: Path, suffixes: Collection[str]) -> list[Path]:
    """The file, or all files of a folder with one of these suffixes, sorted.

    Raises:
      DataError: nothing there.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise data.DataError(f"--source={source} is neither a file nor a folder")
    found = sorted(p for p in source.iterdir() if p.suffix.lower() in suffixes)
    if not found:
        raise data.DataError(
            f"--source={source} holds nothing to use (looked for {', '.join(sorted(suffixes))})"
        )
    return found


def _target(out: Path, path: Path, paths: Sequence[Path]) -> Path:
    """Where to write what becomes of a file, without the suffix: a.jpg and a.png are two."""
    single = sum(other.stem == path.stem for other in paths) == 1
    return out / (path.stem if single else path.name)


def complete(
    trained: Trained,
    source: Path,
    out: Path,
    format: str = "ply",
    normalise: bool | None = None,
    caption: str = "",
) -> list[dict[str, Any]]:
    """Completes clouds, writes and draws them.

    Args:
      trained: a completion network.
      source: a cloud, or a folder of them.
      out: folder for a cloud and a picture of each, and completions.json.
      format: of the clouds, "ply" or "npy".
      normalise: bring every cloud to the frame of ShapeNet's (mean at the origin, largest radius
        1) before, and what is predicted back after; None does as in the training.
      caption: of what is in the clouds, for a network that takes captions; "" for none.
    Returns:
      per cloud {"file", "points", "written", "normalised"}.
    Raises:
      ConfigError: a caption for a network that takes none.
    """
    task = trained.task
    text = _vector(trained, caption)
    paths = find_files(source, CLOUDS)
    if normalise is None:
        normalise = bool(trained.facts["normalised"])
    written_to = {path: _target(out, path, paths) for path in paths}
    _spare(
        paths, (f"{t}{suffix}" for t in written_to.values() for suffix in (f".{format}", ".png"))
    )
    forward = jax.jit(task.predict)
    out.mkdir(parents=True, exist_ok=True)
    results, unreadable = [], []
    for path in paths:
        try:
            cloud = data.read_cloud(path, drop_invalid=True)
        except data.DataError as error:
            unreadable.append(str(error))
            continue
        radius = float(np.linalg.norm(cloud, axis=1).max())
        if not normalise and radius > 2:
            print(
                f"{path.name}: reaches {radius:.3g} from the origin, far beyond the clouds that "
                "the network knows; bring it to their frame, or try --normalise=yes"
            )
        partial, pose = data.prepare_partial(cloud, normalise)
        predicted = pose.restore(
            np.asarray(forward(trained.params, trained.stats, partial[None], text))[0]
        )
        if not np.isfinite(predicted).all():
            unreadable.append(f"{path}: the network's prediction is not finite")
            continue
        target = written_to[path]
        written = target.with_name(f"{target.name}.{format}")
        data.write_cloud(written, predicted)
        draw.save_image(
            target.with_name(f"{target.name}.png"), draw_clouds.draw_completion(cloud, predicted)
        )
        results.append(
            {
                "file": path.name,
                "points": len(cloud),
                "written": written.name,
                "normalised": normalise,
            }
        )
    _report(unreadable, results, paths, source)
    (out / "completions.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


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


def _spare(paths: Sequence[Path], targets: Iterable[str]) -> None:
    """Refuses to write over what is read.

    Raises:
      DataError: names the file.
    """
    sources = {path.resolve() for path in paths}
    for target in targets:
        if Path(target).resolve() in sources:
            raise data.DataError(f"--out would overwrite {target}: give another folder")


def _report(unreadable, results, paths, source):
    for message in unreadable:
        print(f"skipped: {message}")
    if not results:
        raise data.DataError(f"none of the {len(paths)} files of {source} could be read")


def detect(
    trained: Trained, source: Path, out: Path, conf: float = 0.25, iou: float = 0.7
) -> list[dict[str, Any]]:
    """Detects, draws and writes.

    Args:
      trained: a detector.
      source: image or folder.
      out: folder for a drawn image per image and detections.json.
      conf: smallest score. iou: overlap above which the lesser box is dropped.
    Returns:
      per image {"file", "width", "height", "detections": [{"class", "name", "score",
      "box": [x1, y1, x2, y2] in pixels}]}.
    """
    paths = find_files(source, data.SUFFIXES)
    _spare(paths, (f"{_target(out, path, paths)}.png" for path in paths))
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
        target = _target(out, path, paths)
        draw.save_image(target.with_name(f"{target.name}.png"), drawn)
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
    _report(unreadable, results, paths, source)
    (out / "detections.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def detect3d(
    trained: Trained,
    source: Path,
    out: Path,
    conf: float = 0.25,
    iou: float = 0.7,
    calib: Path | None = None,
) -> list[dict[str, Any]]:
    """Detects boxes in the image and in space, draws both and writes KITTI's label files.

    Args:
      trained: a 3D detector.
      source: image or folder.
      out: folder for a picture per image (its boxes in space, and from above), data/NAME.txt in
        KITTI's submission format, and detections.json.
      conf: smallest score. iou: overlap above which the lesser box is dropped.
      calib: folder of KITTI calibration files NAME.txt; None looks for a folder `calib` beside
        that of the images. An image without one is taken for one of KITTI's usual camera.
    Returns:
      per image {"file", "width", "height", "camera", "detections": [{"class", "name", "score",
      "box", "location", "dimensions", "rotation_y", "alpha"}]}, pixels, metres and radians.
    """
    paths = find_files(source, data.SUFFIXES)
    _spare(paths, (f"{_target(out, path, paths)}.png" for path in paths))
    task = trained.task
    forward = jax.jit(task.predict)
    (out / "data").mkdir(parents=True, exist_ok=True)
    results, unreadable = [], []
    for path in paths:
        try:
            image = data.read_image(path)
            camera, known = _camera(path, image.shape, calib)
        except data.DataError as error:
            unreadable.append(str(error))
            continue
        canvas, ratio, pad = data.letterbox3d(image, task.size)
        own = data.letterboxed_camera(camera, ratio, pad)
        output = forward(trained.params, trained.stats, canvas[None], own[None])
        boxes, scores, solids = jax.tree.map(lambda a: np.asarray(a[0]), output)
        found = metrics.nms(boxes, scores, conf=conf, iou=iou, multi_label=False)
        original = metrics.unletterbox(found.boxes, ratio, pad, image.shape[:2])
        labels = to_labels(found, original, solids, trained.names)
        target = _target(out, path, paths)
        picture = draw_boxes3d.side_by_side(image, labels, camera)
        draw.save_image(target.with_name(f"{target.name}.png"), picture)
        (out / "data" / f"{target.name}.txt").write_text(kitti.format(labels))
        results.append(
            {
                "file": path.name,
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
    _report(unreadable, results, paths, source)
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


if __name__ == "__main__":
    from jaxaccum.train import main_with_clear_errors

    _WORKDIR = flags.DEFINE_string("workdir", None, "the run whose weights to use", required=True)
    _SOURCE = flags.DEFINE_string("source", None, "a file or a folder of files", required=True)
    _OUT = flags.DEFINE_string("out", None, "where to write", required=True)
    _CONF = flags.DEFINE_float("conf", 0.25, "smallest score", 0.0, 1.0)
    _IOU = flags.DEFINE_float("iou", 0.7, "overlap above which the lesser box is dropped", 0.0, 1.0)
    _FORMAT = flags.DEFINE_enum("format", "ply", ["ply", "npy"], "of completed clouds")
    _CALIB = flags.DEFINE_string("calib", "", "folder of KITTI calibration files, for 3D")
    _CAPTION = flags.DEFINE_string("caption", "", "of what the clouds show, where networks take it")
    _NORMALISE = flags.DEFINE_enum(
        "normalise", "auto", ["auto", "yes", "no"],
        "bring clouds to ShapeNet's frame for the network and back; auto: as it was trained",
    )  # fmt: skip
    _ALLOW = flags.DEFINE_bool("allow_wrong_numbers", False, known_answers.FLAG_HELP)

    def main(_) -> int:
        logging.set_verbosity(logging.ERROR)
        run.use_compilation_cache()
        known_answers.require(_ALLOW.value)
        source, out = Path(_SOURCE.value), Path(_OUT.value)
        trained = load(Path(_WORKDIR.value))
        if trained.config.task == "completion":
            chosen = {"auto": None, "yes": True, "no": False}[_NORMALISE.value]
            for result in complete(trained, source, out, _FORMAT.value, chosen, _CAPTION.value):
                frame = "ShapeNet's frame" if result["normalised"] else "its own frame"
                print(
                    f"{result['file']}: {result['points']} points, taken in {frame}, "
                    f"completed in {result['written']}"
                )
            return 0
        if trained.config.task == "detection3d":
            calib = Path(_CALIB.value) if _CALIB.value else None
            results = detect3d(trained, source, out, _CONF.value, _IOU.value, calib)
            for result in results:
                print(f"{result['file']} (camera: {result['camera']}): {_nearest(result)}")
            print(f"{len(results)} pictures, KITTI's label files in {out / 'data'}")
            return 0
        results = detect(trained, source, out, _CONF.value, _IOU.value)
        for result in results:
            names = [d["name"] for d in result["detections"]]
            counts = ", ".join(f"{names.count(n)} {n}" for n in dict.fromkeys(names)) or "nothing"
            print(f"{result['file']}: {counts}")
        print(f"{len(results)} drawn images and detections.json in {out}")
        return 0

    main_with_clear_errors(main)
