"""The pictures of a comparison: validation curves, planned memory, images per second."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

INK, MUTED = "#222222", "#8a8a8a"
COLORS = ("#1f6fb4", "#e07b00", "#2f9e44", "#9c36b5", "#c92a2a", "#0b7285", "#846358", "#5c5f66")


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """Writes curves.png, memory.png and speed.png.

    Args:
      results: as in results.json.
      folder: where to.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(results["models"])}
    for name, drawer in (("curves", _curves), ("memory", _memory), ("speed", _speed)):
        figure = drawer(plt, results, colors)
        figure.savefig(folder / f"{name}.png", dpi=130)
        plt.close(figure)


def rows_like_choice(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The plan's rows that differ from its choice in the microbatch only, in its order."""
    choice, same = plan["choice"], ("devices", "engine", "remat")
    rows = [r for r in plan["rows"] if all(r[k] == choice[k] for k in same)]
    return sorted(rows, key=lambda r: r["microbatch"])


def _dress(axis, title: str, x: str, y: str = "") -> None:
    axis.set_title(title, loc="left", color=INK, fontsize=11)
    axis.set_xlabel(x, color=INK)
    axis.set_ylabel(y, color=INK)
    axis.grid(color="#e8e8e8", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _legend_below(figure, axis, columns: int) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _curves(plt, results, colors):
    """mAP50-95 by epoch, a phase each: every seed, and their mean where there are several."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    titles = (
        "Phase 1: each at its own batch",
        f"Phase 2: all at an effective batch of {results['shared']}",
    )
    for axis, phase, title in zip(axes, results["phases"], titles, strict=True):
        for name, runs in phase.items():
            curves = [np.asarray(r["curve"]) for r in runs]
            own = results["phases"][0][name][0]["nbs"]
            style = {"color": colors[name], "marker": "o", "markersize": 3}
            if len(curves) > 1:
                for curve in curves:
                    axis.plot(*curve.T, color=colors[name], linewidth=0.8, alpha=0.45)
            axis.plot(
                *np.mean(curves, axis=0).T, linewidth=1.8, label=f"{name} (own batch {own})",
                **style,
            )  # fmt: skip
        _dress(axis, title, "epoch")
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
    seeds = len(results["seeds"])
    several = f", mean of {seeds} seeds" if seeds > 1 else ""
    axes[0].set_ylabel(f"val mAP50-95{several}", color=INK)
    _legend_below(figure, axes[0], 4)
    return figure


def _memory(plt, results, colors):
    """Planned memory of the update by microbatch; what fits is filled, Phase 1 is ringed."""
    figure, axis = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    sizes: set[int] = set()
    for name, plan in results["plans"].items():
        rows = rows_like_choice(plan)
        x = np.array([r["microbatch"] for r in rows])
        y = np.array([r["peak_bytes"] for r in rows]) / 2**20
        fits = np.array([r["fits"] for r in rows])
        sizes |= set(x.tolist())
        axis.plot(x, y, color=colors[name], linewidth=1.4, label=name)
        axis.plot(x[fits], y[fits], "o", color=colors[name], markersize=5)
        axis.plot(x[~fits], y[~fits], "o", color=colors[name], markerfacecolor="white")
        axis.plot(
            plan["largest"], np.interp(plan["largest"], x, y), "o", color=colors[name],
            markerfacecolor="none", markersize=12,
        )  # fmt: skip
    limit = next(iter(results["plans"].values()))["budget_bytes"] / 2**20
    axis.axhline(limit, color=MUTED, linestyle=(0, (4, 2)), linewidth=1.2,
                 label=f"limit, {limit:,.0f} MiB")  # fmt: skip
    axis.plot([], [], "o", color=INK, markerfacecolor="none", markersize=11, linestyle="none",
              label="Phase 1")  # fmt: skip
    axis.plot([], [], "o", color=INK, markerfacecolor="white", linestyle="none",
              label="does not fit")  # fmt: skip
    _dress(axis, "Planned memory of one update", "microbatch, images", "MiB on one device")
    axis.set_ylim(bottom=0)
    axis.set_xlim(left=0)
    if len(sizes) <= 6:
        axis.set_xticks(sorted(sizes))
    _legend_below(figure, axis, 3)
    return figure


def _speed(plt, results, colors):
    """Images a second of both phases, the mean over seeds."""
    names = list(results["models"])
    figure, axis = plt.subplots(figsize=(max(6.0, 1.9 * len(names)), 4.4), layout="constrained")
    places = np.arange(len(names))
    for number, phase in enumerate(results["phases"]):
        heights = [np.mean([r["images_per_second"] for r in phase[n]]) for n in names]
        bars = axis.bar(
            places + (number - 0.5) * 0.38, heights, 0.34,
            color=[colors[n] for n in names], alpha=(1.0, 0.5)[number],
        )  # fmt: skip
        axis.bar_label(bars, [f"{h:.1f}" for h in heights], padding=2, color=INK, fontsize=9)
    labels = []
    for name in names:
        first = [phase[name][0] for phase in results["phases"]]
        split = " | ".join(
            f"{r['geometry']['microbatch']} x {r['geometry']['steps']}" for r in first
        )
        labels.append(f"{name}\n{split}")
    axis.set_xticks(places, labels)
    _dress(axis, "Training speed", "model, and microbatch x steps of Phase 1 | Phase 2", "images/s")
    axis.grid(visible=False, axis="x")
    for number, alpha in ((1, 1.0), (2, 0.5)):
        axis.bar([0], [0], color=MUTED, alpha=alpha, label=f"Phase {number}")
    _legend_below(figure, axis, 2)
    return figure
