"""Formats in, effective batches out: sources, augmentation by index, and the loader."""

from jaxaccum.data.augment import Augment, letterbox
from jaxaccum.data.base import DataError, Objects, Report, Source
from jaxaccum.data.cloud_files import read_cloud, write_cloud
from jaxaccum.data.cloud_ops import Pose, prepare_partial
from jaxaccum.data.cloud_sources import has_unseen, open_clouds
from jaxaccum.data.clouds import CloudReport, CloudSource, CloudStream, cloud_batches
from jaxaccum.data.images import SUFFIXES, read_image
from jaxaccum.data.loader import TrainStream, eval_batches
from jaxaccum.data.scenes import Scenes
from jaxaccum.data.shapes import Shapes
from jaxaccum.data.sources import open_source
from jaxaccum.data.stream import SampleStream

__all__ = [
    "SUFFIXES",
    "Augment",
    "CloudReport",
    "CloudSource",
    "CloudStream",
    "DataError",
    "Objects",
    "Pose",
    "Report",
    "SampleStream",
    "Scenes",
    "Shapes",
    "Source",
    "TrainStream",
    "cloud_batches",
    "eval_batches",
    "has_unseen",
    "letterbox",
    "open_clouds",
    "open_source",
    "prepare_partial",
    "read_cloud",
    "read_image",
    "write_cloud",
]
