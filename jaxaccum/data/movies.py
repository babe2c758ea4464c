"""Files of several pictures: GIFs, videos, animated PNGs and WebPs, pages of TIFFs; read one at a
time."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from jaxaccum.data import DataError, images, texts, tiffs
from jaxaccum.data.base import Image
from jaxaccum.data.images import MOST_PIXELS, SMALLEST_SIDE

SUFFIXES = frozenset(
    {".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}
)
# Suffixes of images that may hold several.
PAGED = images.SUFFIXES - {".bmp"}
VIDEOS = SUFFIXES - {".gif"}  # what OpenCV decodes
_MOST_DAMAGED = 1000  # frames in a row; a header may claim any number of them
_MOST_ANIMATED = MOST_PIXELS // 2  # Pillow takes up to 25 bytes a pixel for its last two frames
_STARTS = (  # (offset, bytes) of the formats above
    (0, b"RIFF"), (0, b"\x1aE\xdf\xa3"), (0, b"\0\0\1\xba"), (0, b"\0\0\1\xb3"),
    (0, b"0&\xb2u"), (4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (4, b"wide"), (4, b"free"),
    (4, b"skip"),
)  # fmt: skip


class Told(NamedTuple):
    """What an image file says of the pictures in it.

    Attributes:
      format: as Pillow calls it; "" if the file cannot be read.
      pictures: number of them; 2 if they were not all counted, 1 if it cannot be read.
      copies: pages of a TIFF, of these not counted, that are smaller copies or masks of others.
    """

    format: str = ""
    pictures: int = 1
    copies: int = 0

    @property
    def moves(self) -> bool:
        """Whether `frames` gives them all; the others of an MPO may be depths or smaller copies."""
        return self.pictures > 1 and self.format != "MPO"


def told(file: Path) -> Told:
    """What an image file says of the pictures in it, before they are decoded."""
    try:
        images.read_header(file)
        with images.pillow().open(file, formats=images.FORMATS) as image:
            format = image.format or ""
            if format == "TIFF":
                pages = tiffs.pages(file.read_bytes())
                return Told(format, len(pages.starts) + bool(pages.problem), pages.copies)
            if format == "MPO":
                return Told(format, image.n_frames)
            return Told(format, 2 if getattr(image, "is_animated", False) else 1)
    # Pillow's errors at damaged files are of many types, and who reads the image says what it is.
    except Exception:
        return Told()


def frames(file: Path) -> Iterator[Image]:
    """The frames of an animation or a video, or the pages of a TIFF that are no smaller copies or
    masks of others, as (H, W, 3) uint8 RGB, upright, in order.

    One is in memory at a time.

    Raises:
      DataError: it cannot be read or decoded, or ends before what it says.
    """
    name = texts.shown_path(file)
    begin = _begin(file, name)
    if begin.startswith(b"GIF8"):
        yield from _of_gif(file, name)
        return
    if begin.startswith(b"\x89PNG") or (begin[:4], begin[8:12]) == (b"RIFF", b"WEBP"):
        yield from _of_animation(file, name)
        return
    if begin.startswith(tiffs.MARKS):
        yield from _of_tiff(file, name)
        return
    # The decoder would also follow lists of other files, and addresses.
    if not any(begin[at : at + len(mark)] == mark for at, mark in _STARTS):
        raise _undecodable(file, name, "it does not begin like a GIF or a video")
    yield from _of_video(file, name)


def _of_gif(file: Path, name: str) -> Iterator[Image]:
    count = 0
    with file.open("rb") as content:  # before Pillow takes memory for its first frame
        size = content.read(10)[6:]
    width, height = (int.from_bytes(size[at : at + 2], "little") for at in (0, 2))
    try:
        _require_size(width, height, file, name, _MOST_ANIMATED)
        with images.pillow().open(file, formats=["GIF"]) as gif:
            while True:
                try:
                    gif.seek(count)
                except EOFError:
                    break
                width, height = gif.size  # a frame may widen it
                _require_size(width, height, file, name, _MOST_ANIMATED)
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


def _of_animation(file: Path, name: str) -> Iterator[Image]:
    """Frames of a PNG or a WebP."""
    count = 0
    try:
        header = images.read_header(file)
        data = file.read_bytes()
        images.require_whole(data)
        with images.pillow().open(io.BytesIO(data), formats=["PNG", "WEBP"]) as image:
            width, height = image.size
            _require_size(width, height, file, name, _MOST_ANIMATED)
            told = image.n_frames
            while count < told:
                image.seek(count)
                yield images.upright(_rgb(image), header.orientation)
                count += 1
    except DataError:
        raise
    # As above; EOFError where there are fewer than it says.
    except Exception as error:
        raise _cut_off(file, name, count, " ".join(str(error).split())) from error


def _rgb(image: Any) -> Image:
    """The pixels of an image of Pillow, (H, W, 3) uint8, which may be written to."""
    if image.mode.startswith("I;16"):  # converted, all but the darkest would be white
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    return np.array(image.convert("RGB"), np.uint8)


def _of_tiff(file: Path, name: str) -> Iterator[Image]:
    count = 0
    try:
        images.read_header(file)  # the size of the file
        data = file.read_bytes()
        pages = tiffs.pages(data)
        for at in pages.starts:
            yield images.decode_upright(tiffs.of_page(data, at), f"{file} page {count + 1}")
            count += 1
        if pages.problem:
            raise ValueError(pages.problem)
    except DataError as error:
        why = str(error).removeprefix(f"{name} ")
        raise _cut_off(file, name, count, why) from error
    except Exception as error:
        raise _cut_off(file, name, count, " ".join(str(error).split())) from error


def rate(file: Path) -> float:
    """Frames a second of a video, on average; 0.0 where it does not say.

    Raises:
      DataError: it cannot be read.
    """
    with _opened(file, texts.shown_path(file)) as capture:
        told = float(capture.get(cv2.CAP_PROP_FPS))
    return told if np.isfinite(told) and told > 0 else 0.0


@contextlib.contextmanager
def _opened(file: Path, name: str) -> Iterator[Any]:
    """OpenCV's reader of a video, which ends with the context."""
    # The decoder's own complaints would go to stderr; a file may name no address.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "protocol_whitelist;file")
    try:
        capture = cv2.VideoCapture(str(file), cv2.CAP_FFMPEG)
    except (cv2.error, UnicodeError, SystemError) as error:
        raise _undecodable(file, name, f"OpenCV: {' '.join(str(error).split())}") from error
    try:
        if not capture.isOpened():
            raise _undecodable(file, name, "OpenCV knows no video in it, or it is cut off")
        yield capture
    finally:
        capture.release()


def _of_video(file: Path, name: str) -> Iterator[Image]:
    """Frames of a video; those that cannot be decoded are left out, and counted at its end."""
    count = failed = holes = 0  # failed: in a row
    with _opened(file, name) as capture:
        width, height = cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT
        size = int(capture.get(width)), int(capture.get(height))
        _require_size(*size, file, name, MOST_PIXELS)
        told = float(capture.get(cv2.CAP_PROP_FRAME_COUNT))  # an estimate for some formats
        told = told if np.isfinite(told) else 0.0
        while True:
            try:
                read, pixels = capture.read()
            except cv2.error as error:
                raise _cut_off(file, name, count, " ".join(str(error).split())) from error
            if read and pixels is not None:
                count, holes, failed = count + 1, holes + failed, 0
                yield np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), np.uint8)
                continue
            failed += 1  # one frame, which others may follow, or the end
            if count + holes + failed >= told or failed > _MOST_DAMAGED:
                break
        if count == 0 or (not holes and count < 0.9 * told - 1):
            raise _cut_off(file, name, count, f"it says that there are about {told:.0f}")
        missing = max(round(told) - count, holes)
        if holes:
            raise DataError(
                f"{name}: {missing} of its {count + missing} frames could not be decoded; the "
                f"other {count} were used, and are numbered without them. Get the file again for "
                "all.",
                file=str(file),
            )
        # The decoder passes over some without a word. By design, too, where a video was cut without
        # being encoded again.
        if missing > (0 if _counts(file, name) else 2):
            print(
                f"note: {name}: {count} frames could be decoded of the {count + missing} that it "
                f"says that it has; the other {missing} are in no result",
                file=sys.stderr,
            )


def _counts(file: Path, name: str) -> bool:
    """Whether a video knows the number of its frames: MP4, MOV and AVI."""
    begin = _begin(file, name)
    return begin.startswith(b"RIFF") or begin[4:8] in (b"ftyp", b"moov", b"mdat", b"wide")


def _require_size(width: int, height: int, file: Path, name: str, most: int) -> None:
    """Refuses frames that are none, or of more pixels than are decoded."""
    if width * height > most:
        why = f"frames of {width:,} x {height:,} pixels, more than the {most:,} that are decoded"
        raise _undecodable(file, name, f"{why}: scale them down")
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
