"""The config of a run: what its task's fields are, and what of them is learned."""

from __future__ import annotations

import ml_collections

from jaxaccum import fields, tasks
from jaxaccum.accumulate import Recipe
from jaxaccum.fields import (
    DTYPES,
    MOST_SAMPLES,
    MOST_UPDATES,
    ConfigError,
    any_of,
    best_dtype,
    dtype_of,
    get,
    has,
    is_compat,
)
from jaxaccum.tasks.completion.fields import completion
from jaxaccum.tasks.detection.fields import detection
from jaxaccum.tasks.detection3d.fields import as_original, detection3d


def defaults(task: str) -> ml_collections.ConfigDict:
    """Every field of a task's config with its default.

    Args:
      task: the name of one that ships, or MODULE:CLASS of another.
    Raises:
      ConfigError: there is no such task.
    """
    return tasks.named(task).fields.defaults()


def validate(c: ml_collections.ConfigDict) -> None:
    """Checks what types cannot: words, ranges and names.

    Raises:
      ConfigError: names the field, what it holds and what it may hold.
    """
    fields.validate(c, tasks.named(c.get("task")).fields)


def not_learned(task: str) -> tuple[str, ...]:
    """Fields of a task that decide only how a run is computed, watched or stored."""
    own = tasks.named(task).fields
    return (*fields.NOT_LEARNED, *own.not_learned, *own.weight_files)


def ranges(task: str) -> dict[str, tuple[float, float]]:
    """The range of every number in a task's config."""
    return {**fields.RANGES, **tasks.named(task).fields.ranges}


def recipe_of(c: ml_collections.ConfigDict, steps: int, data: dict, devices: int = 1) -> Recipe:
    """The recipe of a config.

    Args:
      c: the config.
      steps: updates of the run, derived from `steps` or `epochs`.
      data: what identifies the training samples (not where they lie).
      devices: that the run uses; learned from by the compat rule only.
    """
    settings = c.to_dict()
    later = [f for f, usual in fields.LATER.items() if has(c, f) and get(c, f) in usual]
    for field in (*not_learned(c.task), "nbs", "bn_group", *later):
        if not has(c, field):
            continue
        *parents, leaf = field.split(".")
        node = settings
        for parent in parents:
            node = node[parent]
        node.pop(leaf)
    settings["steps"], settings["dtype"] = steps, dtype_of(c)
    settings["data"] |= data
    if is_compat(c):  # there the geometry is part of what is learned
        settings["compat"] = {"microbatch": c.microbatch, "devices": devices}
    return Recipe(c.nbs, c.bn_group, settings)


__all__ = [
    "DTYPES",
    "MOST_SAMPLES",
    "MOST_UPDATES",
    "ConfigError",
    "any_of",
    "as_original",
    "best_dtype",
    "completion",
    "defaults",
    "detection",
    "detection3d",
    "dtype_of",
    "get",
    "has",
    "is_compat",
    "not_learned",
    "ranges",
    "recipe_of",
    "validate",
]
