"""Operations on clouds in plain PyTorch: farthest points, neighbours, Chamfer distances."""

from __future__ import annotations

import numpy as np
import torch

ORIGIN = 1e-3  # squared distance from the origin up to which a point counts as padding
MODES = {
    "by products": "use_mm_for_euclid_dist",
    "by differences": "donot_use_mm_for_euclid_dist",
}


@torch.compiler.disable  # it would unroll the loop
@torch.no_grad()
def farthest_points(xyz, count):
    """(B, count) indices, the first 0; points at the origin are padding. The usual loop."""
    least = torch.where((xyz * xyz).sum(-1) <= ORIGIN, -1.0, 1e10)
    taken = torch.zeros(xyz.shape[0], count, dtype=torch.long, device=xyz.device)
    last = taken[:, 0]
    rows = torch.arange(xyz.shape[0], device=xyz.device)
    for i in range(1, count):
        distance = (xyz - xyz[rows, last][:, None]).square().sum(-1)
        least = torch.minimum(least, distance)
        last = least.argmax(1)
        taken[:, i] = last
    return taken


@torch.no_grad()
def nearest(query, points, k):
    """(B, Q, k) indices of the k nearest, in any order."""
    distance = torch.cdist(query, points, compute_mode=MODES["by differences"])
    return distance.topk(k, largest=False, sorted=False).indices


@torch.no_grad()
def nearest_by_products(query, points, k):
    """The same from |a|^2 - 2ab + |b|^2, as point networks usually do it."""
    distance = -2 * query @ points.transpose(1, 2)
    distance += query.square().sum(-1)[..., None]
    distance += points.square().sum(-1)[:, None]
    return distance.topk(k, largest=False, sorted=False).indices


def closest(a, b, rows, mode):
    """Nearest point of the other cloud, for both: (B, n) and (B, m) indices, by tiles of rows."""
    found, least, column = [], None, None
    for start in range(0, a.shape[1], rows):
        distance = torch.cdist(a[:, start : start + rows], b, compute_mode=MODES[mode])
        found.append(distance.argmin(2) if a.is_cuda else distance.min(2).indices)
        value, place = distance.min(1)
        if least is None:
            least, column = value, place
        else:
            column = torch.where(value < least, place + start, column)
            least = torch.minimum(value, least)
    return torch.cat(found, 1), column


def chamfer_l1(a, b, rows=64, mode="by products"):
    """(B,) half the sum of both clouds' mean distances to the other; distance zero has gradient
    zero."""
    with torch.no_grad():
        ia, ib = closest(a, b, rows, mode)

    def mean(points, other, index):
        near = torch.gather(other, 1, index[..., None].expand(-1, -1, 3))
        square = (points - near).square().sum(-1)
        zero = square == 0
        return torch.where(zero, 0, square.masked_fill(zero, 1).sqrt()).mean(1)

    return (mean(a, b, ia) + mean(b, a, ib)) / 2


def gradient_of_chamfer(a, b, **options):
    """Gradients of the summed distance with respect to both clouds."""
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    chamfer_l1(a, b, **options).sum().backward()
    return torch.cat([a.grad, b.grad], 1)


def forms(operation, device):
    """How an operation is done, by name."""
    if operation == "farthest":
        return {"loop": farthest_points}
    if operation == "nearest":
        return {"cdist": nearest, "by products": nearest_by_products}
    tiles = (64, 1 << 20) if device.type == "cpu" else (1024, 1 << 20)
    return {
        f"{'all at once' if rows > 1e5 else f'tiles of {rows}'} {mode}": (
            lambda a, b, rows=rows, mode=mode: gradient_of_chamfer(a, b, rows=rows, mode=mode)
        )
        for rows in tiles
        for mode in MODES
    }


class Operation:
    """One form of an operation on fixed clouds; `number`: of farthest points, or neighbours."""

    def __init__(self, device, operation, form, file, number=0):
        self._function = forms(operation, device)[form]
        names = ("a",) if operation == "farthest" else ("a", "b")
        arrays = np.load(file)
        self._clouds = [torch.from_numpy(arrays[name]).to(device) for name in names]
        self._number = [number] if number else []

    def facts(self):
        self.step()
        return {}

    def step(self):
        self._result = self._function(*self._clouds, *self._number)

    def write(self, path):
        np.save(path, self._result.cpu().numpy())
