"""Where this package keeps what it need not work out again: a folder in the user's cache."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path:
    """$XDG_CACHE_HOME/jaxaccum, or ~/.cache/jaxaccum; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxaccum"
