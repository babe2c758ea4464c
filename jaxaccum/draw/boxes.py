"""Pictures of detections: boxes on one image, many images on one sheet, written to a file.

Images are (height, width, 3) uint8 RGB throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Image = NDArray[np.uint8]
Color = tuple[int, int, int]

# Strong, mutually distinct hues first; softer and darker relatives after them.
PALETTE: tuple[Color, ...] = (
    (239, 68, 68),
    (37, 99, 235),
    (250, 204, 21),
    (22, 163, 74),
    (217, 70, 239),
    (6, 182, 212),
    (249, 115, 22),
    (124, 58, 237),
    (163, 230, 53),
    (236, 72, 153),
    (20, 184, 166),
    (146, 64, 14),
    (147, 197, 253),
    (190, 18, 60),
    (253, 186, 116),
    (67, 56, 202),
    (134, 239, 172),
    (112, 26, 117),
    (252, 165, 165),
    (77, 124, 15),
)
SHEET_COLOR: Color = (24, 24, 27)
MIN_SIDE = 640  # smaller images are enlarged to this long side before anything is drawn on them
_FONT = cv2.FONT_HERSHEY_DUPLEX


def class_color(index: int) -> Color:
    """The RGB colour of class `index`; colours repeat after the palette's twenty."""
    return PALETTE[index % len(PALETTE)]


def draw_detections(
    image: Image,
    boxes: ArrayLike,
    classes: ArrayLike,
    names: Sequence[str],
    scores: ArrayLike | None = None,
    *,
    enlarge: bool = True,
) -> Image:
    """Draws labelled boxes on a copy of an image; better detections lie on top.

    Args:
      image: (height, width, 3) uint8 RGB.
      boxes: (n, 4) xyxy in pixels of `image`.
      classes: (n,) integers, indices into `names`.
      names: class names.
      scores: (n,) probabilities to print beside the names, or None (ground truth).
      enlarge: first enlarge an image below 640 pixels on its long side to that, so that lines and
        letters stay crisp.

    Returns:
      (height, width, 3) uint8 RGB, of `image` or enlarged.

    Raises:
      ValueError: if the image is not uint8 RGB or the lengths differ.
    """
    _check_image(image)
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    labels = [int(c) for c in np.asarray(classes).reshape(-1)]
    values = None if scores is None else np.asarray(scores, np.float64).reshape(-1)
    if len(labels) != len(boxes) or (values is not None and len(values) != len(boxes)):
        raise ValueError(
            f"{len(boxes)} boxes, {len(labels)} classes"
            + ("" if values is None else f" and {len(values)} scores")
        )
    scale = max(1.0, MIN_SIDE / max(image.shape[:2])) if enlarge else 1.0
    canvas = _resize(image, scale)
    corners = np.rint(boxes * scale).astype(int)
    line = max(2, round(max(canvas.shape[:2]) / 320))
    order = range(len(boxes)) if values is None else np.argsort(values, kind="stable")

    for i in order:
        _draw_frame(canvas, corners[i].tolist(), class_color(labels[i]), line)
    for i in order:
        text = names[labels[i]] if values is None else f"{names[labels[i]]} {values[i]:.2f}"
        _draw_plate(canvas, text, corners[i].tolist(), class_color(labels[i]), line)
    return canvas


def contact_sheet(
    images: Sequence[Image],
    columns: int,
    *,
    cell: int | None = None,
    gap: int = 12,
    color: Color = SHEET_COLOR,
) -> Image:
    """Lays images out in rows of `columns`, centred in equal cells.

    Args:
      images: at least one (height, width, 3) uint8 RGB, of any sizes.
      columns: images a row; fewer if there are fewer images.
      cell: resize every image to this long side; None leaves sizes as they are.
      gap: pixels between images and around them.
      color: the sheet's RGB colour.

    Raises:
      ValueError: without images or columns, or if an image is not uint8 RGB.
    """
    if not images or columns < 1:
        raise ValueError(f"a sheet needs images and columns, got {len(images)} images, {columns=}")
    for image in images:
        _check_image(image)
    if cell is not None:
        images = [_resize(image, cell / max(image.shape[:2])) for image in images]
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height = max(image.shape[0] for image in images)
    width = max(image.shape[1] for image in images)
    sheet = np.empty((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), np.uint8)
    sheet[:] = color
    for i, image in enumerate(images):
        h, w = image.shape[:2]
        y = gap + i // columns * (height + gap) + (height - h) // 2
        x = gap + i % columns * (width + gap) + (width - w) // 2
        sheet[y : y + h, x : x + w] = image
    return sheet


def save_image(path: str | Path, image: Image) -> None:
    """Writes an RGB image; the suffix (.png, .jpg, ...) names the format. Makes missing folders.

    Raises:
      ValueError: if the image is not uint8 RGB or the format is unknown.
    """
    path = Path(path)
    data = encode_image(image, path.suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def encode_image(image: Image, suffix: str = ".png") -> bytes:
    """The bytes of an image file of the format that `suffix` names; errors as in `save_image`."""
    _check_image(image)
    if not cv2.haveImageWriter(suffix):
        raise ValueError(f"cannot write images of format {suffix!r}")
    done, data = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not done:
        raise ValueError(f"cannot encode an image of shape {image.shape} as {suffix!r}")
    return data.tobytes()


def _check_image(image: Image) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"expected (h, w, 3) uint8 RGB, got {image.shape} {image.dtype}")


def _resize(image: Image, scale: float) -> Image:
    """A resized copy (the same size at scale 1)."""
    if scale == 1:
        return image.copy()
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(image, size, interpolation=method).astype(np.uint8, copy=False)


def _draw_frame(canvas: Image, box: list[int], color: Color, line: int) -> None:
    """A frame `line` pixels wide, centred on the box's edges, with sharp corners."""
    left, top, right, bottom = (edge - line // 2 for edge in box)
    for x0, y0, x1, y1 in (
        (left, top, right + line, top + line),
        (left, bottom, right + line, bottom + line),
        (left, top, left + line, bottom + line),
        (right, top, right + line, bottom + line),
    ):
        canvas[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = color


def _draw_plate(canvas: Image, text: str, box: list[int], color: Color, line: int) -> None:
    """A filled label above the box's top left corner, or just inside where there is no room."""
    height, width = canvas.shape[:2]
    font_scale = 0.2 * line + 0.05
    capital = round(21 * font_scale)  # OpenCV's letters are 21 pixels tall at scale 1
    margin = round(0.45 * capital)
    text_width = cv2.getTextSize(text, _FONT, font_scale, 1)[0][0]
    plate_width, plate_height = text_width + 2 * margin, capital + 2 * margin
    left, top = box[0] - line // 2, box[1] - line // 2
    if top >= plate_height:
        top -= plate_height
    left = max(0, min(left, width - plate_width))
    top = max(0, min(top, height - plate_height))
    canvas[top : top + plate_height, left : left + plate_width] = color
    origin = (left + margin, top + margin + capital)
    cv2.putText(canvas, text, origin, _FONT, font_scale, ink_on(color), 1, cv2.LINE_AA)


def ink_on(color: Color) -> Color:
    """White where its contrast with `color` is at least 3 : 1 (WCAG, bold text), else black."""
    channels = np.array(color) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ [0.2126, 0.7152, 0.0722])
    return (255, 255, 255) if 1.05 / (luminance + 0.05) >= 3 else (0, 0, 0)
