"""Interrupts a run at random, again and again, and proves that it is the uninterrupted one.

python scripts/soak.py [--kills=30] [--updates=60] [--change_geometry] [--x64] [--seed=0]
    [--workdir=DIR] [--platform=cpu|gpu|tpu]

A small detector learns generated images. Its process gets SIGKILL or SIGTERM in updates, saves,
evaluations and start-ups, or loses a data-loader process, and is started again, with
--change_geometry on another geometry each time. At the end, metrics.jsonl and every array of the
state are compared with those of a run that nothing disturbed. Exit status 1 if they differ: in any
bit on one geometry; with --change_geometry by more than 1e-4 in float32 or 1e-10 in float64.
Geometries with more devices than a GPU or TPU machine has are left out; a CPU's are made.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hardware
import numpy as np
import small  # noqa: F401 registers the model "small-t"
from absl import app, flags, logging

KILLS = flags.DEFINE_integer("kills", 30, "interruptions", lower_bound=1)
UPDATES = flags.DEFINE_integer("updates", 60, "updates of a run", lower_bound=10)
CHANGE = flags.DEFINE_bool("change_geometry", False, "another geometry after each interruption")
X64 = flags.DEFINE_bool("x64", False, "compute, and keep the state, in float64")
SEED = flags.DEFINE_integer("seed", 0, "of the interruptions")
PLATFORM = flags.DEFINE_enum("platform", None, hardware.PLATFORMS, hardware.PLATFORM_HELP)
WORKDIR = flags.DEFINE_string("workdir", None, "where the runs live; a temporary folder by default")

# Microbatch, devices, engine, loader processes. An update of 20 samples leaves a tail on all.
GEOMETRIES = ((8, 1, "scan", 1), (4, 3, "scan", 0), (8, 1, "multisteps", 1), (12, 1, "scan", 0))
EVAL_EVERY, CHECKPOINT_EVERY = 5, 3
PATIENCE = 300  # seconds without any sign of life


def make_images(folder: Path) -> None:
    """A data set of 50 and 8 images, so that epochs end within updates."""
    from jaxaccum import data
    from jaxaccum.draw import save_image

    for split, length in (("train", 50), ("val", 8)):
        scenes = data.Scenes(split, size=64, length=length)
        for i in range(length):
            image, objects = scenes.image(i), scenes.objects(i)
            height, width = image.shape[:2]
            save_image(folder / "images" / split / f"{i}.png", image)
            rows = [
                f"{c} {(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height} "
                f"{(x2 - x1) / width} {(y2 - y1) / height}\n"
                for (x1, y1, x2, y2), c in zip(objects.boxes, objects.classes, strict=True)
            ]
            path = folder / "labels" / split / f"{i}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(rows))
    text = f"path: .\ntrain: images/train\nval: images/val\nnames: {json.dumps(scenes.names)}\n"
    (folder / "data.yaml").write_text(text)


def train_here(order: dict[str, Any]) -> None:
    """What the interrupted process does."""
    import jax

    hardware.choose(order["platform"], order["geometry"][1], order["x64"])
    jax.config.update("jax_compilation_cache_dir", order["cache"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    logging.set_verbosity(logging.ERROR)

    from jaxaccum import config as configs
    from jaxaccum import tasks, train
    from jaxaccum.machine import known_answers
    from jaxaccum.training import preemption

    known_answers.require()

    if order["x64"]:  # a run keeps its state in float32, whatever it computes in
        tasks.DetectionTask.initialise.__defaults__ = (np.float64,)
    microbatch, devices, engine, workers = order["geometry"]
    config = configs.detection()
    config.model = "small-t"
    config.update_from_flattened_dict(
        {
            "nbs": 20, "bn_group": 4, "steps": order["updates"],
            "dtype": "float64" if order["x64"] else "float32",
            "microbatch": microbatch, "devices": devices, "engine": engine,
            "data.workers": workers, "data.path": order["data"], "data.image_size": 64,
            "data.max_objects": 32, "augment.close_mosaic": 4.0, "lr.base": 0.001,
            "lr.warmup_epochs": 2.0, "lr.warmup_bias": 0.001, "ema.ramp": 20.0, "eval.batch": 8,
            "eval.every": EVAL_EVERY, "checkpoint.every": CHECKPOINT_EVERY, "log.every": 1,
            "log.images": 0, "log.tensorboard": False,
        }
    )  # fmt: skip
    try:
        train.train(config.lock(), Path(order["workdir"]))
    except preemption.Preempted as stopped:  # as `python -m jaxaccum.train` does
        preemption.end_at_once(stopped.code)


class Life:
    """One start of a run, and what can be seen of it from outside."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.workdir = Path(order["workdir"])
        self.workdir.mkdir(parents=True, exist_ok=True)
        self.before = self._log()
        self.left_over = self._unfinished()
        self.output = (self.workdir / "output.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--train", json.dumps(order)],
            stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def _log(self) -> bytes:
        path = self.workdir / "metrics.jsonl"
        return path.read_bytes() if path.exists() else b""

    def _unfinished(self) -> set[tuple[str, int]]:
        """Folders of checkpoints that are not complete, with their inodes."""
        found = set()
        for name in ("last", "best"):
            for path in (self.workdir / name).glob("*tmp*"):
                with contextlib.suppress(FileNotFoundError):
                    found.add((path.name, path.stat().st_ino))
        return found

    def written(self) -> int:
        """Lines of metrics.jsonl since the start; the start itself may have dropped some."""
        return len(self._log().splitlines()) - len(self.before.splitlines())

    def started(self) -> bool:
        """Whether it has come to its first update."""
        self.output.flush()
        return "compiling the update" in Path(self.output.name).read_text()

    def saves(self) -> bool:
        """Whether it is saving, as its files show; earlier lives may have left theirs."""
        return bool(self._unfinished() - self.left_over)

    def evaluates(self) -> bool:
        """Whether it is evaluating, as its files show."""
        line = self._log().rpartition(b"\n")[0].rpartition(b"\n")[2]
        last = json.loads(line) if line else {"step": 1}
        return last["step"] % EVAL_EVERY == 0 and last["kind"] == "train"

    def phase(self) -> str:
        """What it is at."""
        if not self.started():
            return "start-up"
        if self.saves():
            return "save"
        return "evaluation" if self.evaluates() else "update"

    def loaders(self) -> list[int]:
        """Its data-loader processes."""
        found = []
        for pid in _session(self.process.pid):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if b"spawn_main" in command:
                found.append(pid)
        return found

    def end(self) -> tuple[int, str, int]:
        """Its exit status, what it printed, and how many processes it left behind."""
        status = self.process.wait(PATIENCE)
        deadline = time.monotonic() + 10
        while (left := _session(self.process.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        self.output.close()
        return status, Path(self.output.name).read_text(), len(left)


def _session(leader: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader and fields[0] not in "ZX":
                found.append(int(folder.name))
    return found


def interrupt(life: Life, rng: random.Random) -> tuple[str, str] | None:
    """Waits for a random moment and interrupts; (what, in which phase), None if it ended first."""
    aim = rng.choices(["update", "save", "evaluation", "start-up", "loader"], [8, 8, 7, 2, 5])[0]
    what = rng.choice(["SIGKILL", "SIGTERM", "SIGTERM to the group"])
    if aim == "start-up":
        time.sleep(rng.uniform(0.5, 8))
    else:
        wanted, deadline = rng.randint(1, 3), time.monotonic() + PATIENCE
        there = {"save": life.saves, "evaluation": life.evaluates}.get(aim, lambda: True)
        # No longer than one of each takes to come, or the run would be over too soon.
        while (lines := life.written()) < wanted or not (there() or lines > wanted + EVAL_EVERY):
            if life.process.poll() is not None:
                return None
            if time.monotonic() > deadline:
                raise SystemExit(f"the run hangs: see {life.output.name}")
            time.sleep(0.001)
        time.sleep(rng.uniform(0, {"save": 0.03, "evaluation": 0.1}.get(aim, 0.2)))
    phase = life.phase()
    if life.process.poll() is not None:
        return None
    if aim == "loader" and (loaders := life.loaders()):
        os.kill(rng.choice(loaders), signal.SIGKILL)
        return "SIGKILL to a loader process", phase
    if what == "SIGTERM to the group":
        os.killpg(life.process.pid, signal.SIGTERM)
    else:
        life.process.send_signal(signal.Signals[what.split()[0]])
    return what, phase


def complaint(what: str, phase: str, status: int, said: str, left: int) -> str:
    """What is wrong with an end; "" if it is as it should be."""
    if what == "SIGKILL":
        fine = status == -signal.SIGKILL
    elif what.startswith("SIGTERM"):
        # Before there are handlers the signal just ends it; a run in its last line may finish.
        fine = status in (75, 0) or (phase == "start-up" and status == -signal.SIGTERM)
        if "Traceback" in said:
            return f"{what} in {phase}: a traceback:\n{said[-3000:]}"
        if left:
            return f"{what} in {phase}: {left} processes were left behind"
    else:
        fine = status != 75
    return "" if fine else f"{what} in {phase}: exit status {status}:\n{said[-3000:]}"


def load(workdir: Path) -> tuple[dict, list[dict], int | None]:
    """(newest state, log, update of the best weights) of a run."""
    from jaxaccum.training.checkpoint import Checkpoints, ocp

    with Checkpoints(workdir) as checkpoints:
        only = ocp.args.Composite(tree=ocp.args.StandardRestore())
        state = checkpoints._last.restore(checkpoints.latest, args=only)["tree"]
        best = checkpoints.best
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return state, [json.loads(line) for line in lines], best


def compare(disturbed: Path, whole: Path, tolerance: float | None) -> bool:
    """Prints how two runs differ; whether that is no more than it may be.

    Args:
      tolerance: of relative differences; None for bit by bit.
    """
    import jax

    from jaxaccum.accumulate.equivalence import distance

    (ours, our_log, our_best), (theirs, their_log, their_best) = load(disturbed), load(whole)
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    same_bits = all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes() and a.dtype == b.dtype for a, b in pairs
    )
    logs = [(path / "metrics.jsonl").read_bytes() for path in (disturbed, whole)]
    steps = [
        [(r["step"], r["kind"], r.get("samples")) for r in log] for log in (our_log, their_log)
    ]
    print(
        f"metrics.jsonl: {len(our_log)} lines, "
        f"{'equal byte for byte' if logs[0] == logs[1] else 'not equal byte for byte'}; "
        f"{len(pairs)} arrays of the state: "
        f"{'equal bit for bit' if same_bits else 'not equal bit for bit'}; "
        f"best weights of update {our_best} and {their_best}"
    )
    if steps[0] != steps[1]:
        print("the logs do not have the same lines")
        return False
    if tolerance is None:
        return same_bits and logs[0] == logs[1] and our_best == their_best
    found = {
        name: distance(ours[key], theirs[key])
        for name, key in (("parameters", "params"), ("statistics", "stats"), ("average", "ema"))
    }
    losses = [
        (a["step"], abs(a["loss"] / b["loss"] - 1))
        for a, b in zip(our_log, their_log, strict=True)
        if a["kind"] == "train"
    ]
    print(
        "relative differences: " + ", ".join(f"{name} {value:.1e}" for name, value in found.items())
    )
    curve = [f"{step}: {value:.0e}" for step, value in losses[:: max(len(losses) // 12, 1)]]
    print(f"of the loss, by update: {', '.join(curve)}; largest {max(v for _, v in losses):.1e}")
    return max(*found.values(), *(v for _, v in losses)) <= tolerance


def main(_) -> int:
    logging.set_verbosity(logging.ERROR)
    # The runs have the devices; this process, which compares them, takes none.
    platform, there = hardware.look(PLATFORM.value)
    # On a CPU compiling is most of a life.
    faster = "--xla_backend_optimization_level=0"
    said = hardware.tell_xla([faster if platform == "cpu" else hardware.DETERMINISTIC])
    geometries = [g for g in GEOMETRIES if platform == "cpu" or g[1] <= there]
    left_out = len(GEOMETRIES) - len(geometries)
    devices = "devices are made" if platform == "cpu" else f"{there} devices"
    left = f", {left_out} geometries need more" if left_out else ""
    print(f"on {platform}, {devices}{left}; {said}", flush=True)
    os.environ["JAX_PLATFORMS"] = "cpu"
    folder = Path(WORKDIR.value or tempfile.mkdtemp(prefix="soak-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data" / "data.yaml").exists():
        make_images(folder / "data")
    rng, began = random.Random(SEED.value), time.monotonic()

    def order(name: str, geometry: tuple) -> dict[str, Any]:
        return {
            "workdir": str(folder / name), "data": str(folder / "data" / "data.yaml"),
            "cache": str(folder / "cache"), "geometry": geometry, "x64": X64.value,
            "updates": UPDATES.value, "platform": platform,
        }  # fmt: skip

    if any((folder / name).exists() for name in ("whole", "run-1")):
        raise SystemExit(f"{folder} holds runs of an earlier soak: give another --workdir")
    status, said, _ = Life(order("whole", geometries[0])).end()
    if status:
        raise SystemExit(f"the undisturbed run failed with status {status}:\n{said}")
    losses = [r["loss"] for r in load(folder / "whole")[1] if r["kind"] == "train"]
    print(
        f"the undisturbed run: {UPDATES.value} updates, {time.monotonic() - began:.0f} s, "
        f"loss from {losses[0]:.4g} to {losses[-1]:.4g}",
        flush=True,
    )

    happened, wrong, kills, orphans, lives, number = Counter(), [], 0, 0, Counter(), 1
    while True:
        geometry = rng.choice(geometries) if CHANGE.value else geometries[0]
        lives[geometry] += 1
        life = Life(order(f"run-{number}", geometry))
        event = interrupt(life, rng) if kills < KILLS.value else None
        status, said, left = life.end()
        if event is None:
            if status or left:
                wrong.append(f"left alone it ended with status {status}:\n{said[-3000:]}")
                break
            if kills >= KILLS.value:
                break
            number += 1  # it was done before all interruptions were: another one
            continue
        kills += 1
        happened[event] += 1
        orphans += left
        if trouble := complaint(*event, status, said, left):
            wrong.append(trouble)
        seconds = time.monotonic() - began
        print(f"{kills:3d} {event[0]} in {event[1]}, status {status}, {seconds:.0f} s", flush=True)
        if status == 0:
            number += 1
            if kills >= KILLS.value:
                break

    for what in sorted({what for what, _ in happened}):
        phases = {phase: n for (kind, phase), n in sorted(happened.items()) if kind == what}
        print(f"{sum(phases.values()):3d} {what}: {phases}")
    print(f"{orphans} processes outlived a killed run")
    if CHANGE.value:
        for (microbatch, devices, engine, workers), n in lives.items():
            print(
                f"{n:3d} starts with microbatch {microbatch}, {devices} devices, {engine}, "
                f"{workers} loader processes"
            )
    tolerance = (1e-10 if X64.value else 1e-4) if CHANGE.value else None
    runs = [p for p in sorted(folder.glob("run-*")) if (p / "metrics.jsonl").exists()]
    same = all([compare(path, folder / "whole", tolerance) for path in runs])
    for text in wrong:
        print(text)
    passed = same and not wrong
    print(
        f"{kills} interruptions in {len(runs)} runs of {UPDATES.value} updates, "
        f"{'float64' if X64.value else 'float32'}, {time.monotonic() - began:.0f} s: "
        f"{'the undisturbed run' if passed else 'FAILED'}"
    )
    return int(not passed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train_here(json.loads(sys.argv[2]))
    else:
        app.run(main)
