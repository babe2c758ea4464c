"""Opens a data set of clouds by its path: embedded shapes, PCN, ShapeNet-55/34, Projected, KITTI,
or a packed set of them.

The layouts are those of PoinTr's data sets (Yu et al. 2021, arXiv:2108.08839; 2023,
arXiv:2301.04545), of which the first is PCN's (Yuan et al. 2018, arXiv:1808.00671).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxaccum.data.base import DataError
from jaxaccum.data.cache import ByteCache
from jaxaccum.data.cloud_files import Points, read_cloud
from jaxaccum.data.cloud_ops import (
    CORNERS,
    MODES,
    Pose,
    box_pose,
    fixed_crop,
    random_crop,
    subsampled,
    unit_pose,
)
from jaxaccum.data.clouds import CloudReport, CloudSource
from jaxaccum.data.packed import PREFIX, PackedClouds, open_set
from jaxaccum.data.shapes import Shapes

SPLITS = ("train", "val", "test", "unseen")
_GIB = 1 << 30

# The 55 categories of ShapeNetCore, for sets without a dictionary of their own.
SYNSETS = {
    "02691156": "airplane", "02747177": "trash bin", "02773838": "bag", "02801938": "basket",
    "02808440": "bathtub", "02818832": "bed", "02828884": "bench", "02843684": "birdhouse",
    "02871439": "bookshelf", "02876657": "bottle", "02880940": "bowl", "02924116": "bus",
    "02933112": "cabinet", "02942699": "camera", "02946921": "can", "02954340": "cap",
    "02958343": "car", "02992529": "cellphone", "03001627": "chair", "03046257": "clock",
    "03085013": "keyboard", "03207941": "dishwasher", "03211117": "display",
    "03261776": "earphone", "03325088": "faucet", "03337140": "file cabinet",
    "03467517": "guitar", "03513137": "helmet", "03593526": "jar", "03624134": "knife",
    "03636649": "lamp", "03642806": "laptop", "03691459": "loudspeaker", "03710193": "mailbox",
    "03759954": "microphone", "03761084": "microwaves", "03790512": "motorbike",
    "03797390": "mug", "03928116": "piano", "03938244": "pillow", "03948459": "pistol",
    "03991062": "flowerpot", "04004475": "printer", "04074963": "remote", "04090263": "rifle",
    "04099429": "rocket", "04225987": "skateboard", "04256520": "sofa", "04330267": "stove",
    "04379243": "table", "04401088": "telephone", "04460130": "tower", "04468005": "train",
    "04530566": "watercraft", "04554684": "washer",
}  # fmt: skip


def open_clouds(
    path: str,
    split: str,
    *,
    mode: str = "median",
    viewpoints: int | None = None,
    cache_bytes: int = 2 * _GIB,
) -> CloudSource:
    """Opens one split of a data set of clouds.

    Args:
      path: "" for the embedded shapes; a folder that holds PCN.json; a folder that holds
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

    Raises:
      DataError: the data cannot be used as given; says where and what to do.
    """
    if split not in SPLITS:
        raise DataError(f"split is {split!r}, expected one of {', '.join(SPLITS)}.")
    if mode not in MODES:
        raise DataError(f"mode is {mode!r}, expected one of {', '.join(MODES)}.")
    if viewpoints is not None and not 1 <= viewpoints <= len(CORNERS):
        raise DataError(f"viewpoints is {viewpoints}, expected 1 to {len(CORNERS)}.")
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
    if not root.is_dir():
        raise DataError(f"{path}: no such folder. Check the path.", file=path)
    if benchmark or (root / "shapenet_pc").is_dir():
        return _open_shapenet(root, benchmark, split, mode, viewpoints or 8, cache_bytes)
    if (root / "PCN.json").is_file():
        return _open_pcn(root, split, cache_bytes)
    if (root / "cars").is_dir() and (root / "bboxes").is_dir():
        return KittiCars(root, split)
    if (root.parent / "shapenet_pc").is_dir():
        return _open_shapenet(root.parent, root.name, split, mode, viewpoints or 8, cache_bytes)
    raise DataError(
        f"{path}: no known data set of clouds. Looked for PCN.json, shapenet_pc, and cars with "
        f"bboxes in it; it has {_content(root)}.",
        file=path,
    )


def has_unseen(path: str) -> bool:
    """Whether the benchmark of that path, as in `open_clouds`, has categories to hold back."""
    if not path:
        return True
    if path.startswith(PREFIX):
        return "unseen" in open_set(path, "completion").splits
    root, benchmark = _divided(path)
    return _plain(benchmark or root.name).endswith("-34")


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


class _Models:
    """Shapes on disk: what the kinds of data sets share."""

    def __init__(
        self, kind: str, where: str, models: Sequence[Model], names: dict[str, str],
        report: CloudReport,
    ) -> None:  # fmt: skip
        """Counts and identifies the shapes.

        Args:
          kind: of the data set; part of its identity.
          where: the data set and split, for messages.
          models: the shapes, of which those without a file are left out and reported.
          names: category id -> name.

        Raises:
          DataError: no shape is left.
        """
        digest = hashlib.sha256(kind.encode())
        self._models = list[Model]()
        for model in models:
            try:
                size = os.stat(model.complete).st_size
            except OSError:
                report.skip("listed shape without its complete cloud", str(model.complete))
                continue
            self._models.append(model)
            views = " ".join(model.views)
            digest.update(f"\0{model.category}\0{model.name}\0{size}\0{views}".encode())
        if not self._models:
            looked = f"; looked for {models[0].complete} and so on" if models else ""
            raise DataError(f"{where}: no shapes{looked}.")
        ids = sorted({model.category for model in self._models})
        words = Counter(names.get(i, i) for i in ids)
        # Two ids of one name stay two categories.
        self.names = tuple(
            names.get(i, i) if words[names.get(i, i)] == 1 else f"{names[i]} {i}" for i in ids
        )
        digest.update("\0".join(self.names).encode())
        self.identity = digest.hexdigest()[:12]
        self._categories = {i: number for number, i in enumerate(ids)}
        counts = Counter(self.category(i) for i in range(len(self._models)))
        report.shapes = {self.names[c]: counts[c] for c in sorted(counts)}
        report.samples = len(self._models)
        self.report = report
        self._first = self._models[0].complete
        self.points = len(read_cloud(self._first))

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
                f"{file}: {len(points)} points, but {self._first} has {self.points}. Sample all "
                f"complete clouds of a data set to the same number of points.",
                file=str(file),
            )
        return points


class _ShapeNetModels(_Models):
    """Complete clouds in ShapeNet-55's frame. Implements `Complete`."""

    def complete(self, index: int) -> Points:
        """(points, 3), the mean at the origin, the farthest point at distance 1."""
        points = self._read_complete(index)
        return unit_pose(points).apply(points)

    def caption(self, index: int) -> str | None:
        """None: ShapeNet says nothing."""
        del index
        return None


class _PairedModels(_Models):
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


class KittiCars:
    """Scans of cars, without complete clouds. Implements `CloudSource`; `points` is 0."""

    names = ("car",)
    points = 0
    normalised = False

    def __init__(self, root: Path, split: str) -> None:
        """root: a folder with cars/NAME.pcd and bboxes/NAME.txt, and a list in KITTI.json, if
        not all are meant; split: "val" or "test", which are the same.

        Raises:
          DataError: the split or the folder cannot be used.
        """
        if split not in ("val", "test"):
            raise DataError(
                f"{root}: no split {split!r}: scans of cars have no complete clouds to learn "
                f"from. Use 'test'."
            )
        self.report = CloudReport(f"{root} ({split})")
        self._names = list[str]()
        listing = root / "KITTI.json"
        if listing.is_file():
            listed = [n for c in _categories(listing, "test") for n in c["test"]]
        else:
            listed = sorted(file.stem for file in (root / "cars").glob("*.pcd"))
        self._scans, self._boxes = root / "cars", root / "bboxes"
        digest = hashlib.sha256(b"kitti")
        for name in listed:
            scan, box = self._scans / f"{name}.pcd", self._boxes / f"{name}.txt"
            if not scan.is_file():
                self.report.skip("listed car without its scan", str(scan))
            elif not box.is_file():
                self.report.skip("listed car without its box", str(box))
            else:
                self._names.append(name)
                digest.update(f"\0{name}\0{scan.stat().st_size}\0".encode() + box.read_bytes())
        if not self._names:
            raise DataError(f"{root}: no cars with their boxes in it.", file=str(root))
        self.identity = digest.hexdigest()[:12]
        self.report.shapes = {"car": len(self)}
        self.report.samples = len(self)

    def __len__(self) -> int:
        return len(self._names)

    def category(self, index: int) -> int:
        """0, the only one."""
        del index
        return 0

    def name(self, index: int) -> str:
        """`frame_F_car_C`."""
        return self._names[index]

    def pose(self, index: int) -> Pose:
        """From the LiDAR's frame in metres to that of the sample: the car's length is 1, y up."""
        file = self._boxes / f"{self._names[index]}.txt"
        try:
            corners = np.loadtxt(file, dtype=np.float64, ndmin=2)
            if not np.isfinite(corners).all():
                raise ValueError("a corner that is not finite")
            return box_pose(corners)
        except ValueError as error:
            raise DataError(f"{file}: not a box: {error}.", file=str(file)) from None

    def sample(self, index: int, rng: np.random.Generator | None) -> tuple[Points, Points]:
        """The scan (2048, 3), filled up with zeros, and no complete cloud (0, 3)."""
        scan = self.pose(index).apply(read_cloud(self._scans / f"{self._names[index]}.pcd"))
        rng = rng or np.random.Generator(np.random.PCG64(index))
        return subsampled(scan, rng), np.zeros((0, 3), np.float32)


def _divided(path: str) -> tuple[Path, str]:
    """FOLDER:BENCHMARK in two; a path without a benchmark has ""."""
    head, colon, tail = path.rpartition(":")
    if colon and not Path(path).exists() and Path(head).is_dir():
        return Path(head), tail
    return Path(path), ""


def _content(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"


def _categories(file: Path, split: str) -> list[dict[str, Any]]:
    """The categories of an index: each with taxonomy_id, taxonomy_name and names in `split`."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        for category in found:
            for key in ("taxonomy_id", "taxonomy_name"):
                if not isinstance(category[key], str):
                    raise TypeError(f"{key} is {category[key]!r}")
            if not all(isinstance(name, str) for name in category[split]):
                raise TypeError(f"{split} is not a list of names")
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{file}: expected a json list of categories, each with taxonomy_id, taxonomy_name and "
            f"the names of its shapes in {split!r} ({type(error).__name__}: {error}).",
            file=str(file),
        ) from None
    return list(found)


def _viewpoints(folder: Path, split: str) -> tuple[str, ...]:
    """The partial clouds in a folder, by the number that is their name; of evaluation number 0."""
    try:
        stems = [name.removesuffix(".pcd") for name in os.listdir(folder) if name.endswith(".pcd")]
    except OSError:
        return ()
    numbered = sorted((int(stem), stem) for stem in stems if stem.isdecimal())
    # The same few names for tens of thousands of shapes.
    return tuple(sys.intern(f"{s}.pcd") for n, s in numbered if split == "train" or n == 0)


def _open_pcn(root: Path, split: str, cache_bytes: int) -> PairedClouds:
    where = f"{root} ({split})"
    if split == "unseen":
        raise DataError(f"{where}: PCN has no unseen categories. Use train, val or test.")
    report, models, names = CloudReport(where), [], {}
    for category in _categories(root / "PCN.json", split):
        synset = category["taxonomy_id"]
        names[synset] = category["taxonomy_name"]
        for name in category[split]:
            partials = root / split / "partial" / synset / name
            views = _viewpoints(partials, split)
            if views:
                complete = root / split / "complete" / synset / f"{name}.pcd"
                models.append(Model(synset, name, complete, partials, views))
            else:
                report.skip("listed shape without a partial cloud", str(partials))
    return PairedClouds(_PairedModels("pcn", where, models, names, report), cache_bytes)


def _open_shapenet(
    root: Path, benchmark: str, split: str, mode: str, viewpoints: int, cache_bytes: int
) -> CloudSource:
    listing = _shapenet_list(root, benchmark, split)
    where = f"{listing} ({split})"
    projected = listing.parent.name.startswith("Projected")
    report, models = CloudReport(where), []
    seen: set[str] = set()
    for number, line in enumerate(listing.read_text(encoding="utf-8-sig").splitlines(), 1):
        # Projected lists have the folder in front, ShapeNet's have not.
        file = line.strip().rpartition("/")[2]
        if not file:
            continue
        if file in seen:
            report.skip("shape listed again", str(listing), number)
            continue
        seen.add(file)
        # The name of a shape may have hyphens, too.
        synset, hyphen, name = file.removesuffix(".npy").partition("-")
        if not hyphen or not name or not file.endswith(".npy"):
            raise DataError(
                f"{listing}:{number}: the row {line.strip()!r}, expected SYNSET-NAME.npy.",
                file=str(listing), line=number,
            )  # fmt: skip
        complete = root / "shapenet_pc" / file
        if not projected:
            models.append(Model(synset, name, complete))
            continue
        partials = root / "projected_partial_noise" / synset / name / "models"
        views = _viewpoints(partials, split)
        if views:
            models.append(Model(synset, name, complete, partials, views))
        else:
            report.skip("listed shape without a partial cloud", str(partials))
    names = _synset_names(root)
    if projected:
        paired = _PairedModels("projected", where, models, names, report)
        return PairedClouds(paired, cache_bytes)
    shapes = _ShapeNetModels("shapenet", where, models, names, report)
    return CroppedClouds(shapes, split != "train", mode, viewpoints, cache_bytes)


def _shapenet_list(root: Path, benchmark: str, split: str) -> Path:
    """The list of a benchmark's split.

    Raises:
      DataError: there is no such benchmark, or it has no such split.
    """
    there = {
        folder.name
        for folder in root.iterdir()
        if (folder / "train.txt").is_file() or (folder / "test.txt").is_file()
    }
    choice = f"There are: {', '.join(sorted(there)) or 'none'}."
    if not benchmark:
        raise DataError(
            f"{root}: which benchmark? Write {root}:BENCHMARK. {choice}", file=str(root)
        )
    names = [name for name in sorted(there) if _plain(name) == _plain(benchmark)]
    if len(names) != 1 and benchmark not in there:
        raise DataError(
            f"{root}: no benchmark {benchmark!r}; looked for folders with train.txt or test.txt. "
            f"{choice}",
            file=str(root),
        )
    name = benchmark if benchmark in there else names[0]
    if split == "unseen":
        if "ShapeNet-34" not in name:
            raise DataError(
                f"{root}: {name} has no unseen categories; ShapeNet-34 benchmarks have.",
                file=str(root),
            )
        name = name.replace("ShapeNet-34", "ShapeNet-Unseen21")
    file = root / name / ("train.txt" if split == "train" else "test.txt")
    if not file.is_file():
        raise DataError(f"{file}: no such list, for the split {split!r}. {choice}", file=str(file))
    return file


def _plain(benchmark: str) -> str:
    return benchmark.lower().replace("_shapenet", "").replace("_noise", "")


def _synset_names(root: Path) -> dict[str, str]:
    """Category id -> name: ShapeNet's 55, and the data set's own."""
    for name in ("synset_dict.json", "shapenet_synset_dict.json"):
        file = root / name
        if file.is_file():
            try:
                own = json.loads(file.read_text(encoding="utf-8"))
                return SYNSETS | {str(k): str(v) for k, v in own.items()}
            except (ValueError, AttributeError) as error:
                raise DataError(
                    f"{file}: not a json of category ids and names ({error}).", file=str(file)
                ) from None
    return SYNSETS
