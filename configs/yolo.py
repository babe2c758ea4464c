"""YOLO of any family and scale, on the embedded scenes or on your data.

python -m jaxaccum.train --config=configs/yolo.py:12-p2-m --config.data.path=.../data.yaml
"""

from jaxaccum import config as defaults


def get_config(model: str = "v8-n"):
    """FAMILY-SCALE after the colon, as 11-s or v12-turbo-x.

    Families are v8, 11, 12, 26, v8-p2, 11-p2, 12-p2, 26-p2 and v12-turbo, scales n to x.
    """
    config = defaults.detection()
    config.model = f"yolo{model.removeprefix('yolo')}"
    return config
