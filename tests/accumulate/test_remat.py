"""Rematerialisation: the same numbers from less memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxaccum import models
from jaxaccum.accumulate import (
    Geometry,
    Objective,
    Output,
    Recipe,
    Term,
    UpdateRule,
    Window,
    grouped,
    make_engine,
)
from jaxaccum.models import blocks, yolo

# A block, and rows without parameters one after the other.
yolo.FAMILIES["mixed"] = yolo.Family(
    depth={"t": 1.0},
    width={"t": 0.25},
    max_channels={"t": 1024},
    rows=(
        (-1, 1, "Conv", (32, 3, 2)),
        (-1, 1, "C2f", (64, True)),  # 1, stride 2
        (-1, 1, "Conv", (128, 3, 2)),
        (-1, 1, "Upsample", ()),
        ((-1, 1), 1, "Concat", ()),
        (-1, 1, "Conv", (64, 3, 2)),
        ((5,), 1, "Detect", ()),
    ),
)


def make(dtype, size):
    """The model plainly and rematerialising; params and stats; four images."""
    plain = models.create("mixed-t", num_classes=3, dtype=dtype)
    images = np.random.default_rng(0).random((4, size, size, 3)).astype(dtype)
    constants = yolo.initial_constants(plain)
    start = models.initialise(plain, images[:1], 0, constants, dtype=np.dtype(dtype))
    return plain, plain.clone(remat=True), start, images


def forward_of(model):
    """A task whose loss is a sum over the raw predictions."""

    def forward(params, stats, batch, groups):
        weight = batch["weight"]
        out, changed = model.apply(
            {"params": params, "batch_stats": stats}, batch["image"], groups, mutable=["moments"]
        )
        total = sum(jnp.sum(jnp.sin(a) * weight[:, None, None]) for a in jax.tree.leaves(out))
        return Output({"loss": total}, {"samples": jnp.sum(weight)}, changed.get("moments", {}))

    return forward


def assert_equal(ours, theirs):
    """To 1e-12 of the largest number: some gradients are zero but for rounding."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    largest = max(np.abs(a).max() for a in jax.tree.leaves(theirs))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * largest)


@pytest.mark.parametrize("group", [2, pytest.param(None, marks=pytest.mark.slow)])
def test_the_same_gradients_and_moments(x64, group):
    plain, remat, start, images = make(jnp.float64, 32)
    shapes = [jax.eval_shape(m.init, jax.random.key(0), images) for m in (plain, remat)]
    assert shapes[0] == shapes[1]
    batch = {"image": images, "weight": np.asarray([1.0, 1, 1, 0])}

    def compute(model):
        def loss(params):
            out = grouped(forward_of(model), group)(params, start[1], batch)
            return out.numerators["loss"], out

        return jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(start[0]))

    ours, theirs = compute(remat), compute(plain)
    for part in range(2):
        assert_equal(ours[part], theirs[part])
    assert bool(ours[0][1].moments) == (group is not None)


@pytest.mark.slow
def test_the_same_update_on_two_devices(x64):
    plain, remat, start, images = make(jnp.float64, 32)
    batch = {"image": images[:3], "weight": np.ones(3)}
    rule = UpdateRule(Objective((Term("loss", 1.0, "samples"),), {"samples": 1.0}), optax.sgd(0.01))
    after = []
    for model in (plain, remat):
        window = Window(Recipe(3, 1), Geometry(1, 2, "scan"))
        engine = make_engine(forward_of(model), rule, window)
        state, log = engine.update(engine.init(*start), batch)
        assert log["ok"]
        after.append(jax.device_get({"params": state.params, "stats": state.stats}))
    assert_equal(after[1], after[0])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after[0]["params"], start[0])
    assert moved["model.0"]["conv"]["kernel"] > 1e-6


def test_less_memory():
    plain, remat, start, _ = make(jnp.float32, 32)
    batch = {
        "image": jax.ShapeDtypeStruct((8, 160, 160, 3), jnp.float32),
        "weight": jax.ShapeDtypeStruct((8,), jnp.float32),
    }

    def temporary(model):
        def loss(params, batch):
            return grouped(forward_of(model), 8)(params, start[1], batch).numerators["loss"]

        compiled = jax.jit(jax.grad(loss)).lower(start[0], batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(remat) < 0.7 * temporary(plain)


def test_a_cotangent_that_is_not_finite_stays_so():
    def loss(params, inputs, factor):
        function = blocks.rematerialised(lambda p, x: p * x, params, inputs)
        return jnp.sum(factor * function)

    gradient = jax.grad(loss, argnums=(0, 1))
    x, y = jnp.asarray([2.0, 3.0]), jnp.asarray([5.0, 7.0])
    np.testing.assert_array_equal(gradient(x, y, 2.0), [2 * y, 2 * x])
    assert np.isnan(gradient(x, y, jnp.nan)).all()
    assert np.isinf(gradient(x, y, jnp.inf)).all()
