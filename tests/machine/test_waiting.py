"""What is waited for is said, now and then, and only then."""

import io
import itertools
import os
import re
import struct
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from jaxaccum.machine import waiting as module
from jaxaccum.machine.waiting import silent, waiting


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture(params=[False, True], ids=["file", "terminal"])
def stderr(request, monkeypatch):
    """Where seconds pass ten times as fast."""
    stream, real = Stream(request.param), time.monotonic
    monkeypatch.setattr(module, "sys", types.SimpleNamespace(stderr=stream))  # pytest sets its own
    monkeypatch.setattr(module.time, "monotonic", lambda: 10 * real())
    monkeypatch.setattr(module, "_TICK", 0.02)
    return stream


def until(condition):
    end = time.perf_counter() + 20
    while not condition():
        assert time.perf_counter() < end
        time.sleep(0.01)


def test_what_takes_long_is_said_with_how_far_it_is(stderr):
    with waiting("evaluating", 500, "images") as advance:
        advance(120)
        until(lambda: "120" in stderr.getvalue())
    said = stderr.getvalue()
    if stderr.terminal:
        assert "evaluating: 120/500 images" in said
        assert said.endswith("\r")  # nothing of it stays
    else:
        assert said.startswith("evaluating: 120 of 500 images, ") and said.endswith(" s\n")


def test_what_is_over_soon_is_not(stderr):
    for _ in range(100):
        with waiting("waiting for the update"):
            pass
    time.sleep(0.1)
    assert stderr.getvalue() == ""


def test_a_wait_after_a_silence_is_said_sooner(monkeypatch):
    """The seconds without a word count, not those of the wait alone."""
    stream = Stream(False)
    monkeypatch.setattr(module, "sys", types.SimpleNamespace(stderr=stream))
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    module.heard()
    wait = module._Wait("evaluating", 0, "")
    for now[0] in (1001.0, 1002.5, 1003.5):
        wait.say()
    assert stream.getvalue() == ""
    later = module._Wait("evaluating", 0, "")  # begins 3.5 s after the last word
    for now[0] in (1004.5, 1005.6, 1006.0, 1007.4):
        later.say()
    assert stream.getvalue() == "evaluating: 1 s\n"
    for now[0] in (1007.6, 1008.0):  # four seconds of its own
        later.say()
    assert stream.getvalue() == "evaluating: 1 s\nevaluating: 4 s\n"
    now[0] = 2000.0  # a new call, long after
    call = module._Wait("predicting", 0, "")
    for now[0] in (2002.0, 2003.9):
        call.say()
    assert "predicting" not in stream.getvalue()


def test_the_innermost_is_said(stderr):
    with waiting("outside"):
        with waiting("inside"):
            until(lambda: "inside" in stderr.getvalue())
        assert "outside" not in stderr.getvalue()
        until(lambda: "outside" in stderr.getvalue())


def test_nothing_in_silence_and_nothing_raised_where_nobody_reads(stderr, monkeypatch):
    with silent(), waiting("a"):
        time.sleep(0.7)
    assert stderr.getvalue() == ""

    def gone(text):
        raise BrokenPipeError

    monkeypatch.setattr(stderr, "write", gone)
    with waiting("b"):
        time.sleep(0.7)
    module.sys.stderr = None
    with waiting("c"):
        time.sleep(0.7)


def test_a_terminal_that_goes_away_stops_no_other_bar(monkeypatch):
    """tqdm keeps its lock where drawing fails: what drew next, from another thread, hung."""
    gone, real = Stream(True), time.monotonic
    monkeypatch.setattr(gone, "write", lambda text: (_ for _ in ()).throw(BrokenPipeError()))
    monkeypatch.setattr(module, "sys", types.SimpleNamespace(stderr=gone))
    monkeypatch.setattr(module.time, "monotonic", lambda: 10 * real())
    monkeypatch.setattr(module, "_TICK", 0.02)
    with waiting("a"):  # fails in the thread of all waits
        time.sleep(0.7)
    with pytest.raises(BrokenPipeError):  # and here
        module.Bar(total=2, file=gone)
    drawn = []

    def draw():
        with module.Bar(total=2, file=Stream(True)) as bar:
            bar.update(1)
        drawn.append(True)

    for _ in range(2):
        thread = threading.Thread(target=draw, daemon=True)
        thread.start()
        thread.join(10)
    assert drawn == [True, True]


def test_one_thread_for_all_and_errors_go_through():
    with pytest.raises(KeyError), waiting("a"), waiting("b"):
        raise KeyError
    with waiting("c"):
        assert [thread.name for thread in threading.enumerate()].count("waiting") == 1
    assert module._teller._waits == []


def test_plain_lines_become_rare():
    due = list(itertools.islice(module.moments(), 24))
    assert due[:3] == [4, 8, 12]
    assert due[13:] == [56, 60, 70, 80, 90, 100, 110, 120, 150, 180, 210]


@pytest.mark.parametrize(
    ("columns", "expected"), [(0, {"ncols": 80, "nrows": 24}), (120, {"dynamic_ncols": True})]
)
def test_a_terminal_that_knows_no_width(columns, expected):
    """As that of a container or of `script`, where tqdm alone would show nothing."""
    pty = pytest.importorskip("pty")
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(inner, "w") as stream:
        assert module.width(stream) == expected
    os.close(outer)
    assert module.width(io.StringIO()) == {"dynamic_ncols": True}


def test_imports_that_take_long_are_said_too(tmp_path):
    """Until the verb begins; as of a package that is slow to come, and then lacks another."""
    (tmp_path / "ml_collections.py").write_text("import time\ntime.sleep(6)\nimport no_such_one\n")
    environment = {k: v for k, v in os.environ.items() if k != "JAXACCUM_SILENT_IMPORTS"}
    done = subprocess.run(
        [sys.executable, "-m", "jaxaccum.train", "--help"], cwd=Path(__file__).parents[2],
        env=environment | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    *said, error = done.stderr.splitlines()
    assert said and all(
        re.fullmatch(r"importing JAX, Flax and what else is needed: \d+ s", line) for line in said
    )
    assert error.startswith("error: no package 'no_such_one'")
