"""Optimizers, schedules and weight averages, as the recipes name them; all counted in updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

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
      bn_momentum: weight of the update's batch statistics in the running ones.
    """

    lr: np.ndarray
    bias_lr: np.ndarray
    momentum: np.ndarray
    bn_momentum: np.ndarray


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
    """Warm-up, then linear, cosine or exponential decay to `lr.final` times the peak.

    With progress p = (samples before the update) / (samples of the run), e epochs before the
    update and f = lr.final:
      linear: (1 - p)(1 - f) + f;   cosine: (1 + cos(pi p))/2 (1 - f) + f;
      exponential: max(lr.decay_rate ^ (e / lr.decay_epochs), f).
    Over the first `lr.warmup_epochs` epochs the learning rate rises from 0, that of biases moves
    from `lr.warmup_bias`, and momentum rises from `lr.warmup_momentum`, all linearly in samples;
    over all but the last epoch at most, or half of a shorter run.

    Args:
      config: with `lr`, `nbs`, `optimizer.momentum` and perhaps `bn_momentum`: then the weight
        of an update's batch statistics is max(start * decay ^ (e / epochs), final), else 0.03.
      sizes: (updates,) samples of every update.
      epoch_samples: samples of an epoch.
    """
    lr = config.lr
    ends = np.cumsum(sizes)
    progress = (ends - sizes) / ends[-1]
    epochs = (ends - sizes) / epoch_samples
    if lr.decay == "exponential":
        shape = np.maximum(lr.decay_rate ** (epochs / lr.decay_epochs), lr.final)
    else:
        shape = 1 - progress if lr.decay == "linear" else (1 + np.cos(np.pi * progress)) / 2
        shape = shape * (1 - lr.final) + lr.final
    target = scaled_lr(lr, config.nbs) * shape
    most = max(ends[-1] - epoch_samples, ends[-1] / 2)
    warmup = min(lr.warmup_epochs * epoch_samples, most)
    risen = np.minimum(ends / warmup, 1.0) if warmup > 0 else np.ones(len(sizes))

    bn_momentum = np.full(len(sizes), 0.03)
    if "bn_momentum" in config:
        bn = config.bn_momentum
        bn_momentum = np.maximum(bn.start * bn.decay ** (epochs / bn.epochs), bn.final)

    def from_to(start, end):
        return start + (end - start) * risen

    return Schedule(
        lr=from_to(0.0, target),
        bias_lr=from_to(lr.warmup_bias, target),
        momentum=from_to(lr.warmup_momentum, np.full(len(sizes), config.optimizer.momentum)),
        bn_momentum=bn_momentum,
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
    config: ml_collections.ConfigDict,
    schedule: Schedule,
    untrained: Callable[[str], bool] = lambda path: False,
) -> optax.GradientTransformation:
    """SGD with Nesterov momentum (decay coupled), MuSGD or AdamW (decoupled), by `optimizer.name`.

    Decay acts on weights only, not on norms and biases; biases have their own warm-up. MuSGD adds
    0.2 of the orthogonalised momentum to SGD's own step of kernels, and moves the class branch of
    a detector three times as fast.

    Args:
      config: with `optimizer`, `nbs` and `lr`.
      schedule: hyperparameters of every update.
      untrained: whether the loss does not depend on the parameter of that path ("a/b/kernel");
        such a one does not decay either, as in PyTorch, where it has no gradient.
    """
    options = config.optimizer

    def decays(path, kind):
        return kind == "weight" and not untrained("/".join(str(key.key) for key in path))

    decay = optax.add_decayed_weights(
        weight_decay(config), mask=lambda p: jax.tree_util.tree_map_with_path(decays, kinds(p))
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
    sgd = optax.chain(decay, trace)
    if options.name == "sgd":
        return optax.chain(sgd, descend)
    faster = optax.partition({True: optax.scale(3.0), False: optax.identity()}, _class_branch)
    muon = optax.chain(orthogonal_momentum(at(schedule.momentum)), optax.scale(0.2))
    return optax.chain(_sum_of(sgd, muon), faster, descend)


class OrthogonalMomentum(NamedTuple):
    """State of `orthogonal_momentum`: updates so far, and the momentum."""

    updates: jax.Array
    momentum: PyTree


def orthogonal_momentum(
    decay: Callable[[jax.Array], jax.Array],
) -> optax.GradientTransformation:
    """Muon's direction for kernels, zero for everything else.

        m <- decay m + (1 - decay) g;   direction = orthogonal(decay m + (1 - decay) g)

    with a kernel (..., in, out) taken as the matrix (out, rest), five Newton-Schulz iterations.
    Jordan et al. 2024, "Muon". Computed in the gradient's own precision: the original's bfloat16
    would turn the rounding of a geometry into a difference that grows.
    """

    def init(params):
        return OrthogonalMomentum(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params))

    def update(gradient, state, params=None):
        del params
        mu = decay(state.updates)

        def mix(m, g):
            return (mu * m + (1 - mu) * g).astype(g.dtype)

        momentum = jax.tree.map(mix, state.momentum, gradient)
        direction = jax.tree.map(
            lambda m, g: orthogonal(mix(m, g)) if g.ndim > 1 else jnp.zeros_like(g),
            momentum, gradient,
        )  # fmt: skip
        return direction, OrthogonalMomentum(state.updates + 1, momentum)

    return optax.GradientTransformation(init, update)


def orthogonal(kernel: jax.Array) -> jax.Array:
    """The nearest orthogonal matrix, roughly: singular values end between 0.7 and 1.2.

    Newton-Schulz: X <- a X + (b XX^T + c (XX^T)^2) X, five times, from X = kernel / |kernel|.
    """
    x = kernel.reshape(-1, kernel.shape[-1]).T
    x = x / (jnp.linalg.norm(x) + 1e-7)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide else x.T).T.reshape(kernel.shape)


def _sum_of(*parts: optax.GradientTransformation) -> optax.GradientTransformation:
    """Every part sees the gradient; their directions are added."""

    def update(gradient, states, params=None):
        done = [p.update(gradient, s, params) for p, s in zip(parts, states, strict=True)]
        return optax.tree.add(*(d for d, _ in done)), tuple(s for _, s in done)

    return optax.GradientTransformation(lambda params: tuple(p.init(params) for p in parts), update)


def _class_branch(params: PyTree) -> PyTree:
    """Whether a parameter is of the class branch of a detection head."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(str(key.key).startswith("cv3.") for key in path), params
    )


def resolve(
    config: ml_collections.ConfigDict, classes: int, updates: int
) -> ml_collections.ConfigDict:
    """The config with `optimizer.name = "auto"` replaced by the reference's choice.

    For more than 10,000 updates MuSGD at 0.01, else AdamW at 0.002 * 5 / (4 + classes) to six
    digits; biases are warmed up from 0. `lr.base` and `optimizer.momentum` are not looked at.
    """
    if config.optimizer.name != "auto":
        return config
    config = config.copy_and_resolve_references()
    if updates > 10_000:
        config.optimizer.update(name="musgd", momentum=0.937)
        config.lr.base = 0.01
    else:
        config.optimizer.update(name="adamw", momentum=0.9)
        config.lr.base = round(0.002 * 5 / (4 + classes), 6)
    config.lr.warmup_bias = 0.0
    return config


def weight_decay(config: ml_collections.ConfigDict) -> float:
    """`optimizer.weight_decay`, times nbs / lr.base_batch where its scaling is "linear"."""
    options = config.optimizer
    factor = config.nbs / config.lr.base_batch
    return options.weight_decay * (factor if options.weight_decay_scaling == "linear" else 1.0)


def ema_decay(decay: float, ramp: float) -> Callable[[jax.Array], jax.Array]:
    """Decay of the weight average after update u: decay * (1 - exp(-u / ramp))."""
    return lambda step: decay * (1 - jnp.exp(-step / ramp))
