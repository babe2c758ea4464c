"""The reference's numbers: fixtures where the development data is, through scripts/parity.py."""

from __future__ import annotations

import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import parity

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


def test_a_difference_fails():
    result = parity.Comparison()
    result.add("loss", [1.0, 2.0], [1.0, 2.001])
    assert not result.passed
    with pytest.raises(ValueError, match="shape"):
        result.add("loss", [1.0], [1.0, 2.0])
