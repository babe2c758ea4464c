"""The folder of a run: what can be one, that one training at a time writes there, why a file cannot
be written, and a name of it for the checkpoint library."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import resource
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxaccum.config import ConfigError
from jaxaccum.data.texts import shown_path

BEAT = 10.0  # seconds between two signs of life of a training
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class WorkdirError(ConfigError):
    """A folder that a run cannot be kept in; the message says why and what to do."""


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Makes the folder, and keeps other trainings out of it for as long as the context lasts.

    The file `lock` says who trains there. The system's lock on it ends with its process, however
    that ends, so a run that was killed can go on at once on the same machine. From another machine
    (a shared file system may not know its lock), and where a file system has no locks, the file's
    signs of life are watched, for four times `BEAT`.

    Raises:
      WorkdirError: another training runs there, or it is no folder to write in.
    """
    made = _make(workdir)
    path = workdir / "lock"
    file = None
    stop = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, stop), name="lock", daemon=True)
    try:
        _require_ours(workdir)
        file = _take(path)
        beating.start()
        yield
    finally:
        stop.set()
        if file is not None:
            if beating.ident:
                beating.join()
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(file)
        for folder in made:  # if nothing was written, nothing is left
            with contextlib.suppress(OSError):
                folder.rmdir()


def _make(workdir: Path) -> list[Path]:
    """Makes a folder; those that were missing, the innermost first."""
    name = shown_path(workdir)
    if "\0" in str(workdir):
        raise WorkdirError(f"--workdir={name}: a path cannot hold a NUL")
    if _ADDRESS.match(str(workdir)) and not Path(workdir.parts[0]).exists():
        raise WorkdirError(
            f"--workdir={name}: that is an address, and a workdir is a folder of this machine. "
            "Give a path; a bucket can be mounted as one."
        )
    try:
        missing = [p for p in (workdir, *workdir.parents) if not os.path.lexists(p)]
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkdirError(f"--workdir={name}: {_why_no_folder(workdir, error)}") from error
    return missing


def _why_no_folder(workdir: Path, error: OSError) -> str:
    for place in (workdir, *workdir.parents):
        if os.path.islink(place) and not place.exists():
            return f"{shown_path(place)} is a link that leads nowhere. Give another path."
        if os.path.lexists(place):
            if not place.is_dir():
                return f"{shown_path(place)} is a file, not a folder. Give another path."
            break
    why, advice = why_not_written(error, workdir)
    return f"cannot make this folder: {why}. {advice}"


def _require_ours(workdir: Path) -> None:
    """Refuses what a run would fail to write into later."""
    for name, folder in (("metrics.jsonl", False), ("last", True), ("best", True)):
        path = workdir / name
        if not os.path.lexists(path):
            continue
        if path.is_dir() != folder or not (folder or path.is_file()):
            kind = "a folder" if folder else "a file"
            raise WorkdirError(
                f"--workdir={shown_path(workdir)}: {name} in it is not {kind}, so it is not of a "
                "run. Give another path, or move it away."
            )
        if not os.access(path, os.W_OK | (os.X_OK if folder else 0)):
            raise WorkdirError(
                f"--workdir={shown_path(workdir)}: no right to write {name} in it. Give yourself "
                "the right, or another path."
            )


def _take(path: Path) -> int:
    """Locks the file and writes down who did; its descriptor."""
    name = shown_path(path.parent)
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            why, advice = why_not_written(error, path.parent)
            raise WorkdirError(f"--workdir={name}: cannot write there: {why}. {advice}") from error
        try:
            held = _lock(file)
            told = _told(path)
            other = held is False
            if not other and told and not (held and told.get("machine") == _machine()):
                other = _lives(path, told)
            if other:
                raise WorkdirError(
                    f"another training runs in {name}: {_who(told)}. Wait for it, or end it, or "
                    "give another --workdir: two would overwrite each other."
                )
            # The one before us may have removed the file while we opened it.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(file).st_ino:
                    facts = {
                        "process": os.getpid(), "host": socket.gethostname(),
                        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"), "machine": _machine(),
                    }  # fmt: skip
                    os.ftruncate(file, 0)
                    os.pwrite(file, json.dumps(facts).encode(), 0)
                    os.fsync(file)
                    return file
        except OSError as error:
            os.close(file)
            why, advice = why_not_written(error, path.parent)
            raise WorkdirError(f"--workdir={name}: cannot write there: {why}. {advice}") from error
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _lock(file: int) -> bool | None:
    """Whether we have the system's lock now; None where the file system knows none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return None
    return True


def _told(path: Path) -> dict[str, Any]:
    """Who locked the file last and did not remove it; {} if nobody, or if it is damaged."""
    try:
        told = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _who(told: dict[str, Any]) -> str:
    if not told:
        return "a process that has not said which"
    return (
        f"process {told.get('process')} on {told.get('host')}, since {told.get('since')} (it says "
        "so in the file lock)"
    )


def _lives(path: Path, told: dict[str, Any]) -> bool:
    """Whether a training gives signs of life; waits for one."""

    def sign() -> int:
        os.close(os.open(path, os.O_RDONLY))  # network file systems ask their server again
        return path.stat().st_mtime_ns

    print(
        f"{shown_path(path)} is of {_who(told)}: waiting {4 * BEAT:g} s to see whether it lives",
        flush=True,
    )
    end = time.monotonic() + 4 * BEAT
    try:
        first = sign()
        while time.monotonic() < end:
            time.sleep(BEAT / 10)
            if sign() != first:
                return True
    except FileNotFoundError:
        return False
    print("no sign of life: it was ended, and this run goes on in its place", flush=True)
    return False


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _machine() -> str:
    """The running kernel, which knows its locks; the host's name alone where it has no id."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def plain_name(folder: Path) -> tuple[Path, int | None]:
    """A name of a folder that the checkpoint library can use, and the open folder it is of, if any.

    The library lists parts of a checkpoint by patterns that begin with the folder's own path, where
    *, ? and [ would be read as such; it takes a colon for an address's, a backslash for a slash,
    and no path that is not text.

    Raises:
      WorkdirError: this system has no other name.
    """
    name = str(folder)
    if not re.search(r"[*?\[:\\\ud800-\udfff]", name) or not folder.is_dir():
        return folder, None
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    other = Path(f"/proc/self/fd/{descriptor}")
    if not other.is_dir():
        os.close(descriptor)
        raise WorkdirError(
            f"{shown_path(folder)}: the checkpoint library takes no *, ?, [, : or \\ in a path. "
            "Give a --workdir without them."
        )
    return other, descriptor


def why_not_written(error: BaseException, folder: Path, size: int | None = None) -> tuple[str, str]:
    """Why a file could not be written, in words, and what to do about it.

    Args:
      error: an OSError, or a library's error that cites the system's words.
      folder: where it was to be.
      size: bytes that were to be written, if known.
    """
    text = str(error)

    def is_a(number: int) -> bool:
        return getattr(error, "errno", None) == number or os.strerror(number) in text

    if is_a(errno.EFBIG):
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        if limit == resource.RLIM_INFINITY:
            return "larger than a file may be there", "Give a --workdir on another file system."
        return (
            f"larger than a file of this process may be ({limit:,} bytes)",
            "Raise that limit (ulimit -f).",
        )
    if is_a(errno.EDQUOT):
        return "the disk quota is used up", _ROOM
    if is_a(errno.ENOSPC):
        return _full(folder, size), _ROOM
    if is_a(errno.EROFS):
        return "the file system is read-only", "Give a --workdir that can be written."
    if is_a(errno.EACCES) or is_a(errno.EPERM) or "PERMISSION_DENIED" in text:
        return "no right to write there", "Give yourself the right, or another --workdir."
    if isinstance(error, OSError) and error.strerror:
        return error.strerror, "Check the path and the disk."
    return (text.splitlines() or [type(error).__name__])[0][:300], "Check the path and the disk."


_ROOM = "Free some space, or lower checkpoint.keep."


def _full(folder: Path, size: int | None) -> str:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    need = "" if size is None else f"{size / 2**20:.1f} MiB needed, "
    files = os.statvfs(folder)
    if files.f_files and not files.f_favail and (size is None or free > size):
        return "the disk has no room for another file (no inodes left)"
    return f"the disk is full ({need}{free / 2**20:.1f} MiB free)"
