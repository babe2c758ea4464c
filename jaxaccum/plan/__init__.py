"""What fits: the memory and the work of an update on any geometry, known before it runs."""

from jaxaccum.plan.planner import Measure, Planner
from jaxaccum.plan.search import Choice, choose, settle
from jaxaccum.plan.targets import TARGETS, PlanError, Target, here

__all__ = [
    "TARGETS", "Choice", "Measure", "PlanError", "Planner", "Target", "choose", "here", "settle",
]  # fmt: skip
