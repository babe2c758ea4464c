"""Opens a split of images with 3D boxes by the path that a config names."""

from __future__ import annotations

from jaxaccum.data.kitti import Source3D, open_kitti
from jaxaccum.data.streets import StreetsSource


def open_source3d(
    path: str,
    split: str,
    *,
    merge: bool = False,
    fraction: float = 1.0,
    seed: int = 0,
    on_error: str = "raise",
) -> Source3D:
    """The "train" or "val" split of KITTI, or of the embedded streets where `path` is "".

    Args: as of `open_kitti`; the embedded streets are small and taken whole.

    Raises:
      DataError: the data cannot be used as given; says where and what to do.
    """
    if not path:
        return StreetsSource(split)
    return open_kitti(path, split, merge=merge, fraction=fraction, seed=seed, on_error=on_error)
