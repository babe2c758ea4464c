"""python -m jaxaccum.predict --workdir=DIR --source=FILE_OR_FOLDER [--out=DIR]

Uses a run's best weights. A detector takes images, animations and videos frame by frame, draws its
detections [--conf=0.25] and writes them to detections.json; of a video it also draws a video
[--codec=mp4v]. A 3D detector also draws boxes in space
and from above, and writes KITTI's label files [--calib=FOLDER]. A completion network takes clouds
(.pcd, .ply, .npy), writes what it makes of them [--format=ply] [--caption="a chair"] and draws it.
A file that cannot be used is said, the others go on, and the exit status is 1. The last line says
how long a sample took.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from absl import flags

from jaxaccum import tasks
from jaxaccum.config import ConfigError
from jaxaccum.data import movies
from jaxaccum.machine import known_answers
from jaxaccum.tasks.predicting import new_speed, predict_files
from jaxaccum.training import run
from jaxaccum.training.inference import END_TO_END_HELP, WEIGHTS_HELP, load, require_run

if __name__ == "__main__":
    from jaxaccum import command_line

    _WORKDIR = flags.DEFINE_string("workdir", None, "the run whose weights to use", required=True)
    _SOURCE = flags.DEFINE_string(
        "source", None, "a file, a folder of files, or a pattern", required=True
    )
    _WEIGHTS = flags.DEFINE_string("weights", "", WEIGHTS_HELP)
    _OUT = flags.DEFINE_string("out", "", "where to write; WORKDIR/predicted by default")
    _CONF = flags.DEFINE_float("conf", 0.25, "smallest score", 0.0, 1.0)
    _IOU = flags.DEFINE_float("iou", 0.7, "overlap above which the lesser box is dropped", 0.0, 1.0)
    _CLASSES = flags.DEFINE_list(
        "classes", [], "names or numbers of those to look for; all if none"
    )
    _MAX_DET = flags.DEFINE_integer("max_det", 300, "objects in an image at most", 1, 10**5)
    _AGNOSTIC = flags.DEFINE_bool("agnostic", False, "drop lesser boxes whatever their class")
    _ONCE = flags.DEFINE_bool("end_to_end", None, END_TO_END_HELP)
    _TXT = flags.DEFINE_bool("save_txt", False, "also write labels/NAME.txt, as YOLO has labels")
    _CROP = flags.DEFINE_bool("save_crop", False, "also write what is in each box, crops/CLASS/")
    _FORMAT = flags.DEFINE_enum("format", "ply", ["ply", "npy"], "of completed clouds")
    _CALIB = flags.DEFINE_string("calib", "", "folder of KITTI calibration files, for 3D")
    _CAPTION = flags.DEFINE_string("caption", "", "of what the clouds show, where networks take it")
    _NORMALISE = flags.DEFINE_enum(
        "normalise", "auto", ["auto", "yes", "no"],
        "bring clouds to ShapeNet's frame for the network and back; auto: as it was trained",
    )  # fmt: skip
    _UP = flags.DEFINE_enum("up", "y", ["y", "z"], "axis that points up in pictures of clouds")
    _VIDEO = flags.DEFINE_bool("save_video", True, "of a video also write a video, drawn")
    _CODEC = flags.DEFINE_string(
        "codec", "", "of videos that are written, its four letters (FourCC); by suffix if none"
    )
    _OF_TASKS = (
        _CONF,
        _IOU,
        _CLASSES,
        _MAX_DET,
        _AGNOSTIC,
        _ONCE,
        _TXT,
        _CROP,
        _FORMAT,
        _CALIB,
        _CAPTION,
        _NORMALISE,
        _UP,
    )
    _ALLOW = flags.DEFINE_bool("allow_wrong_numbers", False, known_answers.FLAG_HELP)

    def _out() -> Path:
        return Path(_OUT.value) if _OUT.value else Path(_WORKDIR.value or "") / "predicted"

    def main() -> int:
        failed: list[str] = []
        _use(failed)
        if failed:
            what = "file of it" if len(failed) == 1 else "files of it"
            print(
                f"error: {len(failed)} {what} could not be used, see 'skipped' above; the others "
                f"are in {_out()}",
                file=sys.stderr,
            )
        return 1 if failed else 0

    def _use(failed: list[str]) -> None:
        run.use_compilation_cache()
        known_answers.require(_ALLOW.value)
        source = _SOURCE.value or ""
        out = _out()
        require_run(Path(_WORKDIR.value))
        out.mkdir(parents=True, exist_ok=True)  # a place that cannot be written ends it here
        trained = load(Path(_WORKDIR.value), _WEIGHTS.value)
        options = _options(trained.task)
        speed = new_speed(trained)
        lines = predict_files(
            trained, source, out, failed, save_video=_VIDEO.value, codec=_CODEC.value, speed=speed,
            **options,
        )  # fmt: skip
        print(*lines, sep="\n")
        print(f"{len(lines)} results drawn in {out}, and in {out / trained.task.results}")
        print(speed.line())

    def _options(task: tasks.Task) -> dict[str, Any]:
        """The flags that the task takes; one that was given for nothing is an error."""
        for flag in _OF_TASKS:
            if flag.name not in task.predict_flags and flags.FLAGS[flag.name].present:
                taken = ", ".join(f"--{name}" for name in task.predict_flags) or "none of its own"
                raise ConfigError(
                    f"--{flag.name} means nothing to the task {task.name} of this run, which "
                    f"takes {taken}"
                )
        if not task.suffixes & movies.VIDEOS and (_CODEC.present or _VIDEO.present):
            raise ConfigError(f"--codec and --save_video: the task {task.name} takes no videos")
        own = [flag for flag in _OF_TASKS if flag.name in task.predict_flags]
        return {flag.name: flag.value for flag in own if flag.value is not None}

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
