"""Point cloud files: every kind reads alike, and every mistake is named with its place."""

import struct

import numpy as np
import pytest

from jaxaccum.data import DataError, read_cloud, write_cloud
from jaxaccum.data.formats.cloud_files import read_valid

POINTS = np.random.default_rng(0).standard_normal((37, 3)).astype(np.float32)


def pcd(kind, body, *, points=37, fields="x y z", size="4 4 4", types="F F F", count="1 1 1"):
    return (
        f"# .PCD v0.7 - Point Cloud Data file format\nVERSION 0.7\nFIELDS {fields}\nSIZE {size}\n"
        f"TYPE {types}\nCOUNT {count}\nWIDTH {points}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\n"
        f"POINTS {points}\nDATA {kind}\n"
    ).encode() + body


def text(points):
    return "".join(" ".join(repr(float(v)) for v in row) + "\n" for row in points).encode()


def lzf(plain):
    """Packs by literals, and by copies of what lies one to eight bytes back."""
    out, literals, at = b"", b"", 0

    def flushed():
        return b"".join(
            bytes([len(literals[i : i + 32]) - 1]) + literals[i : i + 32]
            for i in range(0, len(literals), 32)
        )

    while at < len(plain):
        best, back = 0, 0
        for offset in range(1, min(at, 8) + 1):
            length = 0
            while at + length < len(plain) and length < 264:
                if plain[at + length] != plain[at + length - offset]:
                    break
                length += 1
            if length > best:
                best, back = length, offset
        if best < 3:
            literals += plain[at : at + 1]
            at += 1
            continue
        out += flushed()
        literals = b""
        if best - 2 < 7:
            out += bytes([(best - 2) << 5 | (back - 1) >> 8, (back - 1) & 255])
        else:
            out += bytes([7 << 5 | (back - 1) >> 8, best - 9, (back - 1) & 255])
        at += best
    return out + flushed()


def packed(columns):
    plain = b"".join(np.ascontiguousarray(c).tobytes() for c in columns)
    body = lzf(plain)
    return struct.pack("<II", len(body), len(plain)) + body


def ply(kind, body, *, points=37, vertex="property float x\nproperty float y\nproperty float z\n"):
    return f"ply\nformat {kind} 1.0\ncomment made by a test\nelement vertex {points}\n{vertex}".encode() + body  # fmt: skip  # noqa: E501


def written(folder, name, content):
    file = folder / name
    file.write_bytes(content)
    return file


# --- reading ---


def wide(points):
    """Coordinates among other fields: normals, a colour, padding, doubles for y."""
    kind = np.dtype(
        [("n", "<f4", 2), ("x", "<f4"), ("_", "u1", 3), ("y", "<f8"), ("z", "<f4"), ("c", "<u2")]
    )
    rows = np.zeros(len(points), kind)
    rows["n"], rows["c"] = 7, 9
    rows["x"], rows["y"], rows["z"] = points.T
    return rows


WIDE = {
    "fields": "normal x _ y z colour", "size": "4 4 1 8 4 2", "types": "F F U F F U",
    "count": "2 1 3 1 1 1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ascii.pcd", pcd("ascii", text(POINTS))),
        ("binary.pcd", pcd("binary", POINTS.tobytes())),
        ("compressed.pcd", pcd("binary_compressed", packed(POINTS.T))),
        ("upper.PCD", pcd("BINARY", POINTS.tobytes())),
        ("windows.pcd", pcd("ascii", text(POINTS)).replace(b"\n", b"\r\n")),
        ("blank.pcd", pcd("ascii", text(POINTS).replace(b"\n", b"\n\n"))),
        ("no_count.pcd", pcd("binary", POINTS.tobytes()).replace(b"COUNT 1 1 1\n", b"")),
        ("no_points.pcd", pcd("binary", POINTS.tobytes()).replace(b"\nPOINTS 37", b"")),
        ("wide.pcd", pcd("binary", wide(POINTS).tobytes(), **WIDE)),
        (
            "wide_compressed.pcd",
            pcd("binary_compressed", packed([wide(POINTS)[n] for n in "nx_yzc"]), **WIDE),
        ),
        (
            "wide_ascii.pcd",
            pcd("ascii", text(np.insert(POINTS, [0, 0, 1], 5, axis=1)), fields="n x c y z",
                size="4 4 4 4 4", types="F F F F F", count="2 1 1 1 1"),
        ),
        ("ascii.ply", ply("ascii", b"end_header\n" + text(POINTS))),
        (
            "faces.ply",
            ply("ascii", b"element face 2\nproperty list uchar int vertex_indices\nend_header\n"
                + text(POINTS) + b"3 0 1 2\n3 1 2 3\n"),
        ),
        ("little.ply", ply("binary_little_endian", b"end_header\n" + POINTS.tobytes())),
        ("big.ply", ply("binary_big_endian", b"end_header\n" + POINTS.astype(">f4").tobytes())),
        (
            "wide.ply",
            ply("binary_little_endian",
                b"end_header\n" + wide(POINTS)[["y", "c", "x", "z"]].astype(
                    [("y", "<f8"), ("c", "<u2"), ("x", "<f4"), ("z", "<f4")]).tobytes(),
                vertex="property double y\nproperty ushort c\nproperty float32 x\n"
                "property float z\n"),
        ),
        (
            "later.ply",
            b"ply\nformat binary_little_endian 1.0\nelement camera 2\nproperty int id\n"
            b"property uchar kind\nelement vertex 37\nproperty float x\nproperty float y\n"
            b"property float z\nend_header\n" + bytes(10) + POINTS.tobytes(),
        ),
        (
            "later_ascii.ply",
            b"ply\nformat ascii 1.0\nelement camera 2\nproperty list int int id\n"
            b"element vertex 37\nproperty float x\nproperty float y\nproperty float z\n"
            b"end_header\n1 2\n0\n" + text(POINTS),
        ),
    ],
)  # fmt: skip
def test_every_kind_reads_alike(tmp_path, name, content):
    points = read_cloud(written(tmp_path, name, content))
    assert points.dtype == np.float32 and points.shape == (37, 3)
    expected = POINTS if name != "wide_ascii.pcd" else POINTS[:, :3]
    np.testing.assert_array_equal(points, expected)


def test_packing_has_runs_copies_into_themselves_and_long_copies(tmp_path):
    columns = np.zeros((3, 500), np.float32)
    columns[1] = 1.5
    columns[2] = np.arange(500)
    body = packed(columns)
    assert len(body) < columns.nbytes / 2
    file = written(tmp_path, "a.pcd", pcd("binary_compressed", body, points=500))
    np.testing.assert_array_equal(read_cloud(file), columns.T)
    # By hand: 2 literals, a copy of 6 from 2 back, a copy of 12 (7 + 3 + 2) from 1 back.
    from jaxaccum.data.formats.cloud_files import _lzf

    plain = b"ab" + b"ababab" + b"b" * 12
    assert _lzf(bytes([1]) + b"ab" + bytes([4 << 5, 1, 7 << 5, 3, 0]), len(plain)) == plain


def test_npy_of_more_columns_and_other_types(tmp_path):
    for array in (POINTS, np.hstack([POINTS, POINTS]), POINTS.astype(np.float64)):
        np.save(tmp_path / "a.npy", array)
        np.testing.assert_array_equal(read_cloud(tmp_path / "a.npy"), POINTS)
    np.save(tmp_path / "a.npy", np.arange(6).reshape(2, 3))
    assert read_cloud(str(tmp_path / "a.npy")).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("name", ["a.ply", "a.npy", "A.PLY"])
def test_what_is_written_is_read(tmp_path, name):
    write_cloud(tmp_path / name, POINTS.astype(np.float64))
    np.testing.assert_array_equal(read_cloud(tmp_path / name), POINTS)
    write_cloud(tmp_path / name, POINTS[:2])
    assert len(read_cloud(tmp_path / name)) == 2
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(DataError, match=r"a\.obj: clouds are written as \*\.ply or \*\.npy"):
        write_cloud(tmp_path / "a.obj", POINTS)
    with pytest.raises(ValueError, match=r"expected \(n, 3\)"):
        write_cloud(tmp_path / "a.ply", POINTS[:, :2])
    assert not list(tmp_path.iterdir())


# --- mistakes ---


LINES = pcd("ascii", text(POINTS)).split(b"\n")


def changed(line, to):
    return b"\n".join([*LINES[: line - 1], to, *LINES[line:]])


@pytest.mark.parametrize(
    ("name", "content", "said", "line"),
    [
        ("a.obj", b"", "not a known kind of point cloud", None),
        ("a.pcd", b"", "no whole pcd header", None),
        ("a.pcd", pcd("binary", b"")[:60], "no whole pcd header", None),
        ("a.pcd", b"x\n" * 200, "no pcd header in the first 100 lines", None),
        ("a.pcd", pcd("binary", POINTS.tobytes()[:-1]), "truncated: 443 bytes of points", None),
        ("a.pcd", pcd("binary_compressed", b"123"), "damaged or truncated compressed", None),
        ("a.pcd", pcd("binary_compressed", packed(POINTS.T)[:-5]), "damaged or truncated", None),
        ("a.pcd", pcd("binary_compressed", packed(POINTS.T[:2])), "damaged or truncated", None),
        (
            "a.pcd",
            pcd("binary_compressed", struct.pack("<II", 2, 444) + bytes([32, 9])),
            "damaged or truncated",
            None,
        ),
        ("a.pcd", pcd("ascii", text(POINTS[:30])), "30 rows of points, but the header says 37", 41),
        ("a.pcd", pcd("ascii", text(POINTS) + b"1 2 3\n"), "38 rows of points", 49),
        ("a.pcd", changed(20, b"1 2"), "2 columns, expected 3", 20),
        ("a.pcd", changed(20, b"1 2,5 3"), "'2,5' is not a number", 20),
        ("a.pcd", changed(20, b"1 nan 3"), "points are not finite, the first is point 8", 20),
        ("a.pcd", changed(20, b"1 1e300 3"), "a coordinate of 1e+300, expected at", 20),
        ("a.pcd", pcd("zip", b""), "DATA zip, expected ascii, binary", 11),
        ("a.pcd", pcd("binary", b"", points=0), "no points in it", None),
        ("a.pcd", pcd("ascii", b"", points=0), "no points in it", None),
        ("a.pcd", pcd("binary", b"", fields="x y w"), "no z among its fields x y w", None),
        ("a.pcd", pcd("binary", b"", size="4 4"), "header that makes no sense", None),
        ("a.pcd", pcd("binary", b"", types="F F Q"), "header that makes no sense", None),
        ("a.pcd", pcd("binary", b"", points="many"), "header that makes no sense", None),
        ("a.ply", b"", "no whole ply header", None),
        ("a.ply", b"solid\n", "does not start with the line 'ply'", 1),
        ("a.ply", b"ply\nend_header\n", "a ply header with the line 'end_header'", 2),
        ("a.ply", ply("binary_middle_endian", b"end_header\n"), "format binary_middle", 2),
        ("a.ply", ply("ascii", b"property half w\nend_header\n"), "property half w", 8),
        ("a.ply", ply("ascii", b"end_header\n" + text(POINTS[:5])), "5 rows of points", 13),
        ("a.ply", ply("ascii", b"end_header\n1 2 3\n1 2 x\n", points=2), "'x' is not a number", 10),
        ("a.ply", ply("binary_little_endian", b"end_header\n1"), "truncated: 1 bytes", None),
        (
            "a.ply",
            ply("ascii", b"property list int int other\nend_header\n"),
            "vertices with lists in them",
            None,
        ),
        (
            "a.ply",
            b"ply\nformat ascii 1.0\nelement face 0\nproperty int a\nend_header\n",
            "no element vertex",
            None,
        ),
        ("a.npy", b"", "damaged or no npy file", None),
        ("a.npy", b"\x93NUMPY\x01\x00", "damaged or no npy file", None),
    ],
)  # fmt: skip
def test_mistakes_name_the_file_the_line_and_the_matter(tmp_path, name, content, said, line):
    file = written(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        read_cloud(file)
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(file) if line is None else f"{file}:{line}: ")
    assert (caught.value.file, caught.value.line) == (str(file), line)


def test_other_mistakes_of_arrays(tmp_path):
    file = tmp_path / "a.npy"
    for array, said in [
        (POINTS[:, :2], r"float32 of the shape \(37, 2\)"),
        (POINTS[0], r"float32 of the shape \(3,\)"),
        (POINTS.astype(str), "expected numbers"),
        (POINTS[:0], "no points in it"),
        (np.where(POINTS > 1, np.inf, POINTS), "not finite"),
    ]:
        np.save(file, array)
        with pytest.raises(DataError, match=said):
            read_cloud(file)
    for value in (np.array([{}], object), {"points": POINTS}, np.array([POINTS, None], object)):
        np.save(file, value, allow_pickle=True)
        with pytest.raises(DataError, match=r"a\.npy: holds objects of Python, such as a dict "):
            read_cloud(file)
    whole = tmp_path / "whole.npy"
    np.save(whole, POINTS)
    file.write_bytes(whole.read_bytes()[:200])
    with pytest.raises(DataError, match="damaged or no npy file"):
        read_cloud(file)
    with open(file, "wb") as archive:
        np.savez(archive, a=POINTS)
    with pytest.raises(DataError, match="an npz archive"):
        read_cloud(file)
    with pytest.raises(DataError, match=r"absent\.pcd: no such file"):
        read_cloud(tmp_path / "absent.pcd")
    with pytest.raises(DataError, match=r"folder\.pcd: a folder"):
        read_cloud((tmp_path / "folder.pcd").mkdir() or tmp_path / "folder.pcd")


def test_sensors_marks_can_be_dropped(tmp_path):
    points = POINTS.copy()
    points[[0, 5, 36], 1] = np.nan
    file = written(tmp_path, "a.pcd", pcd("binary", points.tobytes()))
    with pytest.raises(DataError, match="3 of 37 points are not finite, the first is point 0"):
        read_cloud(file)
    kept = read_cloud(file, drop_invalid=True)
    np.testing.assert_array_equal(kept, np.delete(POINTS, [0, 5, 36], axis=0))
    nothing = written(tmp_path, "b.pcd", pcd("binary", np.full_like(POINTS, np.nan).tobytes()))
    for keep in (True, False):
        with pytest.raises(DataError, match="none of its 37 points is finite"):
            read_cloud(nothing, drop_invalid=not keep)


@pytest.mark.parametrize("rows", [3, 6, 12, 20])
def test_arrays_that_lie_on_their_side_are_refused(tmp_path, rows):
    """(3, 128) was three points of 128 columns."""
    file, array = tmp_path / "c.npy", np.zeros((rows, 128), np.float32)
    for order in (np.ascontiguousarray, np.asfortranarray):
        np.save(file, order(array))
        with pytest.raises(DataError) as caught:
            read_cloud(file)
        assert f"c.npy: an array of the shape ({rows}, 128), expected a row" in str(caught.value)
        assert str(caught.value).endswith("Transpose it: save array.T.")
    np.save(file, array.T)
    assert read_cloud(file).shape == (128, 3)


def test_flat_arrays_are_refused(tmp_path):
    np.save(tmp_path / "c.npy", np.zeros((1, 6144)))
    with pytest.raises(DataError, match=r"\(1, 6144\), .*Save array\.reshape\(-1, 3\)\.$"):
        read_cloud(tmp_path / "c.npy")


@pytest.mark.parametrize(
    "shape",
    [(1, 3), (1, 6), (2, 10), (3, 3), (3, 10), (4, 6), (10, 3), (12, 40), (100, 259), (2048, 515)],
)  # fmt: skip
def test_small_clouds_and_ones_with_features_are_read(tmp_path, shape):
    np.save(tmp_path / "c.npy", np.ones(shape))
    assert read_cloud(tmp_path / "c.npy").shape == (shape[0], 3)


HUGE = POINTS.astype(np.float64) * 1e300


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.npy", None),
        ("a.pcd", pcd("binary", HUGE.tobytes(), size="8 8 8")),
        ("a.pcd", pcd("ascii", text(HUGE))),
        ("a.pcd", pcd("binary_compressed", packed(HUGE.T), size="8 8 8")),
        ("a.ply", ply("binary_big_endian", b"end_header\n" + HUGE.astype(">f8").tobytes(),
                      vertex="".join(f"property double {axis}\n" for axis in "xyz"))),
    ],
)  # fmt: skip
def test_numbers_too_large_for_float32_are_told_as_such(tmp_path, name, content):
    """They were told as points that are not finite, and left out where those are."""
    if content is None:
        np.save(tmp_path / name, HUGE)
    else:
        written(tmp_path, name, content)
    for drop in (True, False):
        with pytest.raises(DataError, match=r"a coordinate of .*e\+300, expected at most 1e\+18"):
            read_cloud(tmp_path / name, drop_invalid=drop)


def test_whole_numbers_of_any_width(tmp_path):
    for dtype in ("i1", "u1", "i2", "i8", "u8"):
        low = np.iinfo(dtype).min if dtype == "i1" else 0  # which has no positive counterpart
        np.save(tmp_path / "a.npy", np.array([[low, 1, 2], [3, 4, 5]], dtype))
        assert read_cloud(tmp_path / "a.npy").tolist() == [[low, 1, 2], [3, 4, 5]]
    np.save(tmp_path / "a.npy", np.array([[-(2**63), 1, 2]]))
    with pytest.raises(DataError, match=r"a coordinate of 9\.22e\+18"):
        read_cloud(tmp_path / "a.npy")


def test_invalid_points_are_counted(tmp_path):
    points = POINTS.astype(np.float64)
    points[[1, 7], 2] = np.nan, np.inf
    np.save(tmp_path / "a.npy", points)
    kept, invalid = read_valid(tmp_path / "a.npy")
    assert invalid == 2 and len(kept) == 35 and kept.dtype == np.float32
    assert read_valid(written(tmp_path, "b.pcd", pcd("binary", POINTS.tobytes())))[1] == 0
