"""One pass over the clouds of a data set before anything is learned from them: reads each once.

That a file can be read is kept in the user's cache by path, size and time of modification, so that
an unchanged set costs a look at its folders the next time.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxaccum.data.base import DataError, Findings
from jaxaccum.data.formats.cloud_files import read_cloud
from jaxaccum.data.one_pass import on_all_cores
from jaxaccum.data.stamps import Stamp, Stamps, stamp
from jaxaccum.data.texts import shown_path
from jaxaccum.machine import user_cache

UNREADABLE = "cloud that cannot be read"
UNEQUAL = "cloud with another number of points than most"
_RULES = 2  # of what is readable; another number makes what is known be found out again
_SHOWN = 5  # errors in a message


def points_in(file: Path) -> int:
    """The number of points in a cloud that can be read."""
    return len(read_cloud(file))


@dataclass(frozen=True)
class Check:
    """Reads the files of a data set.

    Attributes:
      on_error: "raise" refuses a data set with a file that cannot be used; "skip" leaves it out.
    """

    on_error: str = "raise"

    def run(
        self, where: str, groups: Sequence[Sequence[Path]],
        read: Callable[[Path], int] = points_in, equal: bool = True,
    ) -> Checked:  # fmt: skip
        """Reads files, in parallel and with a progress bar, but for those known to be good.

        Args:
          where: the data set and split, for people.
          groups: of each shape its files, the complete cloud first.
          read: takes a file and tells its points; raises `DataError` if it cannot be used.
          equal: whether all of the first files are to have as many points.
        """
        files = list(itertools.chain.from_iterable(groups))
        stamps = {file: stamp(file) for file in files}
        place = _place(where)
        known = _load(place)
        keys = {file: _key(file, one) for file, one in stamps.items()}
        good = {file: known[key] for file, key in keys.items() if key in known}
        wrong: dict[Path, str] = {}
        unknown = [file for file in stamps if file not in good]
        if unknown:
            try:
                for file, count, error in _examined(unknown, read):
                    if error:
                        wrong[file] = error
                    else:
                        good[file] = count
            finally:  # what an interrupted pass has found out need not be found again
                _save(place, {keys[f]: n for f, n in good.items() if stamps[f] is not None})
        unequal = dict[Path, str]()
        counts = Counter(good[group[0]] for group in groups if group[0] in good)
        points = counts.most_common(1)[0][0] if equal and counts else None
        for file in (group[0] for group in groups if equal):
            if good.get(file, points) != points:
                unequal[file] = (
                    f"{shown_path(file)}: {good[file]} points, but most complete clouds have "
                    f"{points}. Sample all of a data set to the same number of points."
                )
        seen = {str(file): one for file, one in stamps.items()}
        return Checked(self, where, groups, wrong, unequal, points, seen, good)


@dataclass(frozen=True)
class Checked:
    """What a pass over files has found.

    Attributes:
      check, where, groups: of what.
      wrong, unequal: file -> what is wrong with it.
      points: of the first files; None if they need not be equal or none can be read.
      stamps: of all files.
      counts: points of every file that can be read.
    """

    check: Check
    where: str
    groups: Sequence[Sequence[Path]]
    wrong: dict[Path, str]
    unequal: dict[Path, str]
    points: int | None
    stamps: Stamps
    counts: dict[Path, int]

    def usable(self, report: Findings) -> list[list[bool]]:
        """Of each group which files can be used.

        Args:
          report: takes those that cannot.

        Raises:
          DataError: there are such files, and on_error is not "skip".
        """
        errors = self.wrong | self.unequal
        if errors and self.check.on_error != "skip":
            first = next(iter(errors))
            told = "\n".join(f"  {error}" for error in list(errors.values())[:_SHOWN])
            more = len(errors) - _SHOWN
            raise DataError(
                f"{self.where}: {len(errors)} clouds cannot be used:\n{told}"
                + (f"\n  and {more} more" if more > 0 else "")
                + "\nRepair them, take them out, or set data.on_error=skip to leave them out.",
                file=str(first),
            )
        for error in self.wrong.values():
            report.skip(UNREADABLE, error)
        for error in self.unequal.values():
            report.skip(UNEQUAL, error)
        return [[file not in errors for file in group] for group in self.groups]


def _examined(
    files: Sequence[Path], read: Callable[[Path], int]
) -> Iterable[tuple[Path, int, str]]:
    """Each file with its points, and what is wrong or ""."""

    def look(file: Path) -> tuple[Path, int, str]:
        try:
            return file, read(file), ""
        except DataError as error:
            return file, 0, str(error)

    return on_all_cores(files, look, unit="clouds", told="reading every cloud once")


def _key(file: Path, known: Stamp | None) -> bytes:
    text = f"{_RULES}\0{os.path.abspath(file)}\0{known}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _place(where: str) -> Path:
    """The file in the cache for a data set."""
    name = hashlib.sha256(f"{os.getcwd()} {where}".encode("utf-8", "surrogatepass")).hexdigest()
    return user_cache.folder() / "clouds" / f"{name[:16]}.npz"


def _load(place: Path) -> dict[bytes, int]:
    """Keys of files that are known to be good, with their points; of a damaged cache nothing."""
    if not place.is_file():
        return {}
    try:
        with np.load(place, allow_pickle=False) as arrays:
            keys, points = arrays["keys"], arrays["points"]
        if keys.dtype != np.uint8 or keys.shape != (len(points), 16) or points.dtype != np.int64:
            raise ValueError("other arrays than expected")
    except Exception as error:  # there is no end to what a damaged file can raise
        print(f"note: {place} is damaged and is made anew ({error})", file=sys.stderr)
        return {}
    return {key.tobytes(): int(n) for key, n in zip(keys, points, strict=True)}


def _save(place: Path, known: dict[bytes, int]) -> None:
    keys = np.frombuffer(b"".join(known), np.uint8).reshape(-1, 16)
    content = io.BytesIO()
    np.savez(content, keys=keys, points=np.fromiter(known.values(), np.int64, len(known)))
    try:
        user_cache.write(place, content.getbuffer())
    except OSError as error:
        print(
            f"note: which clouds can be read is not kept in {place} ({error.strerror}); the next "
            "run reads them again",
            file=sys.stderr,
        )
