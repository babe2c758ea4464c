"""YOLOv8n on BCCD (blood cells, 205 training images) from random weights, in 40 epochs.

python -m jaxaccum.train --config=configs/bccd.py --config.data.path=BCCD/data.yaml
"""

from jaxaccum import config as defaults


def get_config():
    config = defaults.detection()
    config.model = "yolov8-n"
    config.nbs = 16
    config.bn_group = 4
    config.epochs = 40.0
    config.data.image_size = 320
    config.data.max_objects = 128

    config.optimizer.name = "adamw"
    config.optimizer.momentum = 0.9
    config.lr.base = 0.002
    config.lr.base_batch = 16
    config.lr.warmup_bias = 0.0
    config.ema.ramp = 150.0

    config.microbatch = 4
    return config
