"""YOLO at scale s on the embedded scenes, or on your data: --config.data.path=.../data.yaml."""

from jaxaccum import config as defaults


def get_config(family: str = "v8"):
    """The family after the colon: --config=configs/yolo_s.py:v8 or :v8-p2."""
    config = defaults.detection()
    config.model = f"yolo{family}-s"
    return config
