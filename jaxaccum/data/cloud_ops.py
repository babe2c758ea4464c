"""What is done to a point cloud on the host: sampling, cropping, poses and mirroring.

The rules are those of PoinTr and AdaPoinTr (Yu et al. 2021, arXiv:2108.08839; 2023,
arXiv:2301.04545). Everything random takes its generator.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxaccum.data.formats.cloud_files import Points

NUM_INPUT = 2048  # points of a partial cloud
ORIGIN = 1e-3  # squared distance from the origin up to which a point counts as padding
# The directions from which evaluation crops, as corners of a cube.
CORNERS = np.array(
    [(1, 1, 1), (1, 1, -1), (1, -1, 1), (-1, 1, 1), (-1, -1, 1), (-1, 1, -1), (1, -1, -1),
     (-1, -1, -1)], np.float32,
)  # fmt: skip
# The part of a complete cloud that evaluation crops away.
MODES = {"easy": 0.25, "median": 0.5, "hard": 0.75}


class Pose(NamedTuple):
    """Where a cloud stands in the world, and the way to the network's frame and back.

    Attributes:
      centre: (3,) the frame's origin.
      rotation: (3, 3) the frame's axes, as columns.
      scale: the frame's unit of length.
    """

    centre: NDArray[np.float32]
    rotation: NDArray[np.float32]
    scale: float

    def apply(self, points: NDArray[Any]) -> Points:
        """(..., 3) from the world to the frame, float32."""
        return np.asarray((points - self.centre) @ self.rotation / self.scale, np.float32)

    def restore(self, points: NDArray[Any]) -> Points:
        """(..., 3) from the frame to the world, float32."""
        return np.asarray((points * self.scale) @ self.rotation.T + self.centre, np.float32)


def still_pose() -> Pose:
    """The pose that leaves points as they are."""
    return Pose(np.zeros(3, np.float32), np.eye(3, dtype=np.float32), 1.0)


def unit_pose(points: Points) -> Pose:
    """ShapeNet-55's: the mean at the origin, the farthest point at distance 1."""
    centre = points.mean(axis=0, dtype=np.float64).astype(np.float32)
    radius = float(np.sqrt(np.max(np.sum((points - centre) ** 2, axis=1))))
    return Pose(centre, np.eye(3, dtype=np.float32), radius or 1.0)


def box_pose(corners: NDArray[Any]) -> Pose:
    """KITTI's: the box at the origin, its edge from corner 0 to corner 3 along x and of length 1.

    Args:
      corners: (8, 3) of a box that stands upright along z. In the frame, y is up.

    Raises:
      ValueError: another shape, or that edge has no length.
    """
    if corners.shape != (8, 3):
        raise ValueError(f"a box of the shape {corners.shape}, expected 8 corners of x y z")
    centre = (corners.min(axis=0) + corners.max(axis=0)) / 2
    edge = corners[3, :2] - corners[0, :2]
    length = float(np.hypot(*edge))
    if length < 1e-6:
        raise ValueError("the edge from corner 0 to corner 3 has no length")
    cos, sin = edge / length
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    # Columns in another order: y and z change places.
    return Pose(centre.astype(np.float32), turn[:, [0, 2, 1]].astype(np.float32), length)


@functools.lru_cache(maxsize=64)
def _priority(n: int) -> NDArray[np.int64]:
    """(n,) the indices of points in the order in which they win a tie (see farthest_points)."""
    bits = min(9, n.bit_length() - 1)
    index = np.arange(n)
    thread = index % (1 << bits)
    reverse = np.zeros(n, np.int64)
    for b in range(bits):
        reverse |= ((thread >> b) & 1) << (bits - 1 - b)
    order = np.lexsort((index, reverse))
    order.flags.writeable = False
    return order


def farthest_points(points: Points, count: int) -> NDArray[np.int64]:
    """Farthest point sampling by the rule of the reference (pointnet2_ops).

    Starts at point 0; then always the point farthest from those chosen. Points with
    |p|^2 <= 1e-3 are never chosen. Of equally far ones the kernel's reduction decides: over
    T = min(512, 2^floor(log2 N)) threads, the smallest bit-reversed i mod T, then the smallest i.
    Once every point is chosen the winner of that tie (point 0, if valid) repeats.

    Args:
      points: (N, 3) float32, N >= 1.
    Returns:
      (count,) indices.
    """
    order = _priority(len(points))
    xyz = np.ascontiguousarray(points[order].T)
    square = xyz * xyz
    far = np.full(len(points), 1e10, np.float32)
    far[square[0] + square[1] + square[2] <= np.float32(ORIGIN)] = -1
    x, y, z = square
    chosen = np.zeros(count, np.int64)
    last = 0  # point 0 comes first among ties, too
    for i in range(1, count):
        # Few calls, in place: this loop is most of what a cropped sample costs.
        np.subtract(xyz, xyz[:, last : last + 1], out=square)
        np.multiply(square, square, out=square)
        np.add(x, y, out=x)
        np.add(x, z, out=x)
        np.minimum(far, x, out=far)
        last = int(far.argmax())
        if far[last] <= 0:  # every point is chosen
            chosen[i:] = last
            break
        chosen[i] = last
    return order[chosen]


def remainder(points: Points, centre: NDArray[np.float32], removed: int) -> Points:
    """What is left of a cloud without the `removed` points nearest to a centre.

    Returns:
      (N - removed, 3), from the nearest to the centre to the farthest.
    """
    distance = np.sum((points - centre) ** 2, axis=1)
    return points[np.argsort(distance, kind="stable")[removed:]]


def random_crop(points: Points, rng: np.random.Generator) -> Points:
    """Training's partial cloud: a quarter to three quarters cropped away from any direction.

    Args:
      points: (P, 3), about the origin.
    Returns:
      (2048, 3), farthest points of the remainder.
    """
    direction = rng.standard_normal(3)
    centre = (direction / np.linalg.norm(direction)).astype(np.float32)
    count = len(points)
    removed = int(rng.integers(count // 4, count * 3 // 4, endpoint=True))
    rest = remainder(points, centre, removed)
    return rest[farthest_points(rest, NUM_INPUT)]


def fixed_crop(points: Points, corner: int, mode: str) -> Points:
    """Evaluation's partial cloud.

    Args:
      points: (P, 3), about the origin.
      corner: index of `CORNERS`, from which to crop.
      mode: "easy", "median" or "hard": a quarter, half or three quarters are cropped away.
    Returns:
      (2048, 3), farthest points of the remainder.
    """
    rest = remainder(points, CORNERS[corner], int(len(points) * MODES[mode]))
    return rest[farthest_points(rest, NUM_INPUT)]


def subsampled(points: Points, rng: np.random.Generator, count: int = NUM_INPUT) -> Points:
    """(count, 3): a random choice of the points in random order, then zeros if too few."""
    chosen = points[rng.permutation(len(points))[:count]]
    out = np.zeros((count, 3), np.float32)
    out[: len(chosen)] = chosen
    return out


def repeated(points: Points, rng: np.random.Generator, count: int = NUM_INPUT) -> Points:
    """(count, 3): a random choice of the points, or if too few all of them, and again.

    Clouds with too few are doubled as often as they fit; a random choice of rows fills the rest.
    """
    if len(points) >= count:
        return points[rng.permutation(len(points))[:count]]
    while 2 * len(points) <= count:
        points = np.concatenate([points, points])
    rest = rng.permutation(len(points))[: count - len(points)]
    return np.concatenate([points, points[rest]])


def mirror_factors(rng: np.random.Generator) -> NDArray[np.float32]:
    """(3,) factors of x, y, z: both x and z, x, z, or nothing turned, a quarter each."""
    drawn = rng.random()
    x = -1 if drawn <= 0.5 else 1
    z = -1 if drawn <= 0.25 or 0.5 < drawn <= 0.75 else 1
    return np.array([x, 1, z], np.float32)


def prepare_partial(points: Points, normalise: bool, seed: int = 0) -> tuple[Points, Pose]:
    """Makes any partial cloud a network's input.

    Args:
      points: (n, 3), n >= 1.
      normalise: move the mean to the origin and the farthest point to distance 1, for networks of
        clouds in that frame (ShapeNet-55 and -34); else the cloud must already be in the frame of
        the network's data.
      seed: of the choice of points.

    Returns:
      (2048, 3) float32, a random choice of the points, or all of them repeated; and the pose,
      whose `restore` brings points that the network gives back to the frame of `points`.

    Raises:
      ValueError: no points, or another shape.
    """
    if points.ndim != 2 or points.shape[1] != 3 or not len(points):
        raise ValueError(f"a cloud of the shape {points.shape}, expected (n, 3) with n >= 1")
    pose = unit_pose(points) if normalise else still_pose()
    rng = np.random.Generator(np.random.PCG64(seed))
    return repeated(pose.apply(points), rng), pose
