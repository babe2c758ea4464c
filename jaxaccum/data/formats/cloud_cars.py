"""Scans of cars, as PoinTr's authors cut them out of KITTI: cars/NAME.pcd, bboxes/NAME.txt."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from jaxaccum.data.base import DataError
from jaxaccum.data.cloud_check import Check
from jaxaccum.data.cloud_models import any_case, file_size, is_text, left_out, read_categories
from jaxaccum.data.cloud_ops import Pose, box_pose, subsampled
from jaxaccum.data.clouds import CloudReport
from jaxaccum.data.formats.cloud_files import SUFFIXES, Points, read_cloud
from jaxaccum.data.stamps import Stamps
from jaxaccum.data.texts import lines, number, read_bytes, read_text, shown_path

_LARGEST_BOX = 1 << 16  # bytes of a file
_FARTHEST = 1e6  # metres


class KittiCars:
    """Scans of cars, without complete clouds. Implements `CloudSource`; `points` is 0."""

    names = ("car",)
    points = 0
    normalised = False

    def __init__(self, root: Path, split: str, check: Check | None = None) -> None:
        """root: a folder with cars/NAME.pcd and bboxes/NAME.txt, and a list in KITTI.json, if
        not all are meant; split: "val" or "test", which are the same; check: of the content.

        Raises:
          DataError: the split or the folder cannot be used.
        """
        if split not in ("val", "test"):
            raise DataError(
                f"{shown_path(root)}: no split {split!r}: scans of cars have no complete clouds "
                f"to learn from. Use 'test'."
            )
        self.report = CloudReport(f"{shown_path(root)} ({split})")
        self.stamps: Stamps = {}
        listing = root / "KITTI.json"
        if listing.is_file():
            listed = [n for c in read_categories(listing, "test") for n in c["test"]]
        else:
            listed = self._scans_in(root / "cars")
        self._scans, self._boxes = root / "cars", root / "bboxes"
        digest = hashlib.sha256(b"kitti")
        found, seen = list[str](), set[str]()
        for name in listed:
            if not is_text(name):  # of a file in another encoding
                self.report.skip("car whose name is not UTF-8", shown_path(name))
                continue
            if name in seen:
                self.report.skip("car listed again", f"{shown_path(listing)}: {name}")
                continue
            seen.add(name)
            scan, box = self._files(name)
            if file_size(scan) is None:
                self.report.skip("listed car without its scan", shown_path(scan))
            elif file_size(box) is None:
                self.report.skip("listed car without its box", shown_path(box))
            else:
                found.append(name)
        if check is not None and found:
            files = [self._files(name) for name in found]
            result = check.run(self.report.where, files, _read_part, equal=False)
            self.stamps = result.stamps
            usable = result.usable(self.report)
            found = [name for name, good in zip(found, usable, strict=True) if all(good)]
        for name in found:
            scan, box = self._files(name)
            told = f"\0{name}\0{file_size(scan)}\0".encode("utf-8", "surrogatepass")
            digest.update(told + read_bytes(box, limit=_LARGEST_BOX))
        self._names = found
        if not self._names:
            raise DataError(
                f"{shown_path(root)}: no cars with their boxes in it{left_out(self.report)}.",
                file=str(root),
            )
        self.identity = digest.hexdigest()[:12]
        self.report.shapes = {"car": len(self)}
        self.report.samples = len(self)

    def _scans_in(self, folder: Path) -> list[str]:
        """The names of the scans in a folder; counts clouds of other kinds."""
        names = set[str]()
        for file in sorted(folder.glob("*")):
            if file.suffix.lower() == ".pcd":
                names.add(file.stem)
            elif file.suffix.lower() in SUFFIXES:
                self.report.skip("scan that is no .pcd", shown_path(file))
        return sorted(names)

    def _files(self, name: str) -> tuple[Path, Path]:
        """The scan and the box of a car."""
        return any_case(self._scans / f"{name}.pcd"), any_case(self._boxes / f"{name}.txt")

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
        return _read_box(self._files(self._names[index])[1])

    def sample(self, index: int, rng: np.random.Generator | None) -> tuple[Points, Points]:
        """The scan (2048, 3), filled up with zeros, and no complete cloud (0, 3)."""
        scan = self.pose(index).apply(read_cloud(self._files(self._names[index])[0]))
        rng = rng or np.random.Generator(np.random.PCG64(index))
        return subsampled(scan, rng), np.zeros((0, 3), np.float32)


def _read_box(file: Path) -> Pose:
    """The pose of a box: eight rows of x, y and z in metres; what follows a # is left out."""
    rows = list[list[float]]()
    line = 0
    try:
        for at, text in enumerate(lines(read_text(file, limit=_LARGEST_BOX)), 1):
            line = at
            words = text.partition("#")[0].split()
            if words:
                rows.append([number(word) for word in words])
                if len(words) != 3:
                    raise ValueError(f"{len(words)} numbers, expected x y z")
                if not all(abs(value) <= _FARTHEST for value in rows[-1]):
                    raise ValueError(f"a corner not within {_FARTHEST:g} m")
        line = 0
        return box_pose(np.array(rows, np.float64).reshape(-1, 3))
    except DataError:
        raise
    except ValueError as error:
        where = f"line {line}: " if line else ""
        raise DataError(
            f"{shown_path(file)}: not a box: {where}{error}. Correct it, or leave the car out of "
            "the list.",
            file=str(file), line=line or None,
        ) from None  # fmt: skip


def _read_part(file: Path) -> int:
    """Points of a scan, or 0 of a box that can be read."""
    if file.suffix.lower() == ".pcd":
        return len(read_cloud(file))
    _read_box(file)
    return 0
