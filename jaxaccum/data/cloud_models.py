"""Shapes on disk, whatever the layout of their data set: their files, categories and identity."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxaccum.data.base import DataError, Findings
from jaxaccum.data.cloud_check import Check, points_in
from jaxaccum.data.cloud_ops import unit_pose
from jaxaccum.data.clouds import CloudReport
from jaxaccum.data.formats.cloud_files import SUFFIXES, Points, read_cloud
from jaxaccum.data.stamps import Stamps
from jaxaccum.data.texts import read_json, shown, shown_path


class Model(NamedTuple):
    """The files of one shape.

    Attributes:
      category: its id in the data set.
      name: of the shape.
      complete: the complete cloud.
      partials: the folder of its partial clouds; None if they are cropped from the complete one.
      views: their files, by viewpoint.
    """

    category: str
    name: str
    complete: Path
    partials: Path | None = None
    views: tuple[str, ...] = ()


class Models:
    """Shapes on disk: what the kinds of data sets share.

    Attributes:
      names, identity, report, points: as of a `CloudSource`.
      stamps: of the files that were checked, see `Check`.
      counts: points in the file of every complete cloud, where these were checked.
      points_of_all: of every cloud, by the kind of set; 0: all files must have as many.
    """

    points_of_all = 0

    def __init__(
        self, kind: str, where: str, models: Sequence[Model], names: dict[str, str],
        report: CloudReport, check: Check | None = None,
    ) -> None:  # fmt: skip
        """Counts and identifies the shapes.

        Args:
          kind: of the data set; part of its identity.
          where: the data set and split, for messages.
          models: the shapes, of which those without a file are left out and reported.
          names: category id -> name.
          report: takes what is left out.
          check: of the files' content; None reads but one cloud.

        Raises:
          DataError: no shape is left, or a file cannot be used.
        """
        digest = hashlib.sha256(kind.encode())
        found = list[tuple[Model, int]]()
        for model in models:
            size = file_size(model.complete)
            if size is None:
                model = model._replace(complete=any_case(model.complete))
                size = file_size(model.complete)
            if size is None:
                report.skip("listed shape without its complete cloud", shown_path(model.complete))
            else:
                found.append((model, size))
        self.stamps: Stamps = {}
        self.counts: list[int] = []
        points, result = None, None
        if check is not None and found:
            result = check.run(
                where, [files_of(model) for model, _ in found], self.points_in,
                equal=not self.points_of_all,
            )  # fmt: skip
            self.stamps, points = result.stamps, result.points
            found = [
                (kept, size)
                for (model, size), views in zip(found, result.usable(report), strict=True)
                if (kept := _with_views(model, views)) is not None
            ]
        if not found:
            looked = f"; looked for {shown_path(models[0].complete)} and so on" if models else ""
            raise DataError(f"{where}: no shapes{looked}{left_out(report)}.")
        for model, size in found:
            views = " ".join(model.views)
            told = f"\0{model.category}\0{model.name}\0{size}\0{views}"
            digest.update(told.encode("utf-8", "surrogatepass"))
        self._models = [model for model, _ in found]
        if result is not None:
            self.counts = [result.counts[model.complete] for model in self._models]
        ids = sorted({model.category for model in self._models})
        words = Counter(names.get(i, i) for i in ids)
        # Two ids of one name stay two categories.
        self.names = tuple(
            names.get(i, i) if words[names.get(i, i)] == 1 else f"{names[i]} {i}" for i in ids
        )
        digest.update("\0".join(self.names).encode("utf-8", "surrogatepass"))
        self.identity = digest.hexdigest()[:12]
        self._categories = {i: number for number, i in enumerate(ids)}
        counts = Counter(self.category(i) for i in range(len(self._models)))
        report.shapes = {self.names[c]: counts[c] for c in sorted(counts)}
        report.samples = len(self._models)
        self.report = report
        self._first = self._models[0].complete
        self.points = self.points_of_all or points or len(read_cloud(self._first))

    def points_in(self, file: Path) -> int:
        """The number of points in a file.

        Raises:
          DataError: it cannot be used.
        """
        return points_in(file)

    def __len__(self) -> int:
        return len(self._models)

    def category(self, index: int) -> int:
        """The category of shape `index`."""
        return self._categories[self._models[index].category]

    def name(self, index: int) -> str:
        """CATEGORY/NAME, of the data set."""
        return f"{self._models[index].category}/{self._models[index].name}"

    def _read_complete(self, index: int) -> Points:
        file = self._models[index].complete
        points = read_cloud(file)
        if len(points) != self.points:
            raise DataError(
                f"{shown_path(file)}: {len(points)} points, but {shown_path(self._first)} has "
                f"{self.points}. Sample all complete clouds of a data set to the same number of "
                "points.",
                file=str(file),
            )
        return points


class NormalisedModels(Models):
    """Complete clouds in ShapeNet-55's frame. Implements `Complete`."""

    def complete(self, index: int) -> Points:
        """(points, 3), the mean at the origin, the farthest point at distance 1."""
        points = self._read_complete(index)
        return unit_pose(points).apply(points)

    def caption(self, index: int) -> str | None:
        """None: ShapeNet says nothing."""
        del index
        return None


class PairedModels(Models):
    """Partial and complete clouds on disk. Implements `Paired`."""

    def complete(self, index: int) -> Points:
        """The complete (P, 3) cloud of shape `index`."""
        return self._read_complete(index)

    def views(self, index: int) -> int:
        """Partial clouds of shape `index`."""
        return len(self._models[index].views)

    def partial(self, index: int, view: int) -> Points:
        """(n, 3), partial cloud `view` of shape `index`."""
        model = self._models[index]
        assert model.partials is not None
        return read_cloud(model.partials / model.views[view])


def files_of(model: Model) -> list[Path]:
    """The files of a shape, the complete cloud first."""
    folder = model.partials
    return [model.complete, *([folder / view for view in model.views] if folder else [])]


def _with_views(model: Model, usable: Sequence[bool]) -> Model | None:
    """A shape with the files of `files_of` that are usable; None if too few are."""
    if not usable[0]:
        return None
    views = tuple(v for v, good in zip(model.views, usable[1:], strict=True) if good)
    return model._replace(views=views) if views or model.partials is None else None


def file_size(file: Path) -> int | None:
    """Bytes of a file; None if there is none, or its name is none that the system knows."""
    try:
        return os.stat(file).st_size
    except (OSError, ValueError):
        return None


def left_out(report: Findings, examples: int = 2) -> str:
    """What was left out and why, for the message that nothing is left."""
    told = [
        f"{len(places)} x {reason} ({', '.join(file for file, _ in places[:examples])}"
        f"{', ...' if len(places) > examples else ''})"
        for reason, places in report.skipped.items()
    ]
    return f"; skipped {'; '.join(told)}" if told else ""


def folder_content(folder: Path) -> str:
    """The first few names in a folder, for messages."""
    try:
        names = sorted(shown_path(entry.name) for entry in folder.iterdir())
    except OSError as error:
        return f"nothing that can be read ({error.strerror})"
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"


def read_categories(file: Path, split: str) -> list[dict[str, Any]]:
    """The categories of an index: each with taxonomy_id, taxonomy_name and names in `split`.

    Raises:
      DataError: names the category and the field.
    """
    found = read_json(file)

    def refuse(what: str) -> DataError:
        return DataError(
            f"{shown_path(file)}: expected a json list of categories, each with taxonomy_id, "
            f"taxonomy_name and the names of its shapes in {split!r}; {what}. Correct it, or get "
            "the file again.",
            file=str(file),
        )

    if not isinstance(found, list):
        raise refuse(f"it is {shown(found)}")
    for number, category in enumerate(found):
        where = f"category {number} (counted from 0)"
        if not isinstance(category, dict):
            raise refuse(f"{where} is {shown(category)}")
        for key in ("taxonomy_id", "taxonomy_name"):
            if not isinstance(category.get(key), str) or not is_text(category[key]):
                raise refuse(f"{where}: {key} is {shown(category.get(key))}, no text")
        names = category.get(split)
        if not isinstance(names, list):
            raise refuse(f"{where}: {split} is {shown(names)}, no list")
        for place, name in enumerate(names):
            if not isinstance(name, str) or not _is_name(name):
                raise refuse(f"{where}: {split}[{place}] is {shown(name)}, no name of a file")
        if not _is_name(category["taxonomy_id"]):
            raise refuse(f"{where}: taxonomy_id is {shown(category['taxonomy_id'])}, no name")
    return found


def _is_name(text: str) -> bool:
    return text not in ("", ".", "..") and not re.search(r"[/\0]", text) and is_text(text)


def is_text(text: str) -> bool:
    """Whether it can be written; halves of characters that JSON can spell cannot."""
    return not re.search("[\ud800-\udfff]", text)


def any_case(file: Path) -> Path:
    """The file, or where there is none the one with its suffix in upper case, if there is one."""
    upper = file.with_suffix(file.suffix.upper())
    return upper if file_size(file) is None and file_size(upper) is not None else file


def viewpoints(folder: Path, split: str, report: Findings) -> tuple[str, ...]:
    """The partial clouds in a folder, by the number that is their name; of evaluation number 0.

    Args:
      folder: of one shape.
      split: "train", or any other for evaluation.
      report: takes clouds of other names, and the shape if none is left.
    """
    place = shown_path(folder)
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        names = []
    except OSError as error:  # not ours to read
        report.skip(f"listed shape whose partial clouds cannot be read ({error.strerror})", place)
        return ()
    numbered, others = [], 0
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() == ".pcd" and re.fullmatch("[0-9]+", stem):
            # The same few names for tens of thousands of shapes.
            numbered.append((int(stem), sys.intern(name)))
        elif suffix.lower() in SUFFIXES and not name.startswith("."):
            report.skip("partial cloud whose name is not NUMBER.pcd", shown_path(folder / name))
            others += 1
    views = [(n, name) for n, name in sorted(numbered) if split == "train" or n == 0]
    if numbered and not views:
        report.skip("listed shape without its partial cloud 0, the one for evaluation", place)
    elif not views:
        named = f", but {others} of other names" if others else ""
        report.skip(f"listed shape without a partial cloud{named}", place)
    return tuple(name for _, name in views)
