"""Weights of classes: what they multiply, that the law holds with them, how a config gives them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config, tiny_config3d

from jaxaccum import config as configs
from jaxaccum import config_files, data, train
from jaxaccum.accumulate import Geometry, equivalence, grouped
from jaxaccum.losses import detection
from jaxaccum.models import yolo
from jaxaccum.tasks.detection import class_weights
from jaxaccum.training import inference, run

NBS, UPDATES = 10, 2  # uneven tails; some of the scenes have no objects
MODELS = ("tiny-t", "tiny-26-t")
NAMES = data.Scenes("train").names
UNEVEN = tuple(0.25 * 3**place for place in range(len(NAMES)))
FIELD = class_weights.FIELD


def prepared(model="tiny-t", geometry=Geometry(2), weights=UNEVEN, **changes):  # noqa: B008
    source = data.Scenes("train", size=64, length=40)
    config = tiny_config(**{
        "model": model, "nbs": NBS, "bn_group": 2, "microbatch": geometry.microbatch,
        "devices": geometry.devices, "engine": geometry.engine, FIELD: weights,
        "dtype": "float64" if jax.config.jax_enable_x64 else "float32",
    } | changes)  # fmt: skip
    return run.prepare(config, names=source.names, samples=len(source), identity={}), source


def trace(model, geometry, weights=UNEVEN):
    this, source = prepared(model, geometry, weights)
    return equivalence.trace(
        this.forward, this.rule, this.recipe, this.window.geometry,
        *this.task.initialise(0, np.float64),
        lambda: run.make_stream(this, source).windows(0, [NBS] * UPDATES, backend="threads"),
        UPDATES,
    )  # fmt: skip


@functools.cache
def whole(model, weights=UNEVEN):
    with jax.enable_x64(True):
        return trace(model, Geometry(NBS), weights)


# --- The law. ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "geometry"),
    [
        ("tiny-t", Geometry(4, 2)), ("tiny-26-t", Geometry(2)),
        pytest.param("tiny-t", Geometry(2, 1, "multisteps"), marks=pytest.mark.long),
        pytest.param("tiny-26-t", Geometry(4, 2, "multisteps"), marks=pytest.mark.long),
    ],
    ids=str,
)  # fmt: skip
def test_one_run_float64(x64, model, geometry):
    found = equivalence.differences(trace(model, geometry), whole(model))
    assert equivalence.within(found, equivalence.Tolerance.of(True)), found


@pytest.mark.slow
def test_weights_in_the_denominator_of_a_microbatch_are_another_gradient(x64, monkeypatch):
    """What the mean of PyTorch's losses does with `weight`: the check notices it."""
    plain = detection.detection_loss

    def normalised(*arguments, **named):
        numerators, denominators, assignment = plain(*arguments, **named)
        seen = jnp.mean(jnp.asarray(UNEVEN)[arguments[2].classes])  # of the microbatch's objects
        return numerators | {"cls": numerators["cls"] / seen}, denominators, assignment

    monkeypatch.setattr(detection, "detection_loss", normalised)
    found = equivalence.differences(trace("tiny-t", Geometry(2)), trace("tiny-t", Geometry(NBS)))
    assert found["gradient"] > 1e-3, found


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_they_change_what_is_learned_and_no_denominator(x64, model):
    ours, plain = whole(model), whole(model, "")
    first, other = ours.logs[0], plain.logs[0]
    sums = [key for key in other if key.startswith("sums/")]
    assert sums and all(first[key] == other[key] for key in sums)
    assert equivalence.distance(ours.gradient, plain.gradient) > 0.01
    for key in (key for key in other if key.startswith("loss/")):
        assert ("cls" in key) == (first[key] != other[key]), key


# --- What they multiply. ---


def predictions_of(direct, seed=11):
    """Predictions of 3 classes on a 64 px input, and two images' objects."""
    rng = np.random.default_rng(seed)
    anchors = yolo.anchors(64, 64, (8, 16))
    count = len(anchors.strides)
    boxes = rng.normal(size=(2, count, 4 if direct else 64))
    found = yolo.Predictions(jnp.asarray(boxes), jnp.asarray(rng.normal(size=(2, count, 3))))
    corner = rng.uniform(0, 30, (2, 4, 2))
    targets = detection.Targets(
        jnp.asarray(np.concatenate([corner, corner + rng.uniform(12, 30, (2, 4, 2))], -1)),
        jnp.asarray(rng.integers(0, 3, (2, 4)), jnp.int32),
        jnp.asarray([[True] * 4, [True, True, False, False]]), jnp.asarray([1.0, 1.0]),
    )  # fmt: skip
    return found, anchors, targets


@pytest.mark.parametrize("direct", [False, True])
def test_the_binary_cross_entropy_of_a_class_times_its_weight(x64, direct):
    found, anchors, targets = predictions_of(direct)
    weights = np.array([0.5, 2.0, 7.0])
    numerators, denominators, assigned = detection.detection_loss(
        found, anchors, targets, class_weights=tuple(weights)
    )
    classes = np.take_along_axis(np.asarray(targets.classes), np.asarray(assigned.object), 1)
    wanted = np.asarray(assigned.score)[..., None] * (classes[..., None] == np.arange(3))
    assert np.all(wanted.sum((0, 1)) > 0)  # every class has an object
    p = 1 / (1 + np.exp(-np.asarray(found.scores)))
    entropy = -(wanted * np.log(p) + (1 - wanted) * np.log(1 - p))
    assert float(numerators["cls"]) == pytest.approx((entropy * weights).sum(), rel=1e-12)
    plain, others, _ = detection.detection_loss(found, anchors, targets)
    assert float(plain["cls"]) == pytest.approx(entropy.sum(), rel=1e-12)
    assert denominators == others
    assert all(numerators[name] == plain[name] for name in plain if name != "cls")
    ones, _, _ = detection.detection_loss(found, anchors, targets, class_weights=(1, 1, 1))
    assert float(ones["cls"]) == pytest.approx(float(plain["cls"]), rel=1e-13)


def test_without_weights_the_program_is_what_it_was():
    found, anchors, targets = predictions_of(False)

    def program(**named):
        return str(jax.make_jaxpr(
            lambda p, t: detection.detection_loss(p, anchors, t, **named)[:2]
        )(found, targets))  # fmt: skip

    assert program() == program(class_weights=()) != program(class_weights=(1.0, 1.0, 1.0))


def test_padded_samples_count_nothing(x64):
    found, anchors, targets = predictions_of(False)
    half = targets._replace(weight=jnp.asarray([1.0, 0.0]))
    first = jax.tree.map(lambda a: a[:1], (found, targets))
    both = detection.detection_loss(found, anchors, half, class_weights=(0.5, 2, 7))[0]
    alone = detection.detection_loss(
        first[0], anchors, first[1], class_weights=(0.5, 2, 7)
    )[0]  # fmt: skip
    assert float(both["cls"]) == pytest.approx(float(alone["cls"]), rel=1e-12)


# --- As a config gives them. ---


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", ()), ((), ()), ({}, ()), ([1, 1.0, 1], ()), ("c=1", ()),
        ([1, 2.5, 0], (1, 2.5, 0)), ((1, 2, 3), (1, 2, 3)), (np.array([1, 2, 3]), (1, 2, 3)),
        ("1, 2.5,1", (1, 2.5, 1)), ("[1, 2, 1]", (1, 2, 1)), ("(1, 2, 1)", (1, 2, 1)),
        ({"c": 3}, (1, 1, 3)), ({"a b": 2, "c": 0.5}, (2, 1, 0.5)),
        ("c=3", (1, 1, 3)), (" a b = 2, c=5e-1", (2, 1, 0.5)), ("{'x=y': 4}", (1, 4, 1)),
        ("x=y=4", (1, 4, 1)),
    ],
    ids=str,
)  # fmt: skip
def test_the_ways_to_give_them(value, expected):
    found = class_weights.by_class(value, ("a b", "x=y", "c"))
    assert found == expected and all(type(one) is float for one in found)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("balancd", "is '' (none), 'balanced'"), (3, "is '' (none)"), ("__import__('os')", "is ''"),
        ([1, -1], "that of number 2 is -1"), ([1, float("nan")], "number 2"),
        ({"RBC": "x"}, "that of 'RBC' is 'x'"), ("RBC=x", "that of 'RBC' is 'x'"),
        ([True, 1], "number 1 is True"), ("RBC=1,RBC=2", "'RBC' has two weights"),
        ({"RBC": 1e10}, "in 0 to 1e+09"), ({"St. Bernard": 2}, "have the key 'St. Bernard'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_no_classes_could_have_is_refused_at_once(value, said):
    with pytest.raises(configs.ConfigError, match=r"loss\.class_weights") as refused:
        configs.validate(tiny_config(**{FIELD: value}))
    assert said in str(refused.value)


def test_what_these_classes_do_not_have_is_refused():
    names = ("RBC", "WBC", "Platelets")
    with pytest.raises(configs.ConfigError, match="no class 'RCB': did you mean RBC"):
        class_weights.by_class({"RCB": 2}, names)
    with pytest.raises(
        configs.ConfigError, match="no class 'zebra'; there are RBC, WBC, Platelets"
    ):
        class_weights.by_class("zebra=2", names)
    for value in ([1, 2], [1, 1, 1, 1]):
        with pytest.raises(configs.ConfigError, match=r"weights, and there are 3 classes: RBC"):
            class_weights.by_class(value, names)
    with pytest.raises(configs.ConfigError, match="balanced is counted on a training set"):
        class_weights.by_class("balanced", names)
    with pytest.raises(configs.ConfigError, match="no class 'baloon': did you mean balloon"):
        prepared(weights={"baloon": 2.0})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("balanced", "balanced"), ("car=2", {"car": 2.0}), ("1,2,3", (1, 2, 3)),
     ("{'car': 2}", {"car": 2.0})],
)  # fmt: skip
def test_on_the_command_line(text, expected):
    config = config_files.parse("quickstart", {FIELD: text})
    configs.validate(config)
    assert class_weights.parsed(config.loss.class_weights) == expected
    with pytest.raises(configs.ConfigError, match=r'Did you mean "loss\.class_weights"'):
        config_files.parse("quickstart", {"loss.class_weight": text})


def test_balanced_by_its_formula():
    assert class_weights.balanced([10, 10]) == (1, 1)
    found = class_weights.balanced([100, 10, 0, 1])
    assert found[2] == 1  # none to count
    assert np.mean([found[i] for i in (0, 1, 3)]) == pytest.approx(1, rel=1e-15)
    assert found[1] / found[0] == pytest.approx(10) and found[3] / found[1] == pytest.approx(10)
    assert class_weights.balanced([0, 0]) == (1, 1)


# --- In the recipe, and in runs. ---


def test_the_default_is_no_part_of_the_recipe():
    assert FIELD in configs.fields.LATER
    for config in (tiny_config(), tiny_config3d()):
        assert "class_weights" not in configs.recipe_of(config, 5, {}).as_dict()["loss"]
    plain, _ = prepared(weights="")
    assert prepared(weights=[1] * len(NAMES))[0].recipe == plain.recipe
    assert prepared(weights=[1] * len(NAMES))[0].task.class_weights == ()


def test_they_are_of_the_recipe_in_whatever_words():
    plain, _ = prepared(weights="")
    name = NAMES[1]
    weights = [1.0, 2.5, *[1.0] * (len(NAMES) - 2)]
    same = [prepared(weights=value)[0].recipe
            for value in ({name: 2.5}, f"{name}=2.5", weights, tuple(weights))]  # fmt: skip
    assert len({recipe.fingerprint for recipe in same}) == 1
    assert same[0].differences(plain.recipe.as_dict()) == {FIELD: (None, weights)}


def test_balanced_weights_are_settled_by_the_labels():
    source = data.Scenes("train", size=64, length=40)
    config = tiny_config(**{FIELD: "balanced"})
    found, lines = run.settled(config, source)
    counts = np.bincount(
        np.concatenate([source.objects(i).classes for i in range(40)]), minlength=len(NAMES)
    )
    assert found.loss.class_weights == class_weights.balanced(counts.tolist())
    assert len(lines) == 1 and f"{NAMES[0]} " in lines[0] and f"({counts[0]} objects)" in lines[0]
    assert config.loss.class_weights == "balanced"  # the caller's own
    again, _ = run.settled(found, source)
    assert again.loss.class_weights == found.loss.class_weights
    with pytest.raises(configs.ConfigError, match="balanced is counted on a training set"):
        run.prepare(config, names=source.names, samples=40, identity={})


def test_3d_has_them_in_its_2d_part():
    source = data.open_source3d("", "train")
    config = tiny_config3d(**{FIELD: f"{source.names[-1]}=4"})
    this = run.prepare(config, names=source.names, samples=len(source), identity={})
    assert this.task.class_weights == (*[1.0] * (len(source.names) - 1), 4)
    plain = dataclasses.replace(this.task, class_weights=())
    params, stats = this.task.initialise(0)
    batch = next(run.make_stream(this, source).windows(0, [2], backend="threads"))
    ours, theirs = (
        jax.jit(lambda b, task=task: grouped(task.forward, 2)(params, stats, b)[:2])(batch)
        for task in (this.task, plain)
    )
    for name, value in theirs[0].items():
        assert (float(ours[0][name]) > 1.2 * float(value)) == (name == "cls"), name
    assert {k: float(v) for k, v in ours[1].items()} == {k: float(v) for k, v in theirs[1].items()}


@pytest.mark.slow
def test_a_run_with_balanced_weights(tmp_path, capsys):
    """It says them, keeps them as numbers, is used, and is continued by the same command."""
    changes = {FIELD: "balanced", "steps": 2, "eval.every": 2, "checkpoint.every": 1}
    train.train(tiny_config(**changes), tmp_path)
    said = capsys.readouterr().out
    assert said.count("loss.class_weights balanced, inverse to the objects, mean 1: ") == 1
    trained = inference.load(tmp_path)
    assert len(trained.task.class_weights) == len(NAMES)
    assert np.mean(trained.task.class_weights) == pytest.approx(1)
    train.train(tiny_config(**changes | {"microbatch": 4}), tmp_path)
    assert "finished: all 2 updates are done" in capsys.readouterr().out
