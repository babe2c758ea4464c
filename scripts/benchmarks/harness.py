"""What every measure needs: rows, interleaved rounds, results on disk, a process of PyTorch."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxaccum.machine import host_memory

PEER = Path(__file__).with_name("torch_peer.py")
KYOLO_PEER = Path(__file__).with_name("kyolo_peer.py")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "opencv-python-headless")
HOW_TORCH = (
    "PyTorch is not here: python -m pip install --target=DIR torch==2.13.0, then --torch=DIR"
)
HOW_KYOLO = (
    "kyolo is not here: pip install kyolo and jax (or torch) in a virtual environment, then "
    "--kyolo_python=ITS_PYTHON"
)

Platform = Literal["cpu", "gpu"]


class SkippedError(Exception):
    """A measure that cannot be made here; the message says what it would need."""


class WarmedUp(Exception):
    """Everything that a measure compiles is compiled, and it was asked for no more than that."""


@dataclasses.dataclass(frozen=True)
class Context:
    """How a measure is to be made.

    Attributes:
      platform: what JAX computes on.
      quick: at tiny sizes, to see that it works; the figures mean nothing.
      torch: folder that PyTorch is installed in; "" if it is where this Python finds it.
      torch_python: the Python that runs it; "" for this one.
      kyolo_python: the Python of an environment with kyolo; "" where there is none.
      warm: only compile, so that what is measured later finds its programs in the caches.
      keep: folder for more than figures, such as the text of a program; None to keep nothing.
    """

    platform: Platform
    quick: bool = False
    torch: str = ""
    torch_python: str = ""
    kyolo_python: str = ""
    warm: bool = False
    keep: Path | None = None

    def compiled(self) -> None:
        """Said by a measure when all its programs are compiled.

        Raises:
          WarmedUp: that was all that was asked for.
        """
        if self.warm:
            raise WarmedUp

    def choose(self, quick: Any, cpu: Any, gpu: Any) -> Any:
        """A size, by how and where it is measured."""
        if self.quick:
            return quick
        return cpu if self.platform == "cpu" else gpu


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
      label: what was measured; rows of two platforms with one label stand in one line.
      value: the figure, a median if `low` and `high` are given: then its `interval`.
      unit: of it, "" for a ratio.
      target: such as (">=", 1.0); None if there is none.
      note: what the figure is made of.
    """

    label: str
    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    target: tuple[str, float] | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if there is none."""
        if self.target is None:
            return None
        relation, limit = self.target
        return self.value <= limit if relation == "<=" else self.value >= limit


@dataclasses.dataclass(frozen=True)
class Found:
    """What a measure found.

    Attributes:
      setting: sizes, precision and the like, in words.
      rows: the figures. notes: what one must know to read them.
    """

    setting: str
    rows: Sequence[Row]
    notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Measure:
    """A measure, in one part or in several that are made, saved and resumed one by one.

    Attributes:
      name: for the command line. title: for people.
      run: (context, part) -> Found.
      parts: names, such as those of models.
      xla_flags: part -> flags of XLA that it is to be measured with.
      gpu_only: parts that say nothing on a CPU.
    """

    name: str
    title: str
    run: Callable[[Context, str], Found]
    parts: tuple[str, ...] = ("",)
    xla_flags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gpu_only: tuple[str, ...] = ()

    @property
    def keys(self) -> list[str]:
        """Names of the parts' results."""
        return [f"{self.name}.{part}" if part else self.name for part in self.parts]

    def keys_on(self, platform: Platform) -> list[str]:
        """Names of the results of the parts that are measured on a platform."""
        pairs = zip(self.keys, self.parts, strict=True)
        return [k for k, part in pairs if platform == "gpu" or part not in self.gpu_only]


class Took(float):
    """Seconds that something took, and those of processors beside them.

    Attributes:
      cpu: seconds of processor time, of all threads; None where that is not known.
    """

    cpu: float | None = None

    @classmethod
    def of(cls, wall: float, cpu: float) -> Took:
        took = cls(wall)
        took.cpu = cpu
        return took


class Stopwatch:
    """Takes the time of a block: `with Stopwatch() as watch: ...`, then `watch.took(steps)`."""

    def __enter__(self) -> Stopwatch:
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self._end = time.perf_counter(), time.process_time()

    def took(self, steps: int = 1) -> Took:
        """Of one of so many steps."""
        wall, cpu = (b - a for a, b in zip(self._start, self._end, strict=True))
        return Took.of(wall / steps, cpu / steps)


class Rounds(dict[str, list[float]]):
    """Seconds of every call in every round that counts.

    Attributes:
      refused: rounds in which a neighbour took a processor.
      disturbed: whether it took one in every round; then all of them count, and `words` says so.
    """

    refused: int = 0
    disturbed: bool = False

    def words(self) -> str:
        """What must be known of them, for a note."""
        said = [f"{len(next(iter(self.values())))} rounds"]
        if self.disturbed:
            said.append("DISTURBED: another program took a processor in every one")
        if self.refused:
            said.append(f"{self.refused} more refused, as another program took a processor")
        for name, times in self.items():
            cpu = [t.cpu for t in times if isinstance(t, Took) and t.cpu is not None]
            if cpu:
                both = statistics.median(cpu) * 1e3, statistics.median(times) * 1e3
                said.append(f"{name}: {both[0]:.0f} ms of processors in {both[1]:.0f}")
        return "; ".join(said)


def interleaved(
    calls: Mapping[str, Callable[[], float]],
    rounds: int,
    warmup: int = 1,
    narrow: Callable[[Rounds], bool] = lambda _: True,
    most: int | None = None,
) -> Rounds:
    """Seconds of every call in every round, all calls in each, every other round backwards.

    A round does not count in which a call that says its processor time (`Took`) had far fewer
    processors than in its best round: less than half as many beside the first. Where that leaves
    none, as each round had another call disturbed, all count and `Rounds.disturbed` is set.

    Args:
      calls: each does its work once and returns how long it took.
      rounds: that count, at least.
      warmup: rounds before the first that counts.
      narrow: whether what was found is precise enough; asked after `rounds`, and from there again.
      most: rounds to try in all; four times `rounds` if it is not given.
    """
    found: list[dict[str, float]] = []
    most = 4 * rounds if most is None else most

    def counted() -> Rounds:
        used = {
            name: [
                t[name].cpu / t[name]
                for t in found
                if isinstance(t[name], Took) and t[name].cpu is not None
            ]
            for name in calls
        }
        best = {name: max(values, default=0.0) for name, values in used.items()}

        def is_clean(times: dict[str, float]) -> bool:
            return all(
                not isinstance(t, Took)
                or t.cpu is None
                or t.cpu / t >= min(best[name], 1 + (best[name] - 1) / 2)
                for name, t in times.items()
            )

        clean = [times for times in found if is_clean(times)]
        counting = clean or found
        result = Rounds({name: [times[name] for times in counting] for name in calls})
        result.refused, result.disturbed = len(found) - len(counting), not clean
        return result

    for number in range(-warmup, most):
        names = list(calls) if number % 2 == 0 else list(reversed(calls))
        times = {name: calls[name]() for name in names}
        if number < 0:
            continue
        found.append(times)
        result = counted()
        enough = not result.disturbed and len(next(iter(result.values()))) >= rounds
        if enough and narrow(result):
            break
    return counted()


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median of more rounds lies with 95 %, by the binomial distribution of its rank;
    of fewer than six values the smallest and largest."""
    ordered, count = sorted(values), len(values)
    below, tail = 0, 0.5**count
    while tail + math.comb(count, below + 1) * 0.5**count <= 0.025:
        below += 1
        tail += math.comb(count, below) * 0.5**count
    return ordered[below], ordered[-1 - below]


NARROW = 0.06  # of the median: an interval this wide is precise enough


def is_narrow(top: str, bottom: str) -> Callable[[Rounds], bool]:
    """Whether the interval of a ratio is, for `interleaved`."""

    def narrow(rounds: Rounds) -> bool:
        ratios = [a / b for a, b in zip(rounds[top], rounds[bottom], strict=True)]
        low, high = interval(ratios)
        return high - low <= NARROW * statistics.median(ratios)

    return narrow


def ratio_row(
    label: str, tops: Sequence[float], bottoms: Sequence[float], scale: float = 1.0, **more: Any
) -> Row:
    """A row with the median of scale * top / bottom over the rounds, and its `interval`."""
    ratios = [scale * a / b for a, b in zip(tops, bottoms, strict=True)]
    low, high = interval(ratios)
    return Row(label, statistics.median(ratios), low=low, high=high, **more)


def save(folder: Path, key: str, context: Context, found: Found, seconds: float) -> Path:
    """Writes a part's result, whole or not at all."""
    return _write(folder, key, context, {
        "setting": found.setting, "rows": [dataclasses.asdict(row) for row in found.rows],
        "notes": list(found.notes), "seconds": round(seconds, 1),
    })  # fmt: skip


def save_skipped(folder: Path, key: str, context: Context, reason: str) -> Path:
    """Writes that a part was not measured, and why; it is tried again the next time."""
    return _write(folder, key, context, {"skipped": reason})


def _write(folder: Path, key: str, context: Context, content: dict[str, Any]) -> Path:
    file = folder / context.platform / f"{key}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {"measure": key, "platform": context.platform, "quick": context.quick}
    text = json.dumps(record | content | circumstances(context), indent=1)
    partial = file.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(file)
    return file


def load(folder: Path, key: str, platform_: str) -> dict[str, Any] | None:
    """A part's result, or None."""
    file = folder / platform_ / f"{key}.json"
    return json.loads(file.read_text()) if file.exists() else None


def is_done(folder: Path, key: str, context: Context) -> bool:
    """Whether a part has been measured in this way; skipped ones and quick ones are not."""
    result = load(folder, key, context.platform)
    return result is not None and "skipped" not in result and result["quick"] == context.quick


def rows_of(result: Mapping[str, Any]) -> list[Row]:
    """The rows of a loaded result."""
    return [
        Row(**{**row, "target": tuple(row["target"]) if row["target"] else None})
        for row in result.get("rows", [])
    ]


def circumstances(context: Context) -> dict[str, Any]:
    """Hardware, versions, date and load of the machine."""
    import jax

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    if torch := torch_version(context.torch):
        versions["torch"] = torch
    device = jax.devices()[0]
    hardware = f"{_processor()}, {cores()} cores"
    if tunables := os.environ.get(host_memory.VARIABLE):
        hardware += f", {host_memory.VARIABLE}={tunables}"
    if context.platform == "gpu":
        hardware = f"{device.device_kind}; {hardware}"
    return {
        "hardware": hardware,
        "versions": versions,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "load": round(os.getloadavg()[0], 1),
    }


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    root = Path(__file__).parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=9"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def torch_version(folder: str) -> str:
    """Of the PyTorch in a folder, or of the one that this Python finds; "" if there is none."""
    path = [folder] if folder else None
    found = importlib.metadata.distributions(name="torch", **({"path": path} if path else {}))
    return next((distribution.version for distribution in found), "")


class Peer:
    """A process that runs others' code and does a step when it is asked to, to time beside ours.

    PyTorch's has as many threads as there are processors. Its waiting threads follow
    OMP_WAIT_POLICY where that is set, so that a busy machine can be told not to let them spin.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]):
        self._name = name
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=dict(environment),
        )  # fmt: skip

    @classmethod
    def torch(cls, context: Context) -> Peer:
        """PyTorch's.

        Raises:
          SkippedError: it is not here.
        """
        if not torch_version(context.torch):
            raise SkippedError(HOW_TORCH)
        python = context.torch_python or sys.executable
        command = [python, str(PEER), context.torch, str(cores()), context.platform]
        return cls("PyTorch", command, os.environ)

    @classmethod
    def kyolo(cls, context: Context, backend: str) -> Peer:
        """kyolo's, on one of Keras's backends.

        Raises:
          SkippedError: no Python with it was named.
        """
        if not context.kyolo_python:
            raise SkippedError(HOW_KYOLO)
        environment = os.environ | {"KERAS_BACKEND": backend}
        return cls("kyolo", [context.kyolo_python, str(KYOLO_PEER)], environment)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        if error[0] is not None:  # it may be in the middle of something long
            self._process.kill()
        self._process.wait()

    def ask(self, do: str, **options: Any) -> Any:
        """Has it do something and returns the answer.

        Raises:
          RuntimeError: with its traceback.
        """
        self.begin(do, **options)
        return self.answer()

    def begin(self, do: str, **options: Any) -> None:
        """Has it begin to do something, while we do something else; `answer` waits for it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, "options": options}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """What it says to the oldest thing that was begun.

        Raises:
          RuntimeError: with its traceback.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name}'s process ended with {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"in {self._name}'s process:\n{answer['error']}")
        return answer["result"]

    def seconds(self, case: str, steps: int = 1) -> Took:
        """Mean time of so many steps of a case."""
        return Took.of(*self.ask("time", case=case, steps=steps))
