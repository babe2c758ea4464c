"""Times each convolution of a detector and its two gradients alone: by XLA, oneDNN and PyTorch.

python scripts/convolutions.py --models=yolov8-n,yolo11-n [--size=320] [--batch=4]
    [--torch=DIR] [--torch_python=PYTHON] [--layers]

Prints a table for docs/profiles.md: milliseconds of all convolutions of a model, each as often as
the network has it, and what that is in GFLOP/s; with --layers also one for each shape. For a
CPU that has nothing else to do. PyTorch is given as for scripts/benchmark.py.
"""

from __future__ import annotations

import collections
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from benchmarks import harness

from jaxaccum import models
from jaxaccum.machine import onednn
from jaxaccum.models import ops

MODELS = flags.DEFINE_list("models", ["yolov8-n"], "names of detectors")
SIZE = flags.DEFINE_integer("size", 320, "side of the images in pixels")
BATCH = flags.DEFINE_integer("batch", 4, "images")
LAYERS = flags.DEFINE_bool("layers", False, "a table of each shape, too")
TORCH = flags.DEFINE_string("torch", "", "folder that PyTorch is installed in")
TORCH_PYTHON = flags.DEFINE_string(
    "torch_python", "", "Python that runs PyTorch; this one if empty"
)
PEER = Path(__file__).parent / "benchmarks" / "torch_convolutions.py"
ROUNDS = 12
PARTS = ("forward", "gradient of the input", "gradient of the kernel")


def layers(name: str) -> collections.Counter:
    """(shape of x, of the kernel, strides, pads, groups) of a model's convolutions, counted."""
    found: collections.Counter = collections.Counter()
    plain = ops.conv_general_dilated

    def noted(x, w, strides, padding, *more, feature_group_count=1, **options):
        found[
            x.shape, w.shape, tuple(strides), tuple(map(tuple, padding)), feature_group_count
        ] += 1
        return plain(
            x, w, strides, padding, *more, feature_group_count=feature_group_count, **options
        )

    model = models.create(name, num_classes=80)
    images = jax.ShapeDtypeStruct((BATCH.value, SIZE.value, SIZE.value, 3), jnp.float32)
    ops.conv_general_dilated = noted
    try:
        jax.eval_shape(model.init, jax.random.key(0), images)
    finally:
        ops.conv_general_dilated = plain
    return found


def milliseconds(function, *arguments) -> float:
    """Median of a few calls, after one that is not counted."""
    compiled = jax.jit(function)
    jax.block_until_ready(compiled(*arguments))
    found = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        found.append(time.perf_counter() - start)
    return statistics.median(found) * 1e3


def times(x_shape, w_shape, strides, pads, groups) -> list[float]:
    """Forward, gradient of the input and of the kernel, as the process computes them."""
    rng = np.random.default_rng(0)
    x, w = (np.float32(rng.standard_normal(shape)) for shape in (x_shape, w_shape))

    def forward(x, w):
        return ops.conv_general_dilated(x, w, strides, pads, feature_group_count=groups)

    dy = np.float32(rng.standard_normal(jax.eval_shape(forward, x, w).shape))
    return [
        milliseconds(forward, x, w),
        milliseconds(lambda x, w, dy: jax.vjp(lambda x: forward(x, w), x)[1](dy), x, w, dy),
        milliseconds(lambda x, w, dy: jax.vjp(lambda w: forward(x, w), w)[1](dy), x, w, dy),
    ]


def by_torch(shapes) -> list[list[float]] | None:
    """The same by PyTorch; None where there is none."""
    if not harness.torch_version(TORCH.value):
        return None
    command = [TORCH_PYTHON.value or sys.executable, str(PEER), TORCH.value, str(harness.cores())]
    done = subprocess.run(
        command, input=json.dumps(shapes), stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def operations(x_shape, w_shape, strides, pads, groups) -> float:
    """Additions and multiplications of one of the three."""
    del groups
    sides = [
        (n + sum(pad) - k) // s + 1
        for n, pad, k, s in zip(x_shape[1:3], pads, w_shape, strides, strict=False)
    ]
    return 2.0 * x_shape[0] * np.prod(sides) * np.prod(w_shape)


def main(_) -> None:
    print(f"{onednn.note()}; {SIZE.value} px, batch {BATCH.value}, {harness.cores()} cores")
    for name in MODELS.value:
        found = layers(name)
        shapes, counts = list(found), np.array(list(found.values()))[:, None]
        ways = {}
        with onednn.without():
            ways["XLA"] = [times(*shape) for shape in shapes]
        if onednn.version():
            ways["oneDNN"] = [times(*shape) for shape in shapes]
        if (peer := by_torch(shapes)) is not None:
            ways["PyTorch"] = peer
        work = np.array([operations(*shape) for shape in shapes])[:, None]
        print(f"\n| {name}, ms (GFLOP/s) | {' | '.join(ways)} |\n| --- |{' --- |' * len(ways)}")
        for part, told in enumerate(PARTS):
            cells = []
            for found_times in ways.values():
                total = float((np.array(found_times)[:, part : part + 1] * counts).sum())
                cells.append(f"{total:.1f} ({(work * counts).sum() / total / 1e6:.0f})")
            print(f"| {told} | {' | '.join(cells)} |", flush=True)
        if LAYERS.value:
            print(f"\n| x, kernel, stride | times | {' | '.join(ways)} |")
            print(f"| --- | --- |{' --- |' * len(ways)}")
            for i, (x, w, strides, _, _) in enumerate(shapes):
                cells = [
                    " / ".join(f"{work[i, 0] / t / 1e6:.0f}" for t in found_times[i])
                    for found_times in ways.values()
                ]
                place = f"{'x'.join(map(str, x))}, {'x'.join(map(str, w))}, {strides[0]}"
                print(f"| {place} | {counts[i, 0]} | {' | '.join(cells)} |")


if __name__ == "__main__":
    app.run(main)
