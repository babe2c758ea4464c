"""Our side: runs made from shapes, with random samples, and their engines."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import small  # noqa: F401 registers the model "small-t"

from benchmarks.harness import Stopwatch, Took
from jaxaccum import config as configs
from jaxaccum.accumulate import make_engine
from jaxaccum.training import run

PyTree = Any
CLASSES = 80


def prepare(task: str, model: str, **changes: Any) -> run.Run:
    """A run on one device with the defaults of a task.

    Args:
      changes: dotted fields of the config, with "__" for the dot.
    """
    config = configs.defaults(task)
    with config.unlocked(), config.ignore_type():
        config.model, config.devices, config.steps = model, 1, 1000
        config.dtype = "float32"
        config.lr.warmup_epochs = 0.0
        config.update_from_flattened_dict(
            {field.replace("__", "."): value for field, value in changes.items()}
        )
    names = [f"class {i}" for i in range(CLASSES)]
    return run.prepare(config, names=names, samples=10_000, identity={})


def random_batch(this: run.Run, objects: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    """An effective batch of random samples: images of noise with so many boxes, or clouds."""
    rng = np.random.default_rng(seed)
    count = this.recipe.nbs
    shapes = this.task.example(count)
    batch = {key: np.zeros(a.shape, a.dtype) for key, a in shapes.items()}
    batch["weight"][:] = 1
    batch["index"][:] = np.arange(count)
    if "image" in batch:
        size = batch["image"].shape[1]
        batch["image"][:] = rng.integers(0, 256, batch["image"].shape, dtype=np.uint8)
        corners = rng.uniform(0, 0.7 * size, (count, objects, 2))
        sides = rng.uniform(0.1 * size, 0.3 * size, (count, objects, 2))
        batch["boxes"][:, :objects] = np.concatenate([corners, corners + sides], -1)
        batch["classes"][:, :objects] = rng.integers(0, CLASSES, (count, objects))
        batch["valid"][:, :objects] = True
        return batch
    for key in ("partial", "complete"):  # points of a box's surface, one half of it seen
        cloud = rng.uniform(-0.5, 0.5, batch[key].shape)
        axis = rng.integers(0, 3, batch[key].shape[:2])
        side = np.sign(rng.uniform(-1, 1, axis.shape)) * 0.5
        np.put_along_axis(cloud, axis[..., None], side[..., None], axis=-1)
        batch[key][:] = cloud
    batch["partial"][..., 0] = -np.abs(batch["partial"][..., 0])
    return batch


def engine_of(this: run.Run):
    """The engine of a run."""
    return make_engine(this.forward, this.rule, this.window)


def state_of(this: run.Run) -> PyTree:
    """Shapes of the state of a run."""
    params, stats = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype), this.task.initialise(0)
    )
    return jax.eval_shape(this.rule.init, params, stats)


def bytes_of(tree: PyTree) -> int:
    """Of arrays or shapes."""
    return sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(tree))


class Updates:
    """A run on its own random batch: its state, and updates to time.

    Attributes:
      first: the log of the first update.
    """

    def __init__(self, this: run.Run, batch: dict[str, np.ndarray] | None = None):
        self.run, self.engine = this, engine_of(this)
        self.batch = random_batch(this) if batch is None else batch
        self.start = this.task.initialise(0)
        self.state = self.engine.init(*self.start)
        self.state, log = self.engine.update(self.state, self.batch)
        self.first = {key: float(value) for key, value in log.items()}
        if not self.first["ok"]:
            raise RuntimeError(f"the first update is not finite: {self.first}")

    def seconds(self, updates: int = 1) -> Took:
        """Mean time of so many updates, their samples' way to the device included."""
        with Stopwatch() as watch:
            for _ in range(updates):
                self.state, log = self.engine.update(self.state, self.batch)
            jax.block_until_ready((self.state, log))
        return watch.took(updates)


def seconds(function: Callable, *args: Any, calls: int = 1) -> Took:
    """Mean time of so many calls, waiting for their results."""
    with Stopwatch() as watch:
        for _ in range(calls):
            result = function(*args)
        jax.block_until_ready(result)
    return watch.took(calls)
