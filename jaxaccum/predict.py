"""python -m jaxaccum.predict --workdir=DIR --source=FILE_OR_FOLDER --out=DIR

Uses a run's best weights. A detector takes images, and GIFs and videos frame by frame, draws its
detections [--conf=0.25] and writes them to detections.json. A 3D detector also draws boxes in space
and from above, and writes KITTI's label files [--calib=FOLDER]. A completion network takes clouds
(.pcd, .ply, .npy), writes what it makes of them [--format=ply] [--caption="a chair"] and draws it.
A file that cannot be used is said, the others go on, and the exit status is 1.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from jaxaccum import data, draw, draw_boxes3d, draw_clouds, known_answers, movies, run
from jaxaccum.config import ConfigError
from jaxaccum.data import texts
from jaxaccum.inference import Trained, load, require_run
from jaxaccum.metrics import detection as metrics
from jaxaccum.metrics import kitti
from jaxaccum.tasks import captioned
from jaxaccum.tasks.detection3d import to_labels

CLOUDS = (".npy", ".pcd", ".ply")


PICTURES = data.SUFFIXES | movies.SUFFIXES


def find_files(source: Path, suffixes: Collection[str]) -> list[Path]:
    """The file, or all files of a folder with one of these suffixes, sorted.

    What else is in the folder is counted in a line on stdout.

    Raises:
      DataError: nothing there.
    """
    if source.is_file():
        return [source]
    shown = texts.shown_path(source)
    if not source.is_dir():
        raise data.DataError(f"--source={shown} is neither a file nor a folder")
    found, others = [], Counter[str]()
    for path in sorted(source.iterdir()):
        kind = _kind(path)
        if not kind and path.suffix.lower() in suffixes:
            found.append(path)
        else:
            others[kind or path.suffix.lower() or "without a suffix"] += 1
    left_out = ", ".join(f"{count} {texts.shown_path(kind)}" for kind, count in others.items())
    known = ", ".join(sorted(suffixes))
    if not found:
        raise data.DataError(
            f"--source={shown} holds nothing to use (looked for {known}"
            f"{f'; there is {left_out}' if left_out else ''})"
        )
    if others:
        print(f"left out of {shown}: {left_out} (taken are {known})")
    return found


def _kind(path: Path) -> str:
    """What a path is, if it is no file."""
    if path.is_file():
        return ""
    if path.is_dir():
        return "folder (sub-folders are not searched)"
    return "pipe or device" if path.exists() else "broken link"


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image, or a frame of a GIF or a video.

    Attributes:
      path: of the file. told: what results say of it: the file's name, the frame's number.
      pixels: (H, W, 3) uint8 RGB. target: where to write what becomes of it, without a suffix.
    """

    path: Path
    told: dict[str, Any]
    pixels: np.ndarray
    target: Path


def pictures(paths: Sequence[Path], out: Path, failed: list[str]) -> Iterator[Picture]:
    """The images, and the frames of the rest, one at a time.

    Args:
      failed: takes a message for every file that cannot be read, or not to its end.
    """
    targets = _targets(out, paths)
    for path in paths:
        try:
            if path.suffix.lower() not in movies.SUFFIXES:
                yield Picture(path, {"file": path.name}, data.read_image(path), targets[path])
                continue
            for number, pixels in enumerate(movies.frames(path), start=1):
                target = targets[path].with_name(f"{targets[path].name}_{number:06}")
                yield Picture(path, {"file": path.name, "frame": number}, pixels, target)
        # Whatever a decoder makes of a damaged file, the next one is another.
        except Exception as error:
            failed.append(_why(path, error))


def _why(path: Path, error: Exception) -> str:
    """What to say of a file that cannot be read."""
    if isinstance(error, data.DataError):
        return str(error)
    said = " ".join(str(error).split())[:200]
    return f"{texts.shown_path(path)}: cannot be read ({type(error).__name__}: {said})"


def _targets(out: Path, paths: Sequence[Path]) -> dict[Path, Path]:
    """Where to write what becomes of each file, without the suffix: a.jpg and a.png are two.

    Frames of a file NAME become NAME_000001 and so on, which no other file may be called.
    """
    stems = Counter(path.stem for path in paths)
    numbered = {m.group(1) for path in paths if (m := re.fullmatch(r"(.*)_\d{6,}", path.stem))}
    used = set[str]()
    targets = {}
    for path in paths:
        name = path.stem if stems[path.stem] == 1 else path.name
        if path.suffix.lower() in movies.SUFFIXES and name in numbered:
            name = path.name
        while name in used or (path.suffix.lower() in movies.SUFFIXES and name in numbered):
            name += "_"
        used.add(name)
        targets[path] = out / name
    return targets


def complete(
    trained: Trained,
    source: Path,
    out: Path,
    format: str = "ply",
    normalise: bool | None = None,
    caption: str = "",
    failed: list[str] | None = None,
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
      failed: takes a message for every file that could not be used.
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
    written_to = _targets(out, paths)
    _spare(
        paths, (f"{t}{suffix}" for t in written_to.values() for suffix in (f".{format}", ".png"))
    )
    forward = jax.jit(task.predict)
    out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    unreadable = [] if failed is None else failed
    for path in paths:
        try:
            cloud = data.read_cloud(path, drop_invalid=True)
        # Whatever a reader makes of a damaged file, the next one is another.
        except Exception as error:
            unreadable.append(_why(path, error))
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
            unreadable.append(f"{texts.shown_path(path)}: the network's prediction is not finite")
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
    _report(unreadable, results, source)
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


def _report(unreadable: list[str], results: list[dict[str, Any]], source: Path) -> None:
    for message in unreadable:
        print(f"skipped: {message}")
    if not results:
        raise data.DataError(
            f"none of the {len(unreadable)} files of {texts.shown_path(source)} could be used"
        )


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
    paths = find_files(source, PICTURES)
    _spare(paths, (f"{target}.png" for target in _targets(out, paths).values()))
    forward = jax.jit(trained.task.predict)
    out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    unreadable = [] if failed is None else failed
    for picture in pictures(paths, out, unreadable):
        image = picture.pixels
        square, ratio, pad = data.letterbox(image, trained.task.image_size)
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
    _report(unreadable, results, source)
    (out / "detections.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


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
    paths = find_files(source, PICTURES)
    _spare(paths, (f"{target}.png" for target in _targets(out, paths).values()))
    task = trained.task
    forward = jax.jit(task.predict)
    (out / "data").mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    unreadable = [] if failed is None else failed
    no_camera = set[Path]()
    for picture in pictures(paths, out, unreadable):
        image = picture.pixels
        try:
            camera, known = _camera(picture.path, image.shape, calib)
        except (data.DataError, OSError) as error:
            if picture.path not in no_camera:  # else every frame would say it
                unreadable.append(_why(picture.path, error))
            no_camera.add(picture.path)
            continue
        canvas, ratio, pad = data.letterbox3d(image, task.size)
        own = data.letterboxed_camera(camera, ratio, pad)
        output = forward(trained.params, trained.stats, canvas[None], own[None])
        boxes, scores, solids = jax.tree.map(lambda a: np.asarray(a[0]), output)
        found = metrics.nms(boxes, scores, conf=conf, iou=iou, multi_label=False)
        original = metrics.unletterbox(found.boxes, ratio, pad, image.shape[:2])
        labels = to_labels(found, original, solids, trained.names)
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
    _report(unreadable, results, source)
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
    from jaxaccum import command_line

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

    def main() -> int:
        failed: list[str] = []
        _use(failed)
        if failed:
            what = "file of it" if len(failed) == 1 else "files of it"
            print(
                f"error: {len(failed)} {what} could not be used, see 'skipped' above; the others "
                f"are in {_OUT.value}",
                file=sys.stderr,
            )
        return 1 if failed else 0

    def _use(failed: list[str]) -> None:
        run.use_compilation_cache()
        known_answers.require(_ALLOW.value)
        source, out = Path(_SOURCE.value), Path(_OUT.value)
        require_run(Path(_WORKDIR.value))
        out.mkdir(parents=True, exist_ok=True)  # a place that cannot be written ends it here
        trained = load(Path(_WORKDIR.value))
        if trained.config.task == "completion":
            chosen = {"auto": None, "yes": True, "no": False}[_NORMALISE.value]
            results = complete(
                trained, source, out, _FORMAT.value, chosen, _CAPTION.value, failed
            )  # fmt: skip
            for result in results:
                frame = "ShapeNet's frame" if result["normalised"] else "its own frame"
                print(
                    f"{result['file']}: {result['points']} points, taken in {frame}, "
                    f"completed in {result['written']}"
                )
            return
        if trained.config.task == "detection3d":
            calib = Path(_CALIB.value) if _CALIB.value else None
            results = detect3d(trained, source, out, _CONF.value, _IOU.value, calib, failed)
            for result in results:
                print(f"{_name(result)} (camera: {result['camera']}): {_nearest(result)}")
            print(f"{len(results)} pictures, KITTI's label files in {out / 'data'}")
            return
        results = detect(trained, source, out, _CONF.value, _IOU.value, failed)
        for result in results:
            names = [d["name"] for d in result["detections"]]
            counts = ", ".join(f"{names.count(n)} {n}" for n in dict.fromkeys(names)) or "nothing"
            print(f"{_name(result)}: {counts}")
        print(f"{len(results)} drawn images and detections.json in {out}")

    def _name(result: dict[str, Any]) -> str:
        return result["file"] + (f" frame {result['frame']}" if "frame" in result else "")

    command_line.run_verb(
        main,
        __doc__,
        (
            ("predict --workdir=runs/mine --source=photos --out=found", "a folder of images"),
            ("predict --workdir=runs/mine --source=street.mp4 --out=found --conf=0.4", "a video"),
            (
                "predict --workdir=runs/completion --source=scans --out=completed --format=npy",
                "clouds, by a network that completes them",
            ),
        ),
    )
