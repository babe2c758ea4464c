"""One update: divide, clip, check, optimize, move the statistics, average the weights. Once.

Both engines end in the two functions here, so that there is one place where a window of sums
becomes new parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxaccum.accumulate import batchnorm
from jaxaccum.accumulate.terms import Objective, Sums

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that a run learns and counts; the same on every geometry and engine.

    Attributes:
      params, stats: trainable parameters and running statistics of the batch-norm layers.
      opt_state: state of the optax optimizer.
      ema: exponential moving average of {"params", "stats"}, or None.
      step: updates done, () int32. Schedules, logs and checkpoints count these.
      windows: effective batches consumed, () int32: `step` plus the skipped ones.
      skipped_in_row: windows skipped since the last update, () int32.
    """

    params: PyTree
    stats: PyTree
    opt_state: PyTree
    ema: PyTree
    step: jax.Array
    windows: jax.Array
    skipped_in_row: jax.Array

    def replace(self, **changes: Any) -> State:
        """This state with other values for some fields."""
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class UpdateRule:
    """What the recipe says about an update, beyond its objective.

    Attributes:
      objective: terms and their division.
      optimizer: optax transformation of the divided and clipped gradient.
      clip: largest global norm of the gradient; 0 for no clipping.
      statistics_momentum: updates done before -> weight of an update's batch statistics in the
        running ones (PyTorch's convention).
      ema_decay: update count -> decay of the moving average; None for no average.
    """

    objective: Objective
    optimizer: optax.GradientTransformation
    clip: float = 0.0
    statistics_momentum: Callable[[jax.Array], jax.Array | float] = lambda step: 0.03
    ema_decay: Callable[[jax.Array], jax.Array] | None = None

    def init(self, params: PyTree, stats: PyTree) -> State:
        """The state before the first update."""

        def copy(tree):  # the step donates its input: nothing may be shared
            return jax.tree.map(lambda a: jnp.array(a, copy=True), tree)

        def zero():
            return jnp.zeros([], jnp.int32)

        params, stats = copy(params), copy(stats)
        ema = None if self.ema_decay is None else copy({"params": params, "stats": stats})
        return State(params, stats, self.optimizer.init(params), ema, zero(), zero(), zero())


class Closed(NamedTuple):
    """A window after the optimizer: `updates` to add to the parameters (zeros if not `ok`)."""

    updates: PyTree
    sums: Sums
    norm: jax.Array
    ok: jax.Array


def all_finite(tree: PyTree) -> jax.Array:
    """Whether every number of every leaf is finite, () bool.

    The marks of the leaves meet in a product of vectors. XLA would repeat their conjunction, a
    handful of numbers, in each operation that asks for it: hundreds of operations with hundreds of
    operands, on which a compiler spends minutes.
    """
    marks = jnp.stack([~jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves(tree)])
    marks = marks.astype(jnp.float32)
    return jnp.dot(marks, marks) == 0


def close_window(
    rule: UpdateRule, norm_of: Callable[[PyTree], jax.Array] = optax.tree.norm
) -> optax.GradientTransformation:
    """The end of a window as an optax transformation from `Sums` to `Closed`.

    Division by the denominators, then clipping, then the finite check, then the optimizer. A
    window with anything not finite leaves the optimizer's state as it was.

        g = scale * sum_d weight_d G_d / max(D_d, floor_d);   g <- g * min(1, clip / |g|)

    Args:
      norm_of: the norm of a gradient, for one that lies on several devices.
    """

    def update(sums: Sums, opt_state, params):
        gradient = rule.objective.gradient(sums)
        norm = norm_of(gradient)
        losses = rule.objective.log(sums)
        ok = all_finite((norm, losses["loss"], sums.moments)) & (sums.bad == 0)
        if rule.clip:
            factor = jnp.minimum(1.0, rule.clip / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
            gradient = jax.tree.map(lambda g: g * factor, gradient)
        updates, new_state = rule.optimizer.update(gradient, opt_state, params)
        updates = jax.tree.map(lambda u: jnp.where(ok, u, jnp.zeros_like(u)), updates)
        new_state = jax.tree.map(lambda new, old: jnp.where(ok, new, old), new_state, opt_state)
        return Closed(updates, sums, norm, ok), new_state

    return optax.GradientTransformation(rule.optimizer.init, update)


def advance(
    rule: UpdateRule, state: State, closed: Closed, opt_state: PyTree, stats: PyTree | None = None
) -> tuple[State, dict[str, jax.Array]]:
    """The state after a closed window, and what the log says of it.

    Args:
      stats: running statistics that were already moved (accumulate.usual_rule); None to merge the
        window's moments and move them once.
    """
    ok = closed.ok

    def keep(new, old):
        return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)

    params = optax.apply_updates(state.params, closed.updates)
    if stats is None:
        stats = batchnorm.move_statistics(
            state.stats, closed.sums.moments, rule.statistics_momentum(state.step)
        )
    stats = keep(stats, state.stats)
    step = state.step + ok.astype(jnp.int32)
    ema = state.ema
    if rule.ema_decay is not None:
        decay = rule.ema_decay(step)
        ema = keep(
            jax.tree.map(
                lambda average, new: (decay * average + (1 - decay) * new).astype(average.dtype),
                ema,
                {"params": params, "stats": stats},
            ),
            ema,
        )
    new = State(
        params=params,
        stats=stats,
        opt_state=opt_state,
        ema=ema,
        step=step,
        windows=state.windows + 1,
        skipped_in_row=jnp.where(ok, 0, state.skipped_in_row + 1),
    )
    losses = rule.objective.log(closed.sums)
    log = {
        **{k: jnp.where(closed.sums.bad == 0, v, jnp.nan) for k, v in losses.items()},
        "grad_norm": closed.norm,
        "samples": closed.sums.samples,
        "ok": ok,
        "step": step,
        "windows": new.windows,
        "skipped_in_row": new.skipped_in_row,
        **{f"sums/{name}": value for name, value in closed.sums.denominators.items()},
        **{f"weight/{name}": value for name, value in dict(closed.sums.weights).items()},
        **rule.objective.noise_of(closed.sums, closed.norm),
    }
    return new, log
