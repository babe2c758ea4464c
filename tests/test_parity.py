"""The reference's numbers: fixtures where the development data is, through scripts/parity.py."""

from __future__ import annotations

import sys
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
    dead = ("query_ranking", "encoder.norm")
    trained = [k for k in shapes if k not in stats and not any(d in k for d in dead)]
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
def test_a_turned_neighbour_is_found_and_an_error_is_not_excused(monkeypatch):
    """On a fixture of our own, in which one query has another neighbour."""
    monkeypatch.setitem(completion.MODELS, "tiny", TINY)
    facts, data = completion_facts("tiny")
    with jax.enable_x64(True):
        theirs = parity.CompletionFixture(facts, data, jnp.float64)
        turned = [np.zeros(r.shape, bool) for r in theirs.evaluate()[1]]
        plain, risks = theirs.evaluate(turned)
        data |= {"eval_coarse": np.asarray(plain.coarse), "eval_fine": np.asarray(plain.fine)[:, ::16]}
        risk = float(np.sort(np.asarray(risks[6]).ravel())[2])
        call, sample, query = 6, *np.argwhere(np.asarray(risks[6]) == risk)[0]
        turned[call][sample, query] = True
        clouds, _ = theirs.evaluate(turned)
        data |= {"eval_coarse": np.asarray(clouds.coarse), "eval_fine": np.asarray(clouds.fine)[:, ::16]}
        assert theirs.errors(plain)["eval_fine"].max() > parity.TOLERANCE
        found = theirs.turns(risk=1.01 * risk)
        assert all(map(np.array_equal, found, turned))
        assert theirs.errors(theirs.evaluate(found)[0])["eval_fine"].max() < 1e-12

        items, moments, gradient = theirs.train(turned)
        l1, l2 = theirs.distances(clouds)
        moved = weights.to_reference(batchnorm.move_statistics(theirs.stats, moments, 0.1))
        data |= {
            "eval_cdl1": np.asarray(l1), "eval_cdl2": np.asarray(l2),
            "train_losses": np.asarray(items),
            "stat_norm": np.array([np.linalg.norm(moved[k]) for k in facts["stat_names"]]),
        }  # fmt: skip
        gradient = weights.to_reference(gradient)
    names = facts["grad_names"]
    data["grad_norm"] = np.array([np.linalg.norm(gradient[k]) for k in names])
    data["grad_probe"] = np.array([
        np.sum(gradient[k] * np.random.default_rng(zlib.crc32(f"{k}#probe".encode()))
               .standard_normal(gradient[k].shape)) for k in names])  # fmt: skip
    return facts, data


def test_a_difference_fails():
    result = parity.Comparison()
    result.add("loss", [1.0, 2.0], [1.0, 2.001])
    assert not result.passed
    with pytest.raises(ValueError, match="shape"):
        result.add("loss", [1.0], [1.0, 2.0])
