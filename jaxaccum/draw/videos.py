"""Videos of pictures that come one after the other, written by OpenCV."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import cv2
import numpy as np

from jaxaccum.draw.boxes import Image
from jaxaccum.errors import UserError

# Of each container the codec that OpenCV's own builds can write: H.264 is in none of them.
CODECS: Mapping[str, str] = {
    ".avi": "XVID", ".m4v": "mp4v", ".mkv": "mp4v", ".mov": "mp4v", ".mp4": "mp4v",
    ".mpeg": "mpg2", ".mpg": "mpg2", ".webm": "VP80", ".wmv": "WMV2",
}  # fmt: skip
# Where the file says how many frames it holds; others are estimated by their duration.
COUNTED = frozenset({".avi", ".m4v", ".mov", ".mp4"})
USUAL_RATE = 25.0  # frames a second, where a video does not say


class VideoError(UserError, ValueError):
    """A video that cannot be written; the message says why and what to do."""


class VideoWriter:
    """Writes a video, a picture at a time, of which none is kept.

    Attributes:
      file: where it lies.
      size: (height, width) of its frames; codecs write even sides, so that a last odd row or column
        is left out.
      rate: frames a second; once it is closed those that the file says: some codecs know few rates.
      frames: number of them, so far.
    """

    def __init__(
        self, file: Path, size: tuple[int, int], rate: float = USUAL_RATE, codec: str = ""
    ) -> None:
        """Begins the file.

        Args:
          file: its suffix names the container, one of `CODECS`.
          size: (height, width) of the pictures in pixels, at least 2.
          rate: frames a second.
          codec: its four letters (FourCC); "" for that of `CODECS`.
        Raises:
          VideoError: the codec cannot be written here, or not at this size and rate.
        """
        height, width = size
        self.file, self.size, self.rate = file, (height // 2 * 2, width // 2 * 2), rate
        self.codec, self.frames = checked_codec(file.suffix, codec), 0
        if min(self.size) < 2 or not (math.isfinite(rate) and rate > 0):
            raise VideoError(f"a video of {width} x {height} pixels, {rate} frames a second")
        # The encoder's own lines would go to stderr.
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
        four = cv2.VideoWriter.fourcc(*self.codec)
        with _silent_stderr():
            self._writer = cv2.VideoWriter(str(file), cv2.CAP_FFMPEG, four, rate, self.size[::-1])
        if not self._writer.isOpened():
            raise VideoError(
                f"OpenCV {cv2.__version__} cannot write {file.suffix} with the codec {self.codec} "
                f"here ({width} x {height} pixels, {rate:g} frames a second): give another one by "
                f"--codec, such as {CODECS.get(file.suffix.lower(), 'mp4v')} or MJPG, or write "
                "pictures only, by --nosave_video"
            )

    def add(self, picture: Image) -> None:
        """Writes the next frame, (H, W, 3) uint8 RGB.

        Raises:
          VideoError: it has another size than the video.
        """
        height, width = (side // 2 * 2 for side in picture.shape[:2])
        if (height, width) != self.size or picture.dtype != np.uint8:
            shown = f"{self.size[1]} x {self.size[0]}"
            raise VideoError(
                f"frame {self.frames + 1} is {picture.dtype} of {picture.shape[1]} x "
                f"{picture.shape[0]} pixels, in a video of {shown}: its frames have one size"
            )
        self._writer.write(cv2.cvtColor(picture[:height, :width], cv2.COLOR_RGB2BGR))
        self.frames += 1

    def close(self) -> None:
        """Ends the file, and looks whether it can be read and says how many frames it has: OpenCV
        says nothing of a disk that is full.

        Raises:
          VideoError: it cannot, or has another number.
        """
        self._writer.release()
        capture = cv2.VideoCapture(str(self.file), cv2.CAP_FFMPEG)
        try:
            told = capture.get(cv2.CAP_PROP_FRAME_COUNT) if capture.isOpened() else -1
            self.rate = capture.get(cv2.CAP_PROP_FPS) or self.rate
        finally:
            capture.release()
        exact = self.file.suffix.lower() in COUNTED
        if (told < 0 and self.frames) or (exact and told != self.frames):
            found = f"{told:.0f} frames" if told >= 0 else "no video"
            raise VideoError(
                f"of {self.frames} frames that were written the file holds {found}: is the disk "
                "full? Else give another codec by --codec, or write pictures only, by "
                "--nosave_video"
            )

    def abandon(self) -> None:
        """Lets go of the file, which is of no use."""
        self._writer.release()


def checked_codec(suffix: str, codec: str = "") -> str:
    """The four letters of a codec; those of the container's usual one for "".

    Raises:
      VideoError: these are no four letters, or no video has that suffix.
    """
    if suffix.lower() not in CODECS:
        known = ", ".join(CODECS)
        raise VideoError(f"videos are written as {known}; got {suffix or 'no suffix'!r}")
    if codec and not (len(codec) == 4 and codec.isascii() and codec.isprintable()):
        raise VideoError(f"codec is four letters (FourCC), as mp4v or MJPG; got {codec!r}")
    return codec or CODECS[suffix.lower()]


def require_codec(suffix: str, codec: str = "") -> None:
    """Tries to write a small video, before there is anything to lose.

    Raises:
      VideoError: it cannot be written here.
    """
    with tempfile.TemporaryDirectory(prefix="video-") as folder:
        writer = VideoWriter(Path(folder) / f"tried{suffix}", (64, 64), USUAL_RATE, codec)
        for _ in range(2):
            writer.add(np.zeros((64, 64, 3), np.uint8))
        writer.close()


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """OpenCV prints remarks on the names of codecs from C, even on those that it then writes."""
    try:
        sys.stderr.flush()
        kept = os.dup(2)
    except (OSError, ValueError, AttributeError):  # closed, or none: nothing to keep clean
        yield
        return
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
