"""Whether a run still learns: it may end with finite numbers and a network that is dead."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

RECENT = 10  # updates that have to agree
VANISHED = 1e-6  # of the first gradient: what float32 leaves of a sum that cancels
EXPLODED = 100.0  # times the first loss


class Divergence:
    """Watches losses and gradients of updates; a healthy run has none of what it tells.

    A run has diverged if in each of the last `RECENT` updates (or all, of a shorter run) the norm
    of the gradient was at most `VANISHED` of that of the first update, or the loss more than
    `EXPLODED` times that of the first.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        """`state` is that of an earlier run, to continue from."""
        state = state or {"first": None, "recent": []}
        self._first: list[float] | None = state["first"]
        self._recent: deque[list[float]] = deque(state["recent"], maxlen=RECENT)

    @property
    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"first": self._first, "recent": list(self._recent)}

    def add(self, loss: float, gradient_norm: float) -> None:
        """Takes an update in."""
        update = [float(loss), float(gradient_norm)]
        self._first = self._first or update
        self._recent.append(update)

    def __str__(self) -> str:
        """What is wrong, and what to do; "" if nothing is."""
        if not self._recent or self._first is None:
            return ""
        first, norm = self._first
        vanished = [g <= VANISHED * norm for _, g in self._recent]
        exploded = [0 < EXPLODED * first < loss for loss, _ in self._recent]
        if not all(v or e for v, e in zip(vanished, exploded, strict=True)):
            return ""
        what = [
            "the gradient vanished, as that of a dead network" if any(vanished) else "",
            f"the loss was over {EXPLODED:g} times the first" if any(exploded) else "",
        ]
        last = self._recent[-1]
        return (
            f"the run has diverged: in the last {len(self._recent)} updates "
            f"{' or '.join(filter(None, what))} (loss {last[0]:.4g}, gradient norm {last[1]:.4g}; "
            f"at the first {first:.4g} and {norm:.4g}). Lower lr.base, lengthen lr.warmup_epochs, "
            "or clip gradients (optimizer.clip)."
        )
