"""Images of several sizes in one run: drawn by the window, the same on every geometry."""

from __future__ import annotations

import functools
import importlib.util

import jax
import numpy as np
import pytest
from tiny import tiny_config

from jaxaccum import config as configs
from jaxaccum import config_files, data, train
from jaxaccum.accumulate import Geometry, equivalence
from jaxaccum.data.augment import Augment
from jaxaccum.data.loader import TrainStream
from jaxaccum.tasks.detection import sizes
from jaxaccum.training import logs, run

SIDES = (32, 64, 96)
NBS, UPDATES = 6, 3


@pytest.mark.parametrize(
    ("value", "found"),
    [("", ()), ("64,32", (32, 64)), (" 32, 64 ,96", SIDES), ((96, 64), (64, 96)), ([], ())],
)
def test_what_a_config_says(value, found):
    assert sizes.parsed(value) == found


@pytest.mark.parametrize(
    "value",
    ["64", "64,64", "60,64", "a,b", "0,32", "-32,32", "nan,32", "32,1e9", 64, None, {}, [[]]],
)
def test_what_it_cannot_say(value):
    with pytest.raises(configs.ConfigError, match=r"augment\.sizes is ''"):
        sizes.parsed(value)


def test_fields():
    """On the command line; the usual rule has no windows; without sizes a recipe is what it was."""
    made = config_files.parse("configs/yolo_n.py", {"augment.sizes": "32,64"})
    configs.validate(made)
    assert sizes.parsed(made.augment.sizes) == (32, 64)
    made.compat = True
    with pytest.raises(configs.ConfigError, match="usual rule"):
        configs.validate(made)
    plain, sized = tiny_config(), tiny_config(**{"augment.sizes": "32,64"})
    prints = [configs.recipe_of(c, 3, {}).settings["augment"] for c in (plain, sized)]
    assert "sizes" not in prints[0] and prints[1]["sizes"] == "32,64"


def stream(**changes):
    source = data.Scenes("train", size=64, length=11)
    settings = {"image_size": 64, "max_objects": 20, "augment": Augment(), "seed": 3}
    return TrainStream(source, **{**settings, "sizes": SIDES, "window": 4, **changes})


def test_a_window_has_one_side():
    """Whatever makes it and wherever it starts; the samples are the plain ones, resized."""
    ours, plain = stream(), stream(sizes=())
    sides = [ours.side(window) for window in range(40)]
    assert set(sides) == set(SIDES) and sides == [stream().side(w) for w in range(40)]
    assert sides != [stream(seed=4).side(window) for window in range(40)]
    found = list(ours.windows(0, [4] * 6, backend="threads"))
    assert [batch["image"].shape for batch in found] == [(4, s, s, 3) for s in sides[:6]]
    for number in range(6):
        for row in range(4):
            one, whole = ours.sample(4 * number + row), plain.sample(4 * number + row)
            for key, value in one.items():
                np.testing.assert_array_equal(value, found[number][key][row])
            np.testing.assert_allclose(one["boxes"], whole["boxes"] * sides[number] / 64, rtol=1e-6)
            if sides[number] == 64:
                np.testing.assert_array_equal(one["image"], whole["image"])
            assert abs(one["image"].mean() - whole["image"].mean()) < 8
    (again,) = ours.windows(12, [4], backend="threads")
    np.testing.assert_array_equal(again["image"], found[3]["image"])
    parts = [
        list(ours.windows(0, [4] * 6, backend="threads", share=np.array(share)))
        for share in ([0, 2], [1, 3])
    ]
    for whole, first, second in zip(found, *parts, strict=True):
        np.testing.assert_array_equal(whole["image"][[0, 2]], first["image"])
        np.testing.assert_array_equal(whole["image"][[1, 3]], second["image"])


@pytest.mark.skipif(importlib.util.find_spec("grain") is None, reason="needs grain")
def test_grain_makes_the_same():
    ours = stream()
    pairs = (ours.windows(4, [4] * 4, backend=kind) for kind in ("threads", "grain"))
    for one, other in zip(*pairs, strict=True):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def prepared(geometry, **changes):
    source = data.Scenes("train", size=64, length=20)
    config = tiny_config(**{
        "nbs": NBS, "bn_group": 2, "microbatch": geometry.microbatch, "devices": geometry.devices,
        "engine": geometry.engine, "augment.sizes": SIDES[:2], "data.image_size": 64, "seed": 1,
        "dtype": "float64" if jax.config.jax_enable_x64 else "float32",
    } | changes)  # fmt: skip
    return run.prepare(config, names=source.names, samples=len(source), identity={}), source


def trace(geometry, **changes):
    this, source = prepared(geometry, **changes)
    made = run.make_stream(this, source)
    assert len({made.side(window) for window in range(UPDATES)}) == 2
    return equivalence.trace(
        this.forward, this.rule, this.recipe, this.window.geometry,
        *this.task.initialise(0, np.float64),
        lambda: made.windows(0, [NBS] * UPDATES, backend="threads"), UPDATES,
    )  # fmt: skip


@functools.cache
def whole(group):
    with jax.enable_x64(True):
        return trace(Geometry(NBS), bn_group=group)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("geometry", "group"),
    [
        (Geometry(2, 2), 2), pytest.param(Geometry(2), "all", marks=pytest.mark.long),
        pytest.param(Geometry(4, 1, "multisteps"), 2, marks=pytest.mark.long),
    ],
    ids=str,
)  # fmt: skip
def test_one_run_float64(x64, geometry, group):
    found = equivalence.differences(trace(geometry, bn_group=group), whole(group))
    assert equivalence.within(found, equivalence.Tolerance.of(True)), found


@pytest.mark.slow
def test_a_run(tmp_path, capsys):
    """It says so, evaluates at the image size, and a plan is of the largest."""
    config = tiny_config(**{"augment.sizes": "32,64", "data.image_size": 96, "steps": 4, "seed": 1})
    train.train(config, tmp_path)
    said = "".join(capsys.readouterr())
    assert "images of 32, 64 px, by update, compiled once each" in said
    assert [r["step"] for r in logs.records(tmp_path / "metrics.jsonl") if r["kind"] == "eval"]
    task = prepared(Geometry(2))[0].task
    assert task.example(3)["image"].shape == (3, 64, 64, 3)
    assert task.evaluation(3)[1][0].shape == (3, 64, 64, 3)
