"""YOLOv12-3D n on KITTI: --config.data.path=KITTI/training, or the embedded streets without it.

python -m jaxaccum.train --config=configs/yolo3d_n.py[:original] --config.data.path=...

":original" is the recipe of YOLOv12-3D as published, for comparison and for its checkpoints: its
coding of outputs, its loss and its accumulation.
"""

from jaxaccum import config as defaults


def get_config(recipe: str = ""):
    """The recipe after the colon: nothing, or original."""
    config = defaults.detection3d()
    if recipe not in ("", "original"):
        raise defaults.ConfigError(f"no recipe {recipe!r}; there is 'original'")
    config.model = "yolov12-3d-n"
    config.nbs = 64
    config.bn_group = 8
    config.epochs = 100.0

    config.optimizer.weight_decay_scaling = "linear"
    config.data.height = 192
    config.data.width = 640

    config.microbatch = 8
    if recipe == "original":
        defaults.as_original(config)
    return config
