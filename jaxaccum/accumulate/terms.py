"""Losses as ratios of sums, and the sums that an update is made of.

    loss = sum_t  gain_t * (sum of numerator_t) / max(sum of denominator_t, floor_t)

where both sums run over the samples of the effective batch. Sums add up over microbatches and
devices; ratios do not. So gradients of numerators and the denominators are carried side by side,
and the division happens once, at the update.

A loss that couples samples (accumulate.coupled) takes a pass of its own over the window, which
learns the denominators on the way: then the division is known beforehand, and one accumulator and
one backward pass do for all terms. So they do where every parameter learns from the terms of one
denominator (accumulate.owners).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum.accumulate import noise, owners
from jaxaccum.accumulate.batchnorm import Groups
from jaxaccum.accumulate.coupled import Coupled, Coupling, couple

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Term:
    """One term of a loss: `gain` times a numerator over a denominator (by name)."""

    name: str
    gain: float
    denominator: str


class Output(NamedTuple):
    """What a task returns for one microbatch; every leaf is a sum over its samples.

    Attributes:
      numerators: term name -> scalar, differentiable in the parameters, without its gain.
      denominators: denominator name -> scalar that carries no gradient.
      moments: additive moments of the batch-norm layers (accumulate.batchnorm), or {}.
      features: what coupled terms look at, leaves (microbatch, ...); small, as those of the whole
        effective batch are kept together.
    """

    numerators: Mapping[str, jax.Array]
    denominators: Mapping[str, jax.Array]
    moments: PyTree
    features: PyTree = ()


Forward = Callable[[PyTree, PyTree, PyTree, Groups | None], Output]
"""(params, stats, microbatch, groups) -> Output.

Padded samples have `microbatch["weight"] == 0`. `groups` says how samples share batch statistics;
None stands for the running statistics (a recipe whose bn_group is "frozen").
"""

Grouped = Callable[[PyTree, PyTree, PyTree], Output]
"""A forward that has been given its groups (accumulate.checks.grouped)."""


class Sums(NamedTuple):
    """What an update is made of; adds up over microbatches and over devices.

    Attributes:
      gradients: denominator name -> gradient of the sum of gain * numerator over its terms, with
        owners None for what it does not own; with coupled terms "loss" -> gradient of scale * loss.
      numerators, denominators, moments: as in `Output`.
      samples: real samples, sum of the weights.
      bad: microbatches whose sums were not finite (counted by the multisteps engine, which must
        not let them into its accumulator).
      coupling: of the window's coupled terms, once the sums are complete.
      products: for the noise scale (accumulate.noise), if the objective asks for it.
      weights: denominator name -> weight of its terms at this update, of those that have one, once
        the sums are complete (`Objective.weighted`).
    """

    gradients: Mapping[str, PyTree]
    numerators: Mapping[str, jax.Array]
    denominators: Mapping[str, jax.Array]
    moments: PyTree
    samples: jax.Array
    bad: jax.Array
    coupling: Coupling | tuple[()] = ()
    products: PyTree = ()
    weights: Mapping[str, jax.Array] | tuple[()] = ()


@dataclasses.dataclass(frozen=True)
class Objective:
    """The terms of a loss and how their sums become a gradient.

    Attributes:
      terms: the terms. Terms that share a denominator share one gradient accumulator.
      floors: denominator name -> smallest value to divide by, applied once per update.
      scale: the gradient is that of `scale * loss`; the log shows the loss itself. The YOLO
        recipes use the effective batch here, so that clipping acts on a sum over images.
      coupled: terms that couple the samples of the effective batch.
      noise: whether to estimate the gradient noise scale.
      owner: path of a parameter ("a/b/kernel") -> the denominator whose terms alone it learns from,
        where that is so of all parameters: one accumulator and one backward pass then do for all
        denominators (accumulate.owners). None: nothing is known.
      weights: denominator name -> weight of its terms, a function of the updates done before, ()
        int32. It is a factor at the update and the same for its whole window. 1 for others.
    """

    terms: tuple[Term, ...]
    floors: Mapping[str, float]
    scale: float = 1.0
    coupled: tuple[Coupled, ...] = ()
    noise: bool = False
    owner: Callable[[str], str] | None = None
    weights: Mapping[str, Callable[[jax.Array], jax.Array]] = dataclasses.field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        missing = {t.denominator for t in self.terms} - set(self.floors)
        if missing:
            raise ValueError(f"no floor given for the denominators {sorted(missing)}")
        if unknown := set(self.weights) - set(self.floors):
            raise ValueError(
                f"weights are given for {sorted(unknown)}; the denominators are "
                f"{sorted(self.floors)}"
            )
        if self.coupled and (self.owner or self.weights):
            raise ValueError(
                "with coupled terms all others are divided before they are summed, have one "
                "accumulator anyway, and no weights that change: leave out owner and weights"
            )

    @property
    def accumulators(self) -> int:
        """Trees like the parameters that a window's gradients are summed in."""
        return 1 if self.coupled or self.owner else len(self.floors)

    def owned(self, tree: PyTree) -> dict[str, PyTree]:
        """What of a tree of the parameters each of `Sums.gradients` is like, by their names."""
        if self.coupled:
            return {"loss": tree}
        if self.owner is None:
            return dict.fromkeys(self.floors, tree)
        return owners.split(tree, self.owner, self.floors)

    def divisor(self, name: str, denominators: Mapping[str, jax.Array]) -> jax.Array:
        """The denominator `name`, floored."""
        return jnp.maximum(denominators[name], self.floors[name])

    def features(self, forward: Grouped, params: PyTree, stats: PyTree, batch: PyTree):
        """The first pass over a microbatch of a window with coupled terms.

        Returns:
          features of its samples, and its denominators.
        """
        out = forward(params, stats, batch)
        return out.features, dict(out.denominators)

    def couple(
        self, params: PyTree, features: PyTree, weight: jax.Array, denominators: PyTree
    ) -> Coupling:
        """The coupled terms of an effective batch, between its two passes.

        Args:
          features: leaves (samples, ...); weight: (samples,); both of the whole effective batch.
          denominators: summed over it.
        """
        divisors = {name: self.divisor(name, denominators) for name in self.floors}
        return couple(self.coupled, self.scale, params, features, weight, divisors)

    def sums(
        self,
        forward: Grouped,
        params: PyTree,
        stats: PyTree,
        batch: PyTree,
        coupling: Coupling | None = None,
    ) -> Sums:
        """Gradients of the numerators and all other sums of one microbatch, but for `products`.

        Args:
          coupling: with coupled terms, the window's; its `pulls` are those of this microbatch.
        """
        if coupling is not None:
            return self._coupled_sums(forward, params, stats, batch, coupling)

        totals, pull_back, out = self.pullback(forward, params, stats, batch)
        if self.owner is not None:
            (both,) = pull_back(jax.tree.map(jnp.ones_like, totals))
            return _sums(self.owned(both), out, batch)
        gradients = {}
        for name in self.floors:
            (gradients[name],) = pull_back(
                {k: (jnp.ones_like if k == name else jnp.zeros_like)(v) for k, v in totals.items()}
            )
        return _sums(gradients, out, batch)

    def pullback(
        self, forward: Grouped, params: PyTree, stats: PyTree, batch: PyTree
    ) -> tuple[dict[str, Any], Callable[[PyTree], tuple[PyTree]], Output]:
        """Denominator name -> sum of gain * numerator over its terms, of one microbatch; the
        function from the cotangents of these to the gradient; and all that forward returned."""

        def totals(params):
            out = forward(params, stats, batch)
            sums = {
                name: sum(t.gain * out.numerators[t.name] for t in self._sharing(name))
                for name in self.floors
            }
            return sums, out

        return jax.vjp(totals, params, has_aux=True)

    def _coupled_sums(self, forward, params, stats, batch, coupling: Coupling) -> Sums:
        """Sums whose gradient is that of `scale * loss`, coupled terms included, in one pass."""

        def total(params):
            out = forward(params, stats, batch)
            value = sum(
                t.gain * self.scale / coupling.divisors[t.denominator] * out.numerators[t.name]
                for t in self.terms
            )
            pulled = jax.tree.map(lambda f, g: jnp.sum(f * g), out.features, coupling.pulls)
            return value + sum(jax.tree.leaves(pulled)), out

        gradient, out = jax.grad(total, has_aux=True)(params)
        return _sums({"loss": gradient}, out, batch)

    def with_products(self, sums: Sums) -> Sums:
        """The sums of what is computed at once (a microbatch, or those of one batch-norm group)
        with what the noise scale is estimated from, if it is asked for."""
        if not self.noise:
            return sums
        disjoint = self.owner is not None
        return sums._replace(products=noise.products(sums.gradients, sums.samples, disjoint))

    def weighted(self, sums: Sums, step: jax.Array) -> Sums:
        """A window's complete sums with the weights of this update.

        Args:
          step: updates done before, () int32.
        """
        if not self.weights:
            return sums
        dtype = sums.samples.dtype
        weights = {name: jnp.asarray(of(step), dtype) for name, of in self.weights.items()}
        return sums._replace(weights=weights)

    def gradient(self, sums: Sums) -> PyTree:
        """The gradient of `scale * loss` over the effective batch."""
        if isinstance(sums.coupling, Coupling):
            return add(sums.gradients["loss"], sums.coupling.direct)
        factors = self._factors(sums)
        parts = [
            jax.tree.map(lambda g, f=factors[name]: g * f, sums.gradients[name])
            for name in self.floors
        ]
        if self.owner is not None:
            return owners.merged(parts)
        return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *parts)

    def _factors(self, sums: Sums) -> dict[str, Any]:
        """What the accumulated gradients are multiplied by at the update."""
        if isinstance(sums.coupling, Coupling):
            return {"loss": 1.0}
        return {name: self._weigh(self._share(name, sums), name, sums) for name in self.floors}

    def _share(self, name: str, sums: Sums) -> Any:
        """The factor of a denominator's gradient, but for its weight."""
        return self.scale / self.divisor(name, sums.denominators)

    @staticmethod
    def _weigh(value: Any, name: str, sums: Sums) -> Any:
        """A value of a denominator's terms times the weight that they have at this update."""
        weights = dict(sums.weights)
        return value * weights[name] if name in weights else value

    def _logged_over(self, term: Term, sums: Sums) -> jax.Array:
        """What a window's numerator is divided by for the log."""
        return self.divisor(term.denominator, sums.denominators)

    def noise_of(self, sums: Sums, norm: jax.Array) -> dict[str, jax.Array]:
        """The window's estimates for the noise scale, or {}; `norm` of its gradient."""
        if not self.noise:
            return {}
        return noise.estimate(sums.products, self._factors(sums), norm, sums.samples, self.scale)

    def log(self, sums: Sums) -> dict[str, jax.Array]:
        """The loss of the effective batch, its terms as "loss/NAME", gains included and weights
        not, and what coupled terms watch as "metrics/NAME"."""
        values = {
            f"loss/{t.name}": t.gain * sums.numerators[t.name] / self._logged_over(t, sums)
            for t in self.terms
        }
        parts = [self._weigh(values[f"loss/{t.name}"], t.denominator, sums) for t in self.terms]
        watched = {}
        if isinstance(sums.coupling, Coupling):
            values |= {f"loss/{name}": value for name, value in sums.coupling.values.items()}
            parts += sums.coupling.values.values()
            watched = {f"metrics/{name}": value for name, value in sums.coupling.watched.items()}
        return {"loss": jnp.sum(jnp.stack(parts)), **values, **watched}

    def _sharing(self, denominator: str) -> list[Term]:
        return [t for t in self.terms if t.denominator == denominator]


def _sums(gradients: Mapping[str, PyTree], out: Output, batch: PyTree) -> Sums:
    """The sums of one microbatch, all scalars in the dtype of the numerators."""
    dtype = jnp.result_type(*out.numerators.values())
    samples = jnp.sum(batch["weight"]).astype(dtype)
    denominators = {name: value.astype(dtype) for name, value in out.denominators.items()}
    return Sums(
        gradients, dict(out.numerators), denominators, out.moments, samples,
        jnp.zeros_like(samples),
    )  # fmt: skip


def add(a: PyTree, b: PyTree) -> PyTree:
    """Leafwise sum of two trees of one structure."""
    return jax.tree.map(jnp.add, a, b)
