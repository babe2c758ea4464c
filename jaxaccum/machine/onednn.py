"""Convolutions of CPU programs by oneDNN where it is installed; nothing but time depends on it.

XLA's own convolutions, and most of all their gradients, reach a fraction of what a CPU can do
(docs/profiles.md). oneDNN (Apache-2.0) has each of the three as a primitive. Its library comes as
a package of its own, `pip install onednn-cpu-gomp`; `onednn.cc` makes its primitives operations of
XLA and is compiled once for a machine, with the C++ compiler that is there.

JAXACCUM_ONEDNN=off leaves it alone; JAXACCUM_ONEDNN=/path/to/libdnnl.so.3 takes another build of
version 3, one that divides its work by OpenMP.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np

from jaxaccum.machine import user_cache

PACKAGE = "onednn-cpu-gomp"
VARIABLE = "JAXACCUM_ONEDNN"
OFF = "off"
SOURCE = Path(__file__).with_name("onednn.cc")
_COMPILERS = ("c++", "g++", "clang++")
_COMPILE_SECONDS = 300
_OPERATIONS = ("forward", "data", "kernel")
_PIECES = 0  # that a convolution is cut into; 0 for one to a thread, or one in all if it is small

_wanted = jax.make_user_context(default_value=True)  # what was traced is remembered with it
_lock = threading.Lock()


class UnusableError(Exception):
    """The library is here and cannot be used; the message says why."""


def version() -> str:
    """The version of the library that convolutions on CPUs are computed by; "" if by XLA."""
    return _opened()[0]


def note() -> str | None:
    """What a user should know of it; None where there is nothing to say."""
    found, why_not = _opened()
    if found:
        return f"convolutions are computed by oneDNN {found}"
    if why_not:
        return f"oneDNN is here and not used: {why_not}"
    if _is_offered():
        return (
            f"convolutions are computed by XLA; with oneDNN (pip install {PACKAGE}) updates of "
            "detectors are up to a third faster (docs/profiles.md)"
        )
    return None


@contextlib.contextmanager
def without() -> Iterator[None]:
    """Programs that are traced within have none of it: they go elsewhere, or are to be counted."""
    with _wanted(False):
        yield


def takes(x: Any, w: Any, strides: Sequence[int]) -> bool:
    """Whether a convolution on a CPU is one for the library.

    Args:
      x: (N, H, W, C). w: (kh, kw, C // groups, features). Arrays or shapes.
      strides: of the two axes; a kernel shorter than its stride is left to XLA.
    """
    if not (x.dtype == w.dtype == np.float32 and _wanted.value):
        return False
    fits = all(k >= s for k, s in zip(w.shape[:2], strides, strict=True))
    return fits and all(n > 0 for n in (*x.shape, *w.shape)) and bool(version())


def forward(like, x, w, strides, pads, groups):
    """A convolution; `like` has the result's shape, and type of axes under `jax.shard_map`."""
    return _call("forward", like, x, w, strides, pads, groups)


def gradients(like, x, w, dy, strides, pads, groups):
    """Gradients of a convolution's input and kernel, `like` those two."""
    return (
        _call("data", like[0], dy, w, strides, pads, groups),
        _call("kernel", like[1], x, dy, strides, pads, groups),
    )


def _call(operation, like, a, b, strides, pads, groups):
    compute = jax.ffi.ffi_call(_target(operation), like, vmap_method="sequential")
    return compute(
        a, b, strides=np.asarray(strides, np.int64), pads=np.asarray(pads, np.int64).ravel(),
        groups=np.int64(groups), pieces=np.int64(_PIECES),
    )  # fmt: skip


def _target(operation: str) -> str:
    return f"jaxaccum_onednn_{operation}"


def _is_offered() -> bool:
    """Whether the package exists for this machine."""
    return platform.system() == "Linux" and platform.machine() == "x86_64"


def _opened() -> tuple[str, str]:
    """(version, ""), or ("", why the library that is here is not used, or "" if none is here)."""
    with _lock:
        return _open_once()


@functools.cache
def _open_once() -> tuple[str, str]:
    try:
        library = _library()
        return ("", "") if library is None else (_open(library), "")
    except UnusableError as error:
        return "", str(error)


def _library() -> Path | None:
    """The library's file; None where it is not installed or not wanted."""
    given = os.environ.get(VARIABLE, "")
    if given == OFF:
        return None
    if given:
        if not Path(given).is_file():
            raise UnusableError(f"{VARIABLE}={given}: no such file; give a file or {OFF!r}")
        return Path(given)
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == "libdnnl.so.3":
            return Path(str(file.locate())).resolve()
    raise UnusableError(f"the package {PACKAGE} has no libdnnl.so.3: install it anew")


def _open(library: Path) -> str:
    """Makes the library's primitives operations of XLA; its version."""
    adapter = _adapter()
    adapter.jaxaccum_onednn_open.argtypes = [ctypes.c_char_p]
    adapter.jaxaccum_onednn_open.restype = ctypes.c_char_p
    if wrong := adapter.jaxaccum_onednn_open(os.fsencode(library)):
        raise UnusableError(f"{library}: {wrong.decode(errors='replace')}")
    for operation in _OPERATIONS:
        name = _target(operation)
        handler = jax.ffi.pycapsule(getattr(adapter, name))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    number = adapter.jaxaccum_onednn_version()
    return f"{number // 1_000_000}.{number // 1_000 % 1_000}.{number % 1_000}"


def _adapter() -> ctypes.CDLL:
    """The compiled adapter, made now if it is not in the user's cache."""
    parts = (SOURCE.read_bytes(), jaxlib.__version__.encode(), platform.machine().encode())
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:32] + ".so"
    kept = user_cache.folder() / "onednn" / name
    with contextlib.suppress(OSError):  # none yet, or a damaged one
        return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / name
        _compile(made)
        with contextlib.suppress(OSError):
            user_cache.write(kept, made.read_bytes())
        try:
            return ctypes.CDLL(str(made))  # it stays mapped when its file is gone
        except OSError as error:
            raise UnusableError(
                f"what was compiled from {SOURCE} does not load: {error}"
            ) from error


def _compile(target: Path) -> None:
    from jaxaccum.machine.waiting import waiting  # models are read without what it needs

    names = [os.environ["CXX"]] if os.environ.get("CXX") else _COMPILERS
    compiler = next((path for name in names if (path := shutil.which(name))), None)
    if compiler is None:
        raise UnusableError(
            f"it takes a C++ compiler once, and there is no {' or '.join(names)} on the PATH "
            f"(Debian, Ubuntu: apt install g++); {VARIABLE}={OFF} does without, and says nothing"
        )
    command = [
        compiler, "-std=c++17", "-O2", "-fPIC", "-shared", f"-I{jax.ffi.include_dir()}",
        str(SOURCE), "-o", str(target), "-ldl",
    ]  # fmt: skip
    with waiting("compiling the way to oneDNN (once for a machine and jaxlib)"):
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                errors="replace", timeout=_COMPILE_SECONDS,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UnusableError(f"{compiler} does not run: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise UnusableError(f"{compiler} cannot compile {SOURCE}: {lines[0].strip()}")
