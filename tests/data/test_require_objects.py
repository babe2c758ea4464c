"""A training set without an object is refused: it would teach to find nothing, and end with 0."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from tiny import tiny_config, tiny_config3d

from jaxaccum.data import DataError
from jaxaccum.training import run

PIXELS = cv2.imencode(".png", np.zeros((64, 96, 3), np.uint8))[1].tobytes()


def yolo(root, rows):
    for split, text in (("train", rows), ("val", "0 0.5 0.5 0.5 0.5\n")):
        for kind, name, content in (("images", "a.png", PIXELS), ("labels", "a.txt", text)):
            (root / kind / split).mkdir(parents=True)
            file = root / kind / split / name
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat]\n")
    return tiny_config(**{"data.path": str(root / "data.yaml")})


def test_of_a_detector(tmp_path):
    config = yolo(tmp_path / "none", "")
    with pytest.raises(DataError, match=r"1 images, 0 objects.*\n.*no object in the training set"):
        run.open_source(config, "train")
    assert len(run.open_source(config, "val", ("cat",))) == 1
    assert len(run.open_source(yolo(tmp_path / "one", "0 0.5 0.5 0.5 0.5\n"), "train")) == 1
    for split in ("train", "val"):  # as of the embedded scenes, which are counted when asked
        assert run.open_source(tiny_config(), split).report.objects


def test_of_kitti(tmp_path):
    (tmp_path / "ImageSets").mkdir()
    for name in ("train", "val"):
        (tmp_path / "ImageSets" / f"{name}.txt").write_text("000000\n")
    for folder, name, content in (
        ("image_2", "000000.png", PIXELS),
        ("label_2", "000000.txt", b""),
        ("calib", "000000.txt", b"P2: 700 0 48 0 0 700 32 0 0 0 1 0\n"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(content)
    config = tiny_config3d(**{"data.path": str(tmp_path)})
    with pytest.raises(DataError, match="no object in the training set"):
        run.open_source(config, "train")
