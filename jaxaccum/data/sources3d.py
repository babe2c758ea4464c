"""Opens a split of images with 3D boxes by the path that a config names."""

from __future__ import annotations

from jaxaccum.data.formats.kitti import Source3D, open_kitti
from jaxaccum.data.formats.packed import PREFIX, open_packed3d
from jaxaccum.data.synthetic.streets import StreetsSource


def open_source3d(
    path: str,
    split: str,
    *,
    merge: bool = False,
    fraction: float = 1.0,
    seed: int = 0,
    on_error: str = "raise",
) -> Source3D:
    """The "train" or "val" split of KITTI, of a packed set where `path` is `packed:DIR`, or of the
    embedded streets where it is "".

    Args: as of `open_kitti`; the embedded streets are small and taken whole. A packed set must
      have been packed with the same ones, but for `on_error`, which decided when it was packed.

    Raises:
      DataError: the data cannot be used as given; says where and what to do.
    """
    if not path:
        return StreetsSource(split)
    if path.startswith(PREFIX):
        return open_packed3d(path, split, merge=merge, fraction=fraction, seed=seed)
    return open_kitti(path, split, merge=merge, fraction=fraction, seed=seed, on_error=on_error)
