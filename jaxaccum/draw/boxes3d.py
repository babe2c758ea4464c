"""Pictures of 3D detections: boxes on the camera's image, from above, and both side by side.

Labels, frame and camera are KITTI's, as in `jaxaccum.metrics.kitti`: x right, y down, z forward in
metres; a camera is the (3, 4) projection of such points to pixels of the image at hand. Images are
(height, width, 3) uint8 RGB, as in `jaxaccum.draw`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxaccum.draw.boxes import Color, Image, class_color, ink_on
from jaxaccum.metrics.kitti import DONT_CARE, Labels

BACKGROUND: Color = (250, 250, 251)
GRID: Color = (226, 228, 233)
UNSEEN: Color = (240, 241, 244)
INK: Color = (140, 140, 150)
TRUTH: Color = (24, 24, 27)
# Types in the order of their colours; any other is drawn as Misc.
KINDS = ("Car", "Truck", "Pedestrian", "Cyclist", "Misc", "Van", "Tram", "Person_sitting")
NEAR = 0.1  # metres of depth before which nothing is drawn

_FONT = cv2.FONT_HERSHEY_DUPLEX
_SHIFT = 4  # OpenCV takes coordinates in 1/16 pixel
_TITLE = 24  # height of a line of text, in pixels
_GAP = 12  # pixels between panels
_SMALL = 60  # pixels below which a box is drawn with thin lines
_FAR_OUT = 2000  # pixels beyond the image where outlines are cut
# Corners by (along the length, up, along the width); front is where the first is 1.
_CORNERS = np.array([[i, j, k] for i in (1, 0) for j in (0, 1) for k in (0, 1)], np.float64)
_FRONT = (0, 1, 3, 2)
_EDGES = tuple(
    (a, b) for a in range(8) for b in range(a) if np.abs(_CORNERS[a] - _CORNERS[b]).sum() == 1
)


class Extent(NamedTuple):
    """The ground that a bird's-eye picture shows, in metres.

    Attributes:
      left: least x.
      right: largest x.
      near: least z.
      far: largest z.
    """

    left: float
    right: float
    near: float
    far: float


DEFAULT_EXTENT = Extent(-30, 30, -2, 70)


def kind_color(kind: str) -> Color:
    """The RGB colour of a KITTI type."""
    return class_color(KINDS.index(kind if kind in KINDS else "Misc"))


def corners(labels: Labels) -> NDArray[np.float64]:
    """(n, 8, 3) corners of the boxes in metres; the first four are the front face."""
    height, width, length, x, y, z, yaw = labels.boxes3d.T[..., None]
    along, up, across = _CORNERS.T
    along, across = (along - 0.5) * length, (across - 0.5) * width
    cos, sin = np.cos(yaw), np.sin(yaw)
    place = (x + cos * along + sin * across, y - up * height, z - sin * along + cos * across)
    return np.stack(place, axis=2)


def draw(
    image: Image,
    labels: Labels,
    camera: ArrayLike,
    *,
    text: bool = True,
) -> Image:
    """Draws 3D boxes on a copy of the camera's image; nearer ones lie on top.

    The front face is tinted. What lies behind the camera is cut off. DontCare areas and labels
    without dimensions are not drawn.

    Args:
      image: (height, width, 3) uint8 RGB.
      labels: detections or ground truth of that image.
      camera: (3, 4) projection to its pixels.
      text: whether to write type, score (if there is one) and depth at each box.

    Returns:
      (height, width, 3) uint8 RGB.

    Raises:
      ValueError: if the image is not uint8 RGB or the camera not (3, 4).
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected (h, w, 3) uint8 RGB, got {image.shape} {image.dtype}")
    camera = np.asarray(camera, np.float64)
    if camera.shape != (3, 4):
        raise ValueError(f"a camera is a (3, 4) projection, got {camera.shape}")
    canvas = image.copy()
    size = (image.shape[0], image.shape[1])
    line = max(1, round(max(size) / 620))
    solid = corners(labels)
    seen = solid @ camera[:, :3].T + camera[:, 3]  # (n, 8, 3): u w, v w, w
    order = _by_depth(labels)
    edges = {i: [e for edge in _EDGES if len(e := _clip(seen[i, edge], size))] for i in order}
    for i in reversed(order):
        color = kind_color(labels.kinds[i])
        front = _clip(seen[i, _FRONT], size)
        if len(front) > 2:
            canvas = _tint(canvas, _fixed(front), color, 0.3)
        small = bool(edges[i]) and np.ptp(np.concatenate(edges[i]), axis=0).max() < _SMALL
        for ends in edges[i]:
            _draw_line(canvas, _fixed(ends), color, 1 if small else line)
    plates: list[tuple[int, int, int, int]] = []
    for i in order if text else []:  # the nearest gets its place first
        if edges[i]:
            outline = np.concatenate(edges[i])
            _write_plate(canvas, _caption(labels, i), outline, kind_color(labels.kinds[i]), plates)
    return canvas


def _caption(labels: Labels, index: int) -> str:
    score = "" if labels.scores is None else f" {labels.scores[index]:.2f},"
    return f"{labels.kinds[index]}{score} {labels.locations[index, 2]:.0f} m"


def _by_depth(labels: Labels) -> list[int]:
    """Indices of what has a box to draw, from near to far."""
    there = (labels.dimensions > 0).all(1) & np.isfinite(labels.boxes3d).all(1)
    there &= np.array(labels.kinds, np.str_) != DONT_CARE
    order = np.argsort(labels.locations[:, 2], kind="stable")
    return [int(i) for i in order if there[i]]


def _clip(points: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float64]:
    """What of a convex polygon, or of a segment, is before the camera and near the image.

    Args:
      points: (k, 3) homogeneous: u w, v w, w.
      size: (height, width) of the image.

    Returns:
      (m, 2) u, v in pixels; none if nothing is left. A segment comes back as its two ends.
    """
    height, width = size
    m = _FAR_OUT
    planes = [(0, 0, 1, -NEAR), (1, 0, m, 0), (-1, 0, width + m, 0), (0, 1, m, 0)]
    planes.append((0, -1, height + m, 0))
    closed = len(points) > 2
    for *normal, offset in planes:
        side = points @ np.array(normal, np.float64) + offset
        kept = []
        for i, (point, depth) in enumerate(zip(points, side, strict=True)):
            if depth >= 0:
                kept.append(point)
            if i + 1 == len(points) and not closed:
                break
            j = (i + 1) % len(points)
            if depth * side[j] < 0:
                kept.append(point + depth / (depth - side[j]) * (points[j] - point))
        points = np.array(kept).reshape(-1, 3)
    return points[:, :2] / points[:, 2:]


def _fixed(points: NDArray[np.float64]) -> NDArray[np.int32]:
    """Pixel positions (0 at the first pixel's corner) as OpenCV takes them (0 at its centre)."""
    return np.rint((np.asarray(points) - 0.5) * 2**_SHIFT).astype(np.int32)


def _write_plate(
    canvas: Image,
    text: str,
    outline: NDArray[np.float64],
    color: Color,
    plates: list[tuple[int, int, int, int]],
) -> None:
    """A label above the outline, moved up, then down, past earlier ones; added to `plates`.

    None where the outline is outside the image or the place is taken in every direction.
    """
    height, width = canvas.shape[:2]
    (left, top), (right, bottom) = outline.min(0), outline.max(0)
    if right < 0 or bottom < 0 or left > width or top > height:
        return
    left, right = max(left, 0), min(right, width)
    font_scale = max(0.36, max(height, width) / 3200)
    capital = round(21 * font_scale)  # OpenCV's letters are 21 pixels tall at scale 1
    margin = round(0.42 * capital)
    plate_width = cv2.getTextSize(text, _FONT, font_scale, 1)[0][0] + 2 * margin
    plate_height = capital + 2 * margin
    x = int(np.clip((left + right - plate_width) / 2, 0, max(0, width - plate_width)))
    first = int(np.clip(top - plate_height - 2, 0, max(0, height - plate_height)))
    for step in (0, -1, -2, -3, 1, 2, 3, -4, -5, 4, 5):
        y = first + step * (plate_height + 1)
        plate = (x, y, x + plate_width, y + plate_height)
        if 0 <= y <= height - plate_height and not any(_meet(plate, other) for other in plates):
            break
    else:
        return
    plates.append(plate)
    cv2.rectangle(canvas, plate[:2], (plate[2] - 1, plate[3] - 1), color, cv2.FILLED)
    origin = (x + margin, y + margin + capital)
    cv2.putText(canvas, text, origin, _FONT, font_scale, ink_on(color), 1, cv2.LINE_AA)


def _meet(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def field_of_view(camera: ArrayLike, width: int) -> tuple[float, float]:
    """x / z of what is seen at the left and the right edge of an image `width` pixels wide."""
    camera = np.asarray(camera, np.float64)
    return -camera[0, 2] / camera[0, 0], (width - camera[0, 2]) / camera[0, 0]


def birds_eye(
    labels: Labels,
    truths: Labels | None = None,
    *,
    extent: Extent = DEFAULT_EXTENT,
    height: int = 720,
    view: tuple[float, float] | None = None,
) -> Image:
    """Draws the boxes from above, the camera at the origin looking up.

    Filled: `labels`; outlined in black: `truths`. The line from a box's middle points where it
    heads. What lies outside the extent is cut.

    Args:
      labels: detections (or ground truth, to see it alone).
      truths: ground truth to compare with, or None.
      extent: the ground to show.
      height: of the picture in pixels; the width follows from the extent.
      view: what the camera sees (`field_of_view`), to mark the rest as unseen.

    Returns:
      (height, width, 3) uint8 RGB.

    Raises:
      ValueError: if the extent is empty or the height is not positive.
    """
    if extent.right <= extent.left or extent.far <= extent.near or height < 1:
        raise ValueError(f"nothing to draw: {extent}, {height=}")
    ground = _Ground(extent, height / (extent.far - extent.near))
    width = max(1, round((extent.right - extent.left) * ground.scale))
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = BACKGROUND
    line = max(1, round(height / 420))
    reach = 2 * max(np.abs(extent))
    for slope, side in zip(view or (), (-1, 1), strict=bool(view)):
        beyond = [(0, 0), (slope * reach, reach), (side * 9 * reach, reach)]
        beyond += [(side * 9 * reach, -reach), (0, -reach)]
        cv2.fillPoly(canvas, [ground.pixels(beyond)], UNSEEN, cv2.LINE_AA, _SHIFT)
    _draw_grid(canvas, ground)
    for slope in view or ():
        _draw_line(canvas, ground.pixels([(0, 0), (slope * reach, reach)]), INK, 1)
    eye = [(-0.9, -1.2), (0, 1.2), (0.9, -1.2)]
    cv2.fillPoly(canvas, [ground.pixels(eye)], INK, cv2.LINE_AA, _SHIFT)
    for i in reversed(_by_depth(labels)):
        color = kind_color(labels.kinds[i])
        outline, heading = _footprint(labels, i)
        canvas = _tint(canvas, ground.pixels(outline), color, 0.5)
        _draw_line(canvas, ground.pixels(outline), color, line)
        _draw_line(canvas, ground.pixels(heading), color, line)
    if truths is not None:
        for i in _by_depth(truths):
            for part in _footprint(truths, i):
                _draw_line(canvas, ground.pixels(part), TRUTH, 1)
    return canvas


class _Ground(NamedTuple):
    extent: Extent
    scale: float  # pixels a metre

    def pixels(self, points: ArrayLike) -> NDArray[np.int32]:
        """(k, 2) x, z in metres, as OpenCV takes them."""
        x, z = np.asarray(points, np.float64).T
        extent, scale = self.extent, self.scale
        return _fixed(np.stack([(x - extent.left) * scale, (extent.far - z) * scale], axis=1))


def _draw_grid(canvas: Image, ground: _Ground) -> None:
    """Lines each 10 metres (5 where that would be too few), with their depth at the left."""
    extent = ground.extent
    step = 10 if extent.far - extent.near > 30 else 5
    for x in range(step * math.ceil(extent.left / step), math.ceil(extent.right), step):
        _draw_line(canvas, ground.pixels([(x, extent.near), (x, extent.far)]), GRID, 1)
    for z in range(step * math.ceil(extent.near / step), math.ceil(extent.far), step):
        ends = ground.pixels([(extent.left, z), (extent.right, z)])
        _draw_line(canvas, ends, GRID, 1)
        if z > extent.near:
            origin = (6, int(ends[0, 1] >> _SHIFT) - 5)
            cv2.putText(canvas, f"{z} m", origin, _FONT, 0.4, INK, 1, cv2.LINE_AA)


def _footprint(labels: Labels, index: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The closed outline (5, 2) and the heading line (2, 2), as x, z in metres."""
    x, _, z = labels.locations[index].astype(np.float64)
    _, width, length = labels.dimensions[index].astype(np.float64)
    cos, sin = math.cos(labels.yaw[index]), math.sin(labels.yaw[index])
    along, across = np.array([cos, -sin]) * length / 2, np.array([sin, cos]) * width / 2
    middle = np.array([x, z])
    outline = [along + across, along - across, -along - across, -along + across, along + across]
    # The line reaches beyond the front, so that it can be told from the back when boxes are small.
    return middle + outline, np.array([middle, middle + along * 1.4])


def _draw_line(canvas: Image, points: NDArray[np.int32], color: Color, line: int) -> None:
    cv2.polylines(canvas, [points], False, color, line, cv2.LINE_AA, _SHIFT)


def _tint(canvas: Image, points: NDArray[np.int32], color: Color, strength: float) -> Image:
    """The canvas with a polygon filled translucently."""
    filled = canvas.copy()
    cv2.fillPoly(filled, [points], color, cv2.LINE_AA, _SHIFT)
    return cv2.addWeighted(filled, strength, canvas, 1 - strength, 0).astype(np.uint8, copy=False)


def side_by_side(
    image: Image,
    labels: Labels,
    camera: ArrayLike,
    truths: Labels | None = None,
    *,
    extent: Extent = DEFAULT_EXTENT,
    text: bool = True,
) -> Image:
    """The camera's image beside the view from above; with truths, their image below the first.

    Args:
      image: (height, width, 3) uint8 RGB.
      labels: detections of that image.
      camera: (3, 4) projection to its pixels.
      truths: its ground truth, or None.
      extent: the ground to show from above.
      text: whether to write type, score and depth at each box.

    Returns:
      (height, width, 3) uint8 RGB.

    Raises:
      ValueError: as `draw` and `birds_eye`.
    """
    found = "predicted" if labels.scores is not None else "ground truth"
    panels = [_titled(draw(image, labels, camera, text=text), found)]
    above = found
    if truths is not None:
        panels.append(_titled(draw(image, truths, camera, text=text), "ground truth"))
        above = f"{found} (filled), ground truth (black)"
    left = np.concatenate(panels)
    ground = birds_eye(
        labels,
        truths,
        extent=extent,
        height=len(left) - _TITLE,
        view=field_of_view(camera, image.shape[1]),
    )
    gap = np.full((len(left), _GAP, 3), 255, np.uint8)
    return np.concatenate([left, gap, _titled(ground, above)], axis=1)


def _titled(image: Image, title: str) -> Image:
    """The image below a line of text."""
    strip = np.full((_TITLE, image.shape[1], 3), 255, np.uint8)
    cv2.putText(strip, title, (2, _TITLE - 8), _FONT, 0.45, TRUTH, 1, cv2.LINE_AA)
    return np.concatenate([strip, image])
