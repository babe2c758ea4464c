"""A data set of images seen in another way: a part of it, or all its classes as one."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxaccum.data.base import Image, Objects, Report, Source
from jaxaccum.data.rectangles import size_of

ONE_CLASS = "object"


@dataclasses.dataclass(frozen=True)
class View:
    """Some images of a source, in its order; a source itself.

    Attributes:
      source: the whole.
      kept: (images,) indices in it.
      names: of the classes. If there is one, every object is of it.
    """

    source: Source
    kept: np.ndarray
    names: tuple[str, ...]

    @property
    def identity(self) -> str:
        """That of the whole: which part is seen, and how, are fields of the recipe."""
        return self.source.identity

    @property
    def report(self) -> Report:
        return self.source.report

    @property
    def stamps(self) -> Any:
        """Of the files of the whole, see jaxaccum/data/stamps.py."""
        return getattr(self.source, "stamps", {})

    def __len__(self) -> int:
        return len(self.kept)

    def image(self, index: int) -> Image:
        """(H, W, 3) uint8 RGB."""
        return self.source.image(int(self.kept[index]))

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of image `index` in pixels."""
        return size_of(self.source, int(self.kept[index]))

    def objects(self, index: int) -> Objects:
        """The labelled objects of image `index`."""
        found = self.source.objects(int(self.kept[index]))
        if len(self.names) > 1:
            return found
        return dataclasses.replace(found, classes=np.zeros_like(found.classes))

    def name(self, index: int) -> str:
        """File name or id of image `index`."""
        return self.source.name(int(self.kept[index]))


def viewed(source: Source, fraction: float, one_class: bool) -> Source:
    """A source as the config wants to see it.

    Args:
      fraction: of its images; evenly spaced, so that a list sorted by class or by date keeps all.
      one_class: all classes are one, named `ONE_CLASS`.
    """
    if fraction == 1 and not one_class:
        return source
    kept = np.arange(len(source))
    if fraction < 1:
        count = max(round(fraction * len(source)), 1)
        kept = np.arange(count) * len(source) // count
        source.report.notes.append(f"data.fraction={fraction:g}: {count} of these images")
    names = source.names
    if one_class:
        source.report.notes.append(
            f"data.single_cls: the {len(names)} classes are one, {ONE_CLASS!r}"
        )
        names = (ONE_CLASS,)
    return View(source, kept, names)
