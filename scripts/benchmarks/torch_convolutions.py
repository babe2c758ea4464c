"""Times of single convolutions and their gradients in PyTorch, channels last.

python torch_convolutions.py FOLDER THREADS < layers.json   FOLDER: of PyTorch, "" for anywhere

Reads a list of [shape of x (N, H, W, C), of the kernel (kh, kw, C // groups, features), strides,
pads, groups] and prints one of [forward, gradient of the input, gradient of the kernel], in ms.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

if sys.argv[1]:
    sys.path.append(sys.argv[1])

import torch

ROUNDS = 12


def milliseconds(function) -> float:
    """Median of a few calls, after one that is not counted."""
    function()
    found = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return statistics.median(found) * 1e3


def times(x_shape, w_shape, strides, pads, groups) -> list[float]:
    """Forward, gradient of the input and of the kernel; pads are equal on both sides."""
    n, h, w, c = x_shape
    kh, kw, each, features = w_shape
    x = torch.randn(n, c, h, w).to(memory_format=torch.channels_last)
    kernel = torch.randn(features, each, kh, kw).to(memory_format=torch.channels_last)
    padding = [pad[0] for pad in pads]

    def forward():
        return torch.nn.functional.conv2d(x, kernel, None, strides, padding, 1, groups)

    dy = torch.randn_like(forward())

    def backward(*wanted: bool):
        return torch.ops.aten.convolution_backward(
            dy, x, kernel, None, strides, padding, [1, 1], False, [0, 0], groups, [*wanted, False]
        )

    with torch.no_grad():
        return [
            milliseconds(call)
            for call in (forward, lambda: backward(True, False), lambda: backward(False, True))
        ]


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps([times(*layer) for layer in json.load(sys.stdin)]))
