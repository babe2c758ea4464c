"""Recipe, geometry and window: what is refused, what is derived, what a fingerprint sees."""

from __future__ import annotations

import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxaccum import config as configs
from jaxaccum.accumulate import Geometry, GeometryError, Recipe, Window


def test_the_printed_line():
    window = Window(Recipe(64, 8), Geometry(8, 2))
    assert str(window).endswith(
        "effective batch 64, bn_group 8 | geometry: microbatch 8 x 4 steps x 2 devices, scan"
    )


@given(nbs=st.integers(1, 100), microbatch=st.integers(1, 20), devices=st.integers(1, 8))
def test_a_window_holds_every_sample_once(nbs, microbatch, devices):
    window = Window(Recipe(nbs, "frozen"), Geometry(microbatch, devices))
    batch = {"index": np.arange(nbs) + 1, "weight": np.ones(nbs)}
    laid = window.split(batch)
    assert laid["index"].shape == (window.steps, microbatch * devices)
    assert laid["weight"].sum() == nbs
    np.testing.assert_array_equal(laid["index"].ravel()[:nbs], batch["index"])
    assert not laid["weight"].ravel()[nbs:].any()
    assert set(laid["index"].ravel()) == set(batch["index"])
    assert 0 <= window.padding < microbatch * devices


def test_uneven_tail():
    window = Window(Recipe(10, "frozen"), Geometry(4))
    weights = window.split({"weight": np.ones(10)})["weight"]
    np.testing.assert_array_equal(weights.sum(1), [4, 4, 2])


@pytest.mark.parametrize(
    ("group", "microbatch", "fits"),
    [(8, 6, "take 2 or 4 or a multiple of 8, or change the recipe to bn_group 6"),
     (6, 4, "take 2 or 3 or a multiple of 6, or change the recipe to bn_group 4"),
     (7, 5, "take 1 or a multiple of 7, or change the recipe to bn_group 5"),
     ("all", 24, "take 4 or 8 or a multiple of 16, or change the recipe to bn_group 12")],
)  # fmt: skip
def test_a_group_cut_within_a_microbatch_is_refused_with_what_would_work(group, microbatch, fits):
    with pytest.raises(GeometryError, match=fits):
        Window(Recipe(16, group), Geometry(microbatch))


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match="nbs"):
        Recipe(0, 8)
    with pytest.raises(ValueError, match="bn_group"):
        Recipe(8, "none")
    with pytest.raises(GeometryError, match="engine"):
        Geometry(8, 1, "loop")
    with pytest.raises(GeometryError, match="microbatch"):
        Geometry(0)


@pytest.mark.parametrize("group", [0, -4, 2.0])
def test_a_group_is_a_number_of_samples(group):
    with pytest.raises(ValueError, match="bn_group is a number of samples"):
        Recipe(8, group)


def test_a_group_that_only_single_samples_divide():
    with pytest.raises(GeometryError, match="or change the recipe to bn_group 1 or 'frozen'"):
        Window(Recipe(16, 3), Geometry(5))


def test_a_fingerprint_stays_what_it_is():
    """Runs are found again by it: eight hex digits of the values, whatever their order."""
    one = Recipe(64, 8, {"seed": 1, "lr": {"base": 0.01}})
    assert one.fingerprint == Recipe(64, 8, {"lr": {"base": 0.01}, "seed": 1}).fingerprint
    assert one.fingerprint == "15d64cfb"


def test_differences_are_of_both_recipes():
    """What only one of them has, too, by dotted names."""
    ours = Recipe(64, 8, {"lr": {"base": 0.01}, "new": 1})
    theirs = {"nbs": 64, "bn_group": 4, "lr": {"base": 0.01, "gone": 2}}
    assert ours.differences(theirs) == {
        "bn_group": (4, 8), "lr.gone": (2, None), "new": (None, 1),
    }  # fmt: skip


def recipe(**changes):
    config = configs.detection()
    config.update_from_flattened_dict(changes)
    return configs.recipe_of(config, 100, {"identity": "abc"})


def test_the_fingerprint_is_of_the_recipe_alone():
    base = recipe()
    for field, value in {
        "microbatch": 2, "devices": 4, "engine": "multisteps", "data.workers": 3,
        "data.path": "elsewhere/data.yaml", "log.every": 1, "eval.every": 7, "checkpoint.keep": 9,
    }.items():  # fmt: skip
        assert recipe(**{field: value}).fingerprint == base.fingerprint, field
    for field, value in {
        "nbs": 32, "bn_group": "frozen", "seed": 1, "lr.base": 0.02, "loss.box": 7.0,
        "augment.hsv_h": 0.0, "optimizer.name": "adamw", "ema.ramp": 10.0, "dtype": "bfloat16",
        "model": "yolov8-n", "data.image_size": 320,
    }.items():  # fmt: skip
        changed = recipe(**{field: value})
        assert changed.fingerprint != base.fingerprint, field
        usual = "float32" if field == "dtype" else configs.get(configs.detection(), field)
        assert changed.differences(base.as_dict()) == {field: (usual, value)}


def test_auto_is_the_dtype_that_it_becomes():
    assert recipe(dtype="auto") == recipe(dtype="float32")


@pytest.mark.parametrize(
    ("platform", "capability", "wanted"),
    [
        ("cpu", None, "float32"), ("tpu", None, "bfloat16"), ("gpu", "9.0", "bfloat16"),
        ("gpu", "8.0", "bfloat16"), ("gpu", "7.5", "float32"), ("cuda", "12.0", "bfloat16"),
        ("rocm", "gfx942", "bfloat16"), ("metal", None, "float32"),
    ],
)  # fmt: skip
def test_what_auto_becomes(platform, capability, wanted):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    assert configs.best_dtype(device) == wanted


def test_compat_learns_by_its_geometry():
    assert (
        recipe(compat=True, microbatch=2).fingerprint
        != recipe(compat=True, microbatch=4).fingerprint
    )
