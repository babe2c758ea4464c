"""Two engines, one contract: a state and an effective batch in, the next state and its log out.

`scan` is one jitted call per update, a loop over the microbatches inside. `multisteps` is one
jitted call per microbatch, with `optax.MultiSteps` around the optimizer; the effective batch
never sits on the device at once. Both accumulate on each device by itself and reduce over
devices once per update.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxaccum.accumulate import batchnorm
from jaxaccum.accumulate.recipe import GeometryError, Window
from jaxaccum.accumulate.terms import Forward, Sums, add
from jaxaccum.accumulate.update import Closed, State, UpdateRule, advance, close_window

PyTree = Any
AXIS = "data"
REPLICATED = PartitionSpec()
PER_DEVICE = PartitionSpec(AXIS)


def make_engine(forward: Forward, rule: UpdateRule, window: Window, devices=None):
    """The engine that the geometry asks for.

    Args:
      forward: the task, (params, stats, microbatch) -> Output.
      rule: the recipe's update.
      window: recipe and geometry.
      devices: the devices to use; the first `geometry.devices` of `jax.devices()` if None.
    Raises:
      GeometryError: not enough devices, or an engine that cannot compute the recipe.
    """
    wanted = window.geometry.devices
    devices = jax.devices()[:wanted] if devices is None else list(devices)
    if len(devices) != wanted:
        raise GeometryError(
            f"the geometry asks for {wanted} devices, but JAX sees {len(jax.devices())} "
            f"({jax.default_backend()}): set devices to at most that"
        )
    mesh = Mesh(np.asarray(devices), (AXIS,))
    kind = {"scan": ScanEngine, "multisteps": MultiStepsEngine}[window.geometry.engine]
    return kind(forward, rule, window, mesh)


class _Engine:
    """What the two engines share: where state and microbatches live."""

    def __init__(self, forward: Forward, rule: UpdateRule, window: Window, mesh: Mesh):
        self.forward, self.rule, self.window, self.mesh = forward, rule, window, mesh
        self.replicated = NamedSharding(mesh, REPLICATED)

    def init(self, params: PyTree, stats: PyTree) -> State:
        """The state before the first update, on the devices."""
        return jax.device_put(self.rule.init(params, stats), self.replicated)

    def update(self, state: State, batch: PyTree, steps: int | None = None):
        """One update. Donates `state`.

        Args:
          state: as made by `init` or returned here.
          batch: pytree of host arrays with a leading axis of up to `nbs` samples, one of them
            `weight`.
          steps: microbatches to run, if fewer than the window's (a batch that ramps up).
        Returns:
          the next state and a dict of scalars: the loss of the effective batch and its terms,
          the gradient's norm before clipping, samples, ok, step.
        """
        raise NotImplementedError

    def _require_room(self, batch: PyTree, steps: int | None) -> None:
        """Refuses to leave out samples."""
        width = self.window.geometry.microbatch * self.window.geometry.devices
        samples, room = len(batch["weight"]), (steps or self.window.steps) * width
        if samples > room or (steps or 1) > self.window.steps:
            raise GeometryError(
                f"{samples} samples in {steps or self.window.steps} microbatches of {width}: the "
                f"window has {self.window.steps}"
            )

    def _varying(self, tree: PyTree) -> PyTree:
        """Marks replicated values as each device's own, so that gradients stay local."""
        return jax.tree.map(lambda a: jax.lax.pcast(a, (AXIS,), to="varying"), tree)

    def _sums(self, params, stats, batch) -> Sums:
        return self.rule.objective.sums(self.forward, params, stats, batch)


class ScanEngine(_Engine):
    """One jitted, donated call per update; the loop's length is traced, so a ramp of the
    effective batch does not recompile."""

    def __init__(self, forward, rule, window, mesh):
        super().__init__(forward, rule, window, mesh)
        self.batched = NamedSharding(mesh, PartitionSpec(None, AXIS))
        self._jitted = jax.jit(self._update, donate_argnums=0, out_shardings=self.replicated)

    def update(self, state, batch, steps=None):
        return self._jitted(state, *self.place(batch, steps))

    def place(self, batch: PyTree, steps: int | None = None):
        """The arguments of the jitted update after the state: microbatches and their number."""
        self._require_room(batch, steps)
        microbatches = jax.device_put(self.window.split(batch), self.batched)
        return microbatches, np.int32(self.window.steps if steps is None else steps)

    def lower(self, state, microbatches, steps):
        """The update, lowered for the given arguments (arrays or shapes)."""
        return self._jitted.lower(state, microbatches, steps)

    def _update(self, state: State, microbatches, steps):
        sums, stats = self._accumulate(state.params, state.stats, microbatches, steps)
        closed, opt_state = close_window(self.rule).update(sums, state.opt_state, state.params)
        return advance(
            self.rule, state, closed, opt_state, stats if self.rule.objective.compat else None
        )

    def _accumulate(self, params, stats, microbatches, steps):
        @functools.partial(
            jax.shard_map,
            mesh=self.mesh,
            in_specs=(REPLICATED, REPLICATED, PartitionSpec(None, AXIS), REPLICATED),
            out_specs=REPLICATED,
        )
        def local(params, stats, microbatches, steps):
            params, stats = self._varying(params), self._varying(stats)
            one = jax.tree.map(lambda a: a[0], microbatches)
            shapes = jax.eval_shape(self._sums, params, stats, one)
            zero = self._varying(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))

            def body(i, carry):
                sums, stats = carry
                batch = jax.tree.map(
                    lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), microbatches
                )
                new = self._sums(params, stats, batch)
                if self.rule.objective.compat:
                    stats = self._move_now(stats, new)
                return add(sums, new), stats

            sums, stats = jax.lax.fori_loop(0, steps, body, (zero, stats))
            if self.rule.objective.compat:
                stats = jax.lax.pmean(stats, AXIS)
            else:
                stats = ()
            return jax.lax.psum(sums, AXIS), stats

        return local(params, stats, microbatches, steps)

    def _move_now(self, stats, sums: Sums):
        return batchnorm.move_statistics(stats, sums.moments, self.rule.statistics_momentum)


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

    def update(self, state, batch, steps=None):
        self._require_room(batch, steps)
        microbatches = self.window.split(batch)
        steps = np.int32(self.window.steps if steps is None else steps)
        for i in range(int(steps)):
            one = jax.device_put(jax.tree.map(lambda a, i=i: a[i], microbatches), self.batched)
            if self._accumulator is None:
                self._accumulator = self._empty(state, one)
            last = i == int(steps) - 1
            call = self._close if last else self._add
            # Nothing but the accumulator survives a microbatch; it is empty between windows.
            result, self._accumulator = call(state, self._accumulator, one, np.int32(i), steps)
        return result

    def _empty(self, state: State, one: PyTree) -> PyTree:
        """Zero sums for every device, with a leading axis over the devices."""
        per_device = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(
                (self.window.geometry.microbatch, *a.shape[1:]), a.dtype
            ),
            one,
        )
        shapes = jax.eval_shape(self._sums, state.params, state.stats, per_device)
        devices = self.window.geometry.devices
        return jax.tree.map(
            lambda s: jax.device_put(np.zeros((devices, *s.shape), s.dtype), self.batched), shapes
        )

    def _microbatch(self, state: State, accumulator, microbatch, index, steps, *, closing: bool):
        keep = optax.GradientTransformation(lambda p: (), lambda u, s, p=None: ((), s))
        inner = _reduced(close_window(self.rule)) if closing else keep

        @functools.partial(
            jax.shard_map,
            mesh=self.mesh,
            in_specs=(REPLICATED, PER_DEVICE, PER_DEVICE, REPLICATED, REPLICATED),
            out_specs=(REPLICATED, PER_DEVICE),
        )
        def local(state: State, accumulator, microbatch, index, steps):
            sums = self._sums(self._varying(state.params), self._varying(state.stats), microbatch)
            sums = _without_bad(sums)
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

        (closed, opt_state), accumulator = local(state, accumulator, microbatch, index, steps)
        if not closing:
            return (), accumulator
        return advance(self.rule, state, Closed(*closed), opt_state), accumulator


def _reduced(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on the sums of all devices: the one reduction of an update."""

    def update(sums, opt_state, params):
        return inner.update(jax.lax.psum(sums, AXIS), opt_state, params)

    return optax.GradientTransformation(inner.init, update)


def _without_bad(sums: Sums) -> Sums:
    """The sums, or zeros with a mark if any of them is not finite."""
    ok = jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves(sums)]))
    clean = jax.tree.map(lambda a: jnp.where(ok, a, jnp.zeros_like(a)), sums)
    return clean._replace(bad=(~ok).astype(sums.bad.dtype))
