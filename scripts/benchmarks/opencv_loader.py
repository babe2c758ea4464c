"""A plain loader with OpenCV, to compare with: mosaic, random affine, HSV, flip, one at a time."""

from __future__ import annotations

import random
from pathlib import Path

import cv2
import numpy as np

GREY = (114, 114, 114)


class Loader:
    """Training samples of a folder of images with YOLO labels beside them.

    Args:
      folder: holds images/train and labels/train. size: side of a sample in pixels.
      cached: keep resized images in memory.
    """

    def __init__(self, folder: Path, size: int, cached: bool):
        self.files = sorted((folder / "images/train").iterdir())
        self.labels = [
            np.loadtxt(folder / "labels/train" / f"{file.stem}.txt", np.float32, ndmin=2).reshape(
                -1, 5
            )
            for file in self.files
        ]
        self.size = size
        self.cache: dict[int, np.ndarray] | None = {} if cached else None

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A resized image (h, w, 3) BGR and its rows (class, x1, y1, x2, y2) in pixels."""
        image = None if self.cache is None else self.cache.get(index)
        if image is None:
            image = cv2.imread(str(self.files[index]))
            ratio = self.size / max(image.shape[:2])
            if ratio != 1:
                width, height = round(image.shape[1] * ratio), round(image.shape[0] * ratio)
                image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
            if self.cache is not None:
                self.cache[index] = image
        height, width = image.shape[:2]
        rows = self.labels[index].copy()
        middle, half = rows[:, 1:3] * (width, height), rows[:, 3:] * (width / 2, height / 2)
        rows[:, 1:3], rows[:, 3:] = middle - half, middle + half
        return image, rows

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """An augmented sample: (size, size, 3) RGB and its rows."""
        image, rows = self.mosaic(index)
        image, rows = self.affine(image, rows)
        image = self.hsv(image)
        if random.random() < 0.5:
            image = cv2.flip(image, 1)
            rows[:, [1, 3]] = self.size - rows[:, [3, 1]]
        return np.ascontiguousarray(image[..., ::-1]), rows

    def mosaic(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        size = self.size
        canvas = np.full((2 * size, 2 * size, 3), GREY[0], np.uint8)
        x, y = (int(random.uniform(size / 2, 3 * size / 2)) for _ in range(2))
        every = []
        for place, i in enumerate([index, *random.choices(range(len(self.files)), k=3)]):
            image, rows = self.load(i)
            height, width = image.shape[:2]
            left, top = x - width if place % 2 == 0 else x, y - height if place < 2 else y
            x1, y1 = max(left, 0), max(top, 0)
            x2, y2 = min(left + width, 2 * size), min(top + height, 2 * size)
            canvas[y1:y2, x1:x2] = image[y1 - top : y2 - top, x1 - left : x2 - left]
            rows[:, 1:] += (left, top, left, top)
            every.append(rows)
        rows = np.concatenate(every)
        rows[:, 1:] = rows[:, 1:].clip(0, 2 * size)
        return canvas, rows

    def affine(self, image: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        size, zoom = self.size, random.uniform(0.5, 1.5)
        dx, dy = (random.uniform(0.4, 0.6) * size for _ in range(2))
        matrix = np.array(
            [
                [zoom, 0, dx - zoom * image.shape[1] / 2],
                [0, zoom, dy - zoom * image.shape[0] / 2],
            ]
        )
        image = cv2.warpAffine(image, matrix, (size, size), borderValue=GREY)
        before = rows[:, 1:]
        after = (before.reshape(-1, 2, 2) * zoom + matrix[:, 2]).reshape(-1, 4).clip(0, size)
        sides, old = after[:, 2:] - after[:, :2], before[:, 2:] - before[:, :2]
        kept = (sides > 2).all(1) & (sides.prod(1) > 0.1 * zoom**2 * old.prod(1))
        return image, np.concatenate([rows[:, :1], after], 1)[kept]

    def hsv(self, image: np.ndarray) -> np.ndarray:
        gains = np.random.uniform(-1, 1, 3) * (0.015, 0.7, 0.4)
        levels = np.arange(256)
        tables = [
            ((levels + gains[0] * 180) % 180).astype(np.uint8),
            np.clip(levels * (1 + gains[1]), 0, 255).astype(np.uint8),
            np.clip(levels * (1 + gains[2]), 0, 255).astype(np.uint8),
        ]
        parts = cv2.split(cv2.cvtColor(image, cv2.COLOR_BGR2HSV))
        shifted = cv2.merge([cv2.LUT(a, t) for a, t in zip(parts, tables, strict=True)])
        return cv2.cvtColor(shifted, cv2.COLOR_HSV2BGR)
