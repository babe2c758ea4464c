"""Detectors with and without a P2 head by one recipe, as their guide wished to compare them.

python -m jaxaccum.train --config=configs/guides/p2_heads.py:v8-p2-m
    --config.data.path=.../data.yaml

The guide trained each network with the batch that fitted (16, 10, 14 and 8), at 0.01 * batch / 16,
or all with the 6 of the largest. Here all take 16 images an update, whatever fits: lower
microbatch, and only that. With another --config.nbs the learning rate follows the guide's rule.
"""

from jaxaccum import config as defaults


def get_config(model: str = "v8-m"):
    """The model after the colon: v8-m, v8-p2-m, 11-m or 11-p2-m; other scales likewise."""
    config = defaults.detection()
    config.model = f"yolo{model}"
    config.nbs = 16
    config.lr.update(base=0.01, base_batch=16, scaling="linear")
    config.data.image_size = 640
    # Groups of 2 let any even microbatch compute it, which the guide's cards all hold.
    config.bn_group = 2
    config.microbatch = 2
    return config
