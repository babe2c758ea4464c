"""The core knows no framework: an NNX model plugs in through `nnx.split` and `nnx.merge`."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxaccum.accumulate import Geometry, Objective, Output, Recipe, Term, UpdateRule, equivalence


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(3, 8, rngs=rngs)
        self.second = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))[..., 0]


def adapt(model: nnx.Module):
    """(params, forward) of an NNX model; parameters are its state, a pytree."""
    graph, params = nnx.split(model)

    def forward(params, stats, batch, groups):
        out = nnx.merge(graph, params, copy=True)(batch["x"])
        weight = batch["weight"]
        error = jnp.sum(weight * jnp.square(out - batch["y"]))
        return Output({"fit": error}, {"samples": jnp.sum(weight)}, {})

    return params, forward


@pytest.mark.slow
def test_an_nnx_model_is_one_run_on_every_geometry():
    params, forward = adapt(Net(nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    batches = [
        {"x": rng.normal(size=(6, 3)).astype(np.float32), "weight": np.ones(6, np.float32),
         "y": rng.normal(size=6).astype(np.float32)} for _ in range(2)
    ]  # fmt: skip
    rule = UpdateRule(Objective((Term("fit", 1.0, "samples"),), {"samples": 1.0}), optax.sgd(0.1))

    def run(geometry):
        recipe = Recipe(6, "frozen")
        return equivalence.trace(
            forward, rule, recipe, geometry, params, {}, lambda: iter(batches), 2
        )

    whole = run(Geometry(6))
    for geometry in (Geometry(4), Geometry(2, 2), Geometry(1, 2, "multisteps")):
        found = equivalence.differences(run(geometry), whole)
        assert equivalence.within(found, equivalence.Tolerance.of(False)), found
    assert whole.logs[1]["loss"] != whole.logs[0]["loss"]
