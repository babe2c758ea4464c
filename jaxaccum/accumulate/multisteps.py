"""The engine `multisteps`: one jitted call per microbatch (or per group of batch norm, where that
is larger), `optax.MultiSteps` around the optimizer.

The effective batch never sits on the device at once.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from jaxaccum.accumulate.coupled import Coupling
from jaxaccum.accumulate.engine import AXES, LAID, PER_DEVICE, REPLICATED, BaseEngine, varying
from jaxaccum.accumulate.terms import Sums, add
from jaxaccum.accumulate.update import (
    Closed,
    State,
    UpdateRule,
    advance,
    all_finite,
    close_window,
)

PyTree = Any


class MultiStepsEngine(BaseEngine):
    """Sums in an accumulator that `optax.MultiSteps` keeps between the calls.

    `MultiSteps` by itself runs its inner transformation on every call and keeps a NaN for ever.
    The host knows which microbatch closes the window: the others run `MultiSteps` around an
    identity, so that the optimizer and the reduction over devices happen once per update, and a
    microbatch that is not finite enters as zeros with a mark.
    """

    def __init__(self, forward, rule, window, mesh):
        super().__init__(forward, rule, window, mesh)
        self.batched, self.laid = (NamedSharding(mesh, spec) for spec in (PER_DEVICE, LAID))
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
        calls = np.int32(self._calls(self.window.steps if steps is None else steps))

        def of_call(a, i):
            return a[i * self.window.together : (i + 1) * self.window.together]

        def on_devices(i):
            return self._put(jax.tree.map(lambda a: of_call(a, i), microbatches), self.laid)

        coupling = None
        if self.rule.objective.coupled:
            passed = [
                self._first_pass(state.params, state.stats, on_devices(i))
                for i in range(int(calls))
            ]
            features = jax.tree.map(lambda *a: jnp.concatenate(a), *(p[0] for p in passed))
            denominators = functools.reduce(add, (p[1] for p in passed))
            room = int(calls) * self.window.together
            weight = self._put(microbatches["weight"][:room], self.laid)
            coupling = self._between(state.params, features, weight, denominators)
        for i in range(int(calls)):
            one, own = on_devices(i), None
            if coupling is not None:
                own = coupling._replace(
                    pulls=jax.tree.map(lambda a, i=i: of_call(a, i), coupling.pulls)
                )
            if self._accumulator is None:
                self._accumulator = self._empty(state, one, own)
            last = i == int(calls) - 1
            call = self._close if last else self._add
            # Nothing but the accumulator survives a microbatch; it is empty between windows.
            result, self._accumulator = call(state, self._accumulator, one, np.int32(i), calls, own)
        return result

    def lowered(self, state, batch):
        self._check(state, batch)
        together = self.window.together
        one = self._laid(batch, (together, self._width), LAID)
        state, steps, programs, coupling = self._placed(state), np.int32(1), [], None
        if self.rule.objective.coupled:
            programs.append(self._first_pass.lower(state.params, state.stats, one))
            features, denominators = jax.eval_shape(
                self._first_pass, state.params, state.stats, one
            )
            features = self._laid(features, (self.window.steps,), LAID)
            weight = self._laid(one["weight"], (self.window.steps,), LAID)
            arguments = (state.params, features, weight, self._placed(denominators))
            programs.append(self._between.lower(*arguments))
            coupling = jax.eval_shape(self._between, *arguments)
            coupling = self._placed(coupling._replace(pulls=()))._replace(
                pulls=self._laid(coupling.pulls, (together,), LAID)
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
        """The first pass over one call: its features, and denominators of all devices."""

        @functools.partial(
            jax.shard_map,
            mesh=self.mesh,
            in_specs=(REPLICATED, REPLICATED, LAID),
            out_specs=(LAID, REPLICATED),
        )
        def local(params, stats, microbatch):
            features, denominators = self._features(varying(params), varying(stats), microbatch)
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
            in_specs=(REPLICATED, REPLICATED, LAID, REPLICATED, LAID),
            out_specs=PER_DEVICE,
        )
        def each(params, stats, microbatch, whole, pulls):
            own = whole._replace(pulls=pulls) if coupling is not None else None
            sums = self._sums(varying(params), varying(stats), microbatch, own)
            return jax.tree.map(lambda a: a[None], sums)

        def global_shapes(tree):
            call = (self.window.together, self._width)
            return jax.tree.map(
                lambda a: jax.ShapeDtypeStruct((*call, *a.shape[2:]), a.dtype), tree
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
                REPLICATED, PER_DEVICE, LAID, REPLICATED, REPLICATED, REPLICATED, LAID,
            ),
            out_specs=(REPLICATED, PER_DEVICE),
        )  # fmt: skip
        def local(state: State, accumulator, microbatch, index, steps, whole, pulls):
            own = whole._replace(pulls=pulls) if coupling is not None else None
            sums = self._sums(varying(state.params), varying(state.stats), microbatch, own)
            sums = _without_bad(sums)
            inner = _reduced(self.rule, whole, state.step) if closing else keep
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


def _reduced(rule: UpdateRule, coupling, step: jax.Array) -> optax.GradientTransformation:
    """`close_window` on the sums of all devices: the one reduction of an update."""
    inner = close_window(rule)

    def update(sums, opt_state, params):
        whole = jax.lax.psum(sums, AXES)._replace(coupling=coupling)
        whole = rule.objective.weighted(whole, step)
        return inner.update(whole, opt_state, params)

    return optax.GradientTransformation(inner.init, update)


def _without_bad(sums: Sums) -> Sums:
    """The sums, or zeros with a mark if any of them is not finite."""
    ok = all_finite(sums)
    clean = jax.tree.map(lambda a: jnp.where(ok, a, jnp.zeros_like(a)), sums)
    return clean._replace(bad=(~ok).astype(sums.bad.dtype))
