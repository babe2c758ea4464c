"""Where this package keeps what it need not work out again: a folder in the user's cache.

Whatever is kept there is written in one move, so that another process reads all of it or nothing,
and a file that is damaged or cannot be written costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Any


def folder() -> Path:
    """$XDG_CACHE_HOME/jaxaccum, or ~/.cache/jaxaccum; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxaccum"


def write(file: Path, content: bytes | memoryview) -> None:
    """Replaces a file in one move, with the rights that new files get; of two writers at once the
    last one stays.

    Raises:
      OSError: it cannot be written; nothing is left of the attempt.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.{secrets.token_hex(4)}.new")
    try:
        new.write_bytes(content)
        os.replace(new, file)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def load(file: Path) -> Any:
    """The JSON of a file; None where there is no file or what it holds is no JSON."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def load_dict(file: Path) -> dict[str, Any]:
    """The JSON object of a file; {} where there is none."""
    found = load(file)
    return found if isinstance(found, dict) else {}


def save(file: Path, content: Any) -> None:
    """Writes JSON where it can be written; elsewhere nothing is kept."""
    with contextlib.suppress(OSError):
        write(file, json.dumps(content, indent=1).encode() + b"\n")
