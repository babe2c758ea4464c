"""The encoder and decoder blocks of PoinTr and AdaPoinTr, on clouds (B, N, channels).

Submodules carry the names of the reference's state-dict keys, so that a parameter's path, joined
by dots, is its key. Features are computed in `dtype`; coordinates keep at least float32, also
where they enter a layer. Neighbours come in as indices, found once per set of coordinates.

Sources: Yu et al. 2021, arXiv:2108.08839 (PoinTr); Yu et al. 2023, arXiv:2301.04545 (AdaPoinTr).
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxaccum.machine.jax_stand_ins import gelu
from jaxaccum.models import points
from jaxaccum.models.point_layers import (
    Dense,
    Dtype,
    EdgeMap,
    LayerNorm,
    attend,
    largest,
    leaky,
    settled,
    thirds,
    wide,
)


class Names(NamedTuple):
    """What a block calls an attention, its local partner, that one's map if it is a graph, and
    the map that merges both."""

    attention: str
    local: str
    graph: str
    merge: str


class Layout(NamedTuple):
    """What differs between the blocks of two families.

    Attributes:
      encoder, own, cross: names in an encoder block, and of the two attentions of a decoder block.
      eps: of layer norms.
      qkv_bias: queries, keys and values have a bias.
      spare: blocks without a graph have its weights all the same, and never use them.
    """

    encoder: Names
    own: Names
    cross: Names
    eps: float
    qkv_bias: bool
    spare: bool


POINTR = Layout(
    Names("attn", "", "knn_map.0", "merge_map"),
    Names("self_attn", "", "knn_map.0", "merge_map"),
    Names("attn", "", "knn_map_cross.0", "merge_map_cross"),
    eps=1e-5, qkv_bias=False, spare=True,
)  # fmt: skip
ADAPOINTR = Layout(
    Names("attn", "local_attn", "local_attn.knn_map.0", "merge_map"),
    Names("self_attn", "local_self_attn", "local_self_attn.knn_map.0", "self_attn_merge_map"),
    Names("cross_attn", "local_cross_attn", "local_cross_attn.knn_map.0", "cross_attn_merge_map"),
    eps=1e-6, qkv_bias=True, spare=False,
)  # fmt: skip

LOCAL = ("graph", "deform", "rw_deform", "deform_graph")


def parse_style(style: str, cross: bool = False) -> tuple[bool, str]:
    """A block's style, as whether it attends and its local operation ("" for none).

    Args:
      style: "attn", one of `LOCAL`, or both joined by "-".
      cross: queries are other points than keys.
    Raises:
      ValueError: it is something else.
    """
    words = style.split("-")
    attention = "attn" in words
    local = [word for word in words if word in LOCAL]
    if len(local) > 1 or len(words) != attention + len(local) or (cross and "rw_deform" in local):
        allowed = [kind for kind in LOCAL if not (cross and kind == "rw_deform")]
        raise ValueError(
            f"a block's style is 'attn', one of {', '.join(allowed)}, or 'attn-' and one of them; "
            f"got {style!r}{' between queries and centres' if cross else ''}"
        )
    return attention, local[0] if local else ""


class Neighbours(NamedTuple):
    """Where queries and keys are, and which keys are near a query.

    Attributes:
      q_xyz: (B, Q, 3). v_xyz: (B, N, 3).
      nearest: (B, Q, k) the keys near each query.
    """

    q_xyz: jax.Array
    v_xyz: jax.Array
    nearest: jax.Array


def neighbours(q_xyz: jax.Array, v_xyz: jax.Array, k: int) -> Neighbours:
    return Neighbours(q_xyz, v_xyz, points.nearest(q_xyz, v_xyz, k))


def own_neighbours(xyz: jax.Array, k: int, ordinary: int) -> Neighbours:
    """Neighbours among the same points; those of the first `ordinary` are among these alone."""
    index = points.nearest(xyz[:, :ordinary], xyz[:, :ordinary], k)
    if ordinary < xyz.shape[1]:
        rest = points.nearest(xyz[:, ordinary:], xyz, k)
        index = jnp.concatenate([index, rest], axis=1)
    return Neighbours(xyz, xyz, index)


def _heads(x, heads):
    return x.reshape(*x.shape[:-1], heads, -1)


class SelfAttention(nn.Module):
    """Attention of tokens to each other.

    Attributes:
      ordinary: tokens before this one attend to those before it alone; None for no such limit.
    """

    heads: int
    qkv_bias: bool
    ordinary: int | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        qkv = Dense(3 * x.shape[-1], use_bias=self.qkv_bias, dtype=self.dtype, name="qkv")(x)
        q, k, v = (_heads(a, self.heads) for a in thirds(qkv))
        limit = self.ordinary
        if limit is None or limit == x.shape[1]:
            out = attend(q, k, v)
        else:
            first = attend(q[:, :limit], k[:, :limit], v[:, :limit])
            out = jnp.concatenate([first, attend(q[:, limit:], k, v)], axis=1)
        return Dense(x.shape[-1], dtype=self.dtype, name="proj")(out.reshape(x.shape))


class CrossAttention(nn.Module):
    """Attention of queries to other tokens."""

    heads: int
    qkv_bias: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, q: jax.Array, v: jax.Array) -> jax.Array:
        def heads(name, x):
            layer = Dense(q.shape[-1], use_bias=self.qkv_bias, dtype=self.dtype, name=name)
            return _heads(layer(x), self.heads)

        out = attend(heads("q_map", q), heads("k_map", v), heads("v_map", v))
        return Dense(q.shape[-1], dtype=self.dtype, name="proj")(out.reshape(q.shape))


class Deform(nn.Module):
    """A local operation on features taken beside the neighbours, where an offset points to.

    In no published configuration. There is no gradient through where features are taken, so none
    for `proj_v_off` and `linear_offset`.

    Attributes:
      kind: "deform": a query attends to its k features. "rw_deform": the neighbours' queries
        attend to the k features, and the maximum is taken. "deform_graph": an edge map of the
        features, offsets within half the extent of the neighbourhood.
      groups: of channels, each with its own offsets; deform_graph has one.
      ordinary: the first so many queries take features from the first so many keys alone.
    """

    kind: str
    heads: int
    groups: int
    qkv_bias: bool
    ordinary: int | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, q: jax.Array, v: jax.Array, near: Neighbours) -> jax.Array:
        """q: (B, Q, C); v: (B, N, C). Returns (B, Q, C)."""
        channels = q.shape[-1]
        graph = self.kind == "deform_graph"
        groups = 1 if graph else self.groups

        def project(name, x, bias=self.qkv_bias):
            return Dense(channels, use_bias=bias, dtype=self.dtype, name=name)(x)

        query = q if graph else project("proj_q", q)
        shifts = points.gather(project("proj_v_off", v), near.nearest)
        hidden = Dense(channels, dtype=self.dtype, name="linear_offset.0")(
            _heads(shifts, groups), _heads(query, groups)[:, :, None]
        )
        hidden = gelu(LayerNorm(1e-5, name="linear_offset.1")(hidden))
        offset = Dense(3, use_bias=False, dtype=wide(self.dtype), name="linear_offset.3")(hidden)
        around = points.gather(near.v_xyz, near.nearest)
        offset = jnp.tanh(offset)
        if graph:
            offset = offset * ((around.max(2) - around.min(2)) / 2)[:, :, None, None]
        place = around[:, :, :, None] + offset  # (B, Q, k, groups, 3)
        taken = [
            self._take(part, near.v_xyz, place[..., i, :])
            for i, part in enumerate(jnp.split(v, groups, axis=-1))
        ]
        features = jnp.concatenate(taken, axis=-1)
        if graph:
            edge = EdgeMap(channels, dtype=self.dtype, name="knn_map.0")
            return leaky(edge(q, features, None, pool=True))
        one = self.kind == "deform"
        query = query[:, :, None] if one else points.gather(query, near.nearest)
        out = attend(
            _heads(query, self.heads),
            _heads(project("proj_k", features), self.heads),
            _heads(project("proj_v", features), self.heads),
        ).reshape(query.shape)
        return project("proj", out[:, :, 0] if one else largest(out, 2), bias=True)

    def _take(self, values, xyz, place):
        """Features at places (B, Q, k, 3)."""
        limit = self.ordinary
        b, q, k, _ = place.shape

        def taken(values, xyz, place):
            return points.interpolate(values, xyz, place.reshape(b, -1, 3))

        if limit is None or limit == q:
            out = taken(values, xyz, place)
        else:
            first = taken(values[:, :limit], xyz[:, :limit], place[:, :limit])
            out = jnp.concatenate([first, taken(values, xyz, place[:, limit:])], axis=1)
        return out.reshape(b, q, k, -1).astype(self.dtype)


class Block(nn.Module):
    """What encoder and decoder blocks share.

    Attributes:
      heads: of attentions.
      layout: names, and what else differs between families.
      combine: of an attention and a local operation: "concat", both on the same input and merged
        by a linear map, or "onebyone".
      offset_groups: of a deforming operation.
      ordinary: the first so many tokens do not see the others; None for no such limit.
    """

    heads: int
    layout: Layout
    combine: str = "concat"
    offset_groups: int = 2
    ordinary: int | None = None
    dtype: Dtype = jnp.float32

    def mix(self, x, style, names, norms, attend_, v_of, near, ordinary=None):
        """Adds attention and local operation of one style to x.

        Args:
          names: of the layers. norms: functions that normalise x, first and second time.
          attend_: attention of the normalised x. v_of: from the normalised x to the tokens that
            the local operation looks at. near: these tokens' neighbourhoods. ordinary: as above.
        """
        attention, kind = parse_style(style)
        channels = x.shape[-1]

        def local(n, kind=kind):
            if kind == "graph":
                edge = EdgeMap(channels, dtype=self.dtype, name=names.graph)
                return leaky(edge(n, v_of(n), near.nearest, pool=True))
            deform = Deform(kind, self.heads, self.offset_groups, self.layout.qkv_bias,
                            ordinary, self.dtype, name=names.local)  # fmt: skip
            return deform(n, v_of(n), near)

        def merge(a, b):
            return Dense(channels, dtype=self.dtype, name=names.merge)(a, b)

        if attention and kind and self.combine == "onebyone":
            x = settled(x + attend_(norms[0](x)))
            return settled(x + local(norms[1](x)))
        n = norms[0](x)
        if self.layout.spare and not kind and self.is_initializing():
            merge(n, local(n, "graph"))
        if attention and kind:
            return settled(x + merge(attend_(n), local(n)))
        return settled(x + (local(n) if kind else attend_(n)))

    def norm(self, name):
        return LayerNorm(self.layout.eps, name=name)

    def mlp(self, x):
        """Two linear maps, the hidden one twice as wide."""
        y = gelu(Dense(2 * x.shape[-1], dtype=self.dtype, name="mlp.fc1")(self.norm("norm2")(x)))
        return settled(x + Dense(x.shape[-1], dtype=self.dtype, name="mlp.fc2")(y))


class EncoderBlock(Block):
    """Attention and local operation among the centres, then an MLP, each added to its input."""

    style: str = "attn"

    @nn.compact
    def __call__(self, x: jax.Array, near: Neighbours) -> jax.Array:
        names = self.layout.encoder
        norms = self.norm("norm1"), lambda x: self.norm("norm3")(x)
        attention = SelfAttention(
            self.heads, self.layout.qkv_bias, self.ordinary, self.dtype, name=names.attention
        )
        x = self.mix(x, self.style, names, norms, attention, lambda n: n, near, self.ordinary)
        return self.mlp(x)


class DecoderBlock(Block):
    """The same among the queries, then between queries and centres, then an MLP."""

    own: str = "attn"
    cross: str = "attn"

    @nn.compact
    def __call__(
        self, q: jax.Array, memory: jax.Array, own_near: Neighbours, cross_near: Neighbours
    ) -> jax.Array:
        names = self.layout.own
        norms = self.norm("norm1"), lambda x: self.norm("norm3")(x)
        attention = SelfAttention(
            self.heads, self.layout.qkv_bias, self.ordinary, self.dtype, name=names.attention
        )
        q = self.mix(q, self.own, names, norms, attention, lambda n: n, own_near, self.ordinary)
        names = self.layout.cross
        norm = self.norm("norm_q")
        v = self.norm("norm_v")(memory)
        cross = CrossAttention(self.heads, self.layout.qkv_bias, self.dtype, name=names.attention)
        q = self.mix(
            q, self.cross, names, (norm, norm), lambda n: cross(n, v), lambda _: v, cross_near
        )
        return self.mlp(q)
