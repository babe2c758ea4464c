"""TIFFs before OpenCV decodes them: whole, upright, within bounds, one page at a time."""

from __future__ import annotations

import struct
from typing import NamedTuple

MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ORIENTATION = 0x0112  # the tag, of EXIF and of TIFF
SIZE = (256, 257)  # the tags of width and height
MOST_PAGES = 1 << 16
_BITS, _ROWS, _TILE = 258, 278, (322, 323)  # per sample; per strip; width and length
_SUBFILE, _COMPRESSION, _BANDS, _PLANES, _EXTRA = 254, 259, 277, 284, 338
_EXTENTS = ((273, 279), (324, 325))  # starts and lengths of strips, of tiles
_TAGS = {
    ORIENTATION, *SIZE, _BITS, _ROWS, *_TILE, *sum(_EXTENTS, ()), _COMPRESSION, _BANDS, _PLANES,
    _EXTRA,
}  # fmt: skip
_KINDS = {3: "H", 4: "I", 16: "Q"}
_MOST_TILE = 1 << 24  # pixels
_UNASSOCIATED = 2  # of the extra band: alpha that the colours are not multiplied by
_COPY_OR_MASK = 1 | 4  # of the kind of a page
# What OpenCV's library has in all its builds, and names of what it may lack.
_READ = {1, 2, 3, 4, 5, 7, 8, 32773, 32946}
_NAMES = {
    6: "old JPEG", 32809: "ThunderScan", 34676: "SGI log", 34677: "SGI log", 34712: "JPEG 2000",
    34887: "LERC", 34925: "LZMA", 50000: "ZSTD", 50001: "WebP", 50002: "JPEG XL", 52546: "JPEG XL",
}  # fmt: skip


class OtherKind(ValueError):
    """A whole image of a kind that is not decoded; says what to make of it."""


class _Layout(NamedTuple):
    """How numbers lie in a file: classic or BigTIFF, of either order of bytes."""

    order: str
    place: str  # of an offset
    entries: str  # the number of a page's entries
    start: int  # where the offset of the first page is
    step: int  # bytes of an entry
    head: int  # of them before its value


class _Page(NamedTuple):
    tags: dict[int, list[int]]
    places: dict[int, int]


def _layout(data: bytes) -> _Layout:
    order = "<" if data.startswith(b"II") else ">"
    if data[2:4] in (b"+\0", b"\0+"):
        return _Layout(order, "Q", "Q", 8, 20, 12)
    return _Layout(order, "I", "H", 4, 12, 8)


def _first_page(data: bytes, layout: _Layout) -> _Page:
    """The tags of the first page that matter here, and where their entries are.

    Raises:
      ValueError, struct.error: they end after the file does.
    """
    order, place = layout.order, layout.place
    (at,) = struct.unpack_from(order + place, data, layout.start)
    (count,) = struct.unpack_from(order + layout.entries, data, at)
    first = at + struct.calcsize(order + layout.entries)
    found = _Page({}, {})
    for entry in range(first, first + count * layout.step, layout.step):
        tag, kind, number = struct.unpack_from(f"{order}HH{place}", data, entry)
        # Of a tag that is there twice OpenCV's library takes the first.
        if tag not in _TAGS or kind not in _KINDS or tag in found.tags:
            continue
        where, length = entry + layout.head, number * struct.calcsize(_KINDS[kind])
        if length > layout.step - layout.head:
            (where,) = struct.unpack_from(order + place, data, where)
        if where + length > len(data):
            raise ValueError(f"its tag {tag} ends after the file does")
        found.tags[tag] = list(struct.unpack_from(f"{order}{number}{_KINDS[kind]}", data, where))
        found.places[tag] = entry
    return found


def to_decode(data: bytes, most_bytes: int) -> bytes:
    """A TIFF whose first page is there to its end, as OpenCV decodes it to what is stored.

    It says that it is upright, and nothing of alpha, by which OpenCV would multiply the colours;
    its strips are no longer than the image, as OpenCV takes memory for all of a strip.

    Args:
      most_bytes: of its pixels.

    Raises:
      OtherKind: it has more than 16 bits.
      ValueError, struct.error: it is damaged, or too large.
    """
    layout = _layout(data)
    tags, places = _first_page(data, layout)
    if max(tags.get(_BITS, []), default=1) > 16:
        raise OtherKind(f"its pixels have {max(tags[_BITS])} bits. Save it with 8 bits a channel")
    wide, long = (max(tags.get(tag, []), default=0) for tag in _TILE)
    if wide * long > _MOST_TILE:
        raise ValueError(f"tiles of {wide:,} x {long:,} pixels")
    for starts, lengths in _EXTENTS:
        for start, length in zip(tags.get(starts, []), tags.get(lengths, []), strict=False):
            if start + length > len(data):
                raise ValueError(f"pixels up to byte {start + length:,} of {len(data):,}")
    width, height = (max(tags.get(tag, []), default=1) for tag in SIZE)
    if width * height * sum(tags.get(_BITS, [])) // 8 > most_bytes:
        raise ValueError(
            f"{width:,} x {height:,} with {sum(tags[_BITS])} bits each take more than "
            f"{most_bytes:,} bytes; scale it down or save it with 8 bits per channel"
        )
    told = [
        (tag, kind, most)
        for tag, kind, most in ((ORIENTATION, 3, 1), (_ROWS, 4, height))
        if max(tags.get(tag, []), default=0) > most
    ]
    if tags.get(_EXTRA) == [_UNASSOCIATED]:
        told.append((_EXTRA, 3, 0))
    whole = bytearray(data)
    for tag, kind, value in told:
        head = f"{layout.order}HH{layout.place}{_KINDS[kind]}"
        struct.pack_into(head, whole, places[tag], tag, kind, 1, value)
    return bytes(whole)


def not_read(data: bytes) -> str:
    """What is unusual in a TIFF that cannot be decoded, worded for a message; "" if nothing is."""
    try:
        tags = _first_page(data, _layout(data)).tags
    except (ValueError, OverflowError, struct.error):
        return ""
    (compression, *_), (bands, *_), (planes, *_) = (
        tags.get(tag) or [1] for tag in (_COMPRESSION, _BANDS, _PLANES)
    )
    unusual = []
    if compression not in _READ:
        unusual.append(f"compression {_NAMES.get(compression, compression)}")
    if bands > 4:
        unusual.append(f"{bands} bands")
    if bands > 3 and planes == 2:
        unusual.append("bands that are stored apart")
    return ", ".join(unusual)


class Pages(NamedTuple):
    """Where the pages begin that are pictures of their own; how many others are smaller copies or
    masks of these; and what is wrong with the way to further ones, or ""."""

    starts: list[int]
    copies: int
    problem: str


def pages(data: bytes) -> Pages:
    """The pages of a TIFF, up to the last one that is there."""
    layout = _layout(data)
    starts, copies, seen = list[int](), 0, set[int]()
    try:
        (at,) = struct.unpack_from(layout.order + layout.place, data, layout.start)
        while at and at not in seen:
            if len(seen) == MOST_PAGES:
                return Pages(starts, copies, f"more than {MOST_PAGES:,} pages")
            seen.add(at)
            is_copy, following = _of_which_kind(data, layout, at)
            if starts and is_copy:
                copies += 1
            else:
                starts.append(at)
            at = following
    except (OverflowError, struct.error):
        known = len(starts) + copies
        return Pages(starts, copies, f"after {known} pages the way to the next is damaged")
    return Pages(starts, copies, "")


def _of_which_kind(data: bytes, layout: _Layout, at: int) -> tuple[bool, int]:
    """Whether a page is a smaller copy or a mask of another, and where the next one begins."""
    (count,) = struct.unpack_from(layout.order + layout.entries, data, at)
    first = at + struct.calcsize(layout.order + layout.entries)
    end = first + count * layout.step
    kind = 0
    for entry in range(first, min(end, first + 3 * layout.step), layout.step):  # sorted by tags
        if struct.unpack_from(f"{layout.order}H", data, entry) == (_SUBFILE,):
            (kind,) = struct.unpack_from(f"{layout.order}I", data, entry + layout.head)
    (following,) = struct.unpack_from(layout.order + layout.place, data, end)
    return bool(kind & _COPY_OR_MASK), following


def of_page(data: bytes, at: int) -> bytes:
    """The TIFF with the page that begins at a byte as its first."""
    layout = _layout(data)
    whole = bytearray(data)
    struct.pack_into(layout.order + layout.place, whole, layout.start, at)
    return bytes(whole)
