"""What the passes over a data set's files share: the work on all cores, and what tells a file from
what it was."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from jaxaccum.data.stream import thread_count

_AT_ONCE = 16  # items that a thread takes on

Stamp = tuple[int, int]  # size in bytes, time of modification in ns
Item = TypeVar("Item")
Result = TypeVar("Result")


def stamp(file: str | Path) -> Stamp | None:
    """Size and time of a file; None if there is no such file."""
    try:
        told = os.stat(file)
    except (OSError, ValueError):
        return None
    return told.st_size, told.st_mtime_ns


def signature_of(stamps: Iterable[Stamp | None]) -> str:
    """The signature of files of these sizes and times: "N files, SIZES, TIMES", two hashes."""
    listed = [one or (-1, -1) for one in stamps]
    hashes = (hashlib.sha256(repr([s[i] for s in listed]).encode()).hexdigest() for i in (0, 1))
    return ", ".join([f"{len(listed)} files", *(text[:12] for text in hashes)])


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
