"""Programs of trained networks: StableHLO, and ONNX as the verb writes it."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import tiny
import tiny_completion

from jaxaccum import export, programs, tasks
from jaxaccum.config import ConfigError
from jaxaccum.models import yolo
from jaxaccum.training import inference
from jaxaccum.training.checkpoint import Checkpoints

# Convolutions of every kind, and the pooling.
yolo.FAMILIES["pooled"] = yolo.Family(
    depth={"t": 1.0},
    width={"t": 0.25},
    max_channels={"t": 1024},
    depthwise_head=True,
    rows=(
        (-1, 1, "Conv", (32, 3, 2)),
        (-1, 1, "Conv", (64, 3, 2, 2)),
        (-1, 1, "SPPF", (64, 5)),
        (-1, 1, "Conv", (64, 3, 2)),
        ((2, 3), 1, "Detect", ()),
    ),
)


def a_run(folder, config, names, facts):
    """A workdir with initial weights, its statistics random, as the best ones of a run."""
    task = tasks.of(config).create(config, names, np.dtype(np.float32))
    params, stats = task.initialise(0)
    rng = np.random.default_rng(0)
    stats = jax.tree.map(lambda a: rng.uniform(0.5, 1.5, a.shape).astype(a.dtype), stats)
    meta = {"fingerprint": "", "config": config.to_dict(), "names": list(names), "facts": facts}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save_best(0, {"params": params, "stats": stats}, meta)
    return inference.load(folder)


@pytest.fixture
def detector(tmp_path):
    return a_run(tmp_path / "run", tiny.tiny_config(model="pooled-t"), ("a", "b", "c"), {})


@pytest.fixture
def completion(tmp_path):
    config = tiny_completion.tiny_config()
    return a_run(tmp_path / "run", config, (), {"normalised": True})


@pytest.mark.parametrize("batch", [0, 2])
def test_onnx(tmp_path, detector, batch):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    file = tmp_path / "out" / "program.onnx"
    facts = export.export(tmp_path / "run", file, batch=batch, format="onnx")
    assert facts == json.loads((tmp_path / "out" / "program.onnx.json").read_text())
    assert facts["names"] == ["a", "b", "c"] and facts["batch"] == (batch or "any")
    session = onnxruntime.InferenceSession(file)
    size = detector.task.image_size
    for count in [batch] if batch else [1, 3]:
        images = np.random.default_rng(count).integers(0, 256, (count, size, size, 3), np.uint8)
        found = session.run(["boxes", "probabilities"], {"images": images})
        expected = jax.jit(detector.task.predict)(detector.params, detector.stats, images)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_written(tmp_path, detector):
    with pytest.raises(ConfigError, match=r"'tflite'"):
        export.export(tmp_path / "run", tmp_path / "x", format="tflite")
    with pytest.raises(ConfigError, match="vulkan"):
        export.export(tmp_path / "run", tmp_path / "x", platforms=["vulkan"])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "format", "expected"),
    [
        ("m.stablehlo", "", "stablehlo"), ("m.MLIR", "", "stablehlo"), ("m.hlo", "", "stablehlo"),
        ("m", "", "stablehlo"), ("m.onnx", "", "onnx"), ("m.onnx", "onnx", "onnx"),
        ("m.v2", "onnx", "onnx"), ("m", "onnx", "onnx"), ("m.bin", "stablehlo", "stablehlo"),
    ],
)  # fmt: skip
def test_the_suffix_says_the_format(tmp_path, name, format, expected):
    assert programs.format_of(tmp_path / name, format) == expected


@pytest.mark.parametrize("name", ["x.pt", "x.onnxx", "x.safetensors", "x.stablehlo.json", "x.v2"])
def test_a_suffix_of_no_program(tmp_path, detector, name):
    """Before: StableHLO was written under that name, exit 0."""
    file = tmp_path / "out" / name
    with pytest.raises(ConfigError, match=r"no program .*\.onnx \(onnx\), \.stablehlo") as caught:
        export.export(tmp_path / "run", file)
    assert name in str(caught.value) and "--format" in str(caught.value)
    with pytest.raises(ConfigError, match="no program"):
        programs.write(detector, file)
    assert not file.parent.exists()


@pytest.mark.slow
def test_a_completion_network(tmp_path, completion):
    facts = export.export(tmp_path / "run", tmp_path / "x")
    assert "largest radius 1" in facts["input"]
    program = export.load_exported(tmp_path / "x")
    partial = np.random.default_rng(0).standard_normal((2, 2048, 3)).astype(np.float32)
    expected = jax.jit(completion.task.predict)(completion.params, completion.stats, partial)
    assert expected.shape[1] == completion.task.model.num_points
    for count in (1, 2):
        found = program(partial[:count])
        np.testing.assert_allclose(found, expected[:count], rtol=1e-4, atol=1e-4)
