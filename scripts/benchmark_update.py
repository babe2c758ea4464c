"""What accumulation costs: an update of k microbatches against k forward and backward passes.

python scripts/benchmark_update.py --config=FILE[:arg] [--steps=1,2,4,8] [--repeats=9]
    [--config.key=value ...]

For each number of steps k, at the config's microbatch and both engines: the median over
interleaved repeats of (time of one update) / (k * time of one jitted forward and backward pass of
one microbatch), and the temporary memory of the compiled update, which should not grow with k.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "the config", lock_config=True)
STEPS = flags.DEFINE_list("steps", ["1", "2", "4", "8"], "accumulation steps to measure")
REPEATS = flags.DEFINE_integer("repeats", 9, "interleaved repeats", lower_bound=1)
flags.mark_flag_as_required("config")


def seconds(function, *args) -> float:
    """Wall time of one call, waiting for its result."""
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def main(_) -> int:
    logging.set_verbosity(logging.ERROR)
    from jaxaccum import fields
    from jaxaccum.accumulate import make_engine
    from jaxaccum.training import run

    run.use_compilation_cache()
    config = CONFIG.value
    source = run.open_source(config, "train")
    microbatch = config.microbatch
    print(
        f"{config.model}, {config.data.image_size} px, microbatch {microbatch}, bn_group "
        f"{config.bn_group}, {fields.dtype_of(config)}, "
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    )
    print(
        f"{'k':>3} {'one pass':>9} {'scan':>6} {'multisteps':>11} {'temporary memory of scan':>25}"
    )
    single = None
    for k in (int(text) for text in STEPS.value):
        print(f"compiling k = {k}", file=sys.stderr, flush=True)
        with config.unlocked():
            config.nbs, config.devices, config.steps = k * microbatch, 1, 10
        made = {}
        for engine in ("scan", "multisteps"):
            config.engine = engine
            this = run.prepare(config, names=source.names, samples=len(source), identity={})
            made[engine] = make_engine(this.forward, this.rule, this.window)
        batch = next(run.make_stream(this, source).windows(0, [config.nbs]))
        start = this.task.initialise(config.seed)
        states = {name: engine.init(*start) for name, engine in made.items()}
        placed = made["scan"].place(batch)
        compiled = made["scan"].lower(states["scan"], *placed).compile()
        one = jax.device_put(jax.tree.map(lambda a: a[:microbatch], batch))
        if single is None:  # the sums do not depend on the effective batch
            single = jax.jit(
                lambda p, s, b, this=this: this.rule.objective.sums(this.grouped, p, s, b)
            )
            single(*start, one)
        passes, ratios = [], {name: [] for name in made}
        for repeat in range(REPEATS.value + 1):
            alone = seconds(single, *start, one)
            for name, engine in made.items():
                begin = time.perf_counter()
                states[name], log = (
                    compiled(states[name], *placed)
                    if name == "scan"
                    else engine.update(states[name], batch)
                )
                jax.block_until_ready((states[name], log))
                if repeat:
                    ratios[name].append((time.perf_counter() - begin) / (k * alone))
            if repeat:
                passes.append(alone)
        memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
        print(
            f"{k:>3} {statistics.median(passes) * 1e3:>6.0f} ms "
            f"{statistics.median(ratios['scan']):>6.2f} "
            f"{statistics.median(ratios['multisteps']):>11.2f} {memory:>21.1f} MiB",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    app.run(main)
