"""report.html of a run: recipe, geometry, curves, pictures and versions, in one file."""

from __future__ import annotations

import base64
import html
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxaccum.draw import figures
from jaxaccum.draw.boxes import Image

_TITLES = {
    "results": "Curves", "validation": "Validation samples, what the best weights find",
    "precision_recall": "Precision and recall by confidence, of the best weights",
    "confusion": "What was taken for what, of the best weights",
    "batch": "The first samples, as the network sees them", "labels": "The training set",
}  # fmt: skip
_COUNTS = ("step", "samples", "categories")
_PACKAGES = ("jaxaccum", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto;
  padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd; }
img { max-width: 100%; height: auto; } pre { background: #f6f6f6; padding: 1em; overflow-x: auto; }
table { border-collapse: collapse; } td { padding: 0.15em 1em 0.15em 0; vertical-align: top; }
td:first-child { color: #666; white-space: nowrap; }
"""


def results(found: Sequence[Mapping[str, Any]], monitor: str) -> Image:
    """The curves of a run: losses, learning rate, gradient norm, and the first metrics.

    Args:
      found: lines of metrics.jsonl. monitor: the metric that decides, which comes first.
    """
    panels: dict[str, dict[str, figures.Curve]] = {}
    train = [r for r in found if r.get("kind") == "train"]
    losses = [k for k in (train[-1] if train else {}) if k.startswith("loss")]
    for key in [*losses, "lr", "grad_norm"]:
        panels[key.replace("loss/", "loss: ").replace("_", " ")] = {key: _curve(train, key)}
    measured = [r for r in found if r.get("kind") == "eval"]
    plain = [
        k for k, v in (measured[-1] if measured else {}).items()
        if isinstance(v, float) and "/" not in k and k not in (*_COUNTS, monitor)
    ]  # fmt: skip
    for key in [monitor, *plain[:5]] if measured else []:
        panels[key.replace("_", " ")] = {key: _curve(measured, key)}
    return figures.curves(panels, "update", log=("grad norm",))


def _curve(rows: Sequence[Mapping[str, Any]], key: str) -> figures.Curve:
    points = [(r["step"], r[key]) for r in rows if isinstance(r.get(key), int | float)]
    return [p[0] for p in points], [p[1] for p in points]


def write(
    workdir: Path,
    about: Mapping[str, Any],
    window: str,
    best: Mapping[str, Any],
    tables: Sequence[str],
    pictures: Path,
) -> Path:
    """Writes report.html, with all that it shows in it.

    Args:
      about: the run's fingerprint, recipe, config and names. window: recipe and geometry in words.
      best: its best evaluation. tables: of that, lines.
      pictures: a folder of PNG files; the known ones come first.
    """
    config = about["config"]
    title = f"{config['model']} in {workdir.name}"
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
        _table({"run": window, "best": f"update {best['step']}" if best else "none measured"}),
    ]
    if tables:
        parts += ["<h2>Metrics of the best weights</h2>", f"<pre>{_lines(tables)}</pre>"]
    names = [p.stem for p in sorted(pictures.glob("*.png"))]
    for name in sorted(names, key=lambda n: (list(_TITLES).index(n) if n in _TITLES else 99, n)):
        data = base64.b64encode((pictures / f"{name}.png").read_bytes()).decode()
        said = html.escape(_TITLES.get(name, name.replace("_", " ")))
        parts.append(f'<h2>{said}</h2><img alt="{said}" src="data:image/png;base64,{data}">')
    recipe = json.dumps(about["recipe"], indent=1, default=str)
    parts += [
        f"<h2>Recipe {html.escape(about['fingerprint'])}</h2><pre>{html.escape(recipe)}</pre>",
        f"<h2>Config</h2><pre>{html.escape(json.dumps(config, indent=1, default=str))}</pre>",
        "<h2>Computed with</h2>", _table(_environment()), "</html>",
    ]  # fmt: skip
    file = workdir / "report.html"
    file.write_text("\n".join(parts), encoding="utf-8")
    return file


def _environment() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "system": f"Python {platform.python_version()}, {platform.platform()}",
        **versions,
    }


def _table(rows: Mapping[str, str]) -> str:
    cells = (f"<tr><td>{html.escape(k)}<td>{html.escape(v)}" for k, v in rows.items())
    return f"<table>{''.join(cells)}</table>"


def _lines(lines: Sequence[str]) -> str:
    return html.escape("\n".join(lines))
