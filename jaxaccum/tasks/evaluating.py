"""The loop that every evaluation has: the host works on a batch while the device is on the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxaccum.machine.waiting import waiting

PyTree = Any
Batch = dict[str, Any]


def overlapped(
    predict: Callable[..., PyTree],
    params: PyTree,
    stats: PyTree,
    batches: Iterable[Batch],
    inputs: Callable[[Batch], tuple[Any, ...]],
    use: Callable[[Batch, PyTree], None],
    samples: int,
    unit: str,
) -> None:
    """Predicts batches, and hands each with its output to the host one batch later.

    Args:
      predict: compiled, (params, stats, *inputs) -> output.
      params, stats: the weights. One device evaluates; weights that lie on all of them would have
        each do all of it.
      batches: dicts of arrays, in order.
      inputs: what of a batch `predict` takes.
      use: takes every batch and its output, in order.
      samples, unit: in all batches, and what they are, for who waits.
    """
    params, stats = jax.device_put((params, stats), jax.local_devices()[0])
    pending: tuple[Batch, PyTree] | None = None
    with waiting("evaluating", samples, unit) as advance:

        def done(batch: Batch, output: PyTree) -> None:
            use(batch, output)
            advance(int((batch["weight"] > 0).sum()))

        for batch in batches:
            output = predict(params, stats, *inputs(batch))
            if pending is not None:
                done(*pending)
            pending = batch, output
        if pending is not None:
            done(*pending)
