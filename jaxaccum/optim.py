"""Optimizers, schedules and weight averages, as the recipes name them; all counted in updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Hyperparameters of every update, as tables of one value per update.

    Attributes:
      lr: learning rate of weights and norms. bias_lr: of biases. momentum: of SGD.
    """

    lr: np.ndarray
    bias_lr: np.ndarray
    momentum: np.ndarray


def scaled_lr(lr: ml_collections.ConfigDict, nbs: int) -> float:
    """The peak learning rate for an effective batch of `nbs`.

    none: base; linear: base * nbs / base_batch (Goyal et al. 2017, arXiv:1706.02677);
    sqrt: base * sqrt(nbs / base_batch) (Krizhevsky 2014, arXiv:1404.5997).
    """
    power = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}[lr.scaling]
    return lr.base * (nbs / lr.base_batch) ** power


def make_schedule(
    config: ml_collections.ConfigDict, sizes: np.ndarray, epoch_samples: int
) -> Schedule:
    """Warm-up, then linear or cosine decay to `lr.final` times the peak.

    With progress p = (samples before the update) / (samples of the run) and f = lr.final:
      linear: (1 - p)(1 - f) + f;   cosine: (1 + cos(pi p))/2 (1 - f) + f.
    Over the first `lr.warmup_epochs` epochs the learning rate rises from 0, that of biases moves
    from `lr.warmup_bias`, and momentum rises from `lr.warmup_momentum`, all linearly in samples;
    at least the last update is at full value.

    Args:
      config: with `lr`, `nbs` and `optimizer.momentum`.
      sizes: (updates,) samples of every update.
      epoch_samples: samples of an epoch.
    """
    lr = config.lr
    ends = np.cumsum(sizes)
    progress = (ends - sizes) / ends[-1]
    shape = 1 - progress if lr.decay == "linear" else (1 + np.cos(np.pi * progress)) / 2
    target = scaled_lr(lr, config.nbs) * (shape * (1 - lr.final) + lr.final)
    warmup = min(lr.warmup_epochs * epoch_samples, ends[-1])
    risen = np.minimum(ends / warmup, 1.0) if warmup > 0 else np.ones(len(sizes))

    def from_to(start, end):
        return start + (end - start) * risen

    return Schedule(
        lr=from_to(0.0, target),
        bias_lr=from_to(lr.warmup_bias, target),
        momentum=from_to(lr.warmup_momentum, np.full(len(sizes), config.optimizer.momentum)),
    )


def at(table: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    """A table of values per update as an optax schedule; stays at its last value."""
    values = jnp.asarray(table)
    return lambda count: values[jnp.minimum(count, len(table) - 1)]


def kinds(params: PyTree) -> PyTree:
    """The kind of every parameter: "bias", "norm" (scales of norm layers) or "weight"."""
    names = {"bias": "bias", "scale": "norm"}
    return jax.tree_util.tree_map_with_path(
        lambda path, _: names.get(path[-1].key, "weight"), params
    )


def make_optimizer(
    config: ml_collections.ConfigDict, schedule: Schedule
) -> optax.GradientTransformation:
    """SGD with Nesterov momentum (decay coupled) or AdamW (decoupled), by `optimizer.name`.

    Decay acts on weights only, not on norms and biases; biases have their own warm-up.
    """
    options = config.optimizer
    decay = optax.add_decayed_weights(
        weight_decay(config), mask=lambda p: jax.tree.map(lambda k: k == "weight", kinds(p))
    )
    rates = {"weight": schedule.lr, "norm": schedule.lr, "bias": schedule.bias_lr}
    descend = optax.partition(
        {kind: optax.scale_by_learning_rate(at(table)) for kind, table in rates.items()}, kinds
    )
    if options.name == "adamw":
        adam = optax.scale_by_adam(b1=options.momentum, b2=options.b2)
        return optax.chain(adam, decay, descend)
    trace = optax.inject_hyperparams(optax.trace, static_args=("nesterov",))(
        decay=at(schedule.momentum), nesterov=True
    )
    return optax.chain(decay, trace, descend)


def weight_decay(config: ml_collections.ConfigDict) -> float:
    """`optimizer.weight_decay`, times nbs / lr.base_batch where its scaling is "linear"."""
    options = config.optimizer
    factor = config.nbs / config.lr.base_batch
    return options.weight_decay * (factor if options.weight_decay_scaling == "linear" else 1.0)


def ema_decay(decay: float, ramp: float) -> Callable[[jax.Array], jax.Array]:
    """Decay of the weight average after update u: decay * (1 - exp(-u / ramp))."""
    return lambda step: decay * (1 - jnp.exp(-step / ramp))
