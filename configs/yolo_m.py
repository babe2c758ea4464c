"""YOLO at scale m on the embedded scenes, or on your data: --config.data.path=.../data.yaml."""

from jaxaccum import config as defaults


def get_config(family: str = "v8"):
    """The family after the colon: v8, 11, 12, 26, v8-p2, 11-p2, 12-p2, 26-p2 or v12-turbo."""
    config = defaults.detection()
    config.model = f"yolo{family}-m"
    return config
