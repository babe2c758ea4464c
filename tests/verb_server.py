"""Runs verbs in forks of one process that has imported all: a hundred take the time of a few.

Reads one JSON object a line: words (the verb first), cwd, out and err (files, or null: closed;
"pipe": one that nobody reads), encoding (of stdout), env, limits (of resource), stop (seconds until
SIGINT). Writes the exit status.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import runpy
import signal
import sys
import traceback
import warnings
from pathlib import Path

MODULES = ("train", "evaluate", "predict", "convert", "export", "compare", "calibrate", "pack",
           "plan.__main__")  # fmt: skip


def attach(number: int, to: str | None) -> None:
    """Points a file descriptor to a file, to a pipe without a reader, or to nothing."""
    if to is None:
        os.close(number)
    elif to == "pipe":
        reader, writer = os.pipe()
        os.dup2(writer, number)
        os.close(reader)
        os.close(writer)
    else:
        file = os.open(to, os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(file, number)
        os.close(file)


def child(asked: dict) -> int:
    """The exit status of a verb, as Python's own end of a process has it."""
    os.chdir(asked["cwd"])
    os.environ.update(asked["env"])
    attach(1, asked["out"])
    attach(2, asked["err"])
    sys.stdin = None
    sys.stdout, sys.stderr = (
        os.fdopen(number, "w", encoding=encoding, closefd=False) if asked[name] else None
        for number, name, encoding in ((1, "out", asked["encoding"]), (2, "err", "utf-8"))
    )
    for name, most in asked["limits"].items():
        resource.setrlimit(getattr(resource, name), (most, resource.RLIM_INFINITY))
    if asked["stop"]:
        signal.setitimer(signal.ITIMER_REAL, asked["stop"])
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    sys.argv = asked["words"]
    verb = asked["words"][0]
    module = f"jaxaccum.{'plan.__main__' if verb == 'plan' else verb}"
    warnings.filterwarnings("ignore", "'jaxaccum", RuntimeWarning)  # that it is imported already
    status = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream:
                stream.flush()
    except OSError:
        status = 120
    return status


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    importlib.import_module("tiny")  # registers the model "tiny-t"
    for module in MODULES:
        importlib.import_module(f"jaxaccum.{module}")
    for line in sys.stdin:
        number = os.fork()
        if not number:
            status = 70
            try:
                status = child(json.loads(line))
            finally:
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
