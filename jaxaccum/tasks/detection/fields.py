"""The config of 2D detection: its fields with their defaults and ranges."""

from __future__ import annotations

import ml_collections

from jaxaccum import fields
from jaxaccum.models import yolo
from jaxaccum.models.families import FAMILIES, has_one_to_one
from jaxaccum.tasks.detection import class_weights, sizes


def detection() -> ml_collections.ConfigDict:
    """Every field of a detection run with its default: the recipe of the reference trainer."""
    c = ml_collections.ConfigDict()
    c.task = "detection"
    c.model = "yolov8-s"  # python -m jaxaccum.models
    fields.recipe(c)
    c.compat = False  # the usual trainers' accumulation instead of the exact one, to compare
    c.loss = ml_collections.ConfigDict(
        {
            "box": 7.5, "cls": 0.5, "dfl": 1.5,  # dfl: of the sides' distances, YOLO26's L1 as well
            # Of YOLO26: weight of the one-to-many branches in the first epoch and in the last,
            # linear in between; that of the one-to-one branches is 1 minus it.
            "one_to_many": 0.8, "one_to_many_final": 0.1,
            # Of the classes in the cls term: "" for 1 each, (1, 2.5, 1) in their order, by name as
            # a dict or "car=2,bus=0.5" (others: 1), or "balanced": inverse to their objects.
            "class_weights": fields.any_of(""),
        }
    )  # fmt: skip
    c.augment = ml_collections.ConfigDict(
        {
            "mosaic": 1.0, "mixup": 0.0, "degrees": 0.0, "translate": 0.1, "scale": 0.5,
            "shear": 0.0, "perspective": 0.0, "hsv_h": 0.015, "hsv_s": 0.7, "hsv_v": 0.4,
            "flipud": 0.0, "fliplr": 0.5,
            "close_mosaic": 10.0,  # epochs at the end without mosaic and mixup
            # Every update's images have one of these sides, as in 512,576,640, drawn by its
            # number; "": data.image_size, at which is evaluated.
            "sizes": fields.any_of(""),
        }
    )  # fmt: skip
    c.data = ml_collections.ConfigDict(
        {
            # "" for the embedded scenes, a data.yaml, a COCO json, or tfds:NAME[:TRAIN[:VAL]]
            "path": "",
            "val_path": "",  # of a COCO set: the json to evaluate on; "" to guess
            "images": "",  # of a COCO set: the folder of its images; "" to guess
            "fraction": 1.0,  # of the training images, evenly spaced
            "single_cls": False,  # all classes are one
            "image_size": 640,
            "max_objects": 300,  # room for objects per training sample
            "on_error": "raise",  # bad labels and images: "raise" or "skip" (counted)
            "cache": "ram",  # keep resized images: "ram" or "none"
            "cache_gib": 4.0,  # most memory for that, the least recently used go first
            "workers": 0,  # loader processes; 0: threads
            "prefetch": 2,  # effective batches made ahead
        }
    )
    fields.geometry(c)
    fields.run(c)
    c.eval.update(conf=0.001, iou=0.7, max_det=300)
    # Of YOLO26: by the branch that finds each object once, without NMS; or by the other, with it.
    c.eval.end_to_end = False
    # Into rectangles that are hardly larger than the images, not squares: less to compute, and
    # metrics that differ a little, as other detectors' have it.
    c.eval.rect = False
    return c


def _check(c: ml_collections.ConfigDict) -> None:
    class_weights.check(c)
    sizes.check(c)
    fields.multiples_of_stride(c, "data.image_size")
    if c.eval.end_to_end and c.model in yolo.names() and not has_one_to_one(c.model):
        able = ", ".join(name for name, family in FAMILIES.items() if family.one_to_one)
        raise fields.ConfigError(
            f"end_to_end (eval.end_to_end) is for families with a one-to-one branch: {able}; got "
            f"{c.model}: leave it False"
        )


UNIT = (0, 1)
LOSS: fields.Ranges = {"loss.box": fields.GAIN, "loss.cls": fields.GAIN, "loss.dfl": fields.GAIN}
IMAGES: fields.Ranges = {
    "augment.translate": UNIT, "augment.scale": UNIT, "augment.hsv_h": UNIT,
    "augment.hsv_s": UNIT, "augment.hsv_v": UNIT, "augment.fliplr": UNIT,
    "data.max_objects": (1, 1e4),
    "eval.conf": UNIT, "eval.iou": UNIT, "eval.max_det": (1, 1e5),
}  # fmt: skip

FIELDS = fields.Fields(
    detection,
    yolo.names,
    ranges={
        **LOSS, **IMAGES,
        "augment.close_mosaic": (0, 1e9), "augment.mosaic": UNIT, "augment.mixup": UNIT,
        "augment.degrees": (0, 180), "augment.shear": (0, 89), "augment.perspective": (0, 0.001),
        "loss.one_to_many": UNIT, "loss.one_to_many_final": UNIT,
        "augment.flipud": UNIT, "data.image_size": (32, 16384), "data.fraction": (1e-6, 1),
    },
    free=("loss.class_weights", sizes.FIELD),
    not_learned=("data.val_path", "data.images"),
    check=_check,
)  # fmt: skip
