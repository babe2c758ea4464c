"""Which way up an image file says that it is, in EXIF or XMP, wherever its format has them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import IO, Any

from jaxaccum.data.tiffs import ORIENTATION

_EXIF, _RAW, _XMP = b"exif", b"Raw profile type exif", b"XML:com.adobe.xmp"
_MOST_CHUNKS = 1 << 18  # of a PNG; of 1 KiB each, these are the largest file that is read
_MOST_TEXT = 1 << 22  # bytes of a chunk
_MOST_INFLATED = 1 << 20


def told(image: Any) -> tuple[int, str]:
    """The orientation of an image that Pillow has opened and not decoded, as its `exif_transpose`
    finds it: 1 to 8, 1 if none is told; and what is wrong with it, worded for a report, or ""."""
    try:
        # Asked for EXIF, a PNG would be decoded to its end, behind which it may be.
        found = _of_png(image.fp) if image.format == "PNG" else image.getexif()
        value = found.get(ORIENTATION, 1)
        if value in range(1, 9):
            return int(value), ""
        unknown = value == 0  # what some cameras write if they do not know
    except Exception:  # EXIF is a file format of its own, and Pillow's parser trusts it
        return 1, "EXIF data that cannot be read (image taken as upright)"
    return 1, "" if unknown else "EXIF orientation that is none of 1 to 8 (image taken as upright)"


def _of_png(file: IO[bytes]) -> Any:
    """Pillow's EXIF of a PNG, of all chunks before and behind its pixels.

    Raises:
      ValueError and whatever Pillow's parser does: there is some, but it cannot be read.
    """
    import PIL.Image

    last: dict[bytes, tuple[bytes, bytes]] = {}
    read, at = _reader(file), 8
    for _ in range(_MOST_CHUNKS):
        head = read(8, at)
        length, kind = struct.unpack(">I4s", head) if len(head) == 8 else (0, b"IEND")
        if kind == b"IEND":
            break
        if kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            content = read(min(length, _MOST_TEXT + 1), at + 8)
            word, _, rest = (_EXIF, b"", content) if kind == b"eXIf" else content.partition(b"\0")
            if word in (_RAW, _XMP) or (word == _EXIF and kind in (b"eXIf", b"tEXt")):
                last[word] = kind, rest
        at += length + 12
    else:
        raise ValueError(f"more than {_MOST_CHUNKS:,} chunks")
    bare = PIL.Image.new("1", (1, 1))
    for word, (kind, rest) in last.items():
        if len(rest) + len(word) >= _MOST_TEXT:
            raise ValueError(f"more than {_MOST_TEXT:,} bytes")
        if kind == b"eXIf":
            bare.info["exif"] = b"Exif\0\0" + rest
        elif word == _EXIF:
            bare.info["exif"] = rest
        else:
            bare.info[word.decode()] = _text(kind, rest).decode("latin-1")  # all that counts is
    return bare.getexif()


def _reader(file: IO[bytes]) -> Callable[[int, int], bytes]:
    """Reads so many bytes from a place on."""
    # A buffer would read all of the file, of which a few bytes in thousands are needed.
    raw: IO[bytes] = getattr(file, "raw", file)

    def read(count: int, at: int) -> bytes:
        raw.seek(at)
        return raw.read(count)

    return read


def _text(kind: bytes, rest: bytes) -> bytes:
    """The text of a PNG's chunk, behind its keyword; empty if it cannot be inflated.

    Raises:
      ValueError: it is too long.
    """
    packed = kind == b"zTXt"
    if packed:
        rest = rest[1:]  # the method, of which there is one
    elif kind == b"iTXt":
        packed = rest[:1] != b"\0"
        rest = [*rest[2:].split(b"\0", 2), b"", b""][2]  # behind language and translated keyword
    if not packed:
        return rest
    inflate = zlib.decompressobj()
    try:
        rest = inflate.decompress(rest, _MOST_INFLATED)
    except zlib.error:
        return b""
    if inflate.unconsumed_tail:
        raise ValueError(f"more than {_MOST_INFLATED:,} bytes")
    return rest
