"""Options of predictors, as the verb and Python give them: of the right type, and in range."""

from __future__ import annotations

import dataclasses
import numbers
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jaxaccum.data.texts import shown
from jaxaccum.fields import ConfigError


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What an option may be, in words, and whether a value is that."""

    said: str
    holds: Callable[[Any], bool]


def _number(low: float, high: float, whole: bool = False) -> _Kind:
    kind = numbers.Integral if whole else numbers.Real

    def holds(value: Any) -> bool:
        plain: Any = value  # mypy: a Real cannot be compared
        return isinstance(value, kind) and not _is_truth(value) and bool(low <= plain <= high)

    return _Kind(f"a {'whole ' * whole}number in {low:g} to {high:g}", holds)


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool | np.bool_)


def _are_classes(value: Any) -> bool:
    return not isinstance(value, str | bytes) and isinstance(value, Iterable) and all(
        isinstance(one, str | numbers.Integral) and not _is_truth(one) for one in value
    )  # fmt: skip


_TRUTH = _Kind("True or False", _is_truth)
_KINDS: Mapping[str, _Kind] = {
    "conf": _number(0, 1),
    "iou": _number(0, 1),
    "classes": _Kind("a list of names or numbers of classes", _are_classes),
    "max_det": _number(1, 10**5, whole=True),
    "agnostic": _TRUTH,
    "end_to_end": _TRUTH,
    "save_txt": _TRUTH,
    "save_crop": _TRUTH,
    "calib": _Kind("the path of a folder", lambda value: isinstance(value, str | os.PathLike)),
    "caption": _Kind("a text", lambda value: isinstance(value, str)),
}


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, in plain values. Which words one may be, and which classes there are, is for its
    predictor to say, as is all of an option that only one's own task has.

    Raises:
      ConfigError: names the option, what it is, and what it may be.
    """
    found = dict(options)
    for name in found.keys() & _KINDS.keys():
        value, kind = found[name], _KINDS[name]
        if getattr(value, "ndim", None) == 0:  # of numpy or JAX
            value = value.item()
        elif name == "classes" and isinstance(value, Iterable) and not isinstance(value, str):
            value = tuple(value)  # also of a generator, which can be read once
        if not kind.holds(value):
            raise ConfigError(f"{name} is {kind.said}; got {shown(value)}")
        found[name] = value
    return found
