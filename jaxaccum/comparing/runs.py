"""The runs of a comparison: each trained once in a process of its own, and its numbers."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from jaxaccum.comparing.files import last_lines, write_json
from jaxaccum.comparing.planning import layout
from jaxaccum.comparing.subjects import Model, as_flags, load_config, prepare
from jaxaccum.errors import TrainingError
from jaxaccum.machine import user_cache
from jaxaccum.machine.waiting import Bar
from jaxaccum.training import optim, run
from jaxaccum.training.logs import records

# "update  10/513 | ... | 11.6 images/s", as training prints it: evaluations and the first
# compilation do not count.
_SPEED = re.compile(r"^update .*\| ([\d.]+) images/s$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training run: a model at an effective batch and a seed.

    Attributes:
      model: what is trained.
      overrides: all fields set for this run, as text.
      run: what train will derive from them.
      workdir: where it lives; its log and its usage lie beside it.
    """

    model: Model
    overrides: Mapping[str, str]
    run: run.Run
    workdir: Path

    @property
    def log(self) -> Path:
        return self.workdir.with_name(self.workdir.name + ".log")

    @property
    def usage(self) -> Path:
        return self.workdir.with_name(self.workdir.name + ".usage.json")

    def records(self) -> list[dict[str, Any]]:
        """What the run has written so far; a line in the making is left out."""
        return records(self.workdir / "metrics.jsonl")

    @property
    def done(self) -> bool:
        """Whether the last update of this recipe was evaluated, the last thing that is logged."""
        last = (self.records() or [{}])[-1]
        place = last.get("kind"), last.get("step"), last.get("fingerprint")
        return place == ("eval", self.run.steps, self.run.recipe.fingerprint)


def make_cell(model: Model, planned: Mapping[str, Any], nbs: int, seed: int, folder: Path) -> Cell:
    """A run on the planned geometry, with the largest microbatch that divides its work well."""
    choice = planned["choice"]
    microbatch = layout(nbs, min(model.group, nbs), planned["largest"], choice["devices"])
    # Settled by the plan, on the device that trains: this process sees none. Plans from before
    # `auto` do not say, and were of the default then.
    dtype = planned.get("dtype") or model.overrides.get("dtype", "float32")
    overrides = dict(model.overrides) | {
        "dtype": dtype,
        "nbs": str(nbs), "seed": str(seed), "microbatch": str(microbatch),
        **{key: str(choice[key]) for key in ("devices", "engine", "remat")},
    }  # fmt: skip
    this = prepare(load_config(model.file, overrides), model.source)
    return Cell(model, overrides, this, folder / f"{model.name}-nbs{nbs}-seed{seed}")


def train(cell: Cell, number: str, allow_wrong_numbers: bool = False) -> None:
    """Trains a run, or what is left of it.

    Raises:
      TrainingError: it failed; with the last lines of its log.
    """
    name, this = cell.workdir.name, cell.run
    with cell.log.open("ab") as log:
        _own(log, name)
        if cell.done:
            print(f"{number} {name}: done before", flush=True)
            return
        print(f"{number} {name}: {this.window}, {this.steps} updates", flush=True)
        code = _train_in_child(cell, log, allow_wrong_numbers)
    if code:
        raise TrainingError(
            f"{name} failed ({code}); the last lines of {cell.log}:\n{last_lines(cell.log)}"
        )
    if not cell.done:
        raise TrainingError(f"{name} ended without the evaluation of update {this.steps}")
    found = result(cell)
    print(
        f"{number} {name}: mAP50-95 {found['best']['map50_95']:.4f}, "
        f"{found['images_per_second']:.1f} images/s, {found['seconds'] / 60:.1f} min",
        flush=True,
    )


def _own(log: BinaryIO, name: str) -> None:
    """Waits until no other process trains into this log. The lock goes with the open file, which
    the training process inherits: it is kept even when compare itself is killed."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{name} is being trained by an earlier start: waiting for it", flush=True)
        fcntl.flock(log, fcntl.LOCK_EX)


def _train_in_child(cell: Cell, log: BinaryIO, allow_wrong_numbers: bool) -> int:
    """The exit status of training; adds what it used to the run's usage."""
    kept = user_cache.load_dict(cell.usage)
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxaccum.train", f"--config={cell.model.file}",
         f"--workdir={cell.workdir}", f"--allow_wrong_numbers={allow_wrong_numbers}",
         *as_flags(cell.overrides)],
        stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    ended, status, used = 0, 0, None
    try:
        # A bar on a terminal, nothing in a file.
        with Bar(total=cell.run.steps, disable=None, desc=cell.workdir.name, leave=False) as bar:
            while not ended:
                time.sleep(0.5)
                ended, status, used = os.wait4(process.pid, os.WNOHANG)
                if not bar.disable:
                    bar.n = (cell.records() or [{"step": 0}])[-1]["step"]
                    bar.refresh()
    finally:
        if not ended:  # interrupted: what is trained so far will be continued
            process.terminate()
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert used is not None
        resident = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        usage = {
            "seconds": kept.get("seconds", 0.0) + time.perf_counter() - start,
            "resident_bytes": max(kept.get("resident_bytes", 0), resident),
        }
        write_json(cell.usage, usage)
    return process.returncode


def result(cell: Cell) -> dict[str, Any]:
    """All numbers of a run that is done."""
    this = cell.run
    geometry = this.window.geometry
    evaluations = [r for r in cell.records() if r["kind"] == "eval"]
    metrics = [
        {key: r[key] for key in ("step", "map50_95", "map50")}
        | {"epoch": this.samples_before(r["step"]) / len(cell.model.source)}
        for r in evaluations
    ]
    speeds = [float(v) for v in _SPEED.findall(cell.log.read_text(errors="replace"))]
    if not speeds:
        raise TrainingError(f"{cell.log} shows no images/s: delete it and {cell.workdir}")
    # None if compare was killed while this was trained.
    usage = {"seconds": None, "resident_bytes": None} | user_cache.load_dict(cell.usage)
    return {
        "run": cell.workdir.name,
        "fingerprint": this.recipe.fingerprint,
        "nbs": this.recipe.nbs,
        "seed": this.config.seed,
        "lr": optim.scaled_lr(this.config.lr, this.recipe.nbs),
        "updates": this.steps,
        "epochs": this.sizes.total / len(cell.model.source),
        "geometry": dataclasses.asdict(geometry)
        | {"steps": this.window.steps, "padding": this.window.padding, "remat": this.config.remat},
        "best": max(metrics, key=lambda m: m["map50_95"]),
        "last": metrics[-1],
        "curve": [[m["epoch"], m["map50_95"]] for m in metrics],
        "images_per_second": statistics.median(speeds),
        **usage,
    }
