"""The tasks: what is learned, behind one interface. The core knows none of them."""

from __future__ import annotations

import importlib
from typing import Any

import ml_collections

from jaxaccum.data.texts import shown
from jaxaccum.fields import ConfigError
from jaxaccum.tasks.base import (
    Adopted,
    Evaluator,
    Interface,
    PackedSplit,
    Source,
    Stream,
    Task,
    Trained,
)
from jaxaccum.tasks.completion import CompletionTask
from jaxaccum.tasks.detection import DetectionTask
from jaxaccum.tasks.detection3d import Detection3DTask
from jaxaccum.tasks.results import Predictor, Result, Sample

TASKS: dict[str, type[Task]] = {
    "detection": DetectionTask,
    "detection3d": Detection3DTask,
    "completion": CompletionTask,
}


def named(name: Any) -> type[Task]:
    """A task by the name that a config gives it.

    Args:
      name: of a task that ships, or MODULE:CLASS of one that Python can import from where it is
        started.
    Raises:
      ConfigError: there is none; says why.
    """
    if isinstance(name, str) and name in TASKS:
        return TASKS[name]
    module, colon, kind = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not colon:
        raise ConfigError(
            f"task is one of {', '.join(TASKS)}, or MODULE:CLASS of your own; got {shown(name)}"
        )
    try:
        found = getattr(importlib.import_module(module), kind)
    except (Exception, SystemExit) as error:  # whatever the user's module does
        said = " ".join(str(error).split())
        raise ConfigError(
            f"task: {shown(name)} cannot be imported ({type(error).__name__}: {said}): start where "
            "Python finds it, or add its folder to PYTHONPATH"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError(f"task: {shown(name)} is no subclass of jaxaccum.tasks.Task")
    left = {one for one in ("name", "fields", "unit", "monitor") if not hasattr(found, one)}
    if missing := sorted(left | found.__abstractmethods__):
        raise ConfigError(f"task: {shown(name)} does not define {', '.join(missing)}")
    return found


def of(config: ml_collections.ConfigDict) -> type[Task]:
    """The task of a config, to be opened and created."""
    return named(config.task)


__all__ = [
    "TASKS",
    "Adopted",
    "CompletionTask",
    "Detection3DTask",
    "DetectionTask",
    "Evaluator",
    "Interface",
    "PackedSplit",
    "Predictor",
    "Result",
    "Sample",
    "Source",
    "Stream",
    "Task",
    "Trained",
    "named",
    "of",
]
