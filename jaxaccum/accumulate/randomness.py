"""Randomness that does not know where a sample is computed.

Every random number that a sample sees is drawn from a key made of (seed, epoch, sample index).
Its place in a microbatch or on a device never enters. Here for what a model draws while it
trains (dropout, noise); the loader does the same for augmentation.
"""

from __future__ import annotations

import jax


def sample_keys(seed: int, epoch: jax.Array, index: jax.Array) -> jax.Array:
    """One key per sample, for use inside of a jitted forward pass.

    Args:
      seed: the run's seed.
      epoch, index: (n,) int32, the epoch and the data set index of each sample.
    Returns:
      (n,) typed PRNG keys.
    """
    root = jax.random.key(seed)

    def one(e, i):
        return jax.random.fold_in(jax.random.fold_in(root, e), i)

    return jax.vmap(one)(epoch, index)
