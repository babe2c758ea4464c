"""The first update of a process: compiled anew, and read from the persistent cache."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import Context, Found, Row, ratio_row

PROGRAM = Path(__file__).with_name("first_step.py")


def startup(context: Context, part: str) -> Found:
    """Pairs of processes, the second with what the first one left in the cache."""
    del part
    model = context.choose("small-t", "yolo11-m", "yolo11-m")
    size, count = context.choose((32, 1), (320, 2), (640, 16))
    pairs = context.choose(1, 2, 3)
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in range(pairs):
        with tempfile.TemporaryDirectory() as cache:
            for kind in ("cold", "warm"):
                found[kind].append(_first(model, size, count, cache))
    first = {kind: [f["first"] for f in times] for kind, times in found.items()}
    rows = []
    for kind, times in found.items():
        middle = statistics.median(first[kind])
        start, usual = (statistics.median(f[key] for f in times) for key in ("start", "usual"))
        rows.append(
            Row(
                f"first update, {kind}", middle, "s", low=min(first[kind]), high=max(first[kind]),
                note=f"an update as usual {usual:.2f} s; imports and set-up before {start:.1f} s",
            )
        )  # fmt: skip
    rows.append(
        ratio_row(
            "warm, cold = 100", first["warm"], first["cold"], 100, unit="%",
            target=("<=", 15.0),
        )
    )  # fmt: skip
    notes = [
        "From the weights on the host to the end of the first update: initial values, tracing, "
        "compilation or the cache, and the update itself."
    ]
    return Found(f"{model}, {size} px, batch {count}, float32", rows, notes)


def _first(model: str, size: int, count: int, cache: str) -> dict[str, float]:
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment["XDG_CACHE_HOME"] = cache
    command = [sys.executable, str(PROGRAM), model, str(size), str(count)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
