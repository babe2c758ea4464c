"""The files of a folder and of all below it: links followed once, and what is left out counted."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import NamedTuple

from jaxaccum.data.base import DataError, Findings
from jaxaccum.data.texts import shown_path

MOST_OTHERS = 100_000  # things in a folder that are not wanted, if they are 10 times what is


class Found(NamedTuple):
    """A file, and its name relative to the folder."""

    name: str
    file: Path


def found_files(
    folder: Path,
    report: Findings,
    suffixes: Container[str],
    unit: str,
    belongs: Callable[[Path], bool] = lambda file: False,
) -> Iterator[Found]:
    """Yields the files of a folder and of all below it, sorted by their paths.

    Links to folders are followed, to each folder once, and not to what is read without them.

    Args:
      report: takes what is left out.
      suffixes: of the files, in lower case.
      unit: what they are, in the plural: "images".
      belongs: whether another file belongs to them, and need not be counted.

    Raises:
      DataError: the folder holds far more of something else.
    """
    one = unit.removesuffix("s")
    top = os.path.realpath(folder)
    linked: list[str] = []
    led_to = {top}  # and the real folders that were read through links
    wanted = others = 0
    pending = [("", "", True)]  # name below the folder, real path if behind a link, is a folder
    while pending:
        name, real, is_folder = pending.pop()
        if not is_folder:
            yield Found(name, folder / name)
            continue
        below = []
        for entry in _entries(folder / name, report):
            kind, suffix = _kind(entry), os.path.splitext(entry.name)[1].lower()
            is_wanted = kind == "file" and suffix in suffixes
            others += not is_wanted
            if entry.name.startswith("."):
                if kind == "folder" or is_wanted:
                    report.skip(f"hidden {kind}", entry.path)
            elif kind == "folder":
                target = os.path.join(real, entry.name) if real else ""
                if entry.is_symlink():
                    target = os.path.realpath(entry.path)
                problem = ""
                if entry.is_symlink() and _holds(target, top):
                    problem = "link to a folder around it, a loop"
                elif target in led_to or (entry.is_symlink() and _is_read(target, led_to)):
                    problem = "folder that is read by another path"
                if problem:
                    report.skip(problem, entry.path)
                    continue
                below.append((f"{name}{entry.name}/", target, True))
                if target:
                    led_to.add(target)
                if entry.is_symlink():
                    linked.append(entry.path)
            elif is_wanted:
                wanted += 1
                below.append((f"{name}{entry.name}", "", False))
            elif kind != "file":
                report.skip(kind, entry.path)
            elif not belongs(Path(entry.path)):
                report.skip(f"file that is no {one}", entry.path)
        if others > MOST_OTHERS and others > 10 * wanted:
            raise DataError(
                f"{report.where}: {shown_path(folder)} holds over {MOST_OTHERS:,} things that are "
                f"no {unit}, and {wanted:,} {unit} so far. Name the folder of the {unit} itself.",
                file=str(folder),
            )
        pending.extend(reversed(below))
    if not wanted:
        report.skip(f"folder without {unit}", str(folder))
    if linked:
        report.notes.append(
            f"followed links to {len(linked)} folders: {', '.join(map(shown_path, linked[:3]))}"
            f"{', ...' if len(linked) > 3 else ''}"
        )


def _entries(folder: Path, report: Findings) -> list[os.DirEntry[str]]:
    """What a folder holds, by name; nothing, and counted, if it cannot be read."""
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError:  # not ours to read, or gone since
        report.skip("folder unreadable", str(folder))
        return []


def _kind(entry: os.DirEntry[str]) -> str:
    """`folder`, `file`, or the reason to skip what is neither."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        if not entry.is_symlink() or os.path.exists(entry.path):
            return "pipe or device"
    except OSError:  # a ring of links, or one through what is not ours to read
        pass
    return "link that leads nowhere"


def _holds(folder: str, other: str) -> bool:
    """Whether a real path is a folder's or lies in it."""
    return other == folder or other.startswith(folder.rstrip(os.sep) + os.sep)


def _is_read(target: str, led_to: set[str]) -> bool:
    """Whether a real folder lies in one of these, and is not hidden there."""
    while target not in led_to:
        target, name = os.path.split(target)
        if not name or name.startswith("."):
            return False
    return True
