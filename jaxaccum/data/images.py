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

from jaxaccum.data.base import DataError, Image, Objects, Report, identify
from jaxaccum.data.stamps import Stamp, Stamps
from jaxaccum.data.texts import shown_path

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
SMALLEST_SIDE = 10  # pixels; anything less is no picture to learn from
# Decoders take up to 6 bytes a pixel: 384 MiB. More than a detector is ever shown of an image.
MOST_PIXELS = 1 << 26
MOST_BYTES = 1 << 28  # of a file

# What is named so on the web; Pillow knows many more, some of which run other programs.
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "GIF", "PPM")
_ORIENTATION = 0x0112  # the tag, of EXIF and of TIFF
_TIFF_SIZE = (256, 257)  # the tags of width and height
_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


# MemoryError is Pillow's for sizes that it does not believe.
_WHAT_DECODERS_RAISE = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, SyntaxError,
    TypeError, ValueError, struct.error, zlib.error,
)  # fmt: skip


class Unreadable(Exception):
    """An image that cannot be used; str() is the reason, worded for a report."""


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
    library = _pillow()
    try:
        _require_small_webp(file)
        with library.open(file, formats=_FORMATS) as image:
            width, height = _stored_size(image)
            orientation, note = _told_orientation(image)
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
        raise Unreadable("image unreadable") from error
    if min(height, width) < SMALLEST_SIDE:
        raise Unreadable(f"image under {SMALLEST_SIDE} pixels")
    if height * width > most:
        raise Unreadable(_too_large(f"{width:,} x {height:,}", most))
    size = (width, height) if orientation >= 5 else (height, width)
    return Header(size, orientation, note, stamp)


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
def _pillow() -> Any:
    """Pillow, imported when it is first needed, and quiet: we say ourselves what is wrong."""
    import PIL.Image

    warnings.filterwarnings("ignore", module=r"PIL\.")
    return PIL.Image


def _stored_size(image: Any) -> tuple[int, int]:
    """Width and height as stored. Pillow swaps a TIFF's by its orientation, in some versions."""
    if image.format == "TIFF":
        width, height = (image.tag_v2[tag] for tag in _TIFF_SIZE)
        return int(width), int(height)
    width, height = image.size
    return width, height


def _told_orientation(image: Any) -> tuple[int, str]:
    """The orientation, 1 if none is told, and what is wrong with it."""
    # Asked for EXIF that is not at its front, a PNG would be decoded to its end.
    if image.format == "PNG" and "exif" not in image.info:
        return 1, ""
    try:
        told = image.getexif().get(_ORIENTATION, 1)
        if told in range(1, 9):
            return int(told), ""
        unknown = told == 0  # what some cameras write if they do not know
    except Exception:  # EXIF is a file format of its own, and Pillow's parser trusts it
        return 1, "EXIF data that cannot be read (image taken as upright)"
    return 1, "" if unknown else "EXIF orientation that is none of 1 to 8 (image taken as upright)"


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
      DataError: the bytes are damaged or cut off.
    """
    try:
        whole = _require_whole(data)
        if strict:
            _require_decodable(data)
    except _OtherKind as kind:
        raise DataError(
            f"{shown_path(name)}: {kind}, or remove it and its labels from the data set.", file=name
        ) from kind
    except _WHAT_DECODERS_RAISE as error:
        raise _damaged(name, str(error)) from error
    pixels = None
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        pixels = cv2.imdecode(np.frombuffer(whole, np.uint8), flags) if data else None
    except cv2.error as error:
        raise _damaged(name, str(error.err or error)) from error
    if pixels is None:
        raise _damaged(name, f"no image could be decoded from its {len(data)} bytes")
    return _upright(np.asarray(pixels, np.uint8), orientation)


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
    with _pillow().open(io.BytesIO(data), formats=_FORMATS) as image:
        image.draft("L", (1, 1))  # of a JPEG, all of it is read and an eighth computed
        image.load()


def _require_whole(data: bytes) -> bytes:
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
    elif data.startswith(_TIFF):
        return _tiff_to_decode(data)
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


def _tiff_to_decode(data: bytes) -> bytes:
    """A TIFF whose first page is there to its end, without its orientation, and with strips that
    are no longer than the image: OpenCV takes memory for all of a strip."""
    order = "<" if data.startswith(b"II") else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    places = "Q" if big else "I"
    (at,) = struct.unpack_from(order + places, data, 8 if big else 4)
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
    first, step, head = (at + 8, 20, 12) if big else (at + 2, 12, 8)
    tags: dict[int, list[int]] = {}
    entries: dict[int, int] = {}
    for entry in range(first, first + count * step, step):
        tag, kind, number = struct.unpack_from(f"{order}HH{places}", data, entry)
        if tag not in _TIFF_TAGS or kind not in _TIFF_KINDS:
            continue
        where, length = entry + head, number * struct.calcsize(_TIFF_KINDS[kind])
        if length > step - head:
            (where,) = struct.unpack_from(order + places, data, where)
        if where + length > len(data):
            raise ValueError(f"its tag {tag} ends after the file does")
        tags[tag] = list(struct.unpack_from(f"{order}{number}{_TIFF_KINDS[kind]}", data, where))
        entries[tag] = entry
    if max(tags.get(_BITS, []), default=1) > 16:
        raise _OtherKind(f"its pixels have {max(tags[_BITS])} bits. Save it with 8 bits a channel")
    wide, long = (max(tags.get(tag, []), default=0) for tag in _TILE)
    if wide * long > _MOST_TILE:
        raise ValueError(f"tiles of {wide:,} x {long:,} pixels")
    for starts, lengths in _TIFF_EXTENTS:
        for start, length in zip(tags.get(starts, []), tags.get(lengths, []), strict=False):
            if start + length > len(data):
                raise ValueError(f"pixels up to byte {start + length:,} of {len(data):,}")
    whole = bytearray(data)
    width, height = (max(tags.get(tag, []), default=1) for tag in _TIFF_SIZE)
    if width * height * sum(tags.get(_BITS, [])) // 8 > MOST_BYTES:
        raise ValueError(
            f"{width:,} x {height:,} with {sum(tags[_BITS])} bits each take more than "
            f"{MOST_BYTES:,} bytes; scale it down or save it with 8 bits per channel"
        )
    for tag, kind, told in ((_ORIENTATION, 3, 1), (_ROWS, 4, height)):
        if max(tags.get(tag, []), default=0) > told:
            entry, letter = entries[tag], _TIFF_KINDS[kind]
            struct.pack_into(f"{order}HH{places}{letter}", whole, entry, tag, kind, 1, told)
    return bytes(whole)


_BITS, _ROWS, _TILE = 258, 278, (322, 323)  # per sample; per strip; width and length
_TIFF_EXTENTS = ((273, 279), (324, 325))  # starts and lengths of strips, of tiles
_TIFF_TAGS = {_ORIENTATION, *_TIFF_SIZE, _BITS, _ROWS, *_TILE, *sum(_TIFF_EXTENTS, ())}
_TIFF_KINDS = {3: "H", 4: "I", 16: "Q"}
_MOST_TILE = 1 << 24  # pixels


class _OtherKind(ValueError):
    """A whole image of a kind that is not decoded; says what to make of it."""


def _damaged(name: str, detail: str) -> DataError:
    return DataError(
        f"{shown_path(name)}: the image's header is readable but its pixels are not ({detail}). "
        f"Replace the file with a whole copy, or remove it and its labels from the data set.",
        file=name,
    )


def _upright(image: Image, orientation: int) -> Image:
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
