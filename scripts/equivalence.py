"""Checks that geometry does not change what is learned, on the hardware that is here.

python scripts/equivalence.py --config=FILE[:arg] --geometries=8x1x1,2x4x1,1x8x1,4x1x2
    [--engines=scan,multisteps] [--x64] [--updates=3] [--repeat] [--platform=cpu|gpu|tpu]
    [--config.key=value ...]

A geometry is microbatch x steps x devices, as in 4x2x2; x fsdp if the state is to be divided among
so many of the devices (4x1x4x2, by the scan engine), and p processes if the devices are to be those
of several processes together (4x2x2p2), which are started here. On a CPU the devices are made.

Runs the first updates of the config's own training (its model, data, augmentation, optimizer) on
each geometry and engine and prints the relative differences from the first. Exit status 1 beyond
rounding, which depends on the dtype: see `Tolerance` in jaxaccum/accumulate/equivalence.py. With
--repeat the first runs again at the end, and must be the same bit for bit on a CPU; elsewhere it is
told. In bfloat16 and tf32 the first geometry also runs in float32, which tells how much rounding
there is.
The effective batch is the first geometry's product, unless --config.nbs is given.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hardware
import jax
import numpy as np
from absl import app, flags, logging
from hardware import Laid
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "the config", lock_config=True)
GEOMETRIES = flags.DEFINE_list(
    "geometries", ["8x1x1", "4x2x1", "2x4x1", "4x1x2"],
    "microbatch x steps x devices [x fsdp][p processes], each",
)  # fmt: skip
ENGINES = flags.DEFINE_list("engines", ["scan", "multisteps"], "engines")
X64 = flags.DEFINE_bool("x64", False, "compute in float64")
UPDATES = flags.DEFINE_integer("updates", 3, "updates to compare", lower_bound=1)
REPEAT = flags.DEFINE_bool("repeat", False, "run the first geometry again, to compare its bits")
PLATFORM = flags.DEFINE_enum("platform", None, hardware.PLATFORMS, hardware.PLATFORM_HELP)
TIMEOUT = flags.DEFINE_float("timeout", 1800, "seconds that a geometry of several processes has")
ALLOW = flags.DEFINE_bool(
    "allow_wrong_numbers", False, "only warn where JAX computes wrong numbers here"
)
PART = flags.DEFINE_string("part", None, "set by this script for the processes that it starts")
flags.mark_flag_as_required("config")


def groups_fit(group: int, geometry: Laid) -> bool:
    """Whether no batch-norm group is cut."""
    whole = geometry.microbatch * geometry.devices % group == 0
    return geometry.microbatch % group == 0 or (whole and group % geometry.microbatch == 0)


def settle(geometries: list[Laid]):
    """The config with what the flags say, made alike in all processes."""
    config, given = CONFIG.value, config_flags.get_override_values(flags.FLAGS["config"])
    with config.unlocked():
        if "nbs" not in given:
            config.nbs = math.prod(geometries[0][:3])
        if "steps" not in given:
            config.steps = max(UPDATES.value, 10)
        if "lr.warmup_epochs" not in given:
            config.lr.warmup_epochs = 0.0
        if X64.value:
            config.dtype = "float64"
        if config.dtype == "auto":  # the law itself; give bfloat16 for that of bfloat16
            config.dtype = "float32"
        common = math.gcd(*(g.microbatch for g in geometries))
        group = config.bn_group
        fits = not isinstance(group, int) or all(groups_fit(group, g) for g in geometries)
        if "bn_group" not in given and not fits:
            print(
                f"bn_group {group} does not divide every microbatch of these geometries: "
                f"checking the recipe with bn_group {common} instead"
            )
            config.bn_group = common
    for laid in geometries:
        needed = -(-config.nbs // (laid.microbatch * laid.devices))
        if laid.steps != needed:
            raise SystemExit(
                f"--geometries: {laid} cannot be: an effective batch of {config.nbs} takes "
                f"{needed} steps of {laid.microbatch} on {laid.devices} devices"
            )
    return config


def measure(config, train_set, laid: Laid, engine: str, peers=None):
    """(trace, recipe) of one geometry, computed by this process, or by `peers` together."""
    from jaxaccum.accumulate import equivalence
    from jaxaccum.training import run

    with config.unlocked():
        config.microbatch, config.devices, config.engine = laid.microbatch, laid.devices, engine
        config.fsdp = laid.fsdp
    try:
        config, _ = run.settled(config, train_set)
        this = run.prepare(
            config, names=train_set.names, samples=len(train_set),
            identity={"identity": train_set.identity},
        )  # fmt: skip
    except ValueError as error:
        raise SystemExit(f"error: {laid}: {error}") from None
    dtype = np.float64 if X64.value else np.float32
    params, stats = this.task.initialise(config.seed, dtype)

    def batches(share=None):
        return run.make_stream(this, train_set).windows(
            0, [config.nbs] * UPDATES.value, share=share
        )

    def connect(mesh):  # as training does
        ours = f"{this.recipe.fingerprint}, {this.window}"
        if (theirs := peers.from_first("run", ours)) != ours:
            raise RuntimeError(f"this process computes {ours}, the first {theirs}")
        peers.meet("before the first update")
        peers.connect(mesh)

    trace = equivalence.trace(
        this.forward, this.rule, this.recipe, this.window.geometry, params, stats, batches,
        UPDATES.value, connect=connect if peers else None,
    )  # fmt: skip
    return trace, str(this.recipe)


def measure_in_processes(geometries: list[Laid], index: int, engine: str):
    """`measure`, by as many processes as the geometry says, started here."""
    number, address = geometries[index].processes, hardware.free_address()
    environments: list[dict[str, str]] = [{} for _ in range(number)]
    if jax.default_backend() == "gpu":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else list(map(str, range(len(jax.devices()))))
        each = geometries[index].devices // number
        for i, more in enumerate(environments):
            more["CUDA_VISIBLE_DEVICES"] = ",".join(names[i * each : (i + 1) * each])
    with tempfile.TemporaryDirectory(prefix="jaxaccum-") as folder:
        result = Path(folder) / "trace"
        part = {"index": index, "engine": engine, "result": str(result)}
        own = [sys.executable, __file__, *sys.argv[1:], f"--platform={jax.default_backend()}"]
        parts = [part | {"distributed": f"{address},{number},{i}"} for i in range(number)]
        commands = [[*own, f"--part={json.dumps(each)}"] for each in parts]
        try:
            hardware.together(commands, environments, TIMEOUT.value)
        except SystemExit as error:
            raise SystemExit(f"{error}\n(geometry {geometries[index]}, {engine})") from None
        return pickle.loads(result.read_bytes())


def one_of_many(geometries: list[Laid], part: dict) -> int:
    """What a process that `measure_in_processes` started does; the first writes the result."""
    from jaxaccum.training import distributed, run

    laid = geometries[part["index"]]
    hardware.choose(PLATFORM.value, laid.devices // laid.processes, X64.value)
    logging.set_verbosity(logging.ERROR)
    run.use_compilation_cache()
    with distributed.joined(part["distributed"]) as peers:
        config = settle(geometries)
        train_set = run.open_source(config, "train")
        result = measure(config, train_set, laid, part["engine"], peers)
        if peers.first:
            Path(part["result"]).write_bytes(pickle.dumps(result))
    return 0


def main(_) -> int:
    geometries = hardware.parse_geometries(GEOMETRIES.value)
    if PART.value:
        return one_of_many(geometries, json.loads(PART.value))
    dtype = "float64" if X64.value else CONFIG.value.dtype
    wanted = [hardware.DETERMINISTIC] if hardware.may_be_gpu(PLATFORM.value) else []
    said = hardware.tell_xla(wanted + ([hardware.ROUNDED] if dtype == "bfloat16" else []))
    if any(g.processes > 1 for g in geometries):  # on a GPU others need memory, too
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # The first geometry may run here a second time, in float32.
    made = max(g.devices for i, g in enumerate(geometries) if i == 0 or g.processes == 1)
    hardware.start(PLATFORM.value, made, X64.value)
    print("; ".join(filter(None, [f"on {hardware.described()}", said])))
    there = len(jax.devices())
    hardware.require_devices(geometries, jax.default_backend(), there, hardware.described())
    logging.set_verbosity(logging.ERROR)

    from jaxaccum.accumulate import equivalence
    from jaxaccum.machine import known_answers
    from jaxaccum.training import run

    run.use_compilation_cache()
    try:
        known_answers.require(ALLOW.value)
    except known_answers.WrongNumbersError as error:
        raise SystemExit(f"error: {error}") from None
    config = settle(geometries)
    train_set = run.open_source(config, "train")
    tolerance = equivalence.Tolerance.of(config.dtype == "float64")
    if config.dtype == "tf32" and jax.default_backend() == "cpu":
        print("a CPU computes tf32 as float32, and its tolerance comes out as that of float32")

    def measured(index: int, engine: str):
        if geometries[index].processes > 1:
            return measure_in_processes(geometries, index, engine)
        return measure(config, train_set, geometries[index], engine)

    def rounding_of(dtype: str, index: int, engine: str):
        with config.unlocked():
            config.dtype = "float32"
        exact, _ = measure(config, train_set, geometries[index]._replace(processes=1), engine)
        with config.unlocked():
            config.dtype = dtype
        far = equivalence.differences(reference, exact)
        tolerance = equivalence.Tolerance.of_rounding(dtype, far)
        print(
            f"{dtype} is {far['gradient']:.1e} from float32 in the first gradient: geometries may "
            f"be {tolerance.gradient:.1e} apart in it and {tolerance.first_loss:.1e} in the first "
            "loss; the rest is not judged"
        )
        return tolerance

    reference, failed = None, 0
    wide = max(10, *(len(str(g)) for g in geometries))
    for index, laid in enumerate(geometries):
        for engine in ENGINES.value:
            if laid.fsdp > 1 and engine != "scan":
                continue
            trace, recipe = measured(index, engine)
            if reference is None:
                reference, first = trace, (index, engine)
                if (dtype := config.dtype) in ("bfloat16", "tf32"):
                    tolerance = rounding_of(dtype, index, engine)
                names = equivalence.differences(trace, trace)
                columns = " ".join(f"{name:>11}" for name in names)
                print(f"{'geometry':>{wide}} {'engine':>10}  {'':4}{columns}")
            found = equivalence.differences(trace, reference)
            ok = equivalence.within(found, tolerance)
            failed += not ok
            print(
                f"{laid!s:>{wide}} {engine:>10}  {'ok' if ok else 'FAIL':4}"
                + " ".join(f"{value:11.1e}" for value in found.values()),
                flush=True,
            )
    if reference is None:
        raise SystemExit("error: no engine of --engines computes any of --geometries")
    differ = failed
    if REPEAT.value:
        again, _ = measured(*first)
        found = equivalence.differences(again, reference)
        same = equivalence.same_bits(again, reference)
        ok = same or (jax.default_backend() != "cpu" and equivalence.within(found, tolerance))
        failed += not ok
        far = f"not bit for bit, but {max(found.values()):.1e} apart at most"
        print(
            f"{geometries[first[0]]} {first[1]} run again: {'bit for bit' if same else far}"
            f"{'' if ok else ': FAIL'}"
        )
    print(
        f"{config.model}, {recipe}, {UPDATES.value} updates, {config.dtype}: "
        + ("one run on every geometry" if not differ else f"{differ} geometries differ")
    )
    return int(failed > 0)


if __name__ == "__main__":
    app.run(main)
