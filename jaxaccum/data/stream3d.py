"""3D detection's samples: the training stream and evaluation batches, on rectangles.

Everything that happens to an image happens to its camera: an image warped by the matrix A has the
camera A @ P2, and a mirrored one mirrors the world too. So the boxes in space keep their metres and
project, by the sample's camera, to where they show in the sample's image.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from jaxaccum.data.augment import FILL, Augment, hsv, worth_keeping
from jaxaccum.data.base import Image
from jaxaccum.data.cache import ByteCache
from jaxaccum.data.formats.kitti import Objects3D, Source3D
from jaxaccum.data.loader import room
from jaxaccum.data.stream import Batch, OnError, Place, SampleStream, in_order, suit_process

Matrix = NDArray[np.float64]
Size = tuple[int, int]

_GIB = 1 << 30


@dataclass(frozen=True)
class Augment3D:
    """The hyperparameters of augmentation that a camera can follow; part of the recipe.

    Attributes:
      translate: shift, drawn from +-translate of the sample's width and height.
      scale: zoom, drawn from 1 +- scale.
      hsv_h: hue shift, drawn from +-hsv_h of the colour circle.
      hsv_s: saturation gain, drawn from 1 +- hsv_s.
      hsv_v: value gain, drawn from 1 +- hsv_v.
      fliplr: probability of a left-right flip.
    """

    translate: float = 0.1
    scale: float = 0.5
    hsv_h: float = 0.015
    hsv_s: float = 0.7
    hsv_v: float = 0.4
    fliplr: float = 0.5

    def __post_init__(self) -> None:
        self.of_images()  # refuses what is out of range

    def of_images(self) -> Augment:
        """The same for images alone."""
        return Augment(mosaic=0.0, **asdict(self))


class Sample3D(NamedTuple):
    """An image (H, W, 3) uint8 with its objects and its camera, (3, 4)."""

    image: Image
    objects: Objects3D
    camera: NDArray[np.floating]


def augmented3d(
    image: Image,
    objects: Objects3D,
    camera: NDArray[np.floating],
    size: Size,
    augment: Augment3D,
    rng: np.random.Generator,
    *,
    mirror_world: bool = True,
) -> Sample3D:
    """Letterboxes and augments an image: affine, HSV, flip, in this order.

    Args:
      image: (h, w, 3) uint8, already resized to fit `size`; it is not written to.
      objects: its objects, with 2D boxes in its pixels.
      camera: its projection.
      size: (height, width) of the result.
      augment: the hyperparameters.
      rng: the only source of randomness.
      mirror_world: of a flip, as `mirrored` takes it.

    Returns:
      A sample of `size`. An object whose 2D box is too small or too cropped is left out whole.
    """
    pad = _pad(image.shape[:2], size)
    warp, zoom = _zoom_and_shift(size, augment, rng)
    warp = warp @ _shift(*pad)
    # OpenCV's coordinates are of pixel centres, ours of pixel edges: half a pixel apart.
    centres = _shift(-0.5, -0.5) @ warp @ _shift(0.5, 0.5)
    height, width = size
    pixels = np.asarray(
        cv2.warpAffine(image, centres[:2], (width, height), borderValue=(FILL, FILL, FILL)),
        np.uint8,
    )
    after = objects.boxes * zoom + np.tile(warp[:2, 2], 2)
    after = np.clip(after, 0, [width, height, width, height])
    kept = worth_keeping(objects.boxes, after, zoom)
    sample = Sample3D(pixels, chosen(objects, kept, after), warp @ camera)
    sample = sample._replace(image=hsv(pixels, augment.of_images(), rng))
    if rng.random() < augment.fliplr:
        sample = mirrored(sample, mirror_world=mirror_world)
    return sample


def mirrored(sample: Sample3D, *, mirror_world: bool = True) -> Sample3D:
    """Mirrors a sample left to right: image, 2D boxes, the world (x, yaw), and the camera.

    With the mirror of the image M and of the world F, both their own inverse, the camera M P F
    shows F X where P shows X, mirrored. Without `mirror_world` it stays, and the camera is M P.
    """
    image, objects, camera = sample
    width = image.shape[1]
    boxes = np.stack(
        [
            width - objects.boxes[:, 2], objects.boxes[:, 1],
            width - objects.boxes[:, 0], objects.boxes[:, 3],
        ],
        axis=1,
    )  # fmt: skip
    camera = np.array([[-1, 0, width], [0, 1, 0], [0, 0, 1]], np.float64) @ camera
    flipped = np.asarray(cv2.flip(image, 1), np.uint8)
    if not mirror_world:
        return Sample3D(flipped, replace(objects, boxes=boxes), camera)
    world = replace(
        objects,
        boxes=boxes,
        locations=objects.locations * np.array([-1, 1, 1], np.float32),
        yaw=wrapped(np.pi - objects.yaw.astype(np.float64)),
    )
    return Sample3D(flipped, world, camera * np.array([-1, 1, 1, 1]))


def wrapped(angle: NDArray[np.floating]) -> NDArray[np.float32]:
    """Angles in radians, brought into [-pi, pi), as float32."""
    return ((angle + np.pi) % (2 * np.pi) - np.pi).astype(np.float32)


def chosen(objects: Objects3D, rows: NDArray[np.generic], boxes: NDArray[np.floating]) -> Objects3D:
    """Some rows of objects, with other 2D boxes (n, 4), given for all rows."""
    return Objects3D(
        np.asarray(boxes, np.float32)[rows],
        objects.classes[rows],
        objects.locations[rows],
        objects.dimensions[rows],
        objects.yaw[rows],
    )


def letterbox3d(image: Image, size: Size) -> tuple[Image, NDArray[np.float32], NDArray[np.float32]]:
    """Fits an image into (height, width), centred on grey.

    Returns:
      The (height, width, 3) image; ratio (2,) and pad (2,) float32, both x then y, that map
      coordinates: x_sample = x * ratio_x + pad_x.
    """
    resized = _fitted(image, size)
    height, width = resized.shape[:2]
    left, top = _pad((height, width), size)
    canvas = np.full((*size, 3), FILL, np.uint8)
    canvas[top : top + height, left : left + width] = resized
    ratio = np.array([width / image.shape[1], height / image.shape[0]], np.float32)
    return canvas, ratio, np.array([left, top], np.float32)


def letterboxed_camera(
    camera: NDArray[np.floating], ratio: NDArray[np.floating], pad: NDArray[np.floating]
) -> NDArray[np.float32]:
    """The camera (3, 4) of a letterboxed image: ratio and pad (2,) as `letterbox3d` gives them."""
    fit = np.array([[ratio[0], 0, pad[0]], [0, ratio[1], pad[1]], [0, 0, 1]], np.float64)
    return (fit @ camera).astype(np.float32)


class TrainStream3D(SampleStream):
    """Random access to the samples of a run.

    A sample is image (H, W, 3) uint8 RGB; boxes (M, 4) float32 xyxy pixels; classes (M,) int32;
    valid (M,) bool; locations (M, 3) float32 x, y, z of bottom centres in metres; dimensions
    (M, 3) float32 height, width, length in metres; yaw (M,) float32 radians; camera (3, 4) float32,
    the projection to the sample's pixels; weight () float32, 1; index () int32; epoch () int32.
    Rows that are not valid are 0.

    Attributes:
      truncated: objects left out so far because a sample had more than `max_objects`; those with
        the smallest 2D boxes are left out.
    """

    def __init__(
        self,
        source: Source3D,
        *,
        size: Size,
        max_objects: int,
        augment: Augment3D,
        seed: int,
        compat: bool = False,
        cache: Literal["ram", "none"] = "ram",
        cache_bytes: int = 2 * _GIB,
        on_error: OnError = "raise",
    ) -> None:
        """Describes a run's samples; reads nothing yet.

        Args:
          source: the data set.
          size: (height, width) of the samples in pixels.
          max_objects: rows for objects in a sample.
          augment: the hyperparameters of augmentation.
          seed: of the order and the augmentation; not negative.
          compat: flips as YOLOv12-3D does: image, 2D boxes and camera, but not the boxes in space.
            (It also gave objects the 3D box of another where the affine left one out: that is not
            reproduced.)
          cache: "ram" keeps resized images in memory.
          cache_bytes: most bytes to keep, the least recently used go first; each worker process
            keeps its own share.
          on_error: as in `SampleStream`.

        Raises:
          ValueError: an argument is out of range.
        """
        for name, value, lowest in (
            ("size", min(size), 2),
            ("max_objects", max_objects, 1),
            ("cache_bytes", cache_bytes, 0),
        ):
            if value < lowest:
                given = size if name == "size" else value
                raise ValueError(f"{name} is {given}, expected at least {lowest}.")
        if cache not in ("ram", "none"):
            raise ValueError(f"cache is {cache!r}, expected 'ram' or 'none'.")
        super().__init__(len(source), seed, on_error)
        self._source = source
        self._size = size
        self._rows = max_objects
        self._augment = augment
        self._mirror_world = not compat
        self._images = _FittedImages(source, size, cache_bytes if cache == "ram" else 0)

    def _empty(self, count: int, position: int) -> Batch:
        del position
        return _empty(count, self._size, self._rows)

    def _write(self, batch: Batch, row: int, place: Place, rng: np.random.Generator) -> int:
        image, (height, width) = self._images[place.index]
        ratio = np.array([image.shape[1] / width, image.shape[0] / height])
        objects = self._source.objects(place.index)
        camera = self._source.camera(place.index) * np.array([[*ratio, 1.0]]).T
        sample = augmented3d(
            image, replace(objects, boxes=objects.boxes * np.tile(ratio, 2)), camera,
            self._size, self._augment, rng, mirror_world=self._mirror_world,
        )  # fmt: skip
        return _write(batch, row, sample)


def eval_batches3d(
    source: Source3D,
    *,
    size: Size,
    batch: int,
    max_objects: int | None = None,
    prefetch: int = 2,
    lost: list[str] | None = None,
    prepared: dict[int, float] | None = None,
) -> Iterator[Batch]:
    """The data set once, in order, letterboxed, without augmentation.

    Args:
      source: the data set.
      size: (height, width) of the samples in pixels.
      batch: samples in each batch; the last is filled up with grey samples of weight 0 and
        index -1.
      max_objects: rows for objects; None takes as many as the fullest image has.
      prefetch: batches to prepare ahead.
      lost, prepared: as `eval_batches` takes them.

    Yields:
      The arrays of a `TrainStream3D` sample with a leading axis of `batch`, epoch 0, and also
      ratio (n, 2) and pad (n, 2) float32, both x then y: x_original = (x - pad_x) / ratio_x;
      size (n, 2) float32, the original height and width.

    Raises:
      DataError: an image cannot be read, or none can; or one has more than max_objects objects.
      ValueError: an argument is out of range.
    """
    if min(size) < 2 or batch < 1 or prefetch < 0:
        raise ValueError(
            f"size {size}, batch {batch}, prefetch {prefetch}: expected at least 2 x 2, 1 and 0."
        )
    rows = room(source, max_objects)
    suit_process()
    return _evaluated(source, size, batch, rows, prefetch, lost, prepared)


def _evaluated(
    source: Source3D, size: Size, batch: int, rows: int, prefetch: int, lost: list[str] | None,
    prepared: dict[int, float] | None,
) -> Iterator[Batch]:  # fmt: skip
    def fill(arrays: Batch, row: int, index: int) -> int:
        image, objects = source.image(index), source.objects(index)
        canvas, ratio, pad = letterbox3d(image, size)
        arrays["index"][row] = index
        arrays["ratio"][row] = ratio
        arrays["pad"][row] = pad
        arrays["size"][row] = image.shape[:2]
        placed = replace(objects, boxes=objects.boxes * np.tile(ratio, 2) + np.tile(pad, 2))
        camera = letterboxed_camera(source.camera(index), ratio, pad)
        return _write(arrays, row, Sample3D(canvas, placed, camera))

    def empty() -> Batch:
        arrays = _empty(batch, size, rows)
        arrays["ratio"] = np.ones((batch, 2), np.float32)
        arrays["pad"] = np.zeros((batch, 2), np.float32)
        arrays["size"] = np.tile(np.array(size, np.float32), (batch, 1))
        return arrays

    return in_order(len(source), batch, empty, fill, prefetch, lost, prepared)


class _FittedImages(ByteCache[tuple[Image, Size]]):
    """Images resized to fit, the least recently used forgotten."""

    def __init__(self, source: Source3D, size: Size, capacity: int) -> None:
        super().__init__(capacity)
        self._source = source
        self._size = size

    def __getitem__(self, index: int) -> tuple[Image, Size]:
        """The resized image, not to be written to, and its original (height, width)."""
        return self.get(index, functools.partial(self._read, index))

    def _read(self, index: int) -> tuple[Image, Size]:
        original = self._source.image(index)
        height, width = original.shape[:2]
        return _fitted(original, self._size), (height, width)


def _fitted(image: Image, size: Size) -> Image:
    """Resizes so that the image just fits into (height, width)."""
    height, width = image.shape[:2]
    ratio = min(size[0] / height, size[1] / width)
    new = max(round(width * ratio), 1), max(round(height * ratio), 1)
    if new == (width, height):
        return image
    return np.asarray(cv2.resize(image, new, interpolation=cv2.INTER_LINEAR), np.uint8)


def _pad(inner: Size, size: Size) -> tuple[int, int]:
    """Left and top padding of an image of (height, width) `inner`."""
    return round((size[1] - inner[1]) / 2 - 0.1), round((size[0] - inner[0]) / 2 - 0.1)


def _shift(x: float, y: float) -> Matrix:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]], np.float64)


def _zoom_and_shift(
    size: Size, augment: Augment3D, rng: np.random.Generator
) -> tuple[Matrix, float]:
    """Draws zoom about the centre and translation: a (3, 3) matrix, and the zoom."""
    draw = rng.uniform(-1, 1, size=3)
    zoom = float(1 + draw[0] * augment.scale)
    height, width = size
    dx, dy = (0.5 + draw[1:] * augment.translate) * (width, height)
    return _shift(dx, dy) @ np.diag([zoom, zoom, 1]) @ _shift(-width / 2, -height / 2), zoom


def _empty(count: int, size: Size, rows: int) -> Batch:
    """A batch of grey samples of weight 0, seen by a camera that divides by no zero."""
    height, width = size
    camera = np.array(
        [[width, 0, width / 2, 0], [0, width, height / 2, 0], [0, 0, 1, 0]], np.float32
    )
    return {
        "image": np.full((count, height, width, 3), FILL, np.uint8),
        "boxes": np.zeros((count, rows, 4), np.float32),
        "classes": np.zeros((count, rows), np.int32),
        "valid": np.zeros((count, rows), bool),
        "locations": np.zeros((count, rows, 3), np.float32),
        "dimensions": np.zeros((count, rows, 3), np.float32),
        "yaw": np.zeros((count, rows), np.float32),
        "camera": np.tile(camera, (count, 1, 1)),
        "weight": np.zeros(count, np.float32),
        "index": np.zeros(count, np.int32),
        "epoch": np.zeros(count, np.int32),
    }


def _write(batch: Batch, row: int, sample: Sample3D) -> int:
    """Writes a sample into a row of a batch; returns how many of its objects did not fit."""
    image, objects, camera = sample
    rows = int(batch["valid"].shape[1])
    excess = len(objects) - rows
    if excess > 0:
        boxes = objects.boxes
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        objects = chosen(objects, np.sort(np.argsort(-areas, kind="stable")[:rows]), boxes)
    count = len(objects)
    batch["image"][row] = image
    for key in ("boxes", "classes", "locations", "dimensions", "yaw"):
        batch[key][row, :count] = getattr(objects, key)
    batch["valid"][row, :count] = True
    batch["camera"][row] = camera
    batch["weight"][row] = 1
    return max(excess, 0)
