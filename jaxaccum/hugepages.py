"""Huge pages for what an update on a CPU computes in, where Linux gives them only when asked.

XLA takes the memory of an update's temporaries anew for each update. In pages of 4 KiB the system
then maps and clears them one by one, on one core, which is a fifth of a small detector's update
(docs/profiles.md). glibc asks for pages of 2 MiB if a variable says so before the process starts.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
SETTING = "glibc.malloc.hugetlb=1"
SINCE = (2, 35)  # of glibc
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def setting(environment: Mapping[str, str], mode: Path = _MODE) -> dict[str, str]:
    """What to add to the environment of a new process, so that its memory comes in huge pages.

    Args:
      environment: the present one.
      mode: Linux's file that says for whom there are huge pages, such as "always [madvise] never".
    Returns:
      A variable and its value, or nothing: where all memory or none comes in huge pages, on other
      systems and libraries, and where the variable decides it already.
    """
    library, version = platform.libc_ver()
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    given = environment.get(VARIABLE, "")
    if library != "glibc" or numbers < SINCE or "glibc.malloc.hugetlb=" in given:
        return {}
    try:
        asked_for = "[madvise]" in mode.read_text()
    except OSError:
        asked_for = False
    return {VARIABLE: f"{given}:{SETTING}" if given else SETTING} if asked_for else {}


def advice() -> list[str]:
    """A line that says how to have huge pages; none where there is nothing to gain."""
    return [
        f"memory comes in small pages here; started with {variable}={value}, updates are up to a "
        "fifth faster (docs/profiles.md)"
        for variable, value in setting(os.environ).items()
    ]
