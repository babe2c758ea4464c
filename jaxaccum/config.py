"""Defaults, checks and the split of a config into what is learned and how it is computed."""

from __future__ import annotations

import numbers
from difflib import get_close_matches
from typing import Any

import jax
import ml_collections
from ml_collections import config_dict

from jaxaccum.accumulate import Recipe
from jaxaccum.data.texts import shown
from jaxaccum.errors import UserError
from jaxaccum.models import completion as completion_models
from jaxaccum.models import pointbert, yolo

# Fields that decide only how a run is computed, watched or stored, and places of what is known by
# its contents; all others are the recipe.
NOT_LEARNED = (
    "init_from", "microbatch", "devices", "engine", "fsdp", "remat", "epochs", "log", "eval",
    "checkpoint", "max_skipped", "data.path", "data.val_path", "data.images", "data.on_error",
    "data.cache", "data.cache_gib", "data.workers", "data.prefetch", "text.encoder",
    "text.captions", "text.point_weights", "data.val_split", "data.val_fraction",
)  # fmt: skip


DTYPES = {"float32": "float32", "tf32": "float32", "bfloat16": "bfloat16", "float64": "float64"}

# Updates of a run at most: its schedules are tables of one row for each, 10 million take a GiB.
MOST_UPDATES = 10_000_000
MOST_SAMPLES = 1_000_000  # of an effective batch, a microbatch or a group

# Every field that is a number, and the range it is in.
RANGES = {
    "nbs": (1, MOST_SAMPLES), "seed": (0, 2**31 - 1), "steps": (0, MOST_UPDATES),
    "epochs": (0, 1e7), "devices": (0, 1e6), "fsdp": (0, 1e6), "max_skipped": (1, 1e9),
    "loss.box": (0, 1e9), "loss.cls": (0, 1e9), "loss.dfl": (0, 1e9),
    "optimizer.momentum": (0, 1), "optimizer.b2": (0, 1), "optimizer.weight_decay": (0, 1e9),
    "optimizer.clip": (0, 1e9),
    "lr.base": (0, 1e30), "lr.base_batch": (1, 1e9), "lr.final": (0, 1),
    "lr.warmup_epochs": (0, 1e9), "lr.warmup_bias": (0, 1e9), "lr.warmup_momentum": (0, 1),
    "ema.decay": (0, 1), "ema.ramp": (1e-9, 1e9),
    "augment.close_mosaic": (0, 1e9), "augment.mosaic": (0, 1), "augment.mixup": (0, 1),
    "augment.degrees": (0, 180), "augment.translate": (0, 1), "augment.scale": (0, 1),
    "augment.shear": (0, 89), "augment.perspective": (0, 0.001), "augment.hsv_h": (0, 1),
    "augment.hsv_s": (0, 1), "augment.hsv_v": (0, 1), "augment.flipud": (0, 1),
    "augment.fliplr": (0, 1),
    "data.image_size": (32, 16384), "data.height": (32, 16384), "data.width": (32, 16384),
    "data.max_objects": (1, 1e4), "data.cache_gib": (0, 1e6),
    "lr.decay_rate": (0, 1), "lr.decay_epochs": (1e-9, 1e9),
    "bn_momentum.start": (0, 1), "bn_momentum.decay": (0, 1), "bn_momentum.epochs": (1e-9, 1e9),
    "bn_momentum.final": (0, 1),
    "loss.coarse": (0, 1e9), "loss.fine": (0, 1e9), "loss.denoise": (0, 1e9),
    "loss.location": (0, 1e9), "loss.metres": (0, 1e9), "loss.size": (0, 1e9),
    "loss.heading": (0, 1e9), "box3d.temperature": (1e-6, 1e6), "box3d.largest": (1e-3, 1e6),
    "box3d.focal": (0, 1e3), "data.val_fraction": (1e-9, 1), "loss.align": (0, 1e9),
    "text.temperature": (1e-6, 1e6),
    "data.workers": (0, 1024), "data.prefetch": (0, 1000),
    "log.every": (-1, 1e9), "log.images": (0, 1000), "checkpoint.every": (-1, 1e9),
    "eval.every": (-1, 1e9), "eval.viewpoints": (1, 8), "eval.batch": (1, 65536),
    "eval.conf": (0, 1), "eval.iou": (0, 1), "eval.max_det": (1, 1e5),
    "eval.precise_bn": (0, 1e9), "checkpoint.keep": (1, 1e6), "checkpoint.grace": (0, 1e6),
}  # fmt: skip


class ConfigError(UserError, ValueError):
    """A config that cannot be run; the message says which field and what would work."""


def any_of(value) -> config_dict.FieldReference:
    """A field that takes a number or a word, such as bn_group = 8 or "all"."""
    reference = config_dict.placeholder(object)
    reference.set(value)
    return reference


def _recipe(c: ml_collections.ConfigDict) -> None:
    """Fields of the recipe that every task has."""
    c.nbs = 64  # effective batch: samples per update
    c.bn_group = any_of(8)  # samples that share batch statistics: a number, "all" or "frozen"
    c.epochs = 100.0  # passes over the data; or
    c.steps = 0  # updates, if not 0
    c.seed = 0
    c.init_from = ""  # weights to start from: a .pt, .pth, .safetensors or the workdir of a run
    # Compute: "float32", "tf32" (float32 whose products may be rounded on the way, several times
    # as fast on GPUs) or "bfloat16". Parameters and accumulators are float32 in all of them.
    c.dtype = "float32"
    c.optimizer = ml_collections.ConfigDict(
        {
            "name": "sgd",  # "sgd" (Nesterov), "adamw", "musgd" (SGD and Muon) or "auto"
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
            "final": 0.01,  # last, or smallest, learning rate over the peak
            "decay": "linear",  # or "cosine" or "exponential"
            "warmup_epochs": 3.0,
            "warmup_bias": 0.1,  # learning rate of biases at the start
            "warmup_momentum": 0.8,
        }
    )
    c.ema = ml_collections.ConfigDict({"decay": 0.9999, "ramp": 2000.0})  # decay 0: no average


def _geometry(c: ml_collections.ConfigDict) -> None:
    """How it is computed. Changes nothing but seconds and bytes."""
    # Samples in one forward and backward pass on one device; "auto": planned for the device here.
    c.microbatch = any_of(8)
    c.devices = 0  # 0: all that JAX sees
    c.engine = "scan"  # or "multisteps"
    # Devices that divide parameters, optimizer and average among themselves; 0: all, 1: none.
    c.fsdp = 1
    c.remat = False  # compute every block's activations again in the backward pass: less memory


def _run(c: ml_collections.ConfigDict) -> None:
    """What is watched and kept. `every` counts updates; 0: once per epoch, -1: never."""
    c.max_skipped = 3  # windows in a row that may be skipped for a NaN or Inf
    c.log = ml_collections.ConfigDict(
        {
            "every": 10,
            "tensorboard": True,
            "images": 4,
            "noise_scale": False,  # estimate how large an effective batch would still help
        }
    )
    c.eval = ml_collections.ConfigDict(
        {
            "every": 0,
            "batch": 16,
            "precise_bn": 0,  # training samples to recompute running statistics over; 0: off
        }
    )
    c.checkpoint = ml_collections.ConfigDict(
        {
            "every": 0,
            "keep": 2,
            "grace": 25.0,  # seconds that a signal to stop leaves to end an update and save it
        }
    )


def detection() -> ml_collections.ConfigDict:
    """Every field of a detection run with its default: the recipe of the reference trainer."""
    c = ml_collections.ConfigDict()
    c.task = "detection"
    c.model = "yolov8-s"  # python -m jaxaccum.models
    _recipe(c)
    c.compat = False  # the usual trainers' accumulation instead of the exact one, to compare
    c.loss = ml_collections.ConfigDict({"box": 7.5, "cls": 0.5, "dfl": 1.5})
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
            "on_error": "raise",  # bad labels and images: "raise" or "skip" (counted)
            "cache": "ram",  # keep resized images: "ram" or "none"
            "cache_gib": 4.0,  # most memory for that, the least recently used go first
            "workers": 0,  # loader processes; 0: threads
            "prefetch": 2,  # effective batches made ahead
        }
    )
    _geometry(c)
    _run(c)
    c.eval.update(conf=0.001, iou=0.7, max_det=300)
    return c


def completion() -> ml_collections.ConfigDict:
    """Every field of a point-completion run with its default: the recipe of AdaPoinTr."""
    c = ml_collections.ConfigDict()
    c.task = "completion"
    c.model = "adapointr-projected"  # python -m jaxaccum.models
    _recipe(c)
    c.nbs = 48
    c.epochs = 600.0
    c.optimizer.update(name="adamw", momentum=0.9)
    c.lr.update(
        base=1e-4, base_batch=48, decay="exponential", final=0.02,
        warmup_epochs=0.0, warmup_bias=0.0, warmup_momentum=0.9,
    )  # fmt: skip
    c.lr.decay_rate = 0.9  # of "exponential": the factor after
    c.lr.decay_epochs = 21.0  # that many epochs
    # Weight of an update's batch statistics in the running ones, falling from start to final by
    # the factor `decay` every `epochs` epochs.
    c.bn_momentum = ml_collections.ConfigDict(
        {"start": 0.9, "decay": 0.5, "epochs": 21.0, "final": 0.01}
    )
    c.ema.decay = 0.0
    c.loss = ml_collections.ConfigDict(
        {"coarse": 1.0, "fine": 1.0, "denoise": 0.5, "align": 0.05}  # align: with a point_encoder
    )
    c.text = ml_collections.ConfigDict(
        {
            # What turns captions into vectors that condition the queries: "" for no captions,
            # "hashed" (counts of words, needs nothing) or "clip:FOLDER" (a CLIP model's text half).
            "encoder": "",
            "captions": "",  # a CSV of CATEGORY_NAME,caption; "" for the data set's own
            # What turns completed clouds into vectors to be aligned with the captions': "" for no
            # such term, "pointbert" or "pointbert-small". It is frozen.
            "point_encoder": "",
            "point_weights": "",  # its weights, a file of ULIP-2; "" for random ones
            "temperature": 0.07,  # of the alignment at the start
            "compat": False,  # templates, and equal captions as negatives, as the original has them
        }
    )
    c.augment = ml_collections.ConfigDict({"mirror": True})  # along x and z, target alike
    c.data = ml_collections.ConfigDict(
        {
            # "" for the embedded shapes, the folder of PCN, or FOLDER:BENCHMARK in the ShapeNet
            # layout: DATA/ShapeNet55-34:ShapeNet-34, ...:Projected_ShapeNet-34_noise
            "path": "",
            "on_error": "raise",  # clouds that cannot be read: "raise" or "skip" (counted)
            "cache_gib": 2.0,  # most memory for clouds, the least recently used go first
            "workers": 0,  # loader processes; 0: threads
            "prefetch": 2,  # effective batches made ahead
        }
    )
    _geometry(c)
    _run(c)
    # Of the ShapeNet layout: how much is cut off, "easy", "median" or "hard".
    c.eval.mode = "median"
    c.eval.viewpoints = 1  # and from how many of its 8 sides while training; `evaluate` takes all
    c.eval.unseen = False  # evaluate the categories that are not trained on, too
    c.eval.references = ""  # a PCN folder, with whose cars predictions of KITTI's are compared
    return c


def detection3d() -> ml_collections.ConfigDict:
    """Every field of a run of YOLOv12-3D with its default: the recipe of detectors, losses that
    are normalised once, and cameras that are used."""
    c = detection()
    c.task = "detection3d"
    c.model = "yolov12-3d-n"
    c.loss.update(
        location=1.0,  # of each axis x, y, z: cross entropy of bins, and
        metres=0.1,  # of the distance in metres, within the above
        size=1.0,  # per metre
        heading=1.0,
    )
    # What the outputs mean, see models/solids.py. A checkpoint of the original brings its own.
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


DEFAULTS = {"detection": detection, "detection3d": detection3d, "completion": completion}


def validate(c: ml_collections.ConfigDict) -> None:
    """Checks what types cannot: words, ranges and names.

    Raises:
      ConfigError: names the field, what it holds and what it may hold.
    """
    if c.get("task") not in DEFAULTS:
        raise ConfigError(f"task is one of {', '.join(DEFAULTS)}; got {c.get('task')!r}")
    _validate_types(c, DEFAULTS[c.task](), "")
    words = {
        "task": tuple(DEFAULTS),
        "dtype": tuple(DTYPES),
        "engine": ("scan", "multisteps"),
        "optimizer.name": ("sgd", "adamw", "musgd", "auto"),
        "optimizer.weight_decay_scaling": ("none", "linear"),
        "lr.scaling": ("none", "linear", "sqrt"),
        "lr.decay": ("linear", "cosine", *(["exponential"] if "decay_rate" in c.lr else [])),
        "data.on_error": ("raise", "skip"),
        "data.cache": ("ram", "none"),
        "eval.mode": ("easy", "median", "hard"),
        "box3d.heading": ("seen", "world"),
        "box3d.place": ("predicted", "projected"),
        "box3d.turn": ("axis", "free", "bounded"),
    }
    for field, allowed in words.items():
        if has(c, field) and get(c, field) not in allowed:
            raise ConfigError(f"{field} is one of {', '.join(allowed)}; got {get(c, field)!r}")
    for field, (low, high) in RANGES.items():
        if has(c, field) and not low <= (value := get(c, field)) <= high:
            limits = f"in {low:g} to {high:g}"
            if high >= 1e4 and value < low:
                limits = f"at least {low:g}"
            elif high >= 1e4 and value > high:
                limits = f"at most {high:,.0f}"
            raise ConfigError(f"{field} is {limits}; got {shown(value)}")
    for field in ("data.image_size", "data.height", "data.width"):
        if has(c, field) and get(c, field) % 32:
            below = get(c, field) // 32 * 32
            raise ConfigError(
                f"{field} is a multiple of 32, the coarsest stride; got {get(c, field)}: use "
                f"{below or 32} or {below + 32}"
            )
    if c.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ConfigError("dtype float64 needs JAX_ENABLE_X64=1 in the environment")
    if c.eval.precise_bn and c.bn_group == "frozen":
        raise ConfigError("eval.precise_bn recomputes batch statistics; with bn_group frozen set 0")
    if c.microbatch != "auto" and not _is_batch(c.microbatch):
        raise ConfigError(
            f"microbatch is a positive integer, at most {MOST_SAMPLES:,}, or 'auto'; got "
            f"{shown(c.microbatch)}"
        )
    if c.bn_group not in ("all", "frozen") and not _is_batch(c.bn_group):
        raise ConfigError(
            f"bn_group is a positive integer, at most {MOST_SAMPLES:,}, 'all' or 'frozen'; got "
            f"{shown(c.bn_group)}"
        )
    if not c.steps and not c.epochs:
        raise ConfigError("set epochs (passes over the data) or steps (updates)")
    if has(c, "text.encoder"):
        _validate_text(c.text)
    if c.task == "completion" and c.optimizer.name in ("auto", "musgd"):
        raise ConfigError(
            f"optimizer.name={c.optimizer.name} is a rule for detectors; use adamw or sgd"
        )
    if is_compat(c) and c.log.noise_scale:
        raise ConfigError("log.noise_scale is of the exact accumulation: not with compat")
    if is_compat(c) and c.microbatch == "auto":
        raise ConfigError(
            "with compat the microbatch is part of what is learned: give a number instead of auto"
        )
    if is_compat(c) and c.engine != "scan":
        raise ConfigError("compat runs on engine=scan only")
    known = {
        "detection": yolo.names(), "detection3d": yolo.names(solid=True),
        "completion": completion_models.names(),
    }[c.task]  # fmt: skip
    if c.model not in known:
        close = get_close_matches(str(c.model), known, n=3, cutoff=0.3)
        raise ConfigError(
            f"model: there is no {c.model!r} for the task {c.task}: "
            + (f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(known)}")
        )


def _is_batch(value: Any) -> bool:
    return type(value) is int and 0 < value <= MOST_SAMPLES


def _validate_types(
    c: ml_collections.ConfigDict, defaults: ml_collections.ConfigDict, prefix: str
) -> None:
    """Every field is there, and of the type that its default has."""
    kinds: dict[type, tuple[Any, str]] = {
        bool: (bool, "true or false"), int: (numbers.Integral, "a whole number"),
        float: (numbers.Real, "a number"), str: (str, "a text"),
        ml_collections.ConfigDict: (ml_collections.ConfigDict, "a group of fields"),
    }  # fmt: skip
    for key, default in defaults.items():
        field = prefix + key
        if key not in c:
            raise ConfigError(f"{field} is missing: start from the defaults of jaxaccum.config")
        value = c[key]
        if field in ("bn_group", "microbatch"):  # a number or a word, see `validate`
            continue
        kind, words = kinds[type(default)]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{field} is {words}; got {shown(value)}")
        if isinstance(value, str) and "\0" in value:
            raise ConfigError(f"{field} holds a NUL: {shown(value)}")
        if isinstance(default, ml_collections.ConfigDict):
            _validate_types(value, default, f"{field}.")


def _validate_text(text: ml_collections.ConfigDict) -> None:
    for field in ("captions", "point_encoder"):
        if text[field] and not text.encoder:
            raise ConfigError(f"text.{field} needs a text.encoder, such as 'hashed'")
    if text.point_weights and not text.point_encoder:
        raise ConfigError("text.point_weights needs the text.point_encoder that they are of")
    if text.point_encoder and text.point_encoder not in pointbert.names():
        raise ConfigError(
            f"text.point_encoder is one of {', '.join(pointbert.names())}, or empty; got "
            f"{text.point_encoder!r}"
        )


def is_compat(c: ml_collections.ConfigDict) -> bool:
    """Whether the usual accumulation is asked for, in a task that offers it."""
    return bool(c.get("compat", False))


def has(c: ml_collections.ConfigDict, field: str) -> bool:
    """Whether a config has a dotted field; tasks differ in theirs."""
    *parents, leaf = field.split(".")
    for part in parents:
        if part not in c:
            return False
        c = c[part]
    return leaf in c


def get(c: ml_collections.ConfigDict, field: str):
    """The value of a dotted field."""
    value = c
    for part in field.split("."):
        value = value[part]
    return value


def recipe_of(c: ml_collections.ConfigDict, steps: int, data: dict, devices: int = 1) -> Recipe:
    """The recipe of a config.

    Args:
      c: the config.
      steps: updates of the run, derived from `steps` or `epochs`.
      data: what identifies the training samples (not where they lie).
      devices: that the run uses; learned from by the compat rule only.
    """
    settings = c.to_dict()
    for field in (*NOT_LEARNED, "nbs", "bn_group"):
        if not has(c, field):
            continue
        *parents, leaf = field.split(".")
        node = settings
        for parent in parents:
            node = node[parent]
        node.pop(leaf)
    settings["steps"] = steps
    settings["data"] |= data
    if is_compat(c):  # there the geometry is part of what is learned
        settings["compat"] = {"microbatch": c.microbatch, "devices": devices}
    return Recipe(c.nbs, c.bn_group, settings)
