"""What the passes over a data set's files share: the work on all cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

from jaxaccum.data.stream import thread_count

_AT_ONCE = 16  # items that a thread takes on

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_all_cores(
    items: Sequence[Item], look: Callable[[Item], Result], *, unit: str, told: str
) -> Iterator[Result]:
    """Results in the order of their items, with a bar on a terminal if that takes longer than a
    second.

    Args:
      look: called on threads.
      unit, told: for the bar: what the items are, and what is done with them.
    """
    parts = [items[i : i + _AT_ONCE] for i in range(0, len(items), _AT_ONCE)]
    pool = ThreadPoolExecutor(thread_count(), thread_name_prefix="check")
    bar = tqdm(total=len(items), unit=f" {unit}", desc=told, delay=1, disable=None)
    try:
        coming = [pool.submit(lambda part: [look(item) for item in part], part) for part in parts]
        for done in coming:
            yield from done.result()
            bar.update(len(done.result()))
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
