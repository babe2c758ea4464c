"""A plain PyTorch step of AdaPoinTr, to compare with: the network, its Chamfer losses, AdamW.

Written from a description of the layers, not from anyone's source; the parameters have the usual
names, so that our weights load into it. Of the block styles only the published ones are here: a
graph beside the attention in the first block of each stack.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from benchmarks import torch_points
from benchmarks.torch_steps import Step


def gather(values, index):
    """values (B, N, C) at index (B, ...) -> (B, ..., C)."""
    rows = torch.arange(len(values), device=values.device)
    return values[rows.reshape(-1, *[1] * (index.dim() - 1)), index]


def chain(*widths, activation=nn.GELU):
    layers = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(a, b)] if i == 0 else [activation(), nn.Linear(a, b)]
    return nn.Sequential(*layers)


def edges(query, value, index):
    """[neighbour - query, query] of every pair: (B, Q, k, 2 C)."""
    near, own = gather(value, index), query[:, :, None]
    return torch.cat([near - own, own.expand(-1, -1, index.shape[2], -1)], -1)


class Grouper(nn.Module):
    """Centres and their features, by four edge convolutions."""

    def __init__(self, centres, neighbours=16):
        super().__init__()
        self.centres, self.neighbours = centres, neighbours
        self.input_trans = nn.Conv1d(3, 8, 1)
        for i, (a, b) in enumerate(((16, 32), (64, 64), (128, 64), (128, 128)), start=1):
            layer = nn.Sequential(
                nn.Conv2d(a, b, 1, bias=False), nn.GroupNorm(4, b), nn.LeakyReLU(0.2)
            )
            self.add_module(f"layer{i}", layer)

    def edge(self, layer, q_xyz, q, v_xyz, v):
        index = torch_points.nearest_by_products(q_xyz, v_xyz, self.neighbours)
        return layer(edges(q, v, index).permute(0, 3, 1, 2)).amax(3).transpose(1, 2)

    def forward(self, xyz):
        x = self.input_trans(xyz.transpose(1, 2)).transpose(1, 2)
        x = self.edge(self.layer1, xyz, x, xyz, x)
        some = torch_points.farthest_points(xyz, self.centres[0])
        sub, y = gather(xyz, some), gather(x, some)
        y = self.edge(self.layer2, sub, y, xyz, x)
        y = self.edge(self.layer3, sub, y, sub, y)
        few = torch_points.farthest_points(sub, self.centres[1])
        centres, z = gather(sub, few), gather(y, few)
        return centres, self.edge(self.layer4, centres, z, sub, y)


class Mlp(nn.Module):
    def __init__(self, inputs, hidden, outputs):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SelfAttention(nn.Module):
    def __init__(self, c, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(c, 3 * c), nn.Linear(c, c)

    def forward(self, x, mask=None):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(b, n, c))


class CrossAttention(nn.Module):
    def __init__(self, c, heads):
        super().__init__()
        self.heads = heads
        self.q_map, self.k_map, self.v_map = (nn.Linear(c, c) for _ in range(3))
        self.proj = nn.Linear(c, c)

    def forward(self, q, v):
        def split(x):
            return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)

        out = F.scaled_dot_product_attention(
            split(self.q_map(q)), split(self.k_map(v)), split(self.v_map(v))
        )
        return self.proj(out.transpose(1, 2).reshape(q.shape))


class Graph(nn.Module):
    """The maximum over the neighbours of a map of their edges."""

    def __init__(self, c):
        super().__init__()
        self.knn_map = nn.Sequential(nn.Linear(2 * c, c), nn.LeakyReLU(0.2))

    def forward(self, q, v, index):
        return self.knn_map(edges(q, v, index)).amax(2)


class EncoderBlock(nn.Module):
    def __init__(self, c, heads, graph):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c, eps=1e-6), nn.LayerNorm(c, eps=1e-6)
        self.attn, self.mlp = SelfAttention(c, heads), Mlp(c, 2 * c, c)
        self.graph = graph
        if graph:
            self.local_attn, self.merge_map = Graph(c), nn.Linear(2 * c, c)

    def forward(self, x, near):
        n = self.norm1(x)
        y = self.attn(n)
        if self.graph:
            y = self.merge_map(torch.cat([y, self.local_attn(n, n, near)], -1))
        x = x + y
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nn.Module):
    def __init__(self, c, heads, graph):
        super().__init__()
        self.norm1, self.norm2, self.norm_q, self.norm_v = (
            nn.LayerNorm(c, eps=1e-6) for _ in range(4)
        )
        self.self_attn, self.cross_attn = SelfAttention(c, heads), CrossAttention(c, heads)
        self.mlp, self.graph = Mlp(c, 2 * c, c), graph
        if graph:
            self.local_self_attn, self.local_cross_attn = Graph(c), Graph(c)
            self.self_attn_merge_map = nn.Linear(2 * c, c)
            self.cross_attn_merge_map = nn.Linear(2 * c, c)

    def forward(self, q, memory, own, cross, mask):
        n = self.norm1(q)
        y = self.self_attn(n, mask)
        if self.graph:
            y = self.self_attn_merge_map(torch.cat([y, self.local_self_attn(n, n, own)], -1))
        q = q + y
        n, v = self.norm_q(q), self.norm_v(memory)
        y = self.cross_attn(n, v)
        if self.graph:
            y = self.cross_attn_merge_map(torch.cat([y, self.local_cross_attn(n, v, cross)], -1))
        q = q + y
        return q + self.mlp(self.norm2(q))


class Stack(nn.Module):
    """Blocks under the names of the published weights: blocks.blocks.0, ..."""

    def __init__(self, blocks, norm=0):
        super().__init__()
        self.blocks = nn.Module()
        self.blocks.blocks = nn.ModuleList(blocks)
        if norm:
            self.norm = nn.LayerNorm(norm, eps=1e-6)  # it is there and never applied

    def forward(self, x, *more):
        for block in self.blocks.blocks:
            x = block(x, *more)
        return x


class Base(nn.Module):
    """From a partial cloud to features of queries.

    Args:
      t: the table, see `Training`.
    """

    def __init__(self, t):
        super().__init__()
        self.t, c, g = t, t["width"], t["everywhere"]
        self.grouper = Grouper(t["centres"])
        self.pos_embed, self.input_proj = chain(3, 128, c), chain(128, 512, c)
        blocks = [EncoderBlock(c, t["heads"], i == 0) for i in range(t["encoder"])]
        self.encoder = Stack(blocks, c)
        self.increase_dim, self.coarse_pred = chain(c, g, g), chain(g, g, 3 * t["queries"])
        self.query_ranking = chain(3, 256, 256, 1)
        self.mlp_query = chain(g + 3, g, g, c)
        self.decoder = Stack([DecoderBlock(c, t["heads"], i == 0) for i in range(t["decoder"])])

    def forward(self, xyz, noise):
        t, queries = self.t, self.t["queries"]
        centres, features = self.grouper(xyz)
        k = t["neighbours"]
        near = torch_points.nearest_by_products(centres, centres, k)
        x = self.encoder(self.input_proj(features) + self.pos_embed(centres), near)
        everywhere = self.increase_dim(x).amax(1, keepdim=True)
        coarse = self.coarse_pred(everywhere).float().reshape(-1, queries, 3)
        sample = torch_points.farthest_points(xyz, max(queries // 2, noise.shape[1]))
        sample = gather(xyz, sample)
        candidates = torch.cat([coarse, sample[:, : queries // 2]], 1)
        with torch.no_grad():
            ranks = self.query_ranking(candidates)[..., 0]
            best = ranks.argsort(dim=1, descending=True, stable=True)[:, :queries]
        coarse = gather(candidates, best)
        jittered = sample[:, : noise.shape[1]] + noise
        tokens = torch.cat([coarse, jittered], 1)
        wide = everywhere.expand(-1, tokens.shape[1], -1)
        q = self.mlp_query(torch.cat([wide, tokens.to(wide.dtype)], -1))
        own = torch_points.nearest_by_products(coarse, coarse, k)
        rest = torch_points.nearest_by_products(jittered, tokens, k)
        own = torch.cat([own, rest], 1)
        cross = torch_points.nearest_by_products(tokens, centres, k)
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=xyz.device)
        mask[:queries, queries:] = False  # queries do not see those that are to be denoised
        return self.decoder(q, x, own, cross, mask), coarse, jittered, tokens


class AdaPoinTr(nn.Module):
    """(coarse, fine, denoised) clouds and what these two were spread around, from partial ones."""

    def __init__(self, t):
        super().__init__()
        self.t, c, g = t, t["width"], t["everywhere"]
        self.base_model = Base(t)
        self.increase_dim = nn.Sequential(
            nn.Conv1d(c, g, 1), nn.BatchNorm1d(g), nn.LeakyReLU(0.2), nn.Conv1d(g, g, 1)
        )
        self.reduce_map = nn.Linear(g + c + 3, c)
        self.decode_head = nn.Module()
        self.decode_head.layer = Mlp(2 * c, 512, 3 * t["points"])

    def forward(self, xyz, noise):
        q, coarse, jittered, tokens = self.base_model(xyz, noise)
        everywhere = self.increase_dim(q.transpose(1, 2)).amax(2)[:, None]
        wide = everywhere.expand(-1, tokens.shape[1], -1)
        x = self.reduce_map(torch.cat([wide, q, tokens.to(q.dtype)], -1))
        largest = x.amax(1, keepdim=True).expand_as(x)
        offsets = self.decode_head.layer(torch.cat([largest, x], -1)).float()
        fine = offsets.reshape(*x.shape[:2], -1, 3) + tokens[:, :, None]
        queries = self.t["queries"]
        return coarse, fine[:, :queries].flatten(1, 2), jittered, fine[:, queries:].flatten(1, 2)


class Training(Step):
    """Steps of AdaPoinTr on one batch.

    The file holds partial (N, n, 3), complete (N, P, 3), noise (N, D, 3) and the weights.

    Args:
      table: queries, points (of each), centres, encoder and decoder (blocks), width, heads,
        everywhere (channels of a whole cloud), neighbours.
    """

    def __init__(self, device, table, file, **options):
        arrays = dict(np.load(file))
        names = ("partial", "complete", "noise")
        self._batch = [torch.from_numpy(arrays[name]) for name in names]
        self._points = table["points"]
        super().__init__(device, AdaPoinTr(table), arrays, **options)

    def optimizer(self, parameters):
        return torch.optim.AdamW(parameters, lr=1e-5, weight_decay=5e-4, fused=True)

    def batch(self):
        return [a.to(self.device, non_blocking=True) for a in self._batch]

    def losses(self, network, partial, complete, noise):
        coarse, fine, jittered, denoised = network(partial, noise)
        near = torch_points.nearest_by_products(jittered, complete, self._points)
        around = gather(complete, near.flatten(1))
        rows = 64 if partial.device.type == "cpu" else 1024
        with torch.autocast(partial.device.type, enabled=False):
            terms = [
                gain * torch_points.chamfer_l1(cloud.float(), target, rows).mean()
                for gain, cloud, target in (
                    (1.0, coarse, complete), (1.0, fine, complete), (0.5, denoised, around)
                )
            ]  # fmt: skip
        return torch.stack(terms)
