"""The config of point completion: its fields with their defaults and ranges."""

from __future__ import annotations

import ml_collections

from jaxaccum import fields
from jaxaccum.data.texts import shown
from jaxaccum.models import completion as models
from jaxaccum.models import pointbert


def completion() -> ml_collections.ConfigDict:
    """Every field of a point-completion run with its default: the recipe of AdaPoinTr."""
    c = ml_collections.ConfigDict()
    c.task = "completion"
    c.model = "adapointr-projected"  # python -m jaxaccum.models
    fields.recipe(c)
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
    c.dtype = "float32"  # bfloat16 has 8 bits for a coordinate, and what that costs is not measured
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
            # "" for the embedded shapes, a folder of complete clouds, the folder of PCN, or
            # FOLDER:BENCHMARK in the ShapeNet layout: DATA/ShapeNet55-34:ShapeNet-34,
            # ...:Projected_ShapeNet-34_noise
            "path": "",
            "on_error": "raise",  # clouds that cannot be read: "raise" or "skip" (counted)
            "cache_gib": 2.0,  # most memory for clouds, the least recently used go first
            "workers": 0,  # loader processes; 0: threads
            "prefetch": 2,  # effective batches made ahead
        }
    )
    fields.geometry(c)
    fields.run(c)
    # Of the ShapeNet layout: how much is cut off, "easy", "median" or "hard".
    c.eval.mode = "median"
    c.eval.viewpoints = 1  # and from how many of its 8 sides while training; `evaluate` takes all
    # Evaluate the categories that are not trained on, too; "auto": where there are some.
    c.eval.unseen = fields.any_of(False)
    c.eval.references = ""  # a PCN folder, with whose cars predictions of KITTI's are compared
    return c


def _check(c: ml_collections.ConfigDict) -> None:
    text = c.text
    for field in ("captions", "point_encoder"):
        if text[field] and not text.encoder:
            raise fields.ConfigError(f"text.{field} needs a text.encoder, such as 'hashed'")
    if text.point_weights and not text.point_encoder:
        raise fields.ConfigError("text.point_weights needs the text.point_encoder that they are of")
    if text.point_encoder and text.point_encoder not in pointbert.names():
        raise fields.ConfigError(
            f"text.point_encoder is one of {', '.join(pointbert.names())}, or empty; got "
            f"{text.point_encoder!r}"
        )
    if c.eval.unseen not in (True, False, "auto"):
        raise fields.ConfigError(
            f"eval.unseen is True, False or 'auto'; got {shown(c.eval.unseen)}"
        )
    if c.optimizer.name in ("auto", "musgd"):
        raise fields.ConfigError(
            f"optimizer.name={c.optimizer.name} is a rule for detectors; use adamw or sgd"
        )


FIELDS = fields.Fields(
    completion,
    models.names,
    ranges={
        "lr.decay_rate": (0, 1), "lr.decay_epochs": (1e-9, 1e9),
        "bn_momentum.start": (0, 1), "bn_momentum.decay": (0, 1),
        "bn_momentum.epochs": (1e-9, 1e9), "bn_momentum.final": (0, 1),
        "loss.coarse": fields.GAIN, "loss.fine": fields.GAIN, "loss.denoise": fields.GAIN,
        "loss.align": fields.GAIN, "text.temperature": (1e-6, 1e6), "eval.viewpoints": (1, 8),
    },
    words={"eval.mode": ("easy", "median", "hard")},
    free=("eval.unseen",),
    not_learned=("text.encoder", "text.captions"),
    weight_files={"text.point_weights": "point_weights"},
    check=_check,
)  # fmt: skip
