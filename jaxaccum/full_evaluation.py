"""An evaluation as a user asks for it, by the verb or in Python: its choices and its speed."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxaccum.fields import ConfigError
from jaxaccum.tasks import Trained
from jaxaccum.tasks.speed import collected
from jaxaccum.training.measuring import measure

RECT_HELP = (
    "of a detector: into rectangles that are hardly larger than the images, not squares; as "
    "eval.rect of the run says by default"
)


def evaluate(
    trained: Trained, data_path: str = "", *, rect: bool | None = None, **options: Any
) -> dict[str, Any]:
    """Metrics of weights, and how long a sample took.

    Args:
      trained: the weights, and what they are of.
      data_path: evaluate on this data set instead of the run's own.
      rect: letterbox images into rectangles or not; None: as its config says.
      options: of `training.measuring.measure`.
    Returns:
      what `measure` does; "rect", if it was used; "speed", see `tasks.speed.Speed.to_json`.
    Raises:
      ConfigError: rect for a task that has no squares, or as `measure` does. DataError: so, too.
    """
    trained = with_rect(trained, rect)
    with collected() as speeds:
        found = measure(trained, data_path, **options)
    if trained.config.eval.get("rect", False):
        found["rect"] = True
    for speed in speeds:
        print(speed.line())
    told = [speed.to_json() for speed in speeds]
    if told:
        found["speed"] = told[0] if len(told) == 1 else told
    return found


def with_rect(trained: Trained, chosen: bool | None) -> Trained:
    """The same weights, to be evaluated as `eval.rect` of their config says if that is `chosen`.

    Raises:
      ConfigError: the task has no such field.
    """
    options = trained.config.eval
    if chosen is None or chosen == options.get("rect", False):
        return trained
    if "rect" not in options:
        raise ConfigError(
            f"rect is for detectors that see images in squares; {trained.config.model} is none, "
            f"but one of the task {trained.task.name}"
        )
    config = trained.config.copy_and_resolve_references()
    config.eval.rect = chosen
    return dataclasses.replace(trained, config=config)
