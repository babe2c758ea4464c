"""3D detection on a laptop: a small YOLOv12-3D on the embedded streets.

python -m jaxaccum.train --config=configs/quickstart_3d.py
"""

from jaxaccum import config as defaults


def get_config():
    config = defaults.detection3d()
    config.model = "yolov12-3d-n"
    config.nbs = 8
    config.bn_group = 8
    config.epochs = 8.0
    config.data.height = 96
    config.data.width = 320

    config.optimizer.update(name="adamw", momentum=0.9, weight_decay=0.01)
    config.lr.update(base=1.5e-3, base_batch=16, warmup_epochs=1.0, warmup_bias=0.0)
    config.loss.heading = 5.0
    config.ema.ramp = 100.0
    config.augment.update(scale=0.2, translate=0.05)

    config.microbatch = 8
    config.log.every = 20
    config.eval.every = 256
    config.checkpoint.every = 128
    return config
