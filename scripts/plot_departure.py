"""How far accumulation is from the large batch as the microbatch shrinks: the usual rule and ours.

python scripts/plot_departure.py [--workdir=DIR] [--model=yolov8-n] [--size=96] [--orders=8]
    [--out=docs/images/departure.png]

Takes 8 embedded scenes with 0 to 7 objects and computes the gradient of one update in float64 on
the CPU: at once (microbatch 8), then over microbatches of 4, 2 and 1 by each rule. Prints and
draws the relative error |g - g8| / |g8|, the median over several orders of the same images. The
weights are a run's best if --workdir is given, and freshly drawn otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum import models
from jaxaccum.accumulate import Sums, grouped
from jaxaccum.accumulate.equivalence import distance
from jaxaccum.accumulate.terms import add
from jaxaccum.data import Augment, Scenes, TrainStream
from jaxaccum.machine import known_answers
from jaxaccum.tasks.detection import DetectionTask
from jaxaccum.training.inference import load
from jaxaccum.training.run import use_compilation_cache

PyTree = Any
COUNTS = tuple(range(8))  # objects in each image
SIZES = (8, 4, 2, 1)  # microbatches
GROUP = 2  # of our rule with batch statistics
USUAL_STATISTICS = "usual rule, batch statistics of each microbatch"
USUAL_FROZEN = "usual rule, batch norm frozen"
OURS_GROUP = f"ours, bn_group {GROUP}"
OURS_FROZEN = "ours, batch norm frozen"


def uneven_batch(size: int) -> dict[str, np.ndarray]:
    """One scene for each number of objects in COUNTS, as an effective batch."""
    source = Scenes("train")
    still = Augment(**dict.fromkeys((f.name for f in dataclasses.fields(Augment)), 0.0))
    stream = TrainStream(source, image_size=size, max_objects=8, augment=still, seed=0)
    order = stream.order(0)
    found: dict[int, int] = {}
    for position, index in enumerate(order):
        found.setdefault(len(source.objects(int(index))), position)
        if set(COUNTS) <= set(found):
            break
    samples = [stream.sample(found[count]) for count in COUNTS]
    return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}


class Gradients:
    """The gradient of one update by either rule; one compiled program per microbatch and group."""

    def __init__(self, task: DetectionTask, params: PyTree, stats: PyTree):
        self.task, self.params, self.stats = task, params, stats
        self.objective = task.objective(len(COUNTS))
        self._programs: dict[tuple[int, int | None], Any] = {}

    def ours(self, batch: PyTree, microbatch: int, group: int | None) -> PyTree:
        """Sums over all microbatches, then one division."""
        total: Sums | None = None
        for sums in self._sums(batch, microbatch, group):
            total = sums if total is None else add(total, sums)
        return self.objective.gradient(total)

    def usual(self, batch: PyTree, microbatch: int, group: int | None) -> PyTree:
        """Every microbatch divided by its own normaliser, times its samples, then added up."""
        own = dataclasses.replace(self.objective, scale=float(microbatch))
        total: PyTree = None
        for sums in self._sums(batch, microbatch, group):
            gradient = own.gradient(sums)
            total = gradient if total is None else add(total, gradient)
        return total

    def _sums(self, batch: PyTree, microbatch: int, group: int | None):
        key = microbatch, group
        if key not in self._programs:
            forward = grouped(self.task.forward, group)
            self._programs[key] = jax.jit(
                lambda params, stats, part: self.objective.sums(forward, params, stats, part)
            )
            print(f"compiling: microbatch {microbatch}, group {group}", file=sys.stderr, flush=True)
        for first in range(0, len(COUNTS), microbatch):
            part = jax.tree.map(lambda a, f=first: a[f : f + microbatch], batch)
            yield self._programs[key](self.params, self.stats, part)


def measure(gradients: Gradients, batch: PyTree, orders: int) -> dict[str, np.ndarray]:
    """Rule -> (orders, microbatches) relative errors; nan where the rule cannot run."""
    errors: dict[str, np.ndarray] = {
        name: np.full((orders, len(SIZES)), np.nan)
        for name in (USUAL_STATISTICS, USUAL_FROZEN, OURS_GROUP, OURS_FROZEN)
    }
    whole = SIZES[0]
    for row in range(orders):
        order = np.random.default_rng(row).permutation(len(COUNTS))
        shuffled = jax.tree.map(lambda a, o=order: a[o], batch)
        frozen = gradients.ours(shuffled, whole, None)
        shared = gradients.ours(shuffled, whole, whole)
        grouped = gradients.ours(shuffled, whole, GROUP)
        for column, size in enumerate(SIZES):
            found = {
                USUAL_STATISTICS: (gradients.usual(shuffled, size, size), shared),
                USUAL_FROZEN: (gradients.usual(shuffled, size, None), frozen),
                OURS_FROZEN: (gradients.ours(shuffled, size, None), frozen),
            }
            if size % GROUP == 0:
                found[OURS_GROUP] = (gradients.ours(shuffled, size, GROUP), grouped)
            for name, (gradient, reference) in found.items():
                errors[name][row, column] = distance(gradient, reference)
    return errors


def medians(errors: np.ndarray) -> np.ndarray:
    """Median over the orders; nan where there is none."""
    return np.asarray([np.nan if np.isnan(c).any() else np.median(c) for c in errors.T])


def table(errors: dict[str, np.ndarray]) -> str:
    """The medians as a Markdown table."""
    lines = [
        "| gradient of one update, microbatch: | " + " | ".join(map(str, SIZES)) + " |",
        "| --- |" + " --- |" * len(SIZES),
    ]
    for name, values in errors.items():
        cells = ["-" if np.isnan(v) else f"{v:.2g}" for v in medians(values)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(errors: dict[str, np.ndarray], path: Path, what: str) -> None:
    """The medians over the microbatch, with the range over the orders behind them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {
        USUAL_STATISTICS: "#b2182b", USUAL_FROZEN: "#e08214",
        OURS_GROUP: "#2166ac", OURS_FROZEN: "#1b7837",
    }  # fmt: skip
    markers = {
        USUAL_STATISTICS: "o", USUAL_FROZEN: "s", OURS_GROUP: "D", OURS_FROZEN: "o",
    }  # fmt: skip
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    places = np.arange(len(SIZES))
    for name, values in errors.items():
        middle = medians(values)
        seen = (middle > 0) & ~np.isnan(middle)  # zero at the whole batch, by definition
        x, low, high = places[seen], values[:, seen].min(axis=0), values[:, seen].max(axis=0)
        axes.fill_between(x, low, high, color=colours[name], alpha=0.15, linewidth=0)
        axes.plot(x, middle[seen], markers[name] + "-", color=colours[name], markersize=5)
        above = name in (USUAL_STATISTICS, OURS_GROUP)
        axes.annotate(
            name, (x[0], (high if above else low)[0]), xytext=(-4, 8 if above else -8),
            textcoords="offset points", va="bottom" if above else "top", color=colours[name],
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(1e-18, 1e2)
    axes.set_yticks([1e-15, 1e-12, 1e-9, 1e-6, 1e-3, 1])
    axes.set_xlim(-0.4, len(SIZES) - 0.6)
    axes.set_xticks(places, [f"{SIZES[0]}\n(the large batch)", *map(str, SIZES[1:])])
    axes.set_xlabel("microbatch, images")
    axes.set_title(f"Relative error of the gradient of one update\n{what}", loc="left", fontsize=10)
    axes.minorticks_off()
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, help="take the weights of this run")
    parser.add_argument("--model", default="yolov8-n", help="model, without a workdir")
    parser.add_argument("--size", type=int, default=96, help="image size in pixels")
    parser.add_argument("--orders", type=int, default=8, help="orders of the images to try")
    parser.add_argument("--out", type=Path, default=Path("docs/images/departure.png"))
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    use_compilation_cache()
    known_answers.require()

    if args.workdir:
        trained = load(args.workdir)
        if trained.names != Scenes.names:
            parser.error(f"{args.workdir} did not learn the embedded scenes")
        name, classes = trained.config.model, len(trained.names)
        origin = f"weights after {trained.step} updates"
    else:
        name, classes, origin = args.model, len(Scenes.names), "weights freshly drawn"
    model = models.create(name, num_classes=classes, dtype=jnp.dtype("float64"))
    task = DetectionTask(model, args.size)
    if args.workdir:
        params, stats = jax.tree.map(
            lambda a: np.asarray(a, np.float64), (trained.params, trained.stats)
        )
    else:
        params, stats = task.initialise(0, np.float64)

    errors = measure(Gradients(task, params, stats), uneven_batch(args.size), args.orders)
    what = (
        f"{name}, {args.size} px, {len(COUNTS)} scenes with {COUNTS[0]} to {COUNTS[-1]} objects, "
        f"float64, {origin}"
    )
    print(f"{what}; median of {args.orders} orders\n\n{table(errors)}\n")
    for rule, values in errors.items():
        if rule.startswith("ours"):
            print(f"{rule}: largest of all {np.nanmax(values):.1e}")
    draw(errors, args.out, what)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
