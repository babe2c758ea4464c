"""Convolution and pooling: the CPU forms give what XLA's own give."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import computations
from jax import lax

from jaxaccum.models import ops


def stock(x, w, stride, pad, groups):
    return lax.conv_general_dilated(
        x, w, (stride, stride), ((pad, pad), (pad, pad)), dimension_numbers=ops.DIMENSIONS,
        feature_group_count=groups,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("size", [(9, 7), (8, 8)])
def test_convolution_and_its_gradients(x64, kernel, stride, groups, size):
    rng = np.random.default_rng(0)
    features = 8 if groups == 8 else 6
    x = jnp.asarray(rng.normal(size=(2, *size, 8)))
    w = jnp.asarray(rng.normal(size=(kernel, kernel, 8 // groups, features)))
    pad = kernel // 2

    def ours(x, w):
        return ops.conv_general_dilated(
            x, w, (stride, stride), ((pad, pad), (pad, pad)), feature_group_count=groups
        )

    def in_loop(x, w):  # where the difference in speed is
        return lax.fori_loop(0, 1, lambda i, y: y + ours(x, w), jnp.zeros_like(ours(x, w)))

    wanted, pull_back = jax.vjp(lambda x, w: stock(x, w, stride, pad, groups), x, w)
    for function in (ours, jax.jit(in_loop)):
        np.testing.assert_allclose(function(x, w), wanted, rtol=1e-12, atol=1e-12)
    dy = jnp.asarray(rng.normal(size=wanted.shape))
    for a, b in zip(jax.jit(jax.vjp(ours, x, w)[1])(dy), pull_back(dy), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-11)


def test_gpu_programs_are_the_plain_ones():
    """The choice is made when lowering, so another platform keeps XLA's own convolution."""
    x, w = jnp.zeros((1, 8, 8, 4)), jnp.zeros((3, 3, 4, 4))

    def loss(x, w):
        return jnp.sum(ops.conv_general_dilated(x, w, (1, 1), ((1, 1), (1, 1))))

    text = jax.jit(jax.grad(loss, 1)).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    plain = jax.jit(jax.grad(lambda x, w: jnp.sum(stock(x, w, 1, 1, 1)), 1))
    wanted = plain.trace(x, w).lower(lowering_platforms=("cuda",)).as_text()

    def convolutions(text):
        return [line.split("=", 1)[1].split("{")[0].split("(")[0] for line in text.splitlines()
                if "stablehlo.convolution" in line]  # fmt: skip

    def dims(text):
        return [line.split("dim_numbers = ")[1].split(",  window")[0].split(", window")[0]
                for line in text.splitlines() if "stablehlo.convolution" in line]  # fmt: skip

    assert convolutions(text)
    assert dims(text)[-1] == dims(wanted)[-1]


@pytest.mark.parametrize("size", [3, 5])
def test_max_pool(size):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 6, 3)))
    reach = size // 2
    wanted = lax.reduce_window(
        x, -jnp.inf, lax.max, (1, size, size, 1), (1, 1, 1, 1),
        ((0, 0), (reach, reach), (reach, reach), (0, 0)),
    )  # fmt: skip
    np.testing.assert_array_equal(ops.max_pool(x, size), wanted)


def test_upsample_repeats_pixels():
    x = jnp.arange(8.0).reshape(1, 2, 2, 2)
    wanted = np.repeat(np.repeat(x, 2, axis=1), 2, axis=2)
    np.testing.assert_array_equal(ops.upsample(x), wanted)


def test_what_is_not_provided_says_so():
    x, w = jnp.zeros((1, 8, 8, 4)), jnp.zeros((3, 3, 4, 4))
    with pytest.raises(ValueError, match="explicitly padded"):
        ops.conv_general_dilated(x, w, (1, 1), "SAME")
    with pytest.raises(ValueError, match="without dilation"):
        ops.conv_general_dilated(x, w, (1, 1), ((1, 1), (1, 1)), rhs_dilation=(2, 2))


def test_a_depthwise_convolution_is_computed_once():
    """On CPU, not again in each part of what follows it, nor nine times in its gradient."""

    def loss(x, w):
        for kernel in w:
            y = ops.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), feature_group_count=8)
            y = (y - y.mean((0, 1, 2))) * lax.rsqrt(y.var((0, 1, 2)) + 1e-3)
            x = y / (1 + jnp.exp(-y))
        return jnp.sum(x**2)

    shapes = (
        jax.ShapeDtypeStruct((2, 16, 16, 8), "float32"),
        jax.ShapeDtypeStruct((2, 3, 3, 1, 8), "float32"),
    )
    text = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile().as_text()
    products = [body.count(" multiply(") for body in computations(text).values()]
    assert 9 <= max(products) < 18
