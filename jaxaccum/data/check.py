"""One pass over the images of a data set before anything is learned from it: decodes each once.

What was found is kept in the user's cache by path, size and time of modification, so that an
unchanged set costs nothing the next time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import cv2

from jaxaccum.data.base import DataError
from jaxaccum.data.images import FileSource
from jaxaccum.data.one_pass import on_all_cores
from jaxaccum.data.stamps import Stamps, signature_of, stamp
from jaxaccum.data.stream import suit_process
from jaxaccum.machine import user_cache

SKIPPED = "image that cannot be decoded"
_RULES = 1  # of what is decodable; another number makes what is known be found out again
_LARGE = 1 << 24  # pixels; images of more are decoded one at a time, or memory would be short
_SHOWN = 5  # errors in a message

AnySource = TypeVar("AnySource")


def checked(source: AnySource, on_error: str) -> AnySource:
    """A source whose every image is known to decode.

    Only images in files are looked at: those of packed sets were decoded when packing, and TFDS
    keeps checksums of its records.

    Args:
      source: any; images that do not decode are dropped from it and counted in its report, before
        its identity is used.
      on_error: "raise" refuses the data set; "skip" drops.

    Raises:
      DataError: images do not decode and on_error is "raise"; or none is left.
    """
    if not isinstance(source, FileSource):
        return source
    broken = _broken(source)
    if broken and on_error != "skip":
        raise _refusal(source, broken)
    if broken:
        for index in broken:
            source.report.skip(SKIPPED, source.file(index))
        source.keep([i for i in range(len(source)) if i not in broken])
    return source


def signature(source: Any) -> str | None:
    """What tells whether the files of a data set are still the same: "N files, SIZES, TIMES", the
    latter two hashes of their sizes and times of modification when the source was opened; None
    for what does not lie in files of its own."""
    stamps: Stamps = getattr(source, "stamps", {})
    return signature_of(stamps.values()) if stamps else None


def changed_since(before: str, now: str) -> str | None:
    """What to say if the signature of a data set was another before; None if it was not."""
    if before == now:
        return None
    if before.split(", ")[0] != now.split(", ")[0]:
        return (
            f"lies in {now.split(', ')[0]}, and when the run was saved in {before.split(', ')[0]}: "
            "packed, or no longer; whether the samples are the same cannot be seen"
        )
    if before.split(", ")[:2] == now.split(", ")[:2]:
        return (
            "files have other times of modification than when the run was saved, though the same "
            "sizes: copied, or changed"
        )
    return "files have changed since the run was saved: what is learned from here on is of others"


def changed_files(source: Any) -> list[str]:
    """Files that are no longer as they were when the source was opened; one look at each."""
    stamps: Stamps = getattr(source, "stamps", {})
    return [file for file, known in stamps.items() if stamp(file) != known]


def _broken(source: FileSource) -> dict[int, str]:
    """Index -> what is wrong, of the images that do not decode."""
    files = [os.path.abspath(source.file(i)) for i in range(len(source))]
    root = os.path.commonpath([os.path.dirname(file) for file in files])
    names = [file.removeprefix(root).lstrip(os.sep) for file in files]
    place = _place(root, source.report.where)
    known = _load(place)
    found: dict[str, list[Any]] = {}  # name -> size, time, and what is wrong or ""
    broken: dict[int, str] = {}
    unknown = []
    for index, name in enumerate(names):
        entry = known.get(name)
        if entry is None or tuple(entry[:2]) != source.header(index).stamp:
            unknown.append(index)
            continue
        found[name] = entry
        if entry[2]:
            broken[index] = entry[2]
    if not unknown:
        return broken
    try:
        for index, wrong, lasting in _examined(source, unknown):
            if wrong:
                broken[index] = wrong
            if lasting:
                found[names[index]] = [*source.header(index).stamp, wrong]
    finally:  # what an interrupted pass has found out need not be found out again
        _save(place, found)
    return dict(sorted(broken.items()))


def _examined(source: FileSource, indices: Sequence[int]) -> Iterator[tuple[int, str, bool]]:
    """Decodes images on all cores.

    Returns:
      Index, what is wrong or "", and whether that is the file's fault and not the disk's.
    """
    large = threading.Lock()

    def examine(index: int) -> tuple[int, str, bool]:
        return (index, *_decodes(source, index, large))

    suit_process()
    return on_all_cores(indices, examine, unit="images", told="decoding every image once")


def _decodes(source: FileSource, index: int, large: threading.Lock) -> tuple[str, bool]:
    height, width = source.header(index).size
    try:
        with large if height * width > _LARGE else contextlib.nullcontext():
            source.image(index, strict=True)
    except DataError as error:
        return str(error), getattr(error.__cause__, "errno", None) is None
    return "", True


def _refusal(source: FileSource, broken: Mapping[int, str]) -> DataError:
    first = next(iter(broken))
    if len(broken) == 1:
        text = broken[first]
    else:
        shown = list(broken.values())[:_SHOWN]
        more = f"\n  and {len(broken) - len(shown)} more" if len(broken) > len(shown) else ""
        text = (
            f"{source.report.where}: {len(broken)} of {len(source)} images cannot be decoded:\n  "
            + "\n  ".join(shown)
            + more
        )
    return DataError(
        f"{text}\nTo leave such images out, set data.on_error=skip.", file=source.file(first)
    )


def _place(root: str, where: str) -> Path:
    """Where is kept what is known of a data set."""
    key = hashlib.sha256(f"{root}\0{where}".encode("utf-8", "surrogateescape")).hexdigest()
    return user_cache.folder() / "images" / f"{key[:24]}.json"


def _decoders() -> str:
    """What decided whether an image decodes."""
    return f"rules {_RULES}, OpenCV {cv2.__version__}"


def _load(place: Path) -> dict[str, list[Any]]:
    """What is known of a data set: name -> [size, time, what is wrong or ""]. A file that is
    missing, damaged or of other decoders tells nothing."""
    try:
        checksum, _, text = place.read_bytes().partition(b"\n")
        if hashlib.sha256(text).hexdigest().encode() != checksum:
            return {}
        content = json.loads(text)
        return dict(content["files"]) if content["decoders"] == _decoders() else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _save(place: Path, files: Mapping[str, list[Any]]) -> None:
    """Writes the file in one move. Where that cannot be, the next start has to look again."""
    text = json.dumps({"decoders": _decoders(), "files": files}).encode()
    with contextlib.suppress(OSError):
        user_cache.write(place, hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
