"""A trained model taken from a workdir, for evaluation and prediction."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np

from jaxaccum import config as configs
from jaxaccum import tasks
from jaxaccum.data import texts
from jaxaccum.tasks import Trained
from jaxaccum.training.checkpoint import CheckpointError, Checkpoints
from jaxaccum.training.run import compute_dtype


def load(workdir: Path) -> Trained:
    """The best weights of a run; the newest, which is said, if it has not evaluated yet.

    Raises:
      CheckpointError: the workdir holds none.
    """
    require_run(workdir)
    with Checkpoints(workdir) as checkpoints:
        evaluated = checkpoints.best is not None
        if not evaluated and checkpoints.latest is None:
            raise CheckpointError(
                f"{workdir} holds no trained weights (nothing in its folders 'best' and 'last'): "
                "give the --workdir of a run that has saved a checkpoint"
            )
        meta = checkpoints.meta(best=evaluated)
        config = configs.defaults(meta["config"]["task"])
        with config.unlocked():
            config.update(meta["config"])
        names = tuple(meta["names"])
        task = tasks.of(config).create(config, names, compute_dtype(config))
        params, stats = task.initialise(0)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        template = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype, sharding=device),
            {"params": params, "stats": stats},
        )
        if evaluated:
            weights, step = checkpoints.restore_best(template)[0], checkpoints.best
        else:
            weights, _, step = checkpoints.restore_weights(template)
            weights = jax.device_put(weights, device)
            print(
                f"note: {workdir} has no best weights yet: using the last, of update {step}",
                file=sys.stderr,
            )
        return Trained(
            task, weights["params"], weights["stats"], config, names, step or 0,
            meta["fingerprint"], meta.get("facts", {}),
        )  # fmt: skip


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
