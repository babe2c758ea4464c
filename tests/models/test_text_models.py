"""AdaPoinTr with captions: sizes, what captions change, and weights of networks without them."""

from __future__ import annotations

import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccum.accumulate import Groups
from jaxaccum.models import completion
from jaxaccum.weights import transfer as weights
from jaxaccum.weights.transfer import Weights

WIDTH = 5  # of a caption's vector
TINY = completion.Table(
    "adapointr", 32, 4, (64, 32), ("attn",), ("attn",), ("attn",),
    grouper="pn", width=24, heads=3, global_width=32, denoise=8, num_input=128,
)  # fmt: skip
TEXT, PLAIN = "base_model.mlp_query_text", "base_model.mlp_query"
LOOKED_AT = ("base_model.increase_dim.2", f"{TEXT}.0")


def network(text_width=0, dtype=jnp.float64):
    return completion.AdaPoinTr("tiny", TINY, dtype, text_width=text_width)


@functools.cache
def values(text_width=WIDTH, seed=0):
    """Parameters and statistics, none of them zero and each from its name."""
    params, stats = completion.initialise(network(text_width), seed, np.float64)
    return jax.tree.map(lambda a: 4 * a + 0.01 if a.ndim > 1 else a + 0.01, params), stats


@functools.cache
def forward(text_width=WIDTH):
    """Clouds, and what LOOKED_AT gave, by (params, stats, partial, text or None)."""
    model = network(text_width)

    def apply(params, stats, partial, text):
        found, changed = model.apply(
            {"params": params, "batch_stats": stats}, partial, None, None, text,
            mutable=["intermediates"],
            capture_intermediates=lambda m, method: method == "__call__" and m.name in LOOKED_AT,
        )  # fmt: skip
        return found, {k: v["__call__"][0] for k, v in changed["intermediates"].items()}

    return jax.jit(apply)


def clouds(text_width=WIDTH):
    """Completed clouds, with running statistics."""
    return lambda *inputs: forward(text_width)(*inputs)[0]


@functools.cache
def backward():
    """Clouds and the gradient of a number of them, by (params, stats, text), as in training."""
    model = network(WIDTH)
    partial, noise = clouds_of(2), 0.01 * clouds_of(2, 8)[:, :8]

    def number(params, stats, text):
        groups = Groups(2, jnp.ones(2))
        found, _ = model.apply(
            {"params": params, "batch_stats": stats}, partial, groups, noise, text,
            mutable=["moments"],
        )  # fmt: skip
        value = sum(jnp.sum(jnp.square(a) * jnp.cos(jnp.arange(a.size).reshape(a.shape)))
                    for a in found)  # fmt: skip
        return value, found

    return jax.jit(jax.grad(number, argnums=(0, 2), has_aux=True))


def clouds_of(samples, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (samples, 128, 3))


def texts_of(samples, seed=0, width=WIDTH):
    return np.random.default_rng(seed + 50).standard_normal((samples, width))


def equal(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(map(np.array_equal, a, b))


def without_text(params):
    return {name: value for name, value in params.items() if not name.startswith(TEXT)}


# --- Sizes ---


@pytest.mark.parametrize(("width", "size"), [(1280, 3_806_592), (512, 3_020_160)])
def test_sizes(width, size):
    model = completion.create("adapointr-projected", text_width=width)
    example = jax.ShapeDtypeStruct((1, 2048, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), example)
    shapes = weights.reference_shapes(variables["params"])
    layer = {key: shape for key, shape in shapes.items() if key.startswith(f"{TEXT}.")}
    assert sum(map(np.prod, layer.values())) == size
    assert set(layer) == {f"{TEXT}.{i}.{k}" for i in (0, 2, 4) for k in ("weight", "bias")}
    assert layer[f"{TEXT}.0.weight"] == (1024, 1024 + width + 3)
    plain = weights.shapes("adapointr-projected").items()
    assert plain <= (shapes | weights.reference_shapes(variables["batch_stats"])).items()


def test_pointr_takes_no_captions():
    with pytest.raises(ValueError, match=r"pointr-pcn takes no captions.*adapointr-pcn"):
        completion.create("pointr-pcn", text_width=512)
    model = completion.create("pointr-small")
    with pytest.raises(ValueError, match="pointr-small takes no captions"):
        model.init(jax.random.key(0), jnp.zeros((1, 2048, 3)), None, None, jnp.zeros((1, 5)))


@pytest.mark.parametrize(
    ("width", "given", "message"),
    [(0, (1, 5), "created without captions"), (5, (1, 6), r"shape \(1, 5\); got \(1, 6\)"),
     (5, (2, 5), r"shape \(1, 5\); got \(2, 5\)")],
)  # fmt: skip
def test_captions_of_another_shape(width, given, message):
    model = network(width, jnp.float32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x, t: model.init(jax.random.key(0), x, None, None, t),
                       jnp.zeros((1, 128, 3)), jnp.zeros(given))  # fmt: skip


# --- What captions change ---


def test_without_captions_nothing_changes(x64):
    """Initial values and clouds are those of a network that cannot have captions."""
    params, stats = values()
    plain, plain_stats = values(0)
    assert equal(without_text(params), plain) and equal(stats, plain_stats)
    assert len(params) == len(plain) + 3
    partial = clouds_of(4)
    assert equal(clouds()(params, stats, partial, None), clouds(0)(plain, stats, partial, None))


def test_a_sample_sees_its_own_caption_alone(x64):
    params, stats = values()
    partial, text = clouds_of(4), texts_of(4)
    together = clouds()(params, stats, partial, text)
    alone = [clouds()(params, stats, partial[i : i + 1], text[i : i + 1]) for i in range(4)]
    for a, b in zip(together[:2], zip(*(c[:2] for c in alone), strict=True), strict=True):
        np.testing.assert_allclose(a, np.concatenate(b), rtol=0, atol=1e-12 * np.abs(a).max())
    text[2] = texts_of(1, 9)
    changed = clouds()(params, stats, partial, text)
    assert equal(changed.coarse, together.coarse)  # queries are chosen without it
    same = [np.array_equal(a, b) for a, b in zip(changed.fine, together.fine, strict=True)]
    assert same == [True, True, False, True]


def test_queries_are_those_of_the_formula(x64):
    """[cloud, caption, place] through three linear maps, by the columns of the first."""
    params, stats = values()
    text = texts_of(4)
    found, inner = forward()(params, stats, clouds_of(4), text)
    everywhere, first = (inner[name] for name in LOOKED_AT)
    whole = np.concatenate([np.asarray(everywhere).max(1), text], axis=-1)
    inputs = np.concatenate([np.repeat(whole[:, None], 32, 1), found.coarse], axis=-1)
    expected = inputs @ params[f"{TEXT}.0"]["kernel"] + params[f"{TEXT}.0"]["bias"]
    np.testing.assert_allclose(first, expected, rtol=1e-12)


def test_every_parameter_that_should_learns(x64, monkeypatch):
    """With captions the layer for queries without them has no gradient, and the other has."""
    monkeypatch.setitem(completion.MODELS, "tiny", TINY)
    params, stats = values()
    (gradient, pull), found = backward()(params, stats, texts_of(2))
    assert found.denoised.shape == (2, 8 * 4, 3)
    paths = {"/".join(path): g for path, g in flax.traverse_util.flatten_dict(gradient).items()}
    zero = {path for path, g in paths.items() if not np.any(g)}
    assert zero == {path for path in paths if completion.untrained("tiny", path, text=True)}
    assert f"{PLAIN}.0/kernel" in zero and f"{TEXT}.0/kernel" not in zero
    assert np.abs(pull).min() > 0
    swapped = {path for path in paths if completion.untrained("tiny", path)} ^ zero
    assert swapped == {path for path in paths if path.startswith(PLAIN)}


# --- Weights ---


def state_of(params, stats):
    state = weights.to_reference(params) | weights.to_reference(stats)
    return Weights({k: v.astype(np.float32) for k, v in state.items()}, origin="x.pth")


def test_a_network_without_captions_goes_on_with_them(x64):
    """The same clouds, whatever the captions; a gradient for the caption's columns at once."""
    plain, stats = values(0)
    params, new_stats, report = weights.transfer(
        state_of(plain, stats), network(WIDTH), *values(seed=1)
    )
    assert set(report.widened) == {f"{TEXT}.{i}.{k}" for i in (0, 2, 4) for k in ("weight", "bias")}
    assert not report.left and not report.unused and not report.complete
    assert any("without captions until it learns" in line and TEXT in line
               for line in report.lines())  # fmt: skip
    kernel = params[f"{TEXT}.0"]["kernel"]
    assert not kernel[32 : 32 + WIDTH].any() and kernel.shape == (32 + WIDTH + 3, 32)
    plain = without_text(params)
    partial = clouds_of(4)
    expected = clouds(0)(plain, new_stats, partial, None)
    for seed in (0, 1):
        found = clouds()(params, new_stats, partial, texts_of(4, seed))
        assert equal(found, expected)
    gradient = backward()(params, new_stats, texts_of(2))[0][0]
    assert np.abs(gradient[f"{TEXT}.0"]["kernel"][32 : 32 + WIDTH]).max() > 0


def test_that_start_is_an_option():
    plain, stats = values(0)
    initial = values(seed=1)
    params, _, report = weights.transfer(
        state_of(plain, stats), network(WIDTH), *initial, widen=False
    )
    assert set(report.left.values()) == {"not in the file"} and len(report.left) == 6
    assert not report.widened
    for i in (0, 2, 4):
        assert equal(params[f"{TEXT}.{i}"], initial[0][f"{TEXT}.{i}"])
    assert equal(
        params[f"{PLAIN}.4"]["kernel"], np.float32(plain[f"{PLAIN}.4"]["kernel"]).astype(float)
    )


def test_other_widths_do_not_start_so():
    """A layer that fits by half would be neither the old one nor a fresh one."""
    plain, stats = values(0)
    found = state_of(plain, stats)
    found.state[f"{PLAIN}.2.weight"] = found.state[f"{PLAIN}.2.weight"][:-1]
    _, _, report = weights.transfer(found, network(WIDTH), *values(seed=1))
    assert not report.widened
    assert {k for k in report.left if k.startswith(f"{TEXT}.")} == {
        f"{TEXT}.{i}.{k}" for i in (0, 2, 4) for k in ("weight", "bias")
    }


def fork():
    """A checkpoint of the authors with captions, in little."""
    params, stats = values()
    found = state_of(params, stats)
    assert weights.text_width(found) == WIDTH
    blank = np.zeros((3, 3), np.float32)
    beside = [f"base_model.text_encoder.text_model.transformer.resblocks.{i}.mlp.c_fc.weight"
              for i in range(30)]  # fmt: skip
    beside += [f"base_model.text_query_generator.mlp.{i}.weight" for i in (0, 3, 6)]
    beside += ["ulip_loss_module.logit_scale", "ulip_loss_module.ulip_encoder.pc_projection",
               "ulip_loss_module.ulip_encoder.point_encoder.norm.weight"]  # fmt: skip
    return dataclasses.replace(found, state=found.state | dict.fromkeys(beside, blank)), params


def test_a_checkpoint_with_captions():
    found, params = fork()
    new, _, report = weights.transfer(found, network(WIDTH), *values(seed=1))
    assert not report.left and not report.widened and report.complete and len(report.unused) == 36
    np.testing.assert_array_equal(
        new[f"{TEXT}.0"]["kernel"], np.float32(params[f"{TEXT}.0"]["kernel"])
    )
    lines = report.lines()
    assert lines[1] == (
        "  not used of the file: base_model.text_encoder, base_model.text_query_generator, "
        "ulip_loss_module, ulip_loss_module.ulip_encoder"
    )
    assert len(lines) == 3 and "knows its vectors, not those of CLIP" in lines[2]


def test_a_checkpoint_with_captions_into_other_networks(x64):
    """Without captions its layer for them is not used; with others the first map does not fit."""
    found, _ = fork()
    _, _, report = weights.transfer(found, network(0), *values(0, seed=1))
    assert report.complete and f"{TEXT}.0.weight" in report.unused
    assert not any("knows its vectors" in line for line in report.lines())
    _, _, report = weights.transfer(found, network(7), *values(7, seed=1))
    assert report.left == {f"{TEXT}.0.weight": "of another shape in the file"}
    assert not report.widened
    plain, stats = values(0)
    assert weights.text_width(state_of(plain, stats)) == 0
    assert weights.text_width(Weights({})) == 0
