"""What `predict` writes to a folder: nothing over a file that no earlier `predict` wrote there."""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from jaxaccum.data import DataError
from jaxaccum.data.texts import MissingFileError, read_bytes, shown_path

LIST = ".jaxaccum_predicted"  # in the folder: what `predict` wrote there, a line each
_HEAD = "# What `predict` of jaxaccum wrote here, with size and CRC-32: this it may replace.\n"
_T = TypeVar("_T")


class Outputs:
    """The folder that is written to."""

    def __init__(self, out: Path) -> None:
        """Reads what was written there before.

        Args:
          out: the folder, which need not be there yet.
        Raises:
          DataError: its list of that cannot be read.
        """
        self.out = out
        self._known = _read_list(out / LIST)

    def require_free(
        self,
        targets: Mapping[Path, Path],
        writes: Iterable[str],
        results: str,
        has_frames: Callable[[Path], bool],
        files: Iterable[str] = (),
    ) -> None:
        """Refuses to write over what is read, or what no earlier `predict` wrote.

        Args:
          targets: as of `files.targets_of`.
          writes: as of `Task.writes`. results: name of the JSON file.
          has_frames: whether a source becomes NAME_000001 and so on, and not NAME.
          files: further names of files that will be written.
        Raises:
          DataError: names the first such file, or a file where a folder is to be.
        """
        sources = {path.resolve() for path in targets}
        paths = {target.name: path for path, target in targets.items()}
        found = [name for name in (results, *files) if os.path.lexists(self.out / name)]
        for pattern in writes:
            for file, name in self._matching(pattern):
                frame = re.fullmatch(r"(.*)_\d{6,}", name)
                if (name in paths and not has_frames(paths[name])) or (
                    frame and frame[1] in paths and has_frames(paths[frame[1]])
                ):
                    found.append(file)
        for file in sorted(set(found)):
            where = self.out / file
            if where.resolve() in sources:
                raise DataError(f"--out would overwrite {shown_path(where)}: give another folder")
            self._require_own(file)

    def save(self, name: str, write: Callable[[Path], _T]) -> _T:
        """Writes files, each in one step.

        Args:
          name: of them, without suffixes. write: writes them beside the path that it is given.
        Returns:
          what `write` does.
        Raises:
          DataError: one of them is not of an earlier `predict`.
        """
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=self.out) as folder:
            done = write(Path(folder) / name)
            for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                self._take(file, file.relative_to(folder).as_posix())
        return done

    def _matching(self, pattern: str) -> Iterator[tuple[str, str]]:
        """What is there of a pattern of `Task.writes`, below the folder, and its NAME."""
        place, _, last = (f"NAME{pattern}" if pattern.startswith(".") else pattern).rpartition("/")
        literal = place.split("/*")[0]
        if os.path.lexists(self.out / literal) and not (self.out / literal).is_dir():
            where = shown_path(self.out / literal)
            raise DataError(f"{where} is no folder, where `predict` is to write one: move it away")
        form = re.compile(re.escape(last).replace("NAME", "(.+)").replace(r"\*", ".*"), re.DOTALL)
        for folder in sorted(self.out.glob(place) if place else [self.out]):
            for entry in os.listdir(folder) if folder.is_dir() else []:
                if match := form.fullmatch(entry):
                    yield (folder.relative_to(self.out) / entry).as_posix(), match[1]

    def _require_own(self, file: str) -> None:
        """Refuses what is there and is not as an earlier `predict` left it."""
        where = self.out / file
        try:
            told = os.lstat(where)
        except FileNotFoundError:
            return
        known = self._known.get(file, set())
        if not known:
            why = "which no earlier `predict` wrote"
        elif not stat.S_ISREG(told.st_mode) or (told.st_size, _crc(where)) not in known:
            why = "which was changed since an earlier `predict` wrote it"
        else:
            return
        raise DataError(
            f"--out would overwrite {shown_path(where)}, {why}: give another folder by --out, or "
            "move that file away"
        )

    def _take(self, file: Path, name: str) -> None:
        self._require_own(name)
        facts = (file.stat().st_size, _crc(file))
        if facts not in self._known.setdefault(name, set()):
            self._known[name].add(facts)
            listed = self.out / LIST
            head = "" if listed.exists() else _HEAD
            # Before the file is there: one that is not listed could not be replaced.
            with listed.open("a", encoding="ascii") as opened:
                opened.write(f"{head}{json.dumps([name, *facts])}\n")
        (self.out / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, self.out / name)


def _read_list(file: Path) -> dict[str, set[tuple[int, int]]]:
    """Names, with the sizes and sums that they had; what is no line of the list is passed over."""
    found: dict[str, set[tuple[int, int]]] = {}
    try:
        lines = read_bytes(file).splitlines()
    except MissingFileError:
        return found
    for line in lines:
        try:
            name, size, crc = json.loads(line)
            found.setdefault(name, set()).add((size, crc))
        except (ValueError, TypeError, RecursionError):  # a comment, or a line that is cut off
            continue
    return found


def _crc(file: Path) -> int:
    total = 0
    with file.open("rb") as opened:
        while part := opened.read(1 << 20):
            total = zlib.crc32(part, total)
    return total
