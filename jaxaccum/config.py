"""Defaults, checks and the split of a config into what is learned and how it is computed."""

from __future__ import annotations

import ml_collections
from ml_collections import config_dict

from jaxaccum import models
from jaxaccum.accumulate import Recipe

# Fields that decide only how a run is computed, watched or stored; all others are the recipe.
NOT_LEARNED = (
    "microbatch", "devices", "engine", "epochs", "log", "eval", "checkpoint", "max_skipped",
    "data.path", "data.val_path", "data.images", "data.on_error", "data.cache", "data.workers",
    "data.prefetch",
)  # fmt: skip


class ConfigError(ValueError):
    """A config that cannot be run; the message says which field and what would work."""


def any_of(value) -> config_dict.FieldReference:
    """A field that takes a number or a word, such as bn_group = 8 or "all"."""
    reference = config_dict.placeholder(object)
    reference.set(value)
    return reference


def detection() -> ml_collections.ConfigDict:
    """Every field of a detection run with its default: the recipe of the reference trainer."""
    c = ml_collections.ConfigDict()
    c.task = "detection"
    c.model = "yolov8-s"  # python -c "from jaxaccum import models; print(models.names())"

    # --- The recipe: what is learned. ---
    c.nbs = 64  # effective batch: samples per update
    c.bn_group = any_of(8)  # samples that share batch statistics: a number, "all" or "frozen"
    c.epochs = 100.0  # passes over the data; or
    c.steps = 0  # updates, if not 0
    c.seed = 0
    c.dtype = "float32"  # compute: "float32" or "bfloat16"; parameters are float32
    c.compat = False  # the usual trainers' accumulation instead of the exact one, to compare
    c.loss = ml_collections.ConfigDict({"box": 7.5, "cls": 0.5, "dfl": 1.5})
    c.optimizer = ml_collections.ConfigDict(
        {
            "name": "sgd",  # "sgd" (Nesterov) or "adamw"
            "momentum": 0.937,  # of SGD, or beta1 of AdamW
            "b2": 0.999,  # beta2 of AdamW
            "weight_decay": 5e-4,
            "weight_decay_scaling": "none",  # or "linear": times nbs / lr.base_batch
            "clip": 10.0,  # largest global norm of the gradient; 0 for none
        }
    )
    c.lr = ml_collections.ConfigDict(
        {
            "base": 0.01,
            "base_batch": 64,
            "scaling": "none",  # of base with nbs / base_batch: "none", "linear" or "sqrt"
            "final": 0.01,  # last learning rate over the peak
            "decay": "linear",  # or "cosine"
            "warmup_epochs": 3.0,
            "warmup_bias": 0.1,  # learning rate of biases at the start
            "warmup_momentum": 0.8,
        }
    )
    c.ema = ml_collections.ConfigDict({"decay": 0.9999, "ramp": 2000.0})  # decay 0: no average
    c.augment = ml_collections.ConfigDict(
        {
            "mosaic": 1.0, "mixup": 0.0, "degrees": 0.0, "translate": 0.1, "scale": 0.5,
            "shear": 0.0, "perspective": 0.0, "hsv_h": 0.015, "hsv_s": 0.7, "hsv_v": 0.4,
            "flipud": 0.0, "fliplr": 0.5,
            "close_mosaic": 10.0,  # epochs at the end without mosaic and mixup
        }
    )  # fmt: skip
    c.data = ml_collections.ConfigDict(
        {
            # "" for the embedded scenes, a data.yaml, a COCO json, or tfds:NAME[:TRAIN[:VAL]]
            "path": "",
            "val_path": "",  # of a COCO set: the json to evaluate on; "" to guess
            "images": "",  # of a COCO set: the folder of its images; "" to guess
            "image_size": 640,
            "max_objects": 300,  # room for objects per training sample
            "on_error": "raise",  # bad label rows: "raise" or "skip" (counted)
            "cache": "ram",  # keep resized images: "ram" or "none"
            "workers": 0,  # loader processes; 0: threads
            "prefetch": 2,  # effective batches made ahead
        }
    )

    # --- The geometry: how it is computed. Changes nothing but seconds and bytes. ---
    c.microbatch = any_of(8)  # samples in one forward and backward pass on one device
    c.devices = 0  # 0: all that JAX sees
    c.engine = "scan"  # or "multisteps"

    # --- The run: what is watched and kept. Counted in updates; 0: once per epoch. ---
    c.max_skipped = 3  # windows in a row that may be skipped for a NaN or Inf
    c.log = ml_collections.ConfigDict({"every": 10, "tensorboard": True, "images": 4})
    c.eval = ml_collections.ConfigDict(
        {
            "every": 0,
            "batch": 16,
            "conf": 0.001,
            "iou": 0.7,
            "max_det": 300,
            "precise_bn": 0,  # training samples to recompute running statistics over; 0: off
        }
    )
    c.checkpoint = ml_collections.ConfigDict({"every": 0, "keep": 2})
    return c


def validate(c: ml_collections.ConfigDict) -> None:
    """Checks what types cannot: words, ranges and names.

    Raises:
      ConfigError: names the field, what it holds and what it may hold.
    """
    words = {
        "task": ("detection",),
        "dtype": ("float32", "bfloat16", "float64"),
        "engine": ("scan", "multisteps"),
        "optimizer.name": ("sgd", "adamw"),
        "optimizer.weight_decay_scaling": ("none", "linear"),
        "lr.scaling": ("none", "linear", "sqrt"),
        "lr.decay": ("linear", "cosine"),
        "data.on_error": ("raise", "skip"),
        "data.cache": ("ram", "none"),
    }
    for field, allowed in words.items():
        if get(c, field) not in allowed:
            raise ConfigError(f"{field} is one of {', '.join(allowed)}; got {get(c, field)!r}")
    positive = ("nbs", "lr.base_batch", "lr.base", "data.image_size", "data.max_objects",
                "eval.batch", "checkpoint.keep", "log.every", "max_skipped")  # fmt: skip
    for field in positive:
        if not get(c, field) > 0:
            raise ConfigError(f"{field} is positive; got {get(c, field)!r}")
    for field in ("steps", "devices", "epochs", "data.workers", "data.prefetch"):
        if get(c, field) < 0:
            raise ConfigError(f"{field} is not negative; got {get(c, field)!r}")
    if not isinstance(c.microbatch, int) or c.microbatch < 1:
        raise ConfigError(f"microbatch is a positive integer; got {c.microbatch!r}")
    if not (c.bn_group in ("all", "frozen") or (type(c.bn_group) is int and c.bn_group > 0)):
        raise ConfigError(f"bn_group is a positive integer, 'all' or 'frozen'; got {c.bn_group!r}")
    if not c.steps and not c.epochs:
        raise ConfigError("set epochs (passes over the data) or steps (updates)")
    if c.compat and c.engine != "scan":
        raise ConfigError("compat runs on engine=scan only")
    try:
        models.create(c.model, num_classes=1)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None


def get(c: ml_collections.ConfigDict, field: str):
    """The value of a dotted field."""
    value = c
    for part in field.split("."):
        value = value[part]
    return value


def recipe_of(c: ml_collections.ConfigDict, steps: int, data: dict) -> Recipe:
    """The recipe of a config.

    Args:
      c: the config.
      steps: updates of the run, derived from `steps` or `epochs`.
      data: what identifies the training samples (not where they lie).
    """
    settings = c.to_dict()
    for field in (*NOT_LEARNED, "nbs", "bn_group"):
        *parents, leaf = field.split(".")
        node = settings
        for parent in parents:
            node = node[parent]
        node.pop(leaf)
    settings["steps"] = steps
    settings["data"] |= data
    if c.compat:  # there the geometry is part of what is learned
        settings["compat"] = {"microbatch": c.microbatch, "devices": c.devices}
    return Recipe(c.nbs, c.bn_group, settings)
