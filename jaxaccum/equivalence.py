"""The law, measured: how far two geometries of one recipe are from each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxaccum.accumulate import Geometry, Recipe, UpdateRule, Window, make_engine
from jaxaccum.accumulate.terms import Forward

PyTree = Any


class Trace(NamedTuple):
    """What a few updates left behind, on the host.

    Attributes:
      gradient: of the first update, before clipping.
      params, stats, ema: after the last update.
      logs: loss and terms of every update.
    """

    gradient: PyTree
    params: PyTree
    stats: PyTree
    ema: PyTree
    logs: list[dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Largest relative difference allowed, of one gradient and of what several updates leave."""

    gradient: float
    after: float

    @staticmethod
    def of(x64: bool) -> Tolerance:
        """1e-12 in float64 and 1e-5 in float32 for one gradient; rounding grows over updates."""
        return Tolerance(1e-12, 1e-11) if x64 else Tolerance(1e-5, 1e-4)


def trace(
    forward: Forward,
    rule: UpdateRule,
    recipe: Recipe,
    geometry: Geometry,
    params: PyTree,
    stats: PyTree,
    batches: Callable[[], Iterator[PyTree]],
    updates: int,
) -> Trace:
    """Runs a few updates of a recipe on a geometry.

    Args:
      forward, rule, recipe, geometry: what to run.
      params, stats: initial values, on the host.
      batches: makes an iterator over effective batches.
      updates: how many.
    """
    # In front of the real optimizer one that remembers shows the gradient that it is given.
    shown = dataclasses.replace(rule, optimizer=optax.chain(_memory(), rule.optimizer))
    engine = make_engine(forward, shown, Window(recipe, geometry))
    state, logs, gradient = engine.init(params, stats), [], None
    source = batches()
    for _ in range(updates):
        state, log = engine.update(state, next(source))
        logs.append({k: float(v) for k, v in log.items()})
        if gradient is None:
            clipped = max(logs[0]["grad_norm"] / rule.clip, 1.0) if rule.clip else 1.0
            gradient = optax.tree.scale(clipped, jax.device_get(state.opt_state[0]))
    state = jax.device_get(state)
    return Trace(gradient, state.params, state.stats, state.ema, logs)


def _memory() -> optax.GradientTransformation:
    """Passes gradients on; its state is the last one."""
    return optax.GradientTransformation(optax.tree.zeros_like, lambda g, s, p=None: (g, g))


def distance(a: PyTree, b: PyTree) -> float:
    """|a - b| / |b| over all leaves together; infinite where not a number."""
    if not jax.tree.leaves(b):
        return 0.0
    both = [
        (np.asarray(x, np.float64), np.asarray(y, np.float64))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    difference = np.sqrt(sum(np.sum(np.square(x - y)) for x, y in both))
    size = np.sqrt(sum(np.sum(np.square(y)) for _, y in both))
    value = float(difference / size) if size else float(difference)
    return value if np.isfinite(value) else float("inf")


def differences(trace: Trace, reference: Trace) -> dict[str, float]:
    """Relative differences of gradient, parameters, statistics, averages and logged losses."""

    def losses(t: Trace, updates: slice) -> list[float]:
        return [v for log in t.logs[updates] for k, v in log.items() if k.startswith("loss")]

    return {
        "gradient": distance(trace.gradient, reference.gradient),
        "first loss": distance(losses(trace, slice(0, 1)), losses(reference, slice(0, 1))),
        "parameters": distance(trace.params, reference.params),
        "statistics": distance(trace.stats, reference.stats),
        "average": distance(trace.ema, reference.ema),
        "losses": distance(losses(trace, slice(None)), losses(reference, slice(None))),
    }


def within(found: dict[str, float], tolerance: Tolerance) -> bool:
    """Whether all differences are rounding."""
    return all(
        value <= (tolerance.gradient if name in ("gradient", "first loss") else tolerance.after)
        for name, value in found.items()
    )
