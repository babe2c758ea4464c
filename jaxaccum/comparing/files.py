"""The small files of a comparison: JSON written in one move, and the ends of logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(file: Path, content: Any) -> None:
    """Writes JSON in one move, so that a kill leaves the old file or the new one."""
    fresh = file.with_name(file.name + ".new")
    fresh.write_text(json.dumps(content, indent=1) + "\n")
    fresh.replace(file)


def last_lines(log: Path, number: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-number:])
