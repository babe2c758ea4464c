"""XLA flags without which a version of jaxlib computes wrong numbers.

Importing the package sets them, since XLA reads its flags once, when the first backend starts. XLA
ends the process at a flag it does not know, so each is set for the versions that need it, and no
others.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, MutableMapping
from pathlib import Path

import jaxlib

# JAX issue 39103: a matrix times each of 32,769 vectors, squared and summed, has one wrong row on
# CPUs. jaxlib 0.10.0, 0.10.1, 0.11.0 to 0.11.2 and 0.12.0.1 know the flag and are right without.
NEEDED = {"0.10.2": "--xla_cpu_experimental_ynn_fusion_type=-reduce"}


def set_needed(environment: MutableMapping[str, str], version: str = jaxlib.__version__) -> None:
    """Adds to XLA_FLAGS what a version of jaxlib needs. What is in it stays, also another value of
    the same flag.
    """
    flag = NEEDED.get(version)
    if flag is None:
        return
    given = _given(environment)
    if flag.partition("=")[0] in given:
        return
    bridge = sys.modules.get("jax._src.xla_bridge")
    if bridge is not None and bridge.backends_are_initialized():
        warnings.warn(
            f"jaxlib {version} computes wrong numbers on CPUs without XLA_FLAGS={flag} (JAX issue "
            "39103), and JAX was in use before jaxaccum could set it: import jaxaccum first, or "
            "set it in the environment",
            stacklevel=3,
        )
        return
    environment["XLA_FLAGS"] = f"{given.strip()} {flag}".strip()


def note(version: str = jaxlib.__version__) -> str | None:
    """What a user should know of the flags of this process; None where none are needed."""
    flag = NEEDED.get(version)
    if flag is None:
        return None
    why = f"jaxlib {version} computes wrong numbers on CPUs (JAX issue 39103)"
    given = _given(os.environ)
    if flag in given.split():
        return f"{why}: XLA runs with {flag}, which mends it"
    return f"{why} without {flag}, but XLA_FLAGS is left as it was given: {given!r}"


def _given(environment: Mapping[str, str]) -> str:
    """The flags in XLA_FLAGS, or in the file that it names if it does not begin with a dash."""
    given = environment.get("XLA_FLAGS", "")
    if not given.strip() or given.lstrip().startswith("-"):
        return given
    return Path(given).read_text() if Path(given).is_file() else ""
