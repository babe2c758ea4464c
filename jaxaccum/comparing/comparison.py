"""A whole comparison: its plans, its runs, and what is written of them."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import jaxaccum
from jaxaccum import config as configs
from jaxaccum.comparing import plots
from jaxaccum.comparing.check import check_geometries
from jaxaccum.comparing.planning import plan
from jaxaccum.comparing.report import report
from jaxaccum.comparing.runs import Cell, make_cell, result, train
from jaxaccum.comparing.subjects import Model, describe, read_models, rule


def compare(
    specs: Sequence[str],
    out: Path,
    *,
    settings: Sequence[str] = (),
    memory: str | None = None,
    nbs: int = 0,
    seeds: Sequence[int] = (0,),
    most: int = 64,
    check_updates: int = 5,
    command: Sequence[str] = (),
    allow_wrong_numbers: bool = False,
) -> dict[str, Any]:
    """Plans, trains what is not trained yet, and writes report.md, results.json and plots.

    Args:
      specs: FILE[:arg][@key=value]... of each model.
      out: folder of the comparison; continued if it holds one.
      settings: "key=value" for all models.
      memory: of one device, as the plan takes it ("2GiB"); its own default if None.
      nbs: effective batch of Phase 2; 0 for the smallest of Phase 1.
      seeds: of the runs; each is one more repetition of everything.
      most: largest effective batch of Phase 1, even if more fits.
      check_updates: first updates to run on other geometries; 0 for no check.
      command: arguments to show in the report.
      allow_wrong_numbers: only warn where JAX computes wrong numbers, see
        jaxaccum/machine/known_answers.py.
    Returns:
      what results.json holds.
    Raises:
      ConfigError: what is asked for cannot be compared. TrainingError: a plan or a run failed.
    """
    _require_possible(nbs, seeds, most, check_updates)
    found = read_models(specs, settings)
    for folder in ("plans", "runs"):
        (out / folder).mkdir(parents=True, exist_ok=True)

    plans = {model.name: plan(model, memory, most, out / "plans") for model in found}
    own = {name: each["largest"] * each["choice"]["devices"] for name, each in plans.items()}
    shared = nbs or min(own.values())
    print(
        f"Phase 1, each at its own: {', '.join(f'{k} {v}' for k, v in own.items())}; Phase 2, "
        f"all at: {shared}{'' if nbs else ', the smallest of these'}"
    )

    def cell(model: Model, batch: int, seed: int) -> Cell:
        return make_cell(model, plans[model.name], batch, seed, out / "runs")

    # A model whose own batch is the shared one has one run in both phases.
    phases = [own, dict.fromkeys(own, shared)]
    cells = {
        (model.name, phase[model.name], seed): cell(model, phase[model.name], seed)
        for seed in seeds
        for phase in phases
        for model in found
    }
    rules = {model.name: rule(model) for model in found}
    for line in dict.fromkeys(rules.values()):
        print(f"learning rate: {line}", flush=True)
    first = cells[found[0].name, shared, seeds[0]]
    check = check_geometries(first, check_updates, out / "check.json", allow_wrong_numbers)
    for number, each in enumerate(cells.values(), start=1):
        train(each, f"{number}/{len(cells)}", allow_wrong_numbers)

    results = {
        "command": [_without_places(word) for word in command],
        "versions": _versions(),
        "hardware": check.pop("hardware") | {"cores": os.cpu_count()},
        "rules": rules,
        "differing": _differing([cells[model.name, shared, seeds[0]] for model in found]),
        "data": {
            "samples": len(found[0].source), "classes": len(found[0].source.names),
            "image_size": found[0].config.data.image_size,
        },
        "seeds": list(seeds),
        "shared": shared,
        "most": most,
        "models": {model.name: describe(model) for model in found},
        "plans": plans,
        "check": check,
        "phases": [
            {m.name: [result(cells[m.name, phase[m.name], s]) for s in seeds] for m in found}
            for phase in phases
        ],
    }  # fmt: skip
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    plots.draw(results, out)
    (out / "report.md").write_text(report(results))
    print(out / "report.md")
    return results


def _require_possible(nbs: int, seeds: Sequence[int], most: int, check_updates: int) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise configs.ConfigError("the plots need matplotlib: pip install matplotlib")
    if nbs < 0 or most < 1 or check_updates < 0 or not seeds:
        raise configs.ConfigError(
            "--nbs and --check_updates are not negative, --most is positive and --seeds names at "
            f"least one seed; got {nbs}, {check_updates}, {most}, {list(seeds)}"
        )


def _versions() -> dict[str, str]:
    return {
        "jaxaccum": jaxaccum.__version__, "jax": jax.__version__,
        "python": platform.python_version(),
    }  # fmt: skip


def _differing(cells: Sequence[Cell]) -> list[str]:
    """Fields of the recipe in which any of the runs differs from the first; always the model."""
    first = cells[0].run.recipe.as_dict()
    return sorted({"model"}.union(*(cell.run.recipe.differences(first) for cell in cells)))


def _without_places(word: str) -> str:
    """An argument whose absolute paths are cut down to the file's name."""
    return re.sub(r"(?<![^=,@:])(?:/|~)[^,@:=]*/(?=[^/,@:=]+)", ".../", word)
