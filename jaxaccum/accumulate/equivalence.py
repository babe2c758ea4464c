"""The law, measured: how far two geometries of one recipe are from each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxaccum.accumulate.make import make_engine
from jaxaccum.accumulate.recipe import Geometry, Recipe, Window
from jaxaccum.accumulate.terms import Forward
from jaxaccum.accumulate.update import UpdateRule

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
    """Largest relative difference allowed, of one gradient and of what several updates leave.

    In float64 and float32 geometries differ by the order of their sums: 1e-12 and 1e-5 of one
    gradient. Rounding grows over updates, to ten times that in the few that are compared.

    In bfloat16 and tf32 no number fits all networks. Sums are float32, but a sum in another order
    turns the rounding of an activation now and then, the next layers turn more, and the gradient of
    every microbatch is rounded by itself. A small detector's gradients are 2e-3 apart, half a
    rounding of bfloat16 (2^-8); those of a new YOLOv8n at 64 px with groups of 2, which magnifies
    rounding about a hundredfold, 0.3. So the law is: two geometries are no farther apart
    than two independent roundings of one gradient would be, which is sqrt(2) times the distance of
    bfloat16 (or tf32) from float32 on one geometry; `of_rounding`. The loss has too few numbers for
    that, and gets 4 roundings. What several updates leave is not judged.

    Attributes:
      gradient, first_loss: of the first update; the latter like the former if not given.
      after: of all else; None not to judge it.
    """

    gradient: float
    after: float | None
    first_loss: float | None = None

    @staticmethod
    def of(x64: bool) -> Tolerance:
        """That of float64 or float32."""
        one = 1e-12 if x64 else 1e-5
        return Tolerance(one, 10 * one)

    @staticmethod
    def of_rounding(dtype: str, found: dict[str, float]) -> Tolerance:
        """That of bfloat16 or tf32.

        Args:
          dtype: as in a config.
          found: `differences` of one geometry in this dtype from the same in float32.
        """
        exact, rounding = Tolerance.of(False), {"bfloat16": 2.0**-8, "tf32": 2.0**-11}[dtype]
        return Tolerance(max(1.5 * found["gradient"], exact.gradient), None, 4 * rounding)


def trace(
    forward: Forward,
    rule: UpdateRule,
    recipe: Recipe,
    geometry: Geometry,
    params: PyTree,
    stats: PyTree,
    batches: Callable[..., Iterator[PyTree]],
    updates: int,
    connect: Callable[[jax.sharding.Mesh], None] | None = None,
) -> Trace:
    """Runs a few updates of a recipe on a geometry.

    Args:
      forward, rule, recipe, geometry: what to run.
      params, stats: initial values, on the host.
      batches: makes an iterator over effective batches. In one of several processes it is called
        with the engine's `share`, and makes only these samples of each.
      updates: how many.
      connect: given the mesh before it is used, for several processes to meet.
    """
    # In front of the real optimizer one that remembers shows the gradient that it is given.
    shown = dataclasses.replace(rule, optimizer=optax.chain(_memory(), rule.optimizer))
    engine = make_engine(forward, shown, Window(recipe, geometry))
    if connect is not None:
        connect(engine.mesh)
    state, logs, gradient = engine.init(params, stats), [], None
    source = batches() if engine.share is None else batches(engine.share)

    def host(tree: PyTree) -> PyTree:
        if engine.share is None:
            return jax.device_get(tree)
        return jax.tree.map(lambda leaf: np.asarray(engine.whole(leaf)), tree)

    for _ in range(updates):
        state, log = engine.update(state, next(source))
        logs.append({k: float(v) for k, v in log.items()})
        if gradient is None:
            clipped = max(logs[0]["grad_norm"] / rule.clip, 1.0) if rule.clip else 1.0
            gradient = optax.tree.scale(clipped, host(state.opt_state[0]))
    return Trace(gradient, host(state.params), host(state.stats), host(state.ema), logs)


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


def same_bits(a: Trace, b: Trace) -> bool:
    """Whether two traces are equal bit for bit, their logs too."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


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
    limits = {
        "gradient": tolerance.gradient,
        "first loss": tolerance.first_loss or tolerance.gradient,
    }
    return all(
        value <= limit
        for name, value in found.items()
        if (limit := limits.get(name, tolerance.after)) is not None
    )


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How far the geometries of a recipe are from the first; `print` shows it as a table.

    Attributes:
      rows: of each geometry after the first its differences (`differences`) in the gradient of the
        effective batch, its loss, and the running statistics after it.
      tolerance: the largest that is rounding.
    """

    first: Geometry
    rows: tuple[tuple[Geometry, dict[str, float]], ...]
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether all are one update."""
        return all(self._within(found) for _, found in self.rows)

    def _within(self, found: dict[str, float]) -> bool:
        return all(value <= self.tolerance for value in found.values())

    def __str__(self) -> str:
        names = list(self.rows[0][1])
        head = "".join(f"{name:>13}" for name in names)
        lines = [f"{'from ' + _called(self.first):<26}        {head}"]
        for geometry, found in self.rows:
            values = "".join(f"{found[name]:13.1e}" for name in names)
            verdict = "one run" if self._within(found) else "ANOTHER"
            lines.append(f"{_called(geometry):<26} {verdict}{values}")
        if any(np.isinf(value) for _, found in self.rows for value in found.values()):
            lines.append(
                "inf: something is not finite, on one geometry or the other. A group of samples of "
                "weight 0 alone leaves batch norm as its bias: a division by a norm or a count of "
                "them is 0 / 0, and NaN times weight 0 is NaN"
            )
        elif not self.ok:
            lines.append(
                f"Differences up to {self.tolerance:g} are rounding. More comes of a mean where a "
                "sum is meant, samples of weight 0 that count, noise that belongs to the place and "
                "not to the sample (accumulate.sample_keys), statistics over other groups than "
                "forward was given, or a loss that couples samples (accumulate.Coupled)"
                + (
                    "" if self.tolerance < 1e-9
                    else ". In float32 a deep network may round more: jax_enable_x64 and float64 "
                    "parameters tell"
                )
            )  # fmt: skip
        return "\n".join(lines)


def _called(geometry: Geometry) -> str:
    """A geometry in a few words."""
    devices = f" x {geometry.devices} devices" if geometry.devices > 1 else ""
    divided = f", fsdp {geometry.fsdp}" if geometry.fsdp > 1 else ""
    return f"{geometry.microbatch}{devices} {geometry.engine}{divided}"


def verify(
    forward: Forward,
    rule: UpdateRule,
    recipe: Recipe,
    params: PyTree,
    stats: PyTree,
    batch: PyTree,
    geometries: Sequence[Geometry] | None = None,
) -> Verdict:
    """Whether a forward keeps the law: one update of one effective batch on several geometries.

    Costs the compilation of each. Best in float64 (`jax_enable_x64`, and params and batch of it),
    where rounding cannot be mistaken for anything else.

    Args:
      forward, rule, recipe: as `make_engine` takes them.
      params, stats: initial values, on the host.
      batch: an effective batch, host arrays; fewer samples than `nbs` make an uneven tail.
      geometries: to compare with the first of them; None for microbatches from the whole effective
        batch down to a batch-norm group and a part of one, one with more padding, both engines, and
        two devices where there are.
    Raises:
      ContractError: the forward breaks its contract in a way that needs no computation to see.
      GeometryError: a geometry cannot compute the recipe.
      ValueError: fewer than two geometries.
    """
    geometries = list(geometries or _geometries(recipe))
    if len(geometries) < 2:
        raise ValueError(f"{len(geometries)} geometry: two or more can be compared")
    traces = [
        trace(forward, rule, recipe, geometry, params, stats, lambda: iter([batch]), 1)
        for geometry in geometries
    ]
    wide = all(np.asarray(leaf).dtype == np.float64 for leaf in jax.tree.leaves(params))
    rows = []
    for geometry, one in zip(geometries[1:], traces[1:], strict=True):
        found = differences(one, traces[0])
        shown = {"gradient": found["gradient"], "loss": found["first loss"]}
        if jax.tree.leaves(stats):
            shown["statistics"] = found["statistics"]
        rows.append((geometry, shown))
    return Verdict(geometries[0], tuple(rows), Tolerance.of(wide).gradient)


def _geometries(recipe: Recipe) -> list[Geometry]:
    """Some that differ in all that a geometry can."""
    group = recipe.group or 1
    whole = -(-recipe.nbs // group) * group
    half = -(-(whole // group) // 2) * group
    # With a group that is padding alone: where all have the same padding, it may count unseen.
    wanted = [Geometry(whole), Geometry(whole + group), Geometry(half), Geometry(group)]
    wanted.append(Geometry(group, 1, "multisteps"))
    if group > 1:
        wanted.append(Geometry(next(m for m in range(group // 2, 0, -1) if group % m == 0)))
    if len(jax.devices()) > 1:
        wanted += [Geometry(group, 2), Geometry(group, 2, "multisteps")]
    return list(dict.fromkeys(wanted))
