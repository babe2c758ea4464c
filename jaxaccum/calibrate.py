"""python -m jaxaccum.calibrate --config=FILE[:arg] --geometries=8,16,8:blocks,8:multisteps

Holds plans against what the device here really takes. Every geometry (a microbatch, then what
else differs from the config) is planned, and run for two updates in a process of its own. The
ratio is kept for this kind of device, and plans made on it use it from then on.

On GPUs and TPUs what is taken is the allocator's peak. On CPUs it is the growth of resident memory
from before the state is made to the peak of a second update; the first one leaves some 20 MiB of
the runtime's own behind.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import psutil
from absl import flags

from jaxaccum import command_line, config_files
from jaxaccum.accumulate import make_engine
from jaxaccum.fields import REMATS
from jaxaccum.plan import calibration, targets
from jaxaccum.plan.planner import Planner, cache_folder
from jaxaccum.plan.targets import PlanError
from jaxaccum.training import run

MIB = 2**20


def parse(text: str) -> dict[str, Any]:
    """Geometry fields of "8:blocks:multisteps".

    Raises:
      PlanError: it is no such text.
    """
    microbatch, *rest = text.split(":")
    known = set(rest) <= {*REMATS, "multisteps", "scan"}
    if not re.fullmatch(r"[1-9]\d{0,5}", microbatch, re.ASCII) or not known:
        raise PlanError(
            f"a geometry is a microbatch, then :{', :'.join(REMATS)} or :multisteps; got {text!r}"
        )
    engine = "multisteps" if "multisteps" in rest else "scan"
    remat = next((word for word in rest if word in REMATS), "none")
    return {"microbatch": int(microbatch), "engine": engine, "remat": remat}


def measure(
    config: ml_collections.ConfigDict, names: Sequence[str], samples: int, **geometry: Any
) -> tuple[int, int]:
    """(planned, used) bytes of one geometry on one device. Best in a process of its own."""
    planner = Planner(
        config, names=names, samples=samples, target=targets.here(), cache=cache_folder()
    )
    planned = planner.compiled(**geometry).peak
    this = planner.prepared(**geometry)
    engine = make_engine(this.forward, this.rule, this.window)
    start = this.task.initialise(0)
    nbs = this.window.recipe.nbs
    batch = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), this.task.example(nbs))
    batch["weight"] = np.ones(nbs, np.float32)
    device, process = jax.devices()[0], psutil.Process()

    def updates(state):
        for _ in range(2):
            state, log = engine.update(state, batch)
            jax.block_until_ready((state, log))
        return state

    if device.platform != "cpu":
        updates(engine.init(*start))
        return planned, int((device.memory_stats() or {})["peak_bytes_in_use"])
    updates(engine.init(*start))  # compiled, loaded, threads and their stacks made
    _give_back()
    before = process.memory_info().rss
    state = engine.init(*start)
    _give_back()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    updates(state)
    return planned, _peak() - before


def _give_back() -> None:
    """Returns freed memory to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _peak() -> int:
    """Largest resident memory of this process since it was reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise PlanError("this system does not say how much memory a process has had: no VmHWM")


def _in_a_process(text: str) -> tuple[int, int]:
    """`measure` in a fresh process, with this one's flags."""
    arguments = [a for a in sys.argv[1:] if not a.lstrip("-").startswith("geometries")]
    # Large blocks go back to the system when they are freed.
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "jaxaccum.calibrate", *arguments, f"--one={text}"],
        env=environment, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise PlanError(f"geometry {text} could not be measured, see above")
    planned, used = json.loads(done.stdout.splitlines()[-1])
    return planned, used


def main() -> int:
    run.use_compilation_cache()
    config = _CONFIG.value
    if _ONE.value:
        source = run.open_source(config, "train")
        print(json.dumps(measure(config, source.names, len(source), **parse(_ONE.value))))
        return 0
    texts = _GEOMETRIES.value
    for text in texts:
        parse(text)
    print(f"{config.model}, effective batch {config.nbs}, bn_group {config.bn_group}")
    print(f"{'geometry':>16} {'planned MiB':>12} {'used MiB':>9} {'used / planned':>15}")
    pairs = []
    for text in texts:
        pairs.append(_in_a_process(text))
        planned, used = pairs[-1]
        print(
            f"{text:>16} {planned / MIB:>12.1f} {used / MIB:>9.1f} {used / planned:>15.3f}",
            flush=True,
        )
    kind = targets.here().kind
    entry = calibration.keep(kind, pairs)
    print(
        f"kept for {kind}: {entry['factor']:.3f} of a plan is used, margin {entry['margin']:.1%} "
        f"({calibration.file()})"
    )
    return 0


if __name__ == "__main__":
    _CONFIG = config_files.define()
    _GEOMETRIES = flags.DEFINE_list("geometries", [], "what to measure, such as 8,16,8:blocks")
    _ONE = flags.DEFINE_string("one", "", "measure one geometry in this process, print two numbers")
    command_line.run_verb(
        main,
        __doc__,
        (
            (
                "calibrate --config=configs/yolo_s.py --geometries=8,16,8:blocks",
                "on the device that plans are to be right for",
            ),
        ),
    )
