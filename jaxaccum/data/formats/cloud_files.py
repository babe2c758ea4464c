"""Point cloud files: reads pcd, ply and npy, writes ply and npy.

Formats: PCD 0.7 (https://pointclouds.org/documentation/tutorials/pcd_file_format.html), with LZF as
in liblzf; PLY 1.0 (Turk 1994). What a header says is held against the file's size before memory is
taken for it.
"""

from __future__ import annotations

import array
import io
import itertools
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxaccum.data.formats.cloud_arrays import Points, float32, read_npy, too_large
from jaxaccum.data.formats.cloud_arrays import error as _error
from jaxaccum.data.texts import number, read_bytes, shown, whole_number

_LARGEST_FILE = 1 << 32  # bytes
_LZF = 88  # bytes out of one, at most: a copy of 264 takes three
_PCD_TYPES = {
    "F": {2: "f2", 4: "f4", 8: "f8"},
    "I": {1: "i1", 2: "i2", 4: "i4", 8: "i8"},
    "U": {1: "u1", 2: "u2", 4: "u4", 8: "u8"},
}
SUFFIXES = frozenset({".npy", ".pcd", ".ply"})
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
        not see, instead of refusing the file; `read_valid` also counts them.

    Returns:
      (n, 3) float32, n >= 1.

    Raises:
      DataError: naming the file, of an ascii file also the line, what is wrong and what to do.
    """
    return _read(file, drop_invalid)[0]


def read_valid(file: str | Path) -> tuple[Points, int]:
    """The points of a cloud that are finite, as `read_cloud` gives them, and how many are not."""
    return _read(file, True)


def _read(file: str | Path, drop_invalid: bool) -> tuple[Points, int]:
    path = Path(file)
    readers = {".pcd": _read_pcd, ".ply": _read_ply, ".npy": read_npy}
    reader = readers.get(path.suffix.lower())  # of SUFFIXES
    if reader is None:
        raise _error(path, "not a known kind of point cloud; expected *.pcd, *.ply or *.npy")
    points, lines = reader(path, read_bytes(path, limit=_LARGEST_FILE))
    if not len(points):
        raise _error(path, "no points in it")
    finite = np.isfinite(points).all(axis=1)
    wrong = len(points) - int(np.count_nonzero(finite))
    if wrong == len(points):
        raise _error(path, f"none of its {wrong} points is finite. Get the file again")
    if wrong and not drop_invalid:
        first = int(np.argmin(finite))
        raise _error(
            path,
            f"{wrong} of {len(points)} points are not finite, the first is point {first}. Take "
            "them out",
            None if lines is None else lines[first],
        )
    if problem := too_large(points if not wrong else np.where(finite[:, None], points, 0)):
        row, said = problem
        raise _error(
            path,
            f"{said}: squared distances would not fit. Check the unit, or get the file again",
            None if lines is None else lines[row],
        )
    return float32(points[finite] if wrong else points), wrong


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


def _read_pcd(path: Path, content: bytes) -> tuple[NDArray[Any], Sequence[int] | None]:
    header: dict[str, list[str]] = {}
    at = row = 0
    while "DATA" not in header:
        end = content.find(b"\n", at)
        if end < 0:
            raise _error(path, "no whole pcd header: it ends before DATA. Get the file again")
        line, at, row = content[at : min(end, at + 2**20)], end + 1, row + 1
        words = line.decode("latin-1").split()
        if words and not words[0].startswith("#"):
            header[words[0].upper()] = words[1:]
        if row > 100:
            raise _error(path, "no pcd header in the first 100 lines")
    columns, points = _pcd_columns(path, header)
    kind = " ".join(header["DATA"]).lower()
    if kind == "ascii":
        return _ascii_points(path, content, at, row + 1, columns, points, whole=True)
    if kind == "binary":
        return _binary_points(path, content, at, columns, points, "<"), None
    if kind == "binary_compressed":
        return _compressed_points(path, content[at:], columns, points), None
    kind = shown(kind)[1:-1]
    raise _error(path, f"DATA {kind}, expected ascii, binary or binary_compressed", row)


def _pcd_columns(path: Path, header: dict[str, list[str]]) -> tuple[list[Column], int]:
    try:
        names, sizes, types = header["FIELDS"], header["SIZE"], header["TYPE"]
        counts = header.get("COUNT", ["1"] * len(names))
        columns = [
            Column(n, _PCD_TYPES[t.upper()][whole_number(s)], whole_number(c))
            for n, s, t, c in zip(names, sizes, types, counts, strict=True)
        ]
        told = {k: whole_number(header[k][0]) for k in ("POINTS", "WIDTH", "HEIGHT") if k in header}
        points = told["POINTS"] if "POINTS" in told else told["WIDTH"] * told["HEIGHT"]
        if any(n < 0 for n in told.values()) or any(c.width < 0 for c in columns):
            raise ValueError("a number below 0")
    except (KeyError, ValueError, IndexError) as error:
        why = "" if isinstance(error, IndexError) else f" ({shown(str(error))[1:-1]})"
        raise _error(
            path,
            f"a pcd header that makes no sense{why}; expected FIELDS, SIZE, TYPE and COUNT of the "
            "same length, and POINTS",
        ) from None
    if {"WIDTH", "HEIGHT"} <= told.keys() and told["WIDTH"] * told["HEIGHT"] != points:
        raise _error(
            path,
            f"a pcd header that contradicts itself: WIDTH {told['WIDTH']} x HEIGHT "
            f"{told['HEIGHT']}, but POINTS {points}. Correct it, or get the file again",
        )
    return columns, points


def _coordinates(path: Path, columns: Sequence[Column]) -> list[int]:
    """Which of the columns are x, y and z."""
    names = [column.name.lower() if column.width == 1 else "" for column in columns]
    missing = [axis for axis in "xyz" if axis not in names]
    wide = [column for column in columns if column.width != 1 and column.name.lower() in missing]
    if wide:
        raise _error(
            path,
            f"its field {wide[0].name} has {wide[0].width:,} values of every point, expected 1. "
            "Correct COUNT, or get the file again",
        )
    if missing:
        raise _error(
            path,
            f"no {', '.join(missing)} among its fields "
            f"{shown(' '.join(c.name for c in columns))[1:-1]}; a cloud needs x, y and z",
        )
    return [names.index(axis) for axis in "xyz"]


def _ascii_points(
    path: Path, content: bytes, at: int, first: int, columns: Sequence[Column], points: int,
    *, whole: bool,
) -> tuple[NDArray[np.float64], Sequence[int]]:  # fmt: skip
    """Parses rows of numbers.

    Args:
      content: the file, of which `at` bytes and the lines before `first` have been read.
      points: rows expected.
      whole: whether the rows are the rest of the file; else what follows them is left alone.
    """
    axes = _coordinates(path, columns)
    starts = [0, *itertools.accumulate(column.width for column in columns)]
    width = starts[-1]
    x, y, z = (starts[axis] for axis in axes)
    values, lines = array.array("d"), array.array("q")
    rows, last = 0, first
    for line, text in enumerate(_lines(content, at), first):
        if rows == points and not whole:
            break
        words = text.split()
        if not words:
            continue
        rows, last = rows + 1, line
        if rows > points:
            continue
        if len(words) != width:
            raise _error(path, f"{len(words)} columns, expected {width}", line)
        picked = (words[x], words[y], words[z])
        try:
            # float() knows 1_0, too; number() is slow.
            values.extend(map(float if b"_" not in text else _number, picked))
        except ValueError:
            for word in picked:
                try:
                    _number(word)
                except ValueError as error:
                    raise _error(path, str(error), line) from None
            raise
        lines.append(line)
    if rows != points:
        raise _error(
            path,
            f"{rows} rows of points, but the header says {points}. The file is "
            f"{'truncated' if rows < points else 'not what it says'}; get it again",
            last,
        )
    return np.asarray(values).reshape(-1, 3), lines


def _lines(content: bytes, at: int) -> Iterator[bytes]:
    """The lines from a byte on, one after the other."""
    file = io.BytesIO(content)
    file.seek(at)
    return iter(file)


def _number(word: bytes) -> float:
    return number(word.decode("latin-1"))


def _itemsize(columns: Sequence[Column]) -> int:
    """Bytes of a point; a number of Python, which no width can make too large."""
    return sum(int(c.dtype[1:]) * c.width for c in columns)


def _binary_points(
    path: Path, content: bytes, at: int, columns: Sequence[Column], points: int, order: str
) -> NDArray[Any]:
    axes = _coordinates(path, columns)
    size, there = _itemsize(columns), max(len(content) - at, 0)
    if there < points * size:
        raise _error(
            path,
            f"truncated: {there} bytes of points, but the header says {points} points of "
            f"{size} bytes. Get the file again",
        )
    if not points:
        return np.zeros((0, 3), np.float32)
    places = [at + _itemsize(columns[:axis]) for axis in axes]
    values = [
        np.ndarray((points,), order + columns[axis].dtype, content, place, (size,))
        for axis, place in zip(axes, places, strict=True)
    ]
    return np.stack(values, axis=1)


def _compressed_points(
    path: Path, body: bytes, columns: Sequence[Column], points: int
) -> NDArray[Any]:
    axes = _coordinates(path, columns)
    size = points * _itemsize(columns)
    damaged = "damaged or truncated compressed points. Get the file again"
    if len(body) < 8:
        raise _error(path, damaged)
    packed, unpacked = struct.unpack_from("<II", body)
    if len(body) < 8 + packed or unpacked != size or size > _LZF * packed:
        raise _error(
            path,
            f"{len(body) - 8} bytes of compressed points, which say they are {packed} and unpack "
            f"to {unpacked}; the header says {points} points, {size} bytes (one byte can unpack to "
            f"{_LZF} at most): {damaged}",
        )
    if not points:
        return np.zeros((0, 3), np.float32)
    try:
        plain = _lzf(body[8 : 8 + packed], unpacked)
    except (IndexError, ValueError):
        raise _error(path, damaged) from None
    # One column after the other, each of all points.
    values = [
        np.frombuffer(plain, "<" + columns[axis].dtype, points, points * _itemsize(columns[:axis]))
        for axis in axes
    ]
    return np.stack(values, axis=1)


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
        if len(out) > size:
            break
    if len(out) != size:
        raise ValueError(f"{len(out)} bytes, expected {size}")
    return bytes(out)


class _Element(NamedTuple):
    name: str
    rows: int
    columns: list[Column]
    lists: bool


def _read_ply(path: Path, content: bytes) -> tuple[NDArray[Any], Sequence[int] | None]:
    kind, elements, at, row = _ply_header(path, content)
    for element in elements:
        if element.name == "vertex":
            break
        if kind == "ascii":
            for done in range(element.rows):
                if at >= len(content):
                    raise _error(
                        path,
                        f"{done} rows of {shown(element.name)[1:-1]}, but the header says "
                        f"{element.rows}. The file is truncated; get it again",
                        row,
                    )
                at = content.find(b"\n", at) + 1 or len(content)
                row += 1
        elif element.lists:
            raise _error(
                path,
                f"lists in {shown(element.name)[1:-1]} before the vertices. Put vertices first",
            )
        else:
            at += element.rows * _itemsize(element.columns)
    else:
        raise _error(path, "no element vertex")
    if element.lists:
        raise _error(path, "vertices with lists in them; expected plain numbers")
    if kind == "ascii":
        return _ascii_points(path, content, at, row + 1, element.columns, element.rows, whole=False)
    order = "<" if kind == "binary_little_endian" else ">"
    return _binary_points(path, content, at, element.columns, element.rows, order), None


def _ply_header(path: Path, content: bytes) -> tuple[str, list[_Element], int, int]:
    """The format, the elements, and where the data starts: byte, and lines before it."""
    kind, elements = "", list[_Element]()
    at = row = 0
    while True:
        end = content.find(b"\n", at)
        if end < 0:
            raise _error(path, "no whole ply header: it ends before end_header. Get it again")
        text, at, row = content[at : min(end, at + 2**20)], end + 1, row + 1
        line = text.decode("latin-1").strip()
        if row == 1:
            if line != "ply":
                raise _error(path, "not a ply file: it does not start with the line 'ply'", 1)
            continue
        match line.split():
            case [] | ["comment" | "obj_info", *_]:
                pass
            case ["format", ("ascii" | "binary_little_endian" | "binary_big_endian") as kind, _]:
                pass
            case ["element", name, count] if _is_count(count):
                elements.append(_Element(name, whole_number(count), [], False))
            case ["property", "list", _, _, _] if elements:
                elements[-1] = elements[-1]._replace(lists=True)
            case ["property", dtype, name] if elements and dtype in _PLY_TYPES:
                elements[-1].columns.append(Column(name, _PLY_TYPES[dtype]))
            case ["end_header"] if kind:
                return kind, elements, at, row
            case _:
                raise _error(path, f"a ply header with the line {line[:60]!r}", row)


def _is_count(word: str) -> bool:
    try:
        return whole_number(word) >= 0
    except ValueError:
        return False
