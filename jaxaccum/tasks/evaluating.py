"""The loop that every evaluation has: the host works on a batch while the device is on the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax

PyTree = Any
Batch = dict[str, Any]


def overlapped(
    predict: Callable[..., PyTree],
    params: PyTree,
    stats: PyTree,
    batches: Iterable[Batch],
    inputs: Callable[[Batch], tuple[Any, ...]],
    use: Callable[[Batch, PyTree], None],
) -> None:
    """Predicts batches, and hands each with its output to the host one batch later.

    Args:
      predict: compiled, (params, stats, *inputs) -> output.
      params, stats: the weights. One device evaluates; weights that lie on all of them would have
        each do all of it.
      batches: dicts of arrays, in order.
      inputs: what of a batch `predict` takes.
      use: takes every batch and its output, in order.
    """
    params, stats = jax.device_put((params, stats), jax.local_devices()[0])
    pending: tuple[Batch, PyTree] | None = None
    for batch in batches:
        output = predict(params, stats, *inputs(batch))
        if pending is not None:
            use(*pending)
        pending = batch, output
    if pending is not None:
        use(*pending)
