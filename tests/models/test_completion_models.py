"""PoinTr and AdaPoinTr: sizes, the reference's numbers, what samples and tokens may not know."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccum import models
from jaxaccum.accumulate import Groups, batchnorm
from jaxaccum.losses.chamfer import chamfer_l1, chamfer_l2
from jaxaccum.models import completion, init, points
from jaxaccum.models import point_blocks as blocks
from jaxaccum.models import point_layers as layers
from jaxaccum.weights import transfer as weights

# --- The reference's numbers ---
# Of models whose weights and inputs follow from the numbers of the state dict's entries: mean and
# mean absolute value of an output, and its first three values; losses, gradients, statistics.

GOLDEN: dict[str, dict[str, Any]] = {
    "adapointr-projected": {
        "grouper coordinates": (0.000806, 0.273933, 0.15359, -0.384993, 0.450283),
        "grouper features": (0.625879, 0.706272, 0.99506, -0.053031, 1.251929),
        "encoder": (-0.146116, 2.411441, 0.100124, 2.548122, 2.790473),
        "coarse_pred": (0.001016, 1.359179, -1.127758, -2.118041, 4.034779),
        "ranking": (0.443278, 0.443278, 0.623355, 0.368204, 0.488048),
        "decoder": (-0.152098, 3.670051, 4.173269, -1.286168, 0.492175),
        "coarse": (0.045739, 0.718903, 4.495255, -0.730461, -3.244982),
        "fine": (0.200747, 2.543472, -0.377484, -0.879617, -4.229163),
        "distances": (0.458060, 2.639644, 24.78149),
        "losses": (0.710451, 1.855738),
        "gradient": (48.2641, 1.05964, 3.02302, 2.46631, 18.48458),
        "statistics": (0.353941, -0.58738, 0.373569, 1.245605, 1.13426, 0.941888),
    },
    "adapointr-shapenet": {
        "grouper coordinates": (0.005443, 0.265952, 0.15359, -0.384993, 0.450283),
        "grouper features": (0.592592, 0.678336, 0.586851, -0.045759, 1.433624),
        "encoder": (-0.149304, 2.398302, -0.212607, 2.063214, 3.306775),
        "coarse_pred": (0.003144, 1.370657, -1.018776, -2.290245, 4.008764),
        "ranking": (0.443371, 0.443371, 0.623714, 0.391561, 0.487398),
        "decoder": (-0.157656, 3.675465, 4.165296, -1.412514, 0.672617),
        "coarse": (0.054132, 0.726698, 4.554508, -0.658335, -3.146674),
        "fine": (0.205921, 2.520887, -0.272446, -0.687514, -4.081037),
        "distances": (0.466462, 2.629220, 24.27180),
        "losses": (0.694185, 1.881406),
        "gradient": (50.2462, 0.86692, 2.63872, 2.19891, 19.59754),
        "statistics": (0.370886, -0.588073, 0.400815, 1.245147, 1.135134, 0.942406),
    },
    "adapointr-pcn": {
        "fine": (0.128314, 2.538493, -0.272446, -0.687514, -4.081037),
        "distances": (0.463127, 2.356334, 22.91964),
        "losses": (0.650741, 1.863785),
        "gradient": (33.4210, 0.59076, 1.80692, 1.39534, 12.42648),
    },
    "pointr-shapenet": {
        "grouper features": (0.587334, 0.674233),
        "encoder": (0.034611, 2.390466, -1.133772, 0.488725, -6.796314),
        "coarse_pred": (0.147439, 1.560887, -0.467079, 4.334593, -1.663659),
        "decoder": (-0.008232, 3.804740, 0.066653, -5.022003, 3.440173),
        "coarse": (0.074559, 0.919071),
        "fine": (0.035952, 1.270789, -0.427327, 3.900857, -1.428608),
        "distances": (0.680882, 0.985664, 6.121639),
        "losses": (0.336106, 0.596486),
        "gradient": (22.85345,),
    },
    "pointr-pcn": {
        "coarse_pred": (0.062913, 1.675348, -0.467079, 4.334593, -1.663659),
        "decoder": (-0.010005, 3.800699, 0.050188, -5.043978, 3.490868),
        "coarse": (0.035208, 0.970587),
        "fine": (-0.029403, 1.534176, -0.428795, 3.912076, -1.434984),
        "distances": (0.724222, 1.235508, 8.407429),
        "losses": (0.334973, 0.733733),
        "gradient": (28.30548,),
    },
}
FARTHEST = ([0, 352, 999, 518, 854, 1897, 83, 37, 950, 434, 370, 1565], [938, 1372, 344, 961])


def norm_keys(prefix):
    return [f"{prefix}.weight", f"{prefix}.bias"]


def batch_norm_keys(prefix):
    counted = ("running_mean", "running_var", "num_batches_tracked")
    return norm_keys(prefix) + [f"{prefix}.{k}" for k in counted]


def entries(name: str) -> list[str]:
    """The keys of the reference's state dict in its order."""
    table = completion.MODELS[name]
    pair = norm_keys

    def normed(prefix):
        return pair(f"{prefix}.0") + batch_norm_keys(f"{prefix}.1") + pair(f"{prefix}.3")

    def several(prefix, *indices):
        return [key for i in indices for key in pair(f"{prefix}.{i}")]

    def each(prefix, *names):
        """Weight and bias of each; "!" for a weight alone."""
        keys = []
        for n in names:
            keys += [f"{prefix}.{n[:-1]}.weight"] if n[-1] == "!" else pair(f"{prefix}.{n}")
        return keys

    keys = pair("grouper.input_trans")
    for i in range(1, 5):
        keys += [f"grouper.layer{i}.0.weight", *pair(f"grouper.layer{i}.1")]
    if table.kind == "adapointr":
        keys += several("pos_embed", 0, 2) + several("input_proj", 0, 2)
        for i in range(6):
            local = ["local_attn.knn_map.0", "merge_map"] if i == 0 else []
            keys += each(f"encoder.blocks.blocks.{i}", "norm1", "norm2", "mlp.fc1", "mlp.fc2",
                         "attn.qkv", "attn.proj", *local)  # fmt: skip
        keys += pair("encoder.norm") + several("increase_dim", 0, 2) + several("coarse_pred", 0, 2)
        keys += several("mlp_query", 0, 2, 4)
        for i in range(8):
            own = ["local_self_attn.knn_map.0", "self_attn_merge_map"] if i == 0 else []
            cross = ["local_cross_attn.knn_map.0", "cross_attn_merge_map"] if i == 0 else []
            keys += each(f"decoder.blocks.blocks.{i}", "norm2", "mlp.fc1", "mlp.fc2", "norm1",
                         "self_attn.qkv", "self_attn.proj", *own, "norm_q", "norm_v",
                         "cross_attn.q_map", "cross_attn.k_map", "cross_attn.v_map",
                         "cross_attn.proj", *cross)  # fmt: skip
        keys += several("query_ranking", 0, 2, 4)
        head = pair("decode_head.layer.fc1") + pair("decode_head.layer.fc2")
    else:
        keys += normed("pos_embed") + normed("input_proj")
        for i in range(6):
            keys += each(f"encoder.{i}", "norm1", "attn.qkv!", "attn.proj", "norm2", "knn_map.0",
                         "merge_map", "mlp.fc1", "mlp.fc2")  # fmt: skip
        keys += normed("increase_dim") + several("coarse_pred", 0, 2)
        keys += several("mlp_query", 0, 2, 4)
        for i in range(8):
            keys += each(f"decoder.{i}", "norm1", "self_attn.qkv!", "self_attn.proj", "norm_q",
                         "norm_v", "attn.q_map!", "attn.k_map!", "attn.v_map!", "attn.proj",
                         "norm2", "mlp.fc1", "mlp.fc2", "knn_map.0", "merge_map",
                         "knn_map_cross.0", "merge_map_cross")  # fmt: skip
        head = []
        for i in (1, 2):
            fold = f"foldingnet.folding{i}"
            head += pair(f"{fold}.0") + batch_norm_keys(f"{fold}.1") + pair(f"{fold}.3")
            head += batch_norm_keys(f"{fold}.4") + pair(f"{fold}.6")
    return [f"base_model.{k}" for k in keys] + head + normed("increase_dim") + pair("reduce_map")


def golden_state(name: str) -> dict[str, np.ndarray]:
    state = {}
    shapes = weights.shapes(name)
    for k, key in enumerate(entries(name)):
        if key.endswith("num_batches_tracked"):
            continue
        shape = shapes[key]
        z = np.random.RandomState(k).standard_normal(shape)
        if len(shape) >= 2:
            z = z / np.sqrt(np.prod(shape[1:]))
        elif key.endswith("running_var"):
            z = 1 + 0.2 * abs(z)
        elif key.endswith("weight"):
            z = 1 + 0.1 * z
        else:
            z = 0.05 * z
        state[key] = z.astype(np.float32)
    return state


@functools.lru_cache(maxsize=1)
def golden_model(name: str):
    model = completion.create(name)
    state = golden_state(name)
    assert len(entries(name)) == {"pointr": 408, "adapointr": 335}[model.table.kind]
    params, stats = weights.from_reference(state, *completion.initialise(model, 0))
    return model, params, stats


def golden_clouds(name: str):
    table = completion.MODELS[name]
    partial = np.random.RandomState(1000).uniform(-0.5, 0.5, (2, 2048, 3)).astype(np.float32)
    partial[:, 5], partial[:, 6] = 0, 0.01
    shape = (2, completion.create(name).num_points, 3)
    target = np.random.RandomState(1001).uniform(-0.5, 0.5, shape).astype(np.float32)
    noise = None
    if table.denoise:
        noise = 0.01 * np.random.RandomState(1002).standard_normal((2, table.denoise, 3))
        noise = np.clip(noise, -0.05, 0.05).astype(np.float32)
    return partial, target, noise


def close(ours, theirs, scale=None, tolerance=1e-4):
    """Each relative to the reference's value, or to a scale."""
    ours, theirs = np.ravel(np.asarray(ours, np.float64))[: len(theirs)], np.asarray(theirs)
    bound = tolerance * (np.abs(theirs) if scale is None else scale)
    np.testing.assert_array_less(np.abs(ours - theirs), bound)


def check_evaluation(name):
    golden = GOLDEN[name]
    model, params, stats = golden_model(name)
    partial, target, _ = golden_clouds(name)
    ada = model.table.kind == "adapointr"
    stack = "blocks.blocks." if ada else ""
    wanted = {
        "base_model.grouper": "grouper",
        f"base_model.encoder.{stack}5": "encoder",
        "base_model.coarse_pred.2": "coarse_pred",
        f"base_model.decoder.{stack}7": "decoder",
    } | ({"base_model.query_ranking.4": "ranking"} if ada else {})

    @jax.jit
    def evaluate(params, stats, partial, target):
        clouds, changed = model.apply(
            {"params": params, "batch_stats": stats}, partial, mutable=["intermediates"],
            capture_intermediates=lambda m, method: method == "__call__" and m.name in wanted,
        )  # fmt: skip
        pairs = ((chamfer_l1, clouds.coarse), (chamfer_l1, clouds.fine), (chamfer_l2, clouds.fine))
        distances = jnp.stack([jnp.mean(f(cloud, target)) for f, cloud in pairs])
        found = {v: changed["intermediates"][k]["__call__"][0] for k, v in wanted.items()}
        return clouds, distances, found

    clouds, distances, found = evaluate(params, stats, partial, target)
    centres, features = found.pop("grouper")
    found |= {"grouper coordinates": centres, "grouper features": features}
    found |= {"coarse": clouds.coarse, "fine": clouds.fine}
    if ada:
        found["ranking"] = jax.nn.sigmoid(found["ranking"])
    assert clouds.fine.shape == (2, model.num_points, 3)
    for key, theirs in golden.items():
        if key in found:
            ours = np.asarray(found[key], np.float64)
            ours = np.stack([ours.mean(), np.abs(ours).mean(), *ours[0].ravel()[:3]])
            close(ours, theirs, scale=ours[1])  # means of values of both signs are small
    close(distances, golden["distances"])


def check_training(name, gradient):
    golden = GOLDEN[name]
    model, params, stats = golden_model(name)
    partial, target, noise = golden_clouds(name)

    def loss(params, stats, partial, target, noise):
        groups = Groups(2, jnp.ones(2))
        clouds, changed = model.apply(
            {"params": params, "batch_stats": stats}, partial, groups, noise, mutable=["moments"]
        )
        coarse, fine = (jnp.mean(chamfer_l1(c, target)) for c in (clouds.coarse, clouds.fine))
        items = jnp.stack([coarse, fine])
        if noise is not None:
            near = points.nearest(clouds.centres, target, model.points_per_query)
            around = points.gather(target, near.reshape(2, -1))
            items = jnp.stack([jnp.mean(chamfer_l1(clouds.denoised, around)) / 2, coarse + fine])
        return jnp.sum(items), (items, changed["moments"])

    function = jax.value_and_grad(loss, has_aux=True) if gradient else loss
    out = jax.jit(function)(params, stats, partial, target, noise)
    items, moments = out[0][1] if gradient else out[1]
    close(items, golden["losses"])
    if "statistics" in golden:
        moved = batchnorm.move_statistics(stats, moments, 0.1)["increase_dim.1"]
        close([*moved["mean"][:3], *moved["var"][:3]], golden["statistics"])
    if gradient:
        found = weights.to_reference(jax.tree.map(np.float64, out[1]))
        keys = ("base_model.grouper.input_trans.weight", "base_model.coarse_pred.2.weight",
                "increase_dim.0.weight", "reduce_map.weight")  # fmt: skip
        total = math.sqrt(sum(np.square(g).sum() for g in found.values()))
        norms = [total, *(np.linalg.norm(found[k]) for k in keys)]
        # Rounding turns some of the 10^5 maxima, in the reference as here: scripts/parity.py.
        close(norms, golden["gradient"], tolerance=3e-3)


@pytest.mark.parametrize(
    "name",
    [n if n == "adapointr-projected" else pytest.param(n, marks=pytest.mark.slow) for n in GOLDEN],
)
def test_evaluation_gives_the_reference_s_numbers(name):
    check_evaluation(name)


@pytest.mark.slow
def test_training_gives_the_reference_s_losses_and_statistics():
    check_training("adapointr-projected", gradient=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
def test_training_gives_the_reference_s_gradient(name):
    check_training(name, gradient=True)


# --- Sizes and names ---

SIZES = {
    "pointr-pcn": {
        "": 42_498_054, "base_model.grouper": 29_792, "base_model.pos_embed": 50_304,
        "base_model.input_proj": 198_144, "base_model.encoder": 10_639_872,
        "base_model.increase_dim": 1_445_888, "base_model.coarse_pred": 1_738_400,
        "base_model.mlp_query": 2_495_872, "base_model.decoder": 23_645_184,
        "foldingnet": 266_502, "increase_dim": 1_445_888, "reduce_map": 542_208,
    },
    "pointr-shapenet": {"": 42_104_454, "base_model.coarse_pred": 1_344_800},
    "adapointr-pcn": {"": 32_494_657, "decode_head": 442_976},
    "adapointr-shapenet": {
        "": 32_470_033, "base_model.grouper": 29_792, "base_model.pos_embed": 50_048,
        "base_model.input_proj": 263_040, "base_model.encoder": 7_694_592,
        "base_model.increase_dim": 1_443_840, "base_model.coarse_pred": 2_624_000,
        "base_model.mlp_query": 2_495_872, "base_model.decoder": 15_395_328,
        "base_model.query_ranking": 67_073, "increase_dim": 1_445_888, "reduce_map": 542_208,
        "decode_head": 418_352,
    },
    "adapointr-projected": {"": 32_470_033},
}  # fmt: skip
UNTRAINED = {"pointr": 11_221_248, "adapointr": 67_841}


def shapes_of(name):
    model = completion.create(name)
    example = jax.ShapeDtypeStruct((1, model.num_input, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), example)
    flat = flax.traverse_util.flatten_dict(variables["params"])
    return model, {"/".join(path): math.prod(a.shape) for path, a in flat.items()}, variables


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    model, sizes, variables = shapes_of(name)
    for part, expected in SIZES[name].items():
        assert sum(n for path, n in sizes.items() if path.startswith(part)) == expected, part
    kind = model.table.kind
    assert sum(n for p, n in sizes.items() if completion.untrained(name, p)) == UNTRAINED[kind]
    statistics = jax.tree.leaves(variables["batch_stats"])
    assert len(statistics) == 2 * {"pointr": 8, "adapointr": 1}[kind]
    assert (
        sum(map(math.prod, (a.shape for a in statistics)))
        == {"pointr": 6656, "adapointr": 2048}[kind]
    )


def test_small_models_are_for_laptops():
    for name in ("adapointr-small", "pointr-small"):
        model, sizes, _ = shapes_of(name)
        assert sum(sizes.values()) < 7e6
        assert model.num_points >= 4096


def test_what_a_model_says_of_itself():
    model = completion.create("adapointr-pcn")
    assert (model.model, model.num_input, model.num_points) == ("adapointr-pcn", 2048, 16384)
    assert (model.points_per_query, model.denoise_points, model.remat) == (32, 64, False)
    assert completion.create("pointr-shapenet").num_points == 8192
    assert completion.create("pointr-shapenet").denoise_points == 0


def test_names():
    assert set(completion.names()) == set(models.names("completion")) <= set(models.names())
    assert "yolov8-n" in models.names("detection") and "pointr-pcn" not in models.names("detection")
    with pytest.raises(ValueError, match=r"did you mean .*adapointr-pcn"):
        completion.create("adapointr-pnc")
    with pytest.raises(ValueError, match="one of pointr-pcn"):
        completion.create("x")
    with pytest.raises(ValueError, match="got 'x'"):
        models.names("x")
    with pytest.raises(ValueError, match="give num_classes"):
        models.create("yolov8-n")
    assert isinstance(models.create("pointr-small"), completion.PoinTr)


# --- A tiny model ---

TINY = completion.Table(
    "adapointr", 32, 4, (64, 32), ("attn-graph",), ("attn-graph", "attn"), ("attn-graph", "attn"),
    width=24, heads=3, global_width=32, denoise=8, num_input=256,
)  # fmt: skip
TINY_POINTR = dataclasses.replace(TINY, kind="pointr", denoise=0, head="fold")
BOTH = [TINY, pytest.param(TINY_POINTR, marks=pytest.mark.slow)]
LAST = "base_model.decoder.blocks.blocks.1"


def tiny(table=TINY, dtype: Any = jnp.float64, remat=False):
    """A tiny model with parameters and statistics of seed 0."""
    kind = {"pointr": completion.PoinTr, "adapointr": completion.AdaPoinTr}[table.kind]
    model = kind("tiny", table, dtype, remat)
    params, stats = completion.initialise(model, 0, np.dtype(dtype))
    # Deviations of 0.02 leave next to nothing of an attention.
    return model, jax.tree.map(lambda a: 4 * a if a.ndim > 1 else a, params), stats


@functools.cache
def forward(table=TINY):
    """Clouds and moments of a tiny model, by (params, stats, partial, noise, groups or None)."""
    model, *_ = tiny(table)

    def apply(params, stats, partial, noise, size, weight):
        groups = None if size is None else Groups(size, weight)
        return model.apply(
            {"params": params, "batch_stats": stats}, partial, groups, noise,
            mutable=["moments", "intermediates"],
            capture_intermediates=lambda m, method: method == "__call__" and m.name == LAST,
        )  # fmt: skip

    return jax.jit(apply, static_argnums=4)


@functools.cache
def backward(table=TINY, remat=False):
    """((a number, (clouds, moments)), its gradient) by (params, stats, partial, noise, weight)."""
    model, *_ = tiny(table, remat=remat)

    def number(params, stats, partial, noise, weight):
        clouds, changed = model.apply(
            {"params": params, "batch_stats": stats}, partial, Groups(len(partial), weight), noise,
            mutable=["moments"],
        )  # fmt: skip
        value = weighted([a[:2] for a in clouds if a is not None])
        return value, (clouds, changed["moments"])

    return jax.jit(jax.value_and_grad(number, has_aux=True))


def clouds_of(samples, seed=0, points_=256):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (samples, points_, 3))


def noise_of(samples, seed=0, count=8):
    return np.random.default_rng(seed + 100).normal(0, 0.01, (samples, count, 3))


def weighted(outputs):
    """A number that depends on all coordinates of all outputs."""
    return sum(jnp.sum(jnp.square(a) * jnp.cos(jnp.arange(a.size).reshape(a.shape)))
               for a in jax.tree.leaves(outputs))  # fmt: skip


def same(a, b, tolerance=1e-12):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max()))


def noise_for(table, samples, seed=0):
    return noise_of(samples, seed) if table.denoise else None


@pytest.mark.slow
@pytest.mark.parametrize("table", BOTH)
def test_a_sample_does_not_know_its_batch(x64, table):
    """With running statistics, and with groups that are the same."""
    _, params, stats = tiny(table)
    partial, noise = clouds_of(4), noise_for(table, 4)

    def part(i, j):
        return partial[i:j], None if noise is None else noise[i:j]

    def joined(parts):
        return jax.tree.map(lambda *a: jnp.concatenate(a), *parts)

    apply = forward(table)
    together, _ = apply(params, stats, partial, noise, None, None)
    alone = [apply(params, stats, *part(i, i + 1), None, None)[0] for i in range(4)]
    same(together, joined(alone))
    together, changed = apply(params, stats, partial, noise, 2, jnp.ones(4))
    halves = [backward(table)(params, stats, *part(i, i + 2), jnp.ones(2))[0][1] for i in (0, 2)]
    same(together, joined([clouds for clouds, _ in halves]))
    same(changed["moments"], jax.tree.map(jnp.add, halves[0][1], halves[1][1]))


@pytest.mark.slow
@pytest.mark.parametrize("table", BOTH)
def test_padded_samples_do_not_count(x64, table):
    _, params, stats = tiny(table)
    partial, noise = clouds_of(3), noise_for(table, 3)
    weight = jnp.array([1.0, 1, 0])
    (_, (clouds, moments)), gradient = backward(table)(params, stats, partial, noise, weight)
    two = (partial[:2], None if noise is None else noise[:2])
    (_, (fewer, alone)), expected = backward(table)(params, stats, *two, jnp.ones(2))
    same(jax.tree.map(lambda a: a[:2], clouds), fewer)
    same(moments, alone)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected))
    same(gradient, expected, 1e-12 * largest)


def test_a_fold_counts_every_point(x64):
    """The batch norms of the fold see queries x points of each sample."""
    _, params, stats = tiny(TINY_POINTR)
    weight = jnp.array([1.0, 1, 1, 0])
    changed = forward(TINY_POINTR)(params, stats, clouds_of(4), None, 2, weight)[1]
    moments = changed["moments"]
    assert moments["foldingnet"]["folding2.4"]["count"] == 3 * 32 * 4
    assert moments["base_model.pos_embed.1"]["count"] == 3 * 32
    assert moments["increase_dim.1"]["count"] == 3 * 32


@pytest.mark.slow
def test_ordinary_queries_do_not_see_the_jittered_ones(x64):
    """Up to the maxima over all tokens in the head, and its batch norm."""
    _, params, stats = tiny()
    partial = clouds_of(2)

    def decoded(noise):
        clouds, changed = forward()(params, stats, partial, noise, None, None)
        return clouds, changed["intermediates"][LAST]["__call__"][0]

    plain, q = decoded(None)
    first, with_noise = decoded(noise_of(2))
    second, with_other = decoded(20 * noise_of(2, 1))
    assert q.shape == (2, 32, 24) and with_noise.shape == (2, 40, 24)
    same(with_noise[:, :32], q)
    same(with_other[:, :32], q)
    assert np.abs(with_noise[:, 32:] - with_other[:, 32:]).max() > 1e-3
    same(first.coarse, plain.coarse)
    assert np.abs(first.fine - second.fine).max() > 1e-6  # the maxima
    assert plain.centres is None and plain.denoised is None
    farthest = points.gather(partial, points.farthest_points(partial, 8))
    same(first.centres, farthest + noise_of(2))
    assert first.denoised.shape == (2, 32, 3)


def test_queries_are_the_best_of_coarse_points_and_input(x64):
    model, params, stats = tiny()
    partial = clouds_of(1)
    wanted = ("base_model.coarse_pred.2", "base_model.query_ranking.4")

    @jax.jit
    def apply(partial):
        return model.apply(
            {"params": params, "batch_stats": stats}, partial, mutable=["intermediates"],
            capture_intermediates=lambda m, _: m.name in wanted,
        )  # fmt: skip

    clouds, changed = apply(partial)
    coarse, scores = (changed["intermediates"][k]["__call__"][0] for k in wanted)
    sample = points.gather(partial, points.farthest_points(partial, 16))
    candidates = np.concatenate([coarse.reshape(1, 32, 3), sample], axis=1)
    order = np.argsort(-scores[0, :, 0], kind="stable")[:32]
    same(clouds.coarse[0], candidates[0, order])
    assert (order >= 32).any() and (order < 32).any()


def test_pointr_copies_its_input(x64):
    model, params, stats = tiny(TINY_POINTR)
    partial = clouds_of(4)
    clouds, _ = forward(TINY_POINTR)(params, stats, partial, None, 2, jnp.ones(4))
    same(clouds.fine[:, 128:], partial)
    same(clouds.coarse[:, 32:], points.gather(partial, points.farthest_points(partial, 32)))
    assert model.num_points == clouds.fine.shape[1]
    with pytest.raises(ValueError, match="no points to denoise"):
        model.apply({"params": params, "batch_stats": stats}, partial, None, noise_of(4))


def test_noise_of_another_shape_is_refused():
    model, params, stats = tiny(dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"\(2, 8, 3\); got \(2, 9, 3\)"):
        model.apply({"params": params, "batch_stats": stats}, clouds_of(2), None, noise_of(2, 0, 9))


@pytest.mark.slow
@pytest.mark.parametrize("table", BOTH)
def test_gradient(x64, table, monkeypatch):
    """Against differences, and of a rematerialised model; zero for what is not trained."""
    monkeypatch.setitem(completion.MODELS, "tiny", table)
    _, params, stats = tiny(table)
    inputs = (stats, clouds_of(2), noise_for(table, 2), jnp.ones(2))
    _, gradient = backward(table)(params, *inputs)
    _, again = backward(table, remat=True)(params, *inputs)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(gradient))
    same(again, gradient, 1e-12 * largest)

    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda a: rng.standard_normal(a.shape) * np.abs(a).mean(), params)
    slope = float(sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction))))
    step = 1e-7
    values = [backward(table)(jax.tree.map(lambda a, d, t=t: a + t * d, params, direction),
                              *inputs)[0][0] for t in (step, -step)]  # fmt: skip
    assert float(values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-6)

    flat = flax.traverse_util.flatten_dict(gradient)
    zero = {"/".join(path) for path, g in flat.items() if not np.any(g)}
    assert zero == {p for p in map("/".join, flat) if completion.untrained("tiny", p)}


@pytest.mark.slow
def test_rematerialisation_needs_less_memory():
    model = completion.create("adapointr-small")
    params, stats = completion.initialise(model, 0)
    partial = jax.ShapeDtypeStruct((4, 2048, 3), jnp.float32)

    def temporary(model):
        def loss(params, x):
            return weighted(model.apply({"params": params, "batch_stats": stats}, x))

        compiled = jax.jit(jax.grad(loss)).lower(params, partial).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(model.clone(remat=True)) < 0.6 * temporary(model)


@pytest.mark.slow
def test_half_precision_keeps_coordinates():
    model, params, stats = tiny(dtype=jnp.float32)
    narrow = model.clone(dtype=jnp.bfloat16)
    variables = {"params": params, "batch_stats": stats}
    partial, noise = clouds_of(2).astype(np.float32), noise_of(2).astype(np.float32)
    wide, clouds = (jax.jit(m.apply)(variables, partial, None, noise) for m in (model, narrow))
    assert all(a.dtype == jnp.float32 for a in clouds)
    same(clouds.centres, wide.centres, 1e-6)  # never rounded
    # Some queries may be others; the cloud as a whole is much the same.
    size = float(jnp.mean(jnp.linalg.norm(wide.fine, axis=-1)))
    assert float(jnp.mean(chamfer_l1(clouds.fine, wide.fine))) < 0.02 * size


# --- Initial values ---


def test_initial_values():
    for name, linear in (("adapointr-small", "base_model.encoder.blocks.blocks.0"),
                         ("pointr-small", "base_model.encoder.0")):  # fmt: skip
        model = completion.create(name)
        params, stats = completion.initialise(model, 0)
        block = params[linear]
        assert block["mlp.fc1"]["kernel"].std() == pytest.approx(0.02, rel=0.02)
        assert not block["mlp.fc1"]["bias"].any()
        assert (block["norm1"]["scale"] == 1).all() and not block["norm1"]["bias"].any()
        assert params["base_model.coarse_pred.2"]["kernel"].std() == pytest.approx(0.02, rel=0.02)
        head = params["reduce_map"]  # of PyTorch: uniform, bias too
        bound = 1 / math.sqrt(512 + 192 + 3)
        assert 0.99 * bound < np.abs(head["kernel"]).max() <= bound
        assert 0.9 * bound < np.abs(head["bias"]).max() <= bound
        grouper = params["base_model.grouper"]
        assert np.abs(grouper["layer4.0"]["kernel"]).max() <= 1 / math.sqrt(128)
        assert (grouper["layer4.1"]["scale"] == 1).all()
        assert (stats["increase_dim.1"]["var"] == 1).all()
        convolution = params["base_model.mlp_query.0"]
        if name == "pointr-small":
            xavier = math.sqrt(2 / (515 + 512))
            assert convolution["kernel"].std() == pytest.approx(xavier, rel=0.02)
            assert 0 < np.abs(convolution["bias"]).max() <= 1 / math.sqrt(515)
            assert grouper["input_trans"]["kernel"].std() == pytest.approx(
                math.sqrt(2 / 11), rel=0.5
            )
        else:
            assert convolution["kernel"].std() == pytest.approx(0.02, rel=0.02)
            assert not convolution["bias"].any()
            assert np.abs(grouper["input_trans"]["kernel"]).max() <= 1 / math.sqrt(3)


def test_initialise_takes_several_inputs():
    model, *_ = tiny(dtype=jnp.float32)
    one = jax.ShapeDtypeStruct((1, 256, 3), jnp.float32)
    both = init.initialise(model, (one, None), 3)
    alone = init.initialise(model, one, 3)
    assert all(map(np.array_equal, jax.tree.leaves(both), jax.tree.leaves(alone)))


# --- Blocks, against formulas written out ---


def variables_of(module, *inputs):
    shapes = jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x), *inputs)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: 0.5 * rng.standard_normal(a.shape), shapes)


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


def leaky(x):
    return np.where(x > 0, x, 0.2 * x)


def test_dense_of_parts_is_that_of_their_concatenation(x64):
    a, b, c = arrays((2, 1, 5), (2, 7, 3), (2, 7, 4))
    module = layers.Dense(6, axes=2, dtype=jnp.float64)
    variables = variables_of(module, a, b, c)
    params = variables["params"]
    assert params["kernel"].shape == (1, 1, 12, 6)
    whole = np.concatenate([np.broadcast_to(a, (2, 7, 5)), b, c], axis=-1)
    same(module.apply(variables, a, b, c), whole @ params["kernel"][0, 0] + params["bias"])


@pytest.mark.parametrize("pool", [True, False])
def test_an_edge_map_is_a_linear_map_of_difference_and_centre(x64, pool):
    q, v = arrays((2, 5, 4), (2, 9, 4))
    index = np.random.default_rng(1).integers(0, 9, (2, 5, 3))
    module = layers.EdgeMap(6, dtype=jnp.float64)
    variables = variables_of(module, q, v, index)
    params = variables["params"]
    near = np.stack([v[i][index[i]] for i in range(2)])
    centre = np.broadcast_to(q[:, :, None], near.shape)
    edges = np.concatenate([near - centre, centre], axis=-1) @ params["kernel"] + params["bias"]
    same(module.apply(variables, q, v, index, pool), edges.max(2) if pool else edges)
    same(module.apply(variables, q, near, None, pool), edges.max(2) if pool else edges)


def test_largest_gives_its_gradient_to_the_first():
    x = jnp.array([[1.0, 3.0, 3.0], [2.0, 1.0, 0.0]])
    value, gradient = jax.value_and_grad(
        lambda x: jnp.vdot(layers.largest(x, 1), jnp.array([5.0, 7.0]))
    )(x)
    assert value == 5 * 3 + 7 * 2
    np.testing.assert_array_equal(gradient, [[0, 5, 0], [7, 0, 0]])
    assert np.isnan(layers.largest(jnp.array([1.0, jnp.nan]), 0))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(q, k, v, heads, limit=None):
    """(Q, C), (N, C), (N, C); queries before `limit` see keys before it alone."""
    out = []
    for own, key, value in zip(*(np.split(a, heads, axis=-1) for a in (q, k, v)), strict=True):
        logits = own @ key.T / math.sqrt(own.shape[-1])
        if limit is not None:
            logits[:limit, limit:] = -np.inf
        out.append(softmax(logits) @ value)
    return np.concatenate(out, axis=-1)


@pytest.mark.parametrize("limit", [None, 4])
def test_self_attention(x64, limit):
    (x,) = arrays((2, 6, 12))
    module = blocks.SelfAttention(3, True, limit, jnp.float64)
    variables = variables_of(module, x)
    p = variables["params"]
    q, k, v = np.split(x @ p["qkv"]["kernel"] + p["qkv"]["bias"], 3, axis=-1)
    expected = np.stack([attention(*parts, 3, limit) for parts in zip(q, k, v, strict=True)])
    same(module.apply(variables, x), expected @ p["proj"]["kernel"] + p["proj"]["bias"])


def test_attention_has_the_gradient_of_its_formula(x64):
    q, k, v, w = arrays((2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 4), (2, 5, 3, 4))

    def plain(q, k, v):
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits, axis=-1), v)

    values, gradients = zip(*(
        jax.value_and_grad(lambda *a, f=f: jnp.vdot(f(*a), w), argnums=(0, 1, 2))(q, k, v)
        for f in (plain, layers.attend)), strict=True)  # fmt: skip
    assert float(values[0]) == pytest.approx(float(values[1]), rel=1e-12)
    same(gradients[1], gradients[0])
    assert np.isfinite(layers.attend(1e3 * q, 1e3 * k, v)).all()


def test_layer_norm_and_its_gradient(x64):
    x, w = arrays((3, 4, 6), (3, 4, 6))
    module = layers.LayerNorm(1e-6)
    variables = variables_of(module, x)
    p = variables["params"]

    def plain(p, x):
        normal = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return normal * p["scale"] + p["bias"]

    def ours(p, x):
        return module.apply({"params": p}, x)

    same(ours(p, x), plain(p, x))
    expected, found = (jax.grad(lambda p, x, f=f: jnp.vdot(f(p, x), w), argnums=(0, 1))(p, x)
                       for f in (plain, ours))  # fmt: skip
    same(found, expected)


def interpolated(values, xyz, place):
    distance = np.linalg.norm(xyz - place, axis=-1)
    near = np.argsort(distance)[:3]
    weight = 1 / (distance[near] + 1e-8)
    return (values[near] * (weight / weight.sum())[:, None]).sum(0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deform", "rw_deform", "deform_graph"])
def test_deforming_operations(x64, kind):
    """One query after the other, one neighbour after the other."""
    q, v, q_xyz, v_xyz = arrays((1, 4, 8), (1, 9, 8), (1, 4, 3), (1, 9, 3))
    if kind == "rw_deform":  # among the same points
        q, q_xyz = v, v_xyz
    near = blocks.neighbours(q_xyz, v_xyz, 3)
    module = blocks.Deform(kind, 2, 2, True, None, jnp.float64)
    variables = variables_of(module, q, v, near)
    p = variables["params"]

    def linear(name, x):
        return x @ p[name]["kernel"] + p[name].get("bias", 0)

    groups = 1 if kind == "deform_graph" else 2
    expected = []
    for i in range(q.shape[1]):
        index = np.asarray(near.nearest)[0, i]
        query = q[0, i] if groups == 1 else linear("proj_q", q[0, i])
        extent = (v_xyz[0, index].max(0) - v_xyz[0, index].min(0)) / 2 if groups == 1 else 1
        taken = []
        for j in index:
            parts = zip(*(np.split(a, groups) for a in (linear("proj_v_off", v[0, j]), query)),
                        np.split(v[0], groups, axis=-1), strict=True)  # fmt: skip
            features = []
            for shift, own, values in parts:
                h = linear("linear_offset.0", np.concatenate([shift, own]))
                h = (h - h.mean()) / np.sqrt(h.var() + 1e-5)
                h = h * p["linear_offset.1"]["scale"] + p["linear_offset.1"]["bias"]
                h = np.array([a * (1 + math.erf(a / math.sqrt(2))) / 2 for a in h])
                offset = np.tanh(linear("linear_offset.3", h)) * extent
                features.append(interpolated(values, v_xyz[0], v_xyz[0, j] + offset))
            taken.append(np.concatenate(features))
        taken = np.stack(taken)
        if groups == 1:
            edges = np.concatenate(
                [taken - q[0, i], np.broadcast_to(q[0, i], taken.shape)], axis=-1
            )
            expected.append(leaky(linear("knn_map.0", edges)).max(0))
            continue
        own = linear("proj_q", v[0, index]) if kind == "rw_deform" else query[None]
        out = attention(own, linear("proj_k", taken), linear("proj_v", taken), 2)
        expected.append(linear("proj", out.max(0)))
    same(module.apply(variables, q, v, near)[0], np.stack(expected), 1e-9)


@pytest.mark.parametrize("combine", ["concat", "onebyone"])
def test_both_ways_to_combine(x64, combine):
    x, xyz = arrays((1, 6, 12), (1, 6, 3))
    near = blocks.neighbours(xyz, xyz, 3)
    module = blocks.EncoderBlock(
        3, blocks.ADAPOINTR, combine, dtype=jnp.float64, style="attn-graph"
    )
    variables = variables_of(module, x, near)
    p = variables["params"]

    def norm(name, x):
        normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return normal * p[name]["scale"] + p[name]["bias"]

    def linear(name, x):
        return x @ p[name]["kernel"] + p[name]["bias"]

    def attend(n):
        q, k, v = np.split(n @ p["attn"]["qkv"]["kernel"] + p["attn"]["qkv"]["bias"], 3, axis=-1)
        out = attention(q, k, v, 3)
        return out @ p["attn"]["proj"]["kernel"] + p["attn"]["proj"]["bias"]

    def graph(n):
        around = n[np.asarray(near.nearest)[0]]
        own = np.broadcast_to(n[:, None], around.shape)
        return leaky(linear("local_attn.knn_map.0", np.concatenate([around - own, own], -1))).max(1)

    y = x[0]
    if combine == "concat":
        n = norm("norm1", y)
        y = y + linear("merge_map", np.concatenate([attend(n), graph(n)], -1))
    else:
        y = y + attend(norm("norm1", y))
        y = y + graph(norm("norm3", y))
    h = linear("mlp.fc1", norm("norm2", y))
    h = h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2
    same(module.apply(variables, x, near)[0], y + linear("mlp.fc2", h))


def test_styles():
    assert blocks.parse_style("attn") == (True, "")
    assert blocks.parse_style("attn-graph") == blocks.parse_style("graph-attn") == (True, "graph")
    assert blocks.parse_style("deform", cross=True) == (False, "deform")
    for style in ("", "graph-deform", "attn-attn", "attn-graph-deform", "attn-x", "x"):
        with pytest.raises(ValueError, match="a block's style"):
            blocks.parse_style(style)
    with pytest.raises(ValueError, match="between queries and centres"):
        blocks.parse_style("attn-rw_deform", cross=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"encoder": ("attn-x",)}, "'attn-x'"), ({"decoder_cross": ("attn",)}, "names 2 blocks"),
     ({"decoder_cross": ("rw_deform", "attn")}, "between queries"),
     ({"head": "fold", "points_per_query": 5}, "square number of points; got 5"),
     ({"kind": "pointr", "encoder": ("deform",)}, "PoinTr are attn")],
)  # fmt: skip
def test_tables_that_make_no_network(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"head": "fold"}, {"grouper": "pn"}, {"combine": "onebyone"},
     *({"encoder": (k,), "decoder_self": (k, "attn"), "decoder_cross": (c, "attn")}
       for k, c in (("graph", "graph"), ("attn-deform", "deform"), ("rw_deform", "attn"),
                    ("deform_graph", "attn-deform_graph")))],
)  # fmt: skip
def test_every_part_in_a_network(x64, changes, monkeypatch):
    """It trains what it should, and ordinary queries do not see jittered ones."""
    table = dataclasses.replace(TINY, **changes)
    monkeypatch.setitem(completion.MODELS, "tiny", table)
    _, params, stats = tiny(table)
    partial = clouds_of(2)
    (_, (clouds, _)), gradient = backward(table)(params, stats, partial, noise_of(2), jnp.ones(2))
    assert clouds.fine.shape == (2, 128, 3)
    first, second = (
        forward(table)(params, stats, partial, noise_of(2, seed), None, None)[1]["intermediates"]
        for seed in (0, 1)
    )
    same(*(found[LAST]["__call__"][0][:, :32] for found in (first, second)))
    flat = flax.traverse_util.flatten_dict(gradient)
    zero = {"/".join(path) for path, g in flat.items() if not np.any(g)}
    assert zero == {p for p in map("/".join, flat) if completion.untrained("tiny", p)}
