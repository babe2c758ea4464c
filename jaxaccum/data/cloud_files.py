"""Point cloud files: reads pcd, ply and npy, writes ply and npy.

Formats: PCD 0.7 (https://pointclouds.org/documentation/tutorials/pcd_file_format.html), with LZF as
in liblzf; PLY 1.0 (Turk 1994).
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxaccum.data.base import DataError

Points = NDArray[np.float32]

_PLY_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1",
    "short": "i2", "int16": "i2", "ushort": "u2", "uint16": "u2",
    "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4",
    "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip


class Column(NamedTuple):
    """A named value, or `width` of them, of every point."""

    name: str
    dtype: str
    width: int = 1


def read_cloud(file: str | Path, *, drop_invalid: bool = False) -> Points:
    """Reads the points of a cloud; colours, normals and the like are left out.

    Args:
      file: *.pcd (ascii, binary, binary_compressed), *.ply (ascii, binary) or *.npy (n, 3 or more
        columns).
      drop_invalid: leave out points that are not finite, with which sensors mark what they did
        not see, instead of refusing the file.

    Returns:
      (n, 3) float32, n >= 1.

    Raises:
      DataError: naming the file, of an ascii file also the line, what is wrong and what to do.
    """
    path = Path(file)
    readers = {".pcd": _read_pcd, ".ply": _read_ply, ".npy": _read_npy}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise _error(path, "not a known kind of point cloud; expected *.pcd, *.ply or *.npy")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _error(path, f"cannot be read: {error.strerror}. Check the path") from None
    points, lines = reader(path, content)
    finite = np.isfinite(points).all(axis=1)
    if not finite.all():
        if not drop_invalid:
            first = int(np.argmin(finite))
            raise _error(
                path,
                f"{np.count_nonzero(~finite)} of {len(points)} points are not finite, the first "
                f"is point {first}. Take them out",
                None if lines is None else lines[first],
            )
        points = points[finite]
    if not len(points):
        raise _error(path, "no points in it")
    return points


def write_cloud(file: str | Path, points: NDArray[Any]) -> None:
    """Writes a cloud, in one step, so that no half of it can be seen.

    Args:
      file: *.ply (binary little endian) or *.npy.
      points: (n, 3), stored as float32.

    Raises:
      DataError: another suffix.
      ValueError: another shape.
    """
    path = Path(file)
    array = np.ascontiguousarray(points, "<f4")
    if array.ndim != 2 or array.shape[1] != 3:
        raise ValueError(f"{path}: points of the shape {array.shape}, expected (n, 3).")
    if path.suffix.lower() == ".ply":
        header = (
            f"ply\nformat binary_little_endian 1.0\nelement vertex {len(array)}\n"
            "property float x\nproperty float y\nproperty float z\nend_header\n"
        )
        content = header.encode() + array.tobytes()
    elif path.suffix.lower() == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, array)
        content = buffer.getvalue()
    else:
        raise _error(path, "clouds are written as *.ply or *.npy. Choose one of these")
    half = path.with_name(path.name + ".part")
    half.write_bytes(content)
    os.replace(half, path)


def _error(path: Path, message: str, line: int | None = None) -> DataError:
    where = path if line is None else f"{path}:{line}"
    return DataError(f"{where}: {message}.", file=str(path), line=line)


def _read_npy(path: Path, content: bytes) -> tuple[Points, None]:
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise _error(path, f"damaged or no npy file ({error}). Get it again") from None
    if not isinstance(array, np.ndarray):
        raise _error(path, "an npz archive, expected one array. Save it with numpy.save")
    if array.ndim != 2 or array.shape[1] < 3 or array.dtype.kind not in "fiu":
        raise _error(
            path, f"{array.dtype} of the shape {array.shape}, expected numbers of (n, 3 or more)"
        )
    return np.ascontiguousarray(array[:, :3], np.float32), None


def _read_pcd(path: Path, content: bytes) -> tuple[Points, Sequence[int] | None]:
    header: dict[str, list[str]] = {}
    at = number = 0
    while "DATA" not in header:
        end = content.find(b"\n", at)
        if end < 0:
            raise _error(path, "no whole pcd header: it ends before DATA. Get the file again")
        line, at, number = content[at:end].decode("latin-1"), end + 1, number + 1
        words = line.split()
        if words and not words[0].startswith("#"):
            header[words[0].upper()] = words[1:]
        if number > 100:
            raise _error(path, "no pcd header in the first 100 lines")
    columns, points = _pcd_columns(path, header)
    kind = " ".join(header["DATA"]).lower()
    if kind == "ascii":
        return _ascii_points(path, content[at:], number + 1, columns, points, whole=True)
    if kind == "binary":
        return _binary_points(path, content[at:], columns, points, "<"), None
    if kind == "binary_compressed":
        return _compressed_points(path, content[at:], columns, points), None
    raise _error(path, f"DATA {kind}, expected ascii, binary or binary_compressed", number)


def _pcd_columns(path: Path, header: dict[str, list[str]]) -> tuple[list[Column], int]:
    try:
        names, sizes, types = header["FIELDS"], header["SIZE"], header["TYPE"]
        counts = [int(c) for c in header.get("COUNT", ["1"] * len(names))]
        columns = [
            Column(n, {"F": "f", "I": "i", "U": "u"}[t.upper()] + str(int(s)), c)
            for n, s, t, c in zip(names, sizes, types, counts, strict=True)
        ]
        for column in columns:
            np.dtype(column.dtype)
        if "POINTS" in header:
            points = int(header["POINTS"][0])
        else:
            points = int(header["WIDTH"][0]) * int(header["HEIGHT"][0])
        if points < 0 or any(c < 0 for c in counts):
            raise ValueError
    except (KeyError, ValueError, TypeError, IndexError):
        raise _error(
            path,
            "a pcd header that makes no sense; expected FIELDS, SIZE, TYPE and COUNT of the same "
            "length, and POINTS",
        ) from None
    return columns, points


def _coordinates(path: Path, columns: Sequence[Column]) -> list[int]:
    """Which of the columns are x, y and z."""
    names = [column.name.lower() if column.width == 1 else "" for column in columns]
    missing = [axis for axis in "xyz" if axis not in names]
    if missing:
        raise _error(
            path,
            f"no {', '.join(missing)} among its fields {' '.join(c.name for c in columns)}; "
            f"a cloud needs x, y and z",
        )
    return [names.index(axis) for axis in "xyz"]


def _ascii_points(
    path: Path, body: bytes, first: int, columns: Sequence[Column], points: int, *, whole: bool
) -> tuple[Points, Sequence[int]]:
    """Parses rows of numbers.

    Args:
      body: the text after what has been read.
      first: number of its first line.
      points: rows expected.
      whole: whether the rows are the rest of the file; else what follows them is left alone.
    """
    rows, lines = list[list[str]](), list[int]()
    for number, line in enumerate(body.decode("latin-1").split("\n"), first):
        if len(rows) == points and not whole:
            break
        words = line.split()
        if words:
            rows.append(words)
            lines.append(number)
    if len(rows) != points:
        raise _error(
            path,
            f"{len(rows)} rows of points, but the header says {points}. The file is "
            f"{'truncated' if len(rows) < points else 'not what it says'}; get it again",
            lines[-1] if lines else first,
        )
    axes = _coordinates(path, columns)
    starts = np.cumsum([0] + [column.width for column in columns])
    width = int(starts[-1])
    for words, number in zip(rows, lines, strict=True):
        if len(words) != width:
            raise _error(path, f"{len(words)} columns, expected {width}", number)
    picked = [int(starts[axis]) for axis in axes]
    x, y, z = picked
    try:
        values = np.array([(w[x], w[y], w[z]) for w in rows], np.float64)
    except ValueError:
        for words, number in zip(rows, lines, strict=True):
            for at in picked:
                if not _is_number(words[at]):
                    raise _error(path, f"{words[at]!r} is not a number", number) from None
        raise
    with np.errstate(over="ignore"):  # to infinity, which is refused as such
        return values.reshape(-1, 3).astype(np.float32), lines


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _record(columns: Sequence[Column], order: str) -> np.dtype:
    # Names may repeat (pcd pads with fields called _), so the places are the names.
    return np.dtype([(str(i), order + c.dtype, (c.width,)) for i, c in enumerate(columns)])


def _binary_points(
    path: Path, body: bytes, columns: Sequence[Column], points: int, order: str
) -> Points:
    axes = _coordinates(path, columns)
    record = _record(columns, order)
    if len(body) < points * record.itemsize:
        raise _error(
            path,
            f"truncated: {len(body)} bytes of points, but the header says {points} points of "
            f"{record.itemsize} bytes. Get the file again",
        )
    rows = np.frombuffer(body, record, count=points)
    return np.stack([rows[str(axis)][:, 0] for axis in axes], axis=1).astype(np.float32)


def _compressed_points(path: Path, body: bytes, columns: Sequence[Column], points: int) -> Points:
    axes = _coordinates(path, columns)
    size = points * _record(columns, "<").itemsize
    damaged = "damaged or truncated compressed points. Get the file again"
    if len(body) < 8:
        raise _error(path, damaged)
    packed, unpacked = struct.unpack_from("<II", body)
    if len(body) < 8 + packed or unpacked != size:
        raise _error(path, damaged)
    try:
        plain = _lzf(body[8 : 8 + packed], unpacked)
    except (IndexError, ValueError):
        raise _error(path, damaged) from None
    # One column after the other, each of all points.
    starts = np.cumsum([0] + [points * c.width * np.dtype(c.dtype).itemsize for c in columns])
    values = [
        np.frombuffer(plain, "<" + columns[axis].dtype, points, int(starts[axis])) for axis in axes
    ]
    return np.stack(values, axis=1).astype(np.float32)


def _lzf(packed: bytes, size: int) -> bytes:
    """Unpacks liblzf's format: runs of literals, and copies of what came before."""
    out = bytearray()
    at = 0
    while at < len(packed):
        control = packed[at]
        at += 1
        if control < 32:
            out += packed[at : at + control + 1]
            at += control + 1
            continue
        length = control >> 5
        if length == 7:
            length += packed[at]
            at += 1
        start = len(out) - ((control & 31) << 8 | packed[at]) - 1
        at += 1
        length += 2
        if start < 0:
            raise ValueError("a copy from before the start")
        while length > 0:  # a copy may reach into itself
            piece = out[start : start + length]
            out += piece
            length -= len(piece)
    if len(out) != size:
        raise ValueError(f"{len(out)} bytes, expected {size}")
    return bytes(out)


class _Element(NamedTuple):
    name: str
    rows: int
    columns: list[Column]
    lists: bool


def _read_ply(path: Path, content: bytes) -> tuple[Points, Sequence[int] | None]:
    kind, elements, at, number = _ply_header(path, content)
    for element in elements:
        if element.name == "vertex":
            break
        if kind == "ascii":
            for _ in range(element.rows):
                at = content.find(b"\n", at) + 1 or len(content)
                number += 1
        elif element.lists:
            raise _error(path, f"lists in {element.name} before the vertices. Put vertices first")
        else:
            at += element.rows * _record(element.columns, "<").itemsize
    else:
        raise _error(path, "no element vertex")
    if element.lists:
        raise _error(path, "vertices with lists in them; expected plain numbers")
    if kind == "ascii":
        return _ascii_points(
            path, content[at:], number + 1, element.columns, element.rows, whole=False
        )
    order = "<" if kind == "binary_little_endian" else ">"
    return _binary_points(path, content[at:], element.columns, element.rows, order), None


def _ply_header(path: Path, content: bytes) -> tuple[str, list[_Element], int, int]:
    """The format, the elements, and where the data starts: byte, and lines before it."""
    kind, elements = "", list[_Element]()
    at = number = 0
    while True:
        end = content.find(b"\n", at)
        if end < 0:
            raise _error(path, "no whole ply header: it ends before end_header. Get it again")
        line, at, number = content[at:end].decode("latin-1").strip(), end + 1, number + 1
        if number == 1:
            if line != "ply":
                raise _error(path, "not a ply file: it does not start with the line 'ply'", 1)
            continue
        match line.split():
            case [] | ["comment" | "obj_info", *_]:
                pass
            case ["format", ("ascii" | "binary_little_endian" | "binary_big_endian") as kind, _]:
                pass
            case ["element", name, count] if count.isdecimal():
                elements.append(_Element(name, int(count), [], False))
            case ["property", "list", _, _, _] if elements:
                elements[-1] = elements[-1]._replace(lists=True)
            case ["property", dtype, name] if elements and dtype in _PLY_TYPES:
                elements[-1].columns.append(Column(name, _PLY_TYPES[dtype]))
            case ["end_header"] if kind:
                return kind, elements, at, number
            case _:
                raise _error(path, f"a ply header with the line {line[:60]!r}", number)
