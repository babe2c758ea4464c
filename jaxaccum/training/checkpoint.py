"""Checkpoints of a run: the whole state to continue from, and the best weights to use."""

from __future__ import annotations

import errno
import functools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxaccum.data.texts import shown_path
from jaxaccum.errors import UserError
from jaxaccum.training.checkpoint_files import DAMAGE, Unreadable, verify, write_list
from jaxaccum.training.workdir import plain_name, why_not_written

PyTree = Any


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written or used; the message says why and what to do."""


class Checkpoints:
    """`last/STEP` holds the newest states, `best/STEP` the best weight averages.

    Saves are asynchronous, and a checkpoint appears only when it is complete; it counts when it was
    found again as a reader finds it. Use as a context manager, so that a run does not end before
    its last save has. Ones that turn out to be unreadable are moved to `broken/`. Of several
    processes only the first has them, see `Elsewhere`.
    """

    def __init__(self, workdir: Path, keep: int = 2):
        """Opens a folder; in one that holds none yet, folders are made by the first save.

        Raises:
          CheckpointError: it cannot be read.
        """
        self.workdir = Path(workdir).resolve()
        self._name = shown_path(self.workdir)
        self._there, self._descriptor = plain_name(self.workdir)

        # The state of a run is whole in every process: the first needs no other to save it.
        alone = ocp.options.MultiprocessingOptions(
            active_processes={0} if jax.process_count() > 1 else None
        )

        def manager(name, keep):
            listing = functools.partial(self._list_files, name)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=False,
                multiprocessing_options=alone,
                async_options=ocp.AsyncOptions(post_finalization_callback=listing),
            )
            return ocp.CheckpointManager(self._there / name, options=options)

        self._in_flight: dict[str, tuple[int, dict[str, tuple[int, ...]]]] = {}
        try:
            self._last, self._best = manager("last", keep), manager("best", 1)
        except Exception as error:
            self._let_go()
            raise CheckpointError(
                f"cannot read the checkpoints in {self._name}: {self._first_line(error)}"
            ) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, *_):
        failed = kind is not None
        try:
            self.wait()
        except CheckpointError:
            if not failed:
                failed = True
                raise
        finally:
            for manager in (self._last, self._best):
                try:
                    manager.close()
                except Exception:  # a save that failed, told by `wait`, is told again here
                    if not failed:
                        raise
            self._let_go()

    def _let_go(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

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
          CheckpointError: the disk is full or cannot be written, or the save before this one
            cannot be found again.
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
            except Unreadable as error:
                broken[step] = str(error)
                continue
            for number, why in broken.items():
                self._put_aside("last", number, why, f"continuing from update {step} instead")
            return tree, meta
        if not broken:
            raise CheckpointError(f"no checkpoint in {self._name}: train there first")
        rows = "\n".join(f"  update {step}: {why}" for step, why in broken.items())
        raise CheckpointError(
            f"no checkpoint in {shown_path(self.workdir / 'last')} can be read:\n{rows}\nPut files "
            "back from a copy, or give another --workdir, or remove this one to train from the "
            "start."
        )

    def restore_best(self, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The best weights and their meta.

        Raises:
          CheckpointError: there are none, they cannot be read, or are of another model.
        """
        if self.best is None:
            raise CheckpointError(f"no best weights in {self._name}: train there first")
        try:
            return self._restore("best", self.best, template)
        except Unreadable as error:
            raise self._lost_best(error) from error

    @property
    def steps(self) -> list[int]:
        """Updates of the states that are kept, in order."""
        return sorted(self._last.all_steps())

    def restore_weights(
        self, template: PyTree, only: int | None = None
    ) -> tuple[PyTree, dict[str, Any], int]:
        """{"params", "stats"} of the newest readable state, the average if the recipe averages;
        its meta and its update. Moves nothing.

        Args:
          template: the shapes that they must have.
          only: the state after this update instead.
        Raises:
          CheckpointError: there is none, none can be read, or it is of another model.
        """
        why = "train there first"
        for step in reversed(self.steps) if only is None else [only]:
            try:
                self._verify("last", step)
                meta = self._meta("last", step)
                state = self._last.restore(
                    step, args=ocp.args.Composite(tree=ocp.args.StandardRestore())
                )["tree"]
                weights = state.get("ema") or {k: state[k] for k in ("params", "stats")}
            except (Unreadable, FileNotFoundError, KeyError, ValueError) as error:
                why = f"that of update {step} cannot be read: {self._first_line(error)}"
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
            return self._metrics(self.best)
        except Unreadable as error:
            self._put_aside("best", self.best, str(error), "the next evaluation counts as the best")
            return {}

    def is_whole(self, step: int) -> bool:
        """Whether all files of a state are as they were written."""
        try:
            return self._verify("last", step)
        except Unreadable:
            return False

    def meta(self, best: bool = False, step: int | None = None) -> dict[str, Any]:
        """What was saved beside the newest state or the best weights.

        Args:
          step: of another state than the newest.
        Raises:
          CheckpointError: there is none, or it cannot be read.
        """
        name = "best" if best else "last"
        if step is None:
            step = self.best if best else self.latest
        if step is None:
            raise CheckpointError(f"no checkpoint in {self._name}: train there first")
        try:
            self._verify(name, step, only="meta")
            return self._meta(name, step)
        except Unreadable as error:
            if best:
                raise self._lost_best(error) from error
            raise CheckpointError(
                f"the checkpoint of update {step} in {self._name} cannot be read: {error}. "
                "Training again in this workdir continues from the one before."
            ) from error

    def wait(self) -> None:
        """Waits for saves in flight.

        Raises:
          CheckpointError: one of them failed, or cannot be found again.
        """
        first: CheckpointError | None = None
        for name in ("last", "best"):  # both, or what failed in the second comes out at the close
            try:
                self._finish(name)
            except CheckpointError as error:
                first = first or error
            except Exception as error:
                explained = self._explained(error)
                explained.__cause__ = error
                first = first or explained
        if first:
            raise first

    def _finish(self, name: str) -> None:
        """Waits for a save in flight, and looks for it as a reader would."""
        try:
            self._manager(name).wait_until_finished()
        except Exception:
            self._in_flight.pop(name, None)
            raise
        if name not in self._in_flight:
            return
        step, shapes = self._in_flight.pop(name)
        folder = self._there / name
        try:
            if step not in ocp.utils.checkpoint_steps(folder):
                raise Unreadable("it is not listed")
            self._verify(name, step, sizes_only=True)
            if _saved_shapes(folder / str(step) / "tree") != shapes:
                raise Unreadable("its arrays are not those that were saved")
        except (Unreadable, *DAMAGE) as error:
            raise CheckpointError(
                f"the checkpoint of update {step} was saved in {self._name}, but cannot be found "
                f"again as it was ({self._first_line(error)}): another program changes the folder, "
                "or the disk does not keep what is written. Give another --workdir."
            ) from error

    def _manager(self, name: str):
        return self._last if name == "last" else self._best

    def _save(self, name: str, step: int, tree: PyTree, meta: dict[str, Any]) -> None:
        # A copy of our own: the next update writes into the donated buffers.
        tree = jax.tree.map(lambda a: np.array(a), jax.device_get(tree))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        try:
            (self.workdir / name).mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.workdir).free < size:
                raise OSError(errno.ENOSPC, "No space left on device")
            self._finish(name)
            self._in_flight[name] = step, _shapes(tree)
            saved = self._manager(name).save(
                step,
                args=ocp.args.Composite(
                    tree=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta)
                ),
                force=True,
            )
            if not saved:
                raise RuntimeError(f"update {step} was not saved, orbax gives no reason")
        except CheckpointError:
            raise
        except Exception as error:
            self._in_flight.pop(name, None)
            raise self._explained(error, size) from error

    def _list_files(self, name: str) -> None:
        """Writes down what a checkpoint consists of, just before it appears under its name."""
        step, _ = self._in_flight[name]
        write_list(self.workdir / name / f"{step}.orbax-checkpoint-tmp", step)

    def _verify(self, name: str, step: int, only: str = "", sizes_only: bool = False) -> bool:
        """As `checkpoint_files.verify`.

        Raises:
          Unreadable: a file is not as it was written.
          CheckpointError: one cannot be read, though it may be whole.
        """
        try:
            return verify(self.workdir / name / str(step), step, only, sizes_only)
        except OSError as error:
            raise self._denied(error) from error

    def _denied(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"cannot read the checkpoint: {shown_path(error.filename or self.workdir)}: "
            f"{error.strerror}. Give yourself the right to read it, or check the disk."
        )

    def _meta(self, name: str, step: int) -> dict[str, Any]:
        only = ocp.args.Composite(meta=ocp.args.JsonRestore())
        try:
            meta = self._manager(name).restore(step, args=only)["meta"]
        except DAMAGE as error:
            raise Unreadable(f"meta: {self._first_line(error)}") from error
        if not isinstance(meta, dict):
            raise Unreadable("meta: not a dict")
        return meta

    def _metrics(self, step: int) -> dict[str, Any]:
        metrics = self._meta("best", step).get("metrics")
        if not isinstance(metrics, dict):
            raise Unreadable("meta: no metrics")
        return metrics

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
            theirs = _saved_shapes(self._there / name / str(step) / "tree")
        except DAMAGE as error:
            raise Unreadable(f"tree: {self._first_line(error)}") from error
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
                f"the checkpoint of update {step} in {self._name} does not fit this model and "
                f"optimizer:\n{rows}{more}\nUse another workdir, or put the config back."
            )
        try:
            tree = self._manager(name).restore(
                step, args=ocp.args.Composite(tree=ocp.args.StandardRestore(template))
            )["tree"]
        except DAMAGE as error:
            if verified or "PERMISSION_DENIED" in str(error):
                raise CheckpointError(
                    f"cannot read the checkpoint of update {step} in {self._name}: "
                    f"{self._first_line(error)}"
                ) from error
            raise Unreadable(f"tree: {self._first_line(error)}") from error
        return tree, meta

    def _put_aside(self, name: str, step: int, why: str, instead: str) -> None:
        folder = self.workdir / "broken"
        try:
            folder.mkdir(exist_ok=True)
            place, number = folder / f"{name}-{step}", 1
            while os.path.lexists(place):
                number += 1
                place = folder / f"{name}-{step}-{number}"
            (self.workdir / name / str(step)).rename(place)
        except OSError as error:
            reason, advice = why_not_written(error, self.workdir)
            raise CheckpointError(
                f"the checkpoint {name}/{step} in {self._name} cannot be read ({why}), nor be "
                f"moved to broken/: {reason}. {advice}"
            ) from error
        self._manager(name).reload()
        print(
            f"the checkpoint {name}/{step} in {self._name} cannot be read ({why}): {instead}. "
            f"It was moved to {place.relative_to(self.workdir)} and may be deleted."
        )

    def _lost_best(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"the best weights in {self._name} (update {self.best}) cannot be read: {error}. Put "
            "the files back from a copy, or train on in this workdir: the next evaluation saves "
            "weights again."
        )

    def _explained(self, error: Exception, size: int | None = None) -> CheckpointError:
        why, advice = why_not_written(error, self.workdir, size)
        newest = newest_complete(self.workdir)
        saved = "none" if newest is None else f"update {newest}"
        again = "starts again" if newest is None else "continues from there"
        return CheckpointError(
            f"cannot save a checkpoint in {self._name}: {self._ours(why)}. Last complete "
            f"checkpoint: {saved}. {advice} The same command then {again}."
        )

    def _first_line(self, error: BaseException) -> str:
        return self._ours((str(error).splitlines() or [type(error).__name__])[0][:200])

    def _ours(self, text: str) -> str:
        """A message of the library with the workdir's own name in it."""
        return text.replace(str(self._there), self._name)


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
    try:
        found = list((Path(workdir) / "last").iterdir())
    except OSError:
        return None
    names = (p.name for p in found if re.fullmatch(r"0|[1-9]\d{0,17}", p.name, re.A) and p.is_dir())
    return max(map(int, names), default=None)


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return _shapes(ocp.StandardCheckpointHandler().metadata(folder).tree)
