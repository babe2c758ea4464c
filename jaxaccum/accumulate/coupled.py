"""Losses that couple samples: a contrastive term over the whole effective batch, say.

Such a loss is no sum over samples, so its gradient cannot be summed over microbatches. But it looks
at the samples through small features f_i, and

    dL/dparams = (direct part) + sum_i (df_i / dparams)^T (dL / df_i)

so a first pass over the window collects the features, the loss and dL/df are computed once from all
of them, and the second pass, which computes the other terms, pulls each sample's dL/df_i back.
Exact at any microbatch: Gao et al. 2021, "Scaling deep contrastive learning batch size under memory
limited setup", arXiv:2101.06983. Both passes see the same random numbers and the same batch-norm
groups, since those belong to the samples and not to the pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Coupled:
    """A term over the features of all samples of the effective batch.

    Attributes:
      name: of the term.
      gain: its weight in the loss.
      loss: (params, features, weight) -> scalar, a mean and not a sum. Leaves of features are
        (samples, ...), in the order of the effective batch and then padding; weight (samples,) is
        0 for padding, of which the value must not depend. params are for what only this loss has,
        such as a temperature.
      watched: name -> a function of the same arguments, to be logged and not learned from.
    """

    name: str
    gain: float
    loss: Callable[[PyTree, PyTree, jax.Array], jax.Array]
    watched: Mapping[str, Callable[[PyTree, PyTree, jax.Array], jax.Array]] = dataclasses.field(
        default_factory=dict
    )


class Coupling(NamedTuple):
    """What the first pass over a window hands to the second.

    Attributes:
      values: term name -> gain * loss, for the log.
      watched: name -> value, for the log as well.
      pulls: gradient of scale * (all coupled terms) in the features, laid out like them.
      direct: gradient of the same in the parameters, the features held constant.
      divisors: denominator name -> what to divide its terms by.
    """

    values: Mapping[str, jax.Array]
    watched: Mapping[str, jax.Array]
    pulls: PyTree
    direct: PyTree
    divisors: Mapping[str, jax.Array]


def couple(
    terms: tuple[Coupled, ...],
    scale: float,
    params: PyTree,
    features: PyTree,
    weight: jax.Array,
    divisors: Mapping[str, jax.Array],
) -> Coupling:
    """Losses over all features, and their gradients."""

    def total(params, features):
        values = {t.name: t.gain * t.loss(params, features, weight) for t in terms}
        return scale * sum(values.values()), values

    (direct, pulls), values = jax.grad(total, argnums=(0, 1), has_aux=True)(params, features)
    watched = {k: f(params, features, weight) for t in terms for k, f in t.watched.items()}
    return Coupling(values, watched, pulls, direct, divisors)
