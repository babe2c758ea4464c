"""Losses that couple samples: the gradient is that of one pass over the effective batch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from hlo import collectives

from jaxaccum.accumulate import (
    Coupled,
    Geometry,
    Groups,
    Objective,
    Output,
    Recipe,
    Term,
    UpdateRule,
    engine,
    equivalence,
    fsdp,
    sample_keys,
    usual_rule,
)
from jaxaccum.losses import alignment

NBS, SEED, SCALE = 11, 7, 3.0


def embed(params, stats, batch, groups):
    """A net with batch norm and noise keyed by sample; (outputs, moments)."""
    keys = sample_keys(SEED, batch["epoch"], batch["index"])
    noise = jax.vmap(lambda k: jax.random.normal(k, batch["x"].shape[1:], jnp.float32))(keys)
    x = batch["x"] + 0.3 * noise.astype(batch["x"].dtype)
    variables = {"params": params["net"], "batch_stats": stats}
    return toy.NET.apply(variables, x, groups, mutable=["moments"])


def forward(params, stats, batch, groups):
    out, changed = embed(params, stats, batch, groups)
    weight = batch["weight"]
    error = jnp.sum(jnp.square(out[..., 0] - batch["y"]), axis=1)
    features = {"cloud": out.reshape(len(out), -1), "text": batch["text"]}
    return Output(
        {"fit": jnp.sum(weight * error)}, {"samples": jnp.sum(weight)},
        changed.get("moments", {}), features,
    )  # fmt: skip


def contrast(params, features, weight):
    return alignment.info_nce(features["cloud"], features["text"], params["scale"], weight)


def covariance(params, features, weight):
    """Off-diagonal covariance of the features (VICReg, Bardes et al. 2022): no sum over pairs."""
    del params
    f, w = features["cloud"], weight[:, None] / jnp.sum(weight)
    centred = f - jnp.sum(w * f, axis=0)
    matrix = (w * centred).T @ centred
    return jnp.sum(jnp.square(matrix - jnp.diag(jnp.diagonal(matrix)))) / len(matrix)


TERMS = {
    "contrast": (Coupled("contrast", 0.7, contrast),),
    "both": (
        Coupled("contrast", 0.7, contrast, watched={"seen": contrast}),
        Coupled("covariance", 0.2, covariance),
    ),
}


def make_rule(coupled):
    objective = Objective((Term("fit", 2.0, "samples"),), {"samples": 1.0}, SCALE, coupled=coupled)
    optimizer = optax.chain(optax.trace(0.9), optax.scale(-0.05))
    return UpdateRule(objective, optimizer, clip=1.0)


def initial(dtype):
    params, stats = toy.initial(dtype)
    return {"net": params, "scale": np.asarray(1.5, dtype)}, stats


def batches(dtype, nbs=NBS):
    for batch in toy.make_batches(nbs, dtype)():
        rng = np.random.default_rng(batch["index"].tolist())
        yield batch | {"text": rng.normal(size=(nbs, 10)).astype(dtype)}


def run(geometry, bn_group=4, terms="both", updates=3, dtype=np.float64):
    recipe = Recipe(NBS, bn_group)
    return equivalence.trace(
        forward, make_rule(TERMS[terms]), recipe, geometry, *initial(dtype),
        lambda: batches(dtype), updates,
    )  # fmt: skip


@functools.cache
def whole(bn_group):
    return run(Geometry(12), bn_group)


def test_the_forms_of_gpus_are_the_same_update(x64, monkeypatch):
    """Both passes over a window of known length, on one device and on two."""
    traced = run(Geometry(4))
    monkeypatch.setattr(engine, "GPUS", ("cpu",))
    for geometry in (Geometry(4), Geometry(4, 2)):
        found = equivalence.differences(run(geometry), traced)
        assert equivalence.within(found, equivalence.Tolerance.of(True)), found


def in_one_pass(bn_group, terms):
    """The loss of the first effective batch and SCALE times its gradient, written down directly."""
    params, stats = initial(np.float64)
    batch = next(batches(np.float64))

    def loss(params):
        if bn_group == "frozen":
            out = forward(params, stats, batch, None)
        else:  # groups of four, the last filled up
            place = np.arange(12) % NBS
            laid = {k: v[place] for k, v in batch.items()}
            laid["weight"] = (np.arange(12) < NBS).astype(np.float64)
            out = forward(params, stats, laid, Groups(bn_group, laid["weight"]))
        value = 2 * out.numerators["fit"] / NBS
        weight = np.ones(NBS)
        features = jax.tree.map(lambda a: a[:NBS], out.features)
        return value + sum(t.gain * t.loss(params, features, weight) for t in TERMS[terms])

    value, gradient = jax.value_and_grad(loss)(params)
    return value, optax.tree.scale(SCALE, gradient)


@pytest.mark.parametrize("bn_group", [4, "frozen"])
@pytest.mark.parametrize("terms", [pytest.param("contrast", marks=pytest.mark.slow), "both"])
def test_the_gradient_of_one_pass(x64, bn_group, terms):
    value, gradient = in_one_pass(bn_group, terms)
    for geometry in (Geometry(4, 2), Geometry(4, 2, "multisteps")):
        found = run(geometry, bn_group, terms, updates=1)
        assert found.logs[0]["loss"] == pytest.approx(float(value), rel=1e-12)
        assert equivalence.distance(found.gradient, gradient) < 1e-12
        if terms == "both":  # what is watched has no gain
            seen = found.logs[0]["metrics/seen"]
            assert found.logs[0]["loss/contrast"] == pytest.approx(0.7 * seen, rel=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["scan", "multisteps"])
@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize(
    ("bn_group", "microbatch"),
    [
        ("frozen", 1), (4, 1), (4, 4),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("frozen", 8), (4, 8))),
    ],
)  # fmt: skip
def test_every_geometry_is_one_run(x64, microbatch, devices, engine, bn_group):
    found = equivalence.differences(
        run(Geometry(microbatch, devices, engine), bn_group), whole(bn_group)
    )
    assert equivalence.within(found, equivalence.Tolerance.of(True)), found


@pytest.mark.slow
def test_contrasting_within_microbatches_is_another_gradient(x64):
    """The check can fail, and the usual accumulation is far off."""
    params, stats = initial(np.float64)
    batch = next(batches(np.float64))

    def gradient_of(size):
        def loss(params):
            total = 0.0
            for start in range(0, NBS, size):
                part = jax.tree.map(lambda a, s=start: a[s : s + size], batch)
                features = forward(params, stats, part, None).features
                value = contrast(params, features, part["weight"])
                total += value * len(part["weight"]) / NBS
            return total

        return jax.grad(loss)(params)

    whole = gradient_of(NBS)
    assert 0.1 < equivalence.distance(gradient_of(4), whole) < 1


@pytest.mark.slow
def test_the_temperature_learns(x64):
    """A parameter that only the coupled loss has."""
    before, _ = initial(np.float64)
    for geometry in (Geometry(4, 4), Geometry(4, 2, "multisteps")):
        assert run(geometry).params["scale"] != before["scale"]


def test_a_divided_state_is_one_run(x64, monkeypatch):
    """Both passes gather the parameters, and the coupled terms' own gradient is theirs as well."""
    monkeypatch.setattr(fsdp, "SMALLEST", 1)
    _, gradient = in_one_pass("frozen", "both")
    found = run(Geometry(2, 2, fsdp=2), "frozen", updates=1)
    assert equivalence.distance(found.gradient, gradient) < 1e-12


@pytest.mark.parametrize("engine", ["scan", "multisteps"])
def test_a_shorter_window(x64, engine):
    """Fewer microbatches than the window has room for: the rest is not in the contrast."""
    from jaxaccum.accumulate import Window, make_engine

    found = []
    for nbs, geometry in ((8, Geometry(4)), (16, Geometry(4, 1, engine))):
        engine = make_engine(
            forward, make_rule(TERMS["both"]), Window(Recipe(nbs, "frozen"), geometry)
        )
        _, log = engine.update(engine.init(*initial(np.float64)), next(batches(np.float64, 8)), 2)
        found.append(float(log["loss"]))
    assert found[0] == pytest.approx(found[1], rel=1e-13)


def test_what_is_lowered_for_shapes_is_what_runs():
    """Of each call per microbatch: the two passes, and what lies between and after."""
    from jaxaccum.accumulate import Window, make_engine

    engine = make_engine(
        forward, make_rule(TERMS["both"]),
        Window(Recipe(NBS, "frozen"), Geometry(4, 2, "multisteps")),
    )  # fmt: skip
    state, batch = engine.init(*initial(np.float32)), next(batches(np.float32))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (state, batch))
    programs, used = engine.lowered(*shapes), {}
    names = ("_first_pass", "_between", "_add", "_close")
    for name in names:
        call = getattr(engine, name)

        def seen(*arguments, name=name, call=call):
            used.setdefault(name, call.lower(*arguments))
            return call(*arguments)

        setattr(engine, name, seen)
    engine.update(state, batch)
    assert [p.in_avals for p in programs] == [used[name].in_avals for name in names]
    assert [p.as_text() for p in programs] == [used[name].as_text() for name in names]


def test_the_features_are_gathered_once():
    """A leaf at a time, and the weights; the denominators and the update's sums are reduced."""
    from jaxaccum.accumulate import Window, make_engine

    engine = make_engine(
        forward, make_rule(TERMS["contrast"]), Window(Recipe(16, "frozen"), Geometry(2, 4))
    )
    state = engine.init(*initial(np.float32))
    placed = engine.place(next(batches(np.float32, 16)))
    found = collectives(engine.lower(state, *placed).compile().as_text())
    assert not any(c.looped for c in found)
    assert sorted(c.kind for c in found) == ["all-gather"] * 3 + ["all-reduce"] * 2


def test_memory_is_flat():
    """Features of the window are kept, activations are not."""
    from jaxaccum.accumulate import Window, make_engine

    used = []
    for steps in (4, 32):
        nbs = 4 * steps
        engine = make_engine(
            forward, make_rule(TERMS["contrast"]), Window(Recipe(nbs, 4), Geometry(4))
        )
        state = engine.init(*initial(np.float32))
        placed = engine.place(next(batches(np.float32, nbs)))
        used.append(
            engine.lower(state, *placed).compile().memory_analysis().temp_size_in_bytes
            - 8 * nbs * nbs * 4  # logits of both directions and what becomes of them
        )
    assert used[1] < 2 * used[0] + 2**14, used


def test_no_compat():
    with pytest.raises(ValueError, match="compat knows no coupled terms"):
        usual_rule.UsualObjective((), {}, coupled=TERMS["contrast"])


# --- InfoNCE itself ---


def test_info_nce_by_hand(x64):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 7)), rng.normal(size=(5, 7))
    captions = np.asarray([0, 1, 1, 2, 3])
    weight = np.asarray([1.0, 1, 1, 1, 0])
    unit_a = a / np.linalg.norm(a, axis=1, keepdims=True)
    unit_b = b / np.linalg.norm(b, axis=1, keepdims=True)
    logits = np.exp(1.3) * unit_a @ unit_b.T
    total = 0.0
    for matrix in (logits, logits.T):
        for i in range(4):
            others = [j for j in range(4) if j == i or captions[j] != captions[i]]
            total += np.log(np.sum(np.exp(matrix[i, others]))) - matrix[i, i]
    found = alignment.info_nce(a, b, jnp.asarray(1.3), weight, captions)
    assert float(found) == pytest.approx(total / 8, rel=1e-12)
    # Padding has no say, whatever it holds, in the value or the gradient.
    gradient = jax.grad(lambda a: alignment.info_nce(a, b, 1.3, weight, captions))(jnp.asarray(a))
    assert np.all(np.isfinite(gradient))
    assert np.all(np.asarray(gradient)[4] == 0)
    other = b.copy()
    other[4] = 100.0
    assert float(alignment.info_nce(a, other, 1.3, weight, captions)) == pytest.approx(total / 8)


def test_info_nce_chance_and_certainty():
    """Equal features: log n. Features that match: the accuracy is 1."""
    n = 16
    same = jnp.ones((n, 4))
    value = alignment.info_nce(same, same, jnp.asarray(0.0), jnp.ones(n))
    assert float(value) == pytest.approx(np.log(n), rel=1e-6)
    eye = jnp.eye(n)
    assert float(alignment.accuracy(eye, eye, jnp.ones(n))) == 1
    assert float(alignment.info_nce(eye, eye, jnp.asarray(5.0), jnp.ones(n))) < 1e-3
    assert float(alignment.accuracy(eye, jnp.roll(eye, 1, axis=0), jnp.ones(n))) == 0


def test_a_zero_feature_has_a_finite_gradient():
    zero = jnp.zeros((3, 4))
    gradient = jax.grad(lambda a: alignment.info_nce(a, jnp.eye(3, 4), 1.0, jnp.ones(3)))(zero)
    assert np.all(np.isfinite(gradient))
