"""What stands in for pieces of JAX that are broken in a version that we support; nothing else.

Each names the versions, what goes wrong, and JAX's issue if there is one;
tests/test_jax_stand_ins.py fails when a piece works again and its stand-in can go.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


@jax.custom_jvp
def erfc(x: jax.Array) -> jax.Array:
    """Complementary error function, elementwise; the value is that of `jax.lax.erfc`.

    jax 0.12.0: the derivative of `erf` or `erfc` of a value that varies over the devices of a
    `jax.shard_map` ends with "Primitive polynomial requires varying manual axes to match". No
    issue of JAX's was found for it; the program in the test is the smallest that shows it. Here
    JAX does not differentiate it: d erfc(x) / dx = -2 / sqrt(pi) exp(-x^2).
    """
    return jax.lax.erfc(x)


@erfc.defjvp
def _erfc_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return erfc(x), dx * (-2 / math.sqrt(math.pi)) * jnp.exp(-jnp.square(x))


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, elementwise: x Phi(x) = x erfc(-x / sqrt(2)) / 2, as
    `jax.nn.gelu(x, approximate=False)` (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    return 0.5 * x * erfc(-x * jnp.asarray(math.sqrt(0.5), x.dtype))
