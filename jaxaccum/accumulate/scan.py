"""The engine `scan`: one jitted call per update, a loop over the microbatches inside."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxaccum.accumulate import fsdp, packing, usual_rule
from jaxaccum.accumulate.engine import AXES, LAID, REPLICATED, BaseEngine, varying
from jaxaccum.accumulate.terms import add
from jaxaccum.accumulate.update import State, advance, close_window

PyTree = Any


class ScanEngine(BaseEngine):
    """One jitted, donated call per update.

    The loop's length is traced, so a ramp of the effective batch does not recompile. On GPUs whole
    windows have a program of their own in which it is known: else the host waits for the device
    after each microbatch, to be told whether to go on, and launches nothing meanwhile.
    """

    def __init__(self, forward, rule, window, mesh):
        super().__init__(forward, rule, window, mesh)
        self.batched = NamedSharding(mesh, LAID)
        self._jitted: Any = None
        # Windows of the usual rule ramp up, and would have two programs.
        usual = isinstance(rule.objective, usual_rule.UsualObjective)
        self._known = self.on_gpu and not usual

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
        """The arguments of the jitted update after the state.

        Returns:
          microbatches on the devices, leaves (steps, microbatch * devices, ...), and how many of
          them to run, () int32, or None for all.
        """
        self._require_room(batch, steps)
        microbatches = self._put(self._split(batch), self.batched)
        return microbatches, self._length(steps)

    def _length(self, steps: int | None = None) -> np.int32 | None:
        """How many microbatches to run, as the program takes it."""
        steps = self.window.steps if steps is None else steps
        return None if self._known and steps == self.window.steps else np.int32(steps)

    def lower(self, state, microbatches, steps):
        """The update, lowered for the given arguments (arrays or shapes)."""
        return self._program(state).lower(state, microbatches, steps)

    def lowered(self, state, batch):
        self._check(state, batch)
        microbatches = self._laid(batch, (self.window.steps, self._width), LAID)
        return [self.lower(self._placed(state), microbatches, self._length())]

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
        sums = self.rule.objective.weighted(sums, state.step)
        end = close_window(self.rule, fsdp.norm(self.mesh, self.specs(state.params)))
        closed, opt_state = end.update(sums, state.opt_state, state.params)
        return advance(self.rule, state, closed, opt_state, stats)

    def _collect(self, params, stats, microbatches, steps):
        """The first pass: features (steps, microbatch * devices, ...), weights, denominators."""
        specs, every = self.specs(params), self.window.steps
        length = len(microbatches["weight"])

        @functools.partial(
            jax.shard_map,
            mesh=self.mesh,
            in_specs=(specs, REPLICATED, LAID, REPLICATED),
            out_specs=(LAID, REPLICATED),
        )
        def local(params, stats, microbatches, steps):
            params = varying(fsdp.gathered(params, specs), specs)
            stats = varying(stats)
            shapes = jax.eval_shape(self._features, params, stats, self._at(microbatches, 0))

            def zeros(shape, dtype):
                return varying(jnp.zeros(shape, dtype))

            kept = jax.tree.map(lambda s: zeros((length, *s.shape[1:]), s.dtype), shapes[0])
            sums = jax.tree.map(lambda s: zeros(s.shape, s.dtype), shapes[1])

            def body(i, carry):
                kept, sums = carry
                new, more = self._features(params, stats, self._at(microbatches, i))
                first = i * self.window.together
                kept = jax.tree.map(
                    lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, first, 0), kept, new
                )
                return kept, add(sums, more)

            number = self._calls(every if steps is None else steps)
            kept, sums = jax.lax.fori_loop(0, number, body, (kept, sums))
            return kept, jax.lax.psum(sums, AXES)

        features, denominators = local(params, stats, microbatches, steps)
        # Microbatches that a shorter window leaves out are filling, of weight 0: see `split`.
        return features, microbatches["weight"], denominators

    def _accumulate(self, params, stats, rate, microbatches, steps, coupling):
        """The window's sums, and statistics that moved with its microbatches or None."""
        objective = self.rule.objective
        whole: Any = () if coupling is None else coupling._replace(pulls=())
        pulls: Any = () if coupling is None else coupling.pulls
        specs, gradients = self.specs(params), self._gradient_specs(params)
        every = self.window.steps

        @functools.partial(
            jax.shard_map,
            mesh=self.mesh,
            in_specs=(specs, REPLICATED, REPLICATED, LAID, REPLICATED, REPLICATED, LAID),
            out_specs=(gradients, REPLICATED, REPLICATED),
        )
        def local(params, stats, rate, microbatches, steps, whole, pulls):
            params = varying(fsdp.gathered(params, specs), specs)
            stats = varying(stats)

            def sums_of(batch, pulls):
                own = whole._replace(pulls=pulls) if coupling is not None else None
                return self._sums(params, stats, batch, own)

            shapes = jax.eval_shape(sums_of, *self._at((microbatches, pulls), 0))
            zero = varying(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))
            packed = packing.Packing(shapes, packing.SMALL if self.on_gpu else 0)

            def body(i, carry):
                sums, stats = carry
                new = sums_of(*self._at((microbatches, pulls), i))
                stats = usual_rule.moved(objective, stats, new.moments, rate)
                return add(sums, packed.pack(new)), stats

            number = self._calls(every if steps is None else steps)
            sums, stats = jax.lax.fori_loop(0, number, body, (packed.pack(zero), stats))
            sums = packed.unpack(sums)
            stats = usual_rule.averaged(objective, stats, AXES)
            rest = sums._replace(gradients={})
            both = fsdp.reduced(
                (sums.gradients, rest), (gradients, jax.tree.map(lambda _: REPLICATED, rest))
            )
            return *both, stats

        reduced, rest, stats = local(params, stats, rate, microbatches, steps, whole, pulls)
        return rest._replace(gradients=reduced, coupling=whole), stats

    def _at(self, tree: PyTree, i: Any) -> PyTree:
        """Of what is laid out over the window the microbatches of call i, as leading axis."""
        together = self.window.together
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i * together, together), tree)
