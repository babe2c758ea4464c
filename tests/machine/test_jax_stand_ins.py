"""The stand-ins for broken pieces of JAX: needed still, equal to what they stand for, used."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy import special

import jaxaccum
from jaxaccum.machine import jax_stand_ins

VERSION = jax.__version_info__[:2]
CLASH = "polynomial requires varying manual axes to match"

# What is broken: (since which JAX, the error, the plain form)
BROKEN = {
    "polynomial": ((0, 12), CLASH, lambda x: jax.lax.polynomial(x, [1.0, 2.0])),
    "erfc": ((0, 12), CLASH, jax.grad(lambda x: jax.lax.erfc(x).sum())),
    "gelu": ((0, 12), CLASH, jax.grad(lambda x: jax.nn.gelu(x, approximate=False).sum())),
}


def on_devices(function, x):
    """As an update computes it: inside of `jax.shard_map`, on a value that varies."""
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("data",))

    def local(x):
        return function(jax.lax.pcast(x, ("data",), to="varying"))[None]

    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P("data")))(x)


def exists(name):
    return name != "polynomial" or hasattr(jax.lax, name)


@pytest.mark.parametrize("name", [name for name in BROKEN if exists(name)])
def test_the_plain_form_is_broken_still(name):
    since, message, plain = BROKEN[name]
    x = jnp.linspace(-2.0, 2.0, 5)
    if since > VERSION:
        on_devices(plain, x)  # whole before: `since` says the truth
        return
    with pytest.raises(ValueError, match=message):
        on_devices(plain, x)
        pytest.fail(
            f"JAX {jax.__version__} computes {name}, {'.'.join(map(str, since))} did not: the"
            " stand-in can go from jaxaccum/machine/jax_stand_ins.py, once no JAX that we support "
            "is broken"
        )


@pytest.fixture
def points(x64):
    return np.concatenate([np.linspace(-12.0, 12.0, 2401), [1e-300, -1e-9, 40.0, -40.0]])


def test_values_are_those_of_scipy(points):
    exact = points * special.ndtr(points)
    np.testing.assert_allclose(jax_stand_ins.erfc(points), special.erfc(points), rtol=1e-13)
    np.testing.assert_allclose(jax_stand_ins.gelu(points), exact, rtol=1e-13, atol=1e-300)
    ours = jax.jit(jax_stand_ins.gelu)(points)
    plain = jax.jit(lambda x: jax.nn.gelu(x, approximate=False))(points)
    np.testing.assert_array_equal(ours, plain)


def test_derivatives_are_those_of_the_formula(points):
    density = np.exp(-np.square(points) / 2) / np.sqrt(2 * np.pi)
    slopes = special.ndtr(points) + points * density
    curves = (2 - np.square(points)) * density
    value, slope = jax.vmap(jax.value_and_grad(jax_stand_ins.gelu))(points)
    np.testing.assert_array_equal(value, jax_stand_ins.gelu(points))
    np.testing.assert_allclose(slope, slopes, rtol=1e-13, atol=1e-15)
    curve = jax.vmap(jax.grad(jax.grad(jax_stand_ins.gelu)))(points)
    np.testing.assert_allclose(curve, curves, rtol=1e-13, atol=1e-15)
    _, forward = jax.jvp(jax_stand_ins.gelu, (points,), (np.ones_like(points),))
    np.testing.assert_array_equal(forward, slope)
    plain = jax.vmap(jax.grad(lambda x: jax.nn.gelu(x, approximate=False)))(points)
    np.testing.assert_allclose(slope, plain, rtol=1e-13, atol=1e-15)
    falling = jax.vmap(jax.grad(jax_stand_ins.erfc))(points)
    exact = -2 / np.sqrt(np.pi) * np.exp(-np.square(points))
    np.testing.assert_allclose(falling, exact, rtol=1e-13, atol=1e-300)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_dtypes_stay_as_near_as_the_plain_form(dtype):
    x = jnp.linspace(-9.0, 9.0, 2001).astype(dtype)
    exact = np.asarray(x, np.float64)
    density = np.exp(-np.square(exact) / 2) / np.sqrt(2 * np.pi)
    value, pull = jax.vjp(jax_stand_ins.gelu, x)
    (slope,) = pull(jnp.ones_like(x))
    assert value.dtype == slope.dtype == x.dtype
    step = float(jnp.finfo(dtype).eps)
    value, slope = (np.asarray(a, np.float64) for a in (value, slope))
    np.testing.assert_allclose(value, exact * special.ndtr(exact), rtol=4 * step, atol=4 * step)
    slopes = special.ndtr(exact) + exact * density
    np.testing.assert_allclose(slope, slopes, rtol=4 * step, atol=4 * step)


@pytest.mark.parametrize("function", [jax_stand_ins.erfc, jax_stand_ins.gelu])
def test_both_directions_on_devices(function, x64):
    x = np.linspace(-3.0, 3.0, 8)
    slopes = jax.grad(lambda x: function(x).sum())
    for asked in (function, slopes, jax.grad(lambda x: slopes(x).sum())):
        everywhere = on_devices(asked, x)
        assert everywhere.shape == (2, 8)
        expected = np.broadcast_to(jax.jit(asked)(x), (2, 8))
        np.testing.assert_allclose(everywhere, expected, rtol=1e-13, atol=1e-15)


def test_one_array_is_kept_for_the_backward_pass():
    x = jnp.ones((64, 32))
    _, pull = jax.vjp(jax_stand_ins.gelu, x)
    assert [a.shape for a in jax.tree.leaves(pull) if jnp.ndim(a)] == [x.shape]


def test_nothing_uses_what_is_broken():
    """Nor what is built on it."""
    names = "erf|erfc|polynomial|polyval|ndtr|ndtri|sinc|cdf"
    broken = re.compile(rf"\b(jnp|jsp|lax|special|norm)\.({names})\b|\bapproximate=False")
    folder = Path(jaxaccum.__file__).parent
    own = Path(jax_stand_ins.__file__)
    files = [path for path in sorted(folder.rglob("*.py")) if path != own]
    assert len(files) > 50 and broken.search(own.read_text())
    assert [path.name for path in files if broken.search(path.read_text())] == []
