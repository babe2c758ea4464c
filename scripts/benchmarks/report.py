"""The document of all results: a table for each measure, the CPU and the GPU side by side."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Measure, Row

PLATFORMS = {"cpu": "CPU", "gpu": "GPU"}
HEAD = """# Speed and memory

Made by one command, which measures what is not there yet and writes this page anew:

```bash
python scripts/benchmark.py --out=docs/benchmarks.md     # all; --list, --only=update,points
python -m pip install --target=DIR torch==2.13.0         # to compare with PyTorch: --torch=DIR
```

A ratio is the median over rounds in which everything that is compared takes its turn; in brackets
where it lies with 95 % (of what was measured before 2026-11-30 or in fewer than six rounds: the
smallest and largest round). Rounds in which another program took a processor do not count. Bold: a
target that is met; *italic*: one that is missed. What is compared with is plain PyTorch, OpenCV and
SciPy, written for this ([`scripts/benchmarks`](../scripts/benchmarks)); before anything is timed,
its results are compared
with ours.
"""


def number(value: float) -> str:
    """Three digits, more where there are more before the point."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def figure(row: Row) -> str:
    """A row's value with its unit and spread."""
    unit = f" {row.unit}" if row.unit else ""
    text = f"{number(row.value)}{unit}"
    if row.low is not None and row.high is not None:
        text += f" ({number(row.low)} to {number(row.high)})"
    return text


def render(folder: Path, measures: Iterable[Measure]) -> str:
    """The document.

    Args:
      folder: of results, see `harness.save`.
    """
    results = {
        (platform, key): result
        for measure in measures
        for key in measure.keys
        for platform in PLATFORMS
        if (result := harness.load(folder, key, platform)) is not None
    }
    parts = [HEAD, _where(results)]
    parts += [_section(measure, results) for measure in measures]
    return "\n".join(parts)


def _where(results: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """On what the results were made."""
    lines = []
    for platform, words in PLATFORMS.items():
        made = [r for (p, _), r in results.items() if p == platform and "skipped" not in r]
        if not made:
            lines.append(f"- **{words}**: nothing measured yet.")
            continue
        hardware = collections.Counter(r["hardware"] for r in made)
        versions = collections.Counter(
            ", ".join(f"{name} {version}" for name, version in r["versions"].items()) for r in made
        )
        dates = sorted({r["date"] for r in made})
        load = max(r["load"] for r in made)
        lines.append(
            f"- **{words}**: {'; '.join(hardware)}. {'; '.join(versions)}. "
            f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; load up to {load:g}."
        )
    if any(r.get("quick") for r in results.values()):
        lines.append("\n**Made with `--quick`, at tiny sizes: these figures mean nothing.**")
    return "\n".join([*lines, ""])


def _section(measure: Measure, results: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """A measure: settings, a line for each label, notes, and what was skipped."""
    cells: dict[str, dict[str, Row]] = {}
    settings: dict[str, list[str]] = {}
    notes: list[str] = []
    for key in measure.keys:
        for platform, words in PLATFORMS.items():
            result = results.get((platform, key))
            if result is None:
                continue
            if "skipped" in result:
                notes.append(f"{words}, {key}: skipped. {result['skipped']}")
                continue
            said = settings.setdefault(platform, [])
            if result["setting"] not in said:
                said.append(result["setting"])
            for row in harness.rows_of(result):
                cells.setdefault(row.label, {})[platform] = row
            notes += [note for note in result["notes"] if note not in notes]
    lines = [f"## {measure.title}", ""]
    for platform, said in settings.items():
        lines.append(f"{PLATFORMS[platform]}: {'; '.join(said)}.")
    if settings:
        lines.append("")
    if cells:
        lines += ["| | CPU | GPU | target | |", "| --- | --- | --- | --- | --- |"]
        lines += [_line(label, found) for label, found in cells.items()]
    else:
        lines.append("Not measured yet.")
    lines.append("")
    lines += [f"- {note}" for note in notes]
    return "\n".join([*lines, ""] if notes else lines)


def _line(label: str, found: Mapping[str, Row]) -> str:
    goals = [_goal(row) for row in found.values() if row.target]
    words = [row.note for row in found.values() if row.note]
    columns = [label, *(_cell(found.get(p)) for p in PLATFORMS), _joined(goals), _joined(words)]
    return f"| {' | '.join(columns)} |"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    mark = {None: "", True: "**", False: "*"}[row.met]
    return f"{mark}{figure(row)}{mark}"


def _goal(row: Row) -> str:
    assert row.target is not None
    relation, limit = row.target
    unit = f" {row.unit}" if row.unit else ""
    return f"{relation} {number(limit)}{unit}"


def _joined(texts: Sequence[str]) -> str:
    return "; ".join(dict.fromkeys(texts))
