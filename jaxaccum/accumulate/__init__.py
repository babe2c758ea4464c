"""Exact gradient accumulation: the law, kept in one place.

Knows no model and no data set. A task is a function
`(params, stats, microbatch) -> Output(numerators, denominators, moments)`.
"""

from jaxaccum.accumulate.batchnorm import GroupBatchNorm, Groups
from jaxaccum.accumulate.coupled import Coupled
from jaxaccum.accumulate.engines import make_engine
from jaxaccum.accumulate.randomness import sample_keys
from jaxaccum.accumulate.recipe import Geometry, GeometryError, Recipe, Window
from jaxaccum.accumulate.terms import Objective, Output, Sums, Term, require_constant_denominators
from jaxaccum.accumulate.update import State, UpdateRule

__all__ = [
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
    "make_engine",
    "require_constant_denominators",
    "sample_keys",
]
