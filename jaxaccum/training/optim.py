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

from jaxaccum.accumulate.usual_rule import WindowSizes

PyTree = Any


Hyperparameter = Callable[[Any], Any]
"""Updates done before -> value. Of an integer or an array of NumPy in float64, on the host; of an
array of JAX in its default dtype: an optax schedule. After the run's end it is that of its last
update."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Hyperparameters of every update.

    Attributes:
      lr: learning rate of weights and norms. bias_lr: of biases. momentum: of SGD.
      bn_momentum: weight of the update's batch statistics in the running ones.
      epoch: the epoch, from 0, that the first sample of the update is in; an exact integer.
      updates, epochs: of the run; epochs that it begins.
    """

    lr: Hyperparameter
    bias_lr: Hyperparameter
    momentum: Hyperparameter
    bn_momentum: Hyperparameter
    epoch: Hyperparameter
    updates: int
    epochs: int

    def peak(self) -> float:
        """The largest learning rate; of a run of more than 10,000 updates as good as that."""
        return float(self.lr(np.linspace(0, self.updates - 1, 10_000).round().astype(int)).max())


def scaled_lr(lr: ml_collections.ConfigDict, nbs: int) -> float:
    """The peak learning rate for an effective batch of `nbs`.

    none: base; linear: base * nbs / base_batch (Goyal et al. 2017, arXiv:1706.02677);
    sqrt: base * sqrt(nbs / base_batch) (Krizhevsky 2014, arXiv:1404.5997).
    """
    power = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}[lr.scaling]
    return lr.base * (nbs / lr.base_batch) ** power


def make_schedule(config: ml_collections.ConfigDict, sizes: WindowSizes, samples: int) -> Schedule:
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
      sizes: samples of every update.
      samples: of an epoch.
    """
    lr, epoch = config.lr, _epoch(sizes, samples)
    # Floats: samples may be more than an integer of the device holds.
    peak, total, epoch_samples = scaled_lr(lr, config.nbs), float(sizes.total), float(samples)
    most = max(total - epoch_samples, total / 2)
    warmup = min(lr.warmup_epochs * epoch_samples, most)

    def decayed(at: _Place, xp: Any) -> Any:
        if lr.decay == "exponential":
            epochs = at.before / epoch_samples
            return peak * xp.maximum(lr.decay_rate ** (epochs / lr.decay_epochs), lr.final)
        left = at.left / total
        # (1 + cos(pi p)) / 2 = sin^2(pi (1 - p) / 2), which is exact also where p nears 1.
        shape = left if lr.decay == "linear" else xp.sin(np.pi / 2 * left) ** 2
        return peak * (shape * (1 - lr.final) + lr.final)

    def from_to(start: float, end: Callable[[_Place, Any], Any]) -> Hyperparameter:
        def value(at: _Place, xp: Any) -> Any:
            risen = xp.minimum(at.end / warmup, 1.0) if warmup > 0 else 1.0
            # Not start + (end - start) * risen, which is off by start's rounding ever after.
            return start * (1 - risen) + end(at, xp) * risen

        return _hyperparameter(sizes, value)

    def statistics(at: _Place, xp: Any) -> Any:
        if "bn_momentum" not in config:
            return xp.full_like(at.end, 0.03)
        bn = config.bn_momentum
        return xp.maximum(bn.start * bn.decay ** (at.before / epoch_samples / bn.epochs), bn.final)

    return Schedule(
        lr=from_to(0.0, decayed),
        bias_lr=from_to(lr.warmup_bias, decayed),
        momentum=from_to(
            lr.warmup_momentum, lambda at, xp: xp.full_like(at.end, config.optimizer.momentum)
        ),
        bn_momentum=_hyperparameter(sizes, statistics),
        epoch=epoch,
        updates=sizes.updates,
        epochs=int(epoch(sizes.updates)) + 1,
    )


class _Place(NamedTuple):
    """Where an update is in its run, in samples, as floating-point numbers.

    Attributes:
      before, end: of the run, before and after the update.
      left: until the run's end, before the update.
    """

    before: Any
    end: Any
    left: Any


def _hyperparameter(sizes: WindowSizes, value: Callable[[_Place, Any], Any]) -> Hyperparameter:
    """The value of (place, numpy or jax.numpy) as a function of the updates done before.

    No table over the updates of the run: a count is an exact number of float32 up to 16.7 million,
    and so is what is left of it.
    """
    ramp, ramped, each = len(sizes.ramp), float(sizes.ramp.sum()), float(sizes.each)
    starts = np.concatenate([[0], np.cumsum(sizes.ramp)]).astype(np.float64)

    def of(count: Any) -> Any:
        xp: Any = jnp if isinstance(count, jax.Array) else np
        count = xp.clip(xp.asarray(count), 0, sizes.updates - 1)
        dtype = xp.asarray(0.0).dtype
        after = (count - ramp).astype(dtype)
        before, end = ramped + after * each, ramped + (after + 1) * each
        left = (sizes.updates - count).astype(dtype) * each
        if ramp:
            table, inside = xp.asarray(starts, dtype), count < ramp
            row = xp.minimum(count, ramp - 1)
            before = xp.where(inside, table[row], before)
            end = xp.where(inside, table[row + 1], end)
            left = xp.where(inside, float(sizes.total) - table[row], left)
        return xp.asarray(value(_Place(before, end, left), xp), dtype)

    return of


def _epoch(sizes: WindowSizes, epoch_samples: int) -> Hyperparameter:
    """The epoch of an update's first sample, floor(samples before it / samples of an epoch).

    Exact also in the 32 bits of a device, where the samples of a run overflow: an estimate is off
    by few epochs, so that what it leaves over is known from its last bits, which are right.
    """
    ramp, starts = len(sizes.ramp), np.concatenate([[0], np.cumsum(sizes.ramp)]).astype(np.int64)

    def estimate(at: _Place, xp: Any) -> Any:
        return xp.floor(at.before / epoch_samples)

    rough = _hyperparameter(sizes, estimate)

    def of(count: Any) -> Any:
        on_device = isinstance(count, jax.Array)
        xp: Any = jnp if on_device else np
        kind = np.int32 if on_device else np.int64
        guess = rough(count)
        count = xp.clip(xp.asarray(count), 0, sizes.updates - 1).astype(kind)
        low = np.asarray([sizes.each, starts[-1], epoch_samples]).astype(kind)  # their last bits
        before = low[1] + (count - ramp) * low[0]
        if ramp:
            table, row = xp.asarray(starts.astype(kind)), xp.minimum(count, ramp - 1)
            before = xp.where(count < ramp, table[row], before)
        left = before - guess.astype(kind) * low[2]
        return (guess.astype(kind) + left // low[2]).astype(guess.dtype)

    return of


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
    0.2 of the orthogonalised momentum to SGD's own step of kernels, and moves the class branches of
    a detector three times as fast. Its decay is of the kernels as they are after the first part.

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
        {kind: optax.scale_by_learning_rate(rate) for kind, rate in rates.items()}, kinds
    )
    if options.name == "adamw":
        adam = optax.scale_by_adam(b1=options.momentum, b2=options.b2)
        return optax.chain(adam, decay, descend)
    trace = optax.inject_hyperparams(optax.trace, static_args=("nesterov",))(
        decay=schedule.momentum, nesterov=True
    )
    sgd = optax.chain(decay, trace)
    if options.name == "sgd":
        return optax.chain(sgd, descend)
    faster = optax.partition({True: optax.scale(3.0), False: optax.identity()}, _class_branch)
    muon = optax.chain(orthogonal_momentum(schedule.momentum), optax.scale(0.2))
    return _in_turn(muon, sgd, optax.chain(faster, descend))


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
        direction = jax.tree.map(mix, momentum, gradient)
        leaves, structure = jax.tree.flatten(direction)
        kernels = iter(orthogonal_all([leaf for leaf in leaves if leaf.ndim > 1]))
        leaves = [next(kernels) if leaf.ndim > 1 else jnp.zeros_like(leaf) for leaf in leaves]
        direction = jax.tree.unflatten(structure, leaves)
        return direction, OrthogonalMomentum(state.updates + 1, momentum)

    return optax.GradientTransformation(init, update)


def orthogonal_all(kernels: list[jax.Array]) -> list[jax.Array]:
    """`orthogonal` of each; those of one shape as a matrix, or transposed, together."""
    matrices = [_wide(kernel) for kernel in kernels]
    alike: dict[Any, list[int]] = {}
    for i, matrix in enumerate(matrices):
        alike.setdefault((matrix.shape, matrix.dtype), []).append(i)
    for own in alike.values():
        found = jax.vmap(_newton_schulz)(jnp.stack([matrices[i] for i in own]))
        for i, matrix in zip(own, found, strict=True):
            matrices[i] = matrix
    return [_narrow(matrix, kernel) for matrix, kernel in zip(matrices, kernels, strict=True)]


def orthogonal(kernel: jax.Array) -> jax.Array:
    """The nearest orthogonal matrix, roughly: singular values end between 0.7 and 1.2.

    Newton-Schulz: X <- a X + (b XX^T + c (XX^T)^2) X, five times, from X = kernel / |kernel|.
    A kernel of two axes, or with a window higher than wide, is longer by the root of its
    outputs over its inputs, or of height over width, if that is more than 1.
    """
    (found,) = orthogonal_all([kernel])
    return found


def _newton_schulz(x: jax.Array) -> jax.Array:
    """Of a matrix with no more rows than columns."""
    x = x / (jnp.linalg.norm(x) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def _wide(kernel: jax.Array) -> jax.Array:
    """A kernel (..., in, out) as the matrix (out, rest), or that transposed if it were tall."""
    x = kernel.reshape(-1, kernel.shape[-1])
    return x.T if x.shape[1] <= x.shape[0] else x


def _narrow(matrix: jax.Array, kernel: jax.Array) -> jax.Array:
    """The kernel, of the shape of another, that became this matrix; of its length."""
    inputs, outputs = kernel.size // kernel.shape[-1], kernel.shape[-1]
    x = matrix.T if outputs <= inputs else matrix
    # The last two axes of the reference's layout, (out, in) or (out, in, height, width).
    longer = 1.0
    if kernel.ndim in (2, 4):
        of, over = kernel.shape[:2] if kernel.ndim == 4 else (outputs, inputs)
        longer = (of / over) ** 0.5
    x = x.reshape(kernel.shape)
    return x * longer if longer > 1 else x


def _in_turn(
    first: optax.GradientTransformation,
    second: optax.GradientTransformation,
    step: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Two directions of one gradient, the second seen from where the first led to.

    Args:
      step: from a direction to what is added to the parameters; one chain for both.
    """

    def init(params):
        return (second.init(params), first.init(params)), *step.init(params)

    def update(gradient, states, params=None):
        (of_second, of_first), *of_step = states
        direction, of_first = first.update(gradient, of_first, params)
        moved, _ = step.update(direction, tuple(of_step), params)
        direction, of_second = second.update(
            gradient, of_second, optax.apply_updates(params, moved)
        )
        more, new = step.update(direction, tuple(of_step), params)
        return optax.tree.add(moved, more), ((of_second, of_first), *new)

    return optax.GradientTransformation(init, update)


def _class_branch(params: PyTree) -> PyTree:
    """Whether a parameter is of a class branch of a detection head."""
    names = ("cv3.", "one2one_cv3.")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(str(key.key).startswith(names) for key in path), params
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
