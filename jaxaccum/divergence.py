"""Whether a run still learns: it may end with finite numbers and a network that is dead."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

RECENT = 10  # updates that have to agree
FACTOR = 100.0


class Divergence:
    """Watches losses and gradients of updates; a healthy run has none of what it tells.

    A run has diverged if the gradient was exactly zero in each of the last `RECENT` updates (or of
    all, of a shorter run), or the loss more than `FACTOR` times that of the first update.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        """`state` is that of an earlier run, to continue from."""
        state = state or {"first": None, "recent": []}
        self._first: float | None = state["first"]
        self._recent: deque[list[float]] = deque(state["recent"], maxlen=RECENT)

    @property
    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"first": self._first, "recent": [list(pair) for pair in self._recent]}

    def add(self, loss: float, gradient_norm: float) -> None:
        """Takes an update in."""
        if self._first is None:
            self._first = float(loss)
        self._recent.append([float(loss), float(gradient_norm)])

    def __str__(self) -> str:
        """What is wrong, and what to do; "" if nothing is."""
        if not self._recent or self._first is None:
            return ""
        advice = "Lower lr.base, lengthen lr.warmup_epochs, or clip gradients (optimizer.clip)."
        updates = f"the last {len(self._recent)} updates"
        loss = self._recent[-1][0]
        if all(norm == 0 for _, norm in self._recent):
            return (
                f"the run has diverged: the gradient was exactly 0 in {updates} (loss {loss:.4g}), "
                f"so the network learns nothing any more. {advice}"
            )
        if self._first > 0 and all(value > FACTOR * self._first for value, _ in self._recent):
            return (
                f"the run has diverged: in {updates} the loss was over {FACTOR:g} times what it "
                f"was at the first ({loss:.4g}, then {self._first:.4g}). {advice}"
            )
        return ""
