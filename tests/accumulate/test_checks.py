"""What somebody else's model does wrong is an error that says what to do, before anything compiles;
what no shape shows, `verify` does."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxaccum.accumulate import (
    ContractError,
    Coupled,
    Geometry,
    GroupBatchNorm,
    Groups,
    Objective,
    Output,
    Recipe,
    Term,
    UpdateRule,
    Window,
    make_engine,
    sample_keys,
    verify,
)

NBS, GROUP = 7, 2


class Ours(nn.Module):
    """Batch norm that is given the recipe's groups."""

    @nn.compact
    def __call__(self, x, groups):
        x = nn.Dense(8, name="first", param_dtype=x.dtype)(x)
        return nn.Dense(1, param_dtype=x.dtype)(GroupBatchNorm(silu=True, name="norm")(x, groups))


class Theirs(nn.Module):
    """The framework's, which knows no groups."""

    @nn.compact
    def __call__(self, x, groups, running=False):
        del groups
        x = nn.Dense(8, param_dtype=x.dtype)(x)
        x = nn.BatchNorm(running, name="norm", param_dtype=x.dtype)(x)
        return nn.Dense(1, param_dtype=x.dtype)(x)


def variables(net, **more):
    made = net.init(jax.random.key(0), jnp.zeros((2, 3)), None, **more)
    made = jax.tree.map(lambda a: np.asarray(a, np.float64), made)
    return made["params"], made["batch_stats"]


def forward(params, stats, batch, groups, net=Ours()):  # noqa: B008
    out, changed = net.apply(
        {"params": params, "batch_stats": stats}, batch["x"], groups, mutable=["moments"]
    )
    weight = batch["weight"]
    error = jnp.square(out[..., 0] - batch["y"])
    objects = batch["objects"] * weight
    return Output(
        {"fit": jnp.sum(objects * error)}, {"objects": jnp.sum(objects)}, changed.get("moments", {})
    )


def make_rule(**more):
    objective = Objective((Term("fit", 1.0, "objects"),), {"objects": 1.0}, **more)
    return UpdateRule(objective, optax.sgd(0.1))


def batch_of(samples=NBS):
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(samples, 3)), "y": rng.normal(size=samples),
        "objects": rng.uniform(0, 1, samples), "weight": np.ones(samples),
        "index": np.arange(samples, dtype=np.int32), "epoch": np.zeros(samples, np.int32),
    }  # fmt: skip


def update(forward=forward, batch=None, rule=None, bn_group=GROUP, net=None, engine="scan"):
    net = net or Ours()
    params, stats = variables(net)
    window = Window(Recipe(NBS, bn_group), Geometry(4, engine=engine))
    made = make_engine(forward, rule or make_rule(), window)
    return made.update(made.init(params, stats), batch_of() if batch is None else batch)


@pytest.fixture(autouse=True)
def wide(x64):
    """In float64."""


def without(batch, name):
    return {k: v for k, v in batch.items() if k != name}


@pytest.mark.parametrize("engine", ["scan", "multisteps"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: without(b, "weight"), r"has epoch, index, objects, x, y but no 'weight'.*1 for"),
        (lambda b: [b["x"]], "a batch is a dict of arrays.*got list"),
        (lambda b: b | {"weight": 1.0}, r"batch\['weight'\] is float \(\); expected a float for"),
        (lambda b: b | {"weight": np.ones((7, 1))}, r"is float64 \(7, 1\); expected"),
        (lambda b: b | {"weight": np.ones(7, bool)}, r"is bool \(7,\); expected a float"),
        (lambda b: b | {"x": b["x"][:6]}, r"batch\['x'\] is float64 \(6, 3\), but .* 7 samples"),
        (
            lambda b: b | {"scale": np.float64(3)},
            r"batch\['scale'\] is float64 \(\).*the same for all of them belongs into params",
        ),
    ],
)
def test_batches_that_cannot_be_divided(change, said, engine):
    with pytest.raises(ContractError, match=said):
        update(batch=change(batch_of()), engine=engine)


def returning(change):
    """The forward with another output."""
    return lambda *a: change(forward(*a), *a)


def sums(out, **more):
    return out._replace(**more)


@pytest.mark.parametrize("engine", ["scan", "multisteps"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda out, *_: tuple(out), "forward returned tuple; expected accumulate.Output"),
        (lambda out, *_: out.numerators["fit"], r"returned float64 \(\); expected accumulate"),
        (
            lambda out, *_: sums(out, numerators={"fitt": out.numerators["fit"]}),
            "numerators of forward are fitt, the objective's terms are fit. 'fitt' is meant to be "
            "'fit'?",
        ),
        (
            lambda out, *_: sums(out, numerators=out.numerators | {"extra": jnp.zeros(())}),
            "'extra' would be computed and never used: name it in the objective",
        ),
        (lambda out, *_: sums(out, numerators={}), "return fit as well, 0 where there is nothing"),
        (lambda out, *_: sums(out, numerators=1.0), "numerators is .*; expected a dict"),
        (lambda out, *_: sums(out, denominators={}), "return objects as well"),
        (
            lambda out, p, s, b, g: sums(out, numerators={"fit": b["x"]}),
            r"numerators\['fit'\] is float64 \(4, 3\); expected one number: the sum over",
        ),
        (
            lambda out, p, s, b, g: sums(out, denominators={"objects": b["objects"]}),
            r"denominators\['objects'\] is float64 \(4,\); expected one number",
        ),
        (
            lambda out, *_: sums(
                out, numerators={"fit": out.numerators["fit"].astype(jnp.bfloat16)}
            ),
            r"numerators\['fit'\] is bfloat16; sums are made in float32 or float64: convert",
        ),
        (
            lambda out, p, *_: sums(
                out, denominators={"objects": jnp.sum(jnp.exp(p["first"]["bias"]))}
            ),
            r"denominators \['objects'\] carry a gradient.*stop_gradient",
        ),
        (
            lambda out, p, s, *_: sums(out, moments=s),
            r"moments\['norm'\] has mean, var; expected count, first and second.*is no moments",
        ),
        (
            lambda out, *_: sums(out, moments={"other": out.moments["norm"]}),
            "moments has 'other', but stats has norm: moments are nested as",
        ),
        (
            lambda out, *_: sums(out, moments=out.moments["norm"]),
            "moments has no running statistics to move: stats is norm, expected mean and var",
        ),
        (lambda out, *_: sums(out, moments=None), "moments is NoneType; expected the dict"),
        (
            lambda out, *_: sums(
                out, moments={"norm": out.moments["norm"] | {"first": jnp.zeros(3)}}
            ),
            r"moments\['norm'\]\['first'\] is float64 \(3,\), but the running mean is float64 \(8",
        ),
        (
            lambda out, *_: sums(out, moments={}),
            "depends on the running statistics of norm, and it returns no moments",
        ),
    ],
)  # fmt: skip
def test_outputs_that_are_not_those_of_the_objective(change, said, engine):
    with pytest.raises(ContractError, match=said):
        update(returning(change), engine=engine)


@pytest.mark.parametrize("bn_group", [GROUP, "frozen"])
def test_the_frameworks_batch_norm_is_named(bn_group):
    """It normalises by the microbatch: losses 1.51, 1.33 and 1.31 by microbatch, and no error."""

    def theirs(params, stats, batch, groups):
        weight = batch["weight"]
        out, _ = Theirs().apply(
            {"params": params, "batch_stats": stats}, batch["x"], None, mutable=["batch_stats"]
        )
        error = jnp.sum(weight * jnp.square(out[..., 0] - batch["y"]))
        return Output({"fit": error}, {"objects": jnp.sum(weight)}, {})

    with pytest.raises(ContractError, match=r"of norm.* as flax\.linen\.BatchNorm and flax\.nnx"):
        update(theirs, bn_group=bn_group, net=Theirs())


def test_running_statistics_that_nothing_moves_are_right():
    """A part of a network that came with its statistics, and keeps them."""

    def theirs(params, stats, batch, groups):
        weight = batch["weight"]
        out = Theirs().apply(
            {"params": params, "batch_stats": stats}, batch["x"], None, running=True
        )
        error = jnp.sum(weight * jnp.square(out[..., 0] - batch["y"]))
        return Output({"fit": error}, {"objects": jnp.sum(weight)}, {})

    assert update(theirs, net=Theirs())[1]["ok"]


def test_what_lies_beside_the_statistics_is_left_alone():
    """Only a mean or a variance that nothing reads tells of a layer that normalises by itself."""
    params, stats = variables(Ours())
    stats = stats | {"seen": {"images": np.zeros(3)}}
    made = make_engine(
        lambda params, stats, *rest: forward(params, {"norm": stats["norm"]}, *rest),
        make_rule(), Window(Recipe(NBS, GROUP), Geometry(4)),
    )  # fmt: skip
    state, log = made.update(made.init(params, stats), batch_of())
    assert log["ok"]
    np.testing.assert_array_equal(state.stats["seen"]["images"], np.zeros(3))


@pytest.mark.parametrize(
    ("features", "said"),
    [
        (lambda b: (), r"coupled terms \(contrast\) and forward returned no features"),
        (
            lambda b: {"f": jnp.sum(b["x"])},
            r"features\['f'\] is float64 \(\) for a microbatch",
        ),
        (lambda b: {"f": b["index"]}, r"features\['f'\] is int32; features are differentiated"),
    ],
)
def test_features_of_coupled_terms(features, said):
    rule = make_rule(coupled=(Coupled("contrast", 1.0, lambda p, f, w: jnp.sum(f["f"])),))
    with pytest.raises(ContractError, match=said):
        update(returning(lambda out, p, s, b, g: sums(out, features=features(b))), rule=rule)


def test_a_forward_of_three_arguments():
    with pytest.raises(ContractError, match=r"called as forward\(params, stats, microbatch, gro"):
        update(lambda params, stats, batch: forward(params, stats, batch, None))


@pytest.mark.parametrize("engine", ["scan", "multisteps"])
def test_what_is_only_lowered_is_checked_too(engine):
    window = Window(Recipe(NBS, GROUP), Geometry(4, engine=engine))
    made = make_engine(forward, make_rule(), window)
    state = made.init(*variables(Ours()))
    with pytest.raises(ContractError, match="no 'weight'"):
        made.lowered(state, without(batch_of(), "weight"))


def test_what_is_right_is_checked_once(monkeypatch):
    from jaxaccum.accumulate import engine

    calls, check = [], engine.check
    monkeypatch.setattr(engine, "check", lambda *a: calls.append(check(*a)))
    params, stats = variables(Ours())
    made = make_engine(forward, make_rule(), Window(Recipe(NBS, GROUP), Geometry(4)))
    state = made.init(params, stats)
    for _ in range(2):
        state, log = made.update(state, batch_of())
        assert log["ok"]
    assert len(calls) == 1


@pytest.mark.slow
def test_verify_of_what_is_right():
    params, stats = variables(Ours())
    found = verify(forward, make_rule(), Recipe(NBS, GROUP), params, stats, batch_of())
    assert found.ok and found.tolerance == 1e-12
    assert [geometry for geometry, _ in found.rows] == [
        Geometry(10), Geometry(4), Geometry(2), Geometry(2, 1, "multisteps"), Geometry(1),
        Geometry(2, 2), Geometry(2, 2, "multisteps"),
    ]  # fmt: skip
    assert {"gradient", "loss", "statistics"} == set(found.rows[0][1])
    assert str(found).count("one run") == 7 and "ANOTHER" not in str(found)


def own_groups(params, stats, batch, groups):
    """Groups of its own, whatever the recipe says."""
    return forward(params, stats, batch, Groups(len(batch["weight"]), batch["weight"]))


def noise_by_place(params, stats, batch, groups):
    keys = sample_keys(0, batch["epoch"], jnp.arange(len(batch["weight"])))
    noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    return forward(params, stats, batch | {"x": batch["x"] + noise}, groups)


def padding_counts(params, stats, batch, groups):
    return forward(params, stats, batch | {"weight": jnp.ones_like(batch["weight"])}, groups)


def mean_of_the_microbatch(params, stats, batch, groups):
    out = forward(params, stats, batch, groups)
    size = len(batch["weight"])
    return out._replace(numerators={"fit": out.numerators["fit"] / size})


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken", [own_groups, noise_by_place, padding_counts, mean_of_the_microbatch]
)
def test_verify_finds_what_no_shape_shows(broken):
    params, stats = variables(Ours())
    geometries = [Geometry(8), Geometry(2), Geometry(6, 2)]
    found = verify(broken, make_rule(), Recipe(NBS, GROUP), params, stats, batch_of(), geometries)
    assert not found.ok
    assert "ANOTHER" in str(found) and "weight 0" in str(found)


def test_verify_compares():
    params, stats = variables(Ours())
    with pytest.raises(ValueError, match="1 geometry: two or more"):
        verify(forward, make_rule(), Recipe(NBS, GROUP), params, stats, batch_of(), [Geometry(8)])
