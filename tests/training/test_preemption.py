"""Signals to a run: where they may raise, what they leave alone, and the grace period."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxaccum.training.preemption import STATUS, Preempted, Preemption


@pytest.fixture(autouse=True)
def no_nohup():
    """Under nohup the tests, too, would ignore that their terminal is closed."""
    old = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, old)


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("number", STATUS)
def test_work_is_held_and_then_given_up(number, capfd):
    steps = []
    with pytest.raises(Preempted) as stopped, Preemption(60, lambda: 7) as preemption:
        preemption.hold()
        os.kill(os.getpid(), number)
        steps.append("held")
        with preemption.allowed():
            steps.append("never")
    assert steps == ["held"]
    assert stopped.value.code == (130 if number == signal.SIGINT else 75)
    said = capfd.readouterr().err
    assert "ending the update under way, in 60 s at most" in said
    assert f"stopped by {number.name}: update 7 is kept; the same command continues" in said


def test_allowed_work_is_dropped_at_once():
    with pytest.raises(Preempted), Preemption(60, lambda: None) as preemption:
        preemption.hold()
        with preemption.allowed():
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            started = time.monotonic()
            time.sleep(30)
    assert time.monotonic() - started < 10


def test_a_callback_that_cannot_raise_does_not_swallow_it(capfd):
    class Thing:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.001)

    with pytest.raises(Preempted), Preemption(60, lambda: 7) as preemption:
        preemption.hold()
        with preemption.allowed():
            thing = Thing()
            del thing
            started = time.monotonic()
            time.sleep(30)
    assert time.monotonic() - started < 10
    said = capfd.readouterr().err
    assert "Traceback" not in said and "Exception ignored" not in said


def test_before_the_first_update_there_is_nothing_to_hold(capfd):
    with pytest.raises(Preempted), Preemption(60, lambda: None):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    assert "no update is kept yet" in capfd.readouterr().err


def test_work_that_ended_all_the_same_is_no_preemption(capfd):
    with Preemption(60, lambda: 12) as preemption:
        preemption.hold()
        os.kill(os.getpid(), signal.SIGTERM)
    assert "stopped" not in capfd.readouterr().err


def test_a_second_signal_does_not_disturb_the_saving():
    saved = False
    with pytest.raises(Preempted), Preemption(60, lambda: None) as preemption:
        preemption.hold()
        try:
            with preemption.allowed():
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(30)
        except Preempted:
            os.kill(os.getpid(), signal.SIGTERM)
            saved = True
            raise
    assert saved


def test_errors_of_loaders_that_got_the_signal_too_are_the_preemption():
    with pytest.raises(Preempted), Preemption(60, lambda: None) as preemption:
        preemption.hold()
        with preemption.allowed():
            preemption.signal = signal.SIGTERM
            raise RuntimeError("Worker process was terminated")
    with (
        pytest.raises(RuntimeError, match="another"),
        Preemption(60, lambda: None) as preemption,
        preemption.allowed(),
    ):
        raise RuntimeError("another")


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in STATUS]
    with Preemption(60, lambda: None):
        assert [signal.getsignal(number) for number in STATUS] != before
    assert [signal.getsignal(number) for number in STATUS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_nohup_stays(capfd):
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Preemption(60, lambda: None) as preemption:
            preemption.hold()
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
            with preemption.allowed():
                pass
            preemption._told(signal.SIGHUP)  # what another process of the run got ends this one
            time.sleep(0.1)
            assert preemption.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


def test_the_terminal_may_be_what_went_away(monkeypatch):
    class Gone:
        def write(self, _):
            raise OSError(5, "Input/output error")

        flush = write

    monkeypatch.setattr(sys, "stderr", Gone())
    with pytest.raises(Preempted) as stopped, Preemption(60, lambda: 7) as preemption:
        preemption.hold()
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.1)
        with preemption.allowed():
            pass
    assert stopped.value.code == 75


def test_other_threads_leave_signals_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with Preemption(60, lambda: None):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize(
    ("signals", "grace", "code", "words"),
    [
        ([signal.SIGTERM], 0.3, 75, "not done within checkpoint.grace=0.3 s): update 7 is kept"),
        ([signal.SIGINT, signal.SIGINT], 60, 130, "Ctrl-C again): update 7 is kept"),
    ],
)
def test_work_that_takes_too_long_is_abandoned(signals, grace, code, words):
    """The main thread is deep in C, as in a compilation: Python's handlers never run."""
    program = (
        "import hashlib, multiprocessing, time\n"
        "from jaxaccum.training.preemption import Preemption\n"
        "if __name__ == '__main__':\n"
        f"    with Preemption({grace}, lambda: 7) as preemption:\n"
        "        preemption.hold()\n"
        "        spawn = multiprocessing.get_context('spawn')\n"
        "        worker = spawn.Process(target=time.sleep, args=(60,))\n"
        "        worker.start()\n"
        "        print(worker.pid, flush=True)\n"
        "        hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout
    worker = int(process.stdout.readline())
    for number in signals:
        time.sleep(0.3)
        process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert words in said and "Traceback" not in said
    assert not _alive(worker)


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
