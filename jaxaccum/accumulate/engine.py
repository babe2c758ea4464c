"""What the two engines share: where state and microbatches live, and what is refused.

An engine takes a state and an effective batch and gives the next state and its log. Both engines
(accumulate.scan, accumulate.multisteps) accumulate on each device by itself and reduce over devices
once per update. What they take at once is a call: one microbatch of every device, or those that
share a batch-norm group (accumulate.in_time), leaves (microbatches of a group, microbatch, ...).

The devices form a mesh of three axes. Samples lie over all of them. With `fsdp` devices of the
last two hold a part of the state each (Rajbhandari et al. 2020, arXiv:1910.02054, stages 1 and 2;
Zhao et al. 2023, arXiv:2304.11277): an update gathers the parameters before its loop and scatters
the sum of the gradients after it. Devices along the last one share batch-norm groups.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxaccum.accumulate import fsdp, in_time, usual_rule
from jaxaccum.accumulate.checks import check, check_batch, check_in_time, grouped
from jaxaccum.accumulate.recipe import GeometryError, Window
from jaxaccum.accumulate.terms import Forward, Sums
from jaxaccum.accumulate.update import State, UpdateRule

PyTree = Any
AXES = ("data", *fsdp.AXES)
GPUS = ("gpu", "cuda", "rocm")  # as platforms are named
REPLICATED = PartitionSpec()
PER_DEVICE = PartitionSpec(AXES)
LAID = PartitionSpec(None, AXES)  # (microbatches, microbatch * devices, ...)


class BaseEngine(abc.ABC):
    """A state and an effective batch in, the next state and its log out.

    Attributes:
      forward: the task's, given the recipe's groups, for one microbatch.
      rule, window: the update, and its layout on the geometry.
      mesh: the devices, axes `AXES`.
      replicated: the sharding of what all devices hold.
      on_gpu: whether each operation is a kernel that the host starts.
      share: samples of every effective batch that this process is to load, if others load the
        rest: (n,) int; None to load all.
    """

    def __init__(self, forward: Forward, rule: UpdateRule, window: Window, mesh: Mesh):
        self.forward = grouped(forward, window.recipe.group, window.together)
        self._task, self._whole = forward, grouped(forward, window.recipe.group)
        self.rule, self.window, self.mesh = rule, window, mesh
        self._checked = False
        self.replicated = NamedSharding(mesh, REPLICATED)
        self.share: np.ndarray | None = None
        self.on_gpu = mesh.devices.flat[0].platform in GPUS
        usual_rule.check_engine(rule.objective, window.geometry, jax.process_count())
        if jax.process_count() > 1:
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
        samples = max(self.window.geometry.microbatch, self.window.recipe.group or 1)

        def shapes(tree: PyTree, leading: tuple[int, ...] = ()) -> PyTree:
            def one(a):
                shape = (*leading, *a.shape[1:]) if leading else a.shape
                return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(a.dtype))

            return jax.tree.map(one, tree)

        check(
            self._whole, self.rule.objective, shapes(state.params), shapes(state.stats),
            shapes(batch, (samples,)),  # whole groups
        )  # fmt: skip
        if self.window.together > 1:
            microbatch = self.window.geometry.microbatch
            check_in_time(
                self._task, samples, microbatch, shapes(state.params), shapes(state.stats),
                shapes(batch, (microbatch,)),
            )  # fmt: skip
        self._checked = True

    def _split(self, batch: PyTree) -> PyTree:
        if self.share is None:
            return self.window.split(batch)
        return self.window.split_share(batch, self._own)

    @abc.abstractmethod
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
        Raises:
          ContractError: at the first update, of a forward or a batch that breaks the contract.
          GeometryError: more samples or steps than the window holds; with several processes, any
            other number of steps than the window's.
        """

    @abc.abstractmethod
    def lowered(self, state: PyTree, batch: PyTree) -> list[jax.stages.Lowered]:
        """The programs of an update, lowered for shapes; nothing is computed.

        Args:
          state: shapes of the state. batch: shapes of an effective batch of `nbs` samples.
        Returns:
          of scan the update; of multisteps the call that adds a microbatch and the one that closes
          a window, with coupled terms after the first pass over a microbatch and the coupling.
        """

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

    def _gradient_specs(self, params: PyTree) -> dict[str, PyTree]:
        """How a window's gradients lie over the mesh once they are summed: as the parameters do."""
        owned = self.rule.objective.owned(params)
        return {name: self.specs(tree) for name, tree in owned.items()}

    def _calls(self, steps: Any) -> Any:
        """Calls that as many microbatches of a device take."""
        return -(-steps // self.window.together)

    @functools.cached_property
    def _sums(self) -> Callable[..., Sums]:
        """(params, stats, batch of a call, coupling or None) -> Sums.

        Jitted inside of the jitted programs, so that a model is traced once: for the shapes of the
        accumulator, in the loop, and in each program of `multisteps`.
        """
        return jax.jit(self._sums_of_call)

    def _sums_of_call(self, params, stats, batch, coupling):
        whole: Any = () if coupling is None else coupling._replace(pulls=())
        pulls: Any = () if coupling is None else coupling.pulls

        def one(fixed, given):
            (params, stats, whole), (batch, pulls) = fixed, given
            own = whole._replace(pulls=pulls) if coupling is not None else None
            return self.rule.objective.sums(self.forward, params, stats, batch, own), ()

        sums, _ = self._computed(one, (params, stats, whole), (batch, pulls))
        return self.rule.objective.with_products(sums)

    def _features(self, params, stats, batch):
        """The first pass over a call: features (microbatches of a group, microbatch, ...), and
        denominators."""

        def one(fixed, given):
            params, stats = fixed
            features, denominators = self.rule.objective.features(
                self.forward, params, stats, given
            )
            return denominators, features

        denominators, features = self._computed(one, (params, stats), batch)
        return features, denominators

    def _computed(self, function: Callable, fixed: PyTree, batches: PyTree):
        """function(fixed, microbatch) -> (totals, values) over the microbatches of a call."""
        if self.window.together > 1:
            offload = self.window.geometry.offload
            return in_time.computed(function, self.window.together, fixed, batches, offload)
        totals, values = function(fixed, jax.tree.map(lambda a: a[0], batches))
        return totals, jax.tree.map(lambda a: a[None], values)

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


def varying(tree: PyTree, specs: PyTree = None) -> PyTree:
    """Marks replicated values as each device's own, so that gradients stay local.

    Args:
      specs: how the leaves lay before they were gathered; None if none was divided.
    """
    if specs is None:
        specs = jax.tree.map(lambda _: REPLICATED, tree)

    def mark(a, spec):  # what was gathered is marked already, but for the axis "data"
        return jax.lax.pcast(a, AXES[:1] if len(spec) else AXES, to="varying")

    return jax.tree.map(mark, tree, specs)
