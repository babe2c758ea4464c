"""The loop that every evaluation has: the host works on a batch while the devices are on the next.

Of several GPUs or TPUs of a process each predicts a batch of its own, by the program that one alone
would run: what is found does not depend on their number.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxaccum.machine.waiting import waiting
from jaxaccum.tasks import speed as speeds

PyTree = Any
Batch = dict[str, Any]


def overlapped(
    predict: Callable[..., PyTree],
    params: PyTree,
    stats: PyTree,
    batches: Iterable[Batch],
    inputs: Callable[[Batch], tuple[Any, ...]],
    use: Callable[[Batch, PyTree], Mapping[str, float] | None],
    samples: int,
    unit: str,
    speed: speeds.Speed | None = None,
) -> None:
    """Predicts batches, and hands each with its output to the host one batch later.

    Args:
      predict: compiled, (params, stats, *inputs) -> output.
      params, stats: the weights.
      batches: dicts of arrays, in order.
      inputs: what of a batch `predict` takes.
      use: takes every batch and its output, in order; may give phases of it on the host that are to
        be told in the speed, name -> milliseconds of a processor for all its samples together.
      samples, unit: in all batches, and what they are, for who waits.
      speed: of the evaluation, see `speed.of_evaluation`; its own by default.
    """
    devices = of_evaluation()
    if len(devices) == 1:
        params, stats = jax.device_put((params, stats), devices[0])
    else:
        predict, whole, parts = _spread(predict, tuple(devices))
        params, stats = jax.device_put((params, stats), whole)
        batches = _merged(batches, len(devices))
    speed = speeds.of_evaluation(unit) if speed is None else speed
    pending: tuple[Batch, PyTree] | None = None
    with (
        waiting("evaluating", samples, unit) as advance,
        ThreadPoolExecutor(1, thread_name_prefix="speed") as pool,
    ):
        clock = _Clock(speed, pool)

        def done(batch: Batch, output: PyTree) -> None:
            phases = use(batch, output)
            clock.done(batch, phases or {})
            advance(int((batch["weight"] > 0).sum()))

        for batch in batches:
            taken = inputs(batch)
            if len(devices) > 1:
                taken = jax.device_put(taken, parts)
            if pending is not None and clock.compiles(taken):
                done(*pending)  # on a device that compiling does not slow, as a CPU is by it
                pending = None
            output = clock.begun(taken, functools.partial(predict, params, stats, *taken))
            if pending is not None:
                done(*pending)
            pending = batch, output
        if pending is not None:
            done(*pending)


def of_evaluation() -> Sequence[jax.Device]:
    """The devices of this process that evaluate: all GPUs or TPUs, or one of what JAX makes of a
    CPU, whose cores one program uses."""
    devices = jax.local_devices()
    return devices[:1] if devices[0].platform == "cpu" else devices


@functools.lru_cache(maxsize=16)
def _spread(
    predict: Callable[..., PyTree], devices: tuple[jax.Device, ...]
) -> tuple[Callable[..., PyTree], NamedSharding, NamedSharding]:
    """What predicts an equal part of a batch on each device; where weights, and batches, lie."""
    mesh = Mesh(np.array(devices), ("batch",))
    every, part = PartitionSpec(), PartitionSpec("batch")

    def on_devices(params, stats, *inputs):
        return jax.shard_map(
            predict, mesh=mesh, in_specs=(every, every, *(part for _ in inputs)), out_specs=part,
            check_vma=False,  # nothing crosses between devices
        )(params, stats, *inputs)  # fmt: skip

    return jax.jit(on_devices), NamedSharding(mesh, every), NamedSharding(mesh, part)


def _merged(batches: Iterable[Batch], number: int) -> Iterator[Batch]:
    """As many batches of one shape in one; the last are filled up with samples of weight 0."""
    group: list[Batch] = []

    def joined() -> Batch:
        filler = group[-1] | {
            "weight": np.zeros_like(group[-1]["weight"]),
            "index": np.full_like(group[-1]["index"], -1),
        }
        parts = [*group, *[filler] * (number - len(group))]
        group.clear()
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

    for batch in batches:
        if group and _shape((batch,)) != _shape((group[0],)):
            yield joined()
        group.append(batch)
        if len(group) == number:
            yield joined()
    if group:
        yield joined()


class _Begun(NamedTuple):
    """A batch on the device: whether it compiled, when it was given, when its output is there."""

    compiled: bool
    since: float
    until: Future[float]


class _Clock:
    """Times batches without holding them up: a thread waits for each output beside the others.

    A device computes batches in order: of each the network takes from when it is given, or the one
    before is done, until its output is there.
    """

    def __init__(self, speed: speeds.Speed, pool: ThreadPoolExecutor) -> None:
        self._speed, self._pool = speed, pool
        self._shapes = speed.shapes
        self._begun: deque[_Begun] = deque()
        self._free = 0.0  # since when the device has nothing of the batches before
        self._last: float | None = None  # when the batch before was done
        self._compiled = False  # since then

    def compiles(self, taken: tuple[Any, ...]) -> bool:
        """Whether the network has not been compiled for such inputs in this evaluation."""
        return _shape(taken) not in self._shapes

    def begun(self, taken: tuple[Any, ...], call: Callable[[], PyTree]) -> PyTree:
        """Gives a batch to the device."""
        compiled = self.compiles(taken)
        self._shapes.add(_shape(taken))
        self._compiled |= compiled
        since = time.perf_counter()
        output = call()
        self._begun.append(_Begun(compiled, since, self._pool.submit(_when_there, output)))
        return output

    def done(self, batch: Batch, phases: Mapping[str, float]) -> None:
        """Counts the oldest batch that was given, whose output has been used."""
        compiled, since, until = self._begun.popleft()
        speed, real = self._speed, batch["index"][batch["weight"] > 0]
        prepared = sum(speed.prepared.pop(int(index), 0.0) for index in real)
        there, now = until.result(), time.perf_counter()
        rows, count = len(batch["weight"]), len(real)
        if compiled:
            speed.left_out += count
        else:
            speed.samples += count
            speed.batch = max(speed.batch, rows)
            if prepared:
                speed.add(speeds.PREPARATION, prepared, count)
            # Samples that fill up the last batch cost as much as others.
            speed.add("network", 1e3 * (there - max(since, self._free)), rows)
            for phase, milliseconds in phases.items():
                speed.add(phase, milliseconds, count)
        # Compiling holds up the host, so that nothing passes as it usually does.
        if self._last is not None and not compiled and not self._compiled:
            speed.passed(1e3 * (now - self._last), count)
        self._free, self._last, self._compiled = there, now, False


def _shape(taken: tuple[Any, ...]) -> Any:
    leaves, form = jax.tree.flatten(taken)
    return form, tuple((np.shape(leaf), str(leaf.dtype)) for leaf in leaves)


def _when_there(output: PyTree) -> float:
    jax.block_until_ready(output)
    return time.perf_counter()
