"""What a coupled term costs, and what accumulating it naively would compute instead.

python scripts/benchmark_coupled.py --config=FILE[:arg] [--steps=8] [--repeats=5] [--naive]
    [--config.key=value ...]

Time and temporary memory of an update of that many microbatches with the config's alignment term
over one without it, and of a single forward pass over the latter: medians of interleaved ratios.
With --naive also, for microbatches of 1, 2, 4, ... of the same effective batch: how far the
gradient of a contrast within microbatches is from that of the whole, and the loss that it would
report (in float64 with JAX_ENABLE_X64=1 and --config.dtype=float64).
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "of a run with captions", lock_config=True)
STEPS = flags.DEFINE_integer("steps", 8, "microbatches of an update", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 5, "interleaved repeats", lower_bound=1)
NAIVE = flags.DEFINE_bool("naive", False, "compare with contrasts within microbatches")
flags.mark_flag_as_required("config")


def main(_) -> int:
    logging.set_verbosity(logging.ERROR)
    from jaxaccum.accumulate import make_engine
    from jaxaccum.training import run

    run.use_compilation_cache()
    config = CONFIG.value
    with config.unlocked():
        config.devices, config.engine, config.steps = 1, "scan", 10
        config.nbs = STEPS.value * config.microbatch
    source = run.open_source(config, "train")
    this = run.prepare(config, names=source.names, samples=len(source), identity={})
    if this.task.alignment is None:
        raise SystemExit("the config has no text.point_encoder, so no coupled term")
    batch = next(run.make_stream(this, source).windows(0, [config.nbs]))
    dtype = np.float64 if jax.config.read("jax_enable_x64") else np.float32
    params, stats = this.task.initialise(config.seed, dtype)
    stats, _ = this.task.load_frozen(config, stats)
    print(
        f"{config.model}, {config.text.point_encoder}, {this.window}, {config.dtype}, "
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    )
    measure_cost(this, make_engine, params, stats, batch)
    if NAIVE.value:
        measure_departure(this, params, stats, batch)
    return 0


def measure_cost(this, make_engine, params, stats, batch) -> None:
    plain = dataclasses.replace(this.task, alignment=None)
    made, states, compiled = {}, {}, {}
    for name, task in (("without", plain), ("with", this.task)):
        rule = dataclasses.replace(this.rule, objective=task.objective(this.recipe.nbs))
        made[name] = make_engine(task.forward, rule, this.window)
        states[name] = made[name].init(params, stats)
        placed = made[name].place(batch)
        compiled[name] = made[name].lower(states[name], *placed).compile()
    microbatch = this.window.geometry.microbatch
    one = jax.device_put(jax.tree.map(lambda a: a[:microbatch], batch))
    from jaxaccum.accumulate import grouped

    plain = grouped(plain.forward, this.recipe.group)
    forward = jax.jit(lambda p, s, b: plain(p, s, b).numerators)
    jax.block_until_ready(forward(params, stats, one))
    seconds: dict[str, list[float]] = {"without": [], "with": [], "forward": []}
    for repeat in range(REPEATS.value + 1):
        for name in ("without", "with", "forward"):
            begin = time.perf_counter()
            if name == "forward":
                jax.block_until_ready(forward(params, stats, one))
            else:
                states[name], log = compiled[name](states[name], *placed)
                jax.block_until_ready((states[name], log))
            if repeat:
                seconds[name].append(time.perf_counter() - begin)
    ratio = statistics.median(
        b / a for a, b in zip(seconds["without"], seconds["with"], strict=True)
    )
    share = statistics.median(
        STEPS.value * f / a for a, f in zip(seconds["without"], seconds["forward"], strict=True)
    )
    memory = {k: c.memory_analysis().temp_size_in_bytes / 2**20 for k, c in compiled.items()}
    print(
        f"update without the term {statistics.median(seconds['without']):.2f} s, with it "
        f"{ratio:.2f} times as long; one more forward pass would be {1 + share:.2f}"
    )
    print(
        f"temporary memory {memory['without']:.0f} MiB without, {memory['with']:.0f} MiB with "
        f"({memory['with'] / memory['without']:.2f})"
    )


def measure_departure(this, params, stats, batch) -> None:
    """Contrast alone: gradients of parts of the effective batch, averaged, against the whole."""
    from jaxaccum.losses import alignment
    from jaxaccum.tasks.completion import captioned

    count = len(batch["weight"])

    @jax.jit
    def contrast(params, stats, batch, part):
        def loss(params):
            features = this.grouped(params, stats, batch).features
            scale = params[captioned.MODULE]["logit_scale"]
            cosines, _ = alignment.similarities(
                features["cloud"], features["text"], jnp.ones(count)
            )
            own = jnp.eye(count, dtype=bool)
            apart = features["caption"][:, None] != features["caption"]
            counts = (apart & (part[:, None] == part)) | own
            logits = jnp.exp(scale) * cosines
            both = sum(
                jax.nn.logsumexp(jnp.where(counts, m, -jnp.inf), axis=1) for m in (logits, logits.T)
            )
            return jnp.mean(both - 2 * jnp.diagonal(logits)) / 2

        return jax.value_and_grad(loss)(params)

    def flat(tree):
        return np.concatenate([np.ravel(np.asarray(a, np.float64)) for a in jax.tree.leaves(tree)])

    def parts(size):
        return jnp.asarray(np.arange(count) // size, jnp.float32)

    whole_loss, whole = contrast(params, stats, batch, parts(count))
    whole = flat(whole)
    print(f"contrast over the effective batch of {count}: loss {float(whole_loss):.4f}")
    size = 1
    while size < count:
        value, gradient = contrast(params, stats, batch, parts(size))
        gradient = flat(gradient)
        error = np.linalg.norm(gradient - whole) / np.linalg.norm(whole)
        norm = np.linalg.norm(gradient)
        angle = gradient @ whole / norm / np.linalg.norm(whole) if norm else float("nan")
        print(
            f"  within microbatches of {size:>2}: loss {float(value):.4f}, gradient off by "
            f"{error:.3f} of its norm, cosine {angle:.3f}",
            flush=True,
        )
        size *= 2


if __name__ == "__main__":
    app.run(main)
