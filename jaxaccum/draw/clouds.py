"""Pictures of point clouds: one cloud as lit beads, or input, prediction, its error by point and
target side by side.

Clouds are (n, 3) with y up, seen from in front (+z), or as a `View` says, in mild perspective.
Points that are not finite, and all-zero ones (padding), are not drawn. Images are (height, width,
3) uint8 RGB, as in `jaxaccum.draw`. Needs no display and no plotting library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree  # type: ignore[import-untyped]

from jaxaccum.draw.boxes import Color, Image, contact_sheet

PARTIAL: Color = (100, 116, 139)
PREDICTED: Color = (37, 110, 235)
TARGET: Color = (22, 150, 82)
WRONG: Color = (220, 38, 38)
WORST = 0.05  # of a shape's size: an error that is drawn in WRONG
BACKGROUND: Color = (250, 250, 251)
INK: Color = (63, 63, 70)

_SUPERSAMPLING = 2
_BEAD = 0.0085  # a bead's radius, by the picture's side
_MARGIN = 0.08  # free border on each side, by the picture's side
_EYE = 5.0  # its distance from the centre, by the reach of the frame
_OUTERMOST = (0.3, 99.7)  # percentiles: what lies beyond does not count for a frame
_EMPTY = -1e3  # depth where there is no point
_LIGHT = np.array([-0.36, 0.64, 0.68], np.float32)  # from the left, above and in front
_FONT = cv2.FONT_HERSHEY_DUPLEX
_FONT_SCALE = 0.42
_LINE = 20  # height of a line of text, in pixels


class View(NamedTuple):
    """A viewpoint: degrees to walk around the object to the right, and up from its horizon."""

    azimuth: float
    elevation: float


THREE_QUARTER = View(35, 22)
FRONT = View(0, 0)
SIDE = View(90, 0)


class Frame(NamedTuple):
    """What a picture shows, so that pictures of several clouds from one view share one scale.

    Attributes:
      centre: (3,) of the shapes, in the view's axes: right, up, towards the viewer.
      reach: largest distance of a shape from the centre along any axis, in the cloud's units.
      middle: (2,) right and up, of the window on the plane of perspective, by `reach`.
      half: half the window's side, by `reach`.
    """

    centre: NDArray[np.float64]
    reach: float
    middle: NDArray[np.float64]
    half: float


def frame_of(clouds: Sequence[ArrayLike], view: View = THREE_QUARTER) -> Frame:
    """The frame that all of `clouds` together fill, but for their outermost points.

    The outermost 0.3 % at each end do not count: a few stray points must not shrink the rest.
    """
    seen = np.concatenate([_seen(cloud, view) for cloud in clouds])
    if not len(seen):
        return Frame(np.zeros(3), 1.0, np.zeros(2), 1.0)
    low, high = np.percentile(seen, _OUTERMOST, axis=0)
    centre, reach = (low + high) / 2, float((high - low).max()) / 2 or 1.0
    flat = _project((seen - centre) / reach)[:, :2]
    low, high = np.percentile(flat, _OUTERMOST, axis=0)
    return Frame(centre, reach, (low + high) / 2, float((high - low).max()) / 2 or 1.0)


def draw_cloud(
    points: ArrayLike,
    size: int = 256,
    *,
    colour: Color | NDArray[np.floating] = PREDICTED,
    view: View = THREE_QUARTER,
    frame: Frame | None = None,
) -> Image:
    """Draws one cloud: nearer points lie on top, are stronger in colour and shade what is behind.

    Args:
      points: (n, 3), y up; may be empty.
      size: side of the picture in pixels.
      colour: RGB of the points, or (n, 3) of each.
      view: where it is seen from.
      frame: what to show, of the same view; None to show the whole cloud.

    Returns:
      (size, size, 3) uint8 RGB.

    Raises:
      ValueError: if the points are not (n, 3) or the size is not positive.
    """
    if size < 1:
        raise ValueError(f"a picture needs a size of at least 1 pixel, got {size}")
    frame = frame_of([points], view) if frame is None else frame
    side = size * _SUPERSAMPLING
    scaled = (_seen(points, view) - frame.centre) / frame.reach
    covered, depth, light, owners = _beads(_project(scaled), frame, side)
    haze = np.clip(0.18 - 0.22 * depth, 0, 0.4)  # far points pale towards the background
    paint, bare = np.zeros((side, side), np.float32), np.ones((side, side), np.float32)
    paint.flat[covered], bare.flat[covered] = light * (1 - haze), haze
    if not isinstance(colour, tuple):
        own = np.asarray(colour, np.float32)[_drawable(points)][_before_the_eye(scaled)][owners]
        canvas = np.full((side * side, 3), BACKGROUND, np.float32)
        canvas[covered] = own * paint.flat[covered][:, None] + canvas[covered] * haze[:, None]
        square = canvas.reshape(side, side, 3)
        shrunk = cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA)
        return np.rint(shrunk).clip(0, 255).astype(np.uint8)
    image = sum(
        np.multiply.outer(cv2.resize(share, (size, size), interpolation=cv2.INTER_AREA), shade)
        for share, shade in ((paint, np.array(colour)), (bare, np.array(BACKGROUND)))
    )
    return np.rint(image).clip(0, 255).astype(np.uint8)


def draw_completion(
    partial: ArrayLike,
    predicted: ArrayLike | None,
    target: ArrayLike | None = None,
    *,
    title: str = "",
    size: int = 256,
    views: Sequence[View] = (THREE_QUARTER,),
    errors: bool = False,
) -> Image:
    """Draws a completion: input, prediction and target side by side, on one scale.

    Args:
      partial: (n, 3), as given to the network.
      predicted: (P, 3), or None for a sample alone.
      target: (Q, 3), or None where there is none.
      title: a line above the panels; none if empty.
      size: side of a panel in pixels.
      views: one row of panels from each.
      errors: also draw the prediction with the error of each point, see `error_colours`.

    Returns:
      (height, width, 3) uint8 RGB.

    Raises:
      ValueError: as `draw_cloud`, or without views.
    """
    roles: list[tuple[str, ArrayLike, Any]] = [("input", partial, PARTIAL)]
    if predicted is not None:
        roles.append(("prediction", predicted, PREDICTED))
    if errors and predicted is not None and target is not None:
        name = f"error, {WORST:.0%} of the size in red"
        roles.append((name, predicted, error_colours(predicted, target)))
    if target is not None:
        roles.append(("target", target, TARGET))
    panels = []
    for row, view in enumerate(views, start=1):
        frame = frame_of([cloud for _, cloud, _ in roles], view)
        for name, cloud, colour in roles:
            panel = draw_cloud(cloud, size, colour=colour, view=view, frame=frame)
            if row == len(views):
                ink = colour if isinstance(colour, tuple) else WRONG
                panel = _with_line(panel, name, ink, below=True)
            panels.append(panel)
    sheet = contact_sheet(panels, len(roles), gap=2, color=BACKGROUND)
    return _with_line(sheet, title, INK, below=False) if title else sheet


def error_colours(predicted: ArrayLike, target: ArrayLike) -> NDArray[np.float64]:
    """A colour for each predicted point, by its distance to the nearest point of the target.

    Args:
      predicted: (P, 3). target: (Q, 3), at least one point.
    Returns:
      (P, 3) RGB: PREDICTED where the point lies on the target, WRONG from WORST of the target's
      largest extent on.
    """
    true = np.asarray(target, np.float64)
    true = true[_drawable(true)]
    points = np.nan_to_num(np.asarray(predicted, np.float64), posinf=0.0, neginf=0.0)
    size = float(np.ptp(true, axis=0).max()) or 1.0
    share = np.clip(cKDTree(true).query(points)[0] / (WORST * size), 0, 1)[:, None]
    return (1 - share) * np.array(PREDICTED) + share * np.array(WRONG)


def _drawable(cloud: ArrayLike) -> NDArray[np.bool_]:
    """Which points are drawn: (n,) bool."""
    points = np.asarray(cloud, np.float64)
    return np.isfinite(points).all(1) & points.any(1)


def _seen(cloud: ArrayLike, view: View) -> NDArray[np.float64]:
    """The points to draw, in the axes of a view: right, up, towards the viewer."""
    points = np.asarray(cloud, np.float64)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"expected points of shape (n, 3), got {points.shape}")
    points = points[_drawable(points)]
    azimuth, elevation = np.radians(view)
    right = [np.cos(azimuth), 0, -np.sin(azimuth)]
    to_viewer = [
        np.sin(azimuth) * np.cos(elevation),
        np.sin(elevation),
        np.cos(azimuth) * np.cos(elevation),
    ]
    up = np.cross(to_viewer, right)
    return points @ np.stack([right, up, to_viewer], axis=1)


def _before_the_eye(seen: NDArray[np.float64]) -> NDArray[np.bool_]:
    return seen[:, 2] < 0.8 * _EYE


def _project(seen: NDArray[np.float64]) -> NDArray[np.float64]:
    """Perspective: (right, up, towards the viewer) becomes (right, up) on the plane through 0.

    Points that are beside or behind the eye are dropped.
    """
    seen = seen[_before_the_eye(seen)]
    flat = seen[:, :2] * (_EYE / (_EYE - seen[:, 2:]))
    return np.concatenate([flat, seen[:, 2:]], axis=1)


def _beads(
    projected: NDArray[np.float64], frame: Frame, side: int
) -> tuple[NDArray[np.intp], NDArray[np.float32], NDArray[np.float32], NDArray[np.intp]]:
    """Paints points as spheres: the pixels covered (flat indices), depth and light of each, and
    which point it shows."""
    scale = (0.5 - _MARGIN) * side / frame.half
    dy, dx, bulge, facing = _sphere(max(_BEAD * side, 1.0))
    edge = int(dy.max()) + 1
    flat = (projected[:, :2] - frame.middle) * scale * [1, -1] + (side - 1) / 2
    shown = np.flatnonzero(((flat > -edge) & (flat < side - 1 + edge)).all(1))
    # The nearest last: where the same pixel is assigned several times, the last one stays.
    shown = shown[np.argsort(projected[shown, 2], kind="stable")]
    column, row = np.rint(flat[shown]).astype(np.intp).T + 2 * edge
    wide = side + 4 * edge  # room for whole spheres around the picture
    owner = np.full(wide * wide, -1, np.int32)
    pixels = (row * wide + column)[:, None] + (dy * wide + dx)
    owner[pixels.ravel()] = np.arange(pixels.size, dtype=np.int32)
    owner = owner.reshape(wide, wide)[2 * edge : -2 * edge, 2 * edge : -2 * edge].ravel()
    covered = np.flatnonzero(owner >= 0)
    point, part = np.divmod(owner[covered], len(dx))
    depth = projected[shown, 2].astype(np.float32)[point] + (bulge / scale)[part]
    surface = np.full((side, side), _EMPTY, np.float32)
    surface.flat[covered] = depth
    light = _slope(surface, covered, scale) * _occlusion(surface, covered)
    return covered, depth, light * facing[part], shown[point]


def _sphere(
    radius: float,
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32], NDArray[np.float32]]:
    """The pixels of a sphere: their dy, dx, height above its edge (pixels) and light."""
    reach = int(radius)
    dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = dx**2 + dy**2 <= radius**2
    dy, dx = dy[disc], dx[disc]
    height = np.sqrt(radius**2 - dx**2 - dy**2)
    light = 0.85 + 0.25 * (np.stack([dx, -dy, height], axis=1) @ _LIGHT) / radius
    return dy, dx, height.astype(np.float32), light.astype(np.float32)


def _slope(
    surface: NDArray[np.float32], covered: NDArray[np.intp], scale: float
) -> NDArray[np.float32]:
    """Light on the smoothed surface at the covered pixels: its large faces differ in tone."""
    side = len(surface)
    # Gaps between points show what lies far behind: the nearest surface around closes them.
    closed = cv2.dilate(surface, np.ones((side // 60 + 1,) * 2, np.uint8))
    known = (closed > _EMPTY).astype(np.float32)
    weight = cv2.GaussianBlur(known, (0, 0), side / 100) + 1e-6
    smooth = cv2.GaussianBlur(closed * known, (0, 0), side / 100) / weight * scale
    right = cv2.Sobel(smooth, cv2.CV_32F, 1, 0, scale=1 / 8).ravel()[covered]
    down = cv2.Sobel(smooth, cv2.CV_32F, 0, 1, scale=1 / 8).ravel()[covered]
    facing = (_LIGHT[2] - _LIGHT[0] * right + _LIGHT[1] * down) / np.sqrt(right**2 + down**2 + 1)
    return 0.72 + 0.42 * np.maximum(facing, -0.3)


def _occlusion(surface: NDArray[np.float32], covered: NDArray[np.intp]) -> NDArray[np.float32]:
    """Light left at the covered pixels where neighbours lie in front: eye-dome lighting.

    Boucheny 2009, at two distances.
    """
    side = len(surface)
    shadow = np.zeros_like(surface)
    for reach in (max(1, side // 256), max(2, side // 64)):
        padded = np.pad(surface, reach, constant_values=_EMPTY)
        for dy, dx in ((0, 1), (1, 0), (1, 2), (2, 1)):
            other = padded[dy * reach : dy * reach + side, dx * reach : dx * reach + side]
            shadow += np.clip(other - surface, 0, 0.25)
    return np.exp(-shadow.ravel()[covered])


def _with_line(image: Image, text: str, colour: Color, *, below: bool) -> Image:
    """The image with a line of text centred in a strip below or above it."""
    strip = np.empty((_LINE, image.shape[1], 3), np.uint8)
    strip[:] = BACKGROUND
    width = cv2.getTextSize(text, _FONT, _FONT_SCALE, 1)[0][0]
    origin = (max(2, (image.shape[1] - width) // 2), _LINE - 7)
    cv2.putText(strip, text, origin, _FONT, _FONT_SCALE, colour, 1, cv2.LINE_AA)
    return np.concatenate([image, strip] if below else [strip, image])
