"""What accumulation costs: time of an update, memory of more microbatches, what is held, and the
table of AdaPoinTr on smaller and smaller microbatches."""

from __future__ import annotations

import functools
import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from benchmarks import harness, runs
from benchmarks.harness import Context, Found, Row, interleaved, ratio_row
from jaxaccum.accumulate.recipe import Engine

PyTree = Any
MIB = 2**20
ENGINES: tuple[Engine, ...] = ("scan", "multisteps")


def update(context: Context, part: str) -> Found:
    """An update of 8 microbatches over 8 forward and backward passes of one microbatch."""
    del part
    k, calls = 8, context.choose(1, 1, 3)
    model = context.choose("small-t", "yolov8-n", "yolov8-n")
    size, microbatch = context.choose((32, 2), (160, 8), (640, 16))
    rounds = context.choose(2, 9, 9)
    dtype = context.choose("float32", "float32", "bfloat16")
    made = {
        engine: runs.Updates(
            runs.prepare(
                "detection", model, engine=engine, nbs=k * microbatch, microbatch=microbatch,
                bn_group=microbatch, data__image_size=size, data__max_objects=16, dtype=dtype,
            )
        )
        for engine in ENGINES
    }  # fmt: skip
    this, start = made["scan"].run, made["scan"].start
    one = jax.device_put(jax.tree.map(lambda a: a[:microbatch], made["scan"].batch))
    single = jax.jit(lambda p, s, b: this.rule.objective.sums(this.grouped, p, s, b))
    jax.block_until_ready(single(*start, one))
    # The samples of scan lie on the device, like those of the pass; multisteps brings its own.
    placed = made["scan"].engine.place(made["scan"].batch)
    scan = made["scan"].engine.lower(made["scan"].state, *placed).compile()

    context.compiled()

    def scanned():
        def step():
            made["scan"].state, log = scan(made["scan"].state, *placed)
            return made["scan"].state, log

        return runs.seconds(step, calls=calls)

    times = interleaved(
        {
            "pass": lambda: runs.seconds(single, *start, one, calls=k * calls) * k,
            "scan": scanned,
            "multisteps": lambda: made["multisteps"].seconds(calls),
        },
        rounds,
    )
    median = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    limits = {"scan": ("<=", context.choose(1.02, 1.02, 1.01)), "multisteps": None}
    rows = [
        ratio_row(
            f"{engine}, k = {k}: update / (k x forward and backward)", times[engine],
            times["pass"], target=limits[engine],
            note=f"{median[engine]:.0f} ms against {k} x {median['pass'] / k:.1f} ms",
        )
        for engine in ENGINES
    ]  # fmt: skip
    setting = f"{model}, {size} px, microbatch {microbatch}, SGD, average of weights, {dtype}"
    return Found(setting, rows)


def memory(context: Context, part: str) -> Found:
    """What the compiled update takes for 1 to 64 microbatches, and on a GPU what was allocated."""
    del part
    steps = context.choose((1, 2, 4), (1, 2, 4, 16, 64), (1, 2, 4, 8, 16, 32, 64))
    model = context.choose("small-t", "yolov8-n", "yolov8-n")
    size, microbatch = context.choose((32, 2), (160, 8), (640, 16))
    rows, notes = [], []
    for engine in ENGINES:
        planned, used = {}, {}
        for k in steps:
            this = runs.prepare(
                "detection", model, engine=engine, nbs=k * microbatch, microbatch=microbatch,
                bn_group=microbatch, data__image_size=size, data__max_objects=16,
                optimizer__name="adamw", optimizer__momentum=0.9,
            )  # fmt: skip
            planned[k] = _peak(this) - _batch_on_device(this)
            if context.platform == "gpu":
                used[k] = _allocated(this) - _batch_on_device(this)
        for what, found in (("compiled", planned), ("allocated", used)):
            if not found:
                continue
            later = [found[k] for k in steps if k > 1]
            rows.append(
                Row(
                    f"{engine}, {what}: largest / smallest, k = 2 to {steps[-1]}",
                    max(later) / min(later), target=("<=", 1.01),
                    note=", ".join(f"k {k}: {found[k] / MIB:.1f} MiB" for k in steps),
                )
            )  # fmt: skip
        held = _batch_on_device(this)
        notes.append(f"{engine}: samples on the device at k = {steps[-1]}: {held / MIB:.1f} MiB")
    notes.append(
        "Of the program that needs most: arguments + outputs - aliased + temporaries, without the "
        "samples, which scan holds all at once and multisteps one microbatch at a time. multisteps "
        "holds its accumulator between microbatches, scan within the update."
    )
    if context.platform == "gpu":
        notes.append(
            "Allocated: the highest that JAX's allocator has seen up to and with that k, samples "
            "on the device taken off; it does not fall again within a process."
        )
    setting = f"{model}, {size} px, microbatch {microbatch}, AdamW, average of weights, float32"
    return Found(setting, rows, notes)


def _programs(this) -> list[Any]:
    """The compiled programs' accounts of an update."""
    samples = this.window.steps * this.window.geometry.microbatch
    lowered = runs.engine_of(this).lowered(runs.state_of(this), this.task.example(samples))
    return [program.compile().memory_analysis() for program in lowered]


def _peak(this) -> int:
    """Bytes of the program that needs most."""
    return max(
        m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        + m.temp_size_in_bytes
        for m in _programs(this)
    )  # fmt: skip


def _batch_on_device(this) -> int:
    """Bytes of samples that are on the device at once."""
    scan = this.window.geometry.engine == "scan"
    count = this.window.geometry.microbatch * (this.window.steps if scan else 1)
    return runs.bytes_of(this.task.example(count))


def _allocated(this) -> int:
    """The highest use of the device's memory so far, after two updates of a run."""
    updates = runs.Updates(this)
    updates.seconds()
    statistics_ = jax.local_devices()[0].memory_stats()
    if not statistics_:
        raise RuntimeError("this device does not say how much memory is in use")
    return statistics_["peak_bytes_in_use"]


def state(context: Context, part: str) -> Found:
    """What AdamW with an average of the weights holds, in units of the parameters."""
    del part
    model = context.choose("small-t", "yolov8-n", "yolov8-n")
    size, microbatch = context.choose((32, 2), (64, 4), (640, 16))
    rows, notes = [], []
    for engine in ENGINES:
        this = runs.prepare(
            "detection", model, engine=engine, nbs=2 * microbatch, microbatch=microbatch,
            bn_group=microbatch, data__image_size=size, data__max_objects=16,
            optimizer__name="adamw", optimizer__momentum=0.9,
        )  # fmt: skip
        held = runs.state_of(this)
        unit = runs.bytes_of(held.params)
        # Parameters, two moments, the average; running statistics twice.
        floor = (4 * unit + 2 * runs.bytes_of(held.stats)) / unit
        if engine == "multisteps":  # and the accumulator, with the moments of batch norm
            one = this.task.example(microbatch)
            sums_of = functools.partial(this.rule.objective.sums, this.grouped)
            sums = jax.eval_shape(sums_of, held.params, held.stats, one)
            floor += runs.bytes_of(sums) / unit
        closing = _programs(this)[-1]
        batch = _batch_on_device(this)
        argument = (closing.argument_size_in_bytes - batch) / unit
        aliased = closing.alias_size_in_bytes / unit
        fresh = (closing.output_size_in_bytes - closing.alias_size_in_bytes) / unit
        live, deleted = _live(this, unit)
        at_floor = ("<=", round(floor + 0.005, 3))
        rows += [
            Row(f"{engine}: arguments of the update", argument, "x parameters", target=at_floor,
                note=f"{floor:.3f} is the least; parameters are {unit / MIB:.1f} MiB"),
            Row(f"{engine}: of these aliased by results", aliased / argument, target=(">=", 0.999)),
            Row(f"{engine}: results beside these", fresh, "x parameters", target=("<=", 0.001)),
            Row(f"{engine}: arrays alive after two updates", live, "x parameters", target=at_floor),
        ]  # fmt: skip
        notes.append(f"{engine}: arrays of the state given to an update are deleted: {deleted}")
    notes.append(
        "The least: parameters, two moments of AdamW, the average (4), running statistics and "
        "their average; with multisteps also the accumulator. scan has its accumulator within the "
        "update, among the temporaries."
    )
    return Found(f"{model}, AdamW, average of weights, float32", rows, notes)


def _live(this, unit: int) -> tuple[float, bool]:
    """Bytes of the arrays that JAX knows after two updates, in units, and whether the state that
    went into the last one is gone."""
    before = {id(a) for a in jax.live_arrays()}
    updates = runs.Updates(this)
    given = jax.tree.leaves(updates.state)
    updates.seconds()
    gone = all(a.is_deleted() for a in given)
    del given
    total = sum(a.nbytes for a in jax.live_arrays() if id(a) not in before)
    return total / unit, gone


def geometries(context: Context, part: str) -> Found:
    """AdaPoinTr's effective batch of 48 as 48 x 1, 16 x 3, 8 x 6 and 4 x 12."""
    del part
    model = context.choose("adapointr-small", "adapointr-small", "adapointr-projected")
    nbs, sizes, group = context.choose(
        (4, (4, 2), 2), (48, (48, 16, 8, 4), 4), (48, (48, 16, 8, 4), 4)
    )
    rounds = context.choose(1, 3, 5)
    dtype = context.choose("float32", "float32", "tf32")

    def make(microbatch: int) -> tuple[runs.Updates, int]:
        this = runs.prepare(
            "completion", model, nbs=nbs, microbatch=microbatch, bn_group=group, dtype=dtype
        )
        return runs.Updates(this), _peak(this)

    with ThreadPoolExecutor(min(len(sizes), harness.cores())) as pool:  # compile side by side
        found = dict(zip((f"{m} x {nbs // m}" for m in sizes), pool.map(make, sizes), strict=True))
    context.compiled()
    made = {name: updates for name, (updates, _) in found.items()}
    peaks = {name: peak for name, (_, peak) in found.items()}
    times = interleaved({name: updates.seconds for name, updates in made.items()}, rounds)
    first = next(iter(made))
    goals = dict(zip(list(made)[1:], ((98, 37), (93, 20), (85, 12)), strict=False))
    rows = [
        Row(f"{first}: throughput", nbs / statistics.median(times[first]), "clouds/s"),
        Row(f"{first}: memory", peaks[first] / MIB, "MiB"),
    ]
    for name, (throughput, share) in goals.items():
        rows.append(
            ratio_row(
                f"{name}: throughput, {first} = 100", times[first], times[name], 100, unit="%",
                target=(">=", throughput),
            )
        )  # fmt: skip
        rows.append(
            Row(
                f"{name}: memory, {first} = 100", 100 * peaks[name] / peaks[first], "%",
                target=("<=", share), note=f"{peaks[name] / MIB:.0f} MiB",
            )
        )  # fmt: skip
    points = made[first].run.task.model.num_points
    notes = [
        "Memory is the compiler's account of the whole update: state and samples included. The "
        "guide that this table is from has 100 / 83 / 71 / 56 % and 22 / 10 / 7 / 5 GB."
    ]
    if model != "adapointr-projected":
        notes.append("The small network of the quickstart: the full one takes minutes here.")
    return Found(f"{model}, {points} points, bn_group {group}, AdamW, {dtype}", rows, notes)


def groups(context: Context, part: str) -> Found:
    """Batch statistics over the whole effective batch, in small microbatches: time and memory
    beside those of groups that fit into the microbatch."""
    del part
    model = context.choose("small-t", "yolov8-n", "yolov8-m")
    size, microbatch, nbs = context.choose((32, 2, 4), (320, 8, 32), (640, 8, 64))
    rounds = context.choose(2, 7, 7)
    dtype = context.choose("float32", "float32", "bfloat16")
    ways: dict[str, dict[str, Any]] = {
        f"groups of {microbatch}": {"bn_group": microbatch},
        "all, in time": {"bn_group": "all"},
        "all, in time, blocks recomputed": {"bn_group": "all", "remat": "blocks"},
    }
    if context.platform != "cpu":  # whose memory is the host's
        ways["all, in time, on the host"] = {"bn_group": "all", "remat": "host"}
    made = {
        name: runs.Updates(
            runs.prepare(
                "detection", model, nbs=nbs, microbatch=microbatch, data__image_size=size,
                data__max_objects=16, dtype=dtype, **fields,
            )
        )
        for name, fields in ways.items()
    }  # fmt: skip
    context.compiled()
    accounts = {}
    for name, updates in made.items():
        (program,) = updates.engine.lowered(
            runs.state_of(updates.run), updates.run.task.example(nbs)
        )
        accounts[name] = program.compile().memory_analysis()
    times = interleaved({name: updates.seconds for name, updates in made.items()}, rounds)
    plain = next(iter(ways))
    rows = []
    for name, account in accounts.items():
        host = account.host_temp_size_in_bytes
        rows.append(
            Row(
                f"{name}: temporary memory", account.temp_size_in_bytes / MIB, "MiB",
                note=f"and {host / MIB:.0f} of the host's" if host else "",
            )
        )  # fmt: skip
        if name != plain:
            rows.append(
                ratio_row(
                    f"{name}: time / {plain}", times[name], times[plain],
                    target=("<=", 1.6) if name == "all, in time" else None,
                    note=f"{1e3 * statistics.median(times[name]):.0f} against "
                    f"{1e3 * statistics.median(times[plain]):.0f} ms",
                )
            )  # fmt: skip
    return Found(
        f"{model}, {size} px, effective batch {nbs}, microbatch {microbatch}, {dtype}", rows,
        [times.words()],
    )  # fmt: skip
