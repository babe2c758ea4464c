"""Formats in, effective batches out: sources, augmentation by index, and the loader."""

from jaxaccum.data.augment import Augment, letterbox
from jaxaccum.data.base import DataError, Objects, Report, Source
from jaxaccum.data.images import SUFFIXES, read_image
from jaxaccum.data.loader import TrainStream, eval_batches
from jaxaccum.data.scenes import Scenes
from jaxaccum.data.sources import open_source

__all__ = [
    "SUFFIXES",
    "Augment",
    "DataError",
    "Objects",
    "Report",
    "Scenes",
    "Source",
    "TrainStream",
    "eval_batches",
    "letterbox",
    "open_source",
    "read_image",
]
