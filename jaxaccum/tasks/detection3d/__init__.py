"""Monocular 3D detection by YOLOv12-3D."""

from jaxaccum.tasks.detection3d.evaluator import Evaluator
from jaxaccum.tasks.detection3d.task import Detection3DTask

__all__ = ["Detection3DTask", "Evaluator"]
