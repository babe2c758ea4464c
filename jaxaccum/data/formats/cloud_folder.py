"""A plain folder of complete clouds as a data set: no lists, and any number of points."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np

from jaxaccum.data.base import DataError
from jaxaccum.data.cloud_check import Check, points_in
from jaxaccum.data.cloud_models import Model, NormalisedModels, is_text, left_out
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
        return _enough(points_in(file), file)

    def _read_complete(self, index: int) -> Points:
        file = self._models[index].complete
        points = read_cloud(file)
        return points[chosen(_enough(len(points), file), self.name(index))]


def _enough(count: int, file: Path) -> int:
    """The number of points in a file, if they are enough."""
    if count < FEWEST:
        raise DataError(
            f"{shown_path(file)}: {count} points, expected at least {FEWEST}, best {POINTS}. "
            "Sample more of its surface, or take it out.",
            file=str(file),
        )
    return count


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
    folders = _split_folders(root, report)
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
    if top != folders.get("train", top) and os.path.samefile(top, folders["train"]):
        report.notes.append(f"{shown_path(top)} is the folder of the training: a link")
    models = _models(top, report)
    if not models:
        other = " Without it, a tenth of the others is held back." if evaluates else ""
        raise DataError(
            f"{shown_path(top)}: no clouds in it{left_out(report)}. Put some there, or remove the "
            f"folder.{other}",
            file=str(top),
        )
    if any(word in {m.category.lower() for m in models} for word in ("partial", "partials")):
        raise DataError(
            f"{shown_path(top)}: has partial clouds in a folder of their own, and a plain folder "
            "holds complete clouds, which training crops. Give the folder of these; or that of "
            "PCN.json, if this is part of PCN or laid out like it.",
            file=str(top),
        )
    if hold_back:
        models = _held_back(models, evaluates, report, root)
    shapes = FolderShapes("folder", where, models, {}, report, check)
    few = sum(count < POINTS for count in shapes.counts)
    if few:
        report.notes.append(
            f"{few} clouds have fewer than {POINTS} points (the smallest {min(shapes.counts)}), "
            "which count more than once"
        )
    return shapes


def _models(top: Path, report: CloudReport) -> list[Model]:
    """The clouds of a folder, each once, by their paths; a folder in it is a category.

    Raises:
      DataError: two have one name.
    """
    models = list[Model]()
    files, names = set[tuple[int, int]](), dict[tuple[str, str], Path]()
    for found in found_files(top, report, SUFFIXES, "clouds"):
        if not is_text(found.name):
            report.skip("cloud whose name is not UTF-8", shown_path(found.file))
            continue
        first, _, rest = found.name.rpartition("/")[0].partition("/")
        name = found.file.name
        model = Model(first or ONE_CATEGORY, f"{rest}/{name}" if rest else name, found.file)
        # Else one shape could be learned from and be held back for evaluation, too.
        if (file := _number(found.file)) in files:
            report.skip("link to a cloud that is there already", shown_path(found.file))
            continue
        if other := names.get(model[:2]):
            raise DataError(
                f"{shown_path(other)} and {shown_path(found.file)} would both be called "
                f"{model.category}/{model.name}. Rename one of them, or that folder.",
                file=str(found.file),
            )
        names[model[:2]] = found.file
        if file is not None:
            files.add(file)
        models.append(model)
    twins = len(models) - len({_shape(model) for model in models})
    if twins:
        report.notes.append(
            f"{twins} clouds have the name of another one but for its suffix: a shape in two "
            "formats counts twice"
        )
    cases = Counter(category.lower() for category in {m.category for m in models})
    if alike := sorted(word for word, count in cases.items() if count > 1):
        report.notes.append(
            f"categories that differ in upper and lower case alone are different ones: "
            f"{', '.join(map(shown_path, alike[:5]))}"
        )
    return models


def _number(file: Path) -> tuple[int, int] | None:
    """The same for all names of one file; None where the system has no such number."""
    try:
        told = os.stat(file)
    except OSError:  # gone since
        return None
    return (told.st_dev, told.st_ino) if told.st_ino else None


def _shape(model: Model) -> str:
    """The name of a cloud's shape, whatever the format of its file."""
    return f"{model.category}/{os.path.splitext(model.name)[0]}"


def _split_folders(root: Path, report: CloudReport) -> dict[str, Path]:
    """Split -> its folder, of those that are there; what lies beside them is counted.

    Raises:
      DataError: the folder cannot be read, a split has two, or `train` may be a category.
    """
    try:
        entries = sorted(os.listdir(root))
    except OSError as error:
        raise DataError(
            f"{shown_path(root)}: cannot be read: {error.strerror}. Check its rights.",
            file=str(root),
        ) from None
    found = dict[str, Path]()
    for split, words in _FOLDERS.items():
        places = [root / e for e in entries if e.lower() in words and (root / e).is_dir()]
        if len({os.path.realpath(place) for place in places}) > 1:
            raise DataError(
                f"{shown_path(root)}: {' and '.join(place.name for place in places)} are both "
                f"folders of the split {split}. Put their clouds into one.",
                file=str(root),
            )
        if places:
            found[split] = places[0]
            entries = [e for e in entries if root / e not in places]
    if not found:
        return found
    folders = [e for e in entries if not e.startswith(".") and (root / e).is_dir()]
    if found.keys() == {"train"}:
        categories = [e for e in folders if _has_clouds(root / e)]
        if categories:
            raise DataError(
                f"{shown_path(root)}: is {found['train'].name} the folder of what is learned from, "
                f"or a category like {', '.join(map(shown_path, categories[:3]))}? For the first, "
                f"give {shown_path(found['train'])} itself; for the second, put all categories "
                "into a folder train.",
                file=str(root),
            )
    told = f"beside the folders {', '.join(place.name for place in found.values())}"
    for entry in entries:
        if entry in folders:
            report.skip(f"folder {told}", shown_path(root / entry))
        elif os.path.splitext(entry)[1].lower() in SUFFIXES and not entry.startswith("."):
            report.skip(f"cloud {told}", shown_path(root / entry))
    return found


def _has_clouds(folder: Path) -> bool:
    try:
        return is_folder_of_clouds(folder)
    except DataError:  # far too much of something else
        return False


def _held_back(
    models: list[Model], evaluates: bool, report: CloudReport, root: Path
) -> list[Model]:
    """Those for evaluation, or the others; a shape in two formats is on one side."""

    def place(model: Model) -> bytes:
        return hashlib.sha256(_shape(model).encode("utf-8", "surrogatepass")).digest()

    places = sorted({place(model) for model in models})
    if len(places) == 1:
        raise DataError(
            f"{shown_path(root)}: one cloud, expected at least two: one to learn from, one to "
            "evaluate on.",
            file=str(root),
        )
    last = places[-(-len(places) // HELD_BACK) - 1]
    held = sum(place(model) <= last for model in models)
    report.notes.append(
        f"no folder val or test in {shown_path(root)}: {held} of {len(models)} clouds are held "
        "back for evaluation, by a hash of their names"
    )
    return [model for model in models if (place(model) <= last) == evaluates]
