"""Plans: the compiler's account of an update's memory and work on candidate geometries.

Nothing runs: the real update is compiled from shapes. For a fixed engine and rematerialisation
its temporary memory is close to affine in the microbatch, and the arguments (state and effective
batch) are known from their shapes, so a few compilations give the whole table.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import ml_collections
import numpy as np

from jaxaccum import config as configs
from jaxaccum.accumulate import Geometry, Recipe, Window, make_engine
from jaxaccum.accumulate.recipe import Engine
from jaxaccum.fields import Remat
from jaxaccum.machine import onednn, user_cache
from jaxaccum.machine.waiting import waiting
from jaxaccum.plan.targets import PlanError, Target
from jaxaccum.training import run

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Measure:
    """Memory and work of an update on one geometry, for one device.

    Attributes:
      microbatch, steps, devices, engine, remat: the geometry.
      state: bytes of parameters, statistics, optimizer, average and, with multisteps, accumulators.
      batch: bytes of samples on the device.
      temp: bytes that the program uses while it runs.
      outputs: bytes of results that do not take the place of an argument.
      host: bytes of the host's memory that the program uses while it runs (remat=host).
      flops: floating-point operations of the update.
      seconds: a lower bound of its time, from operations and traffic of memory.
      compiled: whether it is the compiler's word; else it lies on the line through two that are.
    """

    microbatch: int
    steps: int
    devices: int
    engine: Engine
    remat: Remat
    state: int
    batch: int
    temp: int
    outputs: int
    host: int
    flops: float
    seconds: float
    compiled: bool

    @property
    def peak(self) -> int:
        """Bytes of the device that the update takes: arguments + outputs - aliased + temp."""
        return self.state + self.batch + self.temp + self.outputs


class Planner:
    """Plans of one config on one target.

    Args:
      config: as made by a file in configs/; its microbatch, engine and remat are not looked at.
      names: classes or categories. samples: of an epoch.
      target: what to plan for. devices: how many of them share an update.
      whole: the effective batch of every row is one microbatch per device, as in other tools that
        look for the largest batch; else it is the config's.
      cache: folder of what was compiled before; None to keep nothing.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        *,
        names: Sequence[str],
        samples: int,
        target: Target,
        devices: int = 1,
        whole: bool = False,
        cache: Path | None = None,
    ):
        if configs.is_compat(config):
            raise PlanError(
                "with compat the microbatch is part of the recipe: there is nothing to choose. "
                "Plan without compat, the memory is the same"
            )
        if config.dtype == "auto":
            config = run.with_dtype(config, target.dtype)
        self.config, self.names, self.samples = config.copy_and_resolve_references(), names, samples
        self.target, self.number, self.whole, self.cache = target, devices, whole, cache
        self._devices = target.devices(devices)
        self._known: dict[tuple[str, str, int], Measure] = {}
        self._counts: dict[tuple[str, str, int], tuple[float, float]] = {}
        self.compilations = 0  # that were not in the cache

    @property
    def unit(self) -> int:
        """The smallest microbatch; all others are multiples of it."""
        group = self.config.bn_group
        if group == "all":
            return 1 if self.whole else self.config.nbs
        return 1 if group == "frozen" else min(group, self.config.nbs)

    @property
    def parts(self) -> list[int]:
        """Microbatches smaller than a batch-norm group, which is then computed in time
        (accumulate.in_time); largest first."""
        if self.whole or self.config.bn_group == "frozen":
            return []
        found = []
        for m in range(self.unit // 2, 0, -1):
            number = self.unit // m
            if self.unit % m == 0 and (number % self.number == 0 or self.number % number == 0):
                found.append(m)
        return found

    @property
    def top(self) -> int:
        """The largest microbatch that makes sense: the whole effective batch."""
        if self.whole:
            return 4096 * self.unit
        share = -(-self.config.nbs // self.number)
        return -(-share // self.unit) * self.unit

    def prepared(self, microbatch: int, engine: Engine, remat: Remat) -> run.Run:
        """The run on a geometry."""
        config = self.config.copy_and_resolve_references()
        with config.unlocked(), config.ignore_type():
            config.microbatch, config.engine, config.remat = microbatch, engine, remat
            config.devices = self.number
            if self.whole:
                config.nbs = microbatch * self.number
        return run.prepare(config, names=self.names, samples=self.samples, identity={})

    def compiled(self, microbatch: int, engine: Engine = "scan", remat: Remat = "none") -> Measure:
        """The compiler's account of a geometry.

        Raises:
          GeometryError: it cannot compute the recipe.
        """
        key = (engine, remat, microbatch)
        if key in self._known:
            return self._known[key]
        this = self.prepared(microbatch, engine, remat)
        made = make_engine(this.forward, this.rule, this.window, self._devices)
        state = _state_of(this)
        batch = this.task.example(self._samples_of(this.window.geometry, this.window.steps))
        with waiting(f"compiling microbatch {microbatch}, {engine}, remat {remat}"):
            programs = [self._account(lowered) for lowered in made.lowered(state, batch)]
        own = _bytes(state, made.shardings(state))
        held = own + self._accumulators(this, state)
        one = _bytes(this.task.example(microbatch))
        worst = max(programs, key=lambda p: p["temp"] + p["outputs"] - p["aliased"])
        loop, close = programs[-2 if engine == "multisteps" else -1], programs[-1]
        self._counts[key] = (
            microbatch * self._operations(remat),
            max(loop["bytes"] - (2 * own if loop is close else 0), 0.0),
        )
        measure = Measure(
            microbatch, this.window.steps, self.number, engine, remat,
            state=held,
            batch=one * (this.window.steps if engine == "scan" else 1),
            temp=worst["temp"],
            outputs=max(worst["outputs"] - worst["aliased"], 0),
            host=worst["host"],
            flops=this.window.steps * self._counts[key][0],
            seconds=self._seconds(
                this.window.steps, *self._counts[key], own,
                _over_the_link(this.window, worst["host"]),
            ),
            compiled=True,
        )  # fmt: skip
        # What the compiler pads arguments to (a TPU's tiles) counts as held.
        padded = max(p["arguments"] for p in programs) - measure.state - measure.batch
        measure = dataclasses.replace(measure, state=measure.state + max(padded, 0))
        self._known[key] = measure
        return measure

    def predicted(self, microbatch: int, engine: Engine = "scan", remat: Remat = "none") -> Measure:
        """A geometry on the line through the compiled ones to both sides of it, or through the two
        nearest if there are none beyond it."""
        key = (engine, remat, microbatch)
        if key in self._known:
            return self._known[key]
        near = sorted(m for e, r, m in self._known if (e, r) == (engine, remat))
        if len(near) < 2:
            return self.compiled(microbatch, engine, remat)
        below = min(max(bisect.bisect(near, microbatch) - 1, 0), len(near) - 2)
        a, b = (self._known[engine, remat, m] for m in near[below : below + 2])
        share = (microbatch - a.microbatch) / (b.microbatch - a.microbatch)

        def line(x, y):
            return x + share * (y - x)

        nbs = microbatch * self.number if self.whole else self.config.nbs
        window = Window(
            Recipe(nbs, self.config.bn_group), Geometry(microbatch, self.number, engine)
        )
        first, last = (self._counts[engine, remat, m.microbatch] for m in (a, b))
        counts = tuple(max(line(x, y), 0.0) for x, y in zip(first, last, strict=True))
        host = max(round(line(a.host, b.host)), 0)
        per_sample = a.batch / a.microbatch / (a.steps if engine == "scan" else 1)
        return Measure(
            microbatch, window.steps, self.number, engine, remat,
            state=a.state,
            batch=round(per_sample * microbatch * (window.steps if engine == "scan" else 1)),
            temp=max(round(line(a.temp, b.temp)), 0),
            outputs=a.outputs,
            host=host,
            flops=window.steps * counts[0],
            seconds=self._seconds(
                window.steps, counts[0], counts[1], a.state, _over_the_link(window, host)
            ),
            compiled=False,
        )  # fmt: skip

    def evaluation(self) -> int:
        """Bytes of an evaluation at `eval.batch`, with the training state beside it."""
        this = self.prepared(self.unit, "scan", "none")
        function, batch = this.task.evaluation(self.config.eval.batch)
        state = _state_of(this)
        place = jax.sharding.SingleDeviceSharding(self._devices[0])
        arguments = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
            (state.params, state.stats, *batch),
        )
        found = self._account(jax.jit(function).lower(*arguments))
        return _bytes(state) + _bytes(batch) + found["temp"] + found["outputs"]

    @functools.cache  # noqa: B019 (a planner lives as long as its plan)
    def _operations(self, remat: Remat) -> float:
        """Floating-point operations of forward and backward pass per sample.

        Counted before compilation: what libraries compute is opaque in the compiled program.
        """
        this, cpu = self.prepared(self.unit, "scan", remat), jax.devices("cpu")[0]
        objective = dataclasses.replace(this.rule.objective, coupled=())
        state = _state_of(this)
        arguments = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(
                a.shape, a.dtype, sharding=jax.sharding.SingleDeviceSharding(cpu)
            ),
            (state.params, state.stats, this.task.example(self.unit)),
        )
        passes = [lambda *a: objective.sums(this.grouped, *a)]
        if this.rule.objective.coupled:
            passes.append(lambda *a: objective.features(this.grouped, *a))
        with onednn.without():
            costs = [jax.jit(f).lower(*arguments).cost_analysis() or {} for f in passes]
        return sum(float(cost.get("flops", 0.0)) for cost in costs) / self.unit

    def _samples_of(self, geometry: Geometry, steps: int) -> int:
        return steps * geometry.microbatch * geometry.devices

    def _accumulators(self, this: run.Run, state: PyTree) -> int:
        """Bytes of what multisteps keeps between microbatches; scan's are temporary."""
        if this.window.geometry.engine == "scan":
            return 0
        return this.rule.objective.accumulators * _bytes(state.params)

    def _seconds(
        self, steps: int, flops: float, traffic: float, state: float, moved: float = 0.0
    ) -> float:
        """Roofline: microbatches one after the other, then the optimizer over the state; meanwhile
        so many bytes go to the host and come back."""
        rate, bandwidth = self.target.rates[self.config.dtype], self.target.bandwidth
        microbatches = steps * max(flops / rate, traffic / bandwidth)
        return max(microbatches, moved / self.target.link) + 2 * state / bandwidth

    def _account(self, lowered: jax.stages.Lowered) -> dict[str, int]:
        """What the compiler says of a program; from the cache if it has compiled the same."""
        text = lowered.as_text()
        key = hashlib.sha256(
            "\n".join(
                ["2", text, repr(self.target.description), repr(self.target.topology),
                 self._devices[0].device_kind, jax.__version__, jaxlib.__version__]
            ).encode()
        ).hexdigest()[:32]  # fmt: skip
        file = None if self.cache is None else self.cache / f"{key}.json"
        if file is not None and (known := user_cache.load(file)) is not None:
            return known
        self.compilations += 1
        try:
            compiled = lowered.compile(**self._effort())
        except jax.errors.JaxRuntimeError as error:
            needed = _needed(str(error))
            if needed is None:
                raise
            account = {"temp": needed, "outputs": 0, "aliased": 0, "arguments": 0, "bytes": 0,
                       "host": 0}  # fmt: skip
        else:
            memory: Any = compiled.memory_analysis()
            cost = compiled.cost_analysis() or {}
            account = {
                "temp": memory.temp_size_in_bytes,
                "outputs": memory.output_size_in_bytes,
                "aliased": memory.alias_size_in_bytes,
                "arguments": memory.argument_size_in_bytes,
                "host": memory.host_temp_size_in_bytes,
                "bytes": round(cost.get("bytes accessed", 0)),
            }
        if file is not None:
            user_cache.save(file, account)
        return account

    def _effort(self) -> dict[str, Any]:
        # A TPU's compiler is several times as quick at its lowest effort, its plan a little high.
        if self.target.topology is None:
            return {}
        return {"compiler_options": {"exec_time_optimization_effort": -1.0}}


def _over_the_link(window: Window, host: int) -> int:
    """Bytes that an update moves to the host, of a program that holds so many there for a group."""
    return host * (window.steps // window.together)


def cache_folder() -> Path:
    """Where accounts of compiled programs are kept."""
    return user_cache.folder() / "plans"


def _state_of(this: run.Run) -> PyTree:
    params, stats = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype), this.task.initialise(0)
    )
    return jax.eval_shape(this.rule.init, params, stats)


def _bytes(tree: PyTree, shardings: PyTree = None) -> int:
    """Of arrays or shapes; on one device, if they lie so."""
    leaves = jax.tree.leaves(tree)
    if shardings is None:
        shapes = [a.shape for a in leaves]
    else:
        places = jax.tree.leaves(shardings)
        shapes = [s.shard_shape(a.shape) for a, s in zip(leaves, places, strict=True)]
    return sum(
        math.prod(shape) * jnp.dtype(a.dtype).itemsize
        for a, shape in zip(leaves, shapes, strict=True)
    )


def _needed(message: str) -> int | None:
    """Bytes of a program that a TPU's compiler refused for want of memory."""
    found = re.search(r"(?:total memory required[^(]*\(|Used )([\d.]+)([KMGT])", message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        return None
    return int(float(found.group(1)) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found.group(2)])
