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

from jaxaccum.accumulate import Groups, batchnorm
from jaxaccum.losses.chamfer import chamfer_l1, chamfer_l2
from jaxaccum.models import completion, init, points, weights
from jaxaccum.models import point_blocks as blocks

# --- The reference's numbers ---
# Of models whose weights and inputs follow from the numbers of the state dict's entries: mean and
# mean absolute value of an output, and its first three values; losses, gradients, statistics.

GOLDEN: dict[str, dict[str, Any]] = {
    "adapointr-projected": {
        "grouper coordinates": (0.000806, 0.273933, 0.15359, -0.384993, 0.450283),
        "grouper features": (0.625879, 0.706272, 0.99506, -0.053031, 1.251929),
        "encoder": (-0.146116, 2.411441, 0.100124, 2.548122, 2.790473),
        "coarse_pred": (0.001016, 1.359179, -1.127758, -2.118041, 4.034779),
        "ranking": (0.443278, None, 0.623355, 0.368204, 0.488048),
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
        "ranking": (0.443371, None, 0.623714, 0.391561, 0.487398),
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
        return [key for n in names for key in (
            [f"{prefix}.{n[:-1]}.weight"] if n.endswith("!") else pair(f"{prefix}.{n}"))]  # fmt: skip

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


def close(ours, theirs, name, scale=None, tolerance=1e-4):
    """Relative to each value, or to a scale."""
    for value, expected in zip(np.ravel(ours), theirs, strict=False):
        if expected is not None:
            assert abs(value - expected) <= tolerance * (scale or abs(expected)), (
                name,
                value,
                expected,
            )


def summary(values):
    values = np.asarray(values, np.float64)
    return [values.mean(), np.abs(values).mean(), *values[0].ravel()[:3]]


def check_evaluation(name):
    golden = GOLDEN[name]
    model, params, stats = golden_model(name)
    partial, target, _ = golden_clouds(name)
    prefix = "base_model."
    ada = model.table.kind == "adapointr"
    stack = "blocks.blocks." if ada else ""
    wanted = {
        f"{prefix}grouper": "grouper",
        f"{prefix}encoder.{stack}5": "encoder",
        f"{prefix}coarse_pred.2": "coarse_pred",
        f"{prefix}query_ranking.4": "ranking",
        f"{prefix}decoder.{stack}7": "decoder",
    }

    @jax.jit
    def evaluate(params, stats, partial, target):
        clouds, changed = model.apply(
            {"params": params, "batch_stats": stats}, partial, mutable=["intermediates"],
            capture_intermediates=lambda m, method: method == "__call__" and m.name in wanted,
        )  # fmt: skip
        distances = [jnp.mean(f(c, target)) for f, c in (
            (chamfer_l1, clouds.coarse), (chamfer_l1, clouds.fine), (chamfer_l2, clouds.fine))]  # fmt: skip
        found = {k: changed["intermediates"][k]["__call__"][0]
                 for k in wanted if k in changed["intermediates"]}  # fmt: skip
        return clouds, distances, found

    clouds, distances, found = evaluate(params, stats, partial, target)
    found = {wanted[k]: v for k, v in found.items()}
    centres, features = found.pop("grouper")
    found |= {"grouper coordinates": centres, "grouper features": features}
    found |= {"coarse": clouds.coarse, "fine": clouds.fine}
    if ada:
        found["ranking"] = jax.nn.sigmoid(found["ranking"])
    for key in set(golden) & set(found):
        ours = summary(found[key])
        print(name, key, [f"{a:.6f} {b}" for a, b in zip(ours, golden[key])])
        # A mean of values of both signs is known to a share of their size.
        close(ours[:1], golden[key][:1], key, ours[1])
        close(ours[1:], golden[key][1:], key, ours[1])
    print(distances, golden["distances"])
    close(distances, golden["distances"], "distances")


def train(name, gradient):
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

    if gradient:
        loss = jax.value_and_grad(loss, has_aux=True)
    return jax.jit(loss)(params, stats, partial, target, noise)


def check_training(name, gradient):
    golden = GOLDEN[name]
    _, _, stats = golden_model(name)
    (_, (items, moments)), *rest = train(name, True) if gradient else [train(name, False)]
    print(items, golden["losses"])
    close(items, golden["losses"], "losses")
    if "statistics" in golden:
        moved = batchnorm.move_statistics(stats, moments, 0.1)["increase_dim.1"]
        close([*moved["mean"][:3], *moved["var"][:3]], golden["statistics"], "statistics")
    if gradient:
        found = weights.to_reference(rest[0])
        keys = ("base_model.grouper.input_trans.weight", "base_model.coarse_pred.2.weight",
                "increase_dim.0.weight", "reduce_map.weight")  # fmt: skip
        norms = [math.sqrt(sum(float(np.square(np.float64(g)).sum()) for g in found.values()))]
        norms += [float(np.linalg.norm(found[k])) for k in keys]
        print(norms, golden["gradient"])


@pytest.mark.parametrize("name", list(GOLDEN))
def test_gold(name):
    check_evaluation(name)
    check_training(name, True)
