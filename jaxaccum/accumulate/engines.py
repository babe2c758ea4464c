"""Two engines, one contract: a state and an effective batch in, the next state and its log out.

`scan` is one jitted call per update, a loop over the microbatches inside. `multisteps` is one
jitted call per microbatch, with `optax.MultiSteps` around the optimizer; the effective batch
never sits on the device at once. Both accumulate on each device by itself and reduce over
devices once per update.

The devices form a mesh of three axes. Samples lie over all of them. With `fsdp` devices of the
last two hold a part of the state each (Rajbhandari et al. 2020, arXiv:1910.02054, stages 1 and 2;
Zhao et al. 2023, arXiv:2304.11277): an update gathers the parameters before its loop and scatters
the sum of the gradients after it. Devices along the last one share batch-norm groups.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxaccum.accumulate import batchnorm, fsdp
from jaxaccum.accumulate.checks import check, check_batch, grouped
from jaxaccum.accumulate.coupled import Coupling
from jaxaccum.accumulate.recipe import GeometryError, Window
from jaxaccum.accumulate.terms import Forward, Sums, add
from jaxaccum.accumulate.update import (
    Closed,
    State,
    UpdateRule,
    advance,
    all_finite,
    close_window,
)

PyTree = Any
AXES = ("data", *fsdp.AXES)
REPLICATED = PartitionSpec()
PER_DEVICE = PartitionSpec(AXES)
LAID = PartitionSpec(None, AXES)  # (steps, microbatch * devices, ...)


def make_engine(forward: Forward, rule: UpdateRule, window: Window, devices=None):
    """The engine that the geometry asks for.

    Args:
      forward: the task, (params, stats, microbatch, groups) -> Output.
      rule: the recipe's update.
      window: recipe and geometry.
      devices: the devices to use; the first `geometry.devices` of `jax.devices()` if None, those
        of each process together.
    Raises:
      GeometryError: not enough devices, or an engine that cannot compute the recipe.
      ContractError: forward cannot be called so. What it returns is checked before the first
        update (accumulate.checks).
    """
    wanted = window.geometry.devices
    if devices is None:
        devices = sorted(jax.devices(), key=lambda device: device.process_index)[:wanted]
    if len(devices) != wanted:
        raise GeometryError(
            f"the geometry asks for {wanted} devices, but JAX sees {len(jax.devices())} "
            f"({jax.default_backend()}): set devices to at most that"
        )
    parts, span = max(window.geometry.fsdp, window.span), window.span
    grid = np.asarray(list(devices)).reshape(-1, parts // span, span)
    mesh = Mesh(grid, AXES)
    kind = {"scan": ScanEngine, "multisteps": MultiStepsEngine}[window.geometry.engine]
    return kind(forward, rule, window, mesh)


class _Engine:
    """What the two engines share: where state and microbatches live.

    Attributes:
      replicated: the sharding of what all devices hold.
      share: samples of every effective batch that this process is to load, if others load the
        rest: (n,) int; None to load all.
    """

    def __init__(self, forward: Forward, rule: UpdateRule, window: Window, mesh: Mesh):
        self.forward = grouped(forward, window.recipe.group)
        self.rule, self.window, self.mesh = rule, window, mesh
        self._checked = False
        self.replicated = NamedSharding(mesh, REPLICATED)
        self.share: np.ndarray | None = None
        if jax.process_count() > 1:
            if rule.objective.compat:
                raise GeometryError("compat is a rule to compare with: run it in one process")
            here = jax.process_index()
            own = [i for i, d in enumerate(mesh.devices.flat) if d.process_index == here]
            self._own = range(own[0], own[-1] + 1)
            self.share = window.share(self._own)

    def init(self, params: PyTree, stats: PyTree) -> State:
        """The state before the first update, on the devices."""
        # One program: each shape by itself is a compilation, three seconds for YOLO11m.
        return self.place_state(jax.jit(self.rule.init)(params, stats))

    def place_state(self, state: State) -> State:
        """A state on the devices, from one that every process has alike."""
        if self.share is None:
            return jax.device_put(state, self.shardings(state))

        def place(a, sharding):
            host = np.asarray(a)
            return jax.make_array_from_callback(host.shape, sharding, lambda i: host[i])

        return jax.tree.map(place, state, self.shardings(state))

    def specs(self, tree: PyTree) -> PyTree:
        """How a state or a part of it, arrays or shapes, lies over the mesh."""
        parts = self.window.geometry.fsdp
        specs = jax.tree.map(lambda a: fsdp.spec(a.shape, parts), tree)
        if isinstance(tree, State):  # statistics are few
            stats = jax.tree.map(lambda _: REPLICATED, tree.stats)
            specs = specs.replace(
                stats=stats, ema=None if tree.ema is None else specs.ema | {"stats": stats}
            )
        return specs

    def shardings(self, tree: PyTree) -> PyTree:
        """`specs` as shardings."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.specs(tree))

    def whole(self, tree: PyTree) -> PyTree:
        """Part of a state as this process's arrays, every leaf whole; all processes must call."""
        if self.window.geometry.fsdp > 1:
            tree = jax.jit(lambda x: x, out_shardings=self.replicated)(tree)
        if self.share is None:
            return tree
        return jax.tree.map(lambda a: a.addressable_data(0), tree)

    def _put(self, tree: PyTree, sharding: NamedSharding) -> PyTree:
        """Samples on the devices, a process those of its own."""
        if self.share is None:
            return jax.device_put(tree, sharding)
        return jax.tree.map(
            lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), tree
        )

    def _check(self, state: State, batch: PyTree) -> None:
        """Refuses a contract that is not kept, before the first program is made."""
        if self._checked:
            return
        check_batch(batch)
        samples = self.window.geometry.microbatch * self.window.span  # groups lie here whole

        def shapes(tree: PyTree, leading: tuple[int, ...] = ()) -> PyTree:
            def one(a):
                shape = (*leading, *a.shape[1:]) if leading else a.shape
                return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(a.dtype))

            return jax.tree.map(one, tree)

        check(
            self.forward, self.rule.objective, shapes(state.params), shapes(state.stats),
            shapes(batch, (samples,)),
        )  # fmt: skip
        self._checked = True

    def _split(self, batch: PyTree) -> PyTree:
        if self.share is None:
            return self.window.split(batch)
        return self.window.split_share(batch, self._own)

    def update(self, state: State, batch: PyTree, steps: int | None = None):
        """One update. Donates `state`.

        Args:
          state: as made by `init` or returned here.
          batch: pytree of host arrays with a leading axis of up to `nbs` samples, one of them
            `weight`; of the samples of `share` only, if that is not None.
          steps: microbatches to run, if fewer than the window's (a batch that ramps up).
        Returns:
          the next state and a dict of scalars: the loss of the effective batch and its terms,
          the gradient's norm before clipping, samples, ok, step.
        """
        raise NotImplementedError

    def lowered(self, state: PyTree, batch: PyTree) -> list[jax.stages.Lowered]:
        """The programs of an update, lowered for shapes; nothing is computed.

        Args:
          state: shapes of the state. batch: shapes of an effective batch of `nbs` samples.
        """
        raise NotImplementedError

    def _laid(self, tree: PyTree, leading: tuple[int, ...], spec: PartitionSpec) -> PyTree:
        """Shapes of samples, laid out as microbatches that lie over the devices."""
        sharding = NamedSharding(self.mesh, spec)
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((*leading, *a.shape[1:]), a.dtype, sharding=sharding),
            tree,
        )

    def _placed(self, tree: PyTree) -> PyTree:
        """Shapes of (a part of) the state where it lives."""
        return jax.tree.map(
            lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
            tree, self.shardings(tree),
        )  # fmt: skip

    @property
    def _width(self) -> int:
        return self.window.geometry.microbatch * self.window.geometry.devices

    def _require_room(self, batch: PyTree, steps: int | None) -> None:
        """Refuses to leave out samples."""
        if self.share is not None:  # `split_share` knows how many samples it wants
            if steps not in (None, self.window.steps):
                raise GeometryError(
                    f"{steps} microbatches of a window of {self.window.steps}: several processes "
                    "compute whole windows only"
                )
            return
        width = self._width
        samples, room = len(batch["weight"]), (steps or self.window.steps) * width
        if samples > room or (steps or 1) > self.window.steps:
            raise GeometryError(
                f"{samples} samples in {steps or self.window.steps} microbatches of {width}: the "
                f"window has {self.window.steps}"
            )

    def _varying(self, tree: PyTree, specs: PyTree = None) -> PyTree:
        """Marks replicated values as each device's own, so that gradients stay local.

        Args:
          specs: how the leaves lay before they were gathered; None if none was divided.
        """
        if specs is None:
            specs = jax.tree.map(lambda _: REPLICATED, tree)

        def mark(a, spec):  # what was gathered is marked already, but for the axis "data"
            return jax.lax.pcast(a, AXES[:1] if len(spec) else AXES, to="varying")

        return jax.tree.map(mark, tree, specs)

    def _gradient_specs(self, params: PyTree) -> dict[str, PyTree]:
        """How a window's gradients lie over the mesh once they are summed: as the parameters do."""
        objective = self.rule.objective
        return dict.fromkeys(
            ["loss"] if objective.coupled else objective.floors, self.specs(params)
        )

    @functools.cached_property
    def _sums(self) -> Callable[..., Sums]:
        """(params, stats, batch, coupling or None) -> Sums.

        Jitted inside of the jitted programs, so that a model is traced once: for the shapes of the
        accumulator, in the loop, and in each program of `multisteps`.
        """
        return jax.jit(functools.partial(self.rule.objective.sums, self.forward))

    def _features(self, params, stats, batch):
        return self.rule.objective.features(self.forward, params, stats, batch)

    def _couple(self, params, features, weight, denominators):
        """The coupled terms, from what lies (steps, microbatch * devices, ...) over the devices."""

        def together(a):  # every device gets all of them: one gather per leaf and update
            whole = jax.lax.with_sharding_constraint(a, self.replicated)
            return whole.reshape(-1, *whole.shape[2:])

        def apart(a):
            laid = a.reshape(*weight.shape, *a.shape[1:])
            return jax.lax.with_sharding_constraint(laid, NamedSharding(self.mesh, LAID))

        features, weights = jax.tree.map(together, (features, weight))
        coupling = self.rule.objective.couple(params, features, weights, denominators)
        return coupling._replace(pulls=jax.tree.map(apart, coupling.pulls))


class ScanEngine(_Engine):
    """One jitted, donated call per update; the loop's length is traced, so a ramp of the
    effective batch does not recompile."""

    def __init__(self, forward, rule, window, mesh):
        super().__init__(forward, rule, window, mesh)
        self.batched = NamedSharding(mesh, LAID)
        self._jitted: Any = None

    def _program(self, state: PyTree) -> Any:
        """The jitted update; made once, as where its results lie is told by a state."""
        if self._jitted is None:
            places = (self.shardings(state), self.replicated)
            self._jitted = jax.jit(self._update, donate_argnums=0, out_shardings=places)
        return self._jitted

    def update(self, state, batch, steps=None):
        self._check(state, batch)
        return self._program(state)(state, *self.place(batch, steps))

    def place(self, batch: PyTree, steps: int | None = None):
        """The arguments of the jitted update after the state: microbatches and their number."""
        self._require_room(batch, steps)
        microbatches = self._put(self._split(batch), self.batched)
        return microbatches, np.int32(self.window.steps if steps is None else steps)

    def lower(self, state, microbatches, steps):
        """The update, lowered for the given arguments (arrays or shapes)."""
        return self._program(state).lower(state, microbatches, steps)

    def lowered(self, state, batch):
        self._check(state, batch)
        microbatches = self._laid(batch, (self.window.steps, self._width), LAID)
        return [self.lower(self._placed(state), microbatches, np.int32(self.window.steps))]

    def _update(self, state: State, microbatches, steps):
        coupling = None
        if self.rule.objective.coupled:
            coupling = self._couple(
                state.params,
                *self._collect(state.params, state.stats, microbatches, steps),
            )
        rate = self.rule.statistics_momentum(state.step)
        sums, stats = self._accumulate(
            state.params, state.stats, rate, microbatches, steps, coupling
        )
        end = close_window(self.rule, fsdp.norm(self.mesh, self.specs(state.params)))
        closed, opt_state = end.update(sums, state.opt_state, state.params)
        return advance(
            self.rule, state, closed, opt_state, stats if self.rule.objective.compat else None
        )

    def _collect(self, params, stats, microbatches, steps):
        """The first pass: features (steps, microbatch * devices, ...), weights, denominators."""
        specs = self.specs(params)

        @functools.partial(
            jax.shard_map,
            mesh=self.mesh,
            in_specs=(specs, REPLICATED, LAID, REPLICATED),
            out_specs=(LAID, REPLICATED),
        )
        def local(params, stats, microbatches, steps):
            params = self._varying(fsdp.gathered(params, specs), specs)
            stats = self._varying(stats)
            length = len(microbatches["weight"])
            one = jax.tree.map(lambda a: a[0], microbatches)
            shapes = jax.eval_shape(self._features, params, stats, one)

            def zeros(shape, dtype):
                return self._varying(jnp.zeros(shape, dtype))

            kept = jax.tree.map(lambda s: zeros((length, *s.shape), s.dtype), shapes[0])
            sums = jax.tree.map(lambda s: zeros(s.shape, s.dtype), shapes[1])

            def body(i, carry):
                kept, sums = carry
                new, more = self._features(params, stats, _at(microbatches, i))
                kept = jax.tree.map(
                    lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, i, 0), kept, new
                )
                return kept, add(sums, more)

            kept, sums = jax.lax.fori_loop(0, steps, body, (kept, sums))
            return kept, jax.lax.psum(sums, AXES)

        features, denominators = local(params, stats, microbatches, steps)
        # Microbatches that a shorter window leaves out are filling, of weight 0: see `split`.
        return features, microbatches["weight"], denominators

    def _accumulate(self, params, stats, rate, microbatches, steps, coupling):
        whole: Any = () if coupling is None else coupling._replace(pulls=())
        pulls: Any = () if coupling is None else coupling.pulls
        specs, gradients = self.specs(params), self._gradient_specs(params)

        @functools.partial(
            jax.shard_map,
            mesh=self.mesh,
            in_specs=(specs, REPLICATED, REPLICATED, LAID, REPLICATED, REPLICATED, LAID),
            out_specs=(gradients, REPLICATED, REPLICATED),
        )
        def local(params, stats, rate, microbatches, steps, whole, pulls):
            params = self._varying(fsdp.gathered(params, specs), specs)
            stats = self._varying(stats)

            def sums_of(batch, pulls):
                own = whole._replace(pulls=pulls) if coupling is not None else None
                return self._sums(params, stats, batch, own)

            one = jax.tree.map(lambda a: a[0], (microbatches, pulls))
            shapes = jax.eval_shape(sums_of, *one)
            zero = self._varying(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))

            def body(i, carry):
                sums, stats = carry
                new = sums_of(*_at((microbatches, pulls), i))
                if self.rule.objective.compat:
                    stats = batchnorm.move_statistics(stats, new.moments, rate)
                return add(sums, new), stats

            sums, stats = jax.lax.fori_loop(0, steps, body, (zero, stats))
            if self.rule.objective.compat:
                stats = jax.lax.pmean(stats, AXES)
            else:
                stats = ()
            rest = sums._replace(gradients={})
            both = fsdp.reduced(
                (sums.gradients, rest), (gradients, jax.tree.map(lambda _: REPLICATED, rest))
            )
            return *both, stats

        reduced, rest, stats = local(params, stats, rate, microbatches, steps, whole, pulls)
        return rest._replace(gradients=reduced, coupling=whole), stats


class MultiStepsEngine(_Engine):
    """One jitted call per microbatch, `optax.MultiSteps` around the optimizer.

    `MultiSteps` by itself runs its inner transformation on every call and keeps a NaN for ever.
    The host knows which microbatch closes the window: the others run `MultiSteps` around an
    identity, so that the optimizer and the reduction over devices happen once per update, and a
    microbatch that is not finite enters as zeros with a mark.
    """

    def __init__(self, forward, rule, window, mesh):
        super().__init__(forward, rule, window, mesh)
        if rule.objective.compat:
            raise GeometryError("compat is a rule of the scan engine: set engine to 'scan'")
        self.batched = NamedSharding(mesh, PER_DEVICE)
        self._accumulator: PyTree | None = None
        places = (self.replicated, self.batched)
        self._add = jax.jit(
            functools.partial(self._microbatch, closing=False), donate_argnums=1,
            out_shardings=places,
        )  # fmt: skip
        self._close = jax.jit(
            functools.partial(self._microbatch, closing=True), donate_argnums=(0, 1),
            out_shardings=places,
        )  # fmt: skip
        self._first_pass = jax.jit(self._collect)
        self._between = jax.jit(self._couple)

    def update(self, state, batch, steps=None):
        self._check(state, batch)
        self._require_room(batch, steps)
        microbatches = self._split(batch)
        steps = np.int32(self.window.steps if steps is None else steps)

        def on_devices(i):
            return self._put(jax.tree.map(lambda a: a[i], microbatches), self.batched)

        coupling = None
        if self.rule.objective.coupled:
            passed = [
                self._first_pass(state.params, state.stats, on_devices(i))
                for i in range(int(steps))
            ]
            features = jax.tree.map(lambda *a: jnp.stack(a), *(p[0] for p in passed))
            denominators = functools.reduce(add, (p[1] for p in passed))
            weight = self._put(microbatches["weight"][: int(steps)], NamedSharding(self.mesh, LAID))
            coupling = self._between(state.params, features, weight, denominators)
        for i in range(int(steps)):
            one, own = on_devices(i), None
            if coupling is not None:
                own = coupling._replace(pulls=jax.tree.map(lambda a, i=i: a[i], coupling.pulls))
            if self._accumulator is None:
                self._accumulator = self._empty(state, one, own)
            last = i == int(steps) - 1
            call = self._close if last else self._add
            # Nothing but the accumulator survives a microbatch; it is empty between windows.
            result, self._accumulator = call(state, self._accumulator, one, np.int32(i), steps, own)
        return result

    def lowered(self, state, batch):
        self._check(state, batch)
        one = self._laid(batch, (self._width,), PER_DEVICE)
        state, steps, programs, coupling = self._placed(state), np.int32(1), [], None
        if self.rule.objective.coupled:
            programs.append(self._first_pass.lower(state.params, state.stats, one))
            features, denominators = jax.eval_shape(
                self._first_pass, state.params, state.stats, one
            )
            features = self._laid(features, (self.window.steps, self._width), LAID)
            weight = self._laid(one["weight"], (self.window.steps, self._width), LAID)
            arguments = (state.params, features, weight, self._placed(denominators))
            programs.append(self._between.lower(*arguments))
            coupling = jax.eval_shape(self._between, *arguments)
            pulls = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), coupling.pulls
            )
            coupling = self._placed(coupling._replace(pulls=()))._replace(
                pulls=self._laid(pulls, (self._width,), PER_DEVICE)
            )
        sums = self._shapes(state, one, coupling)
        devices = self.window.geometry.devices
        accumulator = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((devices, *s.shape), s.dtype, sharding=self.batched),
            sums,
        )
        return programs + [
            call.lower(state, accumulator, one, np.int32(0), steps, coupling)
            for call in (self._add, self._close)
        ]

    def _collect(self, params, stats, microbatch):
        """The first pass over one microbatch: its features, and denominators of all devices."""

        @functools.partial(
            jax.shard_map,
            mesh=self.mesh,
            in_specs=(REPLICATED, REPLICATED, PER_DEVICE),
            out_specs=(PER_DEVICE, REPLICATED),
        )
        def local(params, stats, microbatch):
            features, denominators = self._features(
                self._varying(params), self._varying(stats), microbatch
            )
            return features, jax.lax.psum(denominators, AXES)

        return local(params, stats, microbatch)

    def _empty(self, state: State, one: PyTree, coupling: Coupling | None = None) -> PyTree:
        """Zero sums for every device, with a leading axis over the devices."""
        devices = self.window.geometry.devices if self.share is None else len(self._own)
        return jax.tree.map(
            lambda s: self._put(np.zeros((devices, *s.shape), s.dtype), self.batched),
            self._shapes(state, one, coupling),
        )

    def _shapes(self, state: State, one: PyTree, coupling: Coupling | None) -> PyTree:
        """Shapes of the sums of one device."""
        whole: Any = () if coupling is None else coupling._replace(pulls=())
        pulls: Any = () if coupling is None else coupling.pulls

        @functools.partial(
            jax.shard_map,
            mesh=self.mesh,
            in_specs=(REPLICATED, REPLICATED, PER_DEVICE, REPLICATED, PER_DEVICE),
            out_specs=PER_DEVICE,
        )
        def each(params, stats, microbatch, whole, pulls):
            own = whole._replace(pulls=pulls) if coupling is not None else None
            sums = self._sums(self._varying(params), self._varying(stats), microbatch, own)
            return jax.tree.map(lambda a: a[None], sums)

        def global_shapes(tree):
            return jax.tree.map(
                lambda a: jax.ShapeDtypeStruct((self._width, *a.shape[1:]), a.dtype), tree
            )

        shapes = jax.eval_shape(
            each, state.params, state.stats, global_shapes(one), whole, global_shapes(pulls)
        )
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), shapes)

    def _microbatch(
        self, state: State, accumulator, microbatch, index, steps, coupling=None, *, closing: bool
    ):
        keep = optax.GradientTransformation(lambda p: (), lambda u, s, p=None: ((), s))
        whole: Any = () if coupling is None else coupling._replace(pulls=())
        pulls: Any = () if coupling is None else coupling.pulls

        @functools.partial(
            jax.shard_map,
            mesh=self.mesh,
            in_specs=(
                REPLICATED, PER_DEVICE, PER_DEVICE, REPLICATED, REPLICATED, REPLICATED, PER_DEVICE,
            ),
            out_specs=(REPLICATED, PER_DEVICE),
        )  # fmt: skip
        def local(state: State, accumulator, microbatch, index, steps, whole, pulls):
            own = whole._replace(pulls=pulls) if coupling is not None else None
            sums = self._sums(
                self._varying(state.params), self._varying(state.stats), microbatch, own
            )
            sums = _without_bad(sums)
            inner = _reduced(close_window(self.rule), whole) if closing else keep
            multi = optax.MultiSteps(
                inner,
                every_k_schedule=lambda _: steps,
                use_grad_mean=False,
                accumulator_dtype=sums.samples.dtype,
            )
            multi_state = optax.MultiStepsState(
                mini_step=index,
                gradient_step=state.step,
                inner_opt_state=state.opt_state,
                acc_grads=jax.tree.map(lambda a: a[0], accumulator),
            )
            closed, multi_state = multi.update(sums, multi_state, state.params)
            accumulator = jax.tree.map(lambda a: a[None], multi_state.acc_grads)
            return (closed, multi_state.inner_opt_state if closing else ()), accumulator

        (closed, opt_state), accumulator = local(
            state, accumulator, microbatch, index, steps, whole, pulls
        )
        if not closing:
            return (), accumulator
        return advance(self.rule, state, Closed(*closed), opt_state), accumulator


def _at(tree: PyTree, i: jax.Array) -> PyTree:
    """Microbatch i of what is laid out over the window."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), tree)


def _reduced(inner: optax.GradientTransformation, coupling) -> optax.GradientTransformation:
    """`inner` on the sums of all devices: the one reduction of an update."""

    def update(sums, opt_state, params):
        whole = jax.lax.psum(sums, AXES)._replace(coupling=coupling)
        return inner.update(whole, opt_state, params)

    return optax.GradientTransformation(inner.init, update)


def _without_bad(sums: Sums) -> Sums:
    """The sums, or zeros with a mark if any of them is not finite."""
    ok = all_finite(sums)
    clean = jax.tree.map(lambda a: jnp.where(ok, a, jnp.zeros_like(a)), sums)
    return clean._replace(bad=(~ok).astype(sums.bad.dtype))
