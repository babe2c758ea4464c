"""How long a sample takes in each phase of predicting and of evaluating."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

PREPARATION = "reading and preparation"  # of evaluations, on threads of the host

_T = TypeVar("_T")
_evaluations: ContextVar[list[Speed] | None] = ContextVar("evaluations", default=None)


class Speed:
    """Milliseconds by phase, summed over samples.

    What compiles is left out: the first sample of `predict`, and of an evaluation the first batch
    of each shape.

    Attributes:
      unit: what a sample is called, in the plural.
      at: how large a sample is to the network, in words; "" if there is no one size.
      samples: that are counted. left_out: those that are not, as their time is that of compiling.
      batch: samples that the network takes at once.
      side_by_side: whether phases run beside each other, so that their sum is no time that passes.
      prepared: index -> milliseconds of a processor that its preparation took, until it is counted.
      shapes: of batches that the network was compiled for.
    """

    def __init__(self, unit: str, at: str = "", *, side_by_side: bool = False) -> None:
        self.unit, self.at, self.side_by_side = unit, at, side_by_side
        self.samples = self.left_out = 0
        self.batch = 1
        self.prepared: dict[int, float] = {}
        self.shapes: set[Any] = set()
        self._spent: dict[str, tuple[float, int]] = {}
        self._passed = 0.0, 0

    def add(self, phase: str, milliseconds: float, samples: int) -> None:
        """Adds what a phase took for some samples."""
        spent, count = self._spent.get(phase, (0.0, 0))
        self._spent[phase] = spent + milliseconds, count + samples

    def add_one(self, phases: Mapping[str, float]) -> None:
        """Counts a sample with the milliseconds of its phases; but the first is left out."""
        if not self.left_out:
            self.left_out = 1
            return
        self.samples += 1
        for phase, milliseconds in phases.items():
            self.add(phase, milliseconds, 1)

    def passed(self, milliseconds: float, samples: int) -> None:
        """Adds time that passed for all phases of some samples together."""
        self._passed = self._passed[0] + milliseconds, self._passed[1] + samples

    def phases(self) -> dict[str, float]:
        """Phase -> milliseconds a sample, in the order in which they are done."""
        return {phase: spent / count for phase, (spent, count) in self._spent.items() if count}

    @property
    def together(self) -> float | None:
        """Milliseconds that pass a sample where phases run side by side; None if not known."""
        spent, count = self._passed
        return spent / count if count else None

    def line(self) -> str:
        """It in a line."""
        one = self.unit.removesuffix("s")
        at = f" at {self.at}" if self.at else ""
        compiles = "which compiles the network"
        if not self.samples and self.side_by_side:
            first = f"all {self.left_out} {self.unit} were in the first batch{self._of_shapes}"
            return f"speed: not measured: {first}{at}, {compiles}"
        if not self.samples:
            return f"speed: not measured: there was no {one}{at} but the first, {compiles}"
        took = ", ".join(f"{ms:.{_digits(ms)}f} ms {phase}" for phase, ms in self.phases().items())
        both = ""
        if self.together is not None:
            both = f" ({self.together:.{_digits(self.together)}f} ms together, side by side)"
        many = f"{self.samples:,} {self.unit if self.samples > 1 else one}"
        by = f" in batches of {self.batch}" if self.side_by_side else ""
        what = f"batch{self._of_shapes}" if self.side_by_side else one
        first = f"the first, compiling {what} left out"
        return f"speed: {took} {_article(one)} {one}{both}, over {many}{at}{by} ({first})"

    @property
    def _of_shapes(self) -> str:
        return " of each shape" if len(self.shapes) > 1 else ""

    def to_json(self) -> dict[str, Any]:
        """{"milliseconds": {phase: a sample's}, "together": those that pass, only of phases side by
        side, "unit", "samples", "left_out", "at", "batch"}."""
        rounded = {phase: round(ms, 3) for phase, ms in self.phases().items()}
        both = {} if self.together is None else {"together": round(self.together, 3)}
        return {
            "milliseconds": rounded, **both, "unit": self.unit, "samples": self.samples,
            "left_out": self.left_out, "at": self.at, "batch": self.batch,
        }  # fmt: skip


def _digits(milliseconds: float) -> int:
    return 1 if milliseconds >= 0.1 else 3


def _article(word: str) -> str:
    return "an" if word[:1] in "aeiou" else "a"


class Phases:
    """The phases of one sample, one after the other.

    Attributes:
      milliseconds: of each that has ended, by its name.
    """

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def end(self, phase: str) -> None:
        """Ends a phase, and with it begins the next. What it computed must be there: JAX computes
        behind the caller's back until somebody looks."""
        now = time.perf_counter()
        self.milliseconds[phase] = 1e3 * (now - self._since)
        self._since = now


def timed(found: Iterable[_T]) -> Iterator[tuple[float, _T]]:
    """What an iterable gives, each with the milliseconds that it took to come."""
    remaining = iter(found)
    while True:
        since = time.perf_counter()
        try:
            one = next(remaining)
        except StopIteration:
            return
        yield 1e3 * (time.perf_counter() - since), one
        del one  # not held while the next is made


@contextlib.contextmanager
def collected() -> Iterator[list[Speed]]:
    """Gathers the speeds of the evaluations that are done in this context."""
    found = list[Speed]()
    token = _evaluations.set(found)
    try:
        yield found
    finally:
        _evaluations.reset(token)


def of_evaluation(unit: str, at: str = "") -> Speed:
    """The speed of an evaluation that begins; `collected` around it has it, too."""
    speed = Speed(unit, at, side_by_side=True)
    if (found := _evaluations.get()) is not None:
        found.append(speed)
    return speed
