"""A trained model taken from a workdir, for evaluation and prediction."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from jaxaccum import config as configs
from jaxaccum import tasks
from jaxaccum.accumulate import Recipe
from jaxaccum.checkpoint import CheckpointError, Checkpoints
from jaxaccum.run import compute_dtype

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with the weights of a run.

    Attributes:
      task: the model and what belongs to it.
      params, stats: of the best evaluation, averaged if the recipe averages.
      config: the run's config.
      names: of the classes or categories.
      step: update the weights are of.
      fingerprint: of the recipe they were learned by.
      facts: what of the training data a user of the weights must know; see `Task.facts`.
    """

    task: Any
    params: PyTree
    stats: PyTree
    config: ml_collections.ConfigDict
    names: tuple[str, ...]
    step: int
    fingerprint: str
    facts: dict[str, Any]


def load(workdir: Path) -> Trained:
    """The best weights of a run.

    Raises:
      CheckpointError: the workdir holds none.
    """
    if not (workdir / "best").is_dir():
        raise CheckpointError(
            f"{workdir} holds no trained weights (no folder 'best'): give the --workdir of a run "
            "that has evaluated at least once"
        )
    with Checkpoints(workdir) as checkpoints:
        if checkpoints.best is None:
            raise CheckpointError(f"{workdir}/best is empty: the run has not evaluated yet")
        meta = checkpoints.meta(best=True)
        config = configs.DEFAULTS[meta["config"]["task"]]()
        with config.unlocked():
            config.update(meta["config"])
        names = tuple(meta["names"])
        learned = config.bn_group == "frozen" or not configs.is_compat(config)
        recipe = Recipe(config.nbs, config.bn_group if learned else config.microbatch)
        task = tasks.of(config).create(config, names, recipe.group, compute_dtype(config))
        params, stats = task.initialise(0)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        template = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype, sharding=device),
            {"params": params, "stats": stats},
        )
        weights, _ = checkpoints.restore_best(template)
        return Trained(
            task, weights["params"], weights["stats"], config, names, checkpoints.best,
            meta["fingerprint"], meta.get("facts", {}),
        )  # fmt: skip
