"""Clouds as a packed set holds them."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxaccum.data import DataError
from jaxaccum.data.cloud_sources import CroppedClouds, PairedClouds
from jaxaccum.data.formats import packed
from jaxaccum.data.synthetic.shapes import Shapes
from jaxaccum.tasks import packing
from jaxaccum.tasks.base import PackedSplit


def clouds(source: Any, split: str) -> PackedSplit:
    """A source of clouds, by its shapes: partial clouds that are cropped are cropped when read."""
    if not isinstance(source, CroppedClouds | PairedClouds):
        raise DataError(f"{source.report.where}: no complete clouds to learn from.")
    paired, shapes = isinstance(source, PairedClouds), source.shapes
    samples = range(len(shapes))
    views = [source.shapes.views(i) if isinstance(source, PairedClouds) else 0 for i in samples]
    spoken = isinstance(shapes, Shapes)
    captions = [shapes.caption(i) for i in samples] if isinstance(shapes, Shapes) else []
    arrays: packed.Arrays = {
        "titles": packed.as_array([shapes.name(i) for i in samples]),
        "captions": packed.as_array(captions),
        "categories": np.array([shapes.category(i) for i in samples], np.int32),
        "views": np.array(views),
    }
    told = packing.about(shapes) | {
        "points": shapes.points,
        "paired": paired,
        "viewpoints": 1 if spoken else 8,
    }

    def complete(index: int) -> packing.Example:
        return {
            "cloud": shapes.complete(index),
            "name": shapes.name(index),
            "category": shapes.names[shapes.category(index)],
        }

    made = PackedSplit(told, arrays, {split: (len(shapes), complete)})
    if isinstance(source, PairedClouds):
        pairs = source.shapes
        places = [(i, view) for i in samples for view in range(views[i])]

        def partial(place: int) -> packing.Example:
            index, view = places[place]
            return {
                "cloud": pairs.partial(index, view),
                "name": f"{pairs.name(index)}/{view}",
                "category": pairs.names[pairs.category(index)],
            }

        made.records[packed.partials(split)] = len(places), partial
    return made


def features(tfds: Any) -> dict[str, Any]:
    """The features of a record."""
    return {
        # As bytes: a list of numbers takes TFDS milliseconds to read.
        "cloud": packing.floats(tfds, None, 3, encoding="bytes"),
        "name": tfds.features.Text(),
        "category": tfds.features.Text(),
    }
