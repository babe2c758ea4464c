"""The config of 3D detection: its fields with their defaults and ranges."""

from __future__ import annotations

import ml_collections

from jaxaccum import fields
from jaxaccum.models import yolo
from jaxaccum.tasks.detection import class_weights
from jaxaccum.tasks.detection.fields import IMAGES, LOSS, detection


def detection3d() -> ml_collections.ConfigDict:
    """Every field of a run of YOLOv12-3D with its default: the recipe of detectors, losses that
    are normalised once, and cameras that are used."""
    c = detection()
    c.task = "detection3d"
    del c.eval.rect  # height and width are given
    del c.eval.end_to_end, c.loss.one_to_many, c.loss.one_to_many_final  # of two branches
    c.model = "yolov12-3d-n"
    c.loss.update(
        location=1.0,  # of each axis x, y, z: cross entropy of bins, and
        metres=0.1,  # of the distance in metres, within the above
        size=1.0,  # per metre
        heading=1.0,
    )
    # What the outputs mean, see models/boxes3d.py. A checkpoint of the original brings its own.
    c.box3d = ml_collections.ConfigDict(
        {
            "temperature": 1.0,
            "largest": 20.0,  # metres
            "heading": "seen",  # relative to the ray from the camera, or "world"
            "turn": "axis",  # the heading as an axis and its front, or one angle: "free", "bounded"
            "focal": 0.58,  # focal length over width that depths are meant for; 0: as they are
            "place": "projected",  # x and y by the 2D box and the depth, or "predicted"
        }
    )
    # Zooms and shifts move the camera along: depth keeps its truth if box3d.focal is set.
    c.augment = ml_collections.ConfigDict(
        {
            "translate": 0.1, "scale": 0.3, "hsv_h": 0.015, "hsv_s": 0.7, "hsv_v": 0.4,
            "fliplr": 0.5,
        }
    )  # fmt: skip
    options = c.data
    c.data = ml_collections.ConfigDict(
        {
            # "" for the embedded streets, a folder of KITTI (image_2, label_2, calib, ImageSets),
            # or tfds:kitti[:TRAIN[:VAL]]
            "path": "",
            "val_split": "val",  # the list of ImageSets to evaluate on; "train" to see it overfit
            "val_fraction": 1.0,  # share of it to evaluate on, a seeded sample
            "height": 192,
            "width": 640,
            "max_objects": 50,
            **{k: options[k] for k in ("on_error", "cache", "cache_gib", "workers", "prefetch")},
        }
    )
    return c


def as_original(c: ml_collections.ConfigDict) -> None:
    """Gives a 3D config the coding, loss and data rules of YOLOv12-3D as published."""
    c.compat = True
    c.box3d.update(temperature=0.5, largest=10.0, heading="world", turn="bounded", focal=0.0,
                   place="predicted")  # fmt: skip
    c.loss.update(location=200.0, metres=0.02, size=0.05, heading=1.0)
    c.augment.update(scale=0.5)


def _names() -> list[str]:
    return yolo.names(in_space=True)


def _check(c: ml_collections.ConfigDict) -> None:
    class_weights.check(c)
    fields.multiples_of_stride(c, "data.height", "data.width")


FIELDS = fields.Fields(
    detection3d,
    _names,
    ranges={
        **LOSS, **IMAGES,
        "loss.location": fields.GAIN, "loss.metres": fields.GAIN, "loss.size": fields.GAIN,
        "loss.heading": fields.GAIN,
        "box3d.temperature": (1e-6, 1e6), "box3d.largest": (1e-3, 1e6), "box3d.focal": (0, 1e3),
        "data.height": (32, 16384), "data.width": (32, 16384), "data.val_fraction": (1e-9, 1),
    },
    words={
        "box3d.heading": ("seen", "world"),
        "box3d.place": ("predicted", "projected"),
        "box3d.turn": ("axis", "free", "bounded"),
    },
    free=("loss.class_weights",),
    not_learned=("data.val_split", "data.val_fraction"),
    check=_check,
)  # fmt: skip
