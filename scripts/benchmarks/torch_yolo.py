"""A plain PyTorch step of a YOLO detector, to compare with: the network, its loss, SGD.

Written from a description of the layers and formulas, not from anyone's source; the parameters
have the usual names, so that our weights load into it and both can be seen to compute one thing.
The rows and widths of a family are read from our own table.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from benchmarks.torch_steps import Step

BINS = 16
TOP_K, TOP_K_ONE, EPS = 10, 7, 1e-9
GAINS = (7.5, 0.5, 1.5)
SHARES = (0.8, 0.2)  # of one-to-many and one-to-one at the start


class Conv(nn.Module):
    """Convolution without bias, batch norm, SiLU."""

    def __init__(self, c1, c2, kernel=1, stride=1, groups=1, silu=True):
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(c2, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU(inplace=True) if silu else nn.Identity()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, c1, c2, shortcut=True, expansion=0.5):
        super().__init__()
        hidden = int(c2 * expansion)
        self.cv1, self.cv2 = Conv(c1, hidden, 3), Conv(hidden, c2, 3)
        self.add = shortcut and c1 == c2

    def forward(self, x):
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class C3k(nn.Module):
    def __init__(self, c1, c2, repeats=2, shortcut=True):
        super().__init__()
        hidden = c2 // 2
        self.cv1, self.cv2 = Conv(c1, hidden), Conv(c1, hidden)
        self.cv3 = Conv(2 * hidden, c2)
        blocks = [Bottleneck(hidden, hidden, shortcut, 1.0) for _ in range(repeats)]
        self.m = nn.Sequential(*blocks)

    def forward(self, x):
        return self.cv3(torch.cat([self.m(self.cv1(x)), self.cv2(x)], 1))


class C2f(nn.Module):
    """C2f, or C3k2 with `inner` "c3k", "half" or "attention"."""

    def __init__(self, c1, c2, repeats, shortcut, expansion=0.5, inner="full"):
        super().__init__()
        c = int(c2 * expansion)
        self.cv1, self.cv2 = Conv(c1, 2 * c), Conv((2 + repeats) * c, c2)

        def block():
            if inner == "c3k":
                return C3k(c, c, 2, shortcut)
            if inner == "attention":
                return nn.Sequential(Bottleneck(c, c, shortcut), PSABlock(c, max(c // 64, 1)))
            return Bottleneck(c, c, shortcut, 1.0 if inner == "full" else 0.5)

        self.m = nn.ModuleList(block() for _ in range(repeats))

    def forward(self, x):
        parts = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            parts.append(block(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class SPPF(nn.Module):
    def __init__(self, c1, c2, kernel, residual=False):
        super().__init__()
        self.cv1, self.cv2 = Conv(c1, c1 // 2, silu=not residual), Conv(c1 // 2 * 4, c2)
        self.residual = residual
        self.pool = nn.MaxPool2d(kernel, 1, kernel // 2)

    def forward(self, x):
        stages = [self.cv1(x)]
        for _ in range(3):
            stages.append(self.pool(stages[-1]))
        y = self.cv2(torch.cat(stages, 1))
        return x + y if self.residual else y


def attend(q, k, v):
    """Attention of q, k (..., heads, width, positions) and v; returns like v."""
    q, k, w = (a.transpose(-1, -2) for a in (q, k, v))
    return F.scaled_dot_product_attention(q, k, w).transpose(-1, -2)


class Attention(nn.Module):
    def __init__(self, c, heads):
        super().__init__()
        self.heads, self.value = heads, c // heads
        self.key = self.value // 2
        self.qkv = Conv(c, c + 2 * self.key * heads, silu=False)
        self.pe = Conv(c, c, 3, groups=c, silu=False)
        self.proj = Conv(c, c, silu=False)

    def forward(self, x):
        n, c, h, w = x.shape
        qkv = self.qkv(x).reshape(n, self.heads, 2 * self.key + self.value, h * w)
        q, k, v = qkv.split([self.key, self.key, self.value], 2)
        out = attend(q, k, v).reshape(n, c, h, w)
        return self.proj(out + self.pe(v.reshape(n, c, h, w)))


class PSABlock(nn.Module):
    def __init__(self, c, heads):
        super().__init__()
        self.attn = Attention(c, heads)
        self.ffn = nn.Sequential(Conv(c, 2 * c), Conv(2 * c, c, silu=False))

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.ffn(x)


class C2PSA(nn.Module):
    def __init__(self, c1, c2, repeats):
        super().__init__()
        c = c2 // 2
        self.cv1, self.cv2 = Conv(c1, 2 * c), Conv(2 * c, c2)
        self.m = nn.Sequential(*(PSABlock(c, max(c // 64, 1)) for _ in range(repeats)))

    def forward(self, x):
        a, b = self.cv1(x).chunk(2, 1)
        return self.cv2(torch.cat([a, self.m(b)], 1))


class AreaAttention(nn.Module):
    def __init__(self, c, area):
        super().__init__()
        self.heads, self.area = c // 32, area
        self.qkv = Conv(c, 3 * c, silu=False)
        self.pe = Conv(c, c, 7, groups=c, silu=False)
        self.proj = Conv(c, c, silu=False)

    def forward(self, x):
        n, c, h, w = x.shape
        qkv = self.qkv(x).reshape(n, self.heads, 96, h * w)
        v = qkv[:, :, 64:].reshape(n, c, h, w)
        striped = qkv.reshape(n, self.heads, 96, self.area, -1).movedim(3, 1)
        out = attend(*striped.split(32, 3))  # (n, area, heads, 32, positions)
        out = out.movedim(1, 3).reshape(n, c, h, w)
        return self.proj(out + self.pe(v))


class AreaBlock(nn.Module):
    def __init__(self, c, area, ratio):
        super().__init__()
        self.attn = AreaAttention(c, area)
        hidden = int(c * ratio)
        self.mlp = nn.Sequential(Conv(c, hidden), Conv(hidden, c, silu=False))

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x)


class A2C2f(nn.Module):
    def __init__(self, c1, c2, repeats, area):
        super().__init__()
        c = c2 // 2
        self.cv1, self.cv2 = Conv(c1, c), Conv((1 + repeats) * c, c2)

        def stage():
            if area:
                return nn.Sequential(AreaBlock(c, area, 2.0), AreaBlock(c, area, 2.0))
            return C3k(c, c, 2, True)

        self.m = nn.ModuleList(stage() for _ in range(repeats))

    def forward(self, x):
        parts = [self.cv1(x)]
        for stage in self.m:
            parts.append(stage(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class Detect(nn.Module):
    """Box logits (N, 64, A), or distances (N, 4, A), and class logits (N, classes, A) of all
    levels; of a head of two sets of branches then those of the second."""

    def __init__(self, channels, classes, depthwise, bins, one_to_one):
        super().__init__()
        box, hidden = max(16, channels[0] // 4, 4 * bins), max(channels[0], min(classes, 100))

        def classify(c):
            if not depthwise:
                return [Conv(c, hidden, 3), Conv(hidden, hidden, 3)]
            return [nn.Sequential(Conv(a, a, 3, groups=a), Conv(a, hidden)) for a in (c, hidden)]

        for prefix in ("", "one2one_") if one_to_one else ("",):
            boxes = nn.ModuleList(
                nn.Sequential(Conv(c, box, 3), Conv(box, box, 3), nn.Conv2d(box, 4 * bins, 1))
                for c in channels
            )
            scores = nn.ModuleList(
                nn.Sequential(*classify(c), nn.Conv2d(hidden, classes, 1)) for c in channels
            )
            setattr(self, f"{prefix}cv2", boxes)
            setattr(self, f"{prefix}cv3", scores)
        self.one_to_one = one_to_one

    def forward(self, levels):
        def joined(branches, levels):
            return torch.cat([b(x).flatten(2) for b, x in zip(branches, levels, strict=True)], 2)

        found = joined(self.cv2, levels), joined(self.cv3, levels)
        if not self.one_to_one:
            return found
        given = [x.detach() for x in levels]
        return *found, joined(self.one2one_cv2, given), joined(self.one2one_cv3, given)


class Yolo(nn.Module):
    """A network read from a family's rows; scales n, s and m.

    Args:
      rows: (from, repeats, block, arguments). width, depth, cap: of the scale.
    """

    def __init__(
        self, rows, width, depth, cap, scale, depthwise, classes, bins=BINS, one_to_one=False
    ):
        super().__init__()
        if scale not in "nsm":
            raise ValueError(f"scales l and x have layers that are not here; got {scale!r}")
        layers, channels, c1 = [], [], 3
        self.sources = [row[0] for row in rows]
        for source, repeats, kind, args in rows:
            if isinstance(source, int) and channels:
                c1 = channels[source]
            c2 = c1
            if args:
                c2 = math.ceil(min(args[0], cap) * width / 8) * 8
            count = max(round(repeats * depth), 1)
            if kind == "Conv":
                layer: nn.Module = Conv(c1, c2, *args[1:])
            elif kind == "C2f":
                layer = C2f(c1, c2, count, args[1])
            elif kind == "C3k2":
                inner = "c3k" if args[1] or scale == "m" else "half"
                inner = "attention" if args[3:] == (True,) else inner
                layer = C2f(c1, c2, count, True, args[2] if len(args) > 2 else 0.5, inner)
            elif kind == "SPPF":
                layer = SPPF(c1, c2, *args[1:])
            elif kind == "C2PSA":
                layer = C2PSA(c1, c2, count)
            elif kind == "A2C2f":
                layer = A2C2f(c1, c2, count, args[1])
            elif kind == "Upsample":
                layer = nn.Upsample(scale_factor=2)
            elif kind == "Concat":
                layer, c2 = nn.Identity(), sum(channels[i] for i in source)
            elif kind == "Detect":
                inputs = [channels[i] for i in source]
                layer = Detect(inputs, classes, depthwise, bins, one_to_one)
            else:
                raise ValueError(f"no block {kind!r} here")
            layers.append(layer)
            channels.append(c2)
        self.model = nn.ModuleList(layers)

    def forward(self, x):
        outputs: list[Any] = []
        for source, layer in zip(self.sources, self.model, strict=True):
            if isinstance(source, tuple):
                x = [outputs[i] for i in source]
                x = layer(x) if isinstance(layer, Detect) else torch.cat(x, 1)
            else:
                x = layer(outputs[source] if outputs else x)
            outputs.append(x)
        return x


def complete_iou(a, b, eps=1e-7):
    """CIoU of boxes (..., 4), broadcast; the weight of the aspect term has no gradient."""
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    aw, ah, bw, bh = ax2 - ax1, ay2 - ay1 + eps, bx2 - bx1, by2 - by1 + eps
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    intersection = width * height
    iou = intersection / (aw * ah + bw * bh - intersection + eps)
    diagonal = (
        (torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)).square()
        + (torch.maximum(ay2, by2) - torch.minimum(ay1, by1)).square()
        + eps
    )
    distance = ((bx1 + bx2 - ax1 - ax2).square() + (by1 + by2 - ay1 - ay2).square()) / 4
    v = 4 / math.pi**2 * (torch.atan(bw / bh) - torch.atan(aw / ah)).square()
    with torch.no_grad():
        alpha = v / (v - iou + (1 + eps))
    return iou - (distance / diagonal + v * alpha)


@torch.no_grad()
def assign(scores, boxes, centres, gt, classes, valid, smallest, single=False):
    """Task-aligned assignment: (object, soft target) of every anchor, both (N, A).

    Args:
      scores: (N, A, C) logits. boxes: (N, A, 4) pixels. centres: (A, 2). gt: (N, M, 4).
      classes, valid: (N, M). smallest: pixels that shorter sides are taken as.
      single: an object has one anchor at most.
    """
    middle = (gt[..., :2] + gt[..., 2:]) / 2
    half = (gt[..., 2:] - gt[..., :2]).clamp(min=smallest) / 2
    low, high = (middle - half)[:, :, None], (middle + half)[:, :, None]
    inside = torch.minimum(centres - low, high - centres).amin(-1) > EPS
    inside = inside & valid[..., None]
    overlap = complete_iou(gt[:, :, None], boxes[:, None]).clamp(min=0) * inside
    index = classes[..., None].expand(-1, -1, scores.shape[1])
    score = scores.transpose(1, 2).gather(1, index).sigmoid()
    alignment = score.sqrt() * overlap**6
    best = alignment.topk(TOP_K_ONE if single else TOP_K, dim=-1).indices
    chosen = torch.zeros_like(inside).scatter_(2, best, True) & inside
    contested = chosen.sum(1, keepdim=True) > 1
    largest = F.one_hot(overlap.argmax(1), gt.shape[1]).transpose(1, 2).bool()
    chosen = torch.where(contested, largest, chosen)
    if single:
        best = (alignment * chosen).argmax(2, keepdim=True)
        chosen = chosen & torch.zeros_like(chosen).scatter_(2, best, True)
    alignment, overlap = alignment * chosen, overlap * chosen
    scale = overlap.amax(2, keepdim=True) / (alignment.amax(2, keepdim=True) + EPS)
    return chosen.int().argmax(1), (alignment * scale).amax(1)


def detection_loss(
    boxes, scores, centres, strides, gt, classes, valid, size, gains=GAINS, single=False
):
    """The terms box, cls and dfl or, of distances, l1, (3,), gains included, over the sum of the
    soft targets.

    Args:
      boxes: (N, 64 or 4, A). scores: (N, C, A). centres: (A, 2) in cells. strides: (A,) pixels a
        cell. size: side of the input in pixels. single: an object has one anchor at most.
    """
    boxes, scores = boxes.float().transpose(1, 2), scores.float().transpose(1, 2)
    distance = boxes
    if boxes.shape[-1] != 4:
        logits = boxes.reshape(boxes.shape[0], -1, 4, BINS)
        distance = logits.softmax(-1) @ torch.arange(BINS, device=boxes.device, dtype=logits.dtype)
    decoded = torch.cat([centres - distance[..., :2], centres + distance[..., 2:]], -1)
    pixels = strides[:, None]
    smallest = 16.0  # the second finest stride
    object_, weight = assign(
        scores.detach(), decoded.detach() * pixels, centres * pixels, gt, classes, valid, smallest,
        single,
    )  # fmt: skip
    total = weight.sum().clamp(min=1)
    wanted = gt.gather(1, object_[..., None].expand(-1, -1, 4)) / pixels
    box = (weight * (1 - complete_iou(decoded, wanted))).sum()
    label = classes.gather(1, object_)
    target = torch.zeros_like(scores).scatter_(2, label[..., None], weight[..., None])
    cls = F.binary_cross_entropy_with_logits(scores, target, reduction="sum")
    sides = torch.cat([centres - wanted[..., :2], wanted[..., 2:] - centres], -1)
    if boxes.shape[-1] == 4:
        l1 = (weight * ((distance - sides).abs() * pixels / size).mean(-1)).sum()
        return torch.stack([box, cls, l1]) * torch.tensor(gains, device=boxes.device) / total
    sides = sides.clamp(0, BINS - 1 - 0.01)
    left = sides.long()
    right = left + 1
    logp = logits.log_softmax(-1)
    entropy = -(
        logp.gather(-1, left[..., None])[..., 0] * (right - sides)
        + logp.gather(-1, right[..., None])[..., 0] * (sides - left)
    )
    dfl = (weight * entropy.mean(-1)).sum()
    return torch.stack([box, cls, dfl]) * torch.tensor(gains, device=boxes.device) / total


class Training(Step):
    """Steps of a detector on one batch.

    The file holds the batch: image (N, S, S, 3) uint8, boxes, classes, valid; centres and strides
    of the anchors; and the weights, as "weight:KEY".
    """

    def __init__(self, device, model, classes, file, **options):
        from jaxaccum.models.yolo import parse

        family, scale = parse(model)
        network = Yolo(
            family.rows, family.width[scale], family.depth[scale], family.max_channels[scale],
            scale, family.depthwise_head, classes, family.bins, family.one_to_one,
        )  # fmt: skip
        arrays = dict(np.load(file))
        self.images = torch.from_numpy(arrays["image"])
        self.targets = {
            "gt": torch.from_numpy(arrays["boxes"]),
            "classes": torch.from_numpy(arrays["classes"]).long(),
            "valid": torch.from_numpy(arrays["valid"]),
        }
        self.anchors = [torch.from_numpy(arrays[key]).to(device) for key in ("centres", "strides")]
        self.samples = len(self.images)
        super().__init__(device, network, arrays, **options)

    def optimizer(self, parameters):
        return torch.optim.SGD(
            parameters, lr=1e-4, momentum=0.937, nesterov=True, weight_decay=5e-4, fused=True
        )

    def batch(self):
        """The batch on the device, images (N, 3, S, S) in 0..1."""
        images = self.images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        form = torch.channels_last if self.channels_last else torch.contiguous_format
        images = images.to(torch.float32, memory_format=form) / 255
        return images, {k: v.to(self.device, non_blocking=True) for k, v in self.targets.items()}

    def losses(self, network, images, targets):
        boxes, scores, *once = network(images)
        options = {**targets, "size": images.shape[-1]}
        found = detection_loss(boxes, scores, *self.anchors, **options)
        if once:
            found = torch.cat([found, detection_loss(*once, *self.anchors, **options, single=True)])
        return found

    def total(self, losses):
        if len(losses) == len(GAINS):
            return losses.sum()
        many, one = losses.split(len(GAINS))
        return SHARES[0] * many.sum() + SHARES[1] * one.sum()

    def scale(self):
        return self.samples
