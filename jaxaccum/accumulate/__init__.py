"""Exact gradient accumulation: the law, kept in one place.

Knows no model and no data set. A task is a function
`(params, stats, microbatch, groups) -> Output(numerators, denominators, moments)`.
"""

from typing import TYPE_CHECKING, Any

from jaxaccum.accumulate.batchnorm import Groups
from jaxaccum.accumulate.checks import ContractError, grouped
from jaxaccum.accumulate.coupled import Coupled
from jaxaccum.accumulate.equivalence import verify
from jaxaccum.accumulate.make import make_engine
from jaxaccum.accumulate.randomness import sample_keys
from jaxaccum.accumulate.recipe import Geometry, GeometryError, Recipe, Window
from jaxaccum.accumulate.terms import Objective, Output, Sums, Term
from jaxaccum.accumulate.update import State, UpdateRule

if TYPE_CHECKING:
    from jaxaccum.accumulate.linen import GroupBatchNorm

__all__ = [
    "ContractError",
    "Coupled",
    "Geometry",
    "GeometryError",
    "GroupBatchNorm",
    "Groups",
    "Objective",
    "Output",
    "Recipe",
    "State",
    "Sums",
    "Term",
    "UpdateRule",
    "Window",
    "grouped",
    "make_engine",
    "sample_keys",
    "verify",
]


def __getattr__(name: str) -> Any:
    """The layer, which needs Flax, is imported when it is asked for: the rest does without."""
    if name == "GroupBatchNorm":
        try:
            from jaxaccum.accumulate.linen import GroupBatchNorm
        except ModuleNotFoundError as error:
            raise ImportError(
                "accumulate.GroupBatchNorm is a layer of Flax: pip install flax. Without it, "
                "accumulate.batchnorm.normalise and moments do the same"
            ) from error
        return GroupBatchNorm
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
