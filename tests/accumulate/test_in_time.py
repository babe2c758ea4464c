"""Batch-norm groups that are computed one microbatch after the other: exact, and small."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config

from jaxaccum import data
from jaxaccum.accumulate import (
    ContractError,
    Geometry,
    GeometryError,
    GroupBatchNorm,
    Groups,
    Recipe,
    Window,
    batchnorm,
    engine,
    equivalence,
    in_time,
    make_engine,
    verify,
)
from jaxaccum.training import run
from jaxaccum.training.precise_bn import recompute_statistics

# --- The transformation by itself. ---


def network(params, x, over, count, remat=False):
    """Layers, each normalised by the whole group; with a branch, and one with no batch norm."""

    def layer(w, x):
        x = x @ w
        mean = over(jnp.sum(x, axis=0)) / count
        var = over(jnp.sum(jnp.square(x - mean), axis=0)) / count
        return jax.nn.silu((x - mean) / jnp.sqrt(var + 1e-3))

    layer = jax.checkpoint(layer) if remat else layer
    kept = []
    for w in params["layers"]:
        x = layer(w, x)
        kept.append(x)
    return jnp.concatenate(kept, axis=-1) @ params["last"]


def example(seed=0, samples=12, width=5):
    rng = np.random.default_rng(seed)
    params = {
        "layers": [rng.normal(size=(width, width)) for _ in range(3)],
        "last": rng.normal(size=(3 * width, 2)),
        "unused": rng.normal(size=3),
    }
    return params, rng.normal(size=(samples, width)), rng.normal(size=(samples, 2))


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 12])
def test_gradients_are_those_of_one_pass(x64, microbatches, remat):
    params, x, y = example()

    def loss(params, x, y, over):
        return jnp.sum(jnp.square(network(params, x, over, len(example()[1]), remat) - y))

    def one(params, given):
        x, y = given
        value, gradient = jax.value_and_grad(loss)(params, x, y, in_time.over_group)
        return {"value": value, "gradient": gradient, "samples": len(x), "one": jnp.ones(())}, {
            "twice": 2 * x, "same": params["last"],
        }  # fmt: skip

    def split(a):
        return a.reshape(microbatches, -1, *a.shape[1:])

    found, values = jax.jit(functools.partial(in_time.computed, one, microbatches))(
        params, (split(x), split(y))
    )
    value, gradient = jax.value_and_grad(loss)(params, x, y, lambda total: total)
    np.testing.assert_allclose(found["value"], value, rtol=1e-13)
    for name in ("layers", "last", "unused"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12),
            found["gradient"][name], gradient[name],
        )  # fmt: skip
    assert not np.any(found["gradient"]["unused"])
    # What does not differ between the microbatches is summed over them all the same.
    assert (found["samples"], found["one"]) == (len(x), microbatches)
    np.testing.assert_array_equal(values["twice"].reshape(x.shape), 2 * x)
    np.testing.assert_array_equal(values["same"], np.stack([params["last"]] * microbatches))


@settings(max_examples=30, deadline=None)
@given(
    microbatches=st.integers(1, 4), seed=st.integers(0, 99),
    wiring=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 9)), max_size=8),
)  # fmt: skip
def test_any_program_of_sums_is_that_of_one_pass(microbatches, seed, wiring):
    """Values made of earlier ones by operations that mix, reduce or add over the group."""
    rng = np.random.default_rng(seed)
    x, weight = rng.normal(size=(12, 3)), rng.normal(size=(3, 3))

    def made(weight, x, over):
        values = [x, jnp.broadcast_to(weight[0], x.shape)]
        for operation, first, second in wiring:
            a, b = values[first % len(values)], values[second % len(values)]
            values.append([
                lambda a, b: a @ weight,
                lambda a, b: jnp.sin(a) * b,
                lambda a, b: a - over(jnp.mean(a, axis=0)) + b,
                lambda a, b: a / (1 + over(jnp.sum(jnp.square(b), axis=0))),
                lambda a, b: jnp.sort(a, axis=-1) + over(jnp.ones(3)),
            ][operation](a, b))  # fmt: skip
        return jnp.sum(jnp.tanh(values[-1]) * x)

    with jax.enable_x64(True):
        # In space: the same function under vmap, whose psum is known to be right.
        def in_space(weight):
            parts = x.reshape(microbatches, -1, 3)
            each = jax.vmap(
                lambda part: made(weight, part, lambda v: jax.lax.psum(v, "group")),
                axis_name="group",
            )
            return jnp.sum(each(parts))

        def one(weight, part):
            return jax.value_and_grad(made)(weight, part, in_time.over_group), ()

        (value, gradient), _ = jax.jit(functools.partial(in_time.computed, one, microbatches))(
            weight, x.reshape(microbatches, -1, 3)
        )
        wanted, slope = jax.value_and_grad(in_space)(weight)
        np.testing.assert_allclose(value, wanted, rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(gradient, slope, rtol=1e-9, atol=1e-9)


def test_a_sum_in_a_loop_is_refused():
    def one(fixed, x):
        total = jax.lax.fori_loop(0, 2, lambda _, v: in_time.over_group(v), x)
        return total * fixed, ()

    with pytest.raises(GeometryError, match=r"batch norm inside of `(scan|while)`"):
        in_time.computed(one, 2, 1.0, jnp.ones((2, 3)))


def test_a_sum_outside_of_a_group_is_refused():
    with pytest.raises(NotImplementedError, match="only inside of a function"):
        in_time.over_group(jnp.ones(3))


# --- The law. ---

SLOW = pytest.mark.slow


def trace(geometry, nbs, group, updates=3, **options):
    return equivalence.trace(
        toy.make_forward(), toy.make_rule(nbs), Recipe(nbs, group), geometry,
        *toy.initial(np.float64), toy.make_batches(nbs, np.float64, **options), updates,
    )  # fmt: skip


@functools.cache
def whole(nbs, group, updates=3):
    with jax.enable_x64(True):
        size = nbs if group == "all" else -(-nbs // group) * group
        return trace(Geometry(size), nbs, group, updates)


@pytest.mark.parametrize("kind", ["scan", "multisteps"])
@pytest.mark.parametrize(
    ("microbatch", "devices"),
    [(1, 1), (2, 2), (4, 1), *(pytest.param(*g, marks=SLOW) for g in ((1, 2), (2, 1), (4, 2)))],
)
@pytest.mark.parametrize(
    ("nbs", "group"),
    [(16, "all"), pytest.param(18, "all", marks=SLOW), pytest.param(11, 8, id="uneven")],
)
def test_groups_in_time_are_one_run(x64, nbs, group, microbatch, devices, kind):
    window = Window(Recipe(nbs, group), Geometry(microbatch, devices, kind))
    assert window.together > 1 or (group, microbatch, devices) == (8, 4, 2)
    found = equivalence.differences(trace(window.geometry, nbs, group, 5), whole(nbs, group, 5))
    assert equivalence.within(found, equivalence.Tolerance.of(True)), (window, found)


@pytest.mark.parametrize(("devices", "kind"), [(1, "scan"), (2, "multisteps")])
def test_what_is_kept_may_lie_on_the_host(x64, monkeypatch, devices, kind):
    """The same bits, on a CPU, where both memories are one."""
    here = trace(Geometry(2, devices, kind), 16, "all")
    monkeypatch.setattr(in_time, "LEAST_OFFLOADED", 1)
    there = trace(Geometry(2, devices, kind, offload=True), 16, "all")
    assert set(equivalence.differences(there, here).values()) == {0.0}


@pytest.mark.parametrize("offload", [False, True])
def test_where_it_is_kept(monkeypatch, offload):
    monkeypatch.setattr(in_time, "LEAST_OFFLOADED", 64)

    def one(scale, x):
        y = jnp.sin(x) @ jnp.ones((32, 32))
        centred = y - in_time.over_group(jnp.sum(y, 0)) / 12
        return jnp.sum(scale * centred**3), y

    def run(scale, x):
        return in_time.computed(one, 3, scale, x, offload)

    x = jax.random.normal(jax.random.key(0), (3, 4, 32))
    # Lowered for a CPU they are nothing.
    assert ("device_put" in str(jax.make_jaxpr(run)(2.0, x))) == offload
    total, kept = jax.jit(run)(2.0, x)
    assert kept.sharding.memory_kind in ("device", "unpinned_host")
    flat = jnp.sin(x.reshape(12, 32)) @ jnp.ones((32, 32))
    np.testing.assert_allclose(kept.reshape(12, 32), flat, rtol=1e-5, atol=1e-5)
    assert float(total) == pytest.approx(float(jnp.sum(2 * (flat - flat.mean(0)) ** 3)), rel=1e-3)


@pytest.mark.parametrize("remat", ["none", "blocks", "host"])
def test_a_config_says_how_activations_are_held(remat):
    this, _ = detector(Geometry(4), remat, "float32")
    held = this.task.model.remat, this.window.geometry.offload
    assert held == (remat == "blocks", remat == "host")


def test_a_run_says_where_it_is_kept():
    recipe = Recipe(16, "all")
    assert "groups of 4 microbatches kept on the host" in str(
        Window(recipe, Geometry(4, offload=True))
    )
    assert "host" not in str(Window(recipe, Geometry(16, offload=True)))


def test_a_divided_state(x64, monkeypatch):
    from jaxaccum.accumulate import fsdp

    monkeypatch.setattr(fsdp, "SMALLEST", 1, raising=False)
    found = equivalence.differences(trace(Geometry(2, 2, fsdp=2), 16, "all"), whole(16, "all"))
    assert equivalence.within(found, equivalence.Tolerance.of(True)), found


def detector(geometry, remat="none", dtype="float64", **changes):
    source = data.Scenes("train", size=64, length=40)
    config = tiny_config(
        nbs=16, bn_group="all", microbatch=geometry.microbatch, remat=remat,
        devices=geometry.devices, engine=geometry.engine, dtype=dtype, **changes,
    )  # fmt: skip
    return run.prepare(config, names=source.names, samples=len(source), identity={}), source


def detector_trace(geometry, remat="none", updates=5):
    this, source = detector(geometry, remat)
    return equivalence.trace(
        this.forward, this.rule, this.recipe, this.window.geometry,
        *this.task.initialise(0, np.float64),
        lambda: run.make_stream(this, source).windows(0, [16] * updates, backend="threads"),
        updates,
    )  # fmt: skip


@functools.cache
def whole_detector():
    with jax.enable_x64(True):
        return detector_trace(Geometry(16))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("geometry", "remat"),
    [
        (Geometry(2), "none"), (Geometry(2), "blocks"), (Geometry(2), "host"),
        (Geometry(1, 2, "multisteps"), "none"),
        pytest.param(Geometry(1), "blocks", marks=pytest.mark.long),
        pytest.param(Geometry(4, 2), "blocks", marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_a_detector_with_statistics_of_the_whole_effective_batch(x64, geometry, remat):
    found = equivalence.differences(detector_trace(geometry, remat), whole_detector())
    assert equivalence.within(found, equivalence.Tolerance.of(True)), found


def test_the_check_notices_a_sum_over_one_microbatch(x64, monkeypatch):
    monkeypatch.setattr(batchnorm, "over_group", lambda value: value)
    monkeypatch.setattr(engine, "check_in_time", lambda *_: None)
    found = equivalence.differences(trace(Geometry(4), 16, "all"), whole(16, "all"))
    assert found["gradient"] > 1e-3


def test_the_check_notices_a_backward_pass_without_the_group(x64, monkeypatch):
    """Statistics of the group, and derivatives as if they were constants of each microbatch."""
    plain = batchnorm._normalise_backward

    def broken(size, eps, silu, microbatches, residuals, cotangents):
        return plain(size, eps, silu, 1, residuals, cotangents)

    batchnorm._normalise.defvjp(batchnorm._normalise_forward, broken)
    try:
        found = equivalence.differences(trace(Geometry(4), 16, "all"), whole(16, "all"))
    finally:
        batchnorm._normalise.defvjp(batchnorm._normalise_forward, plain)
    assert found["gradient"] > 1e-3 and found["first loss"] < 1e-14


def test_verify_tries_a_part_of_a_group(x64):
    batch = next(toy.make_batches(8, np.float64)())
    start = toy.initial(np.float64)
    verdict = verify(toy.make_forward(), toy.make_rule(8), Recipe(8, 4), *start, batch)
    assert verdict.ok
    assert any(geometry.microbatch == 2 for geometry, _ in verdict.rows)


def test_groups_of_ones_own_are_refused():
    def forward(params, stats, batch, groups):
        own = groups and Groups(min(groups.size, len(batch["weight"])), batch["weight"])
        return toy.make_forward()(params, stats, batch, own)

    rule, batch = toy.make_rule(8), next(toy.make_batches(8, np.float32)())
    made = make_engine(forward, rule, Window(Recipe(8, "all"), Geometry(2)))
    with pytest.raises(ContractError, match="adds nothing up over them"):
        made.update(made.init(*toy.initial(np.float32)), batch)


@pytest.mark.parametrize(
    ("nbs", "group", "geometry", "together", "steps"),
    [
        (16, "all", Geometry(4), 4, 4),
        (16, "all", Geometry(4, 2), 2, 2),
        (18, "all", Geometry(4, 2), 3, 3),
        (18, 18, Geometry(4, 2), 3, 3),  # the same, said as a number
        (20, 8, Geometry(2), 4, 12),  # of whole groups
        (16, 8, Geometry(2, 4), 1, 2),
        (16, 8, Geometry(2, 2), 2, 4),
        (16, 8, Geometry(8), 1, 2),
    ],
)
def test_windows_of_groups_in_time(nbs, group, geometry, together, steps):
    window = Window(Recipe(nbs, group), geometry)
    assert (window.together, window.steps) == (together, steps)
    assert ("groups of" in str(window)) == (together > 1)


# --- What it takes. ---


def temporary(geometry, remat="none"):
    """Bytes of the update's temporaries."""
    this, _ = detector(geometry, remat, "float32", **{"data.image_size": 256})
    made = make_engine(this.forward, this.rule, this.window)
    state = jax.eval_shape(this.rule.init, *jax.eval_shape(lambda: this.task.initialise(0)))
    (lowered,) = made.lowered(state, this.task.example(16))
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_is_less_than_that_of_one_pass():
    one_pass = temporary(Geometry(16))
    kept, blocks = temporary(Geometry(2)), temporary(Geometry(2), remat="blocks")
    assert kept < 0.45 * one_pass
    assert blocks < 0.95 * kept


def test_one_array_of_a_convolution_is_kept():
    """Of x @ w, its batch norm and SiLU and what follows, by the program's plan."""
    layer = GroupBatchNorm(silu=True)
    x = jnp.ones((3, 4, 8))
    norm = layer.init(jax.random.key(0), x[0], None)

    def one(fixed, x):
        norm, w, v = fixed

        def loss(w, v):
            y = layer.apply(norm, x @ w, Groups(12, jnp.ones(4), 3))
            return jnp.sum(jnp.sin(y @ v))

        return jax.grad(loss, argnums=(0, 1))(w, v), ()

    fixed = (norm, jnp.ones((8, 8)), jnp.ones((8, 8)))
    closed = jax.make_jaxpr(one)(fixed, x[0])
    plan = in_time._Plan(in_time._Program(closed, len(jax.tree.leaves(fixed)), 2))
    kept = [plan._program.avals[v].shape for segment in plan.kept for v in segment]
    # The product; a sum of the microbatch; the cotangent, as another loop reads it again.
    assert sorted(kept) == [(1, 8), (4, 8), (4, 8)]


# --- Around it. ---


@pytest.mark.slow
def test_statistics_recomputed_for_an_evaluation_are_those_of_whole_groups(x64):
    def found(microbatch):
        this, source = detector(Geometry(microbatch))
        params, stats = this.task.initialise(0, np.float64)
        stream = run.make_stream(this, source, plain=True)
        return recompute_statistics(this, params, stats, stream, 32)

    assert equivalence.distance(found(4), found(16)) < 1e-14


def test_the_noise_scale_compares_groups(x64):
    """Two groups of four microbatches are as two microbatches."""

    def estimates(geometry):
        rule = toy.make_rule(16)
        rule = dataclasses.replace(rule, objective=dataclasses.replace(rule.objective, noise=True))
        batches = toy.make_batches(16, np.float64)
        found = equivalence.trace(
            toy.make_forward(), rule, Recipe(16, 8), geometry, *toy.initial(np.float64), batches, 2
        )
        return [{k: v for k, v in log.items() if "noise" in k} for log in found.logs]

    wanted = estimates(Geometry(8))
    assert wanted[0]
    for a, b in zip(estimates(Geometry(2)), wanted, strict=True):
        assert a == pytest.approx(b, rel=1e-11)
