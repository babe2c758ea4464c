"""What is said of memory is what the system and JAX say."""

import subprocess
import sys

import jax
import psutil
import pytest

from jaxaccum.machine import memory


class Gpu:
    def __init__(self, peak):
        self.peak = peak

    def memory_stats(self):
        return {"peak_bytes_in_use": self.peak, "bytes_limit": 60 << 30, "bytes_in_use": 5}


def test_the_processes_of_a_run_count():
    alone = memory.used()
    assert set(alone) == {"host"}  # a CPU's memory is the host's
    assert alone["host"].whole == psutil.virtual_memory().total
    assert alone["host"].taken == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)
    held = "x = bytearray(300 << 20)\nprint(flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        child.stdout.readline()
        assert memory.used()["host"].taken - alone["host"].taken > 290 << 20
        child.communicate(b"\n")


def test_the_fullest_device_is_told(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [Gpu(7 << 30), Gpu(11 << 30)])
    found = memory.used()
    assert found["device"] == (11 << 30, 60 << 30)
    assert memory.said(found | {"host": memory.Used(5 << 28, 2 << 30)}) == (
        "memory: host 1.2 of 2.0 GiB, device 11.0 of 60.0 GiB"
    )
