"""An Equinox model of your own: a language model whose loss is the mean over all tokens.

    python examples/equinox_tokens.py

Sequences have different lengths, so microbatches have different numbers of tokens. The mean of
their means is not the mean over the effective batch; the sum of losses over the sum of tokens is.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxaccum.accumulate import (
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

NBS = 14  # sequences per update; in microbatches of 4 the last one is filled up
WORDS, LENGTH, WIDTH = 16, 24, 32


class Model(eqx.Module):
    """Tokens (length,) -> logits of the next ones (length, words), by one causal attention."""

    words: eqx.nn.Embedding
    places: jax.Array
    attention: eqx.nn.MultiheadAttention
    head: eqx.nn.MLP

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.words = eqx.nn.Embedding(WORDS, WIDTH, key=keys[0])
        self.places = 0.1 * jax.random.normal(keys[1], (LENGTH, WIDTH))
        self.attention = eqx.nn.MultiheadAttention(2, WIDTH, key=keys[2])
        self.head = eqx.nn.MLP(WIDTH, WORDS, 64, 1, key=keys[3])

    def __call__(self, tokens):
        x = jax.vmap(self.words)(tokens) + self.places
        x = x + self.attention(x, x, x, mask=jnp.tril(jnp.ones((LENGTH, LENGTH), bool)))
        return jax.vmap(self.head)(x)


# Arrays are trained; all else of the model (functions, sizes) is the same forever.
PARAMS, STATIC = eqx.partition(Model(jax.random.key(0)), eqx.is_inexact_array)


def forward(params, stats, batch, groups):
    """Sums over the tokens of a microbatch."""
    del stats, groups  # no layer is normalised by its batch
    model = eqx.combine(params, STATIC)
    logits = jax.vmap(model)(batch["tokens"])[:, :-1]
    following = batch["tokens"][:, 1:]
    real = (jnp.arange(1, LENGTH) < batch["length"][:, None]) * batch["weight"][:, None]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, following)
    return Output(
        numerators={"token": jnp.sum(loss * real)},
        denominators={"tokens": jnp.sum(real)},
        moments={},
    )


RULE = UpdateRule(
    Objective((Term("token", 1.0, "tokens"),), floors={"tokens": 1.0}), optax.adam(3e-3), clip=1.0
)
RECIPE = Recipe(nbs=NBS, bn_group="frozen")


def batches(dtype=np.float32):
    """Counting upwards by a step, from anywhere, for a while."""
    rng = np.random.default_rng(0)
    while True:
        start, step = rng.integers(WORDS, size=(NBS, 1)), rng.integers(1, 4, (NBS, 1))
        yield {
            "tokens": ((start + step * np.arange(LENGTH)) % WORDS).astype(np.int32),
            "length": rng.integers(3, LENGTH + 1, NBS).astype(np.int32),
            "weight": np.ones(NBS, dtype),
        }


def initial(dtype=np.float32):
    return jax.tree.map(lambda a: np.asarray(a, dtype), PARAMS), {}


def check():
    """One update on several geometries, in float64: the differences are rounding."""
    with jax.enable_x64(True):
        batch = next(batches(np.float64))
        return verify(forward, RULE, RECIPE, *initial(np.float64), batch)


def mean_of_means(microbatch):
    """What the usual accumulation makes of the first loss: the mean over microbatches of theirs."""
    batch, (params, stats) = next(batches()), initial()
    compute = jax.jit(lambda params, part: forward(params, stats, part, None))
    means = []
    for start in range(0, NBS, microbatch):
        part = jax.tree.map(lambda a, s=start: a[s : s + microbatch], batch)
        out = compute(params, part)
        means.append(float(out.numerators["token"] / out.denominators["tokens"]))
    return np.mean(means)


def main():
    found = check()
    print(found)
    assert found.ok
    usual = ", ".join(f"{mean_of_means(size):.4f} at {size}" for size in (14, 7, 2, 1))
    print(f"the usual mean of the microbatches' means: {usual}")
    engine = make_engine(forward, RULE, Window(RECIPE, Geometry(microbatch=4)))
    state = engine.init(*initial())
    for _, batch in zip(range(200), batches(), strict=False):
        state, log = engine.update(state, batch)
        if int(log["step"]) in (1, 200):
            print(f"update {int(log['step']):3d}: loss per token {float(log['loss']):.4f}")


if __name__ == "__main__":
    main()
