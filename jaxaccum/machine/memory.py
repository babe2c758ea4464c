"""How much memory a run has taken, of the host and of its devices."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import jax
import psutil

GIB = 2**30


class Used(NamedTuple):
    """Bytes that are taken, and that there are."""

    taken: int
    whole: int


def used() -> dict[str, Used]:
    """What this process and those that it started hold now, "host", and the most that it has had
    of the fullest of its devices, "device", where that is not the host's and JAX tells."""
    resident = 0
    for process in [(own := psutil.Process()), *own.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):  # one that has just ended
            resident += process.memory_info().rss
    found = {"host": Used(resident, psutil.virtual_memory().total)}
    told = [device.memory_stats() or {} for device in jax.local_devices()]
    devices = [
        Used(stats["peak_bytes_in_use"], stats["bytes_limit"])
        for stats in told
        if {"peak_bytes_in_use", "bytes_limit"} <= stats.keys()
    ]
    if devices:
        found["device"] = max(devices)
    return found


def said(found: dict[str, Used]) -> str:
    """Such as "memory: host 2.3 of 23.5 GiB, device 11.2 of 59.6 GiB"."""
    parts = [f"{k} {u.taken / GIB:.1f} of {u.whole / GIB:.1f} GiB" for k, u in found.items()]
    return f"memory: {', '.join(parts)}"
