"""Formats in, effective batches out: sources, augmentation by index, and the loader."""

from jaxaccum.data.augment import Augment, letterbox
from jaxaccum.data.base import DataError, Objects, Report, Source
from jaxaccum.data.cloud_ops import Pose, prepare_partial
from jaxaccum.data.cloud_sources import has_unseen, open_clouds
from jaxaccum.data.clouds import CloudReport, CloudSource, CloudStream, cloud_batches
from jaxaccum.data.formats.cloud_files import read_cloud, write_cloud
from jaxaccum.data.formats.kitti import DEFAULT_CAMERA, Source3D, read_calibration, write_split
from jaxaccum.data.images import SUFFIXES, read_image
from jaxaccum.data.loader import TrainStream, eval_batches
from jaxaccum.data.sources import open_source
from jaxaccum.data.sources3d import open_source3d
from jaxaccum.data.stamps import Stamps
from jaxaccum.data.stream import SampleStream
from jaxaccum.data.stream3d import (
    Augment3D,
    TrainStream3D,
    eval_batches3d,
    letterbox3d,
    letterboxed_camera,
)
from jaxaccum.data.synthetic.scenes import Scenes
from jaxaccum.data.synthetic.shapes import Shapes

__all__ = [
    "DEFAULT_CAMERA",
    "SUFFIXES",
    "Augment",
    "Augment3D",
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
    "Source3D",
    "Stamps",
    "TrainStream",
    "TrainStream3D",
    "cloud_batches",
    "eval_batches",
    "eval_batches3d",
    "has_unseen",
    "letterbox",
    "letterbox3d",
    "letterboxed_camera",
    "open_clouds",
    "open_source",
    "open_source3d",
    "prepare_partial",
    "read_calibration",
    "read_cloud",
    "read_image",
    "write_cloud",
    "write_split",
]
