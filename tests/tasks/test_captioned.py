"""Completion with captions: an exact contrast over the effective batch, and what reaches whom."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny import predicted
from tiny_completion import CAPTIONED, tiny_config

from jaxaccum import config as configs
from jaxaccum import data, evaluate, train
from jaxaccum.accumulate import Geometry, equivalence
from jaxaccum.data.cloud_sources import CroppedClouds
from jaxaccum.models import completion, pointbert
from jaxaccum.tasks.completion import captioned
from jaxaccum.training import inference, run
from jaxaccum.weights import transfer as weights
from jaxaccum.weights.transfer import WeightsError

NBS = 48
MODULE = captioned.MODULE
# Nothing but the contrast, so that its gradient is the gradient.
ALIGNED = {"loss.coarse": 0.0, "loss.fine": 0.0, "loss.denoise": 0.0, "loss.align": 1.0}


def few(split="train", length=NBS):
    """Embedded shapes, only a few of them."""
    return CroppedClouds(data.Shapes(split, length=length), split != "train", "median", 1, 2**28)


@pytest.fixture(autouse=True)
def _cache_elsewhere(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def prepared(geometry, **changes):
    """A run on `few`, its source and its initial values, in the dtype of `changes`."""
    dtype = changes.get("dtype", "float32")
    config = tiny_config(
        nbs=NBS, microbatch=geometry.microbatch, devices=geometry.devices, engine=geometry.engine,
        **{"bn_group": "frozen", "optimizer.name": "sgd", "steps": 1, **CAPTIONED, **changes},
    )  # fmt: skip
    source = captioned.with_captions(few(), config)
    this = run.prepare(config, names=source.names, samples=len(source), identity={})
    return this, source, this.task.initialise(0, np.dtype(dtype))


def first_batch(this, source):
    return next(run.make_stream(this, source).windows(0, [NBS], backend="threads"))


def trace(geometry, **changes):
    this, source, initial = prepared(geometry, **changes)
    return equivalence.trace(
        this.forward, this.rule, this.recipe, geometry, *initial,
        lambda: iter([first_batch(this, source)]), 1,
    )  # fmt: skip


def contrast_of(this, stats, batch):
    """The alignment term written down directly, as a function of (parameters, part of samples).

    Samples of one part know each other; the loss is the mean over all.
    """
    task = this.task

    def loss(params, part):
        net = {k: v for k, v in params.items() if k != MODULE}
        own = {k: v for k, v in stats.items() if k != MODULE}
        partial = jnp.asarray(batch["partial"], task.model.dtype)
        noise = task.noise(batch["epoch"], batch["index"], partial.dtype)
        variables = {"params": net, "batch_stats": own}
        clouds = task.model.apply(variables, partial, None, noise, batch["text"])
        p = task.alignment.embed(stats, clouds.fine)
        t = jnp.asarray(batch["text"], p.dtype)
        p, t = (a / jnp.linalg.norm(a, axis=1, keepdims=True) for a in (p, t))
        logits = jnp.exp(params[MODULE]["logit_scale"]) * p @ t.T
        same = batch["caption"][:, None] == batch["caption"]
        other = (same | (part[:, None] != part)) & ~np.eye(len(same), dtype=bool)
        logits = jnp.where(other, -jnp.inf, logits)
        right = jnp.arange(len(same))
        to_texts, to_clouds = jax.nn.log_softmax(logits), jax.nn.log_softmax(logits.T)
        return -jnp.mean(to_texts[right, right] + to_clouds[right, right]) / 2

    return jax.jit(jax.value_and_grad(loss))


@pytest.fixture(scope="module")
def in_one_pass():
    """Gradient and loss of the contrast over 48 clouds, and of naive accumulation by eights."""
    with jax.enable_x64(True):
        this, source, (params, stats) = prepared(Geometry(8), dtype="float64", **ALIGNED)
        batch = first_batch(this, source)
        contrast = contrast_of(this, stats, batch)
        loss, gradient = contrast(params, np.zeros(NBS, np.int32))
        naive = contrast(params, np.arange(NBS, dtype=np.int32) // 8)
        return jax.device_get((loss, gradient, naive))


def relative(a, b):
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


GEOMETRIES = [(m, d) for m in (1, 4, 8, 16) for d in (1, 2, 4)]
IN_CI = [(4, 4)]


@pytest.mark.parametrize(
    ("microbatch", "devices"),
    [
        pytest.param(*g, marks=[pytest.mark.slow] + [pytest.mark.long] * (g not in IN_CI))
        for g in GEOMETRIES
    ],
)
def test_contrast_over_the_effective_batch(x64, in_one_pass, microbatch, devices):
    """At any geometry the gradient is that of one pass over all 48."""
    loss, gradient, _ = in_one_pass
    found = trace(Geometry(microbatch, devices), dtype="float64", **ALIGNED)
    assert found.logs[0]["loss/align"] == pytest.approx(float(loss), rel=1e-12)
    assert relative(found.gradient, gradient) < 1e-12


@pytest.mark.slow
@pytest.mark.long
def test_contrast_through_multisteps(x64, in_one_pass):
    found = trace(Geometry(8, 2, "multisteps"), dtype="float64", **ALIGNED)
    assert relative(found.gradient, in_one_pass[1]) < 1e-12


@pytest.mark.slow
def test_naive_accumulation_is_another_loss(in_one_pass):
    """Eight clouds at a time know seven negatives instead of 47: lower loss, other gradient."""
    loss, gradient, (naive_loss, naive) = in_one_pass
    assert float(naive_loss) < 0.8 * float(loss)
    assert relative(naive, gradient) > 0.1


@pytest.mark.slow
@pytest.mark.long
def test_all_terms_with_groups_and_an_uneven_tail(x64):
    changes = {"dtype": "float64", "bn_group": 4, "nbs": 10}
    found = [
        trace_of_ten(g, changes)
        for g in (Geometry(12), Geometry(4, 2), Geometry(4, 1, "multisteps"))
    ]
    for other in found[1:]:
        differences = equivalence.differences(other, found[0])
        assert equivalence.within(differences, equivalence.Tolerance(1e-12, 1e-10)), differences


def trace_of_ten(geometry, changes):
    config = tiny_config(
        microbatch=geometry.microbatch, devices=geometry.devices, engine=geometry.engine,
        **{"optimizer.name": "sgd", "steps": 2, **CAPTIONED, **changes},
    )  # fmt: skip
    source = captioned.with_captions(few(), config)
    this = run.prepare(config, names=source.names, samples=len(source), identity={})
    return equivalence.trace(
        this.forward, this.rule, this.recipe, geometry,
        *this.task.initialise(0, np.float64),
        lambda: run.make_stream(this, source).windows(0, [10, 10], backend="threads"), 2,
    )  # fmt: skip


@pytest.mark.slow
def test_who_gets_a_gradient(in_one_pass):
    """The contrast alone teaches the network and its temperature; nothing frozen is a parameter."""
    _, gradient, _ = in_one_pass
    this, *_ = prepared(Geometry(8))
    flat = {
        "/".join(key.key for key in path): np.any(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
    }
    assert flat.pop(f"{MODULE}/logit_scale")
    assert not any(MODULE in path for path in flat)
    for path, learns in flat.items():
        if this.task.untrained(path):
            assert not learns, path
        elif path.endswith("kernel"):
            assert learns, path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A plain run, and one with captions that starts from it."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    patch.setattr(data, "open_clouds", lambda path, split, **_: few(split, 12))
    plain, text = (tmp_path_factory.mktemp(name) for name in ("plain", "text"))
    try:
        train.train(tiny_config(steps=3), plain)
        train.train(tiny_config(init_from=str(plain), **CAPTIONED), text)
    finally:
        patch.undo()
    return plain, text


@pytest.mark.slow
def test_a_run_with_captions(trained, monkeypatch):
    _, text = trained
    lines = [json.loads(line) for line in (text / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if line["kind"] == "train"]
    assert all(0 <= line["metrics/align_accuracy"] <= 1 for line in updates)
    total = sum(updates[0][f"loss/{k}"] for k in ("coarse", "fine", "denoise", "align"))
    assert updates[0]["loss"] == pytest.approx(total, rel=1e-5)
    assert lines[-1]["retrieval5"] >= lines[-1]["retrieval"] >= 0
    monkeypatch.setattr(data, "open_clouds", lambda path, split, **_: few(split, 8))
    monkeypatch.setattr(data, "has_unseen", lambda path: False)
    found = evaluate.evaluate(text)
    chosen = {"retrieval", "retrieval_chance", "retrieval_of_truth"}
    assert chosen <= set(found)


@pytest.mark.slow
def test_frozen_weights_stay(trained):
    """After training they are what they were at the start, bit for bit; the rest is not."""
    _, text = trained
    run_ = inference.load(text)
    params, stats = run_.task.initialise(run_.config.seed)
    for a, b in zip(
        jax.tree.leaves(stats[MODULE]), jax.tree.leaves(run_.stats[MODULE]), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert params[MODULE]["logit_scale"] != run_.params[MODULE]["logit_scale"]


@pytest.mark.slow
def test_a_plain_run_is_where_the_captioned_one_starts(trained):
    """With the weights of the plain run and no columns for captions yet, both predict the same."""
    plain = inference.load(trained[0])
    this, source, (params, stats) = prepared(Geometry(2))
    from jaxaccum.weights.initial import load_initial

    params, stats, report = load_initial(
        trained[0], this.task.model, params, stats, (), this.task.loss_modules
    )
    assert report.widened and not report.left
    assert MODULE in params and MODULE in stats
    batch = first_batch(this, source)
    cloud = batch["partial"][:2]
    ours = this.task.predict(params, stats, cloud, batch["text"][:2])
    theirs = plain.task.predict(plain.params, plain.stats, cloud)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_predict_with_and_without_a_caption(trained, tmp_path, capsys):
    plain, text = (inference.load(folder) for folder in trained)
    data.write_cloud(tmp_path / "a.ply", few("val", 2).sample(0, None)[0])
    found = {}
    for caption in ("", "a small round table"):
        out = tmp_path / (caption or "none")
        predicted(text, tmp_path / "a.ply", out, format="npy", caption=caption)
        found[caption] = np.load(out / "a.npy")
    assert "no --caption" in capsys.readouterr().out
    assert np.abs(found[""] - found["a small round table"]).max() > 1e-4
    with pytest.raises(configs.ConfigError, match="learned without captions"):
        predicted(plain, tmp_path / "a.ply", tmp_path / "o", caption="a chair")


@pytest.mark.slow
def test_weights_of_the_point_encoder_come_from_a_file(tmp_path):
    """A file with colour gives the same vectors as the encoder it holds."""
    this, _, (_, stats) = prepared(Geometry(2))
    table = pointbert.Table(2, 24, 2, groups=16, neighbours=8, features=16, channels=6)
    frozen = pointbert.initialise(table, 3, 64)
    state = weights.to_reference(frozen.params) | weights.to_reference(frozen.stats)
    state = {f"module.point_encoder.{k}": np.ascontiguousarray(v) for k, v in state.items()}
    file = tmp_path / "ulip.safetensors"
    save_file(state | {"module.pc_projection": frozen.projection}, file)
    loaded, lines = this.task.alignment.load(str(file), stats)
    assert "all" in lines[0]
    cloud = np.random.default_rng(0).normal(size=(2, 64, 3)).astype(np.float32)
    theirs = pointbert.embed(pointbert.PointBert(table), frozen, cloud)
    np.testing.assert_allclose(this.task.alignment.embed(loaded, cloud), theirs, atol=1e-5)
    narrow = pointbert.initialise(table, 3, 32)
    save_file(state | {"module.pc_projection": narrow.projection}, file)
    with pytest.raises(WeightsError, match="another text encoder"):
        this.task.alignment.load(str(file), stats)


def test_retrieval():
    texts = np.eye(4)
    vectors = np.asarray([[1, 0, 0, 0], [0.9, 1, 0, 0], [1, 0, 0, 0.5]])
    found = captioned.retrieval(vectors, np.asarray([0, 1, 3]), texts)
    assert found == {"retrieval": 2 / 3, "retrieval5": 1.0, "retrieval_chance": 0.25}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text.point_encoder": "pointbert"}, "needs a text.encoder"),
        ({"text.encoder": "hashed", "text.point_encoder": "pointbret"}, "pointbert-small"),
        ({"text.encoder": "hashed", "text.point_weights": "x"}, "point_encoder"),
        ({"text.encoder": "bert"}, "'hashed'"),
        ({"text.encoder": "hashed", "model": "pointr-tiny"}, "takes no captions"),
    ],
)
def test_configs_that_cannot_be(changes, message):
    with pytest.raises(configs.ConfigError, match=message):
        run.prepare(tiny_config(**changes), names=("a",), samples=12, identity={})


def test_untrained_layers_are_known():
    """With captions the plain layer for queries is left alone, and the other way round."""
    for text in (False, True):
        path = f"base_model.mlp_query{'' if text else '_text'}.0/kernel"
        assert completion.untrained("adapointr-tiny", path, text)
