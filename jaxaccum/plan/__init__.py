"""What fits: the memory and the work of an update on any geometry, known before it runs."""

from jaxaccum.plan.planner import Choice, Measure, PlanError, Planner, choose, settle
from jaxaccum.plan.targets import TARGETS, Target, here

__all__ = [
    "TARGETS", "Choice", "Measure", "PlanError", "Planner", "Target", "choose", "here", "settle",
]  # fmt: skip
