"""Images of several sizes in one run: which, as a config gives them."""

from __future__ import annotations

import math
from typing import Any

import ml_collections

from jaxaccum.data.texts import shown
from jaxaccum.fields import ConfigError

FIELD = "augment.sizes"
STRIDE = 32  # the coarsest of a detector's


def parsed(value: Any) -> tuple[int, ...]:
    """Sides in pixels, ascending; () for none.

    Args:
      value: "", a list of numbers, or the text "512,576,640".
    Raises:
      ConfigError: it is nothing of these, a side is no multiple of 32 in 32 to 16384, or there is
        only one.
    """
    words = [w for w in value.split(",") if w.strip()] if isinstance(value, str) else value
    wrong = ConfigError(
        f"{FIELD} is '' (all updates at data.image_size), or at least two sides with commas "
        f"between them, multiples of {STRIDE}, as in 512,576,640; got {shown(value)}"
    )
    if not isinstance(words, list | tuple):
        raise wrong
    sides = []
    for word in words:
        try:
            number = float(word)
        except (TypeError, ValueError):
            raise wrong from None
        if not (math.isfinite(number) and number % STRIDE == 0 and STRIDE <= number <= 16384):
            raise wrong
        sides.append(int(number))
    if len(sides) == 1 or len(set(sides)) < len(sides):
        raise wrong
    return tuple(sorted(sides))


def check(c: ml_collections.ConfigDict) -> None:
    """Raises ConfigError for what a config's sizes cannot be."""
    if parsed(c.augment.sizes) and c.compat:
        raise ConfigError(
            f"{FIELD} is chosen by the window, which the usual rule (compat) has none of: leave "
            "it empty"
        )
