"""YOLOv12-3D on KITTI's 3,712 and 3,769 frames (training/ and ImageSets/{train,val}.txt).

python -m jaxaccum.train --config=configs/repro/kitti.py:n-original --config.data.path=KITTI

Without "-original" the losses and the coding of outputs are ours; with it, those of YOLOv12-3D as
published, by its trainer's defaults, and with its accumulation.
"""

from jaxaccum import config as defaults


def get_config(scale: str = "n"):
    """The scale after the colon: n, s, m, l or x; n-original and so on for the recipe published."""
    scale, _, recipe = scale.partition("-")
    if recipe not in ("", "original"):
        raise defaults.ConfigError(f"no recipe {recipe!r} of KITTI; there is 'original'")
    config = defaults.detection3d()
    config.model = f"yolov12-3d-{scale}"
    config.epochs = 100.0
    config.nbs = 64
    config.bn_group = config.microbatch = 16
    config.lr.update(base=0.01, base_batch=64, scaling="none")
    config.optimizer.weight_decay_scaling = "linear"
    config.data.height = 192
    config.data.width = 640
    config.eval.every_epochs = 10.0
    if recipe == "original":
        defaults.as_original(config)
    return config
