"""Sources as packed sets hold them: what the tasks' parts of the verb `pack` share."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from jaxaccum.data.formats import packed
from jaxaccum.data.formats.tfds import TfdsSource
from jaxaccum.data.images import FileSource, read_header
from jaxaccum.tasks.base import PackedSplit

Example = dict[str, Any]


def about(source: Any) -> dict[str, Any]:
    """What is known of any source."""
    return {
        "identity": source.identity,
        "names": list(source.names),
        "samples": len(source),
        "report": dataclasses.asdict(source.report),
    }


def images(
    source: Any, split: str, fields: Sequence[str], more: Callable[[int], Example]
) -> PackedSplit:
    """A source of images with boxes.

    Args:
      source: the images. split: its name in the set.
      fields: of its objects.
      more: what a record has beside image, name and objects, by index.
    """
    samples = range(len(source))
    objects = [source.objects(i) for i in samples]
    arrays = {name: np.concatenate([getattr(one, name) for one in objects]) for name in fields}
    arrays["counts"] = np.array([len(one) for one in objects])
    arrays["titles"] = packed.as_array([source.name(i) for i in samples])
    orientations = np.ones(len(source), np.int8)
    arrays["orientations"] = orientations

    def example(index: int) -> Example:
        image, orientations[index] = encoded(source, index)
        labels = {name: getattr(objects[index], name) for name in fields}
        return {"image": image, "name": source.name(index), "objects": labels, **more(index)}

    return PackedSplit(about(source), arrays, {split: (len(source), example)})


def encoded(source: Any, index: int) -> tuple[bytes, int]:
    """An image as it is stored, and its EXIF orientation: bytes of its file where there is one,
    else a PNG, which loses nothing.

    Raises:
      DataError: it is damaged. It is better found now than in the middle of a run.
    """
    pixels = source.image(index)
    if isinstance(source, FileSource):
        record = source._records[index]
        return Path(record.file).read_bytes(), record.header.orientation
    if isinstance(source, TfdsSource):
        stored = source._records[source._kept[index][0]]["image"]
        if isinstance(stored, bytes):
            return stored, read_header(io.BytesIO(stored)).orientation
    return cv2.imencode(".png", pixels[..., ::-1])[1].tobytes(), 1


def floats(tfds: Any, *shape: int | None, **options: Any) -> Any:
    """A TFDS feature of float32."""
    return tfds.features.Tensor(shape=shape, dtype=np.float32, **options)


def image_features(
    tfds: Any, names: Sequence[str], objects: dict[str, Any], more: dict[str, Any]
) -> dict[str, Any]:
    """The features of a record of `images`: boxes in pixels, in float32."""
    of = tfds.features
    boxes = {"boxes": floats(tfds, 4), "classes": of.ClassLabel(names=names)}
    return {
        "image": of.Image(shape=(None, None, 3)),
        "name": of.Text(),
        **more,
        "objects": of.Sequence(boxes | objects),
    }
