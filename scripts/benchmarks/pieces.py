"""Parts of losses and networks by themselves: farthest points, neighbours, Chamfer, assigner."""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import runs
from benchmarks.harness import Context, Found, Peer, Row, SkippedError, interleaved, ratio_row
from jaxaccum.losses import chamfer, detection
from jaxaccum.models import points, yolo

OPERATIONS = ("farthest", "nearest", "chamfer")
MIB = 2**20


def points_(context: Context, operation: str) -> Found:
    """Farthest points, nearest neighbours, and the gradient of CD-L1, against other ways."""
    n, number, batch = {
        "farthest": context.choose((256, 32, 2), (2048, 512, 4), (2048, 512, 48)),
        "nearest": context.choose((256, 8, 2), (2048, 16, 4), (2048, 16, 48)),
        "chamfer": context.choose((256, 0, 2), (8192, 0, 2), (8192, 0, 16)),
    }[operation]
    rounds, calls = context.choose((2, 1), (7, 1), (9, 10))
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(-0.5, 0.5, (batch, n, 3)).astype(np.float32) for _ in range(2))
    ours, arguments = _ours(operation, number), (a,) if operation == "farthest" else (a, b)
    placed = jax.device_put(arguments)
    result = np.asarray(ours(*placed))

    def compare(name: str, other: np.ndarray) -> None:
        """Refuses another result; rounding decides what is nearest in a few cases."""
        if operation == "nearest":
            same = np.mean(np.sort(other, -1) == np.sort(result, -1))
        elif operation == "farthest":
            same = np.mean(other == result)
        else:
            close = np.abs(other - result) <= 1e-4 * np.abs(result).max()
            same = np.mean(close)
        if same < 0.98:
            raise RuntimeError(f"{operation}: {name} agrees with ours in {same:.1%} only")

    calls_: dict[str, Callable[[], float]] = {
        "ours": lambda: runs.seconds(ours, *placed, calls=calls)
    }
    for name, function in _on_host(operation, number, context.platform).items():
        compare(name, function(*arguments))
        calls_[name] = functools.partial(_host_seconds, function, arguments)
    notes = []
    try:
        peer = Peer.torch(context)
    except SkippedError as reason:
        if len(calls_) == 1:
            raise
        notes.append(f"Not compared with PyTorch. {reason}")
        times = interleaved(calls_, rounds)
    else:
        with peer, tempfile.TemporaryDirectory() as folder:
            clouds, answer = Path(folder) / "clouds.npz", Path(folder) / "result.npy"
            np.savez(clouds, a=a, b=b)
            for form in _forms(operation, context.platform):
                peer.ask(
                    "make", case=form, kind="points", operation=operation, form=form,
                    file=str(clouds), number=number,
                )  # fmt: skip
                peer.ask("result", case=form, path=str(answer))
                compare(form, np.load(answer))
                calls_[f"PyTorch {form}"] = functools.partial(peer.seconds, form, calls)
            times = interleaved(calls_, rounds)
    own = 1e3 * statistics.median(times["ours"])
    rows = [
        ratio_row(
            f"{operation}: {name} / ours", values, times["ours"],
            note=f"{1e3 * statistics.median(values):.1f} against {own:.1f} ms",
        )
        for name, values in times.items()
        if name != "ours"
    ]  # fmt: skip
    what = {
        "farthest": f"{number} farthest of {n} points",
        "nearest": f"{number} nearest of {n} points to each of {n}",
        "chamfer": f"gradient of CD-L1 for both clouds of {n} points",
    }[operation]
    return Found(f"{what}, batch {batch}, float32", rows, notes)


def _ours(operation: str, number: int) -> Callable[..., Any]:
    if operation == "farthest":
        return lambda a: points.farthest_points(a, number)
    if operation == "nearest":
        return lambda a, b: points.nearest(a, b, number)

    def gradient(a, b):
        pair = jax.grad(lambda a, b: chamfer.chamfer_l1(a, b).sum(), (0, 1))(a, b)
        return jnp.concatenate(pair, axis=1)

    return jax.jit(gradient)


def _forms(operation: str, platform: str) -> tuple[str, ...]:
    """How PyTorch does it, see `torch_points.forms`."""
    if operation == "farthest":
        return ("loop",)
    if operation == "nearest":
        return ("cdist", "by products")
    rows = 64 if platform == "cpu" else 1024
    return tuple(
        f"{how} {mode}"
        for how in (f"tiles of {rows}", "all at once")
        for mode in ("by products", "by differences")
    )


def _host_seconds(function: Callable, arguments: tuple) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def _on_host(operation: str, number: int, platform: str) -> dict[str, Callable[..., np.ndarray]]:
    """Ways without PyTorch: trees of SciPy, on all processors, and where that is a CPU the plain
    way in JAX."""
    from scipy.spatial import cKDTree

    def nearest(a, b):
        pairs = zip(a, b, strict=True)
        return np.stack([cKDTree(y).query(x, number, workers=-1)[1] for x, y in pairs])

    def half(x, y):
        """Gradient of mean distances of x to y, with respect to both."""
        distance, index = cKDTree(y).query(x, workers=-1)
        pull = (x - y[index]) / (np.maximum(distance, 1e-30)[:, None] * len(x) * 2)
        other = np.zeros_like(y)
        np.add.at(other, index, -pull)
        return pull, other

    def gradient(a, b):
        pairs = []
        for x, y in zip(a, b, strict=True):
            (own, other), (back, forth) = half(x, y), half(y, x)
            pairs.append(np.concatenate([own + forth, other + back]))
        return np.stack(pairs)

    @jax.jit
    def of_all(a, b):
        distance = jnp.square(a[:, :, None] - b[:, None]).sum(-1)
        return jax.lax.top_k(-distance, number)[1]

    if operation == "nearest":
        plain = {"JAX's top_k of all": lambda a, b: np.asarray(of_all(a, b))}
        return {"SciPy cKDTree": nearest} | (plain if platform == "cpu" else {})
    return {"SciPy cKDTree": gradient} if operation == "chamfer" else {}


def assigner(context: Context, part: str) -> Found:
    """Time and temporary memory of the assigner at 1, 100 and 1000 objects an image."""
    del part
    size, images = context.choose((64, 2), (640, 8), (640, 32))
    counts = context.choose((1, 20), (1, 100, 1000), (1, 100, 1000))
    rounds, calls = context.choose((2, 1), (7, 1), (9, 10))
    anchors = yolo.anchors(size, size, (8, 16, 32))
    centres = anchors.centres * anchors.strides[:, None]
    rng = np.random.default_rng(0)
    scores = rng.normal(-4, 1, (images, len(centres), runs.CLASSES)).astype(np.float32)
    reach = rng.uniform(0.02, 0.15, (images, len(centres), 2)) * size
    boxes = np.concatenate([centres - reach, centres + reach], -1).astype(np.float32)

    def targets(count: int, room: int) -> detection.Targets:
        corners = rng.uniform(0, 0.9 * size, (images, room, 2))
        sides = rng.uniform(0.02, 0.1, (images, room, 2)) * size
        valid = np.broadcast_to(np.arange(room) < count, (images, room))
        return detection.Targets(
            jnp.asarray(np.concatenate([corners, corners + sides], -1), jnp.float32),
            jnp.asarray(rng.integers(0, runs.CLASSES, (images, room)), jnp.int32),
            jnp.asarray(valid), jnp.ones(images),
        )  # fmt: skip

    predicted = jax.device_put((scores, boxes, centres))
    assign = jax.jit(functools.partial(detection.assign, smallest=16.0))
    temporary, calls_ = {}, {}
    most = counts[-1]
    for count, room in [*((count, count) for count in counts), (1, most)]:
        name = f"{count}" if count == room else f"{count} in room for {room}"
        given = targets(count, room)
        compiled = assign.lower(*predicted, given).compile()
        temporary[name] = compiled.memory_analysis().temp_size_in_bytes
        compiled(*predicted, given)
        calls_[name] = functools.partial(runs.seconds, compiled, *predicted, given, calls=calls)
    times = interleaved(calls_, rounds)
    rows = [
        Row(f"objects an image: {name}", 1e3 * statistics.median(values), "ms",
            low=1e3 * min(values), high=1e3 * max(values),
            note=f"temporaries {temporary[name] / MIB:.1f} MiB")
        for name, values in times.items()
    ]  # fmt: skip
    before, last = str(counts[-2]), str(most)
    more = most / counts[-2]
    rows += [
        ratio_row(f"time of {last} objects / {before}", times[last], times[before],
                  target=("<=", more), note=f"{more:g} would be linear"),
        Row(f"temporaries of {last} objects / {before}", temporary[last] / temporary[before],
            target=("<=", more)),
    ]  # fmt: skip
    return Found(f"{images} images of {size} px, {len(centres)} anchors, 80 classes", rows)
