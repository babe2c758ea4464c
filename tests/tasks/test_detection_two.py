"""The law on a detector of two sets of branches, and how its loss moves from one to the other."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from jaxaccum import config as configs
from jaxaccum import data, train
from jaxaccum.accumulate import ContractError, Geometry, Objective, equivalence
from jaxaccum.accumulate.checks import check
from jaxaccum.fields import LATER
from jaxaccum.losses import detection
from jaxaccum.tasks.detection import DetectionTask
from jaxaccum.training import optim, run

NBS, UPDATES = 10, 2  # uneven tails; some of the scenes have no objects
MODEL = "tiny-26-t"


def prepared(geometry=Geometry(2), bn_group=2, length=40, **changes):  # noqa: B008
    source = data.Scenes("train", size=64, length=length)
    config = tiny_config(**{
        "model": MODEL, "nbs": NBS, "bn_group": bn_group, "microbatch": geometry.microbatch,
        "devices": geometry.devices, "engine": geometry.engine, "fsdp": geometry.fsdp,
        "dtype": "float64" if jax.config.jax_enable_x64 else "float32",
    } | changes)  # fmt: skip
    return run.prepare(config, names=source.names, samples=len(source), identity={}), source


def batches(this, source, objects=None):
    for batch in run.make_stream(this, source).windows(0, [NBS] * UPDATES, backend="threads"):
        if objects is not None:  # only that many in the whole effective batch
            kept = np.cumsum(batch["valid"]).reshape(batch["valid"].shape) <= objects
            batch["valid"] &= kept
        yield batch


def trace(geometry, bn_group=2, objects=None, rule=lambda rule: rule, **changes):
    this, source = prepared(geometry, bn_group, **changes)
    dtype = np.float64 if jax.config.jax_enable_x64 else np.float32
    return equivalence.trace(
        this.forward, rule(this.rule), this.recipe, this.window.geometry,
        *this.task.initialise(0, dtype), lambda: batches(this, source, objects), UPDATES,
    )  # fmt: skip


@functools.cache
def whole(bn_group, objects=None):
    with jax.enable_x64(True):
        return trace(Geometry(NBS), bn_group, objects)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bn_group", "geometry"),
    [
        ("frozen", Geometry(1, 2)), (2, Geometry(4, 2, "multisteps")), (2, Geometry(1)),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                ("frozen", Geometry(4, 1, "multisteps")), (2, Geometry(2)), (2, Geometry(4, 2)),
                (2, Geometry(2, 2, fsdp=2)),
            )
        ),
    ],
    ids=str,
)  # fmt: skip
def test_one_run_float64(x64, bn_group, geometry):
    found = equivalence.differences(trace(geometry, bn_group), whole(bn_group))
    assert equivalence.within(found, equivalence.Tolerance.of(True)), found


@pytest.mark.slow
@pytest.mark.parametrize("objects", [pytest.param(0, marks=pytest.mark.long), 1])
def test_one_run_where_the_floors_act(x64, objects):
    """No object, or one in ten images: the sum of one-to-one is below 1, and is clamped once."""
    expected = whole(2, objects)
    assert all(log["sums/one_to_one"] < 1 for log in expected.logs)
    for geometry in (Geometry(2, 2), Geometry(4, 1, "multisteps")):
        found = equivalence.differences(trace(geometry, 2, objects), expected)
        assert equivalence.within(found, equivalence.Tolerance.of(True)), found


@pytest.mark.slow
def test_one_sum_for_both_branches_is_another_gradient(x64):
    """What the reference's authors could have done, and a single accumulator tempts to."""

    class Shared(Objective):
        def divisor(self, name, denominators):
            return super().divisor(detection.ONE_TO_MANY, denominators)

    def sharing(rule):
        given = {f.name: getattr(rule.objective, f.name) for f in dataclasses.fields(Objective)}
        return dataclasses.replace(rule, objective=Shared(**given))

    wrong, right = trace(Geometry(4), rule=sharing), whole(2)

    def part(gradient, name):
        return [
            leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
            if detection.owner_of("/".join(k.key for k in path)) == name
        ]  # fmt: skip

    apart = {
        name: equivalence.distance(*(part(t.gradient, name) for t in (wrong, right)))
        for name in (detection.ONE_TO_MANY, detection.ONE_TO_ONE)
    }
    sums = [max(right.logs[0][f"sums/{name}"], 1) for name in apart]
    assert apart[detection.ONE_TO_MANY] < 1e-12
    assert apart[detection.ONE_TO_ONE] == pytest.approx(1 - sums[1] / sums[0], rel=1e-9)
    assert apart[detection.ONE_TO_ONE] > 0.1


@pytest.mark.slow
def test_rematerialised_it_is_the_same_run(x64):
    found = equivalence.differences(trace(Geometry(4), remat="blocks"), whole(2))
    assert equivalence.within(found, equivalence.Tolerance.of(True)), found


@pytest.mark.slow
@pytest.mark.parametrize("bn_group", [pytest.param(2, marks=pytest.mark.long), "frozen"])
def test_the_usual_rule_is_off(x64, bn_group):
    """Each microbatch by its own sums, as the formula says; of whole windows nothing is left over.

    The reference measured 0.27 to 0.59 on other images and weights.
    """
    this, source = prepared(Geometry(2), bn_group, compat=True, nbs=8)
    params, stats = this.task.initialise(0, np.float64)
    batch = next(run.make_stream(this, source).windows(0, [8], backend="threads"))
    terms = this.rule.objective.terms

    def loss(params):
        total = 0.0
        for start in range(0, 8, 2):
            part = jax.tree.map(lambda a, s=start: a[s : s + 2], batch)
            out = this.grouped(params, stats, part)
            shares = {"one_to_many": 0.8, "one_to_one": 1 - 0.8}
            total += 2 * sum(
                shares[t.denominator] * t.gain * out.numerators[t.name]
                / jnp.maximum(out.denominators[t.denominator], 1) for t in terms
            )  # fmt: skip
        return total

    value, expected = jax.jit(jax.value_and_grad(loss))(params)
    found = equivalence.trace(
        this.forward, this.rule, this.recipe, Geometry(2), params, stats, lambda: iter([batch]), 1
    )
    assert found.logs[0]["loss"] == pytest.approx(float(value) / 8, rel=1e-12)
    assert equivalence.distance(found.gradient, expected) < 1e-12
    exact, _ = prepared(Geometry(2), bn_group, nbs=8)
    right = equivalence.trace(
        exact.forward, exact.rule, exact.recipe, Geometry(2), params, stats,
        lambda: iter([batch]), 1,
    )  # fmt: skip
    assert equivalence.distance(found.gradient, right.gradient) > 0.05


def test_a_branch_that_teaches_the_backbone_is_refused(monkeypatch):
    """The law's one accumulator rests on the branch's stop_gradient, and says so."""
    this, _ = prepared()
    params, stats = this.task.initialise(0)
    check(this.grouped, this.rule.objective, params, stats, this.task.example(2))
    monkeypatch.setattr(jax.lax, "stop_gradient", lambda x: x)
    other, _ = prepared()

    def only_targets_are_constant(params, stats, batch):
        out = other.grouped(params, stats, batch)
        constants = jax.tree.map(lambda v: 0 * batch["weight"].sum() + 1, out.denominators)
        return out._replace(denominators=constants)

    with pytest.raises(ContractError, match="belongs to the denominator 'one_to_many', but the "):
        check(only_targets_are_constant, other.rule.objective, params, stats,
              other.task.example(2))  # fmt: skip


# --- From the one to the other. ---


def schedule_of(updates, nbs, samples, ramp=()):
    config = configs.detection()
    config.nbs = nbs
    sizes = optim.WindowSizes(nbs, updates, np.asarray(ramp, np.int64))
    return optim.make_schedule(config, sizes, samples)


TASK = DetectionTask(dataclasses.make_dataclass("Model", ["model"])("yolo26-n"), 64)


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (100, {0: 0.8, 1: 0.792929, 50: 0.446465, 99: 0.1}),
        (10, {0: 0.8, 1: 0.722222, 5: 0.411111, 9: 0.1}),
        (1, {0: 0.8}),
    ],
)
def test_the_weights_by_epoch(epochs, expected):
    """The values of the reference."""
    weights = TASK.weights(schedule_of(epochs * 4, 5, 20))
    for epoch, value in expected.items():
        for update in (4 * epoch, 4 * epoch + 3):  # constant within an epoch
            assert weights["one_to_many"](update) == pytest.approx(value, abs=1e-6)
            assert weights["one_to_one"](update) == pytest.approx(1 - value, abs=1e-6)


def test_a_window_has_the_weights_of_its_first_sample():
    """Of 20 samples an epoch the third window of 8 has four, and still weighs as it; E is 2."""
    schedule = schedule_of(5, 8, 20)
    assert schedule.epochs == 2
    assert schedule.epoch(np.arange(7)).tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert TASK.weights(schedule)["one_to_many"](np.arange(5)).tolist() == pytest.approx(
        [0.8, 0.8, 0.8, 0.1, 0.1]
    )


@pytest.mark.parametrize("ramp", [(), (2, 4, 4, 6)])
@pytest.mark.parametrize(("nbs", "samples"), [(8, 20), (64, 20), (7, 1000), (1, 3)])
def test_the_device_counts_epochs_as_the_host_does(nbs, samples, ramp):
    schedule = schedule_of(500, nbs, samples, ramp)
    sizes = optim.WindowSizes(nbs, 500, np.asarray(ramp, np.int64))
    expected = [sizes.before(min(u, 499)) // samples for u in range(503)]
    assert schedule.epoch(np.arange(503)).tolist() == expected
    on_device = jax.jit(schedule.epoch)(jnp.arange(503, dtype=jnp.int32))
    assert on_device.dtype == jnp.float32 and on_device.tolist() == expected
    assert schedule.epochs == expected[-1] + 1


@pytest.mark.parametrize("samples", [999_983, 123_456_789])
def test_epochs_are_exact_where_samples_overflow(samples):
    """10^13 samples, at the last update of an epoch and the first of the next; in float32 and in 32
    bits neither count of them is right."""
    nbs, updates = configs.MOST_SAMPLES, configs.MOST_UPDATES
    schedule = schedule_of(updates, nbs, samples)
    epochs = np.array([1, 2, 1000, 80_000 if samples > 10**8 else 9_000_000])
    first = -(-epochs * samples // nbs)  # of each
    counts = np.concatenate([first - 1, first])
    expected = counts * nbs // samples
    assert schedule.epoch(counts).tolist() == expected.tolist()
    found = jax.jit(schedule.epoch)(jnp.asarray(counts, jnp.int32))
    assert found.tolist() == expected.tolist()
    lowered = jax.jit(schedule.epoch).lower(jax.ShapeDtypeStruct((), jnp.int32))
    assert len(lowered.as_text()) < 10_000  # no table


def test_no_weights_without_the_branches():
    plain = dataclasses.replace(TASK, model=dataclasses.replace(TASK.model, model="yolo11-n"))
    assert plain.weights(schedule_of(4, 5, 20)) == {}


@pytest.mark.slow
def test_a_run_shows_its_weights_and_goes_on_with_them(tmp_path):
    """Two epochs of 6 updates; stopped after the ninth and continued on another geometry."""
    source = data.open_source("", "train")
    changes = {
        "model": MODEL, "steps": 12, "eval.every": 9, "checkpoint.every": 3, "nbs": 4,
        "loss.one_to_many": 0.75, "data.fraction": 24 / len(source),
    }  # fmt: skip
    train.train(tiny_config(**changes), tmp_path / "whole")

    class Stop(Exception):
        pass

    def stopping(*arguments):
        raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(DetectionTask, "evaluator", lambda *arguments: stopping)
        train.train(tiny_config(**changes), tmp_path / "parts")
    train.train(tiny_config(**changes | {"devices": 2}), tmp_path / "parts")
    logs = [
        [r for r in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
         if r["kind"] == "train"]
        for name in ("whole", "parts")
    ]  # fmt: skip
    for ours, theirs in zip(*logs, strict=True):
        many = 0.75 if ours["step"] <= 6 else 0.1
        assert ours["weight/one_to_many"] == pytest.approx(many, rel=1e-6)
        assert ours["weight/one_to_one"] == pytest.approx(1 - many, rel=1e-6)
        parts = [ours[f"loss/{name}"] for name in ("box", "cls", "l1")]
        singles = [ours[f"loss/one_to_one_{name}"] for name in ("box", "cls", "l1")]
        total = many * sum(parts) + (1 - many) * sum(singles)
        assert ours["loss"] == pytest.approx(total, rel=1e-5)
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4), ours["step"]
        assert theirs["weight/one_to_many"] == ours["weight/one_to_many"]


# --- What of it is the recipe's. ---


def test_the_weights_are_the_recipes():
    assert LATER["loss.one_to_many"] == (0.8,) and LATER["loss.one_to_many_final"] == (0.1,)
    plain = configs.recipe_of(tiny_config(model=MODEL), 5, {})
    assert set(plain.as_dict()["loss"]) == {"box", "cls", "dfl"}  # as before there were any
    for field, value in (("loss.one_to_many", 0.7), ("loss.one_to_many_final", 0.3)):
        other = configs.recipe_of(tiny_config(model=MODEL, **{field: value}), 5, {})
        assert other.fingerprint != plain.fingerprint
        assert other.differences(plain.as_dict()) == {field: (None, value)}
    with pytest.raises(configs.ConfigError, match=r"loss\.one_to_many is in 0 to 1"):
        configs.validate(tiny_config(model=MODEL, **{"loss.one_to_many": 1.5}))


def test_the_gains_are_those_of_both_branches():
    this, _ = prepared(**{"loss.box": 5.0, "loss.cls": 0.25, "loss.dfl": 9.0})
    gains = {t.name: (t.gain, t.denominator) for t in this.rule.objective.terms}
    assert gains == {
        "box": (5.0, "one_to_many"), "cls": (0.25, "one_to_many"), "l1": (9.0, "one_to_many"),
        "one_to_one_box": (5.0, "one_to_one"), "one_to_one_cls": (0.25, "one_to_one"),
        "one_to_one_l1": (9.0, "one_to_one"),
    }  # fmt: skip
    assert this.rule.objective.floors == {"one_to_many": 1.0, "one_to_one": 1.0}
    assert this.rule.objective.accumulators == 1
