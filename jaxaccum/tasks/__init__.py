"""The tasks: what is learned, behind one interface. The core knows none of them."""

from __future__ import annotations

from typing import Any

import ml_collections

from jaxaccum.tasks.base import Evaluator, Source, Stream, Task
from jaxaccum.tasks.completion import CompletionTask
from jaxaccum.tasks.detection import DetectionTask
from jaxaccum.tasks.detection3d import Detection3DTask

TASKS: dict[str, Any] = {
    "detection": DetectionTask,
    "detection3d": Detection3DTask,
    "completion": CompletionTask,
}


def of(config: ml_collections.ConfigDict) -> Any:
    """The task of a config, to be opened and created."""
    return TASKS[config.task]


__all__ = [
    "TASKS",
    "CompletionTask",
    "Detection3DTask",
    "DetectionTask",
    "Evaluator",
    "Source",
    "Stream",
    "Task",
    "of",
]
