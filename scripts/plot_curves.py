"""Draws the curves of runs into one picture, to see whether they are one.

python scripts/plot_curves.py WORKDIR [WORKDIR ...] --out=FILE.png [--reference=CSV]

Left mAP50 and mAP50-95 on the val split, right the loss of logged updates, both against the
epoch. Prints the best values of each run, and how far its losses are from the first run's. The
reference is a results file of the usual trainer: columns epoch, metrics/mAP50(B),
metrics/mAP50-95(B).
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np

INK, MUTED = "#222222", "#8a8a8a"
COLORS = ("#1f6fb4", "#e07b00", "#2f9e44", "#9c36b5", "#c92a2a")


def read(workdir: Path):
    """(updates, epochs, losses) of a run's updates and (epochs, mAP50, mAP50-95) of its
    evaluations."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    train = [r for r in records if r["kind"] == "train"]
    per_update = train[-1]["epoch"] / train[-1]["step"]
    evaluated = [r for r in records if r["kind"] == "eval"]
    losses = np.array([(r["step"], r["epoch"], r["loss"]) for r in train]).T
    maps = np.array([(r["step"] * per_update, r["map50"], r["map50_95"]) for r in evaluated]).T
    return losses, maps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", type=Path)
    parser.add_argument("--names", help="names of the runs, by commas")
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    names = args.names.split(",") if args.names else [w.name for w in args.workdirs]

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    if args.reference:
        rows = list(csv.DictReader(args.reference.open()))
        epochs = [float(r["epoch"]) for r in rows]
        for key in ("metrics/mAP50(B)", "metrics/mAP50-95(B)"):
            values = [float(r[key]) for r in rows]
            left.plot(epochs, values, color=MUTED, linewidth=1.4, linestyle=(0, (4, 2)))
            print(f"reference: best {key} {max(values):.4f}")
        left.plot([], [], color=MUTED, linestyle=(0, (4, 2)), label="reference trainer")
    first = None
    for workdir, name, color in zip(args.workdirs, names, COLORS, strict=False):
        losses, maps = read(workdir)
        left.plot(maps[0], maps[1], color=color, linewidth=1.6, label=name)
        left.plot(maps[0], maps[2], color=color, linewidth=1.6)
        right.plot(losses[1], losses[2], color=color, linewidth=1.3, label=name)
        text = f"{name}: best mAP50 {maps[1].max():.4f}, mAP50-95 {maps[2].max():.4f}"
        if first is None:
            first = losses
        else:
            shared = min(losses.shape[1], first.shape[1])
            apart = np.abs(losses[2, :shared] / first[2, :shared] - 1)
            text += (
                f"; losses from the first run's: {apart[0]:.1e} at update {losses[0, 0]:.0f}, "
                f"median {np.median(apart):.1e}, largest {apart.max():.1e}"
            )
        print(text)
    for axis, title in ((left, "val mAP50 and mAP50-95"), (right, "loss of the effective batch")):
        axis.set_title(title, loc="left", color=INK, fontsize=11)
        axis.set_xlabel("epoch", color=INK)
        axis.grid(color="#e8e8e8", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    left.set_ylim(0, 1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=130)


if __name__ == "__main__":
    main()
