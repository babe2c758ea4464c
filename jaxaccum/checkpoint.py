"""Checkpoints of a run: the whole state to continue from, and the best weights to use."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxaccum.accumulate import Recipe

PyTree = Any


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used; the message says why and what to do."""


class Checkpoints:
    """`last/STEP` holds the newest states, `best/STEP` the best weight averages.

    Saves are asynchronous, and a checkpoint appears only when it is complete. Use as a context
    manager, so that a run does not end before its last save has.
    """

    def __init__(self, workdir: Path, keep: int = 2):
        self.workdir = Path(workdir).resolve()

        def manager(name, keep):
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
            return ocp.CheckpointManager(self.workdir / name, options=options)

        self._last, self._best = manager("last", keep), manager("best", 1)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, *_):
        try:
            self.wait()
        except CheckpointError:
            if kind is None:
                raise
        finally:
            self._last.close()
            self._best.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._last.latest_step()

    @property
    def best(self) -> int | None:
        """Step of the best weights, if any were saved."""
        return self._best.latest_step()

    def save(self, step: int, state: PyTree, meta: dict[str, Any]) -> None:
        """Saves a state to continue from.

        Raises:
          CheckpointError: the disk is full or cannot be written.
        """
        self._save(self._last, step, state, meta)

    def save_best(self, step: int, weights: PyTree, meta: dict[str, Any]) -> None:
        """Saves {"params", "stats"} as the best so far."""
        self._save(self._best, step, weights, meta)

    def restore(self, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The newest state and its meta, with the shapes and shardings of `template`."""
        return self._restore(self._last, self.latest, template)

    def restore_best(self, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The best weights and their meta."""
        return self._restore(self._best, self.best, template)

    def rewind(self, step: int) -> None:
        """Forgets best weights of updates after `step`, which a continued run will do again."""
        for later in [s for s in self._best.all_steps() if s > step]:
            self._best.delete(later)

    def meta(self, best: bool = False) -> dict[str, Any]:
        """What was saved beside the newest state or the best weights."""
        manager, step = (self._best, self.best) if best else (self._last, self.latest)
        if step is None:
            raise CheckpointError(f"no checkpoint in {self.workdir}: train there first")
        return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def wait(self) -> None:
        """Waits for saves in flight.

        Raises:
          CheckpointError: one of them failed.
        """
        for manager in (self._last, self._best):
            try:
                manager.wait_until_finished()
            except Exception as error:
                raise self._explained(error) from error

    def _save(self, manager, step, tree, meta):
        # A copy of our own: the next update writes into the donated buffers.
        tree = jax.tree.map(lambda a: np.array(a), jax.device_get(tree))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        free = shutil.disk_usage(self.workdir).free
        try:
            if free < size:
                raise OSError(errno.ENOSPC, "No space left on device")
            saved = manager.save(
                step,
                args=ocp.args.Composite(
                    tree=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta)
                ),
                force=True,
            )
            if not saved:
                raise RuntimeError(f"update {step} was not saved, orbax gives no reason")
        except Exception as error:
            raise self._explained(error, size) from error

    def _restore(self, manager, step, template):
        if step is None:
            raise CheckpointError(f"no checkpoint in {self.workdir}: train there first")
        try:
            restored = manager.restore(
                step,
                args=ocp.args.Composite(
                    tree=ocp.args.StandardRestore(template), meta=ocp.args.JsonRestore()
                ),
            )
        except ValueError as error:
            raise CheckpointError(
                f"the checkpoint of update {step} in {self.workdir} does not fit this model and "
                f"optimizer: {str(error).splitlines()[0]}"
            ) from error
        return restored["tree"], restored["meta"]

    def _explained(self, error: Exception, size: int | None = None) -> CheckpointError:
        text = str(error)
        if getattr(error, "errno", None) == errno.ENOSPC or any(
            words in text for words in ("No space left", "RESOURCE_EXHAUSTED", "File too large")
        ):
            free = shutil.disk_usage(self.workdir).free
            need = "" if size is None else f"{size / 2**20:.1f} MiB needed, "
            text = f"the disk is full ({need}{free / 2**20:.1f} MiB free)"
        saved = "none" if self.latest is None else f"update {self.latest}"
        return CheckpointError(
            f"cannot save a checkpoint in {self.workdir}: {text}. Last complete checkpoint: "
            f"{saved}. Free some space, or lower checkpoint.keep, and start the same command "
            "again: it continues from there."
        )


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
            f"{workdir} holds a run of another recipe ({meta['fingerprint']}, the config says "
            f"{recipe.fingerprint}):\n{rows}\nUse another workdir, or put these fields back, or "
            "continue all the same with --accept_other_recipe (its curve will be neither's)."
        )
