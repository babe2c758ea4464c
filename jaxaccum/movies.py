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
    (0, b"GIF8"), (0, b"RIFF"), (0, b"\x1aE\xdf\xa3"), (0, b"\0\0\1\xba"), (0, b"\0\0\1\xb3"),
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
    _require_movie(file, name)
    # The decoder's own complaints go to stderr, and a file may not name others, or addresses.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "protocol_whitelist;file")
    import cv2

    try:
        capture = cv2.VideoCapture(str(file), cv2.CAP_FFMPEG)
    except (cv2.error, UnicodeError, SystemError) as error:
        raise _undecodable(file, name, f"OpenCV: {' '.join(str(error).split())}") from error
    try:
        if not capture.isOpened():
            raise _undecodable(file, name, "OpenCV knows no video in it, or it is cut off")
        width, height = (
            int(capture.get(key)) for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
        )
        if width * height > _MOST_PIXELS:
            raise _undecodable(file, name, f"frames of {width} x {height} pixels are too large")
        if min(width, height) < SMALLEST_SIDE:
            raise _undecodable(file, name, f"its frames are under {SMALLEST_SIDE} pixels")
        count = 0
        while True:
            try:
                read, pixels = capture.read()
            except cv2.error as error:
                raise _undecodable(
                    file, name, f"frame {count + 1}: {' '.join(str(error).split())}"
                ) from error
            if not read or pixels is None:
                break
            count += 1
            yield np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), np.uint8)
        told = capture.get(cv2.CAP_PROP_FRAME_COUNT)  # an estimate for some formats
        if count == 0:
            raise _undecodable(file, name, "no frame could be decoded")
        if np.isfinite(told) and count < 0.9 * told - 1:
            raise DataError(
                f"{name}: {count} of about {told:.0f} frames could be decoded; these were used. "
                "Get the file again for the others.",
                file=str(file),
            )
    finally:
        capture.release()


def _require_movie(file: Path, shown: str) -> None:
    """Refuses what does not begin like a video: the decoder would also follow lists of files."""
    try:
        with file.open("rb") as content:
            begin = content.read(16)
    except OSError as error:
        raise DataError(
            f"{shown}: cannot be read ({error.strerror}). Check the path and its rights.",
            file=str(file),
        ) from error
    if not any(begin[at : at + len(mark)] == mark for at, mark in _STARTS):
        raise _undecodable(file, shown, "it does not begin like a GIF or a video")


def _undecodable(file: Path, shown: str, why: str) -> DataError:
    return DataError(
        f"{shown}: no frames: {why}. Get the file again, or give its frames as images.",
        file=str(file),
    )
