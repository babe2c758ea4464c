"""python -m jaxaccum.compare --configs=FILE[:arg][@key=value],... --out=DIR [--set=key=value,...]
    [--memory=2GiB] [--nbs=16] [--seeds=0,1] [--most=64] [--check_updates=5]

Compares models twice: each at the largest batch that fits in memory, and all at one batch.

Phase 1 asks how good each model gets on this memory: its effective batch is the largest microbatch
that fits, and the learning rate follows the batch. Phase 2 asks which architecture is better: all
have the effective batch `--nbs`, computed in as many microbatches as each needs. Phase 1 minus
Phase 2 is what the batch does. A config is followed by settings of its own (`@model=yolov8-p2-n`);
`--set` is for all. Started again, it goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags
from tqdm import tqdm

import jaxaccum
from jaxaccum import (
    compare_plots,
    compare_report,
    config_files,
    known_answers,
    models,
    optim,
    run,
    tasks,
)  # fmt: skip
from jaxaccum import config as configs
from jaxaccum.accumulate import make_engine
from jaxaccum.errors import TrainingError
from jaxaccum.initial import identities, load_initial
from jaxaccum.models import init
from jaxaccum.models.__main__ import gigaflops

# Fields that the comparison decides, and what decides them.
DECIDED = {
    "nbs": "set --nbs, for Phase 2, and --most, for Phase 1",
    "seed": "set --seeds",
    "microbatch": "the plan chooses it; set --memory and --most",
}
# "update  10/513 | ... | 11.6 images/s", as training prints it: evaluations and the first
# compilation do not count.
_SPEED = re.compile(r"^update .*\| ([\d.]+) images/s$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Model:
    """One of the models to compare.

    Attributes:
      name: in tables and file names.
      file: as --config of train takes it.
      overrides: fields of the config set for it, as text.
      config: with them.
      source: its training samples.
    """

    name: str
    file: str
    overrides: Mapping[str, str]
    config: ml_collections.ConfigDict
    source: tasks.Source

    @property
    def group(self) -> int:
        """What a microbatch must be a multiple of."""
        return 1 if self.config.bn_group == "frozen" else self.config.bn_group


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
        file = self.workdir / "metrics.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [json.loads(line) for line in lines]

    @property
    def done(self) -> bool:
        """Whether the last update of this recipe was evaluated, the last thing that is logged."""
        last = (self.records() or [{}])[-1]
        place = last.get("kind"), last.get("step"), last.get("fingerprint")
        return place == ("eval", self.run.steps, self.run.recipe.fingerprint)


def compare(
    specs: Sequence[str],
    out: Path,
    *,
    settings: Sequence[str] = (),
    memory: str | None = None,
    nbs: int = 0,
    seeds: Sequence[int] = (0,),
    most: int = 64,
    check_updates: int = 5,
    command: Sequence[str] = (),
    allow_wrong_numbers: bool = False,
) -> dict[str, Any]:
    """Plans, trains what is not trained yet, and writes report.md, results.json and plots.

    Args:
      specs: FILE[:arg][@key=value]... of each model.
      out: folder of the comparison; continued if it holds one.
      settings: "key=value" for all models.
      memory: of one device, as the plan takes it ("2GiB"); its own default if None.
      nbs: effective batch of Phase 2; 0 for the smallest of Phase 1.
      seeds: of the runs; each is one more repetition of everything.
      most: largest effective batch of Phase 1, even if more fits.
      check_updates: first updates to run on other geometries; 0 for no check.
      command: arguments to show in the report.
      allow_wrong_numbers: only warn where JAX computes wrong numbers, see
        jaxaccum/known_answers.py.
    Returns:
      what results.json holds.
    Raises:
      ConfigError: what is asked for cannot be compared. TrainingError: a plan or a run failed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise configs.ConfigError("the plots need matplotlib: pip install matplotlib")
    if nbs < 0 or most < 1 or check_updates < 0 or not seeds:
        raise configs.ConfigError(
            "--nbs and --check_updates are not negative, --most is positive and --seeds names at "
            f"least one seed; got {nbs}, {check_updates}, {most}, {list(seeds)}"
        )
    found = read_models(specs, settings)
    for folder in ("plans", "runs"):
        (out / folder).mkdir(parents=True, exist_ok=True)

    plans = {model.name: plan(model, memory, most, out / "plans") for model in found}
    own = {name: each["largest"] * each["choice"]["devices"] for name, each in plans.items()}
    shared = nbs or min(own.values())
    print(
        f"Phase 1, each at its own: {', '.join(f'{k} {v}' for k, v in own.items())}; Phase 2, "
        f"all at: {shared}{'' if nbs else ', the smallest of these'}"
    )

    def cell(model: Model, batch: int, seed: int) -> Cell:
        return make_cell(model, plans[model.name], batch, seed, out / "runs")

    # A model whose own batch is the shared one has one run in both phases.
    phases = [own, dict.fromkeys(own, shared)]
    cells = {
        (model.name, phase[model.name], seed): cell(model, phase[model.name], seed)
        for seed in seeds
        for phase in phases
        for model in found
    }
    rules = {model.name: rule(model) for model in found}
    for line in dict.fromkeys(rules.values()):
        print(f"learning rate: {line}", flush=True)
    first = cells[found[0].name, shared, seeds[0]]
    check = check_geometries(first, check_updates, out / "check.json", allow_wrong_numbers)
    for number, each in enumerate(cells.values(), start=1):
        train(each, f"{number}/{len(cells)}", allow_wrong_numbers)

    results = {
        "command": [_without_places(word) for word in command],
        "versions": {
            "jaxaccum": jaxaccum.__version__, "jax": jax.__version__,
            "python": platform.python_version(),
        },
        "hardware": check.pop("hardware") | {"cores": os.cpu_count()},
        "rules": rules,
        "differing": sorted(
            {"model"}.union(*(
                cells[model.name, shared, seeds[0]].run.recipe.differences(
                    first.run.recipe.as_dict()
                )
                for model in found
            ))
        ),
        "data": {
            "samples": len(found[0].source), "classes": len(found[0].source.names),
            "image_size": found[0].config.data.image_size,
        },
        "seeds": list(seeds),
        "shared": shared,
        "most": most,
        "models": {model.name: describe(model) for model in found},
        "plans": plans,
        "check": check,
        "phases": [
            {m.name: [result(cells[m.name, phase[m.name], s]) for s in seeds] for m in found}
            for phase in phases
        ],
    }  # fmt: skip
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    compare_plots.draw(results, out)
    (out / "report.md").write_text(compare_report.report(results))
    print(out / "report.md")
    return results


# --- What is compared. ---


def read_models(specs: Sequence[str], settings: Sequence[str]) -> list[Model]:
    """Loads the configs and opens their training data.

    Raises:
      ConfigError: one cannot be run, or they cannot be compared.
    """
    everywhere = {"lr.scaling": "linear"} | _pairs(settings, "--set")
    loaded = []
    for spec in specs:
        file, *changes = spec.split("@")
        # One device, unless more are asked for: the study's batch is what one holds.
        overrides = {"devices": "1"} | everywhere | _pairs(changes, spec)
        loaded.append((spec, file, overrides, load_config(file, overrides)))
    if not loaded:
        raise configs.ConfigError("--configs names no config")
    names = [config.model for *_, config in loaded]
    sources: dict[str, tasks.Source] = {}
    found: dict[str, Model] = {}
    for spec, file, overrides, config in loaded:
        _require_comparable(spec, config)
        name = config.model
        if names.count(name) > 1:
            name = re.sub(r"[^\w.]+", "-", f"{name}@{Path(spec).name}")
        if name in found:
            raise configs.ConfigError(f"--configs names {spec} twice")
        place = json.dumps(config.data.to_dict(), sort_keys=True)
        if place not in sources:
            sources[place] = run.open_source(config, "train")
            for line in sources[place].report.lines():
                print(line)
        found[name] = Model(name, file, overrides, config, sources[place])
    return list(found.values())


def _require_comparable(spec: str, config: ml_collections.ConfigDict) -> None:
    configs.validate(config)
    if config.task != "detection":
        raise configs.ConfigError(f"{spec}: compare is for detection; the task is {config.task}")
    if configs.is_compat(config):
        raise configs.ConfigError(f"{spec}: with compat the geometry changes what is learned")
    if config.bn_group == "all":
        raise configs.ConfigError(
            f"{spec}: bn_group=all makes every effective batch one microbatch; set a number that "
            "every model's memory holds, such as bn_group=4, or frozen"
        )
    if config.steps:
        raise configs.ConfigError(
            f"{spec}: steps={config.steps} counts updates, so that a larger batch would see more "
            "images: set steps=0 and epochs, here or by --set=steps=0,epochs=N"
        )
    if config.eval.every < 0 or config.log.every < 0:
        raise configs.ConfigError(f"{spec}: the report needs eval.every and log.every, not -1")


def _pairs(texts: Sequence[str], where: str) -> dict[str, str]:
    """{"key": "value"} of "key=value" texts."""
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise configs.ConfigError(f"{where}: {text!r} is not key=value, as in epochs=10")
        if key in DECIDED:
            raise configs.ConfigError(f"{where}: {key} is not set by hand: {DECIDED[key]}")
        pairs[key] = value
    return pairs


def load_config(file: str, overrides: Mapping[str, str]) -> ml_collections.ConfigDict:
    """The config that `train --config=FILE --config.key=value ...` would train.

    Raises:
      ConfigError: there is no such file or field, or it does not take the value.
    """
    try:
        return config_files.parse(file, overrides)
    except configs.ConfigError as error:
        raise configs.ConfigError(f"{file}: {error}") from None


def _as_flags(overrides: Mapping[str, Any]) -> list[str]:
    return [f"--config.{key}={value}" for key, value in overrides.items()]


def prepare(config: ml_collections.ConfigDict, source: tasks.Source) -> run.Run:
    """What train derives from a config."""
    identity = {"identity": source.identity, "samples": len(source), **identities(config)}
    return run.prepare(config, names=source.names, samples=len(source), identity=identity)


def rule(model: Model) -> str:
    """How the learning rate follows the effective batch, in words."""
    lr = optim.resolve(model.config, len(model.source.names), 1).lr
    return {
        "none": f"{lr.base:g} at every effective batch",
        "linear": f"{lr.base:g} * (effective batch) / {lr.base_batch}",
        "sqrt": f"{lr.base:g} * sqrt((effective batch) / {lr.base_batch})",
    }[lr.scaling] + f" (lr.scaling={lr.scaling}, lr.base, lr.base_batch)"


def describe(model: Model) -> dict[str, Any]:
    """Parameters and operations, as `python -m jaxaccum.models` counts them, for these classes
    and this image size."""
    size = model.config.data.image_size
    network = models.create(model.config.model, num_classes=len(model.source.names))

    def images(side):
        return jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)

    shapes = jax.eval_shape(lambda x: network.init(jax.random.key(0), x), images(64))
    return {
        "parameters": init.count(shapes["params"]),
        "gflops": gigaflops(network, images(size)),
        "strides": list(network.strides),
        "bn_group": model.config.bn_group,
    }


# --- The plan. ---


def ask_plan(arguments: Sequence[str], log: Path) -> dict[str, Any]:
    """Runs `python -m jaxaccum.plan` and returns what it prints; its messages go to `log`.

    Raises:
      TrainingError: it failed; with the last lines of its messages.
    """
    with log.open("wb") as messages:
        done = subprocess.run(
            [sys.executable, "-m", "jaxaccum.plan", *arguments],
            stdout=subprocess.PIPE, stderr=messages, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    # A plan into which nothing fits has a status of its own, but says so in its JSON.
    if done.returncode and not done.stdout.startswith(b"{"):
        raise TrainingError(f"the plan failed ({done.returncode}):\n{_last_lines(log)}")
    return json.loads(done.stdout)


def plan(model: Model, memory: str | None, most: int, folder: Path) -> dict[str, Any]:
    """The plan of a model, kept in `folder`; its "largest" is the microbatch of Phase 1.

    Raises:
      ConfigError: `most` is less than one batch-norm group. TrainingError: nothing fits.
    """
    config = model.config
    arguments = [
        f"--config={model.file}", "--json", "--largest",
        f"--remat={'yes' if config.remat else 'no'}", f"--engines={config.engine}",
        *([f"--devices={config.devices}"] if config.devices else []),
        *([f"--memory={memory}"] if memory else []), *_as_flags(model.overrides),
    ]  # fmt: skip
    file = folder / f"{model.name}.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    if kept.get("arguments") != arguments:
        print(f"planning {model.name}", flush=True)
        found = ask_plan(arguments, folder / f"{model.name}.log")
        kept = {"arguments": arguments, "plan": found}
        _write(file, kept)
    found = kept["plan"]
    if found["choice"] is None:
        raise TrainingError(f"{model.name}: {found['why']}")
    devices = found["choice"]["devices"]
    limit = min(most, len(model.source)) // (devices * model.group) * model.group
    if not limit:
        raise configs.ConfigError(
            f"{model.name}: --most={most} (and {len(model.source)} samples) is less than one "
            f"bn_group of {model.group} on {compare_report.counted(devices, 'device')}"
        )
    return found | {"largest": min(found["choice"]["microbatch"], limit)}


def layout(nbs: int, group: int, largest: int, devices: int = 1) -> int:
    """The microbatch for an effective batch: the fewest steps that `largest` allows, then the
    least padding.

    Args:
      nbs: the effective batch. group: the microbatch is a multiple of it.
      largest: microbatch that fits on each of `devices`.
    """
    steps = math.ceil(nbs / (largest * devices))
    return math.ceil(nbs / (steps * devices) / group) * group


def make_cell(model: Model, planned: Mapping[str, Any], nbs: int, seed: int, folder: Path) -> Cell:
    """A run on the planned geometry, with the largest microbatch that divides its work well."""
    choice = planned["choice"]
    microbatch = layout(nbs, min(model.group, nbs), planned["largest"], choice["devices"])
    overrides = dict(model.overrides) | {
        "nbs": str(nbs), "seed": str(seed), "microbatch": str(microbatch),
        **{key: str(choice[key]) for key in ("devices", "engine", "remat")},
    }  # fmt: skip
    this = prepare(load_config(model.file, overrides), model.source)
    return Cell(model, overrides, this, folder / f"{model.name}-nbs{nbs}-seed{seed}")


# --- The check that geometry changes nothing. ---


def check_geometries(
    cell: Cell, updates: int, file: Path, allow_wrong_numbers: bool = False
) -> dict[str, Any]:
    """Losses of the first updates of a run on its own geometry, on the smallest microbatch, and
    by the other engine; also the hardware. Kept in `file`."""
    window = cell.run.window
    own = window.geometry
    group = window.recipe.group or 1
    geometries = list(dict.fromkeys(
        [(own.microbatch, own.engine), (group, "scan"), (group, "multisteps")]
    ))  # fmt: skip
    updates = min(updates, cell.run.steps)
    asked = [cell.run.recipe.fingerprint, [list(g) for g in geometries], updates]
    kept = json.loads(file.read_text()) if file.exists() else {}
    if kept.get("asked") != asked:
        if updates:
            print(f"checking {updates} updates of {cell.model.name} on other geometries")
        asks = (cell.model.file, dict(cell.overrides), geometries if updates else [], updates)
        kept = {"asked": asked, **in_child(first_losses, *asks, allow_wrong_numbers)}
        _write(file, kept)
    titles = [f"microbatch {m}, {e}" for m, e in geometries]
    apart = [
        max(abs(v - row[0]) / abs(row[0]) for v in row) for row in zip(*kept["losses"], strict=True)
    ]
    return {
        "model": cell.model.name, "nbs": window.recipe.nbs, "hardware": kept["hardware"],
        "fingerprint": window.recipe.fingerprint, "dtype": cell.run.config.dtype,
        "geometries": titles, "losses": kept["losses"], "apart": apart,
    }  # fmt: skip


def in_child(function: Callable, *args) -> Any:
    """Calls a function in a fresh process: an accelerator must be free again for the next run."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *args).result()


def first_losses(
    file: str,
    overrides: dict[str, str],
    geometries: list[tuple[int, str]],
    updates: int,
    allow_wrong_numbers: bool = False,
) -> dict[str, Any]:
    """{"losses": of the first updates, by geometry, "hardware": ...}, by JAX's own device."""
    run.use_compilation_cache()
    known_answers.require(allow_wrong_numbers)
    losses: list[list[float]] = []
    for microbatch, engine_name in geometries:
        changes = {"microbatch": str(microbatch), "engine": engine_name}
        config = load_config(file, overrides | changes)
        source = run.open_source(config, "train")
        this = prepare(config, source)
        params, stats = this.task.initialise(config.seed)
        if config.init_from:
            params, stats, _ = load_initial(
                config.init_from, this.task.model, params, stats, source.names
            )
        engine = make_engine(this.task.forward, this.rule, this.window)
        state = engine.init(params, stats)
        windows = run.make_stream(this, source).windows(0, [this.recipe.nbs] * updates)
        losses.append([])
        for _ in range(updates):
            state, log = engine.update(state, next(windows))
            losses[-1].append(float(log["loss"]))
        windows.close()
    device = jax.devices()[0]
    return {
        "losses": losses,
        "hardware": {"platform": device.platform, "device_kind": device.device_kind},
    }


# --- The runs. ---


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
            f"{name} failed ({code}); the last lines of {cell.log}:\n{_last_lines(cell.log)}"
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
    kept = json.loads(cell.usage.read_text()) if cell.usage.exists() else {}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxaccum.train", f"--config={cell.model.file}",
         f"--workdir={cell.workdir}", f"--allow_wrong_numbers={allow_wrong_numbers}",
         *_as_flags(cell.overrides)],
        stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    ended, status, used = 0, 0, None
    try:
        # A bar on a terminal, nothing in a file.
        with tqdm(total=cell.run.steps, disable=None, desc=cell.workdir.name, leave=False) as bar:
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
        _write(cell.usage, usage)
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
    usage = {"seconds": None, "resident_bytes": None}
    if cell.usage.exists():  # unless compare was killed while this was trained
        usage = json.loads(cell.usage.read_text())
    return {
        "run": cell.workdir.name,
        "fingerprint": this.recipe.fingerprint,
        "nbs": this.recipe.nbs,
        "seed": this.config.seed,
        "lr": optim.scaled_lr(this.config.lr, this.recipe.nbs),
        "updates": this.steps,
        "epochs": int(this.sizes.sum()) / len(cell.model.source),
        "geometry": dataclasses.asdict(geometry)
        | {"steps": this.window.steps, "padding": this.window.padding, "remat": this.config.remat},
        "best": max(metrics, key=lambda m: m["map50_95"]),
        "last": metrics[-1],
        "curve": [[m["epoch"], m["map50_95"]] for m in metrics],
        "images_per_second": statistics.median(speeds),
        **usage,
    }


# --- Small things. ---


def _write(file: Path, content: Any) -> None:
    """Writes JSON in one move, so that a kill leaves the old file or the new one."""
    fresh = file.with_name(file.name + ".new")
    fresh.write_text(json.dumps(content, indent=1) + "\n")
    fresh.replace(file)


def _last_lines(log: Path, number: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-number:])


def _without_places(word: str) -> str:
    """An argument whose absolute paths are cut down to the file's name."""
    return re.sub(r"(?<![^=,@:])(?:/|~)[^,@:=]*/(?=[^/,@:=]+)", ".../", word)


if __name__ == "__main__":
    from jaxaccum import command_line

    _CONFIGS = flags.DEFINE_list(
        "configs", None, "FILE[:arg][@key=value]... of each model", required=True
    )
    _OUT = flags.DEFINE_string("out", None, "folder of the comparison", required=True)
    _SET = flags.DEFINE_list("set", [], "key=value for all models")
    _MEMORY = flags.DEFINE_string("memory", None, "of one device, such as 2GiB")
    _NBS = flags.DEFINE_integer("nbs", 0, "effective batch of Phase 2; 0: the smallest of Phase 1",
                                0, 10**6)  # fmt: skip
    _SEEDS = flags.DEFINE_list("seeds", ["0"], "seeds, each a repetition")
    _MOST = flags.DEFINE_integer("most", 64, "largest effective batch of Phase 1", 1, 10**6)
    _CHECK = flags.DEFINE_integer("check_updates", 5, "updates to check on other geometries",
                                  0, 10**6)  # fmt: skip
    _ALLOW = flags.DEFINE_bool("allow_wrong_numbers", False, known_answers.FLAG_HELP)

    def main() -> int:
        # This process only plans and reads: the accelerator is for those that it starts.
        jax.config.update("jax_platforms", "cpu")
        # Asked to stop, it stops what it started.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        if not all(re.fullmatch(r"\d{1,9}", text, re.ASCII) for text in _SEEDS.value):
            raise configs.ConfigError(f"--seeds are numbers; got {','.join(_SEEDS.value)}")
        compare(
            _CONFIGS.value, Path(_OUT.value), settings=_SET.value, memory=_MEMORY.value,
            nbs=_NBS.value, seeds=list(dict.fromkeys(map(int, _SEEDS.value))), most=_MOST.value,
            check_updates=_CHECK.value, command=sys.argv[1:], allow_wrong_numbers=_ALLOW.value,
        )  # fmt: skip
        return 0

    command_line.run_verb(
        main,
        __doc__,
        (
            (
                "compare --configs=configs/yolo_n.py,configs/yolo_s.py --set=epochs=9 --out=ns",
                "two models, each at its own batch, and both at one",
            ),
        ),
    )
