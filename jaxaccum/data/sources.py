"""Opens a data set by its path: embedded scenes, YOLO, COCO, TensorFlow Datasets or packed."""

from __future__ import annotations

import os
from collections.abc import Sequence

from jaxaccum.data.base import DataError, Objects, Report, Source
from jaxaccum.data.formats.coco import open_coco
from jaxaccum.data.formats.packed import PREFIX, open_packed
from jaxaccum.data.formats.tfds import open_tfds
from jaxaccum.data.formats.yolo import open_yolo
from jaxaccum.data.synthetic.scenes import Scenes
from jaxaccum.data.texts import shown, shown_path

__all__ = ["DataError", "Objects", "Report", "Source", "open_source"]


SPLITS = ("train", "val", "test")


def open_source(
    path: str,
    split: str,
    *,
    val_path: str = "",
    images: str = "",
    seed: int = 0,
    names: Sequence[str] | None = None,
    on_error: str = "raise",
) -> Source:
    """Opens one split of a data set.

    Args:
      path: "" for the embedded scenes; `*.yaml` or `*.yml` for a YOLO data.yaml; `*.json` for the
        train json of a COCO data set; `tfds:NAME[:TRAIN_SPLIT[:VAL_SPLIT]]` for TFDS;
        `packed:DIR` for what `python -m jaxaccum.pack` wrote.
      split: "train", "val", or "test" where there is one: of a data.yaml its `test`, of COCO the
        json of that name.
      val_path: COCO only: the val json; "" takes the train json's name with train replaced by val.
      images: COCO only: the folder of images; "" guesses it.
      seed: embedded scenes only: which scenes.
      names: the class names that the data set must have, usually those of the train split.
      on_error: "raise" refuses data with an error in its labels; "skip" drops the image, counts
        and reports it.

    Raises:
      DataError: the data cannot be used as given; says where and what to do.
    """
    if split not in SPLITS:
        raise DataError(f"split is {shown(split)}, expected {' or '.join(map(repr, SPLITS))}.")
    if on_error not in ("raise", "skip"):
        raise DataError(f"on_error is {on_error!r}, expected 'raise' or 'skip'.")
    coco = path.endswith(".json") and not path.startswith(PREFIX)
    if not coco and (val_path or images):
        given = f"val_path={val_path!r}" if val_path else f"images={images!r}"
        raise DataError(
            f"{given} belongs to a COCO train json, but the data set is {path!r}. Leave it out, "
            f"or give the train json as the path."
        )
    source: Source
    if not path:
        source = Scenes(split, seed=seed)
    elif path.startswith(PREFIX):
        source = open_packed(path, split)
    elif path.startswith("tfds:"):
        source = open_tfds(path, split)
    elif path.endswith((".yaml", ".yml")):
        source = open_yolo(path, split, on_error=on_error)
    elif coco:
        source = open_coco(
            path, split, val_path=val_path, images=images, names=names, on_error=on_error
        )
    elif os.path.isfile(os.path.join(path, "data.yaml")):
        raise DataError(
            f"{shown(path, 300)}: a folder. Give the data.yaml in it: "
            f"{shown(os.path.join(path, 'data.yaml'), 300)}."
        )
    else:
        raise DataError(
            f"{shown(path, 300)}: no known data set. Expected a YOLO data.yaml (*.yaml), a COCO "
            f"json (*.json), tfds:NAME, packed:DIR, or '' for the embedded scenes."
        )
    if names is not None and tuple(names) != source.names:
        raise DataError(
            f"{shown_path(path) or 'embedded scenes'}: has the classes "
            f"{shown(list(source.names), 2000)}, expected {shown(list(names), 2000)}. Use the data "
            f"set that the model was made for."
        )
    return source
