"""What the passes over a data set's files share: the work on all cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from jaxaccum.data.stream import thread_count
from jaxaccum.machine.waiting import waiting

_AT_ONCE = 16  # items that a thread takes on

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_all_cores(
    items: Sequence[Item], look: Callable[[Item], Result], *, unit: str, told: str
) -> Iterator[Result]:
    """Results in the order of their items; how far it is, is said, see `machine.waiting`.

    Args:
      look: called on threads.
      unit, told: for the bar: what the items are, and what is done with them.
    """
    parts = [items[i : i + _AT_ONCE] for i in range(0, len(items), _AT_ONCE)]
    pool = ThreadPoolExecutor(thread_count(), thread_name_prefix="check")
    try:
        coming = [pool.submit(lambda part: [look(item) for item in part], part) for part in parts]
        with waiting(told, len(items), unit) as advance:
            for done in coming:
                yield from done.result()
                advance(len(done.result()))
    finally:
        pool.shutdown(cancel_futures=True)
