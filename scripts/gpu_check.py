"""One hour on a GPU, most valuable first: see docs/gpu_check.md and scripts/gpu_check.sh.

python scripts/gpu_check.py --out=FOLDER [--minutes=9] [--quick] [--torch=DIR] [--only=law,...]

Runs parts of scripts/benchmark.py, each in a process of its own with a limit of its own. First,
side by side, what is not timed: a short training, the law, plans, and the compilation of what will
be timed. Then, one after another on a quiet device, what is timed. Every part writes its result
when it ends, so that a run that is cut off has told something, and the same command goes on where
it was. FOLDER gets the results, a log of each part, progress.jsonl and page.md, which
docs/benchmarks.md takes its GPU column from.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags
from benchmarks import harness, report
from benchmarks.measures import MEASURES, flags_of_xla

OUT = flags.DEFINE_string("out", "", "folder of what is found")
MINUTES = flags.DEFINE_float("minutes", 9.0, "when to end, from the start of this command")
QUICK = flags.DEFINE_bool("quick", False, "tiny sizes, on any device: to see that everything works")
TORCH = flags.DEFINE_string("torch", "", "folder that PyTorch is installed in")
ONLY = flags.DEFINE_list("only", [], "measures or parts; all if empty")
AGAIN = flags.DEFINE_bool("again", False, "measure what has been measured before")


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the benchmark.

    Attributes:
      key: as benchmark.py --list names it. limit: seconds after which it is ended.
      warm: only compile it.
    """

    key: str
    limit: float
    warm: bool = False

    @property
    def name(self) -> str:
        return f"{self.key}-warm" if self.warm else self.key


# Most valuable first. What is timed comes in the same order as what compiles it.
TOGETHER = (
    Part("law.float64", 400),
    Part("law.float32", 400),
    Part("yolo.yolov8-n", 400, True),
    Part("yolo.yolov8-n.tf32", 400, True),
    Part("yolo.yolov8-m", 400, True),
    Part("yolo.yolo11-n", 400, True),
    Part("yolo.yolo26-n", 400, True),
    Part("train.five", 240),
    Part("program.yolov8-n.bfloat16.untried", 300, True),
    Part("law.bfloat16", 400),
    Part("update", 400, True),
    Part("groups", 400, True),
    Part("plans.8", 300),
    Part("plans.16", 300),
    Part("plans.32", 300),
    Part("plans.16-remat", 300),
    Part("law.float32-deterministic", 400),
    Part("law.float32-tried", 400),
    Part("law.bfloat16-exact", 400),
    Part("law.tf32", 400),
    Part("train.whole", 400),
    Part("geometries", 400, True),
    Part("adapointr", 400, True),
    Part("yolo.yolo11-n.tf32", 400, True),
    Part("yolo.yolov8-m.tf32", 400, True),
)
ALONE = (
    Part("yolo.yolov8-n", 240),
    Part("program.yolov8-n.bfloat16", 120),
    Part("yolo.yolov8-n.tf32", 240),
    Part("yolo.yolov8-m", 240),
    Part("yolo.yolo11-n", 240),
    Part("yolo.yolo26-n", 240),
    Part("depthwise", 90),
    Part("program.yolov8-n.bfloat16.untried", 120),
    Part("assigner", 90),
    Part("points.farthest", 90),
    Part("points.nearest", 90),
    Part("points.chamfer", 90),
    Part("update", 120),
    Part("groups", 180),
    Part("program.yolo11-n.bfloat16", 120),
    Part("program.yolov8-m.bfloat16", 120),
    Part("geometries", 180),
    Part("adapointr", 240),
    Part("yolo.yolo11-n.tf32", 240),
    Part("yolo.yolov8-m.tf32", 240),
    Part("plans.largest", 400),
)
WIDTH = 6  # processes side by side on one GPU, if there are so many cores
SHARE = 0.6  # of the time, for what runs side by side
LEAST = 15.0  # seconds that must be left to begin something


class Check:
    """The parts, what has become of them, and the time that is left."""

    def __init__(self, out: Path, minutes: float):
        self.out, self.results = out, out / "results"
        (out / "logs").mkdir(parents=True, exist_ok=True)
        self.results.mkdir(exist_ok=True)
        self.start = time.monotonic()
        self.limit = 60 * minutes
        self.failed: list[str] = []
        self.left: list[str] = []

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def wanted(self, part: Part) -> bool:
        """Whether it was asked for and is not there yet."""
        measure = part.key.partition(".")[0]
        if ONLY.value and not {measure, part.key} & set(ONLY.value):
            return False
        if part.warm and (self.out / "logs" / f"{part.name}.done").exists():
            return False
        return AGAIN.value or not self.is_there(part.key)

    def is_there(self, key: str) -> bool:
        """Whether a part's result is there, of this platform and these sizes."""
        return any(
            harness.is_done(self.results, key, harness.Context(kind, QUICK.value))
            for kind in ("cpu", "gpu")
        )

    def command(self, part: Part) -> list[str]:
        """What computes a part."""
        command = [
            sys.executable, str(Path(__file__).with_name("benchmark.py")),
            f"--out={self.out / 'page.md'}", f"--results={self.results}", f"--inside={part.key}",
            f"--torch={TORCH.value}",
        ]  # fmt: skip
        return command + ["--quick"] * QUICK.value + ["--warm"] * part.warm

    def begin(self, part: Part) -> subprocess.Popen:
        """Starts a part in a process group of its own."""
        # Several programs share the device: each takes what it needs.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        environment |= flags_of_xla(part.key, environment)
        self.say(part, "began")
        with (self.out / "logs" / f"{part.name}.log").open("w") as log:
            return subprocess.Popen(
                self.command(part), env=environment, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def end(self, part: Part, status: int | None, took: float) -> None:
        """Notes what has become of a part; None: it was ended for lack of time."""
        words = {0: "done", None: "ENDED for lack of time"}.get(status, f"FAILED ({status})")
        self.say(part, words, took)
        if status == 0 and part.warm:
            (self.out / "logs" / f"{part.name}.done").touch()
        if status is None:
            self.left.append(part.name)
        if status:
            self.failed.append(part.name)
            log = (self.out / "logs" / f"{part.name}.log").read_text(errors="replace")
            print("    " + "\n    ".join(log.splitlines()[-6:]), flush=True)
        (self.out / "page.md").write_text(report.render(self.results, MEASURES))

    def say(self, part: Part, words: str, took: float = 0.0) -> None:
        """A line for people and one for programs."""
        line = {"at": round(self.now, 1), "part": part.name, "status": words}
        if took:
            line["seconds"] = round(took, 1)
        with (self.out / "progress.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{self.now:6.0f} s  {part.name}: {words}{f', {took:.0f} s' if took else ''}",
              flush=True)  # fmt: skip

    def run(self, parts: list[Part], width: int, until: float) -> None:
        """Runs parts, up to `width` at a time, until all have ended or the time is over."""
        waiting, running = list(parts), {}
        while waiting or running:
            while waiting and len(running) < width and self.now + LEAST < until:
                part = waiting.pop(0)
                running[part] = (self.begin(part), self.now)
            if not running:
                for part in waiting:
                    self.say(part, "NOT BEGUN for lack of time")
                    self.left.append(part.name)
                return
            for part, (process, began) in list(running.items()):
                status = process.poll()
                late = self.now > min(began + part.limit, until)
                if status is None and not late:
                    continue
                if status is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                self.end(part, status, self.now - began)
                del running[part]
            time.sleep(0.2)


def main(_) -> int:
    if not OUT.value:
        raise app.UsageError("say where to write what is found: --out=FOLDER")
    check = Check(Path(OUT.value).resolve(), MINUTES.value)
    width = max(min(harness.cores() // 2, WIDTH), 1)
    timed = [part for part in ALONE if check.wanted(part)]
    keys = {part.key for part in timed}
    together = [p for p in TOGETHER if check.wanted(p) and (not p.warm or p.key in keys)]
    check.run(together, width, SHARE * check.limit if timed else check.limit)
    check.run(timed, 1, check.limit)
    print(f"{check.now:6.0f} s  results in {check.out}; the page is {check.out / 'page.md'}")
    if check.left:
        print(f"the same command goes on with what is left: {', '.join(check.left)}")
    if check.failed:
        print(f"failed: {', '.join(check.failed)}", file=sys.stderr)
    return bool(check.failed)


if __name__ == "__main__":
    app.run(main)
