"""A word now and then while something takes long, so that nobody has to guess whether it hangs."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from tqdm import tqdm

_TICK = 0.5  # seconds between two looks
_DELAY = 2.0  # seconds before a terminal's line appears
_SOON = 1.0  # seconds before a plain line of what follows a silence
SILENCE = 4.0  # seconds without a line, after which one is due while something is young
_heard = time.monotonic() - time.process_time()  # nothing since the process began, about


def heard() -> None:
    """Says that a line was printed."""
    global _heard
    _heard = time.monotonic()


def moments() -> Iterator[float]:
    """Seconds after which a plain line is due: every 4 for a minute, every 10 to two, every 30."""
    return itertools.chain(range(4, 61, 4), range(70, 121, 10), itertools.count(150, 30))


def width(stream: TextIO) -> dict[str, Any]:
    """What tqdm is to take for the width of a terminal: its own, or 80 x 24 where it knows none."""
    try:
        known = os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError, AttributeError):
        known = True  # tqdm has its own ways to find out
    return {"dynamic_ncols": True} if known else {"ncols": 80, "nrows": 24}


class Bar(tqdm):
    """A bar that gives tqdm's lock back where it cannot draw, as on a terminal that is gone: tqdm
    keeps it, and the next thread that draws would wait for ever."""

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> None:
        """Draws it. Raises OSError if it cannot."""
        del lock_args
        with contextlib.nullcontext() if nolock else self.get_lock():
            self.display()


class _Wait:
    """One block that is waited for."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done, self.start = 0, time.monotonic()
        self.bar: Bar | None = None
        self._moments = moments()
        self._due = next(self._moments)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def __str__(self) -> str:
        count = f" {self.done:,} of {self.total:,} {self.unit}," if self.total else ""
        return f"{self.what}:{count} {self.seconds:.0f} s"

    def say(self) -> None:
        """Prints or draws, if it is time."""
        if sys.stderr.isatty():
            if self.seconds >= _DELAY:
                self._draw()
        elif self.seconds >= self._due or (
            # Who has heard nothing for longer does not listen to a run: Python's prompt, say.
            _SOON <= self.seconds < 60 and SILENCE <= time.monotonic() - _heard < 2 * SILENCE
        ):
            print(self, file=sys.stderr, flush=True)
            heard()
            while self._due <= self.seconds:
                self._due = next(self._moments)

    def hush(self) -> None:
        """Takes its line from the terminal."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _draw(self) -> None:
        if self.bar is None:
            count = "{n_fmt}/{total_fmt} {unit} |{bar:24}| " if self.total else ""
            self.bar = Bar(
                total=self.total or None, unit=self.unit, desc=self.what, leave=False,
                file=sys.stderr, bar_format=f"{{desc}}: {count}{{elapsed}}", **width(sys.stderr),
            )  # fmt: skip
            self.bar.start_t -= self.seconds
        self.bar.n = self.done
        self.bar.refresh()


class _Teller:
    """Says the innermost of the blocks under way, from one thread for all."""

    def __init__(self) -> None:
        self.silent = False
        self._waits: list[_Wait] = []
        self._lock = threading.Lock()
        self._some = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, wait: _Wait) -> None:
        with self._lock:
            self._waits.append(wait)
            if self._thread is None or not self._thread.is_alive():  # a fork has none
                self._thread = threading.Thread(target=self._run, name="waiting", daemon=True)
                self._thread.start()
        self._some.set()

    def end(self, wait: _Wait) -> None:
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._waits.remove(wait)
            wait.hush()

    def _run(self) -> None:
        while True:
            self._some.wait()
            time.sleep(_TICK)
            with self._lock:
                if not self._waits:
                    self._some.clear()
                elif not self.silent:
                    with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody reads
                        for outer in self._waits[:-1]:
                            outer.hush()
                        self._waits[-1].say()


_teller = _Teller()


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Nothing is said in this context, as in the processes of a run that are not the first."""
    before, _teller.silent = _teller.silent, True
    try:
        yield
    finally:
        _teller.silent = before


@contextlib.contextmanager
def waiting(what: str, total: int = 0, unit: str = "") -> Iterator[Callable[[int], None]]:
    """Says on stderr what is going on while the block runs, if that takes longer than seconds.

    On a terminal that is a line that counts and goes away; elsewhere plain lines, at `moments` and,
    for a minute, after some silence. Of
    blocks in blocks the innermost is said. A block that is over soon costs microseconds.

    Args:
      what: is done, as "compiling the update".
      total, unit: of what is counted, if anything is: 500, "images".
    Yields:
      to be called with how many more are done.
    """
    wait = _Wait(what, total, unit)

    def advance(more: int) -> None:
        wait.done += more

    _teller.begin(wait)
    try:
        yield advance
    finally:
        _teller.end(wait)
