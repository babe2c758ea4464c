"""Videos of what is found in videos: drawn frame by frame, beside the pictures."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from jaxaccum import data
from jaxaccum.data import movies, texts
from jaxaccum.draw.videos import CODECS, USUAL_RATE, VideoError, VideoWriter, require_codec
from jaxaccum.tasks.outputs import Outputs
from jaxaccum.tasks.results import Result


def names_of(targets: Mapping[Path, Path]) -> dict[Path, str]:
    """The name of the video that becomes of each video, below --out.

    Args:
      targets: as of `files.targets_of`.
    """
    videos = {path: target for path, target in targets.items() if path.suffix.lower() in CODECS}
    return {
        path: target.name if target.name.endswith(path.suffix) else target.name + path.suffix
        for path, target in videos.items()
    }


def write(found: Iterable[Result], source: Path, file: Path, codec: str = "") -> int:
    """Draws results into one video, which is there when it is whole.

    Args:
      found: of the frames of `source`, in order.
      source: a video, for its frame rate; of other files it is `USUAL_RATE`.
      file: to write, over what is there.
      codec: as of `VideoWriter`.
    Returns:
      the number of frames.
    Raises:
      VideoError: it cannot be written. DataError: `source` cannot be read.
    """
    require_codec(file.suffix, codec)
    rate = movies.rate(source) if source.suffix.lower() in movies.VIDEOS else 0.0
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=file.parent) as folder:
        writer: VideoWriter | None = None
        try:
            for result in found:
                if writer is None:
                    height, width = result.sample.value.shape[:2]
                    begun = Path(folder) / f"drawn{file.suffix}"
                    writer = VideoWriter(begun, (height, width), rate or USUAL_RATE, codec)
                writer.add(result.frame())
            if writer is None:
                raise VideoError(f"{texts.shown_path(source)}: no frames to write")
            writer.close()
            writer.file.replace(file)
        finally:
            if writer is not None:
                writer.abandon()
    return writer.frames


class Drawn(contextlib.AbstractContextManager["Drawn"]):
    """Writes one video at a time, as its frames come; none of them is kept."""

    def __init__(
        self, outputs: Outputs, names: Mapping[Path, str], failed: list[str], codec: str = ""
    ) -> None:
        """Tries the codec.

        Args:
          outputs: where to write.
          names: as of `names_of`; what is not in it becomes no video.
          failed: takes a message for every video that cannot be written.
          codec: as of `VideoWriter`.
        Raises:
          VideoError: it cannot be written here.
        """
        for suffix in sorted({Path(name).suffix for name in names.values()}):
            require_codec(suffix, codec)
        self._outputs, self._names, self._failed, self._codec = outputs, names, failed, codec
        self._path: Path | None = None
        self._writer: VideoWriter | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def add(self, path: Path, result: Result) -> None:
        """Draws what was found in a sample of a file, if that is a video; ends the one before."""
        if path != self._path:
            self.end()
            self._path = path
            if path not in self._names:
                return
            with self._telling():
                self._begin(path, result)
        if self._writer is not None:
            with self._telling():
                self._writer.add(result.frame())

    def end(self) -> None:
        """Ends the video under way, and puts it where it belongs."""
        writer, path, self._path, self._writer = self._writer, self._path, None, None
        if writer is not None and path is not None:
            name = self._names[path]
            with self._telling(path):
                asked = writer.rate
                writer.close()
                if abs(writer.rate - asked) > 0.01 * asked:
                    what = f"{writer.codec} cannot have {asked:g} frames a second"
                    print(f"note: {texts.shown_path(path)}: {what}, it has {writer.rate:g}")
                self._outputs.save(name, lambda file: writer.file.replace(file))
                size = f"{writer.size[1]} x {writer.size[0]} pixels"
                print(
                    f"{texts.shown_path(path)}: {writer.frames} frames drawn in "
                    f"{texts.shown_path(self._outputs.out / name)} ({size}, {writer.rate:g} a "
                    f"second, codec {writer.codec})"
                )
        self._clean()

    def __exit__(self, *error: object) -> None:
        """Leaves nothing half written behind."""
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None
        self._clean()

    def _begin(self, path: Path, result: Result) -> None:
        shown, rate = texts.shown_path(path), movies.rate(path)
        if not rate:
            print(f"note: {shown} does not say its frames a second: {USUAL_RATE:g} are written")
        height, width = result.sample.value.shape[:2]
        if height % 2 or width % 2:
            odd = " and ".join(["row"] * (height % 2) + ["column"] * (width % 2))
            print(f"note: {shown}: codecs write even sides, its last {odd} of pixels is left out")
        self._folder = tempfile.TemporaryDirectory(prefix=".writing-", dir=self._outputs.out)
        file = Path(self._folder.name) / f"drawn{Path(self._names[path]).suffix}"
        self._writer = VideoWriter(file, (height, width), rate or USUAL_RATE, self._codec)

    @contextlib.contextmanager
    def _telling(self, path: Path | None = None) -> Iterator[None]:
        """One video that cannot be written ends none of the others, nor its own pictures."""
        path = self._path if path is None else path
        try:
            yield
        except (VideoError, data.DataError) as error:
            self._failed.append(f"{texts.shown_path(path or '')}: no video of it: {error}")
            if self._writer is not None:
                self._writer.abandon()
                self._writer = None

    def _clean(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
