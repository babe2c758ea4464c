"""Completion networks that compile in seconds, with all that the real ones have."""

from __future__ import annotations

from jaxaccum import config as configs
from jaxaccum.models import completion, pointbert

_STYLES = {
    "encoder": ("attn-graph", "attn"),
    "decoder_self": ("attn-graph", "attn"),
    "decoder_cross": ("attn-graph", "attn"),
}
_SIZES = {"width": 24, "heads": 2, "global_width": 32}
completion.MODELS["adapointr-tiny"] = completion.Table(
    "adapointr", 32, 16, (32, 16), **_STYLES, **_SIZES, denoise=8
)
completion.MODELS["pointr-tiny"] = completion.Table(
    "pointr", 16, 16, (32, 16), **_STYLES, **_SIZES, head="fold"
)
pointbert.MODELS["pointbert-tiny"] = pointbert.Table(2, 24, 2, groups=16, neighbours=8, features=16)
# A run with captions, and with the term that aligns them.
CAPTIONED = {"text.encoder": "hashed-64", "text.point_encoder": "pointbert-tiny"}


def tiny_config(**changes):
    """A run on the embedded shapes; `changes` are dotted fields."""
    config = configs.completion()
    config.model = "adapointr-tiny"
    config.update_from_flattened_dict(
        {
            "nbs": 4, "bn_group": 2, "microbatch": 2, "devices": 1, "steps": 6, "lr.base": 1e-3,
            "log.every": 1, "log.images": 1, "log.report": False, "log.tensorboard": False,
            "eval.every": 3, "eval.batch": 8, "checkpoint.every": 3,
        }
        | changes
    )  # fmt: skip
    return config.lock()
