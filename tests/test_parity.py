"""The reference's numbers: fixtures where the development data is, through scripts/parity.py."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import parity
from test_completion_models import TINY

from jaxaccum.accumulate import batchnorm
from jaxaccum.models import completion, weights

LOSSES = ["crowded", "no_objects", "one_empty_image", "p2_levels", "tiny_boxes", "typical"]
MODELS = ["yolov8-n", "yolov8-p2-n"]


@pytest.mark.parametrize("name", LOSSES)
def test_losses(shared, name):
    result = parity.check_loss(shared / "parity" / "detection" / f"loss_{name}.npz", jnp.float32)
    assert result.passed, str(result)
    assert len(result.errors) == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolov12-turbo-n", "yolov12-3d-n"])
def test_models_of_3d(shared, name):
    """Boxes in space, and their published loss, too."""
    result = parity.check_model(shared / "parity" / "detection3d" / f"{name}.npz", jnp.float32)
    assert result.passed, str(result)
    assert ("eval_decoded_heading" in result.errors) == (name == "yolov12-3d-n")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, "yolov8-m", "yolov8-p2-m"])
def test_models(shared, name):
    result = parity.check_model(shared / "parity" / "detection" / f"{name}.npz", jnp.float32)
    assert result.passed, str(result)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["adapointr-projected", "adapointr-shapenet55", "pointr-shapenet55"]
)
def test_completion_models(shared, name):
    path = shared / "parity" / "completion" / f"{name}.npz"
    result = parity.check_of(path)(path, jnp.float32)
    assert result.passed, str(result)


def completion_facts(name):
    """Facts of a fixture of a completion network, and the numbers that it starts from."""
    shapes = weights.shapes(name)
    table = completion.MODELS[name]
    points = table.queries * table.points_per_query
    stats = [key for key in shapes if "running_" in key]
    dead = ("base_model.query_ranking", "base_model.encoder.norm")
    trained = [k for k in shapes if k not in stats and not k.startswith(dead)]
    rng = np.random.default_rng(1)
    partial = rng.uniform(-0.5, 0.5, (2, table.num_input, 3)).astype(np.float32)
    rng.uniform(-0.5, 0.5, (2, points, 3))
    noise = 0.01 * rng.standard_normal((2, table.denoise, 3))
    facts = {
        "variant": name, "points": points, "state": {k: list(s) for k, s in shapes.items()},
        "parameters": sum(int(np.prod(s)) for k, s in shapes.items() if k not in stats),
        "grad_names": trained, "stat_names": stats,
    }  # fmt: skip
    return facts, {"seed": 0, "partial": partial, "denoise_noise": noise.astype(np.float32)}


@pytest.mark.slow
def test_a_turned_neighbour_is_found(monkeypatch):
    """In a fixture of our own, in which one query has another neighbour."""
    monkeypatch.setitem(completion.MODELS, "tiny", TINY)
    facts, data = completion_facts("tiny")
    with jax.enable_x64(True):
        ours = parity.CompletionFixture(facts, data, jnp.float64)
        turned = [np.zeros(r.shape, bool) for r in ours.evaluate()[1]]
        plain, risks = ours.evaluate(turned)
        of_centres = np.asarray(risks[6])  # queries and centres, the last call
        risk = np.sort(of_centres, axis=None)[2]
        turned[6][of_centres == risk] = True
        clouds, _ = ours.evaluate(turned)
        data["eval_coarse"] = np.asarray(clouds.coarse)
        data["eval_fine"] = np.asarray(clouds.fine)[:, ::16]
        assert ours.errors(plain)["eval_fine"].max() > parity.TOLERANCE
        assert ours.errors(clouds)["eval_fine"].max() == 0
        assert not any(map(np.any, ours.turns(risk=0.99 * risk)))
        assert all(map(np.array_equal, ours.turns(risk=1.01 * risk), turned))


@pytest.mark.slow
def test_an_error_of_a_completion_model_is_not_excused(monkeypatch):
    monkeypatch.setitem(completion.MODELS, "tiny", TINY)
    facts, data = completion_facts("tiny")
    ours = parity.CompletionFixture(facts, data, jnp.float32)
    clouds, _ = ours.evaluate()
    items, moments, gradient = ours.train()
    l1, l2 = ours.distances(clouds)
    moved = weights.to_reference(batchnorm.move_statistics(ours.stats, moments, 0.1))
    gradient = weights.to_reference(gradient)
    probes = {k: np.random.default_rng(zlib.crc32(f"{k}#probe".encode())) for k in gradient}
    names = facts["grad_names"]
    data |= {
        "eval_coarse": np.array(clouds.coarse),
        "eval_fine": np.array(clouds.fine)[:, ::16],
        "eval_cdl1": np.asarray(l1),
        "eval_cdl2": np.asarray(l2),
        "train_losses": np.asarray(items),
        "stat_norm": np.array([np.linalg.norm(moved[k]) for k in facts["stat_names"]]),
        "grad_norm": np.array([np.linalg.norm(gradient[k]) for k in names]),
        "grad_probe": np.array(
            [np.vdot(gradient[k], probes[k].standard_normal(gradient[k].shape)) for k in names]
        ),
    }
    result = parity.compare_completion(facts, data, jnp.float32)
    assert result.passed and not result.judged, str(result)
    data["eval_fine"][1, 2] += 1e-3 * np.abs(data["eval_fine"]).max()
    result = parity.compare_completion(facts, data, jnp.float32)
    assert result.beyond == ["eval_fine_f64"], str(result)


def test_queries_that_are_ranked_alike_may_change_places():
    table = completion.MODELS["adapointr-small"]
    rng = np.random.default_rng(0)
    coarse, fine = rng.normal(size=(2, 256, 3)), rng.normal(size=(2, 256 * 16, 3))
    swapped, moved = coarse.copy(), fine.reshape(2, 256, 16, 3).copy()
    swapped[1, [7, 8]], moved[1, [7, 8]] = coarse[1, [8, 7]], moved[1, [8, 7]]
    clouds = completion.Clouds(jnp.asarray(coarse), jnp.asarray(fine))
    a, b = parity.aligned(clouds, swapped, table)
    np.testing.assert_allclose(a, swapped, atol=1e-6)
    np.testing.assert_allclose(b, moved.reshape(fine.shape), atol=1e-6)
    many = coarse[:, ::-1]  # not these
    np.testing.assert_allclose(parity.aligned(clouds, many, table)[0], coarse, atol=1e-6)


def test_a_difference_fails():
    result = parity.Comparison()
    result.add("loss", [1.0, 2.0], [1.0, 2.001])
    assert not result.passed
    with pytest.raises(ValueError, match="shape"):
        result.add("loss", [1.0], [1.0, 2.0])
