"""YOLOv12-3D of any scale on KITTI, or on the embedded streets: yolo3d_n.py's recipe.

python -m jaxaccum.train --config=configs/yolo3d.py:s --config.data.path=KITTI/training
"""

from jaxaccum import config as defaults


def get_config(scale: str = "n"):
    """The scale after the colon: n, s, m, l or x; n-original and so on for the recipe published."""
    scale, _, recipe = scale.partition("-")
    if recipe not in ("", "original"):
        raise defaults.ConfigError(f"no recipe {recipe!r}; there is 'original'")
    config = defaults.detection3d()
    config.model = f"yolov12-3d-{scale}"
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
