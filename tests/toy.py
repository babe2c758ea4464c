"""A task small enough to try every geometry: batch norm, noise, two denominators, empty samples."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxaccum.accumulate import (
    Geometry,
    GroupBatchNorm,
    Groups,
    Objective,
    Output,
    Recipe,
    Term,
    UpdateRule,
    sample_keys,
)

SEED = 7


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, groups):
        x = nn.Dense(8, name="first", dtype=x.dtype)(x)
        x = GroupBatchNorm(silu=True, name="norm")(x, groups)
        return nn.Dense(2, name="second", dtype=x.dtype)(x)


NET = Net()


def make_forward(*, by_place=False, group_of=None, mask=True):
    """The task. The keyword arguments break it for the tests that must notice."""

    def forward(params, stats, batch, groups):
        weight = batch["weight"] if mask else jnp.ones_like(batch["weight"])
        place = jnp.arange(len(weight), dtype=jnp.int32)
        keys = sample_keys(SEED, batch["epoch"], place if by_place else batch["index"])
        x = batch["x"]
        noise = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], jnp.float32))(keys)
        x = x + 0.3 * noise.astype(x.dtype)
        size = groups and (groups.size if group_of is None else group_of(len(weight)))
        groups = None if size is None else Groups(size, weight, groups.microbatches)
        out, changed = NET.apply(
            {"params": params, "batch_stats": stats}, x, groups, mutable=["moments"]
        )
        objects = batch["objects"] * weight[:, None]
        error = jnp.square(out[..., 0] - batch["y"])
        everywhere = jnp.square(out[..., 1]) * weight[:, None]
        return Output(
            {"fit": jnp.sum(objects * error), "calm": jnp.sum(everywhere)},
            {"objects": jnp.sum(objects), "points": jnp.sum(weight) * out.shape[1]},
            changed.get("moments", {}),
        )

    return forward


def make_rule(nbs: int, objective=Objective) -> UpdateRule:
    return UpdateRule(
        objective(
            (Term("fit", 2.0, "objects"), Term("calm", 0.5, "points")),
            {"objects": 1.0, "points": 1.0},
            scale=float(nbs),
        ),
        optax.chain(optax.trace(0.9, nesterov=True), optax.scale(-0.05)),
        clip=1.0,
        ema_decay=lambda step: 0.9 * (1 - jnp.exp(-step / 3.0)),
    )


def initial(dtype):
    params = NET.init(jax.random.key(0), jnp.zeros((1, 5, 3), dtype), None)

    def cast(tree):
        return jax.tree.map(lambda a: np.asarray(a, dtype), tree)

    return cast(params["params"]), cast(params["batch_stats"])


def make_batches(nbs: int, dtype, sparse: float = 0.4, amount: float = 1.0):
    """Effective batches of samples with few objects; half of the samples have none."""

    def batches():
        rng = np.random.default_rng(3)
        for epoch in range(100):
            objects = (rng.random((nbs, 5)) < sparse) * rng.uniform(0.1, 1.0, (nbs, 5)) * amount
            objects[::2] *= rng.random((len(objects[::2]), 1)) < 0.5
            yield {
                "x": rng.normal(1.0, 2.0, (nbs, 5, 3)).astype(dtype),
                "y": rng.normal(size=(nbs, 5)).astype(dtype),
                "objects": objects.astype(dtype),
                "weight": np.ones(nbs, dtype),
                "index": rng.permutation(nbs).astype(np.int32),
                "epoch": np.full(nbs, epoch, np.int32),
            }

    return batches


__all__ = ["Geometry", "Recipe", "initial", "make_batches", "make_forward", "make_rule"]
