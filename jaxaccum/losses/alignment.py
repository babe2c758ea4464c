"""Contrastive alignment of completed clouds with their captions (InfoNCE), over a whole batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def normalised(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """Rows of length one; the zero row stays zero, with a finite gradient."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    long = square > eps**2
    return jnp.where(long, x * jax.lax.rsqrt(jnp.where(long, square, 1)), x / eps)


def similarities(
    clouds: jax.Array, texts: jax.Array, weight: jax.Array, captions: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines of every cloud with every text, and which of the pairs count.

    Args:
      clouds, texts: (n, d).
      weight: (n,) 0 for padding, which is nobody's negative.
      captions: (n,) int32; samples of one caption are not each other's negatives. None takes all
        captions for different ones.
    Returns:
      (n, n) cosines, clouds by texts, and (n, n) bool, the same for clouds to texts and texts to
      clouds: who counts for the sample of a row. A sample always counts for itself.
    """
    n = len(weight)
    own = jnp.eye(n, dtype=bool)
    counts = jnp.broadcast_to(weight > 0, (n, n))
    if captions is not None:
        counts = counts & (captions[:, None] != captions[None])
    return normalised(clouds) @ normalised(texts).T, counts | own


def info_nce(
    clouds: jax.Array,
    texts: jax.Array,
    log_scale: jax.Array,
    weight: jax.Array,
    captions: jax.Array | None = None,
) -> jax.Array:
    """Half the sum of the cross entropies of clouds to texts and of texts to clouds.

        L = exp(s) p t^T;   1/2 [CE(L, diagonal) + CE(L^T, diagonal)],   means over real samples

    van den Oord et al. 2018, arXiv:1807.03748; both ways as in CLIP, Radford et al. 2021,
    arXiv:2103.00020.

    Args:
      clouds, texts: (n, d), of any length; normalised here.
      log_scale: (), s.
      weight, captions: as of `similarities`.
    Returns:
      ().
    """
    cosines, counts = similarities(clouds, texts, weight, captions)
    logits = jnp.exp(log_scale) * cosines
    ways = (jnp.where(counts, matrix, -jnp.inf) for matrix in (logits, logits.T))
    both = sum(_logsumexp(matrix) for matrix in ways) - 2 * jnp.diagonal(logits)
    return jnp.sum(jnp.where(weight > 0, both, 0)) / (2 * jnp.sum(weight))


def accuracy(
    clouds: jax.Array, texts: jax.Array, weight: jax.Array, captions: jax.Array | None = None
) -> jax.Array:
    """Share of the real samples whose cloud is nearest to its own text."""
    cosines, counts = similarities(clouds, texts, weight, captions)
    best = jnp.argmax(jnp.where(counts, cosines, -jnp.inf), axis=1)
    hit = (best == jnp.arange(len(best))) & (weight > 0)
    return jnp.sum(hit) / jnp.sum(weight)


def _logsumexp(logits: jax.Array) -> jax.Array:
    """Over rows, of which each has a finite entry."""
    top = jax.lax.stop_gradient(jnp.max(logits, axis=1, keepdims=True))
    return jnp.log(jnp.sum(jnp.exp(logits - top), axis=1)) + top[:, 0]
