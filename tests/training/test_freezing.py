"""Switches of what is learned, and from what: frozen modules, a part of the data, one class, and
the limit of time."""

from __future__ import annotations

import json
import types

import jax
import numpy as np
import pytest
from tiny import tiny_config

from jaxaccum import config as configs
from jaxaccum import data, train
from jaxaccum.accumulate import Geometry, equivalence, make_engine
from jaxaccum.data.views import viewed
from jaxaccum.fields import ConfigError
from jaxaccum.training import freezing, inference, preemption, run

NBS = 6
FROZEN = "model.0, model.1,model.5/cv2.0.0"


def prepared(freeze, geometry=Geometry(2), **changes):  # noqa: B008 it is frozen
    source = data.Scenes("train", size=64, length=24)
    config = tiny_config(
        nbs=NBS, bn_group=2, freeze=freeze, microbatch=geometry.microbatch,
        devices=geometry.devices, engine=geometry.engine, fsdp=geometry.fsdp,
        **{"ema.decay": 0.9} | changes,
    )  # fmt: skip
    this = run.prepare(config, names=source.names, samples=len(source), identity={})
    return this, list(run.make_stream(this, source).windows(0, [NBS] * 2, backend="threads"))


def trace(freeze, geometry, **changes):
    this, batches = prepared(freeze, geometry, dtype="float64", **changes)
    return equivalence.trace(
        this.forward, this.rule, this.recipe, geometry,
        *this.task.initialise(0, np.float64), lambda: iter(batches), 2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole():
    with jax.enable_x64(True):
        return trace(FROZEN, Geometry(6))


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(2, 1, "multisteps"), Geometry(2, 2, "scan", 2),
        *(pytest.param(g, marks=pytest.mark.long) for g in (Geometry(2), Geometry(2, 2))),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.slow
def test_one_run_on_any_geometry(x64, whole, geometry):
    found = equivalence.differences(trace(FROZEN, geometry), whole)
    assert equivalence.within(found, equivalence.Tolerance.of(True)), found


def updated(this, batches):
    """The state before and after two updates, on the host, and the logs."""
    engine = make_engine(this.forward, this.rule, this.window)
    state = this.rule.init(*this.task.initialise(0))
    before, logs = jax.device_get(state), []
    state = engine.place_state(state)
    for batch in batches:
        state, log = engine.update(state, batch, NBS // 2)
        logs.append(jax.device_get(log))
    return before, jax.device_get(state), logs


def by_path(tree):
    return {
        "/".join(k.key for k in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize(
    "optimizer", ["adamw", "sgd", pytest.param("musgd", marks=pytest.mark.long)]
)
@pytest.mark.slow
def test_what_is_frozen_stays_bit_for_bit(optimizer):
    this, batches = prepared(FROZEN, **{"optimizer.name": optimizer})
    before, after, _ = updated(this, batches)
    names = freezing.modules(FROZEN)
    for kind in ("params", "stats"):
        old, new = by_path(getattr(before, kind)), by_path(getattr(after, kind))
        moved = {path for path in old if not np.array_equal(old[path], new[path])}
        held = {path for path in old if freezing.is_frozen(path, names)}
        learning = old.keys() - held
        # Without an object at a stride the box branch there has no gradient.
        assert held and moved <= learning and len(moved) > 0.9 * len(learning)


def test_the_gradient_is_that_of_what_learns(x64):
    """Its norm is of the parts that learn alone, and the forward is by running statistics there."""
    this, batches = prepared(FROZEN, dtype="float64")
    params, stats = this.task.initialise(0, np.float64)
    out = jax.jit(this.grouped)(params, stats, batches[0])
    names = freezing.modules(FROZEN)
    for path, value in by_path(out.moments).items():
        frozen = freezing.is_frozen(path, names)
        assert (np.abs(value).max() == 0) == frozen, path

    def loss(p):
        return sum(jax.tree.leaves(this.grouped(p, stats, batches[0]).numerators))

    for path, value in by_path(jax.jit(jax.grad(loss))(params)).items():
        if freezing.is_frozen(path, names):
            assert not value.any(), path
    twice = {k: np.concatenate([v, v]) for k, v in batches[0].items()}
    again = jax.jit(this.grouped)(params, stats, twice)
    assert (
        by_path(again.moments)["model.2/bn/count"] == 2 * by_path(out.moments)["model.2/bn/count"]
    )


def test_a_number_is_the_first_modules():
    assert freezing.modules(2) == ("model.0", "model.1")
    assert freezing.modules(0) == freezing.modules("") == ()
    assert freezing.is_frozen("model.1/conv/kernel", ("model.1",))
    assert not freezing.is_frozen("model.11/conv/kernel", ("model.1",))
    assert freezing.is_frozen("model.22/cv2.0.0/conv/kernel", ("model.22.cv2",))


@pytest.mark.parametrize(
    ("freeze", "told"),
    [
        ("model.7", "no module 'model.7'; did you mean model"),
        ("backbone", "no module 'backbone'; its largest are model.0, model.1"),
        (9, "no module 'model.6'"),
        (6, "are the whole network: nothing would learn"),
        ("model", "are the whole network: nothing would learn"),
    ],
)
def test_modules_that_are_not_there(freeze, told):
    this, _ = prepared(0)
    params, _ = this.task.initialise(0)
    with pytest.raises(ConfigError, match=told):
        freezing.described(params, freezing.modules(freeze))


@pytest.mark.parametrize("freeze", [-1, True, 1.5, 100_000, ("model.0",)])
def test_values_that_cannot_be(freeze):
    config = tiny_config()
    with config.unlocked():
        config.freeze = freeze
    with pytest.raises(ConfigError, match="freeze is a number of modules, 0 to 1000, or names"):
        configs.validate(config)


def test_only_what_is_asked_for_is_in_the_recipe():
    plain = configs.recipe_of(tiny_config(), 5, {})
    assert not {"freeze", "hours"} & plain.settings.keys()
    assert not {"fraction", "single_cls"} & plain.settings["data"].keys()
    others = [
        configs.recipe_of(tiny_config(**change), 5, {})
        for change in ({"freeze": 1}, {"data.fraction": 0.5}, {"data.single_cls": True})
    ]
    assert len({r.fingerprint for r in (plain, *others)}) == 4
    assert configs.recipe_of(tiny_config(hours=2.0), 5, {}).fingerprint == plain.fingerprint


# --- A part of the data, and one class. ---


def test_a_part_of_the_images_evenly_spaced():
    source = data.Scenes("train", size=64, length=10)
    part = viewed(source, 0.3, False)
    assert part.report.lines()[-1] == "  data.fraction=0.3: 3 of these images"
    assert [part.name(i) for i in range(len(part))] == [source.name(i) for i in (0, 3, 6)]
    assert np.array_equal(part.image(2), source.image(6))
    assert np.array_equal(part.objects(1).boxes, source.objects(3).boxes)
    assert len(viewed(source, 1e-6, False)) == 1
    assert viewed(source, 1.0, False) is source


def test_all_classes_as_one():
    source = data.Scenes("train", size=64, length=12)
    one = viewed(source, 1.0, True)
    assert one.names == ("object",) and len(one) == 12
    found = [one.objects(i) for i in range(12)]
    assert sum(map(len, found)) == sum(len(source.objects(i)) for i in range(12)) > 0
    assert all((objects.classes == 0).all() for objects in found)
    assert len({c for i in range(12) for c in source.objects(i).classes}) > 1


@pytest.mark.slow
def test_a_run_of_one_class_and_half_the_data(tmp_path, capsys):
    changes = {"data.single_cls": True, "data.fraction": 0.5, "freeze": 2, "steps": 3}
    train.train(tiny_config(**changes, **{"eval.every": 3, "eval.batch": 64}), tmp_path)
    said = capsys.readouterr().out
    assert "data.fraction=0.5: 1024 of these images" in said
    assert "frozen: model.0, model.1, " in said
    trained = inference.load(tmp_path)
    assert trained.names == ("object",)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged[0]["epoch"] == pytest.approx(4 / 1024)
    assert [r["objects"] for r in logged if r["kind"] == "eval"] == [829]  # of all classes


def test_a_view_is_the_same_by_threads_and_by_processes():
    config = tiny_config(**{"data.single_cls": True, "data.fraction": 0.5})
    source = viewed(data.Scenes("train", size=64, length=12), 0.5, True)
    this = run.prepare(config, names=source.names, samples=len(source), identity={})
    by = [list(run.make_stream(this, source).windows(0, [4, 4], workers=n)) for n in (0, 2)]
    for one, other in zip(*by, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one)


# --- The limit of time. ---


@pytest.mark.slow
def test_time_is_over_and_the_run_is_continued(tmp_path, monkeypatch, capsys):
    """It ends after the update under way, saved, and the next start ends where it would have."""
    steps, late = 6, []
    clock = types.SimpleNamespace(monotonic=lambda: 3600.0 * len(late), sleep=lambda s: None)
    monkeypatch.setattr(preemption, "time", clock)
    changes = {"steps": steps, "checkpoint.every": 100, "eval.every": 100}

    def watch(record):
        if record["kind"] == "train" and record["step"] == 2:
            late.append(record)

    with pytest.raises(preemption.Preempted) as stopped:
        train.train(tiny_config(hours=0.5, **changes), tmp_path / "a", watch=watch)
    assert stopped.value.code == preemption.TRY_AGAIN and stopped.value.time_is_up
    kept = inference.load(tmp_path / "a").step
    assert 2 <= kept < steps
    said = capsys.readouterr().err
    assert f"stopped after hours=0.5: update {kept} is kept; the same command continues" in said
    train.train(tiny_config(hours=0.5, **changes), tmp_path / "a")
    train.train(tiny_config(**changes), tmp_path / "b")
    a, b = (inference.load(tmp_path / name).params for name in "ab")
    assert all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
