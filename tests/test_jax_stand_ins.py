"""Stand-ins for broken pieces of JAX: that they are right, and that they are still needed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from scipy import special

from jaxaccum import jax_stand_ins

X = np.concatenate([np.linspace(-8, 8, 401), [0.0, 1e-30, -1e-30, 30.0, -30.0]])


def over_devices(function):
    """The derivative of a sum of `function` of a value that varies over two devices."""

    def local(x):
        x = jax.lax.pcast(x, ("data",), to="varying")
        gradient = jax.grad(lambda x: function(x).sum())(x)
        return jax.lax.psum(gradient, "data") / 2

    mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))
    whole = PartitionSpec()
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=whole, out_specs=whole))


def test_gelu_is_the_exact_one(x64):
    phi = special.ndtr(X)
    slope = phi + X * np.exp(-(X**2) / 2) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(jax_stand_ins.gelu(jnp.asarray(X)), X * phi, rtol=1e-13, atol=1e-300)
    once = jax.vmap(jax.grad(jax_stand_ins.gelu))(jnp.asarray(X))
    np.testing.assert_allclose(once, slope, rtol=1e-13, atol=1e-15)
    _, forward = jax.jvp(jax_stand_ins.gelu, (jnp.asarray(X),), (jnp.ones_like(X),))
    np.testing.assert_allclose(forward, slope, rtol=1e-13, atol=1e-15)
    curve = (2 - X**2) * np.exp(-(X**2) / 2) / np.sqrt(2 * np.pi)
    twice = jax.vmap(jax.grad(jax.grad(jax_stand_ins.gelu)))(jnp.asarray(X))
    np.testing.assert_allclose(twice, curve, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gelu_has_the_values_of_jax(dtype):
    x = jnp.asarray(X, dtype)
    ours, theirs = jax_stand_ins.gelu(x), jax.nn.gelu(x, approximate=False)
    assert ours.dtype == dtype
    assert np.array_equal(ours, theirs)


def test_gelu_over_devices(x64):
    x = jnp.asarray(X)
    expected = jax.vmap(jax.grad(jax_stand_ins.gelu))(x)
    np.testing.assert_array_equal(over_devices(jax_stand_ins.gelu)(x), expected)


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="broken from jax 0.12 on")
def test_gelu_is_still_needed():
    """Fails when JAX differentiates its own again: then use `jax.nn.gelu`, and this can go."""
    theirs = over_devices(lambda x: jax.nn.gelu(x, approximate=False))
    with pytest.raises(ValueError, match="varying manual axes"):
        theirs(jnp.linspace(0.1, 0.9, 5))
