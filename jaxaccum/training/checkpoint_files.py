"""The files of a checkpoint: listed when it is saved, compared with the list when it is read."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

_LIST = "files.json"  # beside a checkpoint's own files: its update, the size and CRC-32 of each
# What damaged files make the checkpoint library raise.
DAMAGE = (OSError, KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError)


class Unreadable(Exception):
    """Files of a checkpoint are missing or damaged; the message says which."""


def write_list(folder: Path, step: int) -> None:
    """Writes down what the checkpoint of an update consists of."""
    paths = [p for item in ("meta", "tree") for p in (folder / item).rglob("*") if p.is_file()]
    files = {str(path.relative_to(folder)): _measure(path) for path in sorted(paths)}
    (folder / _LIST).write_text(json.dumps({"update": step} | files))


def verify(folder: Path, step: int, only: str = "", sizes_only: bool = False) -> bool:
    """Compares a checkpoint's files with their list; False if it is too old to have one.

    Args:
      folder: of the checkpoint. step: the update that it should be of.
      only: the part whose files are looked at, all by default.
      sizes_only: do not read them.
    Raises:
      Unreadable: a file is not as it was written.
      OSError: one cannot be read, though it may be whole.
    """
    try:
        listed = json.loads((folder / _LIST).read_bytes())
        update = listed.pop("update", step)
        listed = {file: (size, crc) for file, (size, crc) in listed.items()}
    except FileNotFoundError:
        return False
    except PermissionError:
        raise
    except DAMAGE as error:
        raise Unreadable(f"{_LIST} is damaged") from error
    if update != step:
        raise Unreadable(f"it is a copy of that of update {update}")
    for file, (size, crc) in listed.items():
        if not file.startswith(only):
            continue
        try:
            found = [(folder / file).stat().st_size, crc]
            if found[0] == size and not sizes_only:
                found = _measure(folder / file)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise Unreadable(f"{file} is missing") from error
        if found[0] != size:
            raise Unreadable(f"{file} has {found[0]} bytes of {size}")
        if found[1] != crc:
            raise Unreadable(f"{file} does not hold what was written")
    return True


def _measure(path: Path) -> list[int]:
    """[bytes, CRC-32] of a file."""
    size, crc = 0, 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return [size, crc]
