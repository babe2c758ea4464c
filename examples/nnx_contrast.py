"""A Flax NNX model of your own, with a loss that couples samples: pairs told apart by contrast.

    python examples/nnx_contrast.py

Every pair is contrasted with all others of the effective batch, whatever the microbatch; within
microbatches it would be another, easier task. Batch norm is written with the core's functions,
since NNX has no layer that knows groups.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxaccum.accumulate import (
    Coupled,
    Geometry,
    Objective,
    Output,
    Recipe,
    Term,
    UpdateRule,
    Window,
    make_engine,
    verify,
)
from jaxaccum.accumulate.batchnorm import moments, normalise

NBS = 14  # pairs per update; in microbatches of 4 the last one is filled up
GROUP = 2  # samples that share batch statistics


class Tower(nnx.Module):
    """(samples, 6) -> (samples, 4), and the moments of its batch norm."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(6, 32, use_bias=False, rngs=rngs)
        self.scale, self.bias = nnx.Param(jnp.ones(32)), nnx.Param(jnp.zeros(32))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(32)), nnx.BatchStat(jnp.ones(32))
        self.second = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x, groups):
        x, mean, var, count = normalise(
            self.first(x), self.scale[...], self.bias[...], groups, 1e-5, True
        )
        return self.second(x), moments(mean, var, count, self.mean[...])


GRAPH, *_ = nnx.split(Tower(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)


def embed(params, stats, side, x, groups):
    """One tower, on the unit sphere."""
    state = nnx.State({**params[side], **stats[side]})
    tower = nnx.merge(GRAPH, state, copy=True)
    out, found = tower(x, groups)
    # A group that is padding alone comes out as zeros, of which a plain norm has no gradient.
    return out * jax.lax.rsqrt(jnp.sum(out * out, axis=-1, keepdims=True) + 1e-12), found


def forward(params, stats, batch, groups):
    """Sums of the microbatch, and of each of its samples what the contrast looks at."""
    left, of_left = embed(params, stats, "left", batch["left"], groups)
    right, of_right = embed(params, stats, "right", batch["right"], groups)
    weight = batch["weight"]
    apart = jnp.sum(weight * jnp.sum(jnp.square(left - right), axis=-1))
    return Output(
        numerators={"apart": apart},
        denominators={"pairs": jnp.sum(weight)},
        moments={"left": of_left, "right": of_right},
        features={"left": left, "right": right},
    )


def contrast(params, features, weight):
    """InfoNCE over all pairs of the effective batch (Oord et al. 2018, arXiv:1807.03748)."""
    logits = features["left"] @ features["right"].T * jnp.exp(params["temperature"])
    logits = jnp.where(weight[None, :] > 0, logits, -1e9)  # padding is nobody's other
    own = jnp.diagonal(jax.nn.log_softmax(logits, axis=-1))
    return -jnp.sum(own * weight) / jnp.sum(weight)


RULE = UpdateRule(
    Objective(
        (Term("apart", 0.1, "pairs"),), floors={"pairs": 1.0},
        coupled=(Coupled("contrast", 1.0, contrast),),
    ),
    optax.adam(3e-3),
)  # fmt: skip
RECIPE = Recipe(nbs=NBS, bn_group=GROUP)


def batches(dtype=np.float32):
    """Two views of one hidden thing."""
    rng = np.random.default_rng(0)
    views = rng.normal(size=(2, 3, 6))
    while True:
        hidden = rng.normal(size=(NBS, 3))
        left, right = (hidden @ view + rng.normal(0, 0.1, (NBS, 6)) for view in views)
        yield {
            "left": left.astype(dtype), "right": right.astype(dtype), "weight": np.ones(NBS, dtype)
        }  # fmt: skip


def initial(dtype=np.float32):
    params, stats = {}, {}
    for seed, side in enumerate(("left", "right")):
        _, learned, running = nnx.split(Tower(nnx.Rngs(seed)), nnx.Param, nnx.BatchStat)
        params[side], stats[side] = nnx.to_pure_dict(learned), nnx.to_pure_dict(running)
    params["temperature"] = np.log(10.0)
    return jax.tree.map(lambda a: np.asarray(a, dtype), (params, stats))


def check():
    """One update on several geometries, in float64: the differences are rounding."""
    with jax.enable_x64(True):
        batch = next(batches(np.float64))
        return verify(forward, RULE, RECIPE, *initial(np.float64), batch)


def main():
    found = check()
    print(found)
    assert found.ok
    engine = make_engine(forward, RULE, Window(RECIPE, Geometry(microbatch=4)))
    state = engine.init(*initial())
    for _, batch in zip(range(200), batches(), strict=False):
        state, log = engine.update(state, batch)
        if int(log["step"]) in (1, 200):
            print(f"update {int(log['step']):3d}: contrast {float(log['loss/contrast']):.4f}")


if __name__ == "__main__":
    main()
