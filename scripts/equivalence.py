"""Checks that geometry does not change what is learned.

python scripts/equivalence.py --config=FILE[:arg] --geometries=8x1x1,2x4x1,1x8x1,4x1x2
    [--engines=scan,multisteps] [--x64] [--updates=3] [--config.key=value ...]

A geometry is microbatch x steps x devices; host devices are made as needed. Runs the first
updates of the config's own training (its model, data, augmentation, optimizer) on each geometry
and engine and prints the relative differences from the first. Exit status 1 beyond rounding:
1e-12 in float64 and 1e-5 in float32 for one gradient and loss, ten times that after the updates.
The effective batch is the first geometry's product, unless --config.nbs is given.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "the config", lock_config=True)
GEOMETRIES = flags.DEFINE_list(
    "geometries", ["8x1x1", "4x2x1", "2x4x1", "4x1x2"], "microbatch x steps x devices, each"
)
ENGINES = flags.DEFINE_list("engines", ["scan", "multisteps"], "engines")
X64 = flags.DEFINE_bool("x64", False, "compute in float64")
UPDATES = flags.DEFINE_integer("updates", 3, "updates to compare", lower_bound=1)
flags.mark_flag_as_required("config")


def parse_geometries(texts: list[str]) -> list[tuple[int, int, int]]:
    """(microbatch, steps, devices) of each "8x1x1"."""
    geometries = []
    for text in texts:
        parts = text.split("x")
        if len(parts) != 3 or not all(p.isdigit() and int(p) > 0 for p in parts):
            raise SystemExit(f"--geometries: {text!r} is not MICROBATCHxSTEPSxDEVICES, as in 2x4x1")
        geometries.append((int(parts[0]), int(parts[1]), int(parts[2])))
    return geometries


def main(_) -> int:
    geometries = parse_geometries(GEOMETRIES.value)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(d for _, _, d in geometries))
    jax.config.update("jax_enable_x64", X64.value)
    logging.set_verbosity(logging.ERROR)

    from jaxaccum import equivalence, run
    from jaxaccum.accumulate import Geometry

    run.use_compilation_cache()
    config, given = CONFIG.value, config_flags.get_override_values(flags.FLAGS["config"])
    with config.unlocked():
        if "nbs" not in given:
            config.nbs = math.prod(geometries[0])
        if "steps" not in given:
            config.steps = max(UPDATES.value, 10)
        if "lr.warmup_epochs" not in given:
            config.lr.warmup_epochs = 0.0
        if X64.value:
            config.dtype = "float64"
        common = math.gcd(*(m for m, _, _ in geometries))
        group = config.bn_group
        if "bn_group" not in given and isinstance(group, int) and common % group:
            print(
                f"bn_group {group} does not divide every microbatch of these geometries: "
                f"checking the recipe with bn_group {common} instead"
            )
            config.bn_group = common
    for microbatch, steps, devices in geometries:
        needed = -(-config.nbs // (microbatch * devices))
        if steps != needed:
            raise SystemExit(
                f"--geometries: {microbatch}x{steps}x{devices} cannot be: an effective batch of "
                f"{config.nbs} takes {needed} steps of {microbatch} on {devices} devices"
            )

    def prepare(*args, **options):
        try:
            return run.prepare(*args, **options)
        except ValueError as error:
            raise SystemExit(f"error: {error}") from None

    train_set = run.open_source(config, "train")
    tolerance = equivalence.Tolerance.of(X64.value)
    reference, failed = None, 0
    print(f"{'geometry':>10} {'engine':>10}  {'':4}", end="")
    for geometry in geometries:
        for engine in ENGINES.value:
            microbatch, _, devices = geometry
            config.microbatch, config.devices, config.engine = microbatch, devices, engine
            this = prepare(
                config, names=train_set.names, samples=len(train_set),
                identity={"identity": train_set.identity},
            )  # fmt: skip
            dtype = np.float64 if X64.value else np.float32
            params, stats = this.task.initialise(config.seed, dtype)

            def batches(this=this):
                return run.make_stream(this, train_set).windows(0, [config.nbs] * UPDATES.value)

            trace = equivalence.trace(
                this.task.forward, this.rule, this.recipe, Geometry(microbatch, devices, engine),
                params, stats, batches, UPDATES.value,
            )  # fmt: skip
            if reference is None:
                reference = trace
                names = equivalence.differences(trace, trace)
                print(" ".join(f"{name:>11}" for name in names))
            found = equivalence.differences(trace, reference)
            ok = equivalence.within(found, tolerance)
            failed += not ok
            print(
                f"{'x'.join(map(str, geometry)):>10} {engine:>10}  {'ok' if ok else 'FAIL':4}"
                + " ".join(f"{value:11.1e}" for value in found.values()),
                flush=True,
            )
    print(
        f"{config.model}, {this.recipe}, {UPDATES.value} updates, {config.dtype}: "
        + ("one run on every geometry" if not failed else f"{failed} geometries differ")
    )
    return int(failed > 0)


if __name__ == "__main__":
    app.run(main)
