"""PoinTr and AdaPoinTr as tables, and the two networks that read them.

Both turn a partial cloud into centres with features, encode these with a transformer, predict a
coarse cloud, decode every coarse point as a query, and spread points around it.
Sources: Yu et al. 2021, arXiv:2108.08839 (PoinTr); Yu et al. 2023, arXiv:2301.04545 (AdaPoinTr).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum.accumulate import Groups
from jaxaccum.machine.jax_stand_ins import gelu
from jaxaccum.models import init, points
from jaxaccum.models import point_blocks as blocks
from jaxaccum.models import point_groupers as groupers
from jaxaccum.models import point_heads as heads
from jaxaccum.models.blocks import rematerialised
from jaxaccum.models.point_layers import (
    Dense,
    LayerNorm,
    chain,
    largest,
    leaky,
    normed_pair,
    wide,
)

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Table:
    """What makes a network.

    Attributes:
      kind: "pointr" or "adapointr".
      queries: coarse points, each a query of the decoder.
      points_per_query: fine points around each.
      centres: points that the grouper keeps halfway, and in the end.
      encoder: style of every block, see `point_blocks.parse_style`.
      decoder_self, decoder_cross: of the two attentions of every block.
      combine: of an attention and a local operation: "concat" or "onebyone".
      head: "fold" (a square number of points per query) or "fc".
      grouper: "dgcnn" or "pn".
      width: channels of a token. heads: of attentions.
      global_width: channels of the features of a whole cloud.
      neighbours: of local operations. offset_groups: of deforming ones.
      denoise: jittered input points that training adds to the queries.
      num_input: points of a partial cloud.
    """

    kind: Literal["pointr", "adapointr"]
    queries: int
    points_per_query: int
    centres: tuple[int, int]
    encoder: tuple[str, ...]
    decoder_self: tuple[str, ...]
    decoder_cross: tuple[str, ...]
    combine: Literal["concat", "onebyone"] = "concat"
    head: Literal["fold", "fc"] = "fc"
    grouper: Literal["dgcnn", "pn"] = "dgcnn"
    width: int = 384
    heads: int = 6
    global_width: int = 1024
    neighbours: int = 8
    offset_groups: int = 2
    denoise: int = 0
    num_input: int = 2048

    def __post_init__(self):
        if len(self.decoder_self) != len(self.decoder_cross):
            raise ValueError(
                f"decoder_self names {len(self.decoder_self)} blocks and decoder_cross "
                f"{len(self.decoder_cross)}: a decoder block has one style of each"
            )
        for style in (*self.encoder, *self.decoder_self):
            blocks.parse_style(style)
        for style in self.decoder_cross:
            blocks.parse_style(style, cross=True)
        styles = {*self.encoder, *self.decoder_self, *self.decoder_cross}
        if self.kind == "pointr" and styles - {"attn", "attn-graph"}:
            raise ValueError(f"blocks of PoinTr are attn or attn-graph; got {sorted(styles)}")
        if self.head == "fold" and math.isqrt(self.points_per_query) ** 2 != self.points_per_query:
            raise ValueError(
                f"the fold head spreads a square number of points; got {self.points_per_query}"
            )


def _first(style: str, depth: int) -> tuple[str, ...]:
    """That style for the first block, plain attention for the others."""
    return (style, *["attn"] * (depth - 1))


def _size(encoder: int, decoder: int, width: int = 384, global_width: int = 1024) -> dict[str, Any]:
    """Blocks, the first of each stack with a graph, and channels."""
    own = _first("attn-graph", decoder)
    return {"encoder": _first("attn-graph", encoder), "decoder_self": own, "decoder_cross": own,
            "width": width, "global_width": global_width}  # fmt: skip


# Queries, points per query, centres, size. The small ones are ours, for a laptop.
_FULL = _size(6, 8)
MODELS: dict[str, Table] = {
    "pointr-pcn": Table("pointr", 224, 64, (512, 128), **_FULL, head="fold"),
    "pointr-shapenet": Table("pointr", 96, 64, (512, 128), **_FULL, head="fold"),
    "pointr-small": Table("pointr", 64, 64, (256, 128), **_size(3, 4, 192, 512), head="fold"),
    "adapointr-pcn": Table("adapointr", 512, 32, (512, 256), **_FULL, denoise=64),
    "adapointr-shapenet": Table("adapointr", 512, 16, (512, 256), **_FULL, denoise=64),
    "adapointr-projected": Table("adapointr", 512, 16, (256, 128), **_FULL, denoise=64),
    "adapointr-small": Table("adapointr", 256, 16, (256, 128), **_size(3, 4, 192, 512), denoise=32),
}


class Clouds(NamedTuple):
    """What a network makes of partial clouds; coordinates in at least float32.

    Attributes:
      coarse: (B, M, 3). fine: (B, P, 3). Of PoinTr both hold points of the input as well: after
        the coarse ones as many of its farthest points, after the fine ones all of it.
      centres: (B, D, 3) the jittered points, where noise was given.
      denoised: (B, D * S, 3) the points around them.
    """

    coarse: jax.Array
    fine: jax.Array
    centres: jax.Array | None = None
    denoised: jax.Array | None = None


class Completion(nn.Module):
    """A network read from a table; see its subclasses.

    Attributes:
      model: its name.
      table: what it is made of.
      dtype: compute dtype of features; parameters and statistics stay as they are given.
      remat: keep only the inputs of every transformer block, and compute the rest again in the
        backward pass.
      text_width: numbers of a caption's vector, for a network that can be given captions; 0 for
        one that cannot.
    """

    model: str
    table: Table
    dtype: Any = jnp.float32
    remat: bool = False
    text_width: int = 0

    layout: ClassVar[blocks.Layout]

    @property
    def num_input(self) -> int:
        """Points of a partial cloud."""
        return self.table.num_input

    @property
    def num_points(self) -> int:
        """Fine points of the output."""
        return self.table.queries * self.table.points_per_query

    @property
    def points_per_query(self) -> int:
        return self.table.points_per_query

    @property
    def denoise_points(self) -> int:
        """Points to be jittered in training; 0 if there are none."""
        return self.table.denoise

    def group(self, xyz, groups, samples):
        """Centres, their features, and the `samples` farthest points, each of the cloud xyz."""
        t = self.table
        farthest = points.farthest_points(xyz, max(t.centres[0], samples))
        kind = {"dgcnn": groupers.EdgeGrouper, "pn": groupers.PointNetGrouper}[t.grouper]
        grouper = kind(t.centres, dtype=self.dtype, name="base_model.grouper")
        centres, features = grouper(xyz, farthest, groups)
        return centres, features, points.gather(xyz, farthest[:, :samples])

    def block(self, kind, name, ordinary=None, **styles):
        """A transformer block, as a function."""
        t = self.table
        options = (t.heads, self.layout, t.combine, t.offset_groups, ordinary, self.dtype)
        block = kind(*options, **styles, name=name)
        if not self.remat or self.is_initializing():
            return block
        bare = kind(*options, **styles, parent=None)

        def function(params, inputs):
            return bare.apply({"params": params}, *_numbers(inputs, jnp.int32))

        params = self.variables["params"][name]
        # Indices are smaller than 2^24, which float32 holds.
        return lambda *x: rematerialised(function, params, _numbers(x, jnp.float32))

    def decode(self, q, xyz, memory, centres, prefix, ordinary):
        """Queries (B, M, C) at xyz through the decoder."""
        t = self.table
        own = blocks.own_neighbours(xyz, t.neighbours, ordinary)
        cross = blocks.neighbours(xyz, centres, t.neighbours)
        for i, (a, b) in enumerate(zip(t.decoder_self, t.decoder_cross, strict=True)):
            block = self.block(blocks.DecoderBlock, f"{prefix}.{i}", ordinary, own=a, cross=b)
            q = block(q, memory, own, cross)
        return q

    def spread(self, q, xyz, groups, name):
        """Points (B, M, S, 3) around queries."""
        t = self.table
        x = normed_pair("increase_dim", t.global_width, t.global_width, q, groups, self.dtype)
        everywhere = largest(x, 1)[:, None]
        x = Dense(t.width, dtype=self.dtype, name="reduce_map")(everywhere, q, xyz)
        kind: Any = {"fold": heads.Fold, "fc": heads.FullyConnected}[t.head]
        return kind(t.points_per_query, dtype=self.dtype, name=name)(x, groups) + xyz[:, :, None]

    def coordinates(self, cloud: jax.Array) -> jax.Array:
        return cloud.astype(wide(self.dtype))


def _numbers(inputs, dtype):
    """Inputs of a block, the indices of neighbours in that dtype."""
    return tuple(
        x._replace(nearest=x.nearest.astype(dtype)) if isinstance(x, blocks.Neighbours) else x
        for x in inputs
    )


def _flat(clouds: jax.Array) -> jax.Array:
    """(B, M, S, 3) to (B, M * S, 3)."""
    return clouds.reshape(clouds.shape[0], -1, 3)


class PoinTr(Completion):
    """Yu et al. 2021: coarse points from the features of the whole cloud, each folded out."""

    layout: ClassVar[blocks.Layout] = blocks.POINTR

    @property
    def num_points(self) -> int:
        """Fine points of the output, the input among them."""
        return super().num_points + self.num_input

    @nn.compact
    def __call__(
        self,
        partial: jax.Array,
        groups: Groups | None = None,
        noise: jax.Array | None = None,
        text: jax.Array | None = None,
    ) -> Clouds:
        """Completed clouds.

        Args:
          partial: (B, num_input, 3); points nearer to the origin than 0.0316 are padding.
          groups: how samples share batch statistics; None for the running ones.
          noise, text: None; PoinTr has nothing to denoise and takes no captions.
        """
        if text is not None:
            raise ValueError(f"{self.model} takes no captions: give text=None")
        if noise is not None and noise.shape[1]:
            raise ValueError(f"{self.model} has no points to denoise: give noise=None")
        t, dtype, base = self.table, self.dtype, "base_model"
        xyz = self.coordinates(partial)
        centres, features, sample = self.group(xyz, groups, t.queries)
        place = normed_pair(f"{base}.pos_embed", 128, t.width, centres, groups, dtype)
        x = normed_pair(f"{base}.input_proj", t.width, t.width, features, groups, dtype)
        near = blocks.neighbours(centres, centres, t.neighbours)
        for i, style in enumerate(t.encoder):
            block = self.block(blocks.EncoderBlock, f"{base}.encoder.{i}", style=style)
            x = block(x + place, near)
        wider = (t.global_width, t.global_width)
        everywhere = normed_pair(f"{base}.increase_dim", *wider, x, groups, dtype)
        everywhere = largest(everywhere, 1)[:, None]
        coarse = chain(
            f"{base}.coarse_pred", (t.global_width, 3 * t.queries), jax.nn.relu, everywhere,
            dtype=dtype, last=wide(dtype),
        ).reshape(-1, t.queries, 3)  # fmt: skip
        q = chain(
            f"{base}.mlp_query", (*wider, t.width), leaky, everywhere, coarse, axes=1, dtype=dtype
        )
        q = self.decode(q, coarse, x, centres, f"{base}.decoder", t.queries)
        fine = self.spread(q, coarse, groups, "foldingnet")
        return Clouds(
            jnp.concatenate([coarse, sample], axis=1), jnp.concatenate([_flat(fine), xyz], axis=1)
        )


class AdaPoinTr(Completion):
    """Yu et al. 2023: queries chosen among coarse points and the input; training denoises some."""

    layout: ClassVar[blocks.Layout] = blocks.ADAPOINTR

    @nn.compact
    def __call__(
        self,
        partial: jax.Array,
        groups: Groups | None = None,
        noise: jax.Array | None = None,
        text: jax.Array | None = None,
    ) -> Clouds:
        """Completed clouds.

        Args:
          partial: (B, num_input, 3); points nearer to the origin than 0.0316 are padding.
          groups: how samples share batch statistics; None for the running ones.
          noise: (B, denoise_points, 3) what to add to the farthest points of the input, for the
            network as it is trained; None to leave these out.
          text: (B, text_width) a vector per caption, which all queries of the sample see; None
            for the network without captions, whose layer for queries is another.
        """
        t, dtype, base = self.table, self.dtype, "base_model"
        xyz = self.coordinates(partial)
        if noise is not None and noise.shape != (xyz.shape[0], t.denoise, 3):
            raise ValueError(
                f"{self.model} takes noise of shape {(xyz.shape[0], t.denoise, 3)}; "
                f"got {noise.shape}"
            )
        if text is not None:
            self._check_text(text, xyz.shape[0])
        centres, features, sample = self.group(xyz, groups, max(t.queries // 2, t.denoise))
        place = chain(f"{base}.pos_embed", (128, t.width), gelu, centres, dtype=dtype)
        x = chain(f"{base}.input_proj", (512, t.width), gelu, features, dtype=dtype) + place
        near = blocks.neighbours(centres, centres, t.neighbours)
        for i, style in enumerate(t.encoder):
            block = self.block(
                blocks.EncoderBlock, f"{base}.encoder.blocks.blocks.{i}", style=style
            )
            x = block(x, near)
        if self.is_initializing():  # the reference has it and never applies it
            LayerNorm(self.layout.eps, name=f"{base}.encoder.norm")(x)
        wider = (t.global_width, t.global_width)
        everywhere = chain(f"{base}.increase_dim", wider, gelu, x, dtype=dtype)
        everywhere = largest(everywhere, 1)[:, None]
        coarse = chain(
            f"{base}.coarse_pred", (t.global_width, 3 * t.queries), gelu, everywhere,
            dtype=dtype, last=wide(dtype),
        ).reshape(-1, t.queries, 3)  # fmt: skip
        candidates = jnp.concatenate([coarse, sample[:, : t.queries // 2]], axis=1)
        coarse = tokens = points.gather(candidates, self._best(candidates))
        if noise is not None:
            jittered = sample[:, : t.denoise] + self.coordinates(noise)
            tokens = jnp.concatenate([coarse, jittered], axis=1)
        q = self._queries(everywhere, tokens, text)
        q = self.decode(q, tokens, x, centres, f"{base}.decoder.blocks.blocks", t.queries)
        fine = self.spread(q, tokens, groups, "decode_head")
        if noise is None:
            return Clouds(coarse, _flat(fine))
        first, rest = fine[:, : t.queries], fine[:, t.queries :]
        return Clouds(coarse, _flat(first), jittered, _flat(rest))

    def _check_text(self, text: jax.Array, samples: int) -> None:
        if not self.text_width:
            raise ValueError(f"{self.model} was created without captions; give it a text_width")
        if text.shape != (samples, self.text_width):
            raise ValueError(
                f"{self.model} takes captions of shape {(samples, self.text_width)}; "
                f"got {text.shape}"
            )

    def _queries(self, everywhere: jax.Array, tokens: jax.Array, text: jax.Array | None):
        """Features of queries (B, M, C) from those of the cloud, their places and a caption."""
        t = self.table

        def layer(name, *parts):
            widths = (t.global_width, t.global_width, t.width)
            return chain(f"base_model.{name}", widths, gelu, *parts, dtype=self.dtype)

        if self.is_initializing() and self.text_width:  # both sets of parameters exist
            blank = jnp.zeros((len(tokens), 1, self.text_width), self.dtype)
            layer("mlp_query_text", everywhere, blank, tokens)
        if text is None or self.is_initializing():
            return layer("mlp_query", everywhere, tokens)
        return layer("mlp_query_text", everywhere, text[:, None].astype(self.dtype), tokens)

    def _best(self, candidates: jax.Array) -> jax.Array:
        """The candidates (B, queries) that a small network ranks highest, best first.

        Nothing trains it. The reference ranks by the sigmoid of its output, which is the same
        order but for ties: near 1/2, where untrained scores are, float32 has few sigmoids.
        """
        candidates = jax.lax.stop_gradient(candidates)
        scores = chain(
            "base_model.query_ranking", (256, 256, 1), gelu, candidates, dtype=candidates.dtype
        )
        return jax.lax.top_k(scores[..., 0], self.table.queries)[1]


_KINDS: dict[str, type[Completion]] = {"pointr": PoinTr, "adapointr": AdaPoinTr}


def names() -> list[str]:
    """Every model name."""
    return list(MODELS)


def create(name: str, dtype: Any = jnp.float32, text_width: int = 0) -> Completion:
    """The model of that name; `names()` lists them.

    Args:
      name: family-data set, or family-small.
      dtype: compute dtype of features.
      text_width: numbers of a caption's vector, 0 for no captions; AdaPoinTr alone can have them.
    Raises:
      ValueError: unknown name, with the nearest ones; or captions for PoinTr.
    """
    if name not in MODELS:
        close = get_close_matches(name, MODELS, n=3, cutoff=0.4)
        raise ValueError(
            f"no completion model named {name!r}"
            + (f": did you mean {', '.join(close)}?" if close else f"; one of {', '.join(MODELS)}")
        )
    kind = MODELS[name].kind
    if text_width and kind != "adapointr":
        able = ", ".join(n for n, table in MODELS.items() if table.kind == "adapointr")
        raise ValueError(f"{name} takes no captions (text_width {text_width}); one of {able} does")
    return _KINDS[kind](name, MODELS[name], dtype, text_width=text_width, name=name)


def untrained(name: str, path: str, text: bool = False) -> bool:
    """Whether no loss of a model has a gradient with respect to a parameter.

    Args:
      name: of the model. path: of the parameter, such as "base_model.encoder.norm/scale".
      text: the model is given captions, and with them uses the other one of two layers.
    """
    if MODELS[name].kind == "adapointr":
        idle = "mlp_query" if text else "mlp_query_text"
        never = rf"base_model\.(query_ranking|encoder\.norm|{idle}\.)"
        return re.match(never, path) is not None or (
            re.search(r"/(linear_offset\.\d|proj_v_off)/", path) is not None
        )
    table = MODELS[name]
    found = re.match(r"base_model\.(encoder|decoder)\.(\d+)/(knn|merge)_map(_cross)?", path)
    if found is None:
        return False
    stage, index, _, cross = found.groups()
    styles = (
        table.encoder
        if stage == "encoder"
        else (table.decoder_cross if cross else table.decoder_self)
    )
    return "graph" not in styles[int(index)]


def initial_deviation(model: Completion) -> Callable[[str], float | Literal["xavier"] | None]:
    """How the parameters of a model start, by path; see `init.initialise`.

    Linear maps of the transformer have a deviation of 0.02 and biases of zero; of PoinTr its
    convolutions of size 1 are Xavier normal. Groupers and the head are left to the default.
    """
    pointr = model.table.kind == "pointr"
    convolutions = r"base_model\.(pos_embed|input_proj|increase_dim|mlp_query|grouper/input_trans)"

    def deviation(path: str) -> float | Literal["xavier"] | None:
        if pointr and re.match(convolutions, path):
            return "xavier" if path.endswith("/kernel") else None
        if not path.startswith("base_model.") or path.startswith("base_model.grouper"):
            return None
        return 0.02 if path.endswith("/kernel") else 0.0

    return deviation


def initialise(model: Completion, seed: int, dtype: Any = np.float32) -> tuple[PyTree, PyTree]:
    """Initial (params, stats), on the host."""
    example = jax.ShapeDtypeStruct((1, model.num_input, 3), jnp.float32)
    return init.initialise(model, example, seed, {}, initial_deviation(model), dtype)
