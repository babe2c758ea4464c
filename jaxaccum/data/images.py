"""Image files in, RGB pixels out: cheap checks by header, correct decoding, one source for both."""

from __future__ import annotations

import functools
import io
import os
import stat
import struct
import sys
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from jaxaccum.data import tiffs
from jaxaccum.data.base import DataError, Image, Objects, Report, identify
from jaxaccum.data.orientation import told as told_orientation
from jaxaccum.data.stamps import Stamp, Stamps
from jaxaccum.data.texts import shown_path

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
SMALLEST_SIDE = 10  # pixels; anything less is no picture to learn from
# Decoders take up to 6 bytes a pixel: 384 MiB. More than a detector is ever shown of an image.
MOST_PIXELS = 1 << 26
MOST_BYTES = 1 << 28  # of a file

# What is named so on the web; Pillow knows many more, some of which run other programs.
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "GIF", "PPM")
_PNG = b"\x89PNG\r\n\x1a\n"


# MemoryError is Pillow's for sizes that it does not believe.
_WHAT_DECODERS_RAISE = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, SyntaxError,
    TypeError, ValueError, struct.error, zlib.error,
)  # fmt: skip


class Unreadable(Exception):
    """An image that cannot be used; str() is the reason, worded for a report."""


class Damaged(Unreadable):
    """A file that is there and is no image, or no longer: `data.on_error` decides."""


@dataclass(frozen=True)
class Header:
    """What an image file says of itself.

    Attributes:
      size: (height, width) in pixels, upright.
      orientation: EXIF orientation, 1 to 8; 1 is upright.
      note: what is wrong with it though it can be used, worded for a report, or "".
      stamp: the file's size in bytes and time of modification in ns; zeros if it is no file.
    """

    size: tuple[int, int]
    orientation: int
    note: str = ""
    stamp: Stamp = (0, 0)


def read_header(file: str | Path | io.BytesIO) -> Header:
    """Reads size and orientation without decoding pixels.

    Raises:
      Unreadable: the file is missing, no image, under 10 pixels, or too large to be decoded.
    """
    stamp = (0, 0) if isinstance(file, io.BytesIO) else _stamp(file)
    library = pillow()
    try:
        _require_small_webp(file)
        with library.open(file, formats=FORMATS) as image:
            width, height = _stored_size(image)
            orientation, note = told_orientation(image)
            # The decoder of progressive JPEGs holds their coefficients, too.
            most = MOST_PIXELS * 3 // 4 if image.info.get("progressive") else MOST_PIXELS
    except Unreadable:
        raise
    except FileNotFoundError:
        raise Unreadable("image missing") from None
    except library.DecompressionBombError as error:
        pixels = next(
            (int(word) for word in str(error).split("(")[-1].split() if word.isdigit()), 0
        )
        raise Unreadable(_too_large(f"{pixels:,}", MOST_PIXELS)) from error
    except Exception as error:  # whatever Pillow's parsers fail with on bytes that are no image
        if isinstance(error, OSError) and error.strerror:
            raise Unreadable(f"image cannot be read ({error.strerror})") from error
        raise Damaged(_unusual_tiff(file) or "image unreadable") from error
    if min(height, width) < SMALLEST_SIDE:
        raise Unreadable(f"image under {SMALLEST_SIDE} pixels")
    if height * width > most:
        raise Unreadable(_too_large(f"{width:,} x {height:,}", most))
    size = (width, height) if orientation >= 5 else (height, width)
    return Header(size, orientation, note, stamp)


def _unusual_tiff(file: str | Path | io.BytesIO) -> str:
    """What to say of a TIFF that Pillow does not know; "" of any other file."""
    try:
        with io.BytesIO(file.getvalue()) if isinstance(file, io.BytesIO) else open(file, "rb") as f:
            mark = f.read(4)
            unusual = tiffs.not_read(mark + f.read()) if mark in tiffs.MARKS else ""
    except OSError:  # gone since
        return ""
    return unusual and f"TIFF of a kind that is not read ({unusual})"


def _too_large(pixels: str, most: int) -> str:
    return (
        f"image of {pixels} pixels, more than the {most:,} that are decoded: scale it down or cut "
        "it into tiles"
    )


def _require_small_webp(file: str | Path | io.BytesIO) -> None:
    """Refuses a large WebP, for which Pillow takes 8 bytes a pixel when it opens the file, and
    twice that to decode it."""
    if isinstance(file, io.BytesIO):
        head = file.getvalue()[:30]
    else:
        with open(file, "rb") as opened:
            head = opened.read(30)
    if len(head) < 30 or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return
    width = height = 0
    if head[12:16] == b"VP8X":  # with an alpha channel, EXIF, several frames
        width = int.from_bytes(head[24:27], "little") + 1
        height = int.from_bytes(head[27:30], "little") + 1
    elif head[12:16] == b"VP8L":  # without loss
        bits = int.from_bytes(head[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif head[12:16] == b"VP8 ":
        width, height = (n & 0x3FFF for n in struct.unpack_from("<HH", head, 26))
    if width * height > MOST_PIXELS // 2:
        raise Unreadable(_too_large(f"{width:,} x {height:,}", MOST_PIXELS // 2))


def _stamp(file: str | Path) -> tuple[int, int]:
    """Size and time of a regular file: Pillow would wait for ever for a pipe's first byte."""
    try:
        told = os.stat(file)
    except FileNotFoundError:
        raise Unreadable("image missing") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = getattr(error, "strerror", None) or str(error)
        raise Unreadable(f"image cannot be read ({why})") from error
    if not stat.S_ISREG(told.st_mode):
        raise Unreadable("no image but a folder, a pipe or a device")
    if told.st_size > MOST_BYTES:
        raise Unreadable(f"image of {told.st_size:,} bytes, more than the {MOST_BYTES:,} allowed")
    return told.st_size, told.st_mtime_ns


@functools.cache
def pillow() -> Any:
    """Pillow, imported when it is first needed, and quiet: we say ourselves what is wrong."""
    import PIL.Image

    warnings.filterwarnings("ignore", module=r"PIL\.")
    return PIL.Image


def _stored_size(image: Any) -> tuple[int, int]:
    """Width and height as stored. Pillow swaps a TIFF's by its orientation, in some versions."""
    if image.format == "TIFF":
        width, height = (image.tag_v2[tag] for tag in tiffs.SIZE)
        return int(width), int(height)
    width, height = image.size
    return width, height


def decode(data: bytes, name: str, orientation: int = 1, *, strict: bool = False) -> Image:
    """Decodes an image to (H, W, 3) uint8 RGB, upright.

    Greyscale is repeated over the channels, alpha is dropped, 16 bits become 8. How much memory
    that takes is for `read_header` to check.

    Args:
      data: the file's bytes.
      name: its name, for messages.
      orientation: EXIF orientation to undo.
      strict: for bytes that nobody has decoded before: also finds damage in the midst of them.

    Raises:
      DataError: the bytes are damaged or cut off, or of a kind that is not decoded.
    """
    try:
        whole = require_whole(data)
        if strict:
            _require_decodable(data)
    except tiffs.OtherKind as kind:
        raise DataError(f"{shown_path(name)}: {kind}, or leave it out.", file=name) from kind
    except _WHAT_DECODERS_RAISE as error:
        raise _undecodable(data, name, str(error)) from error
    pixels = None
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    _quieten_opencv()
    try:
        pixels = cv2.imdecode(np.frombuffer(whole, np.uint8), flags) if data else None
    except cv2.error as error:
        raise _undecodable(data, name, str(error.err or error)) from error
    if pixels is None:
        detail = f"no image could be decoded from its {len(data)} bytes"
        raise _undecodable(data, name, detail)
    return upright(np.asarray(pixels, np.uint8), orientation)


@functools.cache
def _quieten_opencv() -> None:
    """We say ourselves what is wrong, unless somebody asks OpenCV for its own lines."""
    if "OPENCV_LOG_LEVEL" not in os.environ:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def decode_upright(data: bytes, name: str) -> Image:
    """As `decode`, of bytes that nobody has looked at before.

    Raises:
      DataError: they are no image, too large, damaged or cut off.
    """
    try:
        header = read_header(io.BytesIO(data))
    except Unreadable as reason:
        raise DataError(f"{shown_path(name)}: {reason}", file=name) from reason
    return decode(data, name, header.orientation, strict=True)


def read_image(file: str | Path) -> Image:
    """An image file as (H, W, 3) uint8 RGB, upright. What is wrong with its header though it can
    be used is said on stderr.

    Raises:
      DataError: it is missing, no image, too large, or damaged.
    """
    name = shown_path(file)
    try:
        header = read_header(file)
        data = Path(file).read_bytes()
    except Unreadable as reason:
        raise DataError(f"{name}: {reason}", file=str(file)) from reason
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}).", file=str(file)) from error
    if header.note:
        print(f"note: {name}: {header.note}", file=sys.stderr)
    return decode(data, str(file), header.orientation, strict=True)


def _require_decodable(data: bytes) -> None:
    """Decodes with Pillow what OpenCV fills up with grey, or with what lay in memory before, where
    its library comes upon an error. PNGs have checksums instead, BMPs nothing to be damaged."""
    if data.startswith((_PNG, b"BM")):
        return
    with pillow().open(io.BytesIO(data), formats=FORMATS) as image:
        image.draft("L", (1, 1))  # of a JPEG, all of it is read and an eighth computed
        image.load()


def require_whole(data: bytes) -> bytes:
    """Refuses what decoders fill up with grey, or take memory for that the file cannot fill.

    Returns:
      The bytes to decode: a TIFF's say that it is upright, as OpenCV would turn it.

    Raises:
      One of `_WHAT_DECODERS_RAISE`: bytes are missing or damaged.
    """
    if data.startswith(_PNG):
        _require_chunks(data)
    elif data.startswith(b"\xff\xd8"):
        if not data.endswith(b"\xff\xd9"):  # cut off, or with something behind its end
            _require_decodable(data)
    elif data.startswith(b"BM"):
        _require_rows(data)
    elif data.startswith(b"RIFF"):
        (size,) = struct.unpack_from("<I", data, 4)
        if size + 8 > len(data):
            raise ValueError(f"{size + 8:,} bytes, of which {len(data):,} are there")
    elif data.startswith(tiffs.MARKS):
        return tiffs.to_decode(data, MOST_BYTES)
    return data


def _require_chunks(data: bytes) -> None:
    """Checks that the chunks of a PNG are whole, up to its end."""
    at, kind = len(_PNG), b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            raise ValueError(f"its chunk {kind!r} at byte {at} ends after the file does")
        (checksum,) = struct.unpack_from(">I", data, end)
        if zlib.crc32(memoryview(data)[at + 4 : end]) != checksum:
            raise ValueError(f"its chunk {kind!r} at byte {at} has another checksum")
        at = end + 4


def _require_rows(data: bytes) -> None:
    """Checks that a BMP that is not compressed has all its rows."""
    start, size, width, height, _, bits, compression = struct.unpack_from("<IIiiHHI", data, 10)
    if size >= 40 and compression in (0, 3):
        end = start + (abs(width) * bits + 31) // 32 * 4 * abs(height)
        if end > len(data):
            raise ValueError(f"{end:,} bytes, of which {len(data):,} are there")


def _undecodable(data: bytes, name: str, detail: str) -> DataError:
    said = f"{shown_path(name)}: the image's header is readable but its pixels are not ({detail}). "
    advice = "Replace the file with a whole copy, or leave it out."
    if data.startswith(tiffs.MARKS) and (unusual := tiffs.not_read(data)):
        said = f"{shown_path(name)}: this kind of TIFF is not read ({unusual}). "
        advice = "Save it as RGB of 8 bits with LZW or Deflate, or as PNG, or leave it out."
    return DataError(f"{said}{advice}", file=name)


def upright(image: Image, orientation: int) -> Image:
    """Turns an image that is nobody else's, which may be written to."""
    if orientation >= 5:
        image = np.asarray(cv2.transpose(image), np.uint8)
    # After the transpose, what is left is a mirror along one axis or both.
    mirror = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    # In place: a large image is in memory twice as it is.
    return image if mirror is None else np.asarray(cv2.flip(image, mirror, image), np.uint8)


@dataclass(frozen=True)
class Record:
    """One image file and its labels.

    Attributes:
      name: the image's name relative to its split.
      file: where it lies.
      header: its size and orientation.
      objects: its labels.
    """

    name: str
    file: str
    header: Header
    objects: Objects


class FileSource:
    """A source whose images are files on disk. Implements `Source`."""

    def __init__(self, names: Sequence[str], records: Sequence[Record], report: Report) -> None:
        """Takes the kept images.

        Args:
          names: class names.
          records: the images, in order.
          report: with what was skipped; the kept are counted here.

        Raises:
          DataError: no image is left.
        """
        if not records:
            first = f"{report.where}: no usable image. Check the path, or the images named below."
            raise DataError("\n".join([first, *report.lines()[1:]]))
        self.names = tuple(names)
        self.report = report
        for record in records:
            if record.header.note:
                report.skip(record.header.note, record.file)
        self._take(records)

    def _take(self, records: Sequence[Record]) -> None:
        self._records = tuple(records)
        self.report.images = self.report.objects = self.report.backgrounds = 0
        self.report.count(record.objects for record in self._records)
        self.identity = identify(
            self.names, ((r.name, r.header.size, r.objects) for r in self._records)
        )

    def keep(self, indices: Sequence[int]) -> None:
        """Forgets all other images, before anybody has asked for the identity.

        Raises:
          DataError: none is left.
        """
        if not indices:
            first = f"{self.report.where}: no image can be decoded. Replace the images named below."
            raise DataError("\n".join([first, *self.report.lines()[1:]]))
        self._take([self._records[i] for i in indices])

    def file(self, index: int) -> str:
        """Where image `index` lies."""
        return self._records[index].file

    @property
    def stamps(self) -> Stamps:
        """Of all images."""
        return {record.file: record.header.stamp for record in self._records}

    def header(self, index: int) -> Header:
        """What the file of image `index` said of itself when it was opened."""
        return self._records[index].header

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of image `index` in pixels, upright, as its file said."""
        return self._records[index].header.size

    def __len__(self) -> int:
        return len(self._records)

    def image(self, index: int, *, strict: bool = False) -> Image:
        """(H, W, 3) uint8 RGB; DataError if the file is gone or damaged. strict: as in `decode`."""
        record = self._records[index]
        try:
            with open(record.file, "rb") as opened:
                told = os.fstat(opened.fileno())
                data = opened.read(MOST_BYTES)
        except OSError as error:
            raise DataError(
                f"{shown_path(record.file)}: the image was there when the data set was opened and "
                f"cannot be read now ({error.strerror}). Restore it, or start again without it.",
                file=record.file,
            ) from error
        if (told.st_size, told.st_mtime_ns) == record.header.stamp:
            pixels = decode(data, record.file, record.header.orientation, strict=strict)
        else:  # another file than the one whose header was checked
            pixels = decode_upright(data, record.file)
        if pixels.shape[:2] != record.header.size:
            raise DataError(
                f"{shown_path(record.file)}: decoded to {pixels.shape[:2]} (height, width), but "
                f"its header said {record.header.size} when the data set was opened, and the boxes "
                f"belong to that size. Save the image again in an ordinary format.",
                file=record.file,
            )
        return pixels

    def objects(self, index: int) -> Objects:
        """The labelled objects of image `index`."""
        return self._records[index].objects

    def name(self, index: int) -> str:
        """The image's name relative to its split."""
        return self._records[index].name
