"""A plain folder of complete clouds as a data set: no lists, and any number of points."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from jaxaccum.data.base import DataError
from jaxaccum.data.cloud_check import Check, points_in
from jaxaccum.data.cloud_models import Model, NormalisedModels
from jaxaccum.data.clouds import CloudReport
from jaxaccum.data.formats.cloud_files import SUFFIXES, Points, read_cloud
from jaxaccum.data.texts import shown_path
from jaxaccum.data.walking import found_files

POINTS = 8192  # of a complete cloud, as in ShapeNet-55
FEWEST = 256  # points in a file; of fewer there is no shape to complete
HELD_BACK = 10  # one cloud of so many is for evaluation, where no folder says which
ONE_CATEGORY = "shape"
_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


class FolderShapes(NormalisedModels):
    """The clouds of a folder, each with `POINTS` of its points. Implements `Complete`."""

    points_of_all = POINTS

    def points_in(self, file: Path) -> int:
        """The number of points in a file.

        Raises:
          DataError: it cannot be read, or has too few.
        """
        count = points_in(file)
        if count < FEWEST:
            raise DataError(
                f"{shown_path(file)}: {count} points, expected at least {FEWEST}, best {POINTS}. "
                "Sample more of its surface, or take it out.",
                file=str(file),
            )
        return count

    def _read_complete(self, index: int) -> Points:
        points = read_cloud(self._models[index].complete)
        return points[chosen(len(points), self.name(index))]


def chosen(count: int, name: str) -> np.ndarray:
    """(POINTS,) which of a cloud's points stand for it, the same whenever it is read: a random part
    of more, all of fewer as often as needed and a random part once more.

    Args:
      count: of its points.
      name: of the cloud.
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
    more = np.sort(rng.choice(count, POINTS % count if count <= POINTS else POINTS, replace=False))
    return np.concatenate([np.tile(np.arange(count), POINTS // count), more])


def is_folder_of_clouds(root: Path) -> bool:
    """Whether there is a cloud in a folder or somewhere below it."""
    return (
        next(found_files(root, CloudReport(shown_path(root)), SUFFIXES, "clouds"), None) is not None
    )


def open_folder(root: Path, split: str, check: Check | None) -> FolderShapes:
    """The clouds of one split.

    Those in a folder `train`, `val` or `test` are of that split; of `val` and `test` one stands for
    the other. Where there are no such folders, or `train` alone, every tenth cloud by a hash of its
    name is held back. A folder below is a category.

    Args:
      root: the folder.
      split: "train", "val" or "test".
      check: of the files' content.

    Raises:
      DataError: they cannot be used.
    """
    where = f"{shown_path(root)} ({split})"
    report = CloudReport(where)
    if split == "unseen":
        raise DataError(f"{where}: a folder of clouds has no unseen categories. Use train or val.")
    folders = _split_folders(root)
    evaluates = split != "train"
    order = [split, "val", "test"] if evaluates else ["train"]
    there = [folders[name] for name in order if name in folders]
    if folders and "train" not in folders:
        raise DataError(
            f"{shown_path(root)}: has a folder {next(iter(folders.values())).name} and none for "
            "training. Call that train.",
            file=str(root),
        )
    hold_back = not any(name in folders for name in ("val", "test"))
    top = there[0] if there else folders.get("train", root)
    models = []
    for found in found_files(top, report, SUFFIXES, "clouds"):
        category, _, name = found.name.rpartition("/")
        first, _, rest = category.partition("/")
        models.append(
            Model(first or ONE_CATEGORY, f"{rest}/{name}" if rest else name, found.file)
        )  # fmt: skip
    if any(word in {m.category.lower() for m in models} for word in ("partial", "partials")):
        raise DataError(
            f"{shown_path(top)}: has partial clouds in a folder of their own, and a plain folder "
            "holds complete clouds, which training crops. Give the folder of these; or that of "
            "PCN.json, if this is part of PCN or laid out like it.",
            file=str(top),
        )
    if hold_back:
        models = _held_back(models, evaluates, report, top)
    shapes = FolderShapes("folder", where, models, {}, report, check)
    few = sum(count < POINTS for count in shapes.counts)
    if few:
        report.notes.append(
            f"{few} clouds have fewer than {POINTS} points (the smallest {min(shapes.counts)}), "
            "which count more than once"
        )
    return shapes


def _split_folders(root: Path) -> dict[str, Path]:
    """Split -> its folder, of those that are there.

    Raises:
      DataError: the folder cannot be read.
    """
    try:
        names = {name.lower(): name for name in sorted(os.listdir(root), reverse=True)}
    except OSError as error:
        raise DataError(
            f"{shown_path(root)}: cannot be read: {error.strerror}. Check its rights.",
            file=str(root),
        ) from None
    return {
        split: root / names[word]
        for split, words in _FOLDERS.items()
        for word in reversed(words)
        if word in names and (root / names[word]).is_dir()
    }


def _held_back(models: list[Model], evaluates: bool, report: CloudReport, top: Path) -> list[Model]:
    """Those for evaluation, or the others."""
    if len(models) == 1:
        raise DataError(
            f"{shown_path(top)}: one cloud, expected at least two: one to learn from, one to "
            "evaluate on.",
            file=str(top),
        )

    def place(model: Model) -> bytes:
        name = f"{model.category}/{model.name}".encode("utf-8", "surrogatepass")
        return hashlib.sha256(name).digest()

    count = -(-len(models) // HELD_BACK)
    last = sorted(map(place, models))[:count]
    report.notes.append(
        f"no folder val or test in {shown_path(top)}: {count} of {len(models)} clouds are held "
        "back for evaluation, by a hash of their names"
    )
    return [model for model in models if (place(model) in last) == evaluates]
