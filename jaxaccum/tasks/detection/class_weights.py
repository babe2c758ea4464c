"""Weights of the classes in a detector's class term: as a config gives them, and for the classes of
a data set. What a weight multiplies is in jaxaccum/losses/detection.py."""

from __future__ import annotations

import ast
import math
import numbers
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import ml_collections
import numpy as np

from jaxaccum.data.texts import shown
from jaxaccum.fields import GAIN, ConfigError

FIELD = "loss.class_weights"
BALANCED = "balanced"
_FORMS = (
    f"{FIELD} is '' (none), 'balanced', a weight for each class in their order, as in 1,2.5,1, or "
    "weights by name, as in car=2,bus=0.5"
)


def parsed(value: Any) -> str | tuple[float, ...] | dict[str, float]:
    """What a config says, before the classes are known.

    Args:
      value: "", or nothing in a list, for none; "balanced"; numbers in a list or as the text
        "1,2.5,1"; a mapping by name or the text "car=2,bus=0.5".
    Returns:
      "", "balanced", weights in the order of the classes, or weights by name.
    Raises:
      ConfigError: it is nothing of these, or a weight is not in 0 to 1e9.
    """
    if isinstance(value, str):
        if value.strip() in ("", BALANCED):
            return value.strip()
        value = _of_text(value)
    if isinstance(value, Mapping | ml_collections.ConfigDict):
        found = {str(name): _weight(one, shown(name)) for name, one in value.items()}
        return found or ""
    if isinstance(value, list | tuple | np.ndarray):
        return tuple(_weight(one, f"number {n}") for n, one in enumerate(value, 1)) or ""
    raise ConfigError(f"{_FORMS}; got {shown(value)}")


def check(c: ml_collections.ConfigDict) -> None:
    """Raises ConfigError for what a config's `loss.class_weights` cannot be with any classes."""
    value = c.loss.class_weights
    parsed(value)
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str) or "." in name:  # a config takes it for a path
                raise ConfigError(
                    f"{FIELD}: a mapping in a config cannot have the key {shown(name)}: write the "
                    "text 'NAME=WEIGHT,NAME=WEIGHT'"
                )


def _of_text(text: str) -> Any:
    """A list or a mapping that is written as a text."""
    text = text.strip()
    parts = text.split(",")
    if text[0] not in "{[(" and all("=" in part for part in parts):
        pairs = [[side.strip() for side in part.rsplit("=", 1)] for part in parts]
        names = [name for name, _ in pairs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"{FIELD}: {shown(twice[0])} has two weights in {shown(text)}")
        return {name: _number(one) for name, one in pairs}
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ConfigError(f"{_FORMS}; got {shown(text)}") from None
    return [found] if isinstance(found, int | float) else found


def _number(text: str) -> Any:
    """The number that a text is, else the text."""
    try:
        return float(text)
    except ValueError:
        return text


def _weight(value: Any, of: str) -> float:
    if isinstance(value, np.generic):
        value = value.item()
    fits = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not fits or not math.isfinite(value) or not GAIN[0] <= value <= GAIN[1]:
        raise ConfigError(
            f"{FIELD}: a weight is a number in {GAIN[0]:g} to {GAIN[1]:g}; that of {of} is "
            f"{shown(value)}"
        )
    return float(value)


def by_class(value: Any, names: Sequence[str]) -> tuple[float, ...]:
    """The weights of classes in their order, (classes,); () where all are 1, which is no weights.

    Args:
      value: of a config, but not "balanced", whose weights are those of a data set. A class that
        weights by name leave out has 1.
      names: of the classes.
    Raises:
      ConfigError: a class is not there, or there are more or fewer weights than classes; see also
        `parsed`.
    """
    found = parsed(value)
    if found == BALANCED:
        raise ConfigError(
            f"{FIELD}=balanced is counted on a training set, and here is none: give the weights as "
            "numbers; a training prints them"
        )
    if isinstance(found, dict):
        for name in found:
            if name not in names:
                close = get_close_matches(name, names, n=1, cutoff=0.5)
                raise ConfigError(
                    f"{FIELD}: there is no class {shown(name)}"
                    + (f": did you mean {close[0]}?" if close else f"; there are {_listed(names)}")
                )
        found = tuple(found.get(name, 1.0) for name in names)
    if isinstance(found, str):
        return ()
    if len(found) != len(names):
        raise ConfigError(
            f"{FIELD} has {len(found)} weights, and there are {len(names)} classes: "
            f"{_listed(names)}"
        )
    return () if all(weight == 1 for weight in found) else found


def balanced(counts: Sequence[int]) -> tuple[float, ...]:
    """Weights that fall with the number of a class's objects:

        w_c = (1 / n_c) / mean over k of (1 / n_k)

    over the classes that have objects, whose mean weight is 1: so the class term, which begins as a
    sum over classes of what no object is at, stays as large. A class without objects has 1.

    Args:
      counts: n, objects of each class, (classes,).
    """
    inverse = [1 / n for n in counts if n]
    mean = math.fsum(inverse) / max(len(inverse), 1)
    return tuple(1 / n / mean if n else 1.0 for n in counts)


def settled(
    config: ml_collections.ConfigDict, names: Sequence[str], source: Any = None
) -> tuple[ml_collections.ConfigDict, list[str]]:
    """The config with its weights as numbers in the order of the classes, or "" for none; and lines
    about what was counted. Configs that say the same in other words are one recipe then.

    Args:
      names: of the classes.
      source: the training set, which "balanced" counts; None: the weights must be numbers.
    Raises:
      ConfigError: see `by_class`.
    """
    value, lines = config.loss.class_weights, []
    if parsed(value) == BALANCED and source is not None:
        counts = np.zeros(len(names), int)
        for i in range(len(source)):
            counts += np.bincount(source.objects(i).classes, minlength=len(names))
        value = balanced(counts.tolist())
        rows = zip(names, counts.tolist(), value, strict=True)
        said = ", ".join(f"{name} {weight:.4g} ({n} objects)" for name, n, weight in rows)
        lines = [f"{FIELD} balanced, inverse to the objects, mean 1: {said}"]
    weights = by_class(value, names) or ""
    if type(config.loss.class_weights) is type(weights) and config.loss.class_weights == weights:
        return config, lines
    config = config.copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        config.loss.class_weights = weights
    return config, lines


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"{', '.join(names[:20])}{more}"
