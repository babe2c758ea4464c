"""What to know of a device before one trusts it: a short training, the law, plans against what is
used, what its programs are made of, and where their time goes."""

from __future__ import annotations

import collections
import functools
import glob
import gzip
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import runs
from benchmarks.harness import Context, Found, Row, SkippedError, interleaved, ratio_row
from jaxaccum.accumulate import Geometry, equivalence
from jaxaccum.models import ops

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20

# Parts of the law: a dtype, then what is set for it. Trying algorithms out takes most of the time
# that XLA compiles for a GPU, and the law holds with any of them.
UNTRIED = "--xla_gpu_autotune_level=0"
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
EXACT = "--xla_allow_excess_precision=false"
LAWS = {
    "float64": UNTRIED, "float32": UNTRIED, "tf32": UNTRIED, "bfloat16": UNTRIED,
    "float32-tried": "", "float32-deterministic": DETERMINISTIC,
    "bfloat16-exact": f"{UNTRIED} {EXACT}",
}  # fmt: skip
TRAININGS = ("five", "whole")
PLANS = ("8", "16", "32", "16-remat", "largest")
PROGRAMS = {
    "yolov8-n.bfloat16": "", "yolov8-n.bfloat16.untried": UNTRIED, "yolov8-n.tf32": "",
    "yolo11-n.bfloat16": "", "yolov8-m.bfloat16": "",
}  # fmt: skip


def train(context: Context, part: str) -> Found:
    """The quickstart by its own command: "five" updates and a checkpoint, or the "whole" of it
    with its evaluations."""
    flags = ["--config.log.tensorboard=False"]
    if part == "five" or context.quick:
        flags += ["--config.steps=5", "--config.log.every=1", "--config.checkpoint.every=5"]
    if part == "five":
        flags += ["--config.eval.every=-1"]
    if context.quick:
        flags += [
            "--config.data.image_size=32", "--config.nbs=4", "--config.microbatch=4",
            "--config.bn_group=4", "--config.augment.close_mosaic=0",
        ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        command = [
            sys.executable, "-m", "jaxaccum.train", "--config=configs/quickstart.py",
            f"--workdir={workdir}", *flags,
        ]  # fmt: skip
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True)
        took = time.perf_counter() - start
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
        saved = sorted(int(p.name) for p in (workdir / "last").iterdir() if p.name.isdigit())
    losses = [line["loss"] for line in lines if "loss" in line]
    if not losses or not np.isfinite(losses).all() or not saved:
        raise RuntimeError(f"losses {losses}, checkpoints of updates {saved}")
    rows = [
        Row(
            f"quickstart, {part}: the command from start to end", took, "s",
            note=f"loss {losses[0]:.2f} to {losses[-1]:.2f}, checkpoints of updates {saved}",
        )
    ]  # fmt: skip
    scores = [line["mAP50"] for line in lines if "mAP50" in line]
    if scores:
        rows.append(Row("quickstart, whole: best mAP50", max(scores)))
    return Found("configs/quickstart.py", rows)


def law(context: Context, part: str) -> Found:
    """The first updates of one recipe on several geometries, one of them twice."""
    dtype = part.partition("-")[0]
    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    model = context.choose("small-t", "yolov8-n", "yolov8-n")
    size, nbs = context.choose((32, 6), (64, 18), (128, 18))
    large, little = context.choose((4, 2), (8, 2), (8, 2))
    updates = 3
    geometries = {
        "the same again": Geometry(large, 1, "scan"),
        f"microbatch {little}": Geometry(little, 1, "scan"),
        f"microbatch {little}, multisteps": Geometry(little, 1, "multisteps"),
    }

    def trace(geometry: Geometry) -> equivalence.Trace:
        this = runs.prepare(
            "detection", model, nbs=nbs, microbatch=geometry.microbatch, engine=geometry.engine,
            bn_group=2, data__image_size=size, data__max_objects=16, dtype=dtype, lr__base=1e-3,
        )  # fmt: skip
        batches = [runs.random_batch(this, seed=i) for i in range(updates)]
        params, stats = this.task.initialise(0, np.float64 if dtype == "float64" else np.float32)
        return equivalence.trace(
            this.forward, this.rule, this.recipe, geometry, params, stats,
            lambda: iter(batches), updates,
        )  # fmt: skip

    reference = trace(Geometry(large, 1, "scan"))
    rows = []
    exact = {"float64": equivalence.Tolerance.of(True), "float32": equivalence.Tolerance.of(False)}
    for name, geometry in geometries.items():
        this = trace(geometry)
        found = equivalence.differences(this, reference)
        within: tuple[str, float] | None = None
        if dtype in exact:
            within = ("<=", exact[dtype].gradient)
        rest = ", ".join(f"{k} {v:.1e}" for k, v in found.items() if k != "gradient")
        rows.append(Row(f"{part}, {name}: gradient", found["gradient"], target=within, note=rest))
        if name == "the same again":
            pairs = zip(jax.tree.leaves(this[:4]), jax.tree.leaves(reference[:4]), strict=True)
            same = [np.array_equal(a, b) for a, b in pairs]
            rows.append(
                Row(
                    f"{part}, {name}: arrays that are equal bit for bit", sum(same) / len(same),
                    note=f"{sum(same)} of {len(same)}",
                )
            )  # fmt: skip
    flags = LAWS[part] or "no flags of XLA"
    setting = f"{model}, {size} px, effective batch {nbs}, bn_group 2, {updates} updates"
    return Found(
        setting, rows,
        [f"{part}: {flags}. Relative to one run with microbatch {large}, all weights together."],
    )  # fmt: skip


def plans(context: Context, part: str) -> Found:
    """What was planned for a geometry, and what the device took; or the largest that is planned."""
    from jaxaccum import calibrate, plan
    from jaxaccum.plan.planner import Planner

    model = context.choose("small-t", "yolov8-n", "yolov8-n")
    size, group = context.choose((32, 2), (160, 8), (640, 8))
    dtype = context.choose("float32", "float32", "bfloat16")
    nbs = context.choose(8, 64, 64)
    if part == "largest":
        nbs = context.choose(8, 64, 1024)
    this = runs.prepare(
        "detection", model, nbs=nbs, microbatch=group, bn_group=group, dtype=dtype,
        data__image_size=size, data__max_objects=16, optimizer__name="adamw",
        optimizer__momentum=0.9,
    )  # fmt: skip
    names = [f"class {i}" for i in range(runs.CLASSES)]
    geometry = {"engine": "scan", "remat": "none"}
    if part == "largest":
        config = this.config.copy_and_resolve_references()
        with config.unlocked(), config.ignore_type():
            config.microbatch = "auto"
        config, lines = plan.settle(config, names=names, samples=10_000, target=plan.here())
        microbatch, geometry["remat"] = config.microbatch, config.remat
        geometry["engine"] = config.engine
    else:
        microbatch, lines = int(part.partition("-")[0]), []
        geometry["remat"] = "blocks" if part.endswith("remat") else "none"
    if context.warm:
        Planner(this.config, names=names, samples=10_000, target=plan.here(), cache=None).compiled(
            microbatch=microbatch, **geometry
        )  # type: ignore[arg-type]
    context.compiled()
    planned, used = calibrate.measure(this.config, names, 10_000, microbatch=microbatch, **geometry)
    row = Row(
        f"microbatch {part}: used / planned", used / planned, target=("<=", 1.1),
        note=f"{used / MIB:,.0f} of {planned / MIB:,.0f} MiB" + (
            f", {microbatch} images" if part == "largest" else ""
        ),
    )  # fmt: skip
    return Found(f"{model}, {size} px, effective batch {nbs}, AdamW, {dtype}", [row], lines)


CONVOLUTIONS = {
    "forward": r"__cudnn\$conv(?:Forward|BiasActivationForward)|__cudnn\$convForwardGraph",
    "gradient of the input": r"__cudnn\$convBackwardInput",
    "gradient of the kernel": r"__cudnn\$convBackwardFilter",
}


def program(context: Context, part: str) -> Found:
    """The compiled update of one microbatch: its operations counted, and its kernels by time."""
    model, dtype = part.split(".")[:2]
    size, count = context.choose((64, 2), (320, 4), (640, 16))
    model, dtype = context.choose(("small-t", "float32"), (model, "float32"), (model, dtype))
    this = runs.prepare(
        "detection", model, nbs=count, microbatch=count, bn_group=count, dtype=dtype,
        data__image_size=size, data__max_objects=16, ema__decay=0.0, lr__base=1e-4,
        optimizer__weight_decay=5e-4,
    )  # fmt: skip
    start = time.perf_counter()
    updates = runs.Updates(this)
    took = time.perf_counter() - start
    placed = updates.engine.place(updates.batch)
    compiled = updates.engine.lower(updates.state, *placed).compile()
    if context.warm:
        print(f"first update after {took:.1f} s")
    context.compiled()
    text = compiled.as_text()
    if context.keep is not None:
        with gzip.open(context.keep / f"{part}.hlo.gz", "wt") as file:
            file.write(text)
    rows = [Row(f"{part}: {name}", n) for name, n in counted(text).items()]
    rows.append(
        Row(f"{part}: first update", took, "s", note="its program compiled, or found in the cache")
    )
    cost = compiled.cost_analysis() or {}
    if isinstance(cost, list):
        cost = cost[0]
    rows.append(Row(f"{part}: floating-point operations", cost.get("flops", 0) / 1e9, "GFLOP"))
    rows.append(Row(f"{part}: bytes accessed", cost.get("bytes accessed", 0) / 1e9, "GB"))
    times = [updates.seconds(context.choose(1, 1, 5)) for _ in range(context.choose(1, 3, 5))]
    rows.append(
        Row(f"{part}: an update", 1e3 * statistics.median(times), "ms", low=1e3 * min(times),
            high=1e3 * max(times))
    )  # fmt: skip
    repeats = context.choose(1, 1, 3)
    kernels = traced(lambda: updates.seconds(repeats))
    notes = []
    if kernels:
        total = sum(kernels.values())
        kinds: collections.Counter[str] = collections.Counter()
        for name, seconds in kernels.items():
            kinds[kind_of(name)] += seconds
        for kind, seconds in kinds.most_common():
            rows.append(
                Row(f"{part}: kernels, {kind}", 1e3 * seconds / repeats, "ms",
                    note=f"{seconds / total:.0%} of the kernels' time")
            )  # fmt: skip
        longest = sorted(kernels.items(), key=lambda pair: -pair[1])[:15]
        notes.append(
            f"{part}, longest kernels: "
            + "; ".join(f"{name[:70]} {1e3 * s / repeats:.2f} ms" for name, s in longest)
        )
        if context.keep is not None:
            table = {
                name: 1e3 * s / repeats
                for name, s in sorted(kernels.items(), key=lambda pair: -pair[1])
            }
            (context.keep / f"{part}.kernels.json").write_text(json.dumps(table, indent=1))
    else:
        notes.append(f"{part}: the profiler saw no device of its own, so no kernels are listed")
    return Found(f"{size} px, batch {count}, SGD", rows, notes)


def counted(text: str) -> dict[str, int]:
    """Operations of an optimized HLO module that say how well it suits its device.

    A loop whose length XLA does not know makes the host wait for the device in every turn.
    """
    found = {
        f"convolutions, {name}": len(re.findall(rf'custom_call_target="{pattern}', text))
        for name, pattern in CONVOLUTIONS.items()
    }
    found["convolutions left to XLA"] = len(re.findall(r" convolution\(", text))
    found["products by a library"] = len(re.findall(r'custom_call_target="__cublas', text))
    found["fusions"] = len(re.findall(r" fusion\(", text))
    found["transposes"] = len(re.findall(r" transpose\(", text))
    found["copies"] = len(re.findall(r" copy(?:-start)?\(", text))
    loops = re.findall(r" while\(.*", text)
    found["loops"] = len(loops)
    found["loops of unknown length"] = sum("known_trip_count" not in line for line in loops)
    return found


KINDS = (
    ("copies between host and device", r"memcpy.*(h2d|d2h|htod|dtoh)"),
    ("copies", r"memcpy|memset|copy"),
    ("layouts of convolutions", r"nchwtonhwc|nhwctonchw|nchwToNhwc|transpose"),
    ("depthwise and grouped convolutions", r"depthwise|dgrad_?group|grouped|cudnn::.*conv2d_group"),
    (
        "convolutions and products",
        r"conv|cudnn|xmma|cutlass|gemm|wgrad|dgrad|fprop|sm90|sm80|nvjet",
    ),
    ("sums", r"reduce"),
    ("loops and others of XLA", r"loop|wrapped|input_|fusion|scatter|sort|select"),
)


def kind_of(kernel: str) -> str:
    """What a kernel does, told by its name."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS if re.search(words.lower(), name)), "others")


def traced(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of every kernel of a GPU while it does something, by name; empty without one."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            work()
        files = glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True)
        if not files:
            raise SkippedError("the profiler wrote nothing")
        kernels: collections.Counter[str] = collections.Counter()
        for plane in jax.profiler.ProfileData.from_file(files[0]).planes:
            if "/device:GPU" not in plane.name:
                continue
            for line in plane.lines:
                if "Stream" in line.name:
                    for event in line.events:
                        kernels[event.name] += event.duration_ns / 1e9
        return dict(kernels)


def depthwise(context: Context, part: str) -> Found:
    """Forward and backward of depthwise convolutions: the plain form and shifted multiply-adds."""
    del part
    shapes = context.choose(
        ((2, 8, 8, 16, 3),),
        ((4, 40, 40, 64, 3), (4, 20, 20, 128, 3)),
        ((16, 80, 80, 64, 3), (16, 40, 40, 128, 3), (16, 20, 20, 256, 3), (16, 20, 20, 128, 7)),
    )
    dtype = context.choose(jnp.float32, jnp.float32, jnp.bfloat16)
    rounds, calls = context.choose((2, 1), (5, 1), (7, 10))
    rows = []
    for n, height, width, channels, kernel in shapes:
        rng = np.random.default_rng(0)
        x, dy = (
            jnp.asarray(rng.normal(size=(n, height, width, channels)), dtype) for _ in range(2)
        )
        w = jnp.asarray(rng.normal(size=(kernel, kernel, 1, channels)), dtype)
        pads = ((kernel // 2, kernel // 2),) * 2

        def both(form, x=x, w=w, dy=dy, pads=pads, channels=channels):
            def run(x, w, dy):
                y, pull = jax.vjp(lambda x, w: form(x, w, pads, channels), x, w)
                return y, pull(dy)

            return jax.jit(run).lower(x, w, dy).compile()

        forms = {
            "plain": both(lambda x, w, p, c: ops._plain(x, w, (1, 1), p, None, groups=c)),
            "shifted": both(lambda x, w, p, c: ops._shifted(x, w, (1, 1), p)),
        }
        results = [jax.tree.leaves(form(x, w, dy)) for form in forms.values()]
        for a, b in zip(*results, strict=True):
            apart = equivalence.distance(a, b)
            if not apart < 0.05:
                raise RuntimeError(f"the two forms are {apart:.1e} apart")
        times = interleaved(
            {
                name: functools.partial(runs.seconds, form, x, w, dy, calls=calls)
                for name, form in forms.items()
            },
            rounds, warmup=2,
        )  # fmt: skip
        middle = {name: 1e3 * statistics.median(values) for name, values in times.items()}
        rows.append(
            ratio_row(
                f"{kernel} x {kernel}, {height} x {width} x {channels}: plain / shifted",
                times["plain"], times["shifted"],
                note=f"{middle['plain']:.3f} against {middle['shifted']:.3f} ms",
            )
        )  # fmt: skip
    return Found(f"batch {shapes[0][0]}, {jnp.dtype(dtype).name}", rows)
