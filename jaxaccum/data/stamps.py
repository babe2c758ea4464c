"""What tells a file from what it was: its size and time of modification."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

Stamp = tuple[int, int]  # size in bytes, time of modification in ns
Stamps = Mapping[str, Stamp | None]  # of files as they were when their source was opened


def stamp(file: str | Path) -> Stamp | None:
    """Size and time of a file; None if there is no such file."""
    try:
        told = os.stat(file)
    except (OSError, ValueError):
        return None
    return told.st_size, told.st_mtime_ns


def signature_of(stamps: Iterable[Stamp | None]) -> str:
    """The signature of files of these sizes and times: "N files, SIZES, TIMES", two hashes."""
    listed = [one or (-1, -1) for one in stamps]
    hashes = (hashlib.sha256(repr([s[i] for s in listed]).encode()).hexdigest() for i in (0, 1))
    return ", ".join([f"{len(listed)} files", *(text[:12] for text in hashes)])
