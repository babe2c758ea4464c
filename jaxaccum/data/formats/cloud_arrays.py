"""Arrays as clouds: what their shape and their values must be, and npy files of them."""

from __future__ import annotations

import io
import math
import struct
import tokenize
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxaccum.data.base import DataError
from jaxaccum.data.texts import shown, shown_path

Points = NDArray[np.float32]

_LARGEST = 1e18  # coordinate; squared distances of such points fit float32
# The header of an npy file is a Python literal, and numpy leaves what that provokes as it is.
_HEADER_ERRORS = (
    ValueError, EOFError, SyntaxError, TypeError, LookupError, OverflowError, MemoryError,
    RecursionError, AttributeError, tokenize.TokenError, struct.error,
)  # fmt: skip


def error(path: Path, message: str, line: int | None = None) -> DataError:
    """What is wrong with the file of a cloud, or in a line of it."""
    where = shown_path(path) if line is None else f"{shown_path(path)}:{line}"
    return DataError(f"{where}: {message}.", file=str(path), line=line)


def float32(values: NDArray[Any]) -> Points:
    """Points of any type of number, of which `too_large` has nothing to say."""
    return np.ascontiguousarray(values, np.float32)


def checked(points: NDArray[Any]) -> Points:
    """The points of a cloud in memory.

    Args:
      points: (n, 3) numbers.

    Returns:
      (n, 3) float32.

    Raises:
      ValueError: what is wrong, and what to do.
    """
    finite = np.isfinite(points).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{np.count_nonzero(~finite)} of {len(points)} points are not finite, the first is "
            f"point {int(np.argmin(finite))}. Leave them out"
        )
    if problem := too_large(points):
        raise ValueError(f"point {problem[0]} has {problem[1]}. Check the unit")
    return float32(points)


def too_large(points: NDArray[Any]) -> tuple[int, str] | None:
    """Where the largest coordinate of finite points is, and what it is, if that is too large."""
    # Not abs, which the lowest number of a signed type does not have.
    high, low = float(points.max()), -float(points.min())
    if max(high, low) <= _LARGEST:
        return None
    at = points.argmax() if high >= low else points.argmin()
    return int(at) // points.shape[1], (
        f"a coordinate of {max(high, low):.3g}, expected at most {_LARGEST:g}"
    )


def _most_columns(rows: int) -> int:
    """Of more columns an array of so many rows is another thing than a row for each point: the
    transpose of that, or its numbers one after the other."""
    return min(4 * max(rows, 4) if rows > 2 else 64, 4096)


def read_npy(path: Path, content: bytes) -> tuple[NDArray[Any], None]:
    """The points of an npy file, (n, 3) of any type of number; and no lines.

    Args:
      path: of the file, for messages.
      content: of it.

    Raises:
      DataError: it is none, or its array no cloud.
    """
    # Not np.load, which takes the memory that a header asks for before it looks for the data.
    if content[:2] == b"PK":
        raise error(path, "an npz archive, expected one array. Save it with numpy.save")
    file = io.BytesIO(content)
    headers = {(1, 0): np.lib.format.read_array_header_1_0}
    try:
        version = np.lib.format.read_magic(file)
        read = headers.get(version, np.lib.format.read_array_header_2_0)
        shape, by_column, dtype = read(file)
        if any(type(n) is not int or not 0 <= n < 2**63 for n in shape):
            raise ValueError("a shape that cannot be")
    except _HEADER_ERRORS as wrong:
        raise error(
            path, f"damaged or no npy file ({shown(str(wrong))[1:-1]}). Get it again"
        ) from None
    if dtype.hasobject:
        raise error(
            path,
            "holds objects of Python, such as a dict or a list of arrays, which are not read. Save "
            "the points alone: numpy.save(FILE, an array (n, 3) of floats)",
        )
    if len(shape) != 2 or shape[1] < 3 or dtype.kind not in "fiu":
        raise error(
            path,
            f"{shown(str(dtype))[1:-1]} of the shape {shape}, expected numbers of (n, 3 or more). "
            "Save the points as such an array",
        )
    if shape[0] and shape[1] > _most_columns(shape[0]):
        fix = "Transpose it: save array.T" if shape[0] > 2 else "Save array.reshape(-1, 3)"
        raise error(
            path,
            f"an array of the shape {shape}, expected a row for each point, (n, 3 or more): "
            f"{shape[1]} columns are hardly those of {shape[0]} points. {fix}",
        )
    if not shape[0]:
        return np.zeros((0, 3), np.float32), None
    size, there = math.prod(shape) * dtype.itemsize, len(content) - file.tell()
    if size > there:
        raise error(
            path,
            f"damaged or no npy file: its header says {shape[0]} rows of {shape[1]}, {size} bytes, "
            f"and it has {there}. Get it again",
        )
    values = np.frombuffer(content, dtype, math.prod(shape), file.tell())
    values = values.reshape(shape[::-1]).T if by_column else values.reshape(shape)
    return values[:, :3], None
