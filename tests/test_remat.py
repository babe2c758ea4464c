"""Rematerialisation: the same numbers from less memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxaccum import models
from jaxaccum.accumulate import Geometry, Groups, Recipe, UpdateRule, Window, make_engine
from jaxaccum.models import blocks, yolo
from jaxaccum.tasks.detection import DetectionTask

# Every kind of row, and rows without parameters in a row.
yolo.FAMILIES["mixed"] = yolo.Family(
    depth={"t": 1.0},
    width={"t": 0.25},
    max_channels={"t": 1024},
    depthwise_head=True,
    rows=(
        (-1, 1, "Conv", (32, 3, 2)),
        (-1, 1, "Conv", (64, 3, 2, 2)),
        (-1, 1, "C2f", (64, True)),
        (-1, 1, "Conv", (64, 3, 2)),  # 3, stride 8
        (-1, 1, "C3k2", (64, True)),
        (-1, 1, "Conv", (256, 3, 2)),  # 5, stride 16
        (-1, 1, "A2C2f", (256, 4)),
        (-1, 1, "SPPF", (256, 5)),
        (-1, 1, "C2PSA", (256,)),
        (-1, 1, "Upsample", ()),
        ((-1, 4), 1, "Concat", ()),
        ((10, 8), 1, "Detect", ()),
    ),
)


def a_pair(name, size, dtype):
    """The model plainly and with rematerialisation, weights, and a batch of four images."""
    plain = models.create(name, num_classes=3, dtype=dtype)
    example = jax.ShapeDtypeStruct((1, size, size, 3), dtype)
    variables = dict(
        zip(
            ("params", "batch_stats"),
            models.initialise(plain, example, 0, dtype=dtype),
            strict=True,
        )
    )
    images = np.random.default_rng(0).random((4, size, size, 3)).astype(dtype)
    return plain, plain.clone(remat=True), variables, images


def outputs_and_gradient(model, variables, images, size):
    """Raw predictions and moments, and the gradient of a sum over the predictions."""

    @jax.jit
    def compute(params, stats, images, weight):
        def loss(params):
            out, changed = model.apply(
                {"params": params, "batch_stats": stats},
                images,
                Groups(size, weight) if size else None,
                mutable=["moments"],
            )
            return sum(jnp.sum(jnp.sin(a)) for a in out), (out, changed)

        return jax.grad(loss, has_aux=True)(params)

    weight = np.asarray([1, 1, 1, 0], images.dtype)
    return compute(variables["params"], variables["batch_stats"], images, weight)


@pytest.mark.parametrize("size", [2, None])
def test_the_same_numbers(x64, size):
    plain, remat, variables, images = a_pair("mixed-t", 64, np.dtype("float64"))
    initial = (jax.eval_shape(m.init, jax.random.key(0), images) for m in (plain, remat))
    assert next(initial) == next(initial)
    ours, theirs = (outputs_and_gradient(m, variables, images, size) for m in (remat, plain))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert bool(theirs[1][1]) == bool(size)  # moments
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * np.abs(b).max())


def test_an_update_of_two_devices(x64):
    task = DetectionTask(models.create("mixed-t", num_classes=3, dtype=jnp.float64), 64, 1)
    start = task.initialise(0, np.float64)
    rng = np.random.default_rng(1)
    batch = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), task.example(3, 2))
    batch |= {
        "image": rng.integers(0, 256, batch["image"].shape, np.uint8),
        "boxes": np.tile(np.float32([4, 8, 40, 50]), (3, 2, 1)),
        "valid": np.ones((3, 2), bool),
        "weight": np.ones(3, np.float32),
    }
    after = []
    for model in (task.model, task.model.clone(remat=True)):
        forward = DetectionTask(model, 64, 1).forward
        rule = UpdateRule(task.objective(3), optax.sgd(0.01))
        engine = make_engine(forward, rule, Window(Recipe(3, 1), Geometry(1, 2, "scan")))
        state, log = engine.update(engine.init(*start), batch)
        assert log["ok"]
        after.append(jax.device_get((state.params, state.stats)))
    assert not np.array_equal(
        after[0][0]["model.0"]["conv"]["kernel"], start[0]["model.0"]["conv"]["kernel"]
    )
    for a, b in zip(*map(jax.tree.leaves, after), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def temporary_memory(model, size) -> int:
    """Bytes that the gradient of eight images needs beside its arguments and results."""
    images = jax.ShapeDtypeStruct((8, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def loss(params, stats, images):
        variables = {"params": params, "batch_stats": stats}
        out = model.apply(variables, images, Groups(8, jnp.ones(8)))
        return sum(jnp.sum(jnp.sin(a)) for a in out)

    lowered = jax.jit(jax.grad(loss)).lower(variables["params"], variables["batch_stats"], images)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_less_memory():
    plain = models.create("mixed-t", num_classes=3)
    assert temporary_memory(plain.clone(remat=True), 160) < 0.6 * temporary_memory(plain, 160)


def test_a_nan_stays_one():
    def function(params, inputs):
        return params * inputs

    def loss(params, inputs, factor):
        return jnp.sum(factor * blocks.rematerialised(function, params, inputs))

    x, y = jnp.asarray([2.0, 3.0]), jnp.asarray([5.0, 7.0])
    gradient = jax.grad(loss, argnums=(0, 1))
    np.testing.assert_array_equal(gradient(x, y, 2.0), [2 * y, 2 * x])
    assert np.isnan(gradient(x, y, jnp.nan)).all()
    assert not np.isfinite(gradient(x, y, jnp.inf)).any()
