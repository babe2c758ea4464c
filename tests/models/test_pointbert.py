"""The frozen point encoder: its size, its formula, its gradient in the points, its files."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxaccum.models import init, pointbert
from jaxaccum.weights import torch_file
from jaxaccum.weights import transfer as weights
from jaxaccum.weights.transfer import Weights, WeightsError

TINY = pointbert.Table(2, 12, 2, groups=6, neighbours=4, features=8)


def clouds_of(samples, seed=0, count=24):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (samples, count, 3))


@functools.cache
def frozen(channels=3) -> pointbert.Frozen:
    """Weights in float64 of which each matters."""
    table = dataclasses.replace(TINY, channels=channels)
    made = pointbert.initialise(table, 0, 5, np.float64)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: a + rng.uniform(0.1, 0.4, a.shape), made)


@functools.cache
def values_and_pulls(channels=3, remat=False):
    """Vectors of clouds and the gradient of a number of them, by (weights, clouds)."""
    table = dataclasses.replace(TINY, channels=channels)
    model = pointbert.PointBert(table, jnp.float64, remat)

    def number(clouds, weights):
        vectors = pointbert.embed(model, weights, clouds)
        return jnp.sum(jnp.sin(vectors) * jnp.arange(1, 1 + vectors.shape[1])), vectors

    function = jax.jit(jax.value_and_grad(number, has_aux=True))
    return lambda weights, clouds: function(clouds, weights)


# --- Sizes ---


def test_sizes():
    shapes = jax.eval_shape(
        lambda x: pointbert.PointBert(pointbert.table_of("pointbert")).init(jax.random.key(0), x),
        jax.ShapeDtypeStruct((1, 512, 3), jnp.float32),
    )
    assert init.count(shapes["params"]) == 32_498_688
    keys = weights.reference_shapes(shapes["params"]) | weights.reference_shapes(
        shapes["batch_stats"]
    )
    assert len(keys) == 226 - 2  # of which two count batches
    assert keys["encoder.first_conv.0.weight"] == (128, 3, 1)
    assert keys["encoder.second_conv.1.running_var"] == (512,)
    assert keys["blocks.blocks.17.attn.qkv.weight"] == (1152, 384)
    assert "blocks.blocks.0.attn.qkv.bias" not in keys
    assert keys["cls_pos"] == (1, 1, 384)
    small = pointbert.initialise(pointbert.table_of("pointbert-small"), 0)
    assert small.projection.shape == (192, 1280) and init.count(small.params) < 5e5


def test_unknown_names_and_clouds_too_small():
    with pytest.raises(ValueError, match=r"'pointbirt': did you mean pointbert"):
        pointbert.table_of("pointbirt")
    with pytest.raises(ValueError, match="6 groups of 4 points; got clouds of 5 points"):
        pointbert.embed(pointbert.PointBert(TINY), frozen(), clouds_of(1, count=5))


def test_random_weights_are_of_the_seed_alone():
    first, again, other = (pointbert.initialise(TINY, seed, 5) for seed in (3, 3, 4))
    assert all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(again)))
    for name in ("cls_token", "cls_pos"):
        assert first.params[name].any() and not np.array_equal(
            first.params[name], other.params[name]
        )
    assert not np.array_equal(first.projection, other.projection)
    assert first.projection.dtype == np.float32


# --- The formula ---


def farthest(cloud, count):
    chosen = [0]
    while len(chosen) < count:
        gaps = np.linalg.norm(cloud[:, None] - cloud[chosen], axis=-1).min(axis=1)
        chosen.append(int(gaps.argmax()))
    return chosen


def formula(state: dict[str, Any], projection, cloud, table):
    """One cloud's vector, from the encoder's description, in the layouts of PyTorch."""

    def linear(name, x):
        kernel = state[f"{name}.weight"]
        return x @ kernel.reshape(len(kernel), -1).T + state.get(f"{name}.bias", 0)

    def batch_norm(name, x):
        part = {k: state[f"{name}.{k}"] for k in ("weight", "bias", "running_mean", "running_var")}
        normal = (x - part["running_mean"]) / np.sqrt(part["running_var"] + 1e-5)
        return normal * part["weight"] + part["bias"]

    def layer_norm(name, x):
        normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return normal * state[f"{name}.weight"] + state[f"{name}.bias"]

    def gelu(x):
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

    def pair(name, x):
        x = batch_norm(f"{name}.1", linear(f"{name}.0", x))
        return linear(f"{name}.3", np.where(x > 0, x, 0))

    def attention(name, x):
        q, k, v = np.split(linear(f"{name}.qkv", x), 3, axis=-1)
        heads = []
        for a, b, c in zip(*(np.split(part, table.heads, axis=-1) for part in (q, k, v)),
                           strict=True):  # fmt: skip
            logits = a @ b.T / math.sqrt(a.shape[-1])
            share = np.exp(logits - logits.max(-1, keepdims=True))
            heads.append(share / share.sum(-1, keepdims=True) @ c)
        return linear(f"{name}.proj", np.concatenate(heads, axis=-1))

    centres = cloud[farthest(cloud, table.groups)]
    tokens = []
    for centre in centres:
        order = np.argsort(np.linalg.norm(cloud - centre, axis=1))[: table.neighbours]
        x = cloud[order] - centre
        if table.channels == 6:
            x = np.concatenate([x, np.full(x.shape, 0.4)], axis=-1)
        x = pair("encoder.first_conv", x)
        x = np.concatenate([np.broadcast_to(x.max(0), x.shape), x], axis=-1)
        tokens.append(pair("encoder.second_conv", x).max(0))
    x = linear("reduce_dim", np.stack(tokens))
    place = linear("pos_embed.2", gelu(linear("pos_embed.0", centres)))
    x = np.concatenate([state["cls_token"][0], x])
    place = np.concatenate([state["cls_pos"][0], place])
    for i in range(table.depth):
        block = f"blocks.blocks.{i}"
        x = x + place
        x = x + attention(f"{block}.attn", layer_norm(f"{block}.norm1", x))
        hidden = gelu(linear(f"{block}.mlp.fc1", layer_norm(f"{block}.norm2", x)))
        x = x + linear(f"{block}.mlp.fc2", hidden)
    x = layer_norm("norm", x)
    return np.concatenate([x[0], x[1:].max(0)]) @ projection


def state_of(made: pointbert.Frozen) -> dict[str, np.ndarray]:
    return weights.to_reference(made.params) | weights.to_reference(made.stats)


@pytest.mark.parametrize("channels", [3, 6])
def test_vectors_are_those_of_the_formula(x64, channels):
    made, clouds = frozen(channels), clouds_of(2)
    clouds[:, 1] = 0.001  # near the origin is no padding
    table = dataclasses.replace(TINY, channels=channels)
    expected = [formula(state_of(made), made.projection, cloud, table) for cloud in clouds]
    (_, vectors), _ = values_and_pulls(channels)(made, clouds)
    np.testing.assert_allclose(vectors, expected, rtol=1e-10)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3 * np.abs(vectors).max()


def test_the_gradient_reaches_the_points(x64):
    """Against differences; of the points in some group; the same if computed anew."""
    made, clouds = frozen(), clouds_of(2)
    pulls = np.asarray(values_and_pulls()(made, clouds)[1])
    _, again = values_and_pulls(remat=True)(made, clouds)
    np.testing.assert_allclose(again, pulls, rtol=0, atol=1e-12 * np.abs(pulls).max())
    direction = np.random.default_rng(2).standard_normal(clouds.shape)
    step = 1e-7
    ahead, behind = (values_and_pulls()(made, clouds + t * direction)[0][0] for t in (step, -step))
    slope = float(np.vdot(pulls, direction))
    assert float(ahead - behind) / (2 * step) == pytest.approx(slope, rel=1e-5)
    centres = farthest(clouds[0], TINY.groups)
    assert np.abs(pulls[0][centres]).min() > 0
    near = {i for c in centres
            for i in np.argsort(np.linalg.norm(clouds[0] - clouds[0][c], axis=1))[:4]}  # fmt: skip
    outside = sorted(set(range(24)) - near)
    assert outside and not np.any(pulls[0][outside])


def test_a_cloud_does_not_know_its_batch(x64):
    made, clouds = frozen(), clouds_of(4, seed=3)
    (_, together), pulls = values_and_pulls()(made, clouds)
    for half in (slice(0, 2), slice(2, 4)):
        (_, alone), own = values_and_pulls()(made, clouds[half])
        np.testing.assert_allclose(together[half], alone, rtol=1e-12)
        np.testing.assert_allclose(pulls[half], own, rtol=0, atol=1e-12 * np.abs(pulls).max())


def test_half_precision_gives_wide_vectors():
    made = jax.tree.map(np.float32, frozen())
    clouds = clouds_of(2).astype(np.float32)
    models = (pointbert.PointBert(TINY), pointbert.PointBert(TINY, jnp.bfloat16))
    wide, narrow = (jax.jit(pointbert.embed, static_argnums=0)(m, made, clouds) for m in models)
    assert narrow.dtype == wide.dtype == jnp.float32
    assert 0 < np.abs(wide - narrow).max() < 0.1 * np.abs(wide).max()


# --- Files ---


@pytest.fixture
def tiny_name(monkeypatch):
    monkeypatch.setitem(pointbert.MODELS, "tiny", TINY)
    return "tiny"


def file_of(channels=3, before="", inside="point_encoder."):
    """A file's state dict, its keys with those prefixes."""
    made = jax.tree.map(np.float32, frozen(channels))
    state = {f"{before}{inside}{key}": value for key, value in state_of(made).items()}
    for name in ("first_conv", "second_conv"):
        state[f"{before}{inside}encoder.{name}.1.num_batches_tracked"] = np.int64(7)
    state[f"{before}pc_projection"] = made.projection
    return made, state


@pytest.mark.parametrize("channels", [3, 6])
@pytest.mark.parametrize(
    ("before", "inside"),
    [("", ""), ("", "point_encoder."), ("module.", "point_encoder."),
     ("ulip_loss_module.ulip_encoder.", "point_encoder."),
     ("module.ulip_loss_module.ulip_encoder.", "point_encoder.module.")],
)  # fmt: skip
def test_files_are_loaded_whole(tiny_name, channels, before, inside):
    made, state = file_of(channels, before, inside)
    loaded = pointbert.load(Weights(state, origin="x.pt"), tiny_name)
    assert loaded.table == dataclasses.replace(TINY, channels=channels)
    assert all(map(np.array_equal, jax.tree.leaves(loaded.weights), jax.tree.leaves(made)))
    assert jax.tree.structure(loaded.weights) == jax.tree.structure(made)
    assert loaded.log_scale is None
    assert len(loaded.lines) == 1 and "tiny from x.pt: all 49 tensors" in loaded.lines[0]
    assert ("grey" in loaded.lines[0]) == (channels == 6)


def test_a_checkpoint_with_captions_through_a_file(tmp_path, tiny_name):
    """What else such a checkpoint holds is reported, its scale found."""
    made, state = file_of(3, "module.ulip_loss_module.ulip_encoder.")
    state["module.ulip_loss_module.logit_scale"] = np.float32(2.659)
    state["module.base_model.reduce_map.weight"] = np.zeros((2, 2), np.float32)
    state = {key: np.array(value, order="C") for key, value in state.items()}
    save_file(state, tmp_path / "x.safetensors")
    loaded = pointbert.load(torch_file.read(tmp_path / "x.safetensors"), tiny_name)
    assert all(map(np.array_equal, jax.tree.leaves(loaded.weights), jax.tree.leaves(made)))
    assert loaded.log_scale == pytest.approx(2.659)
    assert loaded.lines[1] == "  not used of the file: base_model.reduce_map.weight"


def test_what_fits_by_half_is_refused(tiny_name):
    def refused(change, *words, channels=3):
        _, state = file_of(channels)
        change(state)
        with pytest.raises(WeightsError) as error:
            pointbert.load(Weights(state, origin="x.pt"), tiny_name)
        for word in ("x.pt", *words):
            assert word in str(error.value)

    refused(lambda s: s.pop("point_encoder.cls_pos"), "48 are there", "missing: cls_pos")
    refused(lambda s: s.pop("pc_projection"), "missing: pc_projection")
    refused(lambda s: s.update(pc_projection=np.zeros((12, 5))), "pc_projection (12, 5) for (24,")
    refused(lambda s: s.update({"point_encoder.reduce_dim.weight": np.zeros((12, 9))}),
            "of another shape: reduce_dim.weight (12, 9) for (12, 8)")  # fmt: skip
    refused(lambda s: s.update({"point_encoder.encoder.first_conv.0.weight": np.zeros((4, 5, 1))}),
            "(4, 5, 1) for (4, 3, 1)")  # fmt: skip
    refused(lambda s: s.update({"point_encoder.blocks.blocks.2.norm1.bias": np.zeros(12)}),
            "too many: blocks.blocks.2.norm1.bias")  # fmt: skip
    refused(lambda s: s.update({"point_encoder.norm.bias": np.full(12, np.nan)}), "not finite")
    refused(lambda s: s.clear(), "0 are there", "and 43 more")
    with pytest.raises(ValueError, match="no point encoder named 'x'"):
        pointbert.load(Weights({}), "x")
