"""Weights of PoinTr and AdaPoinTr in and out: files of their authors, names, what does not fit."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from torch_files import Call, Name, New, TorchFile, numpy_scalar

from jaxaccum.models import completion
from jaxaccum.weights import torch_file
from jaxaccum.weights import transfer as weights
from jaxaccum.weights.transfer import Weights, WeightsError

NAME = "adapointr-small"


@pytest.fixture(scope="module")
def model():
    """A model with initial values, and its state dict."""
    model = completion.create(NAME)
    params, stats = completion.initialise(model, 0)
    rng = np.random.default_rng(0)
    stats = jax.tree.map(lambda a: rng.uniform(0.5, 1.5, a.shape).astype(a.dtype), stats)
    return model, params, stats, weights.for_pytorch(model, params, stats, 7)


def other(seed=1):
    return completion.initialise(completion.create(NAME), seed)


def metrics():
    """An object of the authors' class, as their checkpoints hold it."""
    return New(Name("utils.metrics", "Metrics"), {
        "metric_name": "CDL1", "_items": [{"name": "F-Score", "eval_object": None}],
        "_values": [0.8, numpy_scalar(6.5)],
    })  # fmt: skip


@pytest.mark.parametrize("top", ["base_model", "model"])
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_a_checkpoint_of_the_authors(tmp_path, model, top, wrapper):
    file = TorchFile()
    network, params, stats, state = model
    tensors = {f"{wrapper}{k}": file.tensor(v) for k, v in state.items()}
    if wrapper:  # inside of a key too
        inner = next(k for k in tensors if "decode_head" in k)
        tensors[inner.replace("decode_head.", "decode_head.module.")] = tensors.pop(inner)
    moments = {"state": {0: {"exp_avg": file.tensor(np.zeros(3, np.float32))}}}
    path = file.write(tmp_path / "x.pth", {
        top: Call(Name("collections", "OrderedDict"), (list(tensors.items()),)),
        "optimizer": moments, "epoch": 3, "metrics": metrics(), "best_metrics": metrics(),
    })  # fmt: skip
    found = torch_file.read(path)
    assert set(found.state) == set(state)
    assert weights.guess_model(found) == NAME
    new, new_stats, report = weights.transfer(found, network, *other())
    assert report.complete and report.share == 1 and not report.unused
    for a, b in ((new, params), (new_stats, stats)):
        assert all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def test_other_classes_of_theirs_are_refused(tmp_path):
    for kind in (Name("utils.metrics", "os"), Name("utils.builder", "Metrics")):
        path = TorchFile().write(tmp_path / "x.pth", {"metrics": New(kind, {})})
        with pytest.raises(WeightsError, match=f"refused: .*{kind.module}.{kind.name}"):
            torch_file.read(path)


def test_there_and_back_bit_for_bit(tmp_path, model):
    network, params, _, state = model
    assert state["base_model.grouper.input_trans.weight"].shape == (8, 3, 1)
    assert state["base_model.grouper.layer2.0.weight"].shape == (64, 64, 1, 1)
    assert state["base_model.encoder.blocks.blocks.0.attn.qkv.weight"].shape == (576, 192)
    kernel = params["base_model.encoder.blocks.blocks.0"]["attn"]["qkv"]["kernel"]
    np.testing.assert_array_equal(
        state["base_model.encoder.blocks.blocks.0.attn.qkv.weight"], kernel.T
    )
    assert state["increase_dim.1.num_batches_tracked"] == 7
    save_file(state, tmp_path / "x.safetensors")
    found = torch_file.read(tmp_path / "x.safetensors")
    again = weights.for_pytorch(network, *weights.transfer(found, network, *other())[:2], 7)
    first = load_file(tmp_path / "x.safetensors")
    assert first.keys() == again.keys()
    for key, value in again.items():
        np.testing.assert_array_equal(value, first[key], key)


def test_what_does_not_fit_stays_at_its_initial_values(model):
    network, *_, state = model
    state = dict(state)
    del state["base_model.encoder.norm.bias"]
    state["reduce_map.weight"] = state["reduce_map.weight"][:, :-1]
    state["base_model.text_query_generator.mlp.0.weight"] = np.zeros((3, 3), np.float32)
    initial = other()
    new, _, report = weights.transfer(Weights(state), network, *initial)
    assert report.left == {"base_model.encoder.norm.bias": "not in the file",
                           "reduce_map.weight": "of another shape in the file"}  # fmt: skip
    assert report.unused == ("base_model.text_query_generator.mlp.0.weight",)
    np.testing.assert_array_equal(new["reduce_map"]["kernel"], initial[0]["reduce_map"]["kernel"])
    assert any("reduce_map" in line for line in report.lines())


def test_the_wrong_model_is_refused_with_the_right_one(model):
    *_, state = model
    pointr = completion.create("pointr-small")
    with pytest.raises(WeightsError, match=f"of pointr-small are there.*fits {NAME} whole"):
        weights.transfer(Weights(state), pointr, *completion.initialise(pointr, 0))
    with pytest.raises(WeightsError, match="no model we know"):
        weights.guess_model(Weights({"base_model.x": np.zeros(3)}))


@pytest.mark.slow
def test_models_that_differ_in_no_tensor_are_not_guessed():
    def blank(name):
        shapes = weights.shapes(name).items()
        return Weights({k: np.broadcast_to(np.float32(0), s) for k, s in shapes}, origin="x.pth")

    assert weights.guess_model(blank("adapointr-pcn")) == "adapointr-pcn"
    assert weights.guess_model(blank("pointr-shapenet")) == "pointr-shapenet"
    found = dict(weights.fitting_models(blank("adapointr-projected")))
    assert found["adapointr-shapenet"] == found["adapointr-projected"] == 1 > found["adapointr-pcn"]
    with pytest.raises(WeightsError, match="adapointr-shapenet and adapointr-projected have these"):
        weights.guess_model(blank("adapointr-shapenet"))


@pytest.mark.parametrize("fixture", ["adapointr-projected", "pointr-shapenet55"])
def test_the_state_dict_is_whole(shared, fixture):
    """Keys and shapes are those of the reference, so that its strict loading takes them."""
    facts = json.loads((shared / "parity/completion" / f"{fixture}.json").read_text())
    name = fixture.removesuffix("55")
    shapes = {key: list(shape) for key, shape in weights.shapes(name).items()}
    counts = {k: s for k, s in facts["state"].items() if k.endswith("num_batches_tracked")}
    assert shapes | counts == facts["state"]
    statistics = set(facts["stat_names"])
    trained = [math.prod(s) for k, s in shapes.items() if k not in statistics]
    assert sum(trained) == facts["parameters"]
