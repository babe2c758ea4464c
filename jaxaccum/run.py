"""From a config and a data set to everything that a training run is made of."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxaccum import config as configs
from jaxaccum import data, models, optim
from jaxaccum.accumulate import Geometry, Recipe, UpdateRule, Window
from jaxaccum.tasks.detection import DetectionTask


@dataclasses.dataclass(frozen=True)
class Run:
    """What is learned from what, and how it is computed.

    Attributes:
      config: the config it was made of.
      recipe, window: what is learned, and its layout on the geometry.
      sizes: (steps,) samples of every update: `nbs` each, but for the ramp of the compat rule.
      schedule: hyperparameters of every update.
      task: model, terms and batch format.
      rule: the update.
    """

    config: ml_collections.ConfigDict
    recipe: Recipe
    window: Window
    sizes: np.ndarray
    schedule: optim.Schedule
    task: DetectionTask
    rule: UpdateRule

    @property
    def steps(self) -> int:
        """Updates of the run."""
        return len(self.sizes)

    def size_of(self, window: int) -> int:
        """Samples of a window; those made up for skipped ones are like the last."""
        return int(self.sizes[min(window, self.steps - 1)])

    def samples_before(self, window: int) -> int:
        """Samples consumed before a window."""
        more = max(window - self.steps, 0)
        return int(self.sizes[:window].sum()) + more * int(self.sizes[-1])


def prepare(
    config: ml_collections.ConfigDict, *, num_classes: int, samples: int, identity: dict[str, Any]
) -> Run:
    """Derives a run.

    Args:
      config: checked by `config.validate`.
      num_classes: classes of the data set.
      samples: samples of an epoch.
      identity: what identifies the data, kept in the recipe.
    Raises:
      ConfigError, GeometryError: what cannot be run, with what could.
    """
    configs.validate(config)
    # More devices than microbatches would only compute padding.
    useful = -(-config.nbs // config.microbatch)
    devices = config.devices or min(len(jax.devices()), useful)
    sizes = _sizes(config, devices, samples)
    config = optim.resolve(config, num_classes, len(sizes))
    recipe = configs.recipe_of(config, len(sizes), identity | {"classes": num_classes}, devices)
    if config.compat:  # the usual rule: statistics per microbatch, as many samples as K gives
        frozen = config.bn_group == "frozen"
        recipe = dataclasses.replace(
            recipe, nbs=int(sizes.max()), bn_group="frozen" if frozen else config.microbatch
        )
    window = Window(recipe, Geometry(config.microbatch, devices, config.engine))
    model = models.create(config.model, num_classes=num_classes, dtype=compute_dtype(config))
    task = DetectionTask(
        model, config.data.image_size, recipe.group,
        (config.loss.box, config.loss.cls, config.loss.dfl),
    )  # fmt: skip
    schedule = optim.make_schedule(config, sizes, samples)
    ema = config.ema
    rule = UpdateRule(
        task.objective(recipe.nbs, config.compat),
        optim.make_optimizer(config, schedule),
        clip=config.optimizer.clip,
        ema_decay=optim.ema_decay(ema.decay, ema.ramp) if ema.decay else None,
    )
    return Run(config, recipe, window, sizes, schedule, task, rule)


def _sizes(config: ml_collections.ConfigDict, devices: int, samples: int) -> np.ndarray:
    """Samples of every update."""
    total = config.steps * config.nbs if config.steps else config.epochs * samples
    if not config.compat:
        return np.full(max(-(-round(total) // config.nbs), 1), config.nbs)
    # The usual trainer: K = round(nbs / batch) microbatches, ramped up from 1 over the warm-up.
    batch = config.microbatch * devices
    ratio, warmup = config.nbs / batch, round(config.lr.warmup_epochs * samples / batch)
    sizes, done = [], 0
    while done < total:
        k = 0
        while True:
            k += 1
            number = done // batch + k - 1
            wanted = 1 + (ratio - 1) * number / warmup if number < warmup else ratio
            if k >= max(round(wanted), 1):
                break
        sizes.append(k * batch)
        done += k * batch
    return np.asarray(sizes)


def make_stream(run: Run, source: data.Source, mosaic: bool = True) -> data.TrainStream:
    """The run's samples; without mosaic and mixup from the first if not `mosaic`.

    Raises:
      ConfigError: an augmentation is out of its range.
    """
    config = run.config
    options = config.augment.to_dict()
    options.pop("close_mosaic")
    try:
        augment = data.Augment(**options)
    except ValueError as error:
        raise configs.ConfigError(f"augment: {error}") from None
    return data.TrainStream(
        source,
        image_size=config.data.image_size,
        max_objects=config.data.max_objects,
        augment=augment,
        seed=config.seed,
        close_mosaic_at=mosaic_until(run, len(source)) if mosaic else 0,
        cache=config.data.cache,
        cache_bytes=int(config.data.cache_gib * 2**30) // max(config.data.workers, 1),
    )


def mosaic_until(run: Run, samples: int) -> int:
    """Samples of the run that are made with mosaic; the last epochs are not."""
    return max(int(run.sizes.sum()) - round(run.config.augment.close_mosaic * samples), 0)


def compute_dtype(config: ml_collections.ConfigDict) -> Any:
    """The dtype of the model's arithmetic; sets how exact JAX's products are, for the process.

    float32 means float32: by default GPUs and TPUs round the factors, to a different degree from
    one program to the next, which is more than a geometry may change.
    """
    exact = {"float32": "highest", "float64": "highest"}.get(config.dtype)
    jax.config.update("jax_default_matmul_precision", exact)
    return jnp.dtype(configs.DTYPES[config.dtype])


def open_source(
    config: ml_collections.ConfigDict, split: str, names: tuple[str, ...] | None = None
) -> data.Source:
    """The "train" or "val" split that the config names.

    Raises:
      DataError: it cannot be used, or has other classes than `names`.
    """
    options = config.data
    return data.open_source(
        options.path, split, val_path=options.val_path, images=options.images,
        on_error=options.on_error, names=names,
    )  # fmt: skip


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless told otherwise by JAX's own
    environment variable."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(base / "jaxaccum" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
