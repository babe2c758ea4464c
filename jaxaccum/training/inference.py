"""A trained model taken from a workdir, for evaluation and prediction."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from jaxaccum import config as configs
from jaxaccum import tasks
from jaxaccum.data import texts
from jaxaccum.fields import of_earlier
from jaxaccum.tasks import Trained
from jaxaccum.training.checkpoint import CheckpointError, Checkpoints
from jaxaccum.training.run import compute_dtype

WEIGHTS_HELP = (
    "best, last, or the number of an update that is kept; the best by default, or the last where "
    "there are no best ones yet"
)

END_TO_END_HELP = (
    "of a detector with a one-to-one branch (YOLO26): by that, without non-maximum suppression, or "
    "by the other; as eval.end_to_end of the run says by default"
)


def load(workdir: Path, weights: str = "", *, computes: bool = True) -> Trained:
    """The best weights of a run; the newest, which is said, if it has not evaluated yet.

    Args:
      weights: others: "best", "last", or the number of an update.
      computes: whether the network will be used; else the precision of products, which is of the
        whole process, stays that of what this one computes.
    Raises:
      CheckpointError: the workdir holds none, or not these.
    """
    require_run(workdir)
    with Checkpoints(workdir) as checkpoints:
        if checkpoints.best is None and checkpoints.latest is None:
            raise CheckpointError(
                f"{workdir} holds no trained weights (nothing in its folders 'best' and 'last'): "
                "give the --workdir of a run that has saved a checkpoint"
            )
        evaluated, wanted = _choice(checkpoints, weights, workdir)
        meta = checkpoints.meta(best=evaluated)
        config = configs.defaults(meta["config"]["task"])
        with config.unlocked():
            config.update(of_earlier(meta["config"]))
        names = tuple(meta["names"])
        task = tasks.of(config).create(config, names, _dtype(config) if computes else np.float32)
        params, stats = task.initialise(0)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        template = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype, sharding=device),
            {"params": params, "stats": stats},
        )
        if evaluated:
            found, step = checkpoints.restore_best(template)[0], checkpoints.best
        else:
            found, _, step = checkpoints.restore_weights(template, wanted)
            found = jax.device_put(found, device)
            if not weights:
                print(
                    f"note: {workdir} has no best weights yet: using the last, of update {step}",
                    file=sys.stderr,
                )
        return Trained(
            task, found["params"], found["stats"], config, names, step or 0,
            meta["fingerprint"], meta.get("facts", {}),
        )  # fmt: skip


def _dtype(config: ml_collections.ConfigDict) -> Any:
    """The dtype to compute in, set for the process; says where it is not that of the training."""
    here = at_hand(config)
    if here.dtype != config.dtype:
        print(f"note: computed in {here.dtype}, trained in {config.dtype}", file=sys.stderr)
    return compute_dtype(here)


def at_hand(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config, in float32 where the devices at hand do not compute in the run's bfloat16: there
    that would be slower, and less exact."""
    if config.dtype != "bfloat16" or configs.best_dtype(jax.local_devices()[0]) == "bfloat16":
        return config
    config = config.copy_and_resolve_references()
    config.dtype = "float32"
    return config


def _choice(checkpoints: Checkpoints, weights: str, workdir: Path) -> tuple[bool, int | None]:
    """Whether the best weights are meant, and else of which update, None for the newest.

    Raises:
      CheckpointError: they are not kept, or the word is none.
    """
    best, steps = checkpoints.best, checkpoints.steps
    if not weights or (weights == "best" and best is not None):
        return best is not None, None
    if weights == "last" and steps:
        return False, None
    if weights.isascii() and weights.isdecimal():
        if int(weights) == best:
            return True, None
        if int(weights) in steps:
            return False, int(weights)
    kept = [*([f"best (update {best})"] if best is not None else []), *map(str, steps)]
    raise CheckpointError(
        f"{texts.shown_path(workdir)} keeps no weights {texts.shown(weights)}: there is "
        f"{', '.join(kept)}. best, last and the number of an update are understood"
    )


def require_run(workdir: Path) -> None:
    """Refuses a folder that no run has saved weights in; makes nothing there.

    Raises:
      CheckpointError: it is none.
    """
    if not workdir.is_dir():
        raise CheckpointError(f"{texts.shown_path(workdir)}: no such folder; give that of a run")
    if not any((workdir / kind).is_dir() for kind in ("best", "last")):
        raise CheckpointError(
            f"{texts.shown_path(workdir)} holds no trained weights (no folder 'best' or 'last'): "
            "give the --workdir of a run that has saved a checkpoint"
        )


__all__ = ["Trained", "load", "require_run"]
