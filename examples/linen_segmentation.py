"""A Flax Linen model of your own, trained with exact accumulation: a small segmentation network.

    python examples/linen_segmentation.py

Its loss is the mean over all *labelled* pixels of the effective batch, of which some images have
many and some have few: the case in which dividing each microbatch by itself is another loss.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxaccum.accumulate import (
    Geometry,
    GroupBatchNorm,
    Objective,
    Output,
    Recipe,
    Term,
    UpdateRule,
    Window,
    make_engine,
    verify,
)

NBS = 14  # samples per update; in microbatches of 4 the last one is filled up
GROUP = 2  # samples that share batch statistics


class Net(nn.Module):
    """(samples, 16, 16, 1) -> logits (samples, 16, 16)."""

    @nn.compact
    def __call__(self, x, groups):
        for features in (8, 8):
            x = nn.Conv(features, (3, 3), use_bias=False, param_dtype=x.dtype)(x)
            x = GroupBatchNorm(silu=True)(x, groups)  # in the place of nn.BatchNorm
        return nn.Conv(1, (1, 1), param_dtype=x.dtype)(x)[..., 0]


def forward(params, stats, batch, groups):
    """Sums over the samples of a microbatch; what is summed is multiplied by their weight."""
    logits, changed = Net().apply(
        {"params": params, "batch_stats": stats}, batch["image"], groups, mutable=["moments"]
    )
    labelled = batch["labelled"] * batch["weight"][:, None, None]
    loss = optax.sigmoid_binary_cross_entropy(logits, batch["mask"])
    return Output(
        numerators={"mask": jnp.sum(loss * labelled)},
        denominators={"pixels": jnp.sum(labelled)},
        moments=changed["moments"],
    )


# loss = 1.0 * (sum of "mask") / max(sum of "pixels", 1), sums over the effective batch
RULE = UpdateRule(
    Objective((Term("mask", 1.0, "pixels"),), floors={"pixels": 1.0}),
    optax.adamw(3e-3),
    ema_decay=lambda step: 0.99,
)
RECIPE = Recipe(nbs=NBS, bn_group=GROUP)


def batches(dtype=np.float32):
    """Bright discs on noise; up to all pixels of an image carry a label."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:16, :16]
    while True:
        centre = rng.uniform(3, 13, (2, NBS, 1, 1))
        mask = np.hypot(rows - centre[0], columns - centre[1]) < rng.uniform(2, 5, (NBS, 1, 1))
        yield {
            "image": (mask + rng.normal(0, 0.5, mask.shape))[..., None].astype(dtype),
            "mask": mask.astype(dtype),
            "labelled": (rng.random(mask.shape) < rng.random((NBS, 1, 1)) ** 4).astype(dtype),
            "weight": np.ones(NBS, dtype),
        }


def initial(dtype=np.float32):
    made = Net().init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)), None)
    made = jax.tree.map(lambda a: np.asarray(a, dtype), made)
    return made["params"], made["batch_stats"]


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
    for _, batch in zip(range(100), batches(), strict=False):
        state, log = engine.update(state, batch)
        if int(log["step"]) in (1, 100):
            print(f"update {int(log['step']):3d}: loss {float(log['loss']):.4f}")


if __name__ == "__main__":
    main()
