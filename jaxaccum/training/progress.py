"""How far a training run is: its state, and the windows and updates behind it."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Generator
from typing import Any

import jax
import numpy as np

from jaxaccum import tasks
from jaxaccum.accumulate import State
from jaxaccum.machine.waiting import waiting
from jaxaccum.training import run
from jaxaccum.training.journal import Journal
from jaxaccum.training.restart import sound


class Progress:
    """The state, moved on window by window; logs are read later, while the next update runs.

    Attributes:
      state: after the last window; its arrays are given to the next update.
      consumed: windows computed.
      done: updates done; of a window whose log was not read yet, it is assumed that it was one.
    """

    def __init__(
        self, this: run.Run, engine: Any, stream: tasks.Stream, journal: Journal, state: State
    ) -> None:
        """Starts from a state on the devices.

        Args:
          stream: the run's samples.
          journal: is told the log of every window.
        """
        self.state = state
        self.done, self.consumed = int(state.step), int(state.windows)
        self._compiled: set[tuple] = set()  # shapes of samples that there is a program for
        self._this, self._engine = this, engine
        self._stream, self._journal = stream, journal
        self._width = this.window.geometry.microbatch * this.window.geometry.devices
        self._pending: deque[tuple[int, dict[str, jax.Array]]] = deque()
        self._read = self.consumed  # windows whose logs were read

    def windows(self) -> Generator[dict[str, np.ndarray], None, None]:
        """The windows from here on, made ahead, without an end."""
        data = self._this.config.data
        made: Any = self._stream.windows(
            self._this.samples_before(self.consumed),
            map(self._this.size_of, itertools.count(self.consumed)),
            workers=data.workers, prefetch=data.prefetch, share=self._engine.share,
        )  # fmt: skip
        with contextlib.closing(made):
            while True:
                with waiting("waiting for samples"):
                    batch = next(made)
                yield batch

    def compute(self, batch: dict[str, np.ndarray]) -> None:
        """Starts the update of the next window on the devices."""
        steps = -(-self._this.size_of(self.consumed) // self._width)
        shapes = tuple(a.shape[1:] for a in jax.tree.leaves(batch))
        new = shapes not in self._compiled
        self._compiled.add(shapes)
        with waiting("compiling the update" if new else "computing"):
            self.state, log = self._engine.update(self.state, batch, steps)
        self._pending.append((self.consumed, log))
        self.consumed, self.done = self.consumed + 1, self.done + 1

    def catch_up(self, windows: int) -> None:
        """Starts the updates of all windows up to the number, which other processes have begun."""
        for number in range(self.consumed, windows):
            samples = self._this.samples_before(number), [self._this.size_of(number)]
            self.compute(next(self._stream.windows(*samples, prefetch=0, share=self._engine.share)))

    def read(self, but: int = 0) -> None:
        """Waits for logs, and tells the journal; a window that was skipped was no update.

        Args:
          but: leave the newest this many for later.
        Raises:
          TrainingError: too many windows in a row were skipped.
          WorkdirError: metrics.jsonl cannot be written.
        """
        while len(self._pending) > but:
            number, log = self._pending.popleft()
            with waiting("computing"):
                jax.block_until_ready(log)
            self.done -= not self._journal.update(number, log)
            self._read = number + 1

    def weights(self) -> dict[str, Any]:
        """What is evaluated, {"params", "stats"}: the average if the run averages. It is whole in
        this process; all processes must call."""
        state = self.state
        return self._engine.whole(state.ema or {"params": state.params, "stats": state.stats})

    def whole(self) -> State:
        """The state, whole on this host; all processes must call."""
        # Leaf by leaf: all together may not fit on a device.
        return jax.tree.map(lambda leaf: np.asarray(self._engine.whole(leaf)), self.state)

    @property
    def sound(self) -> bool:
        """Whether every log was read, and the state is that of the last update, and finite."""
        return self._read == self.consumed and sound(self.state, self.done)
