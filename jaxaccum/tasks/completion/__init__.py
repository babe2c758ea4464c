"""Point completion by PoinTr and AdaPoinTr."""

from jaxaccum.tasks.completion.evaluator import Evaluator
from jaxaccum.tasks.completion.task import CompletionTask

__all__ = ["CompletionTask", "Evaluator"]
