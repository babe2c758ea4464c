"""python -m jaxaccum.plan --config=FILE[:arg] [--memory=12GiB,24GiB] [--target=h100] [--devices=N]

What batch fits, before anything runs. See docs/planning.md.
"""

from __future__ import annotations

import json
import re
from typing import cast

import jax
from absl import flags

from jaxaccum import command_line, config_files, tasks
from jaxaccum.accumulate.recipe import Engine
from jaxaccum.fields import REMATS
from jaxaccum.plan import calibration, targets
from jaxaccum.plan.planner import Measure, Planner, cache_folder
from jaxaccum.plan.search import Choice, choose, ways_of
from jaxaccum.plan.targets import GIB, PlanError
from jaxaccum.training import run

MIB = 2**20
UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def size(text: str) -> int:
    """Bytes of "12GiB", "800MB" and the like.

    Raises:
      PlanError: it is no such text.
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d*)?|\.\d+)\s*([a-zA-Z]+)\s*", text, re.ASCII)
    bytes_ = 0
    if found and found.group(2).upper() in UNITS:
        bytes_ = int(float(found.group(1)) * UNITS[found.group(2).upper()])
    if not 1 <= bytes_ <= 2**60:
        raise PlanError(f"--memory takes sizes such as 12GiB or 800MB; got {text!r}")
    return bytes_


def microbatch(text: str) -> int:
    """Raises:
    PlanError: it is no positive whole number of at most six digits.
    """
    if not re.fullmatch(r"[1-9]\d{0,5}", text, re.ASCII):
        raise PlanError(f"--microbatches takes whole numbers such as 4,8; got {text!r}")
    return int(text)


def table(choice: Choice) -> list[str]:
    """The rows of a plan as text."""
    fastest = min(m.seconds for m in choice.rows) or 1.0
    hosts = any(m.host for m in choice.rows)
    lines = [
        f"{'microbatch':>10} {'steps':>5} {'engine':>10} {'remat':>6} {'peak MiB':>9} "
        f"{'state':>7} {'batch':>7} {'temp':>7} "
        f"{' on host ' if hosts else ''}{'GFLOP':>8} {'time':>5}"
    ]
    for m in choice.rows:
        mark = "<- chosen" if m == choice.chosen else "" if m.peak <= choice.budget else "no"
        lines.append(
            f"{m.microbatch:>10} {m.steps:>5} {m.engine:>10} {m.remat:>6} "
            f"{'' if m.compiled else '~':>1}{m.peak / MIB:>8.0f} {m.state / MIB:>7.1f} "
            f"{m.batch / MIB:>7.1f} {m.temp / MIB:>7.0f} "
            f"{f'{m.host / MIB:>8.0f} ' if hosts else ''}{m.flops / 1e9:>8.0f} "
            f"{m.seconds / fastest:>5.2f}  {mark}".rstrip()
        )
    return lines


def as_json(choice: Choice, target: targets.Target, memory: int, dtype: str) -> dict:
    """A plan as plain values; sizes in bytes. `dtype`: that was planned with."""
    fastest = min(m.seconds for m in choice.rows) or 1.0

    def row(m: Measure) -> dict:
        return {
            "microbatch": m.microbatch, "steps": m.steps, "devices": m.devices,
            "engine": m.engine, "remat": m.remat, "peak_bytes": m.peak,
            "host_bytes": m.host, "temp_bytes": m.temp,
            "argument_bytes": m.state + m.batch, "state_bytes": m.state, "batch_bytes": m.batch,
            "output_bytes": m.outputs, "flops": m.flops, "relative_time": m.seconds / fastest,
            "compiled": m.compiled, "fits": m.peak <= choice.budget,
        }  # fmt: skip

    return {
        "target": target.name, "dtype": dtype,
        "memory_bytes": memory, "budget_bytes": choice.budget,
        "rows": [row(m) for m in choice.rows],
        "choice": row(choice.chosen) if choice.chosen else None,
        "why": choice.why, "evaluation_bytes": choice.evaluation,
    }  # fmt: skip


def main() -> int:
    run.use_compilation_cache()
    config = _CONFIG.value
    if _TARGET.value in targets.TARGETS and not jax.config.jax_platforms:
        # Its compiler needs no device of its kind; asked for one, JAX's plugin wants all of CUDA.
        jax.config.update("jax_platforms", "cpu")
    target = targets.find(_TARGET.value)
    if _CLASSES.value:
        names, samples = [str(i) for i in range(_CLASSES.value)], 1000
        tasks.of(config)
    else:
        source = run.open_source(config, "train")
        config, _ = run.settled(config, source)
        names, samples = source.names, len(source)
    devices = _DEVICES.value or (len(jax.devices()) if target.at_hand else 1)
    made = Planner(
        config, names=names, samples=samples, target=target, devices=devices,
        whole=_LARGEST.value, cache=cache_folder(),
    )  # fmt: skip
    engines = [str(e) for e in _ENGINES.value]
    if not set(engines) <= {"scan", "multisteps"}:
        raise PlanError(f"--engines takes scan and multisteps; got {','.join(engines)!r}")
    memories = [size(text) for text in _MEMORY.value] or [target.memory]
    results, fits = [], True
    if not _JSON.value:
        per = f"effective batch {config.nbs}" if not _LARGEST.value else "one microbatch per update"
        print(
            f"{config.model}, {made.config.dtype}, {per}, bn_group {config.bn_group}, "
            f"for {devices} x "
            f"{target.name}{f' ({target.kind})' if target.kind else ''}"
        )
    for memory in memories:
        choice = choose(
            made, memory, engines=cast(list[Engine], engines),
            remats=REMATS if _REMAT.value == "auto" else (_REMAT.value,),
            microbatches=[microbatch(m) for m in _MICROBATCHES.value],
            evaluation=_EVALUATION.value,
            margin=_MARGIN.value,
        )  # fmt: skip
        results.append(as_json(choice, target, memory, made.config.dtype))
        fits = fits and choice.chosen is not None
        if not _JSON.value:
            _print(choice, target, memory)
    if _JSON.value:
        print(json.dumps(results if len(results) > 1 else results[0]))
    else:
        print(f"{made.compilations} compilations; '~': on the line through two that were compiled")
    return 0 if fits else 1


def _print(choice: Choice, target: targets.Target, memory: int) -> None:
    factor, margin = calibration.of(target)
    told = (
        f"calibrated on {target.kind}: {factor:.2f} of the plan is used"
        if target.at_hand and target.kind in calibration.known()
        else "not calibrated: python -m jaxaccum.calibrate, on the device"
    )
    print(
        f"\n{memory / GIB:.2f} GiB a device, of which {choice.budget / GIB:.2f} are planned for "
        f"(margin {margin if _MARGIN.value is None else _MARGIN.value:.0%}, {told})"
    )
    print("\n".join(table(choice)))
    if choice.evaluation:
        print(f"evaluation beside the state: {choice.evaluation / GIB:.2f} GiB")
    if choice.chosen is None:
        print(choice.why)
        return
    m = choice.chosen
    print(
        f"choice: microbatch {m.microbatch} x {m.steps} steps x {m.devices} "
        f"{'device' if m.devices == 1 else 'devices'}, {m.engine}"
        f"{ways_of(m)}: {choice.why}"
    )
    if target.platform == "gpu":
        if target.topology is None and not target.at_hand:
            print("cuDNN picks its workspaces on the real GPU: they are not in the plan")
        if m.peak > 0.75 * memory:
            print("JAX takes 75 % of a GPU by itself: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95")


if __name__ == "__main__":
    _CONFIG = config_files.define()
    _MEMORY = flags.DEFINE_list("memory", [], "bytes of a device, such as 12GiB; a list")
    _TARGET = flags.DEFINE_string(
        "target", "", f"what to plan for: {', '.join(targets.TARGETS)}; the device here by default"
    )
    _DEVICES = flags.DEFINE_integer(
        "devices", 0, "devices that share an update; 0: all, or one", 0, 10**6
    )
    _ENGINES = flags.DEFINE_list("engines", ["scan"], "engines to try: scan, multisteps")
    _REMAT = flags.DEFINE_enum("remat", "auto", ["auto", *REMATS], "how to hold activations")
    _MICROBATCHES = flags.DEFINE_list("microbatches", [], "microbatches to show")
    _CLASSES = flags.DEFINE_integer(
        "classes", 0, "plan without the data, for that many classes", 0, 10**5
    )
    _LARGEST = flags.DEFINE_bool(
        "largest", False, "the largest effective batch that is one microbatch per device"
    )
    _EVALUATION = flags.DEFINE_bool("evaluation", True, "plan the evaluation, too")
    _MARGIN = flags.DEFINE_float("margin", None, "share of the memory to leave free", 0, 0.99)
    _JSON = flags.DEFINE_bool("json", False, "print one JSON object (a list of several memories)")
    command_line.run_verb(
        main,
        __doc__,
        (
            (
                "plan --config=configs/yolo_s.py --config.data.path=DIR/data.yaml",
                "what fits on the device here",
            ),
            (
                "plan --config=configs/yolo_m.py:11-p2 --classes=80 --target=rtx4090",
                "on one that is not here, without the data",
            ),
            ("plan --config=configs/quickstart.py --memory=512MiB,2GiB", "on that much memory"),
        ),
    )
