"""What the training steps in PyTorch have in common: precision, weights, backward, clipping."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Step:
    """A training step on one batch.

    Args:
      arrays: of a file, the weights among them as "weight:KEY".
      precision: "float32", "tf32" (products of float32 may be rounded) or "bfloat16" (autocast).
      channels_last: the memory format of images and kernels. compiled: by torch.compile.
    """

    def __init__(
        self, device, network: nn.Module, arrays, precision="float32", channels_last=False,
        compiled=False,
    ):  # fmt: skip
        torch.backends.cuda.matmul.allow_tf32 = precision != "float32"
        torch.backends.cudnn.allow_tf32 = precision != "float32"
        torch.backends.cudnn.benchmark = True
        self.device, self.precision, self.channels_last = device, precision, channels_last
        prefix = "weight:"
        state = {k[len(prefix) :]: torch.from_numpy(a) for k, a in arrays.items() if prefix in k}
        counters = {k: v for k, v in network.state_dict().items() if k.endswith("batches_tracked")}
        network.load_state_dict(state | counters)
        self.network: Any = network.to(device).train()
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.sgd = self.optimizer(self.network.parameters())
        self._losses = torch.compile(self.losses) if compiled else self.losses
        self._first: list[float] | None = None

    def facts(self) -> dict[str, Any]:
        """Number of parameters, and the terms of the loss with the weights that were given."""
        self.step()
        return {
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "losses": self._first,
        }

    def step(self) -> None:
        """Forward, loss, backward, clipping, optimizer."""
        self.sgd.zero_grad(set_to_none=True)
        inputs = self.batch()
        with torch.autocast(self.device.type, torch.bfloat16, self.precision == "bfloat16"):
            losses = self._losses(self.network, *inputs)
        (self.total(losses) * self.scale()).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 10.0)
        self.sgd.step()
        if self._first is None:
            self._first = losses.detach().cpu().tolist()

    def total(self, losses):
        """What is learned from."""
        return losses.sum()

    def scale(self) -> float:
        """What the gradient is multiplied by."""
        return 1.0

    def batch(self) -> tuple:
        """What `losses` takes beside the network, on the device."""
        raise NotImplementedError

    def losses(self, network, *inputs):
        """The terms of the loss, gains included: (terms,)."""
        raise NotImplementedError

    def optimizer(self, parameters):
        raise NotImplementedError
