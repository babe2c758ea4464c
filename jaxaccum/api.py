"""jaxaccum in Python: `load`, `train`, and what a model does, with no files in between."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from jaxaccum import config as configs
from jaxaccum import config_files, full_evaluation, programs, tasks
from jaxaccum.machine import known_answers
from jaxaccum.tasks import predicting, videos
from jaxaccum.training import inference, loop, run
from jaxaccum.training.preemption import STOPPED_BY_HAND, Preempted
from jaxaccum.weights import exchange


class Model:
    """A trained model.

    Attributes:
      trained: its task, weights and config, as the rest of the package has them.
      speed: how long the samples of the last `predict`, `stream` or `video` took, phase by phase;
        `line()` says it. A result has its own (`speed`, milliseconds).
    """

    def __init__(self, trained: tasks.Trained) -> None:
        self.trained = trained
        self.speed = predicting.new_speed(trained)

    def __repr__(self) -> str:
        found = self.trained
        kinds = f", {len(found.names)} classes" if found.names else ""
        return f"Model({found.config.model!r}{kinds}, of update {found.step})"

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes or categories."""
        return self.trained.names

    @property
    def config(self) -> ml_collections.ConfigDict:
        """That it was trained by, a copy."""
        return self.trained.config.copy_and_resolve_references()

    def predict(self, source: Any, **options: Any) -> list[tasks.Result]:
        """What it finds; `stream` gives the same one by one.

        Args:
          source: a file, a folder, a pattern as "photos/**/*.jpg", an array (H, W, 3) uint8 RGB or
            (points, 3), an image of Pillow, or a list or generator of these. Videos,
            animations and TIFFs of several pages give a result for each frame.
          options: those of the verb: conf, iou and end_to_end of a detector, calib in 3D; format,
            normalise and caption of a completion network.
        Returns:
          `tasks.detection.predict.Detected` and its like: with arrays, `plot()`, `to_json()`,
          `save(path without suffix)`.
        Raises:
          DataError: the source cannot be used. ConfigError: an option cannot be.
        """
        return list(self.stream(source, **options))

    def stream(self, source: Any, **options: Any) -> Iterator[tasks.Result]:
        """What it finds, one result at a time; see `predict`."""
        known = self.trained.task.predict_flags
        if wrong := [name for name in options if name not in known]:
            raise configs.ConfigError(
                f"{wrong[0]} is no option of the task {self.trained.task.name}, which takes "
                f"{', '.join(known) or 'none'}"
            )
        speed = predicting.new_speed(self.trained)
        found = predicting.predictions(self.trained, source, speed=speed, **options)
        self.speed = speed
        return found

    def video(
        self,
        source: str | os.PathLike[str],
        file: str | os.PathLike[str],
        *,
        codec: str = "",
        **options: Any,
    ) -> int:
        """Draws what it finds in a video into another of its size and frame rate.

        Args:
          source: the video, or another file of several pictures, of one size.
          file: to write, over what is there; by its suffix .mp4, .avi, .mov, .mkv, .webm and so on.
          codec: its four letters (FourCC); "" for the usual one of the suffix.
          options: as of `predict`.
        Returns:
          the number of frames.
        Raises:
          DataError: the source cannot be used, or not to its end; then there is no file.
          VideoError: the video cannot be written. ConfigError: an option cannot be.
        """
        return videos.write(self.stream(source, **options), Path(source), Path(file), codec)

    def evaluate(self, data: str | os.PathLike[str] = "", **options: Any) -> dict[str, Any]:
        """Metrics on its own val split, or on another data set.

        Args:
          data: by the same rules as `data.path` of a config.
          options: of `full_evaluation.evaluate`, `rect`, and of `training.measuring.measure`,
            `split` and so on.
        """
        return full_evaluation.evaluate(self.trained, str(data), **options)

    def export(self, file: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
        """Writes it as a program, ONNX or StableHLO by the file's suffix; see `programs.write`."""
        return programs.write(self.trained, Path(file), **options)

    def save(self, file: str | os.PathLike[str]) -> int:
        """Writes its weights as NAME.safetensors for PyTorch; returns the number of tensors."""
        return exchange.save(self.trained, Path(file))


def load(
    source: str | os.PathLike[str],
    *,
    weights: str | int = "",
    model: str = "",
    names: Sequence[str] = (),
) -> Model:
    """A model of a run's workdir, or of a .pt, .pth or .safetensors file.

    Args:
      source: the workdir or file.
      weights: of a run: "best", "last", or the number of an update that is kept; the best by
        default.
      model, names: of a file, if it does not tell: "yolo11-n", and the classes in order.
    Raises:
      CheckpointError: the workdir holds no weights. WeightsError: the file is not of a model.
      WrongNumbersError: JAX computes wrong numbers on this machine.
    """
    _ready()
    path = Path(source)
    if path.is_dir():
        if model or names:
            raise configs.ConfigError(f"{path} is a run, which knows its model and its classes")
        return Model(inference.load(path, str(weights)))
    if weights != "":
        raise configs.ConfigError(f"{path} is a file, which holds weights of one update")
    return Model(exchange.adopt(path, model, names)[0])


def train(
    config: ml_collections.ConfigDict | str,
    workdir: str | os.PathLike[str] = "",
    overrides: Mapping[str, Any] | None = None,
    *,
    watch: Callable[[dict[str, Any]], None] | None = None,
    accept_other_recipe: bool = False,
) -> Model:
    """Trains, and gives the best weights; on the workdir of a run that was stopped it continues.

    Args:
      config: made by jaxaccum.config.detection() and its like, or the name of one that ships:
        "yolo_n:11".
      workdir: where the run lives; runs/NAME for a config by its name.
      overrides: fields and values: {"data.path": "set/data.yaml", "epochs": 10}.
      watch: called with every record that goes to metrics.jsonl: kind "train" or "eval", its
        losses or metrics by name.
      accept_other_recipe: continue a run under another recipe.
    Raises:
      KeyboardInterrupt: it was stopped by hand, and is saved.
      TrainingError, DataError, ConfigError and so on: as the verb says them.
    """
    _ready()
    if isinstance(config, str):
        folder = Path(workdir or config_files.default_workdir(config))
        config = config_files.parse(config, overrides or {})
    else:
        if not workdir:
            raise configs.ConfigError("give the workdir, where the run is to live")
        if overrides:
            raise configs.ConfigError("overrides are for a config by its name; set the fields")
        folder = Path(workdir)
        config = config.copy_and_resolve_references()
    configs.validate(config)
    try:
        loop.train(config, folder, accept_other_recipe, watch=watch, signals=not _interactive())
    except Preempted as stopped:
        if stopped.code == STOPPED_BY_HAND:
            raise KeyboardInterrupt from stopped
        if not stopped.time_is_up:
            raise
    return Model(inference.load(folder))


def _ready() -> None:
    run.use_compilation_cache()
    known_answers.require()


def _interactive() -> bool:
    """Whether a person's session is at stake, which no signal may end."""
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules
