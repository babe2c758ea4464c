"""Image files in, RGB pixels out: cheap checks by header, correct decoding, one source for both."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from jaxaccum.data.base import DataError, Image, Objects, Report, identify

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
SMALLEST_SIDE = 10  # pixels; anything less is no picture to learn from
_EXIF_ORIENTATION = 0x0112

# The ends of a file that was written to its end.
_ENDINGS = ((b"\xff\xd8", b"\xff\xd9"), (b"\x89PNG", b"IEND\xaeB`\x82"))


class Unreadable(Exception):
    """An image that cannot be used; str() is the reason, worded for a report."""


@dataclass(frozen=True)
class Header:
    """What an image file says of itself.

    Attributes:
      size: (height, width) in pixels, upright.
      orientation: EXIF orientation, 1 to 8; 1 is upright.
    """

    size: tuple[int, int]
    orientation: int


def read_header(file: str | Path | io.BytesIO) -> Header:
    """Reads size and orientation without decoding pixels.

    Raises:
      Unreadable: the file is missing, no image, or under 10 pixels.
    """
    import PIL.Image

    try:
        with PIL.Image.open(file) as image:
            width, height = image.size
            # Asked for EXIF that is not at its front, a PNG would be decoded to its end.
            told = image.format != "PNG" or "exif" in image.info
            orientation = int(image.getexif().get(_EXIF_ORIENTATION, 1)) if told else 1
    except FileNotFoundError:
        raise Unreadable("image missing") from None
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise Unreadable("image unreadable") from error
    if min(height, width) < SMALLEST_SIDE:
        raise Unreadable(f"image under {SMALLEST_SIDE} pixels")
    if orientation not in range(1, 9):
        orientation = 1
    return Header((width, height) if orientation >= 5 else (height, width), orientation)


def decode(data: bytes, name: str, orientation: int = 1) -> Image:
    """Decodes an image to (H, W, 3) uint8 RGB, upright.

    Greyscale is repeated over the channels, alpha is dropped, 16 bits become 8.

    Args:
      data: the file's bytes.
      name: its name, for messages.
      orientation: EXIF orientation to undo.

    Raises:
      DataError: the bytes are damaged or cut off.
    """
    for start, end in _ENDINGS:
        if data.startswith(start) and not data.endswith(end):
            _refuse_damage(data, name)
    pixels = None
    if data:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if pixels is None:
        raise _damaged(name, f"no image could be decoded from its {len(data)} bytes")
    return _upright(np.asarray(pixels, np.uint8), orientation)


def read_image(file: str | Path) -> Image:
    """An image file as (H, W, 3) uint8 RGB, upright.

    Raises:
      DataError: it is missing, no image, or damaged.
    """
    try:
        header = read_header(file)
    except Unreadable as reason:
        raise DataError(f"{file}: {reason}", file=str(file)) from reason
    return decode(Path(file).read_bytes(), str(file), header.orientation)


def _refuse_damage(data: bytes, name: str) -> None:
    """Raises DataError if the image is cut off: OpenCV 4 fills the rest with grey."""
    import PIL.Image

    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise _damaged(name, str(error)) from error


def _damaged(name: str, detail: str) -> DataError:
    return DataError(
        f"{name}: the image's header is readable but its pixels are not ({detail}). "
        f"Replace the file with a whole copy, or remove it and its labels from the data set.",
        file=name,
    )


def _upright(image: Image, orientation: int) -> Image:
    if orientation >= 5:
        image = np.asarray(cv2.transpose(image), np.uint8)
    # After the transpose, what is left is a mirror along one axis or both.
    mirror = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return image if mirror is None else np.asarray(cv2.flip(image, mirror), np.uint8)


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
        self._records = tuple(records)
        report.count(record.objects for record in self._records)
        self.identity = identify(
            self.names, ((r.name, r.header.size, r.objects) for r in self._records)
        )

    def __len__(self) -> int:
        return len(self._records)

    def image(self, index: int) -> Image:
        """(H, W, 3) uint8 RGB; DataError if the file is gone or damaged."""
        record = self._records[index]
        try:
            data = Path(record.file).read_bytes()
        except OSError as error:
            raise DataError(
                f"{record.file}: the image was there when the data set was opened and cannot be "
                f"read now ({error.strerror}). Restore it, or start again without it.",
                file=record.file,
            ) from error
        pixels = decode(data, record.file, record.header.orientation)
        if pixels.shape[:2] != record.header.size:
            raise DataError(
                f"{record.file}: decoded to {pixels.shape[:2]} (height, width), but its header "
                f"said {record.header.size} when the data set was opened, and the boxes belong to "
                f"that size. Save the image again in an ordinary format.",
                file=record.file,
            )
        return pixels

    def objects(self, index: int) -> Objects:
        """The labelled objects of image `index`."""
        return self._records[index].objects

    def name(self, index: int) -> str:
        """The image's name relative to its split."""
        return self._records[index].name
