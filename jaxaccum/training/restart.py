"""What a start of training finds in the workdir of an earlier one, and may go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxaccum import tasks
from jaxaccum.accumulate import Recipe, State
from jaxaccum.data import check
from jaxaccum.data.texts import shown_path
from jaxaccum.training import run
from jaxaccum.training.cadence import Cadence
from jaxaccum.training.checkpoint import CheckpointError, Checkpoints, newest_complete
from jaxaccum.training.distributed import Peers
from jaxaccum.training.divergence import Divergence
from jaxaccum.training.logs import MetricsFile

NO_OBJECTS = "no objects in the validation set, so there is nothing to measure by"


def require_same_recipe(meta: dict[str, Any], recipe: Recipe, workdir: Path) -> None:
    """Refuses to continue a run under another recipe.

    Raises:
      CheckpointError: names the fields that differ.
    """
    differing = recipe.differences(meta["recipe"])
    if differing:
        rows = "\n".join(
            f"  {field}: checkpoint {theirs!r}, config {ours!r}"
            for field, (theirs, ours) in differing.items()
        )
        raise CheckpointError(
            f"{shown_path(workdir)} holds a run of another recipe ({meta['fingerprint']}, the "
            f"config says {recipe.fingerprint}):\n{rows}\nUse another workdir, or put these fields "
            "back, or continue all the same with --accept_other_recipe (its curve will be "
            "neither's)."
        )


def kept_dtype(workdir: Path) -> str | None:
    """The dtype of the run in a workdir, by its newest state that says; None without one."""
    if newest_complete(workdir) is None:
        return None
    with Checkpoints(workdir) as checkpoints:
        for step in reversed(checkpoints.steps):
            try:
                return checkpoints.meta(step=step)["recipe"]["dtype"]
            except (CheckpointError, KeyError, TypeError):
                continue
    return None


def restored(
    checkpoints: Checkpoints,
    state: State,
    engine: Any,
    recipe: Recipe | None,
    workdir: Path,
    alone: bool,
) -> tuple[State, dict[str, Any]]:
    """The newest state that can be read, and its meta.

    Args:
      state: one of the same shapes.
      engine: says where it will lie on the devices.
      recipe: that it must be of; None for any.
      workdir: as the user named it.
      alone: whether no other process takes part; if one does, all get the state from this one.
    Raises:
      CheckpointError: none can be read, or it is of another recipe or model.
    """

    def check(meta: dict[str, Any]) -> None:
        if recipe is not None:
            require_same_recipe(meta, recipe, workdir)

    place = engine.shardings(state)
    if not alone:
        one = SingleDeviceSharding(jax.local_devices()[0])
        place = jax.tree.map(lambda _: one, place)
    template = jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        state, place,
    )  # fmt: skip
    return checkpoints.restore(template, check)


def finished(
    this: run.Run, workdir: Path, accept_other_recipe: bool, cadence: Cadence
) -> dict[str, float] | None:
    """The best evaluation's metrics if a run is over, which is said; None if there is more to do.

    Args:
      cadence: says which evaluations are due, and for how long it waits for a better one.
    Raises:
      CheckpointError: the workdir holds a run of another recipe, or a file that cannot be read.
      WorkdirError: metrics.jsonl cannot be read.
    """
    with Checkpoints(workdir, this.config.checkpoint.keep) as checkpoints:
        step = checkpoints.latest
        if step is None or (step < this.steps and not cadence.patience):
            return None
        if not checkpoints.is_whole(step) or cadence.owes(step):
            return None
        meta = checkpoints.meta()
        early = step < this.steps
        if early and not cadence.hopeless(step, meta.get("best", {})):
            return None
        if not accept_other_recipe:
            require_same_recipe(meta, this.recipe, workdir)
        best = checkpoints.rewind(step)
    if early:
        print(
            f"finished: stopped at update {step} of {this.steps}, as {cadence.patience} "
            f"evaluations were no better; best: {best_of(this, best, workdir)}.\n"
            "To train on, raise --config.eval.patience, or set it to 0."
        )
        return best
    field = "steps" if this.config.steps else "epochs"
    print(
        f"finished: all {this.steps} updates are done"
        f"{f'; best: {best_of(this, best, workdir)}' if best else ''}.\n"
        f"To train on, raise --config.{field} (now {this.config[field]:g}). The learning rate goes "
        "by the length of the run, so that is another recipe: give a new --workdir, and "
        f"--config.init_from={workdir} to start from these weights, or continue in this one with "
        "--accept_other_recipe."
    )
    if str(divergence := Divergence(meta.get("divergence"))):
        print(divergence)
    return best


def rewound(
    start: int, file: MetricsFile, checkpoints: Checkpoints, cadence: Cadence, peers: Peers
) -> tuple[bool, dict[str, Any]]:
    """Forgets what came after the update that the run goes on from; all processes call.

    Returns:
      Whether the evaluation of that update has to be made up for, and what the best one gave.
    Raises:
      WorkdirError: metrics.jsonl cannot be read or written.
      CheckpointError: a checkpoint cannot be read or put aside.
    """
    owed, best = False, {}
    if peers.first:
        file.rewind(start)
        owed = cadence.owes(start)
        # If a better one came after this checkpoint, nothing is left; it will come again.
        best = checkpoints.rewind(start - 1 if owed else start)
    owed, best = peers.from_first("owed", [owed, best])
    return owed, best


def best_of(this: run.Run, best: dict[str, Any], workdir: Path) -> str:
    """Where the best weights are, and how good."""
    score = best[this.task.monitor[0]]
    summary = NO_OBJECTS if np.isnan(score) else this.task.summary(best)
    return f"update {best['step']}, {summary} in {workdir / 'best'}"


def sound(state: Any, step: int) -> bool:
    """Whether a state is that of an update, is still there, and all numbers in it are finite."""
    leaves = jax.tree.leaves(state)
    if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves):
        return False  # an update that failed had it already
    return int(state.step) == step and all(
        np.isfinite(np.asarray(leaf)).all()
        for leaf in leaves
        if jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact)
    )


def say_changes(before: dict[str, str | None], now: dict[str, str | None]) -> None:
    """Says which data sets are not what they were: labels are part of the recipe, pixels not."""
    for split, known in before.items():
        if known and (here := now.get(split)) and (what := check.changed_since(known, here)):
            print(f"note: {split} set: {what}")


def say_swapped(split: str, source: tasks.Source) -> None:
    """Says which files of a data set were changed since it was opened."""
    if files := check.changed_files(source):
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        print(
            f"note: {split} set: {len(files)} files were changed while the run learned from them: "
            f"{', '.join(map(shown_path, files[:3]))}{more}"
        )
