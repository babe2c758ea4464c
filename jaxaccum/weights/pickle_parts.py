"""What a pickle of weights is read into: descriptions of objects, and the bound on their number."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxaccum.weights.transfer import WeightsError

ENTRY = 100  # bytes counted for an entry of a dict or set
_MIB = 2**20
_FREE, _PER_BYTE = 64 * _MIB, 32  # bytes that a pickle may make, and for each byte of its own
_PLAIN_KEY = 2**24  # integers below are keys without a limit to their number
_ODD_KEYS = 10_000  # others are not: they can be made to collide, which takes time


@dataclasses.dataclass(frozen=True)
class Global:
    """A name that a pickle asked for; nothing was imported."""

    name: str


@dataclasses.dataclass(eq=False, repr=False)
class Record:
    """The description of an object.

    Attributes:
      kind: its class, as a dotted name.
      args: what it was made from.
      state: its attributes.
      items: what it holds, if its class is a container.
    """

    kind: str
    args: tuple
    state: dict[str, Any] = dataclasses.field(default_factory=dict)
    items: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Storage:
    """Raw elements: the archive's member data/KEY, `size` of a dtype."""

    key: str
    dtype: str
    size: int


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A strided view of a storage; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Budget:
    """What a pickle may still make, in bytes: a fixed part, and a part for each byte of its own.

    Whatever copies pays for what it copies, so that memory and time are bounded by the file.
    """

    def __init__(self, size: int) -> None:
        """size: of the pickle in bytes."""
        self._size, self._limit = size, _FREE + _PER_BYTE * size
        self._left, self._odd = self._limit, _ODD_KEYS

    def take(self, count: int) -> None:
        """Counts bytes.

        Raises:
          WeightsError: they are too many.
        """
        self._left -= count
        if self._left < 0:
            raise WeightsError(
                f"its pickle of {self._size:,} bytes unpacks to more than "
                f"{self._limit // _MIB} MiB, the limit: {_FREE // _MIB} MiB and {_PER_BYTE} times "
                "its size. No weights need that"
            )

    def key(self, key: Any) -> Any:
        """A key of a dict or member of a set, counted; tuples one level deep, since hashes are
        recursive."""
        plain = (str, int, float, bool, bytes, type(None), Global, Record, Tensor)
        parts = key if type(key) is tuple else (key,)
        # Hashing and comparing take as long as a key is long, each time that it is used.
        self.take(ENTRY * len(parts))
        for part in parts:
            if not isinstance(part, plain):
                raise WeightsError(f"its pickle uses a {type(part).__name__} as a key")
            if isinstance(part, (str, bytes)):
                self.take(len(part))
            elif isinstance(part, int) and abs(part) >= 10**18:
                raise WeightsError("its pickle uses a number of over 18 digits as a key")
        if type(key) in (tuple, float) or (type(key) is int and not -1 <= key < _PLAIN_KEY):
            self._odd -= 1
            if self._odd < 0:
                raise WeightsError(
                    f"its pickle has more than {_ODD_KEYS:,} keys that are tuples, fractions or "
                    "numbers above 16,777,216, the limit. No weights need that"
                )
        return key
