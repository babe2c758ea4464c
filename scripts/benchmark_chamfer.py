"""What the Chamfer loss costs: memory and time, against the naive form and against PyTorch.

python scripts/benchmark_chamfer.py [--memory=2] [--sizes=1024,2048,4096,8192] [--batch=1]
    [--tile=32] [--repeats=7]

Everything is the gradient of CD-L1 for both clouds, n points each.
(a) The largest power of two n whose gradient needs at most `memory` GiB of temporaries by XLA's
    memory analysis; nothing is run.
(b) Time of this form over that of the naive one, which holds all distances and is differentiated
    by JAX.
(c) Time of this form over that of PyTorch on the CPU, where it can be imported: nearest points by
    torch.cdist, all at once or by tiles, by a matrix product (fast, cancels) or by differences.
Times are the fastest of interleaved repeats in one process.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Threads of PyTorch that spin for their next work would take the cores from who is timed next.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

MEMORY = flags.DEFINE_float("memory", 2, "GiB of temporaries", lower_bound=0.001)
SIZES = flags.DEFINE_list("sizes", ["1024", "2048", "4096", "8192"], "points of each cloud")
BATCH = flags.DEFINE_integer("batch", 1, "samples", lower_bound=1)
TILE = flags.DEFINE_integer("tile", 32, "points compared at once on CPU", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 7, "interleaved repeats", lower_bound=1)
TORCH_TILE = 64  # rows of distances PyTorch holds by tiles; 256 and 1024 were slower
LARGEST = 2**26  # points at which (a) stops asking


def ours(a, b):
    from jaxaccum.losses import chamfer

    def root(square):
        return jnp.mean(jnp.sqrt(square))

    tile = TILE.value
    ab, ba = chamfer.nearest_squared(a, b, tile)[0], chamfer.nearest_squared(b, a, tile)[0]
    return (root(ab) + root(ba)) / 2


def naive(a, b):
    distance = jnp.sum((a[:, :, None] - b[:, None]) ** 2, axis=-1)
    return (jnp.mean(jnp.sqrt(distance.min(2))) + jnp.mean(jnp.sqrt(distance.min(1)))) / 2


def differentiated(loss):
    return jax.jit(jax.value_and_grad(loss, (0, 1)))


def temporaries(loss, n: int) -> int:
    """Bytes of temporaries of the gradient at n points."""
    cloud = jax.ShapeDtypeStruct((BATCH.value, n, 3), jnp.float32)
    compiled = differentiated(loss).lower(cloud, cloud).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def largest(loss, limit: float) -> tuple[int, int]:
    """The largest power of two that fits, and its bytes."""
    n, fits = 256, (0, 0)
    while n <= LARGEST:
        needed = temporaries(loss, n)
        if needed > limit:
            break
        fits = n, needed
        n *= 2
    return fits


def torch_forms() -> dict:
    """PyTorch's forms by name: each takes two tensors and gives loss and gradients."""
    import torch

    def by_indices(find):
        def step(a, b):
            a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
            with torch.no_grad():
                ia, ib = find(a, b)
            near = [
                torch.gather(points, 1, index[..., None].expand(-1, -1, 3))
                for points, index in ((b, ia), (a, ib))
            ]
            ab, ba = ((p - q).square().sum(-1) for p, q in zip((a, b), near, strict=True))
            loss = (ab.sqrt().mean() + ba.sqrt().mean()) / 2
            loss.backward()
            return loss, a.grad, b.grad

        return step

    def at_once(mode):
        def find(a, b):
            distance = torch.cdist(a, b, compute_mode=mode)
            return distance.min(2).indices, distance.min(1).indices  # argmin is slower

        return find

    def by_tiles(mode):
        def find(a, b):
            rows, least, column = [], torch.full(b.shape[:2], torch.inf), None
            for start in range(0, a.shape[1], TORCH_TILE):
                distance = torch.cdist(a[:, start : start + TORCH_TILE], b, compute_mode=mode)
                rows.append(distance.min(2).indices)
                value, place = distance.min(1)
                nearer = value < least
                column = place if column is None else torch.where(nearer, place + start, column)
                least = torch.where(nearer, value, least)
            return torch.cat(rows, 1), column

        return find

    modes = {
        "by products": "use_mm_for_euclid_dist",
        "by differences": "donot_use_mm_for_euclid_dist",
    }
    return {
        f"{how} {name}": by_indices(find(mode))
        for how, find in (("all at once", at_once), (f"tiles of {TORCH_TILE}", by_tiles))
        for name, mode in modes.items()
    }


def seconds(function, *args) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def fastest(calls: dict) -> dict[str, float]:
    """Seconds of each call by name, the fastest of interleaved repeats after a first one."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS.value + 1):
        for name, (function, *args) in calls.items():
            times[name].append(seconds(function, *args))
    return {name: min(values[1:]) for name, values in times.items()}


def difference(result, reference) -> float:
    """Largest difference of two gradients over the largest gradient."""
    return max(
        float(np.abs(np.asarray(g) - np.asarray(r)).max() / np.abs(np.asarray(r)).max())
        for g, r in zip(result, reference, strict=True)
    )


def main(_) -> int:
    sizes = [int(text) for text in SIZES.value]
    limit = MEMORY.value * 2**30
    print(
        f"gradient of CD-L1, batch {BATCH.value}, float32, tile {TILE.value}, "
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}"
    )
    print(f"(a) largest n = m within {MEMORY.value:g} GiB of temporaries")
    for name, loss in (("ours", ours), ("naive", naive)):
        n, needed = largest(loss, limit)
        at_least = "at least " if n == LARGEST else ""
        print(f"    {name:<6} {at_least}{n} ({needed / 2**20:.1f} MiB)", flush=True)

    rng = np.random.default_rng(0)
    pairs = {
        n: [rng.uniform(-0.5, 0.5, (BATCH.value, n, 3)).astype(np.float32) for _ in range(2)]
        for n in sizes
    }
    print("(b) milliseconds, where both fit")
    for n, pair in pairs.items():
        if temporaries(naive, n) > limit:
            print(f"    {n:>6}: the naive form needs more than {MEMORY.value:g} GiB")
            continue
        forms = {"ours": differentiated(ours), "naive": differentiated(naive)}
        took = fastest({name: (form, *pair) for name, form in forms.items()})
        apart = difference(forms["ours"](*pair)[1], forms["naive"](*pair)[1])
        print(
            f"    {n:>6}: ours {took['ours'] * 1e3:8.2f}   naive {took['naive'] * 1e3:8.2f}   "
            f"ours/naive {took['ours'] / took['naive']:.4f}   gradients differ by {apart:.1e}",
            flush=True,
        )

    try:
        import torch
    except ImportError:
        print(
            "(c) PyTorch is not installed; for the comparison: pip install torch "
            "--index-url https://download.pytorch.org/whl/cpu"
        )
        return 0
    print(
        f"(c) milliseconds against PyTorch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    for n, pair in pairs.items():
        form = differentiated(ours)
        tensors = [torch.from_numpy(cloud) for cloud in pair]
        others = torch_forms()
        took = fastest({"ours": (form, *pair)} | {k: (f, *tensors) for k, f in others.items()})
        print(f"    {n:>6}: ours {took['ours'] * 1e3:8.2f}", flush=True)
        gradient = form(*pair)[1]
        for name, other in others.items():
            apart = difference(gradient, other(*tensors)[1:])
            print(
                f"            {name:<30} {took[name] * 1e3:8.2f}   "
                f"ours/torch {took['ours'] / took[name]:.4f}   gradients differ by {apart:.1e}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    app.run(main)
