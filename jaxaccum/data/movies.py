"""GIFs and videos, read one frame at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxaccum.data import DataError, texts
from jaxaccum.data.base import Image
from jaxaccum.data.images import SMALLEST_SIDE

SUFFIXES = frozenset(
    {".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}
)
_MOST_PIXELS = 1 << 28  # of a frame: 16384 x 16384
_STARTS = (  # (offset, bytes) of the formats above
    (0, b"RIFF"), (0, b"\x1aE\xdf\xa3"), (0, b"\0\0\1\xba"), (0, b"\0\0\1\xb3"),
    (0, b"0&\xb2u"), (4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (4, b"wide"), (4, b"free"),
    (4, b"skip"),
)  # fmt: skip


def frames(file: Path) -> Iterator[Image]:
    """The frames of a GIF or a video as (H, W, 3) uint8 RGB, upright, in order.

    One is in memory at a time.

    Raises:
      DataError: it cannot be read or decoded, or ends before what it says.
    """
    name = texts.shown_path(file)
    begin = _begin(file, name)
    if begin.startswith(b"GIF8"):
        yield from _of_gif(file, name)
        return
    # The decoder would also follow lists of other files, and addresses.
    if not any(begin[at : at + len(mark)] == mark for at, mark in _STARTS):
        raise _undecodable(file, name, "it does not begin like a GIF or a video")
    yield from _of_video(file, name)


def _of_gif(file: Path, name: str) -> Iterator[Image]:
    import PIL.Image

    count = 0
    try:
        with PIL.Image.open(file, formats=["GIF"]) as gif:
            _require_size(*gif.size, file, name)
            while True:
                try:
                    gif.seek(count)
                except EOFError:
                    break
                yield np.asarray(gif.convert("RGB"), np.uint8)
                count += 1
    except DataError:
        raise
    # Pillow's errors at damaged files are of many types.
    except Exception as error:
        raise _cut_off(file, name, count, " ".join(str(error).split())) from error
    with file.open("rb") as content:  # Pillow takes a missing end for the end
        content.seek(max(file.stat().st_size - 64, 0))
        whole = content.read().rstrip(b"\0\r\n").endswith(b";")
    if not whole:
        raise _cut_off(file, name, count, "its end is missing")


def _of_video(file: Path, name: str) -> Iterator[Image]:
    # The decoder's own complaints would go to stderr; a file may name no address.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "protocol_whitelist;file")
    import cv2

    count = 0
    try:
        capture = cv2.VideoCapture(str(file), cv2.CAP_FFMPEG)
    except (cv2.error, UnicodeError, SystemError) as error:
        raise _undecodable(file, name, f"OpenCV: {' '.join(str(error).split())}") from error
    try:
        if not capture.isOpened():
            raise _undecodable(file, name, "OpenCV knows no video in it, or it is cut off")
        width, height = cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT
        _require_size(int(capture.get(width)), int(capture.get(height)), file, name)
        while True:
            try:
                read, pixels = capture.read()
            except cv2.error as error:
                raise _cut_off(file, name, count, " ".join(str(error).split())) from error
            if not read or pixels is None:
                break
            count += 1
            yield np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), np.uint8)
        told = capture.get(cv2.CAP_PROP_FRAME_COUNT)  # an estimate for some formats
        if count == 0 or (np.isfinite(told) and count < 0.9 * told - 1):
            raise _cut_off(file, name, count, f"it says that there are about {told:.0f}")
    finally:
        capture.release()


def _require_size(width: int, height: int, file: Path, name: str) -> None:
    """Refuses frames that are none, or too large to be decoded."""
    if width * height > _MOST_PIXELS:
        raise _undecodable(file, name, f"frames of {width} x {height} pixels are too large")
    if min(width, height) < SMALLEST_SIDE:
        raise _undecodable(file, name, f"its frames are under {SMALLEST_SIDE} pixels")


def _begin(file: Path, name: str) -> bytes:
    try:
        with file.open("rb") as content:
            return content.read(16)
    except OSError as error:
        raise DataError(
            f"{name}: cannot be read ({error.strerror}). Check the path and its rights.",
            file=str(file),
        ) from error


def _cut_off(file: Path, name: str, count: int, why: str) -> DataError:
    if not count:
        return _undecodable(file, name, f"none could be decoded ({why})")
    return DataError(
        f"{name}: only its first {count} frames could be decoded and were used ({why}). Get the "
        "file again for the others.",
        file=str(file),
    )


def _undecodable(file: Path, shown: str, why: str) -> DataError:
    return DataError(
        f"{shown}: no frames: {why}. Get the file again, or give its frames as images.",
        file=str(file),
    )
