"""PointBERT as ULIP-2 trained it: a cloud to one vector, to be compared with its caption's.

It is a judge and does not learn: batch norms use their running statistics, nothing is dropped.
A gradient passes through it to the points, but for the choice of centres and neighbours.

Sources: Yu et al. 2022, arXiv:2111.14819 (Point-BERT); Xue et al. 2024, arXiv:2305.08275 (ULIP-2).
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum.machine.jax_stand_ins import gelu
from jaxaccum.models import init, points
from jaxaccum.models.blocks import rematerialised
from jaxaccum.models.point_blocks import SelfAttention
from jaxaccum.models.point_layers import (
    Dense,
    LayerNorm,
    chain,
    largest,
    norm_points,
    settled,
    wide,
)
from jaxaccum.weights.transfer import Weights, WeightsError, from_reference, reference_shapes
from jaxaccum.weights.transfer_report import listed

PyTree = Any
LAYER_NORM_EPS = 1e-5
GREY = 0.4  # the colour of points that have none
TEXT_WIDTH = 1280  # of the captions' vectors that ULIP-2 compares with: CLIP ViT-bigG-14


@dataclasses.dataclass(frozen=True)
class Table:
    """What makes an encoder.

    Attributes:
      depth: transformer blocks. width: channels of a token. heads: of attentions.
      groups: neighbourhoods of a cloud, a token each.
      neighbours: points of one.
      features: channels of a neighbourhood, before it is a token.
      channels: of a point: 3 for coordinates, 6 for coordinates and colour, which is grey here.
    """

    depth: int = 18
    width: int = 384
    heads: int = 6
    groups: int = 512
    neighbours: int = 32
    features: int = 256
    channels: Literal[3, 6] = 3


# The small one is ours, for a laptop.
MODELS: dict[str, Table] = {
    "pointbert": Table(),
    "pointbert-small": Table(3, 96, 3, groups=64, neighbours=16, features=64),
}


class GroupEncoder(nn.Module):
    """Features of neighbourhoods, by two small PointNets (Qi et al. 2017, arXiv:1612.00593)."""

    features: int
    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, around: jax.Array) -> jax.Array:
        """Neighbours (B, G, k, 3), relative to their centres, to (B, G, features)."""
        f = self.features
        grey = () if self.channels == 3 else (jnp.full((3,), GREY, around.dtype),)
        x = self._pair("first_conv", f // 2, f, around, *grey)
        x = self._pair("second_conv", 2 * f, f, largest(x, 2)[:, :, None], x)
        return largest(x, 2)

    def _pair(self, name, hidden, features, *parts):
        x = Dense(hidden, 1, dtype=self.dtype, name=f"{name}.0")(*parts)
        x = jax.nn.relu(norm_points(f"{name}.1", x, None))
        return Dense(features, 1, dtype=self.dtype, name=f"{name}.3")(x)


class Block(nn.Module):
    """Attention of all tokens to each other, then an MLP, each added to its input."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, tokens, C)."""
        width = x.shape[-1]
        attention = SelfAttention(self.heads, qkv_bias=False, dtype=self.dtype, name="attn")
        x = settled(x + attention(LayerNorm(LAYER_NORM_EPS, name="norm1")(x)))
        y = LayerNorm(LAYER_NORM_EPS, name="norm2")(x)
        y = gelu(Dense(4 * width, dtype=self.dtype, name="mlp.fc1")(y))
        return settled(x + Dense(width, dtype=self.dtype, name="mlp.fc2")(y))


class PointBert(nn.Module):
    """The encoder.

    Attributes:
      table: what it is made of.
      dtype: compute dtype of features; parameters and statistics stay as they are given.
      remat: keep only the inputs of its parts, and compute the rest again in the backward pass.
    """

    table: Table
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, cloud: jax.Array) -> jax.Array:
        """Vectors (B, 2 * width) of clouds (B, N, 3), in at least float32.

        Points near the origin are points like others: a predicted cloud has no padding.

        Raises:
          ValueError: a cloud has fewer points than the encoder has groups, or a group points.
        """
        t, dtype = self.table, self.dtype
        xyz = cloud.astype(wide(dtype))
        if xyz.shape[1] < max(t.groups, t.neighbours):
            raise ValueError(
                f"PointBERT makes {t.groups} groups of {t.neighbours} points; got clouds of "
                f"{xyz.shape[1]} points"
            )
        centres = points.gather(xyz, points.farthest_points(xyz, t.groups, skip_origin=False))
        near = points.nearest(centres, xyz, t.neighbours)
        around = points.gather(xyz, near) - centres[:, :, None]
        x = self._part("encoder", GroupEncoder, t.features, t.channels)(around)
        x = Dense(t.width, dtype=dtype, name="reduce_dim")(x)
        place = chain("pos_embed", (128, t.width), gelu, centres, dtype=dtype)
        x, place = self._with_class("cls_token", x), self._with_class("cls_pos", place)
        for i in range(t.depth):
            x = self._part(f"blocks.blocks.{i}", Block, t.heads)(x + place)
        x = LayerNorm(LAYER_NORM_EPS, name="norm")(x).astype(xyz.dtype)
        return jnp.concatenate([x[:, 0], largest(x[:, 1:], 1)], axis=-1)

    def _with_class(self, name, x):
        """Tokens with that parameter before them."""
        first = self.param(name, nn.initializers.zeros, (1, 1, x.shape[-1])).astype(x.dtype)
        return jnp.concatenate([jnp.broadcast_to(first, (len(x), *first.shape[1:])), x], axis=1)

    def _part(self, name, kind, *options):
        """A submodule, as a function of one array."""
        if not self.remat or self.is_initializing():
            return kind(*options, self.dtype, name=name)
        bare = kind(*options, self.dtype, parent=None)
        own = {group: tree[name] for group, tree in self.variables.items() if name in tree}
        return lambda x: rematerialised(bare.apply, own, x)


class Frozen(NamedTuple):
    """The weights of an encoder, a pytree.

    Attributes:
      params, stats: of `PointBert`.
      projection: (2 * width, D) from its vectors to those of captions.
    """

    params: PyTree
    stats: PyTree
    projection: jax.Array | np.ndarray


def names() -> list[str]:
    """Every encoder's name."""
    return list(MODELS)


def table_of(name: str) -> Table:
    """The table of that name.

    Raises:
      ValueError: unknown name, with the nearest ones.
    """
    if name not in MODELS:
        close = get_close_matches(name, MODELS, n=2, cutoff=0.4)
        raise ValueError(
            f"no point encoder named {name!r}"
            + (f": did you mean {', '.join(close)}?" if close else f"; one of {', '.join(MODELS)}")
        )
    return MODELS[name]


def embed(model: PointBert, weights: Frozen, cloud: jax.Array) -> jax.Array:
    """Vectors (B, D) of clouds (B, N, 3), of any length, comparable with those of captions."""
    variables = {"params": weights.params, "batch_stats": weights.stats}
    x: Any = model.apply(variables, cloud)
    return x @ weights.projection.astype(x.dtype)


def initialise(
    table: Table, seed: int, text_width: int = TEXT_WIDTH, dtype: Any = np.float32
) -> Frozen:
    """Random weights, on the host. An encoder of these tells clouds apart and knows no captions."""
    example = jax.ShapeDtypeStruct((1, max(table.groups, table.neighbours), 3), jnp.float32)
    learned = {"cls_token": 0.0, "cls_pos": 0.0}

    def deviation(path: str) -> float | Literal["xavier"]:
        return "xavier" if path.endswith("/kernel") else 0.0

    model = PointBert(table)
    params, stats = init.initialise(model, example, seed, learned, deviation, dtype)

    def normal(name, deviation, shape):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        return rng.normal(0.0, deviation, shape).astype(dtype)

    params |= {name: normal(name, 0.02, params[name].shape) for name in learned}
    inputs = 2 * table.width
    return Frozen(params, stats, normal("pc_projection", inputs**-0.5, (inputs, text_width)))


class Loaded(NamedTuple):
    """An encoder from a file.

    Attributes:
      table: that of the name, for the file's points, with colour or without.
      weights: of the encoder.
      log_scale: the logarithm of the factor on similarities; None if the file has none.
      lines: what was used of the file, for people.
    """

    table: Table
    weights: Frozen
    log_scale: float | None
    lines: list[str]


def load(weights: Weights, name: str = "pointbert") -> Loaded:
    """The encoder in a file of ULIP-2, or in a checkpoint of a completion network trained with it.

    Keys may have "module." and "point_encoder." before them, and other words before these. Whether
    points have colour follows from the first layer.

    Args:
      weights: of the file.
      name: of the table; a file does not tell numbers of heads, groups and neighbours.
    Raises:
      ValueError: no such table.
      WeightsError: the file does not hold this encoder whole, with its projection.
    """
    table = table_of(name)
    state, projection, log_scale, unused = _parts(weights.state)
    first = state.get("encoder.first_conv.0.weight")
    if first is not None and first.ndim == 3 and first.shape[1] in (3, 6):
        table = dataclasses.replace(table, channels=first.shape[1])
    params, stats = _shapes(table)
    needed = reference_shapes(params) | reference_shapes(stats)
    missing = [key for key in needed if key not in state]
    wrong = [
        f"{key} {state[key].shape} for {shape}"
        for key, shape in needed.items()
        if key in state and state[key].shape != shape
    ]
    if projection is None:
        missing.append("pc_projection")
    elif projection.ndim != 2 or len(projection) != 2 * table.width:
        wrong.append(f"pc_projection {projection.shape} for ({2 * table.width}, any)")
    spare = [key for key in state if key not in needed and not key.endswith("num_batches_tracked")]
    deeper = [key for key in spare if key.startswith("blocks.")]
    reasons = [
        f"{what}: {listed(keys, 6)}"
        for what, keys in (("missing", missing), ("of another shape", wrong), ("too many", deeper))
        if keys
    ]
    if reasons or projection is None:
        raise WeightsError(
            f"{weights.origin}: not the weights of {name}, of whose {len(needed) + 1} tensors "
            f"{len(needed) + 1 - len(missing) - len(wrong)} are there; {'; '.join(reasons)}"
        )
    used = {key: state[key] for key in needed} | {"pc_projection": projection}
    for key, value in used.items():
        if not np.isfinite(value).all():
            raise WeightsError(f"{weights.origin}: {key!r} holds values that are not finite")
    colour = "coordinates" if table.channels == 3 else f"coordinates and colour (grey, {GREY})"
    lines = [
        f"{name} from {weights.origin}: all {len(used)} tensors, for points of {colour}, "
        f"vectors of {projection.shape[1]}"
    ]
    if spare + unused:
        lines.append(f"  not used of the file: {listed(spare + unused, 6)}")
    params, stats = from_reference(state, params, stats)
    return Loaded(table, Frozen(params, stats, projection), log_scale, lines)


def without_colour(loaded: Loaded) -> Loaded:
    """The same encoder for coordinates alone: what grey adds to the first layer is a constant."""
    if loaded.table.channels == 3:
        return loaded
    params = dict(loaded.weights.params)
    encoder = dict(params["encoder"])
    first = dict(encoder["first_conv.0"])
    kernel = np.asarray(first["kernel"])
    grey = GREY * kernel[..., 3:, :].sum(axis=tuple(range(kernel.ndim - 1)), dtype=np.float64)
    first["bias"] = (first["bias"] + grey).astype(kernel.dtype)
    first["kernel"] = kernel[..., :3, :]
    encoder["first_conv.0"] = first
    params["encoder"] = encoder
    table = dataclasses.replace(loaded.table, channels=3)
    return loaded._replace(table=table, weights=loaded.weights._replace(params=params))


def _parts(state) -> tuple[dict[str, np.ndarray], np.ndarray | None, float | None, list[str]]:
    """A file's encoder, projection and logarithm of the scale, and other keys."""
    # A prefix that ends in "_": torch_file.read takes the "module." out of "ulip_loss_module." too.
    marked = re.compile(r"(?:.*[._])?point_encoder\.(.+)")
    other = re.compile(r"(?:.*[._])?(pc_projection|logit_scale)")
    plain = {re.sub(r"(^|\.)(module\.)+", r"\1", key): value for key, value in state.items()}
    bare = not any(map(marked.fullmatch, plain))
    encoder, single, unused = {}, {}, []
    for key, value in plain.items():
        inside, alone = marked.fullmatch(key), other.fullmatch(key)
        if inside:
            encoder[inside[1]] = value
        elif alone:
            single[alone[1]] = value
        elif bare:
            encoder[key] = value
        else:
            unused.append(key)
    scale = single.get("logit_scale")
    log_scale = float(scale.item()) if scale is not None and scale.size == 1 else None
    return encoder, single.get("pc_projection"), log_scale, unused


def _shapes(table: Table) -> tuple[PyTree, PyTree]:
    """Shapes and dtypes of parameters and statistics."""
    example = jax.ShapeDtypeStruct((1, max(table.groups, table.neighbours), 3), jnp.float32)
    variables = jax.eval_shape(lambda x: PointBert(table).init(jax.random.key(0), x), example)
    return variables["params"], variables["batch_stats"]
