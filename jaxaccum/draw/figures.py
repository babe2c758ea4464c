"""Figures of numbers: curves of a run, of precision and recall, and a confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxaccum.draw.boxes import Image

INK = "#222222"
COLORS = ("#1f6fb4", "#e07b00", "#2f9e44", "#9c36b5", "#c92a2a", "#0b7285", "#846358", "#5c5f66")
_MOST_NAMED = 30  # classes; of more, a matrix has no numbers and curves no legend

Curve = tuple[ArrayLike, ArrayLike]  # x and y


def curves(
    panels: Mapping[str, Mapping[str, Curve]],
    x: str,
    columns: int = 4,
    log: Sequence[str] = (),
    top: float | None = None,
) -> Image:
    """Panels of curves; one called "mean" stands out.

    Args:
      panels: title -> name -> (x, y). x: what the axis shows.
      columns: panels a row. log: titles of panels with a logarithmic axis.
      top: of all axes, which then begin at 0.
    """
    columns = min(columns, max(len(panels), 1))
    rows = max(-(-len(panels) // columns), 1)
    figure = _figure(3.4 * columns, 2.6 * rows)
    for number, (title, lines) in enumerate(panels.items(), start=1):
        axis = figure.add_subplot(rows, columns, number)
        for i, (name, (xs, ys)) in enumerate(lines.items()):
            mean = name == "mean"
            axis.plot(
                xs, ys, color=INK if mean else COLORS[i % len(COLORS)], label=name,
                linewidth=2 if mean else 1.3,
                marker="o" if np.size(xs) < 3 else "", markersize=3,
            )  # fmt: skip
        axis.set_title(title, loc="left", color=INK, fontsize=10)
        axis.set_xlabel(x, color=INK, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(color="#e8e8e8", linewidth=0.8)
        axis.set_axisbelow(True)
        if top is not None:
            axis.set_ylim(0, top)
        axis.spines[["top", "right"]].set_visible(False)
        positive = any(np.max(np.asarray(ys), initial=0) > 0 for _, ys in lines.values())
        if title in log and positive:
            axis.set_yscale("log")
        if 1 < len(lines) <= _MOST_NAMED:
            axis.legend(fontsize=7, frameon=False)
    return _pixels(figure)


def confusion(matrix: NDArray[np.int64], names: Sequence[str]) -> Image:
    """What was taken for what.

    Args:
      matrix: (classes + 1, classes + 1), rows by what was predicted, columns by what was there; the
        last of each is nothing.
      names: of the classes.
    """
    labels = [*names, "nothing"]
    few = len(labels) <= _MOST_NAMED
    side = max(3.6, min(0.45 * len(labels), 12)) + 1.2
    figure = _figure(side, side)
    axis = figure.add_subplot()
    share = matrix / np.maximum(matrix.sum(0, keepdims=True), 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if few:
        axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
        for row, column in zip(*np.nonzero(matrix), strict=True):
            color = "white" if share[row, column] > 0.5 else INK
            axis.text(column, row, f"{matrix[row, column]}", ha="center", va="center",
                      color=color, fontsize=7)  # fmt: skip
    axis.set_xlabel("there", color=INK)
    axis.set_ylabel("predicted", color=INK)
    return _pixels(figure)


def bars(counts: Mapping[str, float], title: str) -> Image:
    """Bars, the longest first.

    Args:
      counts: name -> length; the first 40 are shown.
    """
    found = sorted(counts.items(), key=lambda item: -item[1])[:40]
    figure = _figure(6, 0.24 * max(len(found), 4) + 0.8)
    axis = figure.add_subplot()
    axis.barh([name for name, _ in found], [n for _, n in found], color=COLORS[0])
    axis.invert_yaxis()
    axis.tick_params(labelsize=8)
    axis.set_title(title, loc="left", color=INK, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    return _pixels(figure)


def counted(classes: Sequence[NDArray[np.int32]], names: Sequence[str], where: str) -> Image:
    """Bars of how many objects there are of each class.

    Args:
      classes: of the objects of each sample. names: of the classes. where: what they are in.
    """
    every = np.concatenate([*classes, np.zeros(0, np.int32)])
    counts = np.bincount(every, minlength=len(names)).tolist()
    return bars(dict(zip(names, counts, strict=True)), f"objects in {where}")


def _figure(width: float, height: float) -> Any:
    # Not by pyplot, whose backend is the notebook's or the user's.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _pixels(figure: Any) -> Image:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
