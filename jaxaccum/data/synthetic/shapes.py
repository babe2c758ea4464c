"""The embedded shapes: furniture, vehicles and vessels, built from an index, nothing to download.

A shape is a list of parts, each lofted through rings of points: boxes, rods, vessels turned on a
lathe, hulls. Its cloud is sampled evenly over the surface. y is up; lengths are arbitrary, as every
cloud is scaled in the end.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

import numpy as np

from jaxaccum.data.base import DataError
from jaxaccum.data.cloud_ops import unit_pose
from jaxaccum.data.clouds import CloudReport
from jaxaccum.data.formats.cloud_files import Points
from jaxaccum.data.synthetic import shape_furniture as furniture
from jaxaccum.data.synthetic import shape_vehicles as vehicles
from jaxaccum.data.synthetic import shape_vessels as vessels
from jaxaccum.data.synthetic.shape_parts import Part, Say, surface_points, unsaid

POINTS = 8192
_VERSION = 1  # of the shapes; part of the identity


class Shapes:
    """The embedded complete clouds of one split. Implements `Complete` of `cloud_sources`."""

    points = POINTS

    def __init__(self, split: str, *, length: int | None = None, seed: int = 0) -> None:
        """Describes the shapes; builds nothing yet.

        Args:
          split: "train", "val", "test", or "unseen", which has categories of its own; they share
            no shape.
          length: number of shapes, their categories in turn; None for 2000 in train, 200 in val
            and test, 80 in unseen.
          seed: another seed gives other shapes.

        Raises:
          DataError: an argument is out of range.
        """
        if split not in LENGTHS:
            raise DataError(
                f"embedded shapes: split is {split!r}, expected one of {', '.join(LENGTHS)}."
            )
        length = LENGTHS[split] if length is None else length
        if length < 1:
            raise DataError(f"embedded shapes: length is {length}, expected at least 1.")
        self._makers = UNSEEN if split == "unseen" else SEEN
        self._split, self._length, self._seed = split, length, seed
        self.names = tuple(self._makers)
        described = f"shapes {_VERSION} {split} {length} {seed} {POINTS}"
        self.identity = hashlib.sha256(described.encode()).hexdigest()[:12]
        counts = {
            name: len(range(category, length, len(self.names)))
            for category, name in enumerate(self.names)
        }
        self.report = CloudReport(f"embedded shapes ({split})", counts, length)

    def __len__(self) -> int:
        return self._length

    def category(self, index: int) -> int:
        """The categories take turns."""
        return self._checked(index) % len(self.names)

    def name(self, index: int) -> str:
        """`CATEGORY_SPLIT_NUMBER`."""
        return f"{self.names[self.category(index)]}_{self._split}_{index:05d}"

    def complete(self, index: int) -> Points:
        """(8192, 3), the mean at the origin, the farthest point at distance 1."""
        triangles, r = self._surface(index, unsaid)
        rng = np.random.Generator(np.random.PCG64(r.getrandbits(64)))
        points = surface_points(triangles, POINTS, rng)
        return unit_pose(points).apply(points)

    def caption(self, index: int) -> str:
        """What the shape is built of: "a wide coffee table with four thin round legs"."""
        said: list[str] = []
        triangles, _ = self._surface(index, said.append)
        category = self.names[self.category(index)]
        parts = [phrase.removeprefix("with ") for phrase in said if phrase.startswith("with ")]
        nouns = [phrase for phrase in said if not phrase.startswith("with ")]
        over, under, low, few, high, many = _PROPORTIONS[category]
        size = np.ptp(triangles, axis=(0, 1))
        ratio = size[over] / size[under]
        words = few if ratio < low else many if ratio > high else ""
        noun = f"{words} {nouns[-1] if nouns else category}".strip()
        article = "an" if noun[0] in "aeio" else "a"
        listed = " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
        return f"{article} {noun} with {listed}" if parts else f"{article} {noun}"

    def _surface(self, index: int, say: Say) -> tuple[Part, random.Random]:
        """The triangles of shape `index`, and its generator after them."""
        r = random.Random(f"{self._seed}/{self._split}/{self._checked(index)}")
        parts = self._makers[self.names[self.category(index)]](r, say)
        stretch = np.array([r.uniform(0.9, 1.1), r.uniform(0.9, 1.1), r.uniform(0.9, 1.1)])
        return np.concatenate(parts) * stretch, r

    def _checked(self, index: int) -> int:
        if not 0 <= index < self._length:
            raise IndexError(f"shape {index} of {self._length}")
        return int(index)


Maker = Callable[[random.Random, Say], list[Part]]
SEEN: dict[str, Maker] = {
    "airplane": vehicles.airplane,
    "bed": furniture.bed,
    "boat": vehicles.boat,
    "bookshelf": furniture.bookshelf,
    "bottle": vessels.bottle,
    "car": vehicles.car,
    "chair": furniture.chair,
    "lamp": furniture.lamp,
    "sofa": furniture.sofa,
    "table": furniture.table,
}
UNSEEN: dict[str, Maker] = {
    "mailbox": furniture.mailbox,
    "mug": vessels.mug,
    "rocket": vehicles.rocket,
    "skateboard": vehicles.skateboard,
}
# Extent along one axis over that along another: the word below a bound, the word above another.
# A third of the shapes of a category is below, a third above.
_X, _Y, _Z = range(3)
_PROPORTIONS: dict[str, tuple[int, int, float, str, float, str]] = {
    "airplane": (_X, _Z, 0.78, "short-winged", 0.97, "long-winged"),
    "bed": (_Y, _Z, 0.4, "low", 0.5, "tall"),
    "boat": (_X, _Z, 0.3, "slender", 0.46, "broad"),
    "bookshelf": (_Y, _X, 1.16, "wide", 1.61, "tall"),
    "bottle": (_Y, _X, 2.75, "squat", 3.6, "slender"),
    "car": (_Z, _Y, 2.64, "short", 3.2, "long"),
    "chair": (_Y, _X, 1.37, "wide", 1.74, "tall"),
    "lamp": (_Y, _X, 2, "squat", 2.8, "slender"),
    "sofa": (_Y, _Z, 0.84, "low", 1.0, "tall"),
    "table": (_X, _Z, 1.13, "short", 1.8, "long"),
    "mailbox": (_Y, _Z, 2.3, "squat", 2.65, "tall"),
    "mug": (_Y, _X, 0.67, "squat", 0.84, "tall"),
    "rocket": (_Y, _X, 2.3, "squat", 3.5, "slender"),
    "skateboard": (_X, _Z, 0.257, "narrow", 0.28, "wide"),
}
LENGTHS = {"train": 2000, "val": 200, "test": 200, "unseen": 80}
