"""Minutes on a laptop: YOLOv8n learns the embedded scenes at 128 px.

python -m jaxaccum.train --config=configs/quickstart.py
"""

from jaxaccum import config as defaults


def get_config():
    config = defaults.detection()
    config.model = "yolov8-n"
    config.nbs = 16
    config.bn_group = 8
    config.steps = 450
    config.data.image_size = 128
    config.data.max_objects = 32

    config.augment.mosaic = 0.5
    config.augment.close_mosaic = 1.5
    config.optimizer.name = "adamw"
    config.optimizer.momentum = 0.9
    config.lr.base = 0.002
    config.lr.base_batch = 16
    config.lr.warmup_epochs = 0.2
    config.lr.warmup_bias = 0.0
    config.ema.ramp = 60.0

    config.microbatch = 16
    config.log.every = 25
    config.eval.every = 150
    config.checkpoint.every = 150
    return config
