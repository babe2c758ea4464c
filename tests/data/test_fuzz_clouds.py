"""Point cloud files as they come: damaged and contrived ones are read right, or refused by an error
that names the file, in bounded memory and time."""

from __future__ import annotations

import io
import os
import struct
import time
import warnings

import numpy as np
import pytest
from damaged_files import cases, damaged, memory_below
from test_clouds_files import packed, pcd, ply, text, wide, written

from jaxaccum.data import DataError, read_cloud

POINTS = np.random.default_rng(1).standard_normal((12, 3)).astype(np.float32)
FACES = (
    b"ply\nformat ascii 1.0\nelement face 3\nproperty list uchar int i\nelement vertex 12\n"
    b"property float x\nproperty float y\nproperty float z\nend_header\n0\n0\n0\n"
)


def npy(array, **keywords):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **keywords)
    return buffer.getvalue()


def header(text, body=b"", version=1):
    """An npy file with that text as its header."""
    data = text.encode("latin-1") + b"\n"
    size = struct.pack("<H", len(data)) if version == 1 else struct.pack("<I", len(data))
    return b"\x93NUMPY" + bytes([version, 0]) + size + data + body


HEALTHY = {
    "ascii.pcd": pcd("ascii", text(POINTS), points=12),
    "binary.pcd": pcd("binary", POINTS.tobytes(), points=12),
    "compressed.pcd": pcd("binary_compressed", packed(POINTS.T), points=12),
    "ascii.ply": FACES + text(POINTS),
    "little.ply": ply("binary_little_endian", b"end_header\n" + POINTS.tobytes(), points=12),
    "big.ply": ply("binary_big_endian", b"end_header\n" + POINTS.astype(">f4").tobytes(),
                   points=12),
    "f4.npy": npy(POINTS),
    "f8.npy": npy(np.asfortranarray(POINTS, np.float64)),
    "f4v2.npy": npy(POINTS, version=(2, 0)),
    "f4v3.npy": npy(POINTS, version=(3, 0)),
}  # fmt: skip


def outcome(file):
    """Its points, or the error of ours; any other goes on."""
    try:
        return read_cloud(file), None
    except DataError as error:
        return np.zeros((0, 3)), error


@pytest.mark.parametrize("name", HEALTHY)
def test_damaged_clouds_are_read_or_refused(tmp_path, name):
    rng = np.random.default_rng(len(name))
    others = [data for other, data in HEALTHY.items() if other[-4:] == name[-4:]]
    np.testing.assert_array_equal(read_cloud(written(tmp_path, name, HEALTHY[name])), POINTS)
    refused = 0
    with memory_below(30), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for number in range(cases(150)):
            content = damaged(HEALTHY[name], rng, others[number % len(others)])
            file = written(tmp_path, name, content)
            start = time.process_time()
            points, error = outcome(file)
            if error is not None:
                refused += 1
                assert str(error).startswith(str(file)) and error.file == str(file)
                assert len(str(error)) < 1000, content
            else:
                assert points.dtype == np.float32 and points.shape[1:] == (3,)
                assert 1 <= len(points) <= len(content) and np.isfinite(points).all()
            assert time.process_time() - start < 5, content
    assert refused > cases(150) // 10


def wide_pcd(count):
    return pcd("binary", POINTS.tobytes(), points=12, fields="x y z a", size="4 4 4 8",
               types="F F F F", count=f"1 1 1 {count}")  # fmt: skip


def numbered(kind, count):
    return HEALTHY[kind].replace(b" 12\n", f" {count}\n".encode())


DICT = "{'descr': %s, 'fortran_order': False, 'shape': %s, }"
BODY = POINTS.tobytes()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        # Arrays: what the old code left to numpy, and numpy to Python's own parser.
        ("a.npy", header(DICT % ("'<f4'", "(2999999999997, 3)"), BODY), "2999999999997 rows of 3"),
        ("a.npy", header(DICT % ("'<f4'", "(2**40, 3)"), BODY), "damaged or no npy file"),
        ("a.npy", header(DICT % ("'<f4'", "(12, 3"), BODY), "damaged or no npy file"),
        ("a.npy", header(DICT % ("',f8'", "(12, 3)"), BODY), "damaged or no npy file"),
        ("a.npy", header(DICT % ("'<f4'", "(True, 3)"), BODY), "a shape that cannot be"),
        ("a.npy", header(DICT % ("'<f4'", "(-1, 3)"), BODY), "a shape that cannot be"),
        ("a.npy", header(DICT % ("'<f4'", f"(0x{'f' * 5000}, 3)"), BODY), "shape that cannot be"),
        ("a.npy", header(DICT % ("'<f4'", f"({'9' * 5000}, 3)"), BODY), "damaged or no npy"),
        ("a.npy", header(DICT % ("'<f4'", "('x', 3)"), BODY), "damaged or no npy file"),
        ("a.npy", header(DICT % ("'<f4'", "(0, 9223372036854775807)"), BODY), "no points in it"),
        ("a.npy", header(DICT % ("'<f4'", "(9223372036854775807,) * 9"), BODY), "no npy file"),
        ("a.npy", header(DICT % ("'|V2147483648'", "(12, 3)"), BODY), "damaged or no npy file"),
        ("a.npy", header(DICT % ("'|S4'", "(12, 3)"), BODY), "expected numbers of"),
        ("a.npy", header(DICT % ("'<c8'", "(6, 3)"), BODY), "expected numbers of"),
        ("a.npy", header("(" * 3000, BODY), "damaged or no npy file"),
        ("a.npy", header("-" * 9000 + "1", BODY), "damaged or no npy file"),
        ("a.npy", header("{[]: 1}", BODY), "damaged or no npy file"),
        ("a.npy", header("'" + "\x00", BODY), "damaged or no npy file"),
        ("a.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}", "damaged or no npy file"),
        ("a.npy", b"\x93NUMPY\x09\x00\x10\x00{}", "damaged or no npy file"),
        ("a.npy", b"PK\x03\x04 cut short", "an npz archive"),
        ("a.npy", b"\x80\x04cos\nsystem\n.", "damaged or no npy file"),
        ("a.npy", npy(POINTS.astype(np.float64) * 1e300), "a coordinate of .*e.30., exp"),
        ("a.npy", npy(POINTS * np.float32(1e30)), r"expected at most 1e\+18"),
        # PCD: widths and counts that overflow what numpy counts with, and numbers that are none.
        ("a.pcd", wide_pcd(2147483648), "truncated: 144 bytes"),
        ("a.pcd", wide_pcd(1).replace(b"COUNT 1 1 1", b"COUNT 1 1 2"), "its field z has 2 values"),
        ("a.pcd", wide_pcd(268435455), "truncated: 144 bytes"),
        ("a.pcd", wide_pcd(10**17), "truncated: 144 bytes"),
        ("a.pcd", wide_pcd("9" * 5000), "header that makes no sense"),
        ("a.pcd", wide_pcd(-1), "header that makes no sense"),
        ("a.pcd", numbered("binary.pcd", 10**15), "truncated: 144 bytes"),
        ("a.pcd", numbered("binary.pcd", "9" * 5000), "header that makes no sense"),
        ("a.pcd", numbered("binary.pcd", "1_2"), "'1_2' is not a whole number"),
        ("a.pcd", numbered("binary.pcd", "\u0661\u0662"), "is not a whole number"),
        ("a.pcd", numbered("ascii.pcd", 10**15), "12 rows of points, but the header says 1000"),
        ("a.pcd", HEALTHY["ascii.pcd"].replace(b"POINTS 12", b"POINTS 13"), "contradicts"),
        ("a.pcd", HEALTHY["binary.pcd"].replace(b"HEIGHT 1", b"HEIGHT 9"), "contradicts itself"),
        ("a.pcd", HEALTHY["binary.pcd"].replace(b"SIZE 4", b"SIZE 3"), "makes no sense"),
        ("a.pcd", HEALTHY["binary.pcd"].replace(b"4\nTYPE F", b"16\nTYPE I"),
         "makes no sense"),
        ("a.pcd", pcd("ascii", text(POINTS[:11]) + b"1_0 2 3\n", points=12), "'1_0' is not a num"),
        ("a.pcd", pcd("ascii", text(POINTS[:11]) + b"1 " + b"2" * 10**6 + b"x 3\n", points=12),
         "is not a number"),
        ("a.pcd", pcd("ascii", text(POINTS[:11]) + b"0x1p3 2 3\n", points=12), "is not a number"),
        ("a.pcd", pcd("ascii", text(POINTS[:11]) + "\uff11 2 3\n".encode(), points=12),
         "is not a number"),
        ("a.pcd", pcd("ascii", b"1 2 3\r4 5 6\r", points=2), "6 columns, expected 3"),
        ("a.pcd", pcd("binary_compressed", struct.pack("<II", 100, 2**32 - 4) + bytes(100),
                      points=(2**32 - 4) // 12), "one byte can unpack to 88"),
        ("a.pcd", pcd("binary_compressed", struct.pack("<II", 10, 144) + bytes(10), points=12),
         "damaged or truncated"),
        ("a.pcd", pcd("binary", (POINTS.astype(np.float64) * 1e300).tobytes(), points=12,
                      size="8 8 8"), r"a coordinate of .*e\+30., expected at most 1e\+18"),
        # PLY: counts without end.
        ("a.ply", numbered("little.ply", "9" * 5000), "a ply header with the line 'element vertex"),
        ("a.ply", numbered("little.ply", "\u0661\u0662"), "a ply header with the line"),
        ("a.ply", numbered("little.ply", "-1"), "a ply header with the line"),
        ("a.ply", numbered("little.ply", 10**17), "truncated: 144 bytes"),
        ("a.ply", numbered("ascii.ply", 10**17), "12 rows of points, but the header says"),
        ("a.ply", HEALTHY["ascii.ply"].replace(b"face 3", b"face 1000000000000"),
         r"a\.ply:24: 15 rows of face, but the header says 1000000000000"),
        ("a.ply", HEALTHY["little.ply"].replace(
            b"element", b"element other 999999999999\nproperty double a\nelement", 1),
         "truncated: 0 bytes"),
        ("a.ply", b"ply\r\nformat ascii 1.0\r\n" + b"x" * 10**6 + b"\r\n", "a ply header with"),
    ],
)  # fmt: skip
def test_contrived_clouds_are_refused(tmp_path, name, content, said):
    file = written(tmp_path, name, content)
    start = time.process_time()
    with memory_below(60), pytest.raises(DataError, match=said) as caught:
        read_cloud(file)
    assert time.process_time() - start < 5
    assert len(str(caught.value)) < 1000
    assert caught.value.file == str(file)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.pcd", HEALTHY["ascii.pcd"].replace(b"\n", b"\r\n")),
        ("a.ply", HEALTHY["ascii.ply"].replace(b"\n", b"\r\n")),
        ("a.ply", HEALTHY["ascii.ply"] + b"# more, of which nothing is known\n"),
        ("a.pcd", HEALTHY["binary.pcd"] + bytes(100)),
        ("a.npy", HEALTHY["f4.npy"] + bytes(100)),
        ("a.npy", npy(np.pad(POINTS, ((0, 0), (0, 4))))),
        ("a.npy", npy(POINTS.astype(">f8"))),
    ],
)
def test_odd_clouds_are_read(tmp_path, name, content):
    np.testing.assert_array_equal(read_cloud(written(tmp_path, name, content)), POINTS)


def test_unused_columns_may_be_wide(tmp_path):
    rows = np.zeros(12, [("x", "<f4", 3), ("a", "<f8", 200)])
    rows["x"] = POINTS
    content = pcd("binary", rows.tobytes(), points=12, fields="x y z a", size="4 4 4 8",
                  types="F F F F", count="1 1 1 200")  # fmt: skip
    np.testing.assert_array_equal(read_cloud(written(tmp_path, "a.pcd", content)), POINTS)
    compressed = pcd(
        "binary_compressed", packed([wide(POINTS)[n] for n in "nx_yzc"]), points=12,
        fields="normal x _ y z colour", size="4 4 1 8 4 2", types="F F U F F U",
        count="2 1 3 1 1 1",
    )  # fmt: skip
    np.testing.assert_array_equal(read_cloud(written(tmp_path, "b.pcd", compressed)), POINTS)


def test_what_is_no_file_and_names_that_are_no_text(tmp_path):
    os.mkfifo(tmp_path / "pipe.pcd")
    with pytest.raises(DataError, match=r"pipe\.pcd: a pipe or a device, expected a file"):
        read_cloud(tmp_path / "pipe.pcd")
    (tmp_path / "link.npy").symlink_to("nowhere.npy")
    with pytest.raises(DataError, match=r"a link to nowhere\.npy, where there is nothing"):
        read_cloud(tmp_path / "link.npy")
    with pytest.raises(DataError, match="no path"):
        read_cloud(tmp_path / "a\0.npy")
    name = os.path.join(os.fsencode(tmp_path), b"a\xff.npy").decode("utf-8", "surrogateescape")
    with open(name, "wb") as file:
        file.write(HEALTHY["f4.npy"])
    np.testing.assert_array_equal(read_cloud(name), POINTS)
    with open(name, "wb") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"a\\xff\.npy: damaged") as caught:
        read_cloud(name)
    str(caught.value).encode()


def test_the_cases_of_clouds(shared):
    """What each of them was: a hang of over 20 s, a claim of TiB, and tracebacks."""
    folder = shared / "cases" / "fuzz" / "f_clouds"
    if not folder.is_dir():
        pytest.skip("these cases are not here")
    files = [f for f in sorted(folder.glob("*/*")) if f.suffix in (".npy", ".ply", ".pcd")]
    assert len(files) > 5
    for file in files:
        start = time.monotonic()
        points, error = outcome(file)
        assert np.isfinite(points).all(), file
        assert error is None or str(error).startswith(str(file)), error
        assert time.monotonic() - start < 5, file
