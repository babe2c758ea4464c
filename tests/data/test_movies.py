"""Files of several pictures: all of them come out, or a line says that they do not."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import PIL.Image
import PIL.TiffImagePlugin
import pytest

from jaxaccum.data import DataError, movies
from jaxaccum.data.images import MOST_PIXELS
from jaxaccum.tasks import files

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
KINDS = {
    "gif": {}, "png": {}, "webp": {"lossless": True}, "tif": {},
    "tiff": {"compression": "tiff_adobe_deflate"},
}  # fmt: skip


def pictures(size=(30, 20)):
    """Of one colour each, with a white corner."""
    found = []
    for colour in COLOURS:
        image = PIL.Image.new("RGB", size, colour)
        image.paste((255, 255, 255), (0, 0, 5, 5))
        found.append(image)
    return found


def save(file, images=None, **options):
    first, *others = images or pictures()
    suffix = file.suffix[1:]
    first.save(file, save_all=True, append_images=others, **KINDS.get(suffix, {}), **options)
    return file


def read(file):
    return [(sample.facts.get("frame"), sample.value) for sample in files.read_pictures(file)]


@pytest.mark.parametrize("suffix", KINDS)
def test_all_pictures_of_a_file(tmp_path, suffix, capsys):
    """Before: of all but GIFs the first alone, without a word."""
    found = read(save(tmp_path / f"a.{suffix}"))
    assert [number for number, _ in found] == [1, 2, 3]
    for (_, pixels), image in zip(found, pictures(), strict=True):
        np.testing.assert_array_equal(pixels, np.asarray(image))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", ["bmp", "gif", "jpg", "png", "tif", "webp"])
def test_one_picture_is_no_frame(tmp_path, suffix, capsys):
    pictures()[0].save(tmp_path / f"a.{suffix}")
    assert [number for number, _ in read(tmp_path / f"a.{suffix}")] == [
        1 if suffix == "gif" else None
    ]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_every_frame_is_upright(tmp_path, suffix):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    found = read(save(tmp_path / f"a.{suffix}", exif=exif))
    for (_, pixels), image in zip(found, pictures(), strict=True):
        np.testing.assert_array_equal(pixels, np.rot90(np.asarray(image), -1))


def test_pages_of_all_sizes_depths_and_orders(tmp_path):
    grey = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    small = PIL.Image.new("RGB", (12, 16), (1, 2, 3))
    alpha = PIL.Image.new("RGBA", (30, 20), (9, 8, 7, 0))
    for big in (False, True):
        file = save(
            tmp_path / f"{big}.tif", [PIL.Image.fromarray(grey), small, alpha], big_tiff=big
        )
        (_, one), (_, two), (_, three) = read(file)
        np.testing.assert_array_equal(one[..., 0], grey >> 8)
        assert two.shape == (16, 12, 3) and (two == (1, 2, 3)).all()
        assert (three == (9, 8, 7)).all()


def chunk(kind, content):
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def test_grey_frames_of_16_bits(tmp_path):
    grey = np.linspace(0, 65535, 600).astype(">u2").reshape(20, 30)
    frames = (grey, grey[::-1].copy())
    rows = [zlib.compress(b"".join(b"\0" + row.tobytes() for row in frame)) for frame in frames]
    control = struct.pack(">IIIIHHBB", 30, 20, 0, 0, 1, 10, 0, 0)
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 30, 20, 16, 0, 0, 0, 0))
        + chunk(b"acTL", struct.pack(">II", 2, 0))
        + chunk(b"fcTL", struct.pack(">I", 0) + control)
        + chunk(b"IDAT", rows[0])
        + chunk(b"fcTL", struct.pack(">I", 1) + control)
        + chunk(b"fdAT", struct.pack(">I", 2) + rows[1])
        + chunk(b"IEND", b"")
    )
    for (_, pixels), image in zip(read(tmp_path / "a.png"), frames, strict=True):
        np.testing.assert_array_equal(pixels[..., 1], image >> 8)


def test_frames_lose_their_alpha(tmp_path):
    images = pictures()
    for image in images:
        image.putalpha(0)
    found = read(save(tmp_path / "a.png", images, blend=0))
    for (_, pixels), colour in zip(found, COLOURS, strict=True):
        assert (pixels[10, 10] == colour).all()


def test_the_others_of_a_photograph_are_said(tmp_path, capsys):
    file = tmp_path / "a.jpg"
    first, *others = pictures()
    first.save(file, "MPO", save_all=True, append_images=others)
    ((number, pixels),) = read(file)
    assert number is None and np.abs(pixels[10, 10] - np.array(COLOURS[0])).max() < 4
    assert capsys.readouterr().err == f"note: {file}: the first of the 3 pictures in it is used\n"
    assert not files.has_frames(file)


def test_smaller_copies_are_no_frames_and_are_said(tmp_path, capsys):
    file = tmp_path / "a.tif"
    pages = [*pictures(), pictures()[0].resize((15, 10))]
    tags = [{254: kind} for kind in (0, 0, 0, 1)]
    with PIL.TiffImagePlugin.AppendingTiffWriter(file, new=True) as writer:
        for page, tag in zip(pages, tags, strict=True):
            page.save(writer, "TIFF", tiffinfo=tag)
            writer.newFrame()
    assert [number for number, _ in read(file)] == [1, 2, 3]
    assert "left out 1 smaller copies or masks of its pages" in capsys.readouterr().err
    first = pages[0]
    with PIL.TiffImagePlugin.AppendingTiffWriter(file, new=True) as writer:
        for page, kind in ((first, 0), (first.resize((15, 10)), 1), (first.convert("1"), 4)):
            page.save(writer, "TIFF", tiffinfo={254: kind})
            writer.newFrame()
    assert [number for number, _ in read(file)] == [None]  # one picture, as it was
    assert "left out 2 smaller copies" in capsys.readouterr().err


def cut(file, part):
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * part)])
    return file


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_an_animation_that_is_cut_off_is_not_silent(tmp_path, suffix):
    for part in (0.4, 0.7, 0.95):
        noise = np.random.default_rng(0).integers(0, 255, (3, 20, 30, 3), np.uint8)
        file = save(tmp_path / f"a.{suffix}", [PIL.Image.fromarray(one) for one in noise])
        count = 0
        with pytest.raises(DataError, match=rf"a\.{suffix}"):
            for _ in files.read_pictures(cut(file, part)):
                count += 1
        assert count < 3


def test_fewer_frames_than_are_told(tmp_path):
    file = save(tmp_path / "a.png")
    data = file.read_bytes()
    at = data.index(b"acTL")
    data = data[: at - 4] + chunk(b"acTL", struct.pack(">II", 5, 0)) + data[at + 16 :]
    file.write_bytes(data)
    found = []
    with pytest.raises(DataError, match="only its first 3 frames"):
        for sample in files.read_pictures(file):
            found.append(sample)
    assert len(found) == 3


def test_a_page_that_is_not_read_ends_the_others_with_its_reason(tmp_path):
    file = save(tmp_path / "a.tif", [pictures()[0], PIL.Image.new("F", (30, 20))])
    found = []
    with pytest.raises(DataError, match=r"first 1 frames .*page 2: its pixels have 32 bits"):
        for sample in files.read_pictures(file):
            found.append(sample)
    assert len(found) == 1


def test_pages_in_a_ring_or_without_end(tmp_path):
    file = save(tmp_path / "a.tif", pictures())
    data = bytearray(file.read_bytes())
    places = [4]
    for _ in range(3):
        (at,) = struct.unpack_from("<I", data, places[-1])
        (count,) = struct.unpack_from("<H", data, at)
        places.append(at + 2 + 12 * count)
    ring = bytearray(data)
    struct.pack_into("<I", ring, places[3], struct.unpack_from("<I", data, 4)[0])
    file.write_bytes(ring)
    assert len(read(file)) == 3
    struct.pack_into("<I", data, places[3], len(data) + 9)
    file.write_bytes(data)
    found = []
    with pytest.raises(DataError, match="after 3 pages the way to the next is damaged"):
        for sample in files.read_pictures(file):
            found.append(sample)
    assert len(found) == 3
    # Pages of no entries, each of which names the next.
    many = b"II*\0" + struct.pack("<I", 8)
    many += b"".join(struct.pack("<HI", 0, 8 + 6 * (i + 1)) for i in range(1 << 18))
    file.write_bytes(many)
    start = time.monotonic()
    with pytest.raises(DataError):
        read(file)
    assert time.monotonic() - start < 5


# --- Limits. ---


def gif(screen, frame):
    """A GIF of these sizes (width, height), whose one frame holds no pixels."""
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + bytes(6)
    return head + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\2\1\x2c\0;"


@pytest.mark.parametrize(
    ("screen", "frame"), [((12000, 12000), (12000, 12000)), ((20, 20), (12000, 12000))]
)
def test_a_large_gif_is_refused_as_large_images_are(tmp_path, screen, frame):
    """Before: up to 16384 x 16384, with 1.3 GiB and a warning of Pillow's."""
    (tmp_path / "a.gif").write_bytes(gif(screen, frame))
    program = (
        "import sys\nfrom pathlib import Path\nfrom jaxaccum.data import DataError, movies\n"
        "def peak():\n"
        "    return next(int(l.split()[1]) for l in open('/proc/self/status') if 'VmPeak' in l)\n"
        "import jaxaccum.data.images as images; images.pillow(); images.pillow().init()\n"
        "before = peak()\n"
        "try:\n    list(movies.frames(Path(sys.argv[1])))\n"
        "except DataError as error:\n    print(peak() - before, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.gif")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    kibibytes, said = done.stdout.split(" ", 1)
    assert "12,000 x 12,000 pixels, more than the 33,554,432 that are decoded" in said
    assert done.stderr == ""
    if sys.platform == "linux":
        assert int(kibibytes) < 50 << 10


def test_limits_of_other_files(tmp_path):
    assert MOST_PIXELS == 67_108_864
    large = PIL.Image.new("1", (5000, 7000))
    for name, options in (("a.png", {"save_all": True, "append_images": [large]}), ("b.png", {})):
        large.save(tmp_path / name, **options)
    with pytest.raises(DataError, match="5,000 x 7,000 pixels, more than the 33,554,432"):
        read(tmp_path / "a.png")  # Pillow keeps two of its frames
    assert read(tmp_path / "b.png")[0][1].shape == (7000, 5000, 3)
    buffer = io.BytesIO()
    PIL.Image.new("1", (9500, 9500)).save(buffer, "TIFF", compression="group4")
    (tmp_path / "c.tif").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="9,500 x 9,500 pixels, more than the 67,108,864"):
        read(tmp_path / "c.tif")
    save(tmp_path / "d.tif", [pictures()[0], PIL.Image.new("1", (9500, 9500))])
    with pytest.raises(DataError, match=r"first 1 frames .*9,500 x 9,500 pixels, more than the 67"):
        read(tmp_path / "d.tif")


def test_a_large_video_is_refused(tmp_path, monkeypatch):
    import cv2

    writer = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 5, (64, 48))
    writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()
    monkeypatch.setattr(movies, "MOST_PIXELS", 3000)
    with pytest.raises(DataError, match="frames of 64 x 48 pixels, more than the 3,000"):
        list(movies.frames(tmp_path / "v.avi"))
