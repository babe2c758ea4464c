"""Ends a run in good order when its machine is taken away: signals, grace period, exit status."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jaxaccum.training.distributed import Peers

TRY_AGAIN = 75  # EX_TEMPFAIL: the same command continues the run
STOPPED_BY_HAND = 130  # what shells expect of Ctrl-C, so that a loop around the run ends, too

# SIGTERM comes from Kubernetes, from cloud machines and from Slurm, SIGUSR1 from Slurm's --signal,
# SIGHUP when a terminal is closed or its connection is lost.
STATUS = {
    signal.SIGTERM: TRY_AGAIN,
    signal.SIGUSR1: TRY_AGAIN,
    signal.SIGHUP: TRY_AGAIN,
    signal.SIGINT: STOPPED_BY_HAND,
}

_TOLD = 128  # marks, for the watching thread, a signal that another process got


class Preempted(SystemExit):
    """A signal or the clock ended the run, and what it had learned is kept; `code` is the exit
    status.

    Attributes:
      time_is_up: the run's own limit of time was reached.
    """

    code: int
    time_is_up = False


class Preemption:
    """Turns the signals in `STATUS` into `Preempted`, raised only where nothing gets lost.

    That is anywhere before `hold` is called, and then inside of `allowed` only. If the run has not
    left the context `grace` seconds after the signal, or when Ctrl-C is pressed again, the process
    ends from another thread: the main one may be inside of a long compilation, where no signal
    reaches Python. SIGHUP stays ignored where it is at the start, as under nohup. In a thread other
    than the main one it does nothing: there, signals are the caller's.

    Attributes:
      signal: the first signal that came, or None.
    """

    def __init__(
        self,
        grace: float,
        kept: Callable[[], int | None],
        peers: Peers | None = None,
        install: bool = True,
        hours: float = 0.0,
    ) -> None:
        """The time begins.

        Args:
          grace: seconds.
          kept: update of the newest complete checkpoint, or None; called from any thread.
          peers: the other processes of the run: what one gets, all get.
          install: take signals at all; if not, they are the caller's.
          hours: after which it raises `Preempted` in `allowed`, without a signal; 0 for never. Of
            several processes the first looks at the clock.
        """
        self._hours, self._out_of_time = hours, False
        looks = hours > 0 and (peers is None or peers.first)
        self._ends = time.monotonic() + 3600 * hours if looks else math.inf
        self._wanted = install
        self.signal: signal.Signals | None = None
        self._grace = grace
        self._kept = kept
        self._peers = peers
        self._speaks = peers is None or peers.first
        self._raises, self._raised = True, False
        self._again: threading.Timer | None = None

    def __enter__(self) -> Preemption:
        in_main = threading.current_thread() is threading.main_thread()
        self._installed = self._wanted and in_main
        if self._installed:
            # Python's own handler waits for the main thread; this pair does not.
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._watcher = threading.Thread(target=self._watch, name="preemption", daemon=True)
            self._watcher.start()
            self._old_pair = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            ours = [n for n in STATUS if not (n == signal.SIGHUP and nohup)]
            self._old = {number: signal.signal(number, self._arrived) for number in ours}
            self._old_hook, sys.unraisablehook = sys.unraisablehook, self._swallowed
            if self._peers:
                self._peers.on_signal = self._told
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        stopped = self.signal and kind and issubclass(kind, Preempted) and self._speaks
        if stopped and self._out_of_time:
            _say(f"stopped after hours={self._hours:g}: {self._what_is_kept()}")
        if not self._installed:
            return
        self._raises = False
        if self._peers:
            self._peers.on_signal = lambda number: None
        sys.unraisablehook = self._old_hook
        if self._again:
            self._again.cancel()
            self._again.join()
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_pair)
        self._writer.send(b"\0")
        self._watcher.join()
        self._reader.close()
        self._writer.close()
        if stopped and self.signal and not self._out_of_time:
            _say(f"stopped by {self.signal.name}: {self._what_is_kept()}")

    def hold(self) -> None:
        """From here on `Preempted` is raised only inside of `allowed`."""
        self._raises = False

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Work that may be dropped: a signal, also one that came before, raises `Preempted`."""
        try:
            self._raises = True
            self._look_at_the_clock()
            if self.signal:
                raise self.preempted()
            yield
        except Exception as error:
            # A signal to the whole group ends loader processes, too, and the loader complains.
            if self.signal:
                raise self.preempted() from error
            raise
        finally:
            self._raises = False

    def preempted(self) -> Preempted:
        """What to raise after a signal."""
        assert self.signal
        preempted = Preempted(STATUS[self.signal])
        preempted.time_is_up = self._out_of_time
        return preempted

    def _look_at_the_clock(self) -> None:
        """Where time is over, the same as if SIGUSR1 had come, which the others are sent."""
        if self.signal or time.monotonic() < self._ends:
            return
        self.signal, self._out_of_time = signal.SIGUSR1, True
        if self._peers:
            self._peers.stop(signal.SIGUSR1)

    def _arrived(self, number: int, _: Any) -> None:
        self.signal = self.signal or signal.Signals(number)
        if self._raises and not self._raised:
            self._raised = True
            raise self.preempted()

    def _swallowed(self, what: Any) -> None:
        """Raises again a little later if it was in a callback (of garbage collection, say)."""
        if not isinstance(what.exc_value, Preempted):
            self._old_hook(what)
            return
        self._raised = False
        main = threading.main_thread().ident
        self._again = threading.Timer(0.02, signal.pthread_kill, (main, signal.SIGTERM))
        self._again.start()

    def _told(self, number: int) -> None:
        """Another process got a signal."""
        self._writer.send(bytes([_TOLD + number]))

    def _watch(self) -> None:
        first, deadline, told = None, 0.0, False
        while True:
            self._reader.settimeout(max(deadline - time.monotonic(), 1e-3) if first else None)
            try:
                number = self._reader.recv(1)[0]
            except TimeoutError:
                assert first
                self._abandon(first, f"not done within checkpoint.grace={self._grace:g} s")
            if number == 0:
                return
            if number >= _TOLD and first is None and not told:
                told = True
                number -= _TOLD
                # What another process got may be ignored in this one.
                os.kill(os.getpid(), number if number in self._old else signal.SIGTERM)
            if number not in STATUS:
                continue
            if first is None:
                first, deadline = signal.Signals(number), time.monotonic() + self._grace
                if self._peers:
                    self.signal = self.signal or first
                    self._peers.stop(None if told else number)
                if self._speaks:
                    _say(f"{first.name}: ending the update under way, in {self._grace:g} s at most")
            elif number == signal.SIGINT:
                self._abandon(first, "Ctrl-C again")

    def _abandon(self, first: signal.Signals, why: str) -> NoReturn:
        _say(f"stopped by {first.name} at once ({why}): {self._what_is_kept()}")
        if self._peers and self._peers.first and not self._peers.alone:
            time.sleep(2)  # it has the service that the others end without
        end_at_once(STATUS[first])

    def _what_is_kept(self) -> str:
        step = self._kept()
        if step is None:
            return "no update is kept yet; the same command starts again"
        return f"update {step} is kept; the same command continues from there"


def end_at_once(status: int) -> NoReturn:
    """Ends the process from any thread, whatever the others do, and its loader processes.

    Python's own end would wait for them, and complain of one that a thread is just starting.
    """
    for worker in multiprocessing.active_children():
        worker.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # its reader may have gone
            stream.flush()
    os._exit(status)


def _say(text: str) -> None:
    """Tells the user, if a terminal is left: it may be what went away."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
