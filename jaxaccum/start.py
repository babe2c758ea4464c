"""The first thing that `python -m jaxaccum.VERB` does, before anything slow is imported."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any

STOPPED_BY_HAND = 130  # what shells expect of Ctrl-C, so that a loop around the run ends, too

stderr_was_closed = False  # then errors are said on stdout
_importing = contextlib.ExitStack()


def prepare() -> None:
    """Makes the standard streams usable whatever they are, and Ctrl-C a quiet end with status 130.

    A closed stream becomes the null device: else the next file that is opened, a checkpoint say,
    would get its number, and with it what libraries write there. What stdout cannot encode is
    escaped. `command_line` gives Ctrl-C its usual meaning back.
    """
    global stderr_was_closed
    closed = []
    for number, mode in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            got = os.open(os.devnull, mode)
            os.set_inheritable(got, True)
            if got != number:
                os.dup2(got, number)
                os.close(got)
            closed.append(number)
    stderr_was_closed = stderr_was_closed or 2 in closed
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            way = "r" if number == 0 else "w"
            setattr(sys, name, os.fdopen(number, way, closefd=False, errors="backslashreplace"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.excepthook = _name_the_extra
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(STOPPED_BY_HAND))


def importing() -> None:
    """Says now and then, until `imported`, that packages are being imported, which takes a second
    or, the first time after an installation, many."""
    from jaxaccum.machine.waiting import waiting

    _importing.close()
    if not os.environ.get("JAXACCUM_SILENT_IMPORTS"):
        _importing.enter_context(waiting("importing JAX, Flax and what else is needed"))


def imported() -> None:
    """All packages of the verb are there."""
    _importing.close()


def _name_the_extra(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Says in one line how a package is installed that a verb needs and the core does not."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    missing = (name or "").partition(".")[0]
    if not missing or missing == "jaxaccum":
        sys.__excepthook__(kind, error, trace)
        return
    text = (
        f"error: no package {missing!r}. pip install jaxaccum brings what jaxaccum.accumulate "
        "needs; pip install 'jaxaccum[all]' brings what training, evaluating and predicting need"
    )
    print(text, file=sys.stdout if stderr_was_closed else sys.stderr)
