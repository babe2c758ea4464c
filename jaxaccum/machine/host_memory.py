"""How glibc takes memory from Linux, which costs more than one thinks (docs/profiles.md).

XLA takes the memory of an update's temporaries anew for each update on a CPU. In pages of 4 KiB the
system then maps and clears them one by one: up to a third of a small detector's update. glibc asks
for pages of 2 MiB if a variable says so before the process starts: `setting`, `advice`; the verbs
start themselves once more with it: `restart`.

Images come and go, and glibc gives the memory of each back to the system, to take it again for the
next: up to a quarter of the time of making a sample. `keep_freed` has it kept.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
SETTING = "glibc.malloc.hugetlb=1"
SINCE = (2, 35)  # of glibc
KEPT = 256 << 20  # bytes free at the end of a heap before the system has some back
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST_FROM_HEAP = 32 << 20  # the most that mallopt(3) allows
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


def restart(package: str, words: Sequence[str] = tuple(sys.orig_argv)) -> None:
    """Starts this process once more, with huge pages, if it began as a verb of the package.

    Its number, its streams and all that it was told stay. Does nothing where `setting` has nothing
    to add, as in the process that it starts.

    Args:
      words: of the command: PYTHON [OPTIONS] -m PACKAGE[.VERB] ..., or PYTHON .../PACKAGE VERB ...
    """
    added = setting(os.environ)
    own = [i for i, word in enumerate(words) if word.partition(".")[0] == package]
    by_module = any(words[i - 1] == "-m" for i in own if i)
    by_script = len(words) > 1 and Path(words[1]).name == package
    if added and sys.executable and (by_module or by_script):
        os.execve(sys.executable, [sys.executable, *words[1:]], os.environ | added)


def advice() -> list[str]:
    """A line that says how to have huge pages; none where there is nothing to gain."""
    return [
        f"memory comes in small pages here; started with {variable}={value}, updates are up to a "
        "third faster (docs/profiles.md)"
        for variable, value in setting(os.environ).items()
    ]


def keep_freed() -> bool:
    """Has this process keep freed blocks of up to 32 MiB for the next ones; True where it does.

    At most `KEPT` bytes a heap. Larger blocks, such as an update's temporaries, are as they were.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = ((_M_MMAP_THRESHOLD, _LARGEST_FROM_HEAP), (_M_TRIM_THRESHOLD, KEPT))
    return all([bool(mallopt(parameter, value)) for parameter, value in wanted])
