"""Stand-ins for pieces of JAX that are broken in a version we support; nothing else lives here.

Each says what is broken, since when, and where it is reported. A test runs the plain form, and
fails on the first JAX that computes it: then the stand-in can go.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# Broken: `jax.lax.polynomial` of an argument that varies over a mesh, by coefficients that do
# not: "Primitive polynomial requires varying manual axes to match". It is within the derivatives
# of erf and erfc, and so of the exact GELU, inside of `jax.shard_map`.
# Since: JAX 0.12.0. Not reported, as far as we found; a minimal program:
#
#   mesh = jax.sharding.Mesh(jax.devices(), ("data",))
#   f = jax.shard_map(lambda x: jax.lax.polynomial(x, [1.0, 2.0]), mesh=mesh,
#                     in_specs=jax.P("data"), out_specs=jax.P("data"))
#   f(jax.numpy.ones(len(jax.devices())))


@jax.custom_jvp
def erfc(x: jax.Array) -> jax.Array:
    """1 - erf(x), as `jax.lax.erfc`, of any shape and floating dtype.

    The derivative is -2 / sqrt(pi) exp(-x^2) as JAX wrote it before 0.12.
    """
    return jax.lax.erfc(x)


@erfc.defjvp
def _erfc_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return erfc(x), -2 / math.sqrt(math.pi) * jnp.exp(-jnp.square(x)) * dx


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), the exact GELU, as `jax.nn.gelu(x, approximate=False)`.

    Hendrycks and Gimpel 2016, arXiv:1606.08415. The derivative, Phi(x) + x phi(x), is computed
    with the value, so that one array is kept for the backward pass, where JAX keeps three.

    Args:
      x: any shape, a floating dtype.
    Returns:
      The shape and dtype of x.
    """
    return 0.5 * x * erfc(-x * math.sqrt(0.5))


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    below = erfc(-x * math.sqrt(0.5))  # 2 Phi(x)
    density = jnp.exp(-0.5 * jnp.square(x)) / math.sqrt(2 * math.pi)
    return 0.5 * x * below, (0.5 * below + x * density) * dx
