"""The check of a comparison that geometry changes nothing: first losses on several."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax

from jaxaccum.accumulate import make_engine
from jaxaccum.comparing.files import write_json
from jaxaccum.comparing.runs import Cell
from jaxaccum.comparing.subjects import load_config, prepare
from jaxaccum.machine import known_answers, user_cache
from jaxaccum.training import run
from jaxaccum.weights.initial import load_initial


def check_geometries(
    cell: Cell, updates: int, file: Path, allow_wrong_numbers: bool = False
) -> dict[str, Any]:
    """Losses of the first updates of a run on its own geometry, on the smallest microbatch, and
    by the other engine; also the hardware. Kept in `file`."""
    window = cell.run.window
    own = window.geometry
    group = window.recipe.group or 1
    geometries = list(dict.fromkeys(
        [(own.microbatch, own.engine), (group, "scan"), (group, "multisteps")]
    ))  # fmt: skip
    updates = min(updates, cell.run.steps)
    asked = [cell.run.recipe.fingerprint, [list(g) for g in geometries], updates]
    kept = user_cache.load_dict(file)
    if kept.get("asked") != asked:
        if updates:
            print(f"checking {updates} updates of {cell.model.name} on other geometries")
        asks = (cell.model.file, dict(cell.overrides), geometries if updates else [], updates)
        kept = {"asked": asked, **in_child(first_losses, *asks, allow_wrong_numbers)}
        write_json(file, kept)
    titles = [f"microbatch {m}, {e}" for m, e in geometries]
    apart = [
        max(abs(v - row[0]) / abs(row[0]) for v in row) for row in zip(*kept["losses"], strict=True)
    ]
    return {
        "model": cell.model.name, "nbs": window.recipe.nbs, "hardware": kept["hardware"],
        "fingerprint": window.recipe.fingerprint, "dtype": cell.run.config.dtype,
        "geometries": titles, "losses": kept["losses"], "apart": apart,
    }  # fmt: skip


def in_child(function: Callable, *args) -> Any:
    """Calls a function in a fresh process: an accelerator must be free again for the next run."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *args).result()


def first_losses(
    file: str,
    overrides: dict[str, str],
    geometries: list[tuple[int, str]],
    updates: int,
    allow_wrong_numbers: bool = False,
) -> dict[str, Any]:
    """{"losses": of the first updates, by geometry, "hardware": ...}, by JAX's own device."""
    run.use_compilation_cache()
    known_answers.require(allow_wrong_numbers)
    losses: list[list[float]] = []
    for microbatch, engine_name in geometries:
        changes = {"microbatch": str(microbatch), "engine": engine_name}
        config = load_config(file, overrides | changes)
        source = run.open_source(config, "train")
        this = prepare(config, source)
        params, stats = this.task.initialise(config.seed)
        if config.init_from:
            params, stats, _ = load_initial(
                config.init_from, this.task.model, params, stats, source.names,
                this.task.loss_modules,
            )  # fmt: skip
        engine = make_engine(this.forward, this.rule, this.window)
        state = engine.init(params, stats)
        windows = run.make_stream(this, source).windows(0, [this.recipe.nbs] * updates)
        losses.append([])
        for _ in range(updates):
            state, log = engine.update(state, next(windows))
            losses[-1].append(float(log["loss"]))
        windows.close()
    device = jax.devices()[0]
    return {
        "losses": losses,
        "hardware": {"platform": device.platform, "device_kind": device.device_kind},
    }
