"""From a config and a data set to everything that a training run is made of."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from jaxaccum import config as configs
from jaxaccum import tasks
from jaxaccum.accumulate import (
    Geometry,
    GeometryError,
    Recipe,
    UpdateRule,
    Window,
    grouped,
    usual_rule,
)
from jaxaccum.accumulate.terms import Grouped
from jaxaccum.machine import user_cache
from jaxaccum.training import freezing, optim


@dataclasses.dataclass(frozen=True)
class Run:
    """What is learned from what, and how it is computed.

    Attributes:
      config: the config it was made of.
      recipe, window: what is learned, and its layout on the geometry.
      sizes: samples of every update: `nbs` each, but for the ramp of the usual rule.
      schedule: hyperparameters of every update.
      task: model, terms, samples and metrics.
      forward: the task's, without what is frozen.
      rule: the update.
    """

    config: ml_collections.ConfigDict
    recipe: Recipe
    window: Window
    sizes: usual_rule.WindowSizes
    schedule: optim.Schedule
    task: tasks.Task
    forward: freezing.Forward
    rule: UpdateRule

    @property
    def steps(self) -> int:
        """Updates of the run."""
        return self.sizes.updates

    @functools.cached_property
    def grouped(self) -> Grouped:
        """The forward, given the recipe's groups."""
        return grouped(self.forward, self.recipe.group)

    def size_of(self, window: int) -> int:
        """Samples of a window; those made up for skipped ones are like the last."""
        return self.sizes.of(window)

    def samples_before(self, window: int) -> int:
        """Samples consumed before a window."""
        return self.sizes.before(window)


def prepare(
    config: ml_collections.ConfigDict,
    *,
    names: Sequence[str],
    samples: int,
    identity: dict[str, Any],
) -> Run:
    """Derives a run.

    Args:
      config: as made by a file in configs/; checked here.
      names: classes or categories of the data set.
      samples: samples of an epoch.
      identity: what identifies the data, kept in the recipe.
    Raises:
      ConfigError, GeometryError: what cannot be run, with what could.
    """
    configs.validate(config)
    if config.microbatch == "auto":
        raise configs.ConfigError("microbatch auto is settled by training; here give a number")
    config = with_dtype(config, configs.dtype_of(config))
    # More devices than microbatches would only compute padding.
    useful = -(-config.nbs // config.microbatch)
    devices = config.devices or min(len(jax.devices()), useful)
    if jax.process_count() > 1:
        devices = len(jax.devices())  # each process has its part in every update
        if config.devices not in (0, devices):
            raise GeometryError(
                f"devices is {config.devices}, but {jax.process_count()} processes have {devices} "
                f"in all, and all take part: set devices to 0 or {devices}"
            )
    sizes = _sizes(config, devices, samples)
    config = optim.resolve(config, len(names), sizes.updates)
    config, _ = tasks.of(config).settled(config, names)
    recipe = configs.recipe_of(config, sizes.updates, identity | {"classes": len(names)}, devices)
    usual = configs.is_compat(config)
    if usual:
        recipe = usual_rule.recipe(recipe, sizes, config.microbatch)
    window = Window(
        recipe,
        Geometry(
            config.microbatch,
            devices,
            config.engine,
            config.fsdp or devices,
            config.remat == "host",
        ),
    )
    task = tasks.of(config).create(config, names, compute_dtype(config))
    schedule = optim.make_schedule(config, sizes, samples)
    ema = config.ema
    if config.log.noise_scale and window.steps // window.together * devices == 1:
        raise configs.ConfigError(
            "log.noise_scale compares what an update computes at once (a microbatch, or those of "
            "one batch-norm group), and here that is all of it: take "
            + (
                f"a smaller microbatch than {config.microbatch}, or more devices"
                if window.together == 1
                else "more devices, or groups smaller than the effective batch (another recipe)"
            )
        )
    objective = task.objective(recipe.nbs)
    objective = dataclasses.replace(objective, weights=task.weights(schedule))
    if usual:
        objective = usual_rule.UsualObjective.of(objective)
    frozen = freezing.modules(config.freeze)
    rule = UpdateRule(
        dataclasses.replace(objective, noise=config.log.noise_scale),
        optim.make_optimizer(
            config,
            schedule,
            lambda path: task.untrained(path) or freezing.is_frozen(path, frozen),
        ),
        clip=config.optimizer.clip,
        statistics_momentum=schedule.bn_momentum,
        ema_decay=optim.ema_decay(ema.decay, ema.ramp) if ema.decay else None,
    )
    forward = freezing.frozen_forward(task.forward, frozen)
    return Run(config, recipe, window, sizes, schedule, task, forward, rule)


def _sizes(config: ml_collections.ConfigDict, devices: int, samples: int) -> usual_rule.WindowSizes:
    """Samples of every update."""
    total = config.steps * config.nbs if config.steps else config.epochs * samples
    if not configs.is_compat(config):
        updates = max(-(-round(total) // config.nbs), 1)
        _require_updates(updates, config, samples)
        return usual_rule.WindowSizes(config.nbs, updates)
    batch = config.microbatch * devices
    warmup = round(config.lr.warmup_epochs * samples / batch)
    return usual_rule.window_sizes(
        config.nbs, batch, total, warmup, lambda n: _require_updates(n, config, samples)
    )


def _require_updates(updates: int, config: ml_collections.ConfigDict, samples: int) -> None:
    """Refuses runs of more updates than schedules count exactly.

    Raises:
      ConfigError: says how many updates there may be.
    """
    if updates > configs.MOST_UPDATES:
        asked = (
            f"steps={config.steps}" if config.steps
            else f"epochs={config.epochs:g} of {samples} samples at nbs={config.nbs}"
        )  # fmt: skip
        raise configs.ConfigError(
            f"{asked} makes {updates:,} updates, and a run has at most {configs.MOST_UPDATES:,}: "
            f"lower {'steps' if config.steps else 'epochs, or raise nbs'}"
        )


def settled(
    config: ml_collections.ConfigDict, source: tasks.Source
) -> tuple[ml_collections.ConfigDict, list[str]]:
    """The config with what it leaves to the training set as values, and lines about these.

    Raises:
      ConfigError: a field does not fit the set.
    """
    return tasks.of(config).settled(config, source.names, source)


def make_stream(run: Run, source: tasks.Source, plain: bool = False) -> Any:
    """The run's samples; without the strongest augmentation from the first if `plain`.

    Raises:
      ConfigError: an augmentation is out of its range.
    """
    return run.task.stream(run.config, source, run.sizes.total, plain)


def compute_dtype(config: ml_collections.ConfigDict) -> Any:
    """The dtype of the model's arithmetic; sets how exact JAX's products are, for the process.

    float32 means float32: by default GPUs and TPUs round the factors, to a different degree from
    one program to the next, which is more than a geometry may change.
    """
    dtype = configs.dtype_of(config)
    exact = {"float32": "highest", "float64": "highest"}.get(dtype)
    jax.config.update("jax_default_matmul_precision", exact)
    return jnp.dtype(configs.DTYPES[dtype])


def with_dtype(config: ml_collections.ConfigDict, dtype: str) -> ml_collections.ConfigDict:
    """The config with this in the place of its dtype "auto", if it has that."""
    if config.dtype != "auto":
        return config
    config = config.copy_and_resolve_references()
    config.dtype = dtype
    return config


def open_source(
    config: ml_collections.ConfigDict, split: str, names: Sequence[str] | None = None
) -> Any:
    """The "train" or "val" split that the config names.

    Raises:
      ConfigError: there is no such task.
      DataError: it cannot be used, or has other classes than `names`.
    """
    configs.validate(config)
    return tasks.of(config).open(config, split, names)


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless told otherwise by JAX's own
    environment variable."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    jax.config.update("jax_compilation_cache_dir", str(user_cache.folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
