"""Images of every format come out upright and whole, or with the reason why not."""

import io
import os
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from jaxaccum.data import DataError, open_source, read_image
from jaxaccum.data.images import MOST_PIXELS, Unreadable, decode, decode_upright, read_header

# How a viewer turns what is stored, by EXIF orientation.
TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.swapaxes(a[::-1, ::-1], 0, 1),
    8: lambda a: np.rot90(a, 1),
}


def picture(height=40, width=60):
    """Smooth, and no turn or mirror of itself."""
    out = np.zeros((height, width, 3), np.uint8)
    out[..., 0] = np.linspace(0, 240, width)
    out[..., 1] = np.linspace(0, 240, height)[:, None]
    out[: height // 4, : width // 4, 2] = 200
    return out


def tiff(pixels, orientation, order, big):
    """An uncompressed TIFF of one strip, little- or big-endian, classic or BigTIFF."""
    height, width = pixels.shape[:2]
    data = np.ascontiguousarray(pixels).tobytes()
    start = 16 if big else 8
    tags = [
        (256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 2), (273, 4, start),
        (274, 3, orientation), (277, 3, 3), (278, 4, height), (279, 4, len(data)), (284, 3, 1),
    ]  # fmt: skip
    place = "Q" if big else "I"
    mark = b"II" if order == "<" else b"MM"
    head = mark + (
        struct.pack(order + "HHHQ", 43, 8, 0, start + len(data))
        if big
        else struct.pack(order + "HI", 42, start + len(data))
    )
    body = struct.pack(order + ("Q" if big else "H"), len(tags))
    for tag, kind, value in tags:
        packed = struct.pack(order + {3: "H", 4: "I"}[kind], value)
        body += struct.pack(f"{order}HH{place}", tag, kind, 1) + packed.ljust(
            8 if big else 4, b"\0"
        )
    return head + data + body + b"\0" * (8 if big else 4)


def saved(file, image, orientation, **options):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    image.save(file, exif=exif, **options)


def by_pillow(mode="RGB", **options):
    return lambda f, a, o: saved(f, PIL.Image.fromarray(a).convert(mode), o, **options)


WRITERS = {
    "jpeg": ("jpg", by_pillow(quality=100, subsampling=0)),
    "png": ("png", by_pillow()),
    "webp": ("webp", by_pillow(lossless=True)),
    "tiff": ("tif", by_pillow()),
    "tiff-lzw": ("tif", by_pillow(compression="tiff_lzw")),
    "tiff-zip": ("tif", by_pillow(compression="tiff_adobe_deflate")),
    "tiff-rgba": ("tif", by_pillow("RGBA")),
    "tiff-big-endian": ("tif", lambda f, a, o: f.write_bytes(tiff(a, o, ">", False))),
    "bigtiff": ("tiff", lambda f, a, o: f.write_bytes(tiff(a, o, "<", True))),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_comes_out_upright(tmp_path, kind, orientation):
    suffix, write = WRITERS[kind]
    stored = picture()
    file = tmp_path / f"a.{suffix}"
    write(file, stored, orientation)
    expected = TURNED[orientation](stored).astype(int)
    out = read_image(file)
    assert read_header(file).size == expected.shape[:2] == out.shape[:2]
    assert np.abs(out.astype(int) - expected).max() <= (4 if kind == "jpeg" else 0)


@pytest.mark.parametrize("mode", ["L", "P", "1", "I;16"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
def test_every_mode_of_tiff_comes_out_upright(tmp_path, mode, orientation):
    black_and_white = np.where(picture() > 120, 255, 0).astype(np.uint8)[..., :1].repeat(3, 2)
    black_and_white[:10, :15] = 255
    if mode == "I;16":
        image = PIL.Image.fromarray(black_and_white[..., 0].astype(np.uint16) * 257)
    else:
        image = PIL.Image.fromarray(black_and_white).convert(mode)
    saved(tmp_path / "a.tif", image, orientation)
    np.testing.assert_array_equal(
        read_image(tmp_path / "a.tif"), TURNED[orientation](black_and_white)
    )


def test_boxes_of_turned_tiffs_lie_on_their_objects(shared):
    path = shared / "cases" / "04_tiff_orientation" / "data.yaml"
    for split in ("train", "val"):
        source = open_source(str(path), split)
        for i in range(len(source)):
            red, green, _ = np.moveaxis(source.image(i).astype(int), -1, 0)
            rows, columns = np.nonzero((red > 180) & (green < 80))
            extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(source.objects(i).boxes, [extent], atol=1.01)


def yolo(root, *files):
    """A data set of these image files, all of them labelled alike."""
    for file in files:
        label = root / "labels" / "train" / f"{file.stem}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("0 0.5 0.5 0.5 0.5\n")
    (root / "data.yaml").write_text("train: images/train\nval: images/train\nnames: [cat]\n")
    return str(root / "data.yaml")


def exif_jpeg(kind, value):
    """A JPEG whose EXIF has an orientation of a TIFF type and these four bytes."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(picture()).save(buffer, "JPEG")
    entry = struct.pack("<HHI", 0x0112, kind, 1) + value
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + struct.pack("<I", 0) + bytes(8)
    plain = buffer.getvalue()
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]


@pytest.mark.parametrize(
    ("kind", "value", "orientation", "noted"),
    [
        (11, struct.pack("<f", np.inf), 1, True),
        (11, struct.pack("<f", np.nan), 1, True),
        (11, struct.pack("<f", 6.0), 6, False),
        (5, struct.pack("<I", 26), 1, True),  # a fraction: 0 / 0
        (2, b"6\0\0\0", 1, True),  # text
        (3, struct.pack("<HH", 9, 0), 1, True),
        (3, struct.pack("<HH", 0, 0), 1, False),  # cameras write it for "unknown"
        (4, struct.pack("<I", 6), 6, False),
        (8, struct.pack("<hH", -6, 0), 1, True),
        (99, b"\xff" * 4, 1, False),  # no such type: there is no orientation
    ],
)
def test_an_orientation_that_is_none_is_upright_and_counted(
    tmp_path, capsys, kind, value, orientation, noted
):
    file = tmp_path / "images" / "train" / "a.jpg"
    file.parent.mkdir(parents=True)
    file.write_bytes(exif_jpeg(kind, value))
    assert read_header(file).orientation == orientation
    source = open_source(yolo(tmp_path, file), "train")
    assert source.image(0).shape == ((60, 40, 3) if orientation == 6 else (40, 60, 3))
    (*reasons,) = source.report.skipped
    assert [("taken as upright" in reason) for reason in reasons] == [True] * noted
    read_image(file)
    assert capsys.readouterr().err == "".join(f"note: {file}: {reason}\n" for reason in reasons)


# --- memory ---


def png(width, height, *chunks, depth=8, colour=0):
    """A PNG of these chunks (kind, content) behind a header with the right checksum."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        body = kind + content
        out += struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))
    return out


def grey_png(width, height):
    rows = zlib.compress(b"\0" * (height * (width + 1)), 1)
    return png(width, height, (b"IDAT", rows))


@pytest.mark.parametrize(
    ("width", "height", "said"),
    [
        (20_000, 20_000, "400,000,000 pixels"),
        (12_000, 12_000, "12,000 x 12,000"),
        (1 << 30, 1 << 30, "1,152,921,504,606,846,976 pixels"),
        (MOST_PIXELS // 16 + 1, 16, f"{MOST_PIXELS // 16 + 1:,} x 16"),
    ],
)
def test_images_too_large_to_decode_are_refused_by_their_header(tmp_path, width, height, said):
    file = tmp_path / "images" / "train" / "a.png"
    file.parent.mkdir(parents=True)
    file.write_bytes(png(width, height, (b"IDAT", zlib.compress(b"\0"))))
    with pytest.raises(Unreadable) as caught:
        read_header(file)
    assert said in str(caught.value) and f"{MOST_PIXELS:,}" in str(caught.value)
    assert "scale it down" in str(caught.value)
    with pytest.raises(DataError, match=r"a\.png: image of .* pixels, more than"):
        read_image(file)
    other = file.with_name("b.png")
    other.write_bytes(grey_png(20, 20))
    source = open_source(yolo(tmp_path, file, other), "train")
    assert [source.name(0), len(source)] == ["b.png", 1]
    assert list(source.report.skipped) == [str(caught.value)]


def test_a_file_too_long_to_be_an_image_is_refused(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.write(grey_png(20, 20))
        file.truncate(1 << 40)  # a hole: it takes no disk
    with pytest.raises(DataError, match="1,099,511,627,776 bytes, more than the 268,435,456"):
        read_image(tmp_path / "a.png")


def test_a_pipe_is_no_image_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: no image but a folder, a pipe or a device"):
        read_image(tmp_path / "a.png")


def test_a_name_that_is_no_text_can_be_printed(tmp_path):
    file = os.fsencode(tmp_path) + b"/\xff.png"
    with open(file, "wb") as opened:
        opened.write(grey_png(20, 20)[:-20])
    with pytest.raises(DataError, match=r"/\\xff\.png: the image's header is readable") as caught:
        read_image(os.fsdecode(file))
    str(caught.value).encode()


MEASURE = """
import sys
from jaxaccum.data import DataError, read_image

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if "VmPeak" in line)

read_image(sys.argv[1])
before = peak()
for file in sys.argv[2:]:
    try:
        print(read_image(file).shape, (peak() - before) // 1024)
    except DataError as error:
        print("DataError", (peak() - before) // 1024, error)
"""


def memory_of(folder, *files):
    """What becomes of files in a process of its own: a line each, with the MiB of memory taken so
    far."""
    small = folder / "small.png"
    small.write_bytes(grey_png(64, 48))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, [small, *files])],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


reads_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@reads_proc
def test_what_a_file_says_of_its_length_takes_no_memory(tmp_path):
    """Chunks that say that they are of 1 and 2 GiB, in files of some KiB."""
    files = []
    for byte in (0x40, 0x80):
        damaged = bytearray(grey_png(64, 48))
        damaged[33] = byte  # the length of the chunk behind the header
        files.append(tmp_path / f"{byte}.png")
        files[-1].write_bytes(damaged)
    for line in memory_of(tmp_path, *files):
        word, mebibytes, *_ = line.split()
        assert word == "DataError" and int(mebibytes) < 50, line
        assert "ends after the file does" in line


@pytest.mark.slow
@reads_proc
def test_the_largest_images_take_what_they_may(tmp_path):
    (tmp_path / "grey.png").write_bytes(grey_png(8192, 8192))
    plain, turned = PIL.Image.new("RGB", (8192, 8192)), PIL.Image.new("RGB", (7000, 7000))
    saved(tmp_path / "turned.jpg", plain, 6)
    saved(tmp_path / "turned.tif", plain, 6, compression="tiff_adobe_deflate")
    saved(tmp_path / "progressive.jpg", turned, 6, progressive=True, subsampling=0)
    saved(tmp_path / "a.webp", PIL.Image.new("RGB", (5700, 5700)), 6, lossless=True, method=0)
    lines = memory_of(tmp_path, *sorted(set(tmp_path.iterdir())))
    assert len(lines) == 5
    for line in lines:
        assert line.startswith("(") and int(line.split()[-1]) < 540, lines


@pytest.mark.parametrize("kind", [b"VP8X", b"VP8L", b"VP8 "])
def test_a_large_webp_is_refused_before_memory_is_taken_for_it(tmp_path, kind):
    body = {
        b"VP8X": bytes(4) + (16000 - 1).to_bytes(3, "little") * 2,
        b"VP8L": b"\x2f" + (15999 | 15999 << 14).to_bytes(4, "little") + bytes(5),
        b"VP8 ": b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 16000, 16000),
    }[kind]
    riff = b"WEBP" + kind + struct.pack("<I", len(body)) + body
    (tmp_path / "a.webp").write_bytes(b"RIFF" + struct.pack("<I", len(riff)) + riff)
    with pytest.raises(DataError, match="image of 16,000 x 16,000 pixels, more than the 33,554,4"):
        read_image(tmp_path / "a.webp")


def test_the_cases_of_images(shared):
    """What each of them was: 1 and 2 GiB taken, 1 GiB taken, turned twice, turned by a text, and a
    traceback."""
    folder = shared / "cases" / "fuzz" / "d_images"
    if not folder.is_dir():
        pytest.skip("these cases are not here")
    for case in ("00-memory", "01-memory"):
        with pytest.raises(DataError, match="ends after the file does"):
            read_image(folder / case / "i16.png")
    with pytest.raises(DataError, match="13,000 x 13,000 pixels, more than the 67,108,864"):
        read_image(folder / "02-memory" / "bomb13k_real.png")
    assert (
        read_image(folder / "04-silent_wrong" / "exif6.tif").shape[:2]
        == read_header(folder / "04-silent_wrong" / "exif6.tif").size
    )
    text = folder / "05-silent_wrong" / "exif_ascii.jpg"
    with PIL.Image.open(text) as image:
        assert read_image(text).shape[1::-1] == image.size
    infinite = folder / "06-traceback" / "exif_inf.jpg"
    assert read_header(infinite).orientation == 1
    with pytest.raises(DataError, match="truncated"):  # that, too
        read_image(infinite)


# --- damage ---


def test_an_image_of_32_bits_says_so(tmp_path):
    for mode in ("F", "I"):
        PIL.Image.new(mode, (30, 20)).save(tmp_path / f"{mode}.tif")
        with pytest.raises(DataError, match=r"its pixels have 32 bits\. Save it with 8 bits a"):
            read_image(tmp_path / f"{mode}.tif")


def encoded(kind, pixels):
    if kind == "bigtiff":
        return tiff(pixels, 1, "<", True)
    buffer = io.BytesIO()
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind.upper(), {})
    kind, _, compression = kind.partition("-")
    if compression:
        options = {"compression": compression}
    PIL.Image.fromarray(pixels).save(buffer, kind.upper(), **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "kind", ["jpeg", "png", "bmp", "webp", "tiff", "bigtiff", "tiff-tiff_lzw", "tiff-packbits"]
)
def test_no_cut_file_gives_other_pixels(kind):
    noise = np.random.default_rng(1).integers(0, 255, (30, 40, 3), np.uint8)
    whole = encoded(kind, noise)
    expected = decode(whole, "whole")
    refused = 0
    cuts = range(60, len(whole), max(len(whole) // 150, 1))
    for cut in cuts:
        try:
            header = read_header(io.BytesIO(whole[:cut]))
            out = decode(whole[:cut], "cut", header.orientation)
        except (DataError, Unreadable):
            refused += 1
        else:  # what is cut off says nothing of the pixels
            np.testing.assert_array_equal(out, expected, err_msg=f"{cut} of {len(whole)}")
    assert refused >= 0.9 * len(cuts)


def test_an_image_swapped_for_a_bomb_after_opening_is_refused(tmp_path):
    file = tmp_path / "images" / "train" / "a.png"
    file.parent.mkdir(parents=True)
    file.write_bytes(grey_png(20, 20))
    source = open_source(yolo(tmp_path, file), "train")
    file.write_bytes(png(20_000, 20_000, (b"IDAT", zlib.compress(b"\0"))))
    with pytest.raises(DataError, match="400,000,000 pixels"):
        source.image(0)


# --- orientation, wherever it is told ---


def chunk(kind, content):
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def exif_of(orientation, mark=b""):
    entry = struct.pack("<HHI", 0x0112, 3, 1) + struct.pack("<HH", orientation, 0)
    return mark + b"II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)


def raw_profile(orientation):
    content = exif_of(orientation, b"Exif\0\0")
    return f"\nexif\n{len(content):8}\n{content.hex()}\n".encode()


def xmp_of(orientation, as_element=False):
    told = f'tiff:Orientation="{orientation}"/>'
    if as_element:
        told = f"><tiff:Orientation>{orientation}</tiff:Orientation>"
    return f"<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:Description {told}</x:xmpmeta>".encode()


XMP, RAW = b"XML:com.adobe.xmp\0", b"Raw profile type exif\0"
TOLD = {
    "eXIf": lambda o: [(b"eXIf", exif_of(o))],
    "raw tEXt": lambda o: [(b"tEXt", RAW + raw_profile(o))],
    "raw zTXt": lambda o: [(b"zTXt", RAW + b"\0" + zlib.compress(raw_profile(o)))],
    "xmp iTXt": lambda o: [(b"iTXt", XMP + b"\0\0en\0\xc3\xa4\0" + xmp_of(o))],
    "xmp iTXt element": lambda o: [(b"iTXt", XMP + b"\0\0\0\0" + xmp_of(o, True))],
    "xmp iTXt packed": lambda o: [(b"iTXt", XMP + b"\1\0\0\0" + zlib.compress(xmp_of(o)))],
    "xmp tEXt": lambda o: [(b"tEXt", XMP + xmp_of(o))],
    "exif before xmp": lambda o: [
        (b"iTXt", XMP + b"\0\0\0\0" + xmp_of(9 - o)), (b"eXIf", exif_of(o)),
    ],
    "the last": lambda o: [(b"eXIf", exif_of(9 - o)), (b"eXIf", exif_of(o))],
    "eXIf before raw": lambda o: [(b"tEXt", RAW + raw_profile(9 - o)), (b"eXIf", exif_of(o))],
    "exif of nothing": lambda o: [
        (b"eXIf", b"II*\0\10\0\0\0\0\0" + bytes(4)), (b"iTXt", XMP + b"\0\0\0\0" + xmp_of(o)),
    ],
}  # fmt: skip


def turned_by_pillow(file):
    with PIL.Image.open(file) as image:
        return np.asarray(PIL.ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("how", TOLD)
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_a_png_is_upright_wherever_it_says_so(tmp_path, orientation, how, behind):
    """Before: only by an eXIf chunk before the pixels."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(picture()).save(buffer, "PNG")
    plain = buffer.getvalue()
    told = b"".join(chunk(*one) for one in TOLD[how](orientation))
    at = len(plain) - 12 if behind else 33  # before IEND, or behind IHDR
    file = tmp_path / "a.png"
    file.write_bytes(plain[:at] + told + plain[at:])
    expected = TURNED[orientation](picture())
    np.testing.assert_array_equal(turned_by_pillow(file), expected)
    assert read_header(file).orientation == orientation and not read_header(file).note
    np.testing.assert_array_equal(read_image(file), expected)
    assert read_header(io.BytesIO(file.read_bytes())).size == expected.shape[:2]


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
def test_xmp_turns_every_format(tmp_path, kind):
    file = tmp_path / f"a.{kind.lower()}"
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    if kind == "TIFF":
        options["tiffinfo"] = {700: xmp_of(6)}
    else:
        options["xmp"] = xmp_of(6)
    PIL.Image.fromarray(picture()).save(file, kind, **options)
    expected = turned_by_pillow(file).astype(int)
    assert expected.shape == (60, 40, 3)
    assert np.abs(read_image(file) - expected).max() <= 4


@pytest.mark.parametrize(
    ("chunks", "noted"),
    [
        ([(b"zTXt", RAW + b"\0" + zlib.compress(bytes(3 << 20)))], True),  # a bomb
        ([(b"iTXt", XMP + b"\1\0\0\0" + zlib.compress(b" " * (3 << 20)))], True),
        ([(b"tEXt", XMP + b" " * (5 << 20))], True),
        ([(b"zTXt", RAW + b"\0no zlib")], False), ([(b"zTXt", RAW)], False),
        ([(b"iTXt", XMP)], False), ([(b"iTXt", XMP + b"\1")], False), ([(b"tEXt", RAW)], False),
        ([(b"tEXt", RAW + b"\nexif\n 8\nno digits")], True), ([(b"eXIf", b"")], False),
        ([(b"eXIf", b"II*\0\xff\xff\xff\xff")], False), ([(b"tEXt", b"")], False),
        ([(b"iTXt", XMP + b"\0\0\0\0" + xmp_of(9))], True),
        ([(b"zTXt", RAW + b"\0" + zlib.compress(bytes(1 << 19)))] * 300, False),
        ([(b"abCd", b"")] * (1 << 18), True),
    ],
)  # fmt: skip
def test_what_a_png_tells_of_no_orientation(chunks, noted):
    """Behind its pixels, where Pillow reads nothing unless it decodes."""
    whole = grey_png(20, 20)[:-12] + b"".join(chunk(*one) for one in chunks)
    start = time.monotonic()
    header = read_header(io.BytesIO(whole + chunk(b"IEND", b"")))
    assert time.monotonic() - start < 5
    assert (header.orientation, "taken as upright" in header.note) == (1, noted)
    read_header(io.BytesIO(whole))  # its end is missing, which decoding says


# --- TIFFs ---


def banded_tiff(pixels, extra=(), compression=1, planar=1):
    """A TIFF of any number of bands, those beyond RGB of these kinds."""
    height, width, bands = pixels.shape
    data = np.ascontiguousarray(np.moveaxis(pixels, -1, 0) if planar == 2 else pixels).tobytes()
    bits = 8 * pixels.itemsize
    strips = bands if planar == 2 else 1
    size = len(data) // strips
    tags = [
        (256, 4, [width]), (257, 4, [height]), (258, 3, [bits] * bands), (259, 3, [compression]),
        (262, 3, [2]), (273, 4, [8 + i * size for i in range(strips)]), (277, 3, [bands]),
        (278, 4, [height]), (279, 4, [size] * strips), (284, 3, [planar]),
        *([(338, 3, list(extra))] if extra else []),
    ]  # fmt: skip
    start = 8 + len(data)
    body, more = struct.pack("<H", len(tags)), b""
    for tag, kind, values in tags:
        value = struct.pack(f"<{len(values)}{'HI'[kind - 3]}", *values)
        if len(value) > 4:
            more += value
            value = struct.pack("<I", start + 2 + 12 * len(tags) + 4 + len(more) - len(value))
        body += struct.pack("<HHI", tag, kind, len(values)) + value.ljust(4, b"\0")
    return struct.pack("<2sHI", b"II", 42, start) + data + body + bytes(4) + more


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize("extra", [(), (0,), (1,), (2,)])
def test_alpha_of_a_tiff_is_dropped(extra, planar, dtype):
    """Before: colours were multiplied by alpha where the file says that they are not yet (2)."""
    if planar == 2 and extra in ((0,), (1,)):
        pytest.skip("Pillow does not read it")
    alpha = np.tile(np.uint8([[0], [128], [255], [7]]), (10, 60))[..., None]
    pixels = np.concatenate([picture(), alpha], -1).astype(dtype) * (
        257 if dtype == np.uint16 else 1
    )
    whole = banded_tiff(pixels, extra, planar=planar)
    np.testing.assert_array_equal(decode_upright(whole, "a.tif"), picture())


def test_alpha_that_pillow_writes_is_dropped(tmp_path):
    image = PIL.Image.fromarray(picture()).convert("RGBA")
    image.putalpha(0)
    for name in ("a.tif", "a.png", "a.webp"):
        image.save(tmp_path / name, **({"lossless": True, "exact": True} if "webp" in name else {}))
        np.testing.assert_array_equal(read_image(tmp_path / name), picture())
    grey = image.convert("LA")
    grey.save(tmp_path / "grey.tif")
    np.testing.assert_array_equal(
        read_image(tmp_path / "grey.tif")[..., 0], np.asarray(grey)[..., 0]
    )


SIX = np.concatenate([picture(), picture()], -1)


@pytest.mark.parametrize(
    ("whole", "said"),
    [
        (banded_tiff(SIX[..., :5], (0, 0)), "5 bands"), (banded_tiff(SIX, (2, 0, 0)), "6 bands"),
        (banded_tiff(SIX[..., :5], (2, 0), planar=2), "5 bands, bands that are stored apart"),
        (banded_tiff(picture(), compression=50001), "compression WebP"),
        (banded_tiff(picture(), compression=34925), "compression LZMA"),
        (banded_tiff(picture(), compression=50000), "compression ZSTD"),
    ],
)  # fmt: skip
def test_a_tiff_that_is_not_read_is_not_called_damaged(whole, said):
    with pytest.raises(DataError) as caught:
        decode_upright(whole, "a.tif")
    assert f"a.tif: this kind of TIFF is not read ({said}). Save it as RGB" in str(caught.value)
    assert "whole copy" not in str(caught.value) and "labels" not in str(caught.value)


def test_a_tiff_that_pillow_does_not_know():
    for whole, said in (
        (banded_tiff(SIX, (0, 0, 0), planar=2), "6 bands, bands that are stored apart"),
        (banded_tiff(picture(), compression=50002), "compression JPEG XL"),
        (banded_tiff(picture(), compression=60123), "compression 60123"),
    ):
        with pytest.raises(Unreadable) as caught:
            read_header(io.BytesIO(whole))
        assert str(caught.value) == f"TIFF of a kind that is not read ({said})"
    with pytest.raises(Unreadable, match=r"^image unreadable$"):
        read_header(io.BytesIO(b"II*\0" + bytes(60)))


def test_opencv_says_nothing_of_its_own(tmp_path):
    files = []
    for compression in ("zstd", "lzma"):
        files.append(tmp_path / f"{compression}.tif")
        try:
            PIL.Image.fromarray(picture()).save(files[-1], compression=compression)
        except (OSError, ValueError):
            pytest.skip(f"this Pillow does not write {compression}")
    program = (
        "import sys\nfrom jaxaccum.data import DataError, read_image\n"
        "for file in sys.argv[1:]:\n"
        "    try:\n        read_image(file)\n    except DataError as error:\n        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, files)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    for line in done.stdout.splitlines():  # none, where OpenCV's library has them
        assert "this kind of TIFF is not read (compression " in line


def test_of_a_tag_that_is_there_twice_the_first_counts():
    """As to OpenCV's library: strips of the second would be checked, and those of the first be
    read."""
    whole = bytearray(banded_tiff(picture()))
    (start,) = struct.unpack_from("<I", whole, 4)
    entries = [whole[at : at + 12] for at in range(start + 2, start + 2 + 12 * 10, 12)]
    first = struct.pack("<HHII", 279, 4, 1, 1 << 31)
    for order, refused in (((first, entries[8]), True), ((entries[8], first), False)):
        body = b"".join([*entries[:8], *order, entries[9]])
        moved = bytes(whole[:start]) + struct.pack("<H", 11) + body + bytes(4) + bytes(whole[-6:])
        at = len(moved) - 6
        moved = moved.replace(bytes(entries[2]), struct.pack("<HHII", 258, 3, 3, at))
        if refused:
            with pytest.raises(DataError, match="pixels up to byte 2,147,483,656"):
                decode(moved, "a.tif")
        else:
            np.testing.assert_array_equal(decode(moved, "a.tif"), picture())
