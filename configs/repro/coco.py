"""A detector of scale n on COCO from random weights, as the published weights were trained.

python -m jaxaccum.train --config=configs/repro/coco.py:11
    --config.data.path=COCO/annotations/instances_train2017.json

What of these recipes is known, and what is not: docs/repro.md. 128 images an update (YOLO12: 256),
as 8 devices of 16 (32) have it; here on any number of them.
"""

from jaxaccum import config as defaults


def get_config(family: str = "v8"):
    """The family after the colon: v8, 11, 12 or 26."""
    known = {"v8": (500.0, 128), "11": (600.0, 128), "12": (600.0, 256), "26": (245.0, 128)}
    if family not in known:
        raise defaults.ConfigError(f"no recipe {family!r} of COCO; there are {', '.join(known)}")
    config = defaults.detection()
    config.model = f"yolo{family}-n"
    config.epochs, config.nbs = known[family]
    config.data.image_size = 640
    # The trainer has one rate for all effective batches, and a decay that grows with them.
    config.lr.update(base=0.01, base_batch=64, scaling="none")
    config.optimizer.weight_decay_scaling = "linear"
    if family == "26":
        config.optimizer.update(name="musgd", momentum=0.937)
    # Each device has statistics of its own samples there.
    config.bn_group = config.microbatch = config.nbs // 8
    # 118,287 images at 640 px are 130 GiB: read them anew, or from large files (jaxaccum.pack).
    config.data.cache = "none"
    config.eval.every_epochs = 5.0
    config.checkpoint.every_epochs = 1.0
    return config
