"""Training steps against plain PyTorch: detectors and AdaPoinTr.

Both sides compute the same update of the same weights on the same random batch: forward, loss,
backward, clipping and optimizer, the batch's way to the device included. Before anything is timed
the terms of their first losses are compared.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import runs
from benchmarks.harness import NARROW, Context, Found, Peer, Row, interleaved, is_narrow, ratio_row
from jaxaccum.weights import transfer as weights

MODELS = (
    "yolov8-n", "yolov8-s", "yolov8-m", "yolo11-n", "yolo11-s", "yolo11-m", "yolo12-n",
    "yolo26-n",
)  # fmt: skip
# float32 on a CPU and bfloat16 on a GPU; there also with products that may be rounded.
TF32 = tuple(f"{model}.tf32" for model in MODELS)
YOLO = MODELS + TF32
AGREE = {"float32": 1e-3, "tf32": 2e-2, "bfloat16": 1e-1}  # largest relative difference of a loss


def yolo(context: Context, part: str) -> Found:
    """Images per second of a detector."""
    model, _, given = part.partition(".")
    size, count = context.choose((64, 2), (320, 4), (640, 16))
    rounds = context.choose(2, {"n": 7, "s": 5, "m": 4}[model[-1]], 7)
    rows, notes = [], []
    for precision, variants in _variants(context, images=True, only=given or "bfloat16"):
        this = runs.prepare(
            "detection", model, nbs=count, microbatch=count, bn_group=count, dtype=precision,
            data__image_size=size, data__max_objects=16, ema__decay=0.0, lr__base=1e-4,
            optimizer__weight_decay=5e-4,
        )  # fmt: skip
        anchors = this.task.anchors
        arrays = {"centres": anchors.centres, "strides": anchors.strides}
        terms = tuple(term.name for term in this.rule.objective.terms)
        found, more = _compare(
            context, "yolo", this, arrays, terms, precision, variants, rounds,
            model=model, classes=runs.CLASSES,
        )  # fmt: skip
        rows += found
        notes += more
    return Found(f"{size} px, batch {count}, 8 objects an image, SGD", rows, notes)


def adapointr(context: Context, part: str) -> Found:
    """Clouds per second of AdaPoinTr."""
    del part
    model = context.choose("adapointr-small", "adapointr-projected", "adapointr-projected")
    count, rounds = context.choose((2, 2), (4, 5), (16, 7))
    rows, notes = [], []
    for precision, variants in _variants(context, images=False):
        this = runs.prepare(
            "completion", model, nbs=count, microbatch=count, bn_group=count, dtype=precision
        )
        batch = runs.random_batch(this)
        noise = this.task.noise(batch["epoch"], batch["index"], np.float32)
        table = this.task.model.table
        found, more = _compare(
            context, "adapointr", this, {"noise": np.asarray(noise)},
            ("coarse", "fine", "denoise"), precision, variants, rounds,
            table={
                "queries": table.queries, "points": table.points_per_query,
                "centres": table.centres, "encoder": len(table.encoder),
                "decoder": len(table.decoder_self), "width": table.width, "heads": table.heads,
                "everywhere": table.global_width, "neighbours": table.neighbours,
            },
        )  # fmt: skip
        rows += found
        notes += more
    points = this.task.model.num_points
    return Found(f"{model}, {points} points, batch {count}, AdamW", rows, notes)


def _variants(
    context: Context, images: bool, only: str = ""
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Precisions, and for each how PyTorch is run; formats of images only where some are."""
    plain: dict[str, Any] = {}
    last = {"channels_last": True} if images else {}
    compiled = {**last, "compiled": True}
    if context.platform == "cpu":
        return [("float32", [plain, last] if images and not context.quick else [plain])]
    every = [("tf32", [last, compiled]), ("bfloat16", [last, compiled])]
    return [(name, ways) for name, ways in every if only in ("", name)]


def _words(variant: dict[str, Any]) -> str:
    words = [key.replace("_", " ") for key, value in variant.items() if value]
    return ", ".join(words) or "plain"


def _compare(
    context: Context, kind: str, this, arrays: dict[str, np.ndarray], terms: tuple[str, ...],
    precision: str, variants: list[dict[str, Any]], rounds: int, **options: Any,
) -> tuple[list[Row], list[str]]:  # fmt: skip
    """Rows of one precision: our updates against the fastest way to run PyTorch's."""
    steps = context.choose(1, 1, 10)
    unit = this.task.unit
    names = {_words(variant): variant for variant in variants}
    with Peer.torch(context) as peer, tempfile.TemporaryDirectory() as folder:
        params, stats = this.task.initialise(0)
        batch = runs.random_batch(this)
        file = Path(folder) / "case.npz"
        given = weights.to_reference(params) | weights.to_reference(stats)
        np.savez(
            file, **arrays, **batch, **{f"weight:{key}": a for key, a in given.items()}
        )  # fmt: skip
        for name, variant in names.items():  # both sides compile at once
            peer.begin(
                "make", case=name, kind=kind, file=str(file), precision=precision,
                **variant, **options,
            )  # fmt: skip
        ours = runs.Updates(this, batch)
        own = [ours.first[f"loss/{term}"] for term in terms]
        parameters = sum(a.size for a in jax.tree.leaves(params))
        apart = 0.0
        failed = {}
        for name in list(names):
            try:
                facts = peer.answer()
            except RuntimeError as error:
                failed[name] = str(error).strip().splitlines()[-1][:200]
                del names[name]
                continue
            if facts["parameters"] != parameters:
                raise RuntimeError(f"PyTorch has {facts['parameters']} parameters, we {parameters}")
            differences = [abs(a - b) / abs(a) for a, b in zip(own, facts["losses"], strict=True)]
            apart = max(apart, *differences)
            if max(differences) > AGREE[precision]:
                raise RuntimeError(
                    f"PyTorch ({name}) computes something else: {terms} are {own} with us and "
                    f"{facts['losses']} there"
                )
        if not names:
            raise RuntimeError(f"no form of PyTorch's step works here: {failed}")
        context.compiled()
        tried = {name: min(peer.seconds(name, steps) for _ in range(2)) for name in names}
        best = min(tried, key=lambda name: tried[name])
        for name in set(names) - {best}:
            peer.ask("drop", case=name)
        times = interleaved(
            {"ours": lambda: ours.seconds(steps), best: lambda: peer.seconds(best, steps)}, rounds,
            narrow=is_narrow(best, "ours"),
        )  # fmt: skip
    rate = {k: this.recipe.nbs / statistics.median(v) for k, v in times.items()}
    target = (">=", context.choose(1.0, 1.0, 1.5))
    row = ratio_row(
        f"{this.config.model}, {precision}: ours / PyTorch", times[best], times["ours"],
        target=target,
        note=f"{rate['ours']:.3g} against {rate[best]:.3g} {unit}/s ({best})",
    )  # fmt: skip
    others = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in tried.items())
    note = (
        f"{this.config.model}, {precision}: {parameters} parameters on both sides, terms of the "
        f"loss within {apart:.0e}; PyTorch's step {others}; {times.words()}"
    )
    if not is_narrow(best, "ours")(times):
        note += f"; NOT precise: the interval is wider than {NARROW:.0%} of the median"
    for name, error in failed.items():
        note += f"; {name}: failed with {error}"
    return [row], [note]


KYOLO = tuple(
    f"{model}.{backend}" for model in ("yolov8-n", "yolo11-n") for backend in ("jax", "torch")
)


def kyolo(context: Context, part: str) -> Found:
    """Images per second of a detector beside kyolo's `fit` (Keras)."""
    model, _, backend = part.rpartition(".")
    size, count = context.choose((64, 2), (320, 4), (640, 16))
    rounds, steps = context.choose((2, 1), (5, 4), (5, 10))
    this = runs.prepare(
        "detection", model, nbs=count, microbatch=count, bn_group=count, data__image_size=size,
        data__max_objects=16, ema__decay=0.0, lr__base=1e-4, optimizer__weight_decay=0.0,
    )  # fmt: skip
    batch = runs.random_batch(this)
    with Peer.kyolo(context, backend) as peer, tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "case.npz"
        np.savez(file, count=runs.CLASSES, **batch)
        name = model.replace("-", "")
        peer.begin("make", case="fit", model=name, file=str(file))
        ours = runs.Updates(this, batch)
        facts = peer.answer()
        context.compiled()
        times = interleaved(
            {"ours": lambda: ours.seconds(steps), "kyolo": lambda: peer.seconds("fit", steps)},
            rounds, narrow=is_narrow("kyolo", "ours"),
        )  # fmt: skip
    rate = {k: count / statistics.median(v) for k, v in times.items()}
    row = ratio_row(
        f"{model}, float32: ours / kyolo on {backend}", times["kyolo"], times["ours"],
        target=(">=", 2.0) if backend == "jax" else None,
        note=f"{rate['ours']:.3g} against {rate['kyolo']:.3g} images/s",
    )  # fmt: skip
    parameters = sum(a.size for a in jax.tree.leaves(this.task.initialise(0)[0]))
    note = (
        f"{model}: {facts['versions']}, {facts['parameters']} parameters, ours {parameters}; "
        f"its own loss and assigner, SGD with momentum, `fit` over one batch; {times.words()}"
    )
    return Found(f"{size} px, batch {count}, 8 objects an image, SGD", [row], [note])
