"""Decoded arrays kept in memory up to a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import numpy as np

Entry = TypeVar("Entry", bound=tuple[Any, ...])


class ByteCache(Generic[Entry]):
    """Tuples of arrays by key, the least recently used forgotten; thread-safe.

    Arrays in it are made read-only, as everybody gets the same. Pickles without its content, so
    that a worker process starts with an empty one.
    """

    def __init__(self, capacity: int) -> None:
        """capacity: most bytes of arrays to keep; 0 keeps nothing."""
        self._capacity = capacity
        self._forget()

    def _forget(self) -> None:
        self._bytes = 0
        self._kept: OrderedDict[Hashable, Entry] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        content = ("_bytes", "_kept", "_lock")
        return {k: v for k, v in self.__dict__.items() if k not in content}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def get(self, key: Hashable, make: Callable[[], Entry]) -> Entry:
        """The entry of a key: the kept one, or a new one from `make`, called without the lock."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        entry = make()
        for value in entry:
            if isinstance(value, np.ndarray):
                value.flags.writeable = False
        size = _bytes_of(entry)
        with self._lock:
            if key not in self._kept and size <= self._capacity:
                self._kept[key] = entry
                self._bytes += size
                while self._bytes > self._capacity:
                    self._bytes -= _bytes_of(self._kept.popitem(last=False)[1])
        return entry


def _bytes_of(entry: tuple[Any, ...]) -> int:
    return sum(value.nbytes for value in entry if isinstance(value, np.ndarray))
