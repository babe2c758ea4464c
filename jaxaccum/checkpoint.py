"""Checkpoints of a run: the whole state to continue from, and the best weights to use."""

from __future__ import annotations

import errno
import functools
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxaccum.accumulate import Recipe

PyTree = Any

_LIST = "files.json"  # beside a checkpoint's own files: the size and CRC-32 of each


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used; the message says why and what to do."""


class _Unreadable(Exception):
    """Files of a checkpoint are missing or damaged; the message says which."""


class Checkpoints:
    """`last/STEP` holds the newest states, `best/STEP` the best weight averages.

    Saves are asynchronous, and a checkpoint appears only when it is complete. Use as a context
    manager, so that a run does not end before its last save has. Ones that turn out to be
    unreadable are moved to `broken/`. Of several processes only the first has them, see
    `Elsewhere`.
    """

    def __init__(self, workdir: Path, keep: int = 2):
        self.workdir = Path(workdir).resolve()

        # The state of a run is whole in every process: the first needs no other to save it.
        alone = ocp.options.MultiprocessingOptions(
            active_processes={0} if jax.process_count() > 1 else None
        )

        def manager(name, keep):
            listing = functools.partial(self._list_files, name)
            (self.workdir / name).mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=False,
                multiprocessing_options=alone,
                async_options=ocp.AsyncOptions(post_finalization_callback=listing),
            )
            return ocp.CheckpointManager(self.workdir / name, options=options)

        self._in_flight: dict[str, int] = {}
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
        self._save("last", step, state, meta)

    def save_best(self, step: int, weights: PyTree, meta: dict[str, Any]) -> None:
        """Saves {"params", "stats"} as the best so far."""
        self._save("best", step, weights, meta)

    def restore(
        self, template: PyTree, check: Callable[[dict[str, Any]], None] = lambda meta: None
    ) -> tuple[PyTree, dict[str, Any]]:
        """The newest readable state and its meta, with the shapes and shardings of `template`.

        Newer ones that are unreadable are moved to `broken/`, and a line says so.

        Args:
          check: raises if a checkpoint with this meta is not to be continued from.
        Raises:
          CheckpointError: there is no checkpoint, none can be read, or it is of another model.
        """
        broken: dict[int, str] = {}
        for step in sorted(self._last.all_steps(), reverse=True):
            try:
                tree, meta = self._restore("last", step, template, check)
            except _Unreadable as error:
                broken[step] = str(error)
                continue
            for number, why in broken.items():
                self._put_aside("last", number, why, f"continuing from update {step} instead")
            return tree, meta
        if not broken:
            raise CheckpointError(f"no checkpoint in {self.workdir}: train there first")
        rows = "\n".join(f"  update {step}: {why}" for step, why in broken.items())
        raise CheckpointError(
            f"no checkpoint in {self.workdir / 'last'} can be read:\n{rows}\nPut files back from a "
            "copy, or give another --workdir, or remove this one to train from the start."
        )

    def restore_best(self, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The best weights and their meta.

        Raises:
          CheckpointError: there are none, they cannot be read, or are of another model.
        """
        if self.best is None:
            raise CheckpointError(f"no best weights in {self.workdir}: train there first")
        try:
            return self._restore("best", self.best, template)
        except _Unreadable as error:
            raise self._lost_best(error) from error

    def restore_weights(self, template: PyTree) -> tuple[PyTree, dict[str, Any], int]:
        """{"params", "stats"} of the newest readable state, the average if the recipe averages;
        its meta and its update. Moves nothing.

        Args:
          template: the shapes that they must have.
        Raises:
          CheckpointError: there is none, none can be read, or it is of another model.
        """
        why = "train there first"
        for step in sorted(self._last.all_steps(), reverse=True):
            try:
                self._verify("last", step)
                meta = self._meta("last", step)
                state = self._last.restore(
                    step, args=ocp.args.Composite(tree=ocp.args.StandardRestore())
                )["tree"]
                weights = state.get("ema") or {k: state[k] for k in ("params", "stats")}
            except (_Unreadable, FileNotFoundError, KeyError, ValueError) as error:
                why = f"that of update {step} cannot be read: {_first_line(error)}"
                continue
            if _shapes(weights) != _shapes(template):
                raise CheckpointError(
                    f"the checkpoint of update {step} in {self.workdir} does not fit its config"
                )
            return weights, meta, step
        raise CheckpointError(f"no checkpoint in {self.workdir / 'last'}: {why}")

    def rewind(self, step: int) -> dict[str, Any]:
        """Forgets best weights of updates after `step`, which a continued run will do again.

        Returns:
          What the evaluation of the best weights that are left gave; {} if there are none.
        """
        for later in [s for s in self._best.all_steps() if s > step]:
            self._best.delete(later)
        if self.best is None:
            return {}
        try:
            self._verify("best", self.best)
            return self._meta("best", self.best)["metrics"]
        except _Unreadable as error:
            self._put_aside("best", self.best, str(error), "the next evaluation counts as the best")
            return {}

    def meta(self, best: bool = False) -> dict[str, Any]:
        """What was saved beside the newest state or the best weights.

        Raises:
          CheckpointError: there is none, or it cannot be read.
        """
        name, step = ("best", self.best) if best else ("last", self.latest)
        if step is None:
            raise CheckpointError(f"no checkpoint in {self.workdir}: train there first")
        try:
            return self._meta(name, step)
        except _Unreadable as error:
            if best:
                raise self._lost_best(error) from error
            raise CheckpointError(
                f"the checkpoint of update {step} in {self.workdir} cannot be read: {error}. "
                "Training again in this workdir continues from the one before."
            ) from error

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

    def _manager(self, name: str):
        return self._last if name == "last" else self._best

    def _save(self, name: str, step: int, tree: PyTree, meta: dict[str, Any]) -> None:
        # A copy of our own: the next update writes into the donated buffers.
        tree = jax.tree.map(lambda a: np.array(a), jax.device_get(tree))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        free = shutil.disk_usage(self.workdir).free
        try:
            if free < size:
                raise OSError(errno.ENOSPC, "No space left on device")
            self._manager(name).wait_until_finished()
            self._in_flight[name] = step
            saved = self._manager(name).save(
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

    def _list_files(self, name: str) -> None:
        """Writes down what a checkpoint consists of, just before it appears under its name."""
        folder = self.workdir / name / f"{self._in_flight[name]}.orbax-checkpoint-tmp"
        paths = [p for item in ("meta", "tree") for p in (folder / item).rglob("*") if p.is_file()]
        files = {str(path.relative_to(folder)): _measure(path) for path in sorted(paths)}
        (folder / _LIST).write_text(json.dumps(files))

    def _verify(self, name: str, step: int) -> bool:
        """Compares a checkpoint's files with their list; False if it is too old to have one.

        Raises:
          _Unreadable: a file is not as it was written.
        """
        folder = self.workdir / name / str(step)
        try:
            listed = json.loads((folder / _LIST).read_text())
        except FileNotFoundError:
            return False
        except ValueError as error:
            raise _Unreadable(f"{_LIST} is damaged") from error
        for file, (size, crc) in listed.items():
            try:
                found = _measure(folder / file)
            except FileNotFoundError as error:
                raise _Unreadable(f"{file} is missing") from error
            except OSError as error:  # no reason to go on without it
                raise CheckpointError(f"cannot read the checkpoint: {error}") from error
            if found[0] != size:
                raise _Unreadable(f"{file} has {found[0]} bytes of {size}")
            if found[1] != crc:
                raise _Unreadable(f"{file} does not hold what was written")
        return True

    def _meta(self, name: str, step: int) -> dict[str, Any]:
        only = ocp.args.Composite(meta=ocp.args.JsonRestore())
        try:
            return self._manager(name).restore(step, args=only)["meta"]
        except (FileNotFoundError, KeyError, ValueError) as error:
            raise _Unreadable(f"meta: {_first_line(error)}") from error

    def _restore(
        self,
        name: str,
        step: int,
        template: PyTree,
        check: Callable[[dict[str, Any]], None] = lambda meta: None,
    ) -> tuple[PyTree, dict[str, Any]]:
        verified = self._verify(name, step)
        meta = self._meta(name, step)
        check(meta)
        try:
            theirs = _saved_shapes(self.workdir / name / str(step) / "tree")
        except (FileNotFoundError, KeyError, ValueError) as error:
            raise _Unreadable(f"tree: {_first_line(error)}") from error
        ours = _shapes(template)
        differing = sorted(
            key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)
        )
        if differing:
            rows = "\n".join(
                f"  {key}: checkpoint {theirs.get(key, 'nothing')}, here {ours.get(key, 'nothing')}"
                for key in differing[:5]
            )
            more = f"\n  and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise CheckpointError(
                f"the checkpoint of update {step} in {self.workdir} does not fit this model and "
                f"optimizer:\n{rows}{more}\nUse another workdir, or put the config back."
            )
        try:
            tree = self._manager(name).restore(
                step, args=ocp.args.Composite(tree=ocp.args.StandardRestore(template))
            )["tree"]
        except (FileNotFoundError, ValueError) as error:
            if verified or "PERMISSION_DENIED" in str(error):
                raise CheckpointError(
                    f"cannot read the checkpoint of update {step} in {self.workdir}: "
                    f"{_first_line(error)}"
                ) from error
            raise _Unreadable(f"tree: {_first_line(error)}") from error
        return tree, meta

    def _put_aside(self, name: str, step: int, why: str, instead: str) -> None:
        folder = self.workdir / "broken"
        folder.mkdir(exist_ok=True)
        place, number = folder / f"{name}-{step}", 1
        while place.exists():
            number += 1
            place = folder / f"{name}-{step}-{number}"
        (self.workdir / name / str(step)).rename(place)
        self._manager(name).reload()
        print(
            f"the checkpoint {name}/{step} in {self.workdir} cannot be read ({why}): {instead}. "
            f"It was moved to {place.relative_to(self.workdir)} and may be deleted."
        )

    def _lost_best(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"the best weights in {self.workdir} (update {self.best}) cannot be read: {error}. Put "
            "the files back from a copy, or train on in this workdir: the next evaluation saves "
            "weights again."
        )

    def _explained(self, error: Exception, size: int | None = None) -> CheckpointError:
        text = str(error)
        if getattr(error, "errno", None) == errno.ENOSPC or any(
            words in text for words in ("No space left", "RESOURCE_EXHAUSTED", "File too large")
        ):
            free = shutil.disk_usage(self.workdir).free
            need = "" if size is None else f"{size / 2**20:.1f} MiB needed, "
            text = f"the disk is full ({need}{free / 2**20:.1f} MiB free)"
        newest = newest_complete(self.workdir)
        saved = "none" if newest is None else f"update {newest}"
        return CheckpointError(
            f"cannot save a checkpoint in {self.workdir}: {text}. Last complete checkpoint: "
            f"{saved}. Free some space, or lower checkpoint.keep, and start the same command "
            "again: it continues from there."
        )


class Elsewhere(Checkpoints):
    """The checkpoints of a run that another process saves: here there are none."""

    def __init__(self) -> None:
        """Touches no folder."""

    def __exit__(self, *_: Any) -> None:
        pass

    @property
    def latest(self) -> None:
        return None

    def save(self, *_: Any) -> None:
        pass

    def wait(self) -> None:
        pass


def newest_complete(workdir: Path) -> int | None:
    """Update of the newest complete state on disk; from any thread, whatever the others do."""
    steps = (p.name for p in (Path(workdir) / "last").glob("*"))
    return max((int(name) for name in steps if name.isdigit()), default=None)


def _measure(path: Path) -> list[int]:
    """[bytes, CRC-32] of a file."""
    size, crc = 0, 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return [size, crc]


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return _shapes(ocp.StandardCheckpointHandler().metadata(folder).tree)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


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
