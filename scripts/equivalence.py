"""Checks that geometry does not change what is learned.

python scripts/equivalence.py --config=FILE[:arg] --geometries=8x1x1,2x4x1,1x8x1,4x1x2
    [--engines=scan,multisteps] [--x64] [--updates=3] [--config.key=value ...]

A geometry is microbatch x steps x devices, and x fsdp if the state is to be divided among so many
of the devices (by the scan engine); host devices are made as needed. Runs the first
updates of the config's own training (its model, data, augmentation, optimizer) on each geometry
and engine and prints the relative differences from the first. Exit status 1 beyond rounding:
1e-12 in float64 and 1e-5 in float32 for one gradient and loss, ten times that after the updates.
The effective batch is the first geometry's product, unless --config.nbs is given.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import NamedTuple

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


class Laid(NamedTuple):
    """A geometry as given, for either engine."""

    microbatch: int
    steps: int
    devices: int
    fsdp: int = 1


def parse_geometries(texts: list[str]) -> list[Laid]:
    """Of each "8x1x1" or "4x1x4x2"."""
    geometries = []
    for text in texts:
        parts = text.split("x")
        if len(parts) not in (3, 4) or not all(p.isdigit() and int(p) > 0 for p in parts):
            raise SystemExit(
                f"--geometries: {text!r} is not MICROBATCHxSTEPSxDEVICES, as in 2x4x1, nor "
                "MICROBATCHxSTEPSxDEVICESxFSDP"
            )
        geometries.append(Laid(*map(int, parts)))
    return geometries


def groups_fit(group: int, geometry: Laid) -> bool:
    """Whether no batch-norm group is cut."""
    whole = geometry.microbatch * geometry.devices % group == 0
    return geometry.microbatch % group == 0 or (whole and group % geometry.microbatch == 0)


def main(_) -> int:
    geometries = parse_geometries(GEOMETRIES.value)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(g.devices for g in geometries))
    jax.config.update("jax_enable_x64", X64.value)
    logging.set_verbosity(logging.ERROR)

    from jaxaccum import equivalence, run

    run.use_compilation_cache()
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
        common = math.gcd(*(g.microbatch for g in geometries))
        group = config.bn_group
        fits = not isinstance(group, int) or all(groups_fit(group, g) for g in geometries)
        if "bn_group" not in given and not fits:
            print(
                f"bn_group {group} does not divide every microbatch of these geometries: "
                f"checking the recipe with bn_group {common} instead"
            )
            config.bn_group = common
    for microbatch, steps, devices, _ in geometries:
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
            microbatch, _, devices, fsdp = geometry
            if fsdp > 1 and engine != "scan":
                continue
            config.microbatch, config.devices, config.engine = microbatch, devices, engine
            config.fsdp = fsdp
            this = prepare(
                config, names=train_set.names, samples=len(train_set),
                identity={"identity": train_set.identity},
            )  # fmt: skip
            dtype = np.float64 if X64.value else np.float32
            params, stats = this.task.initialise(config.seed, dtype)

            def batches(this=this):
                return run.make_stream(this, train_set).windows(0, [config.nbs] * UPDATES.value)

            trace = equivalence.trace(
                this.task.forward, this.rule, this.recipe, this.window.geometry,
                params, stats, batches, UPDATES.value,
            )  # fmt: skip
            if reference is None:
                reference = trace
                names = equivalence.differences(trace, trace)
                print(" ".join(f"{name:>11}" for name in names))
            found = equivalence.differences(trace, reference)
            ok = equivalence.within(found, tolerance)
            failed += not ok
            laid = "x".join(map(str, geometry if fsdp > 1 else geometry[:3]))
            print(
                f"{laid:>10} {engine:>10}  {'ok' if ok else 'FAIL':4}"
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
