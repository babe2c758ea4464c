"""The search of plans for the geometry to use, and for what would fit.

The geometry that is chosen has been compiled itself.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import ml_collections

from jaxaccum import config as configs
from jaxaccum.accumulate.recipe import Engine
from jaxaccum.fields import REMATS, Remat
from jaxaccum.plan import calibration
from jaxaccum.plan.planner import Measure, Planner, cache_folder
from jaxaccum.plan.targets import GIB, PlanError, Target


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was planned.

    Attributes:
      rows: the table, by engine, rematerialisation and microbatch.
      chosen: the geometry to use; None if nothing fits.
      why: of the choice, in words; or what would fit.
      evaluation: bytes of an evaluation at the config's batch, the state beside it; 0 if not
        planned.
      budget: bytes that may be planned for, the margin taken off.
    """

    rows: list[Measure]
    chosen: Measure | None
    why: str
    evaluation: int
    budget: int


def choose(
    planner: Planner,
    memory: int,
    *,
    engines: Sequence[Engine] = ("scan",),
    remats: Sequence[Remat] = REMATS,
    microbatches: Sequence[int] = (),
    evaluation: bool = True,
    margin: float | None = None,
) -> Choice:
    """The geometry to use, and the table it is chosen from.

    Of all that fit: the one with the least estimated time; within two percent of it the one
    without rematerialisation and with the largest microbatch. Microbatches smaller than a
    batch-norm group are tried where no whole group fits, and what they keep is put on the host
    (remat "host") where they do not fit either (not on a CPU, whose memory is the host's).

    Args:
      memory: bytes of a device.
      engines, remats: what to try; rematerialisation only where memory is short without it.
      microbatches: rows to show, each compiled; what was tried and a ladder if none are given.
      evaluation: whether to plan that, too.
      margin: share of the memory to leave free; by default what the calibration of this kind of
        device says.
    """
    factor, default = calibration.of(planner.target)
    budget = int(memory * (1 - (default if margin is None else margin)) / factor)
    unit, top = planner.unit, planner.top
    rows: list[Measure] = []
    fitting: list[Measure] = []
    last = [r for r in remats if r == "host"] if len(remats) > 1 else []
    first = [r for r in remats if r not in last]
    for engine in engines:
        for remat in first:
            if remat != first[0] and _covered(fitting, engine, top):
                continue
            largest, tried = _largest(planner, engine, remat, budget, unit, top)
            asked = [m for m in microbatches if m <= top]
            shown = {m: planner.compiled(m, engine, remat) for m in asked}
            if not asked:
                shown = {m.microbatch: m for m in tried}
                for m in _ladder(unit, largest, top):
                    shown.setdefault(m, planner.predicted(m, engine, remat))
            rows += [shown[m] for m in sorted(shown)]
            fitting += [
                planner.predicted(m, engine, remat)
                for m in range(unit, largest + 1, unit)
                if planner.predicted(m, engine, remat).peak <= budget
            ]
    for ways in (first, last if planner.target.platform != "cpu" else []):
        for engine, remat in itertools.product(engines, ways if not fitting else ()):
            smaller = _parts_of_a_group(planner, engine, remat, budget)
            fitting += [m for m in smaller if m.peak <= budget]
            rows += smaller
    needed = planner.evaluation() if evaluation else 0
    if not fitting:
        return Choice(rows, None, _what_would_fit(planner, rows, budget), needed, budget)
    if planner.whole:
        best = max(fitting, key=lambda m: (m.microbatch, -_rank(m), m.engine == "scan"))
        why = "the largest microbatch that fits, as an effective batch of its own"
    else:
        least = min(m.seconds for m in fitting)
        close = [m for m in fitting if m.seconds <= 1.02 * least]
        best = max(close, key=lambda m: (-_rank(m), m.engine == "scan", m.microbatch))
        why = "least estimated time of what fits; the largest microbatch of those within 2 %"
    best = planner.compiled(best.microbatch, best.engine, best.remat)
    if best.peak > budget:  # the line said it fits, the compiler does not
        best = max((m for m in rows if m.compiled and m.peak <= budget), key=lambda m: m.microbatch)
    rows = [m for m in rows if _key(m) != _key(best)] + [best]
    rows.sort(key=lambda m: (engines.index(m.engine), _rank(m), m.microbatch))
    if needed > budget:
        why += (
            f". Evaluation at eval.batch={planner.config.eval.batch} needs {needed / GIB:.2f} GiB, "
            "more than there is: lower eval.batch"
        )
    return Choice(rows, best, why, needed, budget)


def settle(
    config: ml_collections.ConfigDict, *, names: Sequence[str], samples: int, target: Target
) -> tuple[ml_collections.ConfigDict, list[str]]:
    """A config whose microbatch is "auto" with the planned geometry in it, and lines about it.

    The recipe is kept: effective batch, bn_group and everything else that is learned from.

    Raises:
      PlanError: nothing fits; says what would.
    """
    if jax.process_count() > 1:
        raise PlanError("microbatch auto plans for one process: give a number to several")
    group = config.nbs if config.bn_group == "all" else config.bn_group
    least = 1 if group == "frozen" else min(group, config.nbs)
    devices = config.devices or min(len(jax.devices()), -(-config.nbs // least))
    planner = Planner(
        config, names=names, samples=samples, target=target, devices=devices, cache=cache_folder(),
    )  # fmt: skip
    chosen = choose(
        planner, target.memory, engines=(config.engine,),
        remats=REMATS if config.remat == "none" else (config.remat,), evaluation=False,
    )  # fmt: skip
    best = chosen.chosen
    if best is None:
        raise PlanError(chosen.why)
    config = config.copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        config.microbatch, config.remat, config.devices = best.microbatch, best.remat, devices
    lines = [
        f"microbatch auto: {best.microbatch} x {best.steps} steps"
        f"{ways_of(best)}, planned {best.peak / GIB:.2f} GiB of "
        f"{target.memory / GIB:.2f} GiB a device ({chosen.why}; {planner.compilations} "
        "compilations)"
    ]
    return config, lines


def ways_of(m: Measure) -> str:
    """Such as ", remat=blocks"; nothing where nothing is recomputed or moved."""
    return "" if m.remat == "none" else f", remat={m.remat}"


def _rank(m: Measure) -> int:
    return REMATS.index(m.remat)


def _key(m: Measure) -> tuple[str, str, int]:
    return m.engine, m.remat, m.microbatch


def _largest(
    planner: Planner, engine: Engine, remat: Remat, budget: int, unit: int, top: int
) -> tuple[int, list[Measure]]:
    """The largest microbatch whose plan is within the budget (0: none), and all compiled ones.

    What the line says fits is compiled, from the top, which bends the line to what was found; in
    the end the largest that fits is compiled, and the next one, if it is close.
    """
    tried = [planner.compiled(unit, engine, remat)]
    if tried[0].peak > budget:
        return 0, tried
    if top > unit:
        tried.append(planner.compiled(min(4 * unit, top), engine, remat))
    while True:
        known = {m.microbatch: m for m in tried}
        longest = 64 * max(known)  # a line goes no further than that
        at = top
        while planner.predicted(at, engine, remat).peak > budget or at > longest:
            at -= unit
        following = at + unit
        if at not in known:
            tried.append(planner.compiled(at, engine, remat))
        elif (
            following <= top
            and following not in known
            and planner.predicted(following, engine, remat).peak <= 1.05 * budget
        ):
            tried.append(planner.compiled(following, engine, remat))
        else:
            return at, tried


def _parts_of_a_group(planner: Planner, engine: Engine, remat: Remat, budget: int) -> list[Measure]:
    """Microbatches smaller than a batch-norm group, compiled, down to the first that fits."""
    tried = []
    for m in planner.parts:
        tried.append(planner.compiled(m, engine, remat))
        if tried[-1].peak <= budget:
            break
    return tried


def _ladder(unit: int, largest: int, top: int) -> list[int]:
    """Microbatches to show: doubled from the smallest, to one beyond the largest that fits."""
    steps, m = [], unit
    while m <= min(max(2 * largest, unit), top):
        steps.append(m)
        m *= 2
    return steps


def _covered(fitting: list[Measure], engine: str, top: int) -> bool:
    """Whether the whole effective batch fits already."""
    return any(m.engine == engine and m.microbatch >= top for m in fitting)


def _what_would_fit(planner: Planner, rows: list[Measure], budget: int) -> str:
    least = min(rows, key=lambda m: m.peak)
    config = planner.config
    ways = []
    if all(m.remat == "none" for m in rows):
        ways.append("remat=blocks")
    if config.bn_group not in ("frozen", 1):
        ways.append(
            f"a smaller bn_group than {config.bn_group} (another recipe: another training run)"
        )
    sizes = [f for f in ("data.image_size", "data.height") if configs.has(config, f)]
    if sizes:
        ways.append(
            f"less resolution than {sizes[0]}={configs.get(config, sizes[0])} (another recipe)"
        )
    if config.bn_group == "all" and planner.number == 1:
        ways.append("bn_group as a number")
    ways.append("a smaller model, or a device with more memory")
    return (
        f"nothing fits into {budget / GIB:.2f} GiB: the least is microbatch {least.microbatch}"
        f"{ways_of(least)}, {least.peak / GIB:.2f} GiB (state "
        f"{least.state / GIB:.2f}, samples {least.batch / GIB:.2f}, temporary "
        f"{least.temp / GIB:.2f}). What could: {'; '.join(ways)}"
    )
