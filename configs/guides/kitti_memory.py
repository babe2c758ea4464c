"""YOLOv12-3D s on KITTI with an effective batch of 64, 32 or 8, as the guide to its memory has it.

python -m jaxaccum.train --config=configs/guides/kitti_memory.py --config.data.path=KITTI/training

There --batch sets the memory and --nbs what is learned, with K rounded and the loss divided by each
batch; here microbatch sets the memory alone. The guide warns that a smaller effective batch wants
another learning rate: the linear rule is set, from 64 on.
"""

from jaxaccum import config as defaults


def get_config(nbs: str = "64"):
    """The effective batch after the colon: 64, 32 or 8."""
    if nbs not in ("64", "32", "8"):
        raise defaults.ConfigError(f"no effective batch {nbs!r} in the guide; there are 64, 32, 8")
    config = defaults.detection3d()
    config.model = "yolov12-3d-s"
    config.nbs = int(nbs)
    config.lr.update(base=0.01, base_batch=64, scaling="linear")
    config.epochs = 100.0
    # Groups of 2, so that its cards of 4 to 48 GB may take a microbatch of 2, 4, 8 or 16.
    config.bn_group = 2
    config.microbatch = 8
    return config
