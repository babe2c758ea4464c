"""Where the images of a COCO json lie."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxaccum.data.base import DataError
from jaxaccum.data.texts import shown_path

_PROBE = 20  # files to look for before a folder is searched for all


def image_folder(names: Sequence[str], file: str, split: str, images: str) -> Path:
    """The folder that the file names of a json are relative to.

    Args:
      names: the file names.
      file: the json.
      split: "train" or "val".
      images: the folder, or one around it; "" guesses.

    Raises:
      DataError: none of them is found.
    """
    candidates = list(dict.fromkeys(_folders(Path(file), split, images)))
    for wanted in (names[:_PROBE], names[_PROBE:]):
        for folder in candidates:
            if any(os.path.isfile(place_of(folder, name)[0]) for name in wanted):
                return folder
    if not names:
        raise DataError(
            f"{shown_path(file)}: every row of `images` has an error in it. Correct them, or "
            f"look at the first with data.on_error='raise'.",
            file=file,
        )
    tried = "\n  ".join(dict.fromkeys(cut(place_of(folder, names[0])[0]) for folder in candidates))
    fix = "Name the folder that file_name is relative to: images=..."
    if os.path.isabs(names[0]):
        fix = "Make file_name relative to the folder of the images: it is an absolute path."
    raise DataError(
        f"{shown_path(file)}: none of its {len(names)} images was found. Tried, for the "
        f"first of them:\n  {tried}\n{fix}",
        file=file,
    )


def cut(path: str, most: int = 300) -> str:
    text = shown_path(path[: most + 1])
    return text if len(text) <= most else f"{text[:most]}..."


def place_of(folder: Path, name: str) -> tuple[str, str]:
    """Where an image of this file name lies, and its name: on Windows \\ separates folders."""
    place = os.path.join(folder, name)
    if "\\" in name and not os.path.isfile(place):
        name = name.replace("\\", "/").lstrip("/")
        place = os.path.join(folder, name)
    # A name that is no Unicode is one of bytes: it opens the file, and is escaped elsewhere.
    return place, name.encode("utf-8", "backslashreplace").decode()


def _folders(file: Path, split: str, images: str) -> Iterator[Path]:
    tags = [file.stem.removeprefix("instances_"), split]
    if images:
        yield from (Path(images, *tag) for tag in ([], [tags[0]], [tags[1]]))
        return
    for base in (file.parent, file.parent.parent):
        yield from (base / "images" / tag for tag in tags)
        yield base / "images"
        yield from (base / tag for tag in tags)
        yield base
