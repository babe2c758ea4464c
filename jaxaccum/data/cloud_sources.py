"""Opens a data set of clouds by its path: embedded shapes, PCN, ShapeNet-55/34, Projected, KITTI, a
plain folder, or a packed set of them.

The layouts are those of PoinTr's data sets (Yu et al. 2021, arXiv:2108.08839; 2023,
arXiv:2301.04545), of which the first is PCN's (Yuan et al. 2018, arXiv:1808.00671).
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxaccum.data.base import DataError
from jaxaccum.data.cache import ByteCache
from jaxaccum.data.cloud_check import Check
from jaxaccum.data.cloud_models import PairedModels, folder_content
from jaxaccum.data.cloud_ops import CORNERS, MODES, fixed_crop, random_crop, subsampled
from jaxaccum.data.clouds import CloudReport, CloudSource
from jaxaccum.data.formats.cloud_cars import KittiCars
from jaxaccum.data.formats.cloud_files import Points
from jaxaccum.data.formats.cloud_folder import is_folder_of_clouds, open_folder
from jaxaccum.data.formats.cloud_pcn import open_pcn
from jaxaccum.data.formats.cloud_shapenet import SYNSETS, open_shapenet, plain_name
from jaxaccum.data.formats.packed import PREFIX, PackedClouds, open_set
from jaxaccum.data.stamps import Stamps
from jaxaccum.data.synthetic.shapes import Shapes
from jaxaccum.data.texts import shown_path

__all__ = ["MODES", "SYNSETS", "CroppedClouds", "KittiCars", "PairedClouds", "has_unseen",
           "open_clouds"]  # fmt: skip

SPLITS = ("train", "val", "test", "unseen")
_GIB = 1 << 30


def open_clouds(
    path: str,
    split: str,
    *,
    mode: str = "median",
    viewpoints: int | None = None,
    cache_bytes: int = 2 * _GIB,
    on_error: str = "raise",
    check: bool = False,
) -> CloudSource:
    """Opens one split of a data set of clouds.

    Args:
      path: "" for the embedded shapes; a folder of clouds, or of folders of clouds (see
        `open_folder`); a folder that holds PCN.json; a folder that holds
        shapenet_pc, with the benchmark after a colon (`DATA:ShapeNet-34`,
        `DATA:Projected_ShapeNet-55_noise`; `DATA/ShapeNet-34` is the same); a folder that holds
        KITTI's cars and bboxes; `packed:DIR` for what `python -m jaxaccum.pack` wrote.
      split: "train"; "val"; "test", which differs from "val" in PCN alone; "unseen": categories
        that training does not see (ShapeNet-34 and the embedded shapes).
      mode: how much of a complete cloud evaluation crops away: "easy" a quarter, "median" half,
        "hard" three quarters. For sets without partial clouds of their own; the others have
        theirs.
      viewpoints: for the same sets, from how many of the 8 fixed directions evaluation crops each
        shape, 1 to 8; fewer than 8 differ from shape to shape. None for 8, as the benchmark has
        it, and for 1 of embedded shapes, packed or not.
      cache_bytes: most bytes of decoded clouds to keep in memory; each worker process keeps its
        own share.
      on_error: "raise" refuses a data set with a cloud that cannot be used; "skip" leaves out the
        shape, or of several partial clouds that one, and counts it.
      check: read every cloud now. Else what cannot be used is found when it is drawn.

    Raises:
      DataError: the data cannot be used as given; says where and what to do.
    """
    if split not in SPLITS:
        raise DataError(f"split is {split!r}, expected one of {', '.join(SPLITS)}.")
    if mode not in MODES:
        raise DataError(f"mode is {mode!r}, expected one of {', '.join(MODES)}.")
    if viewpoints is not None and not 1 <= viewpoints <= len(CORNERS):
        raise DataError(f"viewpoints is {viewpoints}, expected 1 to {len(CORNERS)}.")
    if on_error not in ("raise", "skip"):
        raise DataError(f"on_error is {on_error!r}, expected 'raise' or 'skip'.")
    if not path:
        shapes = Shapes(split)
        return CroppedClouds(shapes, split != "train", mode, viewpoints or 1, cache_bytes)
    if path.startswith(PREFIX):
        packed = PackedClouds(open_set(path, "completion"), split)
        if packed.paired:
            return PairedClouds(packed, cache_bytes)
        views = viewpoints or packed.viewpoints
        return CroppedClouds(packed, split != "train", mode, views, cache_bytes)
    root, benchmark = _divided(path)
    name = shown_path(path)
    if not _is_folder(root):
        raise DataError(f"{name}: no such folder. Check the path.", file=path)
    checked = Check(on_error) if check else None
    shapenet = functools.partial(_open_shapenet, split, mode, viewpoints or 8, cache_bytes, checked)
    if benchmark or (root / "shapenet_pc").is_dir():
        return shapenet(root, benchmark)
    if (root / "PCN.json").is_file():
        return PairedClouds(open_pcn(root, split, checked), cache_bytes)
    if (root / "cars").is_dir() and (root / "bboxes").is_dir():
        return KittiCars(root, split, checked)
    if (root.parent / "shapenet_pc").is_dir():
        return shapenet(root.parent, root.name)
    if is_folder_of_clouds(root):
        folder = open_folder(root, split, checked)
        return CroppedClouds(folder, split != "train", mode, viewpoints or 8, cache_bytes)
    raise DataError(
        f"{name}: no known data set of clouds. Looked for PCN.json, shapenet_pc, cars with bboxes, "
        f"and for clouds (*.ply, *.pcd, *.npy) in it; it has {folder_content(root)}.",
        file=path,
    )


def _open_shapenet(
    split: str, mode: str, viewpoints: int, cache_bytes: int, check: Check | None,
    root: Path, benchmark: str,
) -> CloudSource:  # fmt: skip
    shapes = open_shapenet(root, benchmark, split, check)
    if isinstance(shapes, PairedModels):
        return PairedClouds(shapes, cache_bytes)
    return CroppedClouds(shapes, split != "train", mode, viewpoints, cache_bytes)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a NUL in it, or too long
        return False


def has_unseen(path: str) -> bool:
    """Whether the benchmark of that path, as in `open_clouds`, has categories to hold back."""
    if not path:
        return True
    if path.startswith(PREFIX):
        return "unseen" in open_set(path, "completion").splits
    root, benchmark = _divided(path)
    if not benchmark and not (root.parent / "shapenet_pc").is_dir():
        return False
    return plain_name(benchmark or root.name).endswith("-34")


class Listed(Protocol):
    """Complete clouds of one split, by index."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def identity(self) -> str: ...

    @property
    def report(self) -> CloudReport: ...

    @property
    def points(self) -> int: ...

    def __len__(self) -> int: ...

    def category(self, index: int) -> int:
        """The category of shape `index`."""
        ...

    def name(self, index: int) -> str:
        """The name of shape `index`."""
        ...

    def complete(self, index: int) -> Points:
        """(points, 3) float32."""
        ...


class Complete(Listed, Protocol):
    """What `CroppedClouds` crops: the mean of every cloud is the origin, its largest radius 1."""

    def caption(self, index: int) -> str | None:
        """What the data set itself says of shape `index`; None if it says nothing."""
        ...


class Paired(Listed, Protocol):
    """What `PairedClouds` chooses from: every shape has partial clouds, too."""

    def views(self, index: int) -> int:
        """Partial clouds of shape `index`, at least 1."""
        ...

    def partial(self, index: int, view: int) -> Points:
        """(n, 3) float32, partial cloud `view` of shape `index`."""
        ...


class CroppedClouds:
    """Complete clouds, cropped when they are asked for. Implements `CloudSource`.

    Training crops from a random direction. Evaluation crops each shape from some of the fixed
    directions, one sample each, shape by shape.

    Attributes:
      shapes: the complete clouds.
    """

    normalised = True

    def __init__(
        self, shapes: Complete, evaluation: bool, mode: str, viewpoints: int, cache_bytes: int
    ) -> None:
        """Describes the samples; reads nothing yet.

        Args:
          shapes: the complete clouds.
          evaluation: whether each shape counts once for each viewpoint, or once.
          mode, viewpoints, cache_bytes: as in `open_clouds`.
        """
        self.shapes, self._mode = shapes, mode
        self._views = viewpoints if evaluation else 1
        self._cache = ByteCache[tuple[Points]](cache_bytes)
        self.names, self.points, self.report = shapes.names, shapes.points, shapes.report
        self.stamps: Stamps = getattr(shapes, "stamps", {})
        self.report.samples = len(self)
        self.identity = shapes.identity
        if evaluation:
            described = f"{shapes.identity} {mode} {viewpoints}"
            self.identity = hashlib.sha256(described.encode()).hexdigest()[:12]

    def __len__(self) -> int:
        return len(self.shapes) * self._views

    def category(self, index: int) -> int:
        """The category of sample `index`."""
        return self.shapes.category(index // self._views)

    def name(self, index: int) -> str:
        """The shape's name; of evaluation also the direction, 0 to 7."""
        name = self.shapes.name(index // self._views)
        return name if self._views == 1 else f"{name}/{self._corner(index)}"

    def sample(self, index: int, rng: np.random.Generator | None) -> tuple[Points, Points]:
        """The partial (2048, 3) and the complete (P, 3) cloud."""
        shape = index // self._views
        read = functools.partial(self._complete, shape)
        (complete,) = self._cache.get(("complete", shape), read)
        if rng is not None:
            return random_crop(complete, rng), complete
        corner = self._corner(index)
        (partial,) = self._cache.get(
            ("partial", index), lambda: (fixed_crop(complete, corner, self._mode),)
        )
        return partial, complete

    def shape(self, index: int) -> str:
        """The shape's name, the same from all directions."""
        return self.shapes.name(index // self._views)

    def description(self, index: int) -> str | None:
        """What the data set itself says of the shape: a caption for embedded shapes, else None."""
        return self.shapes.caption(index // self._views)

    def _corner(self, index: int) -> int:
        shape, view = divmod(index, self._views)
        return view if self._views == len(CORNERS) else (shape + view) % len(CORNERS)

    def _complete(self, shape: int) -> tuple[Points]:
        return (self.shapes.complete(shape),)


class PairedClouds:
    """Partial and complete clouds. Implements `CloudSource`.

    Training takes a partial cloud of any viewpoint and any of its points, evaluation a fixed
    choice of those of viewpoint 0.

    Attributes:
      shapes: the clouds.
    """

    normalised = False

    def __init__(self, shapes: Paired, cache_bytes: int) -> None:
        """shapes: the clouds. cache_bytes: as in `open_clouds`."""
        self.shapes = shapes
        self._cache = ByteCache[tuple[Points]](cache_bytes)
        self.names, self.points, self.report = shapes.names, shapes.points, shapes.report
        self.stamps: Stamps = getattr(shapes, "stamps", {})
        self.identity = shapes.identity

    def __len__(self) -> int:
        return len(self.shapes)

    def category(self, index: int) -> int:
        """The category of shape `index`."""
        return self.shapes.category(index)

    def name(self, index: int) -> str:
        """CATEGORY/NAME, of the data set."""
        return self.shapes.name(index)

    def sample(self, index: int, rng: np.random.Generator | None) -> tuple[Points, Points]:
        """The partial (2048, 3), filled up with zeros, and the complete (P, 3) cloud."""
        if rng is None:
            view, rng = 0, np.random.Generator(np.random.PCG64(index))
        else:
            view = int(rng.integers(self.shapes.views(index)))
        (partial,) = self._cache.get((index, view), lambda: (self.shapes.partial(index, view),))
        return subsampled(partial, rng), self.complete(index)

    def complete(self, index: int) -> Points:
        """The complete (P, 3) cloud of shape `index`."""
        (complete,) = self._cache.get(index, lambda: (self.shapes.complete(index),))
        return complete


def _divided(path: str) -> tuple[Path, str]:
    """FOLDER:BENCHMARK in two; a path without a benchmark has ""."""
    head, colon, tail = path.rpartition(":")
    if colon and not _is_folder(Path(path)) and _is_folder(Path(head)):
        return Path(head), tail
    return Path(path), ""
