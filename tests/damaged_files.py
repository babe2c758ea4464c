"""Seeded damage to small files, and the bounds within which they are to be read."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

NUMBERS = (
    b"0", b"-1", b"1_0", b"\xd9\xa3", b"1e9", b"nan", b"999999999", b"2147483648", b"4294967295",
    b"1000000000000", b"9223372036854775808", b"9" * 5000, b"0x10", b"1.5", b"True",
)  # fmt: skip


def cases(usual: int) -> int:
    """Cases of each class: JAXACCUM_FUZZ, or as many as are usual."""
    return int(os.environ.get("JAXACCUM_FUZZ") or usual)


@contextmanager
def memory_below(limit: int) -> Iterator[None]:
    """Fails if Python and numpy take more than so many MiB at once."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1] >> 20
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak} MiB at once"


def damaged(data: bytes, rng: np.random.Generator, other: bytes = b"") -> bytes:
    """A file with one to three of: bytes changed, cut, put in, repeated, a number replaced, a part
    of another file spliced in."""
    for _ in range(int(rng.integers(1, 4))):
        data = _damaged_once(data, rng, other)
    return data


def _damaged_once(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    place = int(rng.integers(0, len(data) + 1))
    end = min(len(data), place + int(rng.integers(1, 40)))
    before, here, after = data[:place], data[place:end], data[end:]
    match int(rng.integers(9)):
        case 0:
            return before + rng.bytes(1) + data[place + 1 :]
        case 1:
            return before + bytes(~b & 255 for b in data[place : place + 1]) + data[place + 1 :]
        case 2:
            return before
        case 3:
            return before + after
        case 4:
            return before + here * int(rng.integers(2, 5)) + after
        case 5:
            return before + rng.bytes(int(rng.integers(1, 9))) + here + after
        case 6:
            return before + other[place // 2 : place // 2 + 60] + after
        case _:
            return _number_replaced(data, rng)


def _number_replaced(data: bytes, rng: np.random.Generator) -> bytes:
    """The data with one of the numbers in its first 1000 bytes replaced."""
    digits = np.frombuffer(data[:1000], np.uint8)
    places = np.flatnonzero((digits >= 48) & (digits <= 57))
    if not len(places):
        return data
    start = end = int(places[rng.integers(len(places))])
    while end < len(data) and 48 <= data[end] <= 57:
        end += 1
    return data[:start] + NUMBERS[int(rng.integers(len(NUMBERS)))] + data[end:]
