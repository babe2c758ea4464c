"""The building blocks of PoinTr and AdaPoinTr, as Linen modules on clouds (B, N, channels).

Submodules carry the names of the reference's state-dict keys, so that a parameter's path, joined
by dots, is its key. Features are computed in `dtype`; coordinates keep at least float32, also
where they enter a layer. Neighbours come in as indices, found once per set of coordinates.

Sources: Yu et al. 2021, arXiv:2108.08839 (PoinTr); Yu et al. 2023, arXiv:2301.04545 (AdaPoinTr);
Wang et al. 2019, arXiv:1801.07829 (edge convolution); Yang et al. 2018, arXiv:1712.07262 (folding).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum.accumulate import GroupBatchNorm, Groups
from jaxaccum.jax_stand_ins import gelu
from jaxaccum.models import points

Dtype = Any
SLOPE = 0.2  # of every leaky ReLU
BATCH_NORM_EPS = 1e-5


def wide(dtype: Dtype) -> Dtype:
    """The dtype of coordinates where features have that one."""
    return jnp.promote_types(dtype, jnp.float32)


def leaky(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, SLOPE * x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def largest(x: jax.Array, axis: int) -> jax.Array:
    """Maximum over an axis; the first of equal values takes the whole gradient.

    Its own derivative, since `x == max(x)` fails where a fused program computes x twice.
    """
    return jnp.max(x, axis)


def _largest_forward(x, axis):
    place = jnp.arange(x.shape[axis]).reshape([-1 if i == axis % x.ndim else 1
                                               for i in range(x.ndim)])  # fmt: skip
    return jnp.max(x, axis), (jnp.argmax(x, axis), place)


def _largest_backward(axis, residuals, dy):
    index, place = residuals
    return (jnp.where(jnp.expand_dims(index, axis) == place, jnp.expand_dims(dy, axis), 0),)


largest.defvjp(_largest_forward, _largest_backward)


@jax.custom_vjp
def settled(x: jax.Array) -> jax.Array:
    """x, whose gradient is computed once.

    XLA's CPU backend would fuse the sums of gradients along a chain of residual blocks, and those
    of the norms with them, into every layer that reads one: work that grows with the square of the
    depth. It fuses nothing across a branch; barriers it drops before.
    """
    return x


def _settled_backward(_, dy):
    def cpu(dy):
        first = dy.ravel()[0]
        return jax.lax.cond(first == first, lambda a: a, lambda a: a * jnp.nan, dy)

    return (jax.lax.platform_dependent(dy, cpu=cpu, default=lambda dy: dy),)


settled.defvjp(lambda x: (x, None), _settled_backward)


class Dense(nn.Module):
    """A linear map of channels.

    Attributes:
      features: channels of the result.
      axes: unit axes before those of the kernel, as a convolution of size 1 over so many has.
    """

    features: int
    axes: int = 0
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, *parts: jax.Array) -> jax.Array:
        """Maps the channels of all parts (..., c_i) together, in their order.

        Their other axes broadcast; what is the same for many points is multiplied once.
        """
        inputs = sum(part.shape[-1] for part in parts)
        shape = (*[1] * self.axes, inputs, self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        total: Any = 0
        start = 0
        for part in parts:
            dtype = jnp.promote_types(part.dtype, self.dtype)
            stop = start + part.shape[-1]
            rows = kernel.reshape(inputs, self.features)[start:stop]
            total = total + part.astype(dtype) @ rows.astype(dtype)
            start = stop
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            total = total + bias.astype(total.dtype)
        return total.astype(self.dtype)


def chain(
    prefix: str,
    widths: tuple[int, ...],
    activation: Callable[[jax.Array], jax.Array],
    *parts: jax.Array,
    axes: int = 0,
    dtype: Dtype,
    last: Dtype = None,
) -> jax.Array:
    """Linear maps "prefix.0", "prefix.2", ... with an activation in between.

    Args:
      widths: of the maps. parts: the input of the first. axes: see `Dense`.
      dtype: of the results; last: of the last one, if it is another.
    """
    for i, width in enumerate(widths):
        final = i == len(widths) - 1
        layer = Dense(
            width, axes, dtype=last or dtype if final else dtype, name=f"{prefix}.{2 * i}"
        )
        x = layer(*parts)
        parts = (x if final else activation(x),)
    return parts[0]


def normed_pair(prefix: str, hidden: int, features: int, x, groups: Groups | None, dtype: Dtype):
    """Convolution, batch norm, leaky ReLU, convolution: "prefix.0", ".1" and ".3"."""
    x = Dense(hidden, 1, dtype=dtype, name=f"{prefix}.0")(x)
    x = leaky(GroupBatchNorm(BATCH_NORM_EPS, name=f"{prefix}.1")(x, groups))
    return Dense(features, 1, dtype=dtype, name=f"{prefix}.3")(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalise(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Layer norm of (..., C); keeps only the input and two numbers per token for its gradient."""
    return _normalise_forward(x, scale, bias, eps)[0]


def _normalise_forward(x, scale, bias, eps):
    centred = x.astype(wide(x.dtype))
    mean = jnp.mean(centred, axis=-1, keepdims=True)
    centred = centred - mean
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    y = centred * inverse * scale + bias
    return y.astype(x.dtype), (x, scale, bias, mean, inverse)


def _normalise_backward(eps, residuals, dy):
    x, scale, bias, mean, inverse = residuals
    dy = dy.astype(mean.dtype)
    normal = (x.astype(mean.dtype) - mean) * inverse
    pulled = dy * scale
    first = jnp.mean(pulled, axis=-1, keepdims=True)
    second = jnp.mean(pulled * normal, axis=-1, keepdims=True)
    dx = inverse * (pulled - first - normal * second)
    tokens = tuple(range(x.ndim - 1))
    return (
        dx.astype(x.dtype),
        jnp.sum(dy * normal, axis=tokens).astype(scale.dtype),
        jnp.sum(dy, axis=tokens).astype(bias.dtype),
    )


normalise.defvjp(_normalise_forward, _normalise_backward)


class LayerNorm(nn.Module):
    """Layer norm over channels, in at least float32 (Ba et al. 2016, arXiv:1607.06450)."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        dtype = wide(x.dtype)
        return normalise(x, scale.astype(dtype), bias.astype(dtype), self.eps)


@jax.custom_vjp
def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention, the softmax in at least float32.

    Its gradient computes the weights again, so that none of the size queries x keys are kept
    (Dao et al. 2022, arXiv:2205.14135).

    Args:
      q: (..., queries, heads, width). k, v: (..., keys, heads, width).
    Returns:
      like q.
    """
    return _attend_forward(q, k, v)[0]


def _by_head(x):
    return jnp.swapaxes(x, -2, -3)


def _logits(q, k):
    product = jnp.matmul(q, jnp.swapaxes(k, -1, -2), preferred_element_type=wide(q.dtype))
    return product * q.shape[-1] ** -0.5


def _attend_forward(q, k, v):
    q, k, v = map(_by_head, (q, k, v))
    logits = _logits(q, k)
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=total.dtype) / total
    return _by_head(out.astype(v.dtype)), (q, k, v, out, top + jnp.log(total))


def _attend_backward(residuals, dy):
    q, k, v, out, log_total = residuals
    dy = _by_head(dy)
    weights = jnp.exp(_logits(q, k) - log_total)
    dv = jnp.matmul(jnp.swapaxes(weights, -1, -2).astype(v.dtype), dy)
    pulled = jnp.matmul(dy, jnp.swapaxes(v, -1, -2), preferred_element_type=out.dtype)
    pulled = pulled - jnp.sum(dy.astype(out.dtype) * out, axis=-1, keepdims=True)
    dlogits = (weights * pulled * q.shape[-1] ** -0.5).astype(q.dtype)
    dq, dk = jnp.matmul(dlogits, k), jnp.matmul(jnp.swapaxes(dlogits, -1, -2), q)
    return _by_head(dq), _by_head(dk), _by_head(dv)


attend.defvjp(_attend_forward, _attend_backward)


@jax.custom_vjp
def thirds(x: jax.Array) -> tuple[jax.Array, ...]:
    """The channels in three equal parts; the gradient joins them in one pass."""
    return tuple(jnp.split(x, 3, axis=-1))


thirds.defvjp(lambda x: (thirds(x), None), lambda _, dy: (jnp.concatenate(dy, axis=-1),))


class EdgeMap(nn.Module):
    """A linear map of [v_j - q_i, q_i] for the neighbours j of every i.

    Computed as W1 v_j + (W2 - W1) q_i: a product per point instead of one per pair.
    """

    features: int
    axes: int = 0
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, q: jax.Array, v: jax.Array, index: jax.Array | None, pool: bool = False
    ) -> jax.Array:
        """The map of every pair, or its maximum over the neighbours.

        Args:
          q: (B, Q, C). v: (B, N, C) with index (B, Q, k), or the neighbours (B, Q, k, C) with None.
          pool: take the maximum.
        Returns:
          (B, Q, k, features), or (B, Q, features).
        """
        inputs = q.shape[-1]
        shape = (*[1] * self.axes, 2 * inputs, self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        near, centre = jnp.split(kernel.reshape(2 * inputs, self.features), 2)
        # The two products nearly cancel where features are alike.
        product = functools.partial(jnp.matmul, preferred_element_type=wide(self.dtype))
        own = product(q.astype(self.dtype), (centre - near).astype(self.dtype))
        if self.use_bias:
            own = own + self.param("bias", nn.initializers.zeros, (self.features,)).astype(
                own.dtype
            )
        pairs = product(v.astype(self.dtype), near.astype(self.dtype))
        if index is not None:
            pairs = points.gather(pairs, index)
        y = largest(pairs, 2) + own if pool else pairs + own[:, :, None]
        return y.astype(self.dtype)


class EdgeGrouper(nn.Module):
    """Centres with features of their neighbourhoods, by four edge convolutions.

    Attributes:
      centres: points kept after the first convolution, and after the third.
    """

    centres: tuple[int, int]
    neighbours: int = 16
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, xyz: jax.Array, farthest: jax.Array, groups: Groups | None
    ) -> tuple[jax.Array, jax.Array]:
        """Centres (B, G, 3) and features (B, G, 128).

        Args:
          xyz: (B, N, 3). farthest: (B, >= centres[0]) its farthest points, in their order.
        """
        del groups  # group norms are of a sample
        x = Dense(8, 1, dtype=self.dtype, name="input_trans")(xyz)
        x = self._edges("layer1", 32, xyz, x, xyz, x)
        some = farthest[:, : self.centres[0]]
        sub, y = points.gather(xyz, some), points.gather(x, some)
        y = self._edges("layer2", 64, sub, y, xyz, x)
        y = self._edges("layer3", 64, sub, y, sub, y)
        # Not the first so many of `farthest`: equal distances are decided by a point's number.
        few = points.farthest_points(sub, self.centres[1])
        centres, z = points.gather(sub, few), points.gather(y, few)
        return centres, self._edges("layer4", 128, centres, z, sub, y)

    def _edges(self, name, features, q_xyz, q, v_xyz, v):
        """Edge convolution, group norm over a sample's pairs, leaky ReLU, maximum."""
        index = points.nearest(q_xyz, v_xyz, self.neighbours)
        x = EdgeMap(features, 2, use_bias=False, dtype=self.dtype, name=f"{name}.0")(q, v, index)
        norm = nn.GroupNorm(4, epsilon=1e-5, dtype=self.dtype, use_fast_variance=False,
                            name=f"{name}.1")  # fmt: skip
        return largest(leaky(norm(x)), 2)


class PointNetGrouper(nn.Module):
    """Centres with features of their 32 nearest points, by two small PointNets.

    In no published configuration. Neighbours keep their coordinates; none are relative to a centre.
    """

    centres: tuple[int, int]
    neighbours: int = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, xyz: jax.Array, farthest: jax.Array, groups: Groups | None
    ) -> tuple[jax.Array, jax.Array]:
        """Like `EdgeGrouper`, with 512 features."""
        centres = points.gather(xyz, farthest[:, : self.centres[1]])
        index = points.nearest(centres, xyz, self.neighbours)
        x = self._pair("first_conv", (128, 256), groups, points.gather(xyz, index))
        x = self._pair("second_conv", (512, 512), groups, largest(x, 2)[:, :, None], x)
        return centres, largest(x, 2)

    def _pair(self, name, widths, groups, *parts):
        x = Dense(widths[0], 1, dtype=self.dtype, name=f"{name}.0")(*parts)
        x = jax.nn.relu(norm_points(f"{name}.1", x, groups))
        return Dense(widths[1], 1, dtype=self.dtype, name=f"{name}.3")(x)


def norm_points(name: str, x: jax.Array, groups: Groups | None) -> jax.Array:
    """Batch norm of (B, M, k, C) over all points of a group's samples."""
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    return GroupBatchNorm(BATCH_NORM_EPS, name=name)(flat, groups).reshape(x.shape)


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


def grid(step: int) -> np.ndarray:
    """(step * step, 2) points of the square [-1, 1]^2, the first coordinate fastest."""
    line = np.linspace(-1, 1, step)
    return np.stack([np.tile(line, step), np.repeat(line, step)], axis=-1)


class Fold(nn.Module):
    """Points around a query: a grid, folded twice.

    Attributes:
      points: per query, a square number.
      hidden: channels of the first layer; the second has half as many.
    """

    points: int
    hidden: int = 256
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array, groups: Groups | None) -> jax.Array:
        """Features (B, M, C) to offsets (B, M, points, 3) in at least float32."""
        coordinates = wide(self.dtype)
        x = jnp.asarray(grid(math.isqrt(self.points)), coordinates)
        for name in ("folding1", "folding2"):
            x = self._layer(f"{name}.0", self.hidden)(x, features[:, :, None])
            x = jax.nn.relu(norm_points(f"{name}.1", x, groups))
            x = self._layer(f"{name}.3", self.hidden // 2)(x)
            x = jax.nn.relu(norm_points(f"{name}.4", x, groups))
            x = Dense(3, 1, dtype=coordinates, name=f"{name}.6")(x)
        return x

    def _layer(self, name, width):
        return Dense(width, 1, dtype=self.dtype, name=name)


class FullyConnected(nn.Module):
    """Points around a query: an MLP of its features and the largest features of all queries."""

    points: int
    hidden: int = 512
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array, groups: Groups | None) -> jax.Array:
        """Features (B, M, C) to offsets (B, M, points, 3) in at least float32."""
        del groups
        everywhere = largest(features, 1)[:, None]
        x = gelu(Dense(self.hidden, dtype=self.dtype, name="layer.fc1")(everywhere, features))
        x = Dense(3 * self.points, dtype=wide(self.dtype), name="layer.fc2")(x)
        return x.reshape(*features.shape[:2], self.points, 3)
