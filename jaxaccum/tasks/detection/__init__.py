"""2D detection by YOLO models."""

from jaxaccum.tasks.detection.evaluator import Evaluator
from jaxaccum.tasks.detection.task import DetectionTask

__all__ = ["DetectionTask", "Evaluator"]
