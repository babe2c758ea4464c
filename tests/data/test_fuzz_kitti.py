"""Seeded damage to KITTI's labels, calibrations and lists: right, or an error that names the line.

JAXACCUM_FUZZ=N runs N cases of each class."""

import os
import random
import re
import time
from collections import Counter

import cv2
import numpy as np
import pytest

from jaxaccum.data import DataError
from jaxaccum.data.formats.kitti import KittiSource

CASES = int(os.environ.get("JAXACCUM_FUZZ", "100"))
LABELS = """\
Car 0.00 0 1.85 387.63 181.54 423.81 203.12 1.67 1.87 3.69 -16.53 2.39 58.49 1.57
Pedestrian 0.00 1 -0.20 712.40 143.00 810.73 307.92 1.89 0.48 1.20 1.84 1.47 8.41 0.01
DontCare -1 -1 -10 503.89 169.71 590.61 190.13 -1 -1 -1 -1000 -1000 -1000 -10
"""
CALIBRATION = """\
P0: 7.2e+02 0 6.0e+02 0 0 7.2e+02 1.7e+02 0 0 0 1 0
P1: 1 2 3
P2: 7.215377e+02 0 6.095593e+02 4.485728e+01 0 7.215377e+02 1.72e+02 2.163791e-01 0 0 1 2.745e-03
R0_rect: 1 0 0 0 1 0 0 0 1
"""
FIELDS = [
    "nan", "inf", "-inf", "1e300", "1e39", "3.5e38", "-3.5e38", "1e30", "1e20", "9" * 20, "1e-400",
    "4", "-1", "-1000", "0", "1", "0.5", "x", "٣", "\uff10", "0_1", "1,5", "", "-", "1e", "0x1",
    "\u2028",    "\x0c", "\x85", "\0", "true", "1" * 5000, "Car", "-10", "1000", "90",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("kitti")
    for name in ("training/image_2", "training/label_2", "training/calib", "ImageSets"):
        (root / name).mkdir(parents=True)
    image = np.full((375, 1242, 3), 90, np.uint8)
    cv2.imwrite(str(root / "training/image_2/000000.png"), image)
    cv2.imwrite(str(root / "training/image_2/000001.png"), image)
    return root


def write(root, labels=LABELS, calibration=CALIBRATION, frames="000000\n000001\n"):
    """Frame 1 is always healthy."""
    for name, text, sound in (("label_2", labels, LABELS), ("calib", calibration, CALIBRATION)):
        data = text.encode() if isinstance(text, str) else text
        (root / f"training/{name}/000000.txt").write_bytes(data)
        (root / f"training/{name}/000001.txt").write_text(sound)
    data = frames.encode() if isinstance(frames, str) else frames
    (root / "ImageSets/train.txt").write_bytes(data)


def opened(root, on_error):
    start = time.perf_counter()
    try:
        source = KittiSource(root, "train", on_error=on_error)
    except DataError as error:
        message = str(error)
        assert str(root) in message and len(message) < 4000
        assert message.replace("\n", "").isprintable()
        return message
    finally:
        assert time.perf_counter() - start < 5
    for i in range(len(source)):
        objects, labels, camera = source.objects(i), source.labels(i), source.camera(i)
        assert np.isfinite(camera).all() and 1 <= camera[0, 0] <= 1e5 and 1 <= camera[1, 1] <= 1e5
        assert len(objects) <= 2
        left, top, right, bottom = objects.boxes.T
        assert ((left >= 0) & (left < right) & (right <= 1242)).all()
        assert ((top >= 0) & (top < bottom) & (bottom <= 375)).all()
        assert ((objects.dimensions > 0) & (objects.dimensions <= 100)).all()
        assert (np.abs(objects.locations) <= 1000).all() and (objects.locations[:, 2] > 0).all()
        assert (np.abs(objects.yaw) <= 10).all()
        truncation = labels.truncation
        assert (((truncation >= 0) & (truncation <= 1)) | (truncation == -1)).all()
        for values in (labels.alpha, labels.boxes, labels.dimensions, labels.locations, labels.yaw):
            assert np.isfinite(values).all()
    "\n".join(source.report.lines()).encode()
    return source


def became(result) -> str:
    if isinstance(result, str):
        return "refused"
    return "read, with some of it skipped and counted" if result.report.skipped else "read"


def damaged(draw, text):
    """Changes one field, or the bytes."""
    kind = draw.random()
    if kind < 0.7:
        rows = [row.split(" ") for row in text.split("\n")]
        row = draw.choice([row for row in rows if len(row) > 1])
        row[draw.randrange(len(row))] = draw.choice(FIELDS)
        return "\n".join(" ".join(row) for row in rows)
    if kind < 0.8:
        return text.replace("\n", draw.choice(("\r\n", "\r", "\x0c", "\u2028", "\x1c", "\n\n")))
    data = bytearray(text.encode())
    at = draw.randrange(len(data))
    if kind < 0.9:
        data[at] = draw.randrange(256)
    else:
        del data[at : at + draw.randrange(1, 100)]
    return bytes(data)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("part", ["labels", "calibration"])
def test_damaged_files(root, part, on_error):
    draw = random.Random(f"{part} {on_error}")
    sound, outcomes = {"labels": LABELS, "calibration": CALIBRATION}[part], Counter()
    for case in range(CASES):
        text = sound
        for _ in range(draw.choice((1, 1, 2))):
            if isinstance(text, str):
                text = damaged(draw, text)
        write(root, **{part: text})
        result = opened(root, on_error)
        outcomes[became(result)] += 1
        if isinstance(result, str):
            assert on_error == "raise", (case, result)
            assert re.search(r"/000000\.txt(:\d+)?: ", result), (case, result)
        elif len(result) == 1:
            assert len(result.report.skipped) >= 1, case
        else:
            # Nothing goes without a word: rows are kept, regions, or counted.
            kept = result.report.objects + result.report.regions
            rows = len(result.labels(0)) + len(result.labels(1))
            dropped = sum(
                len(v) for k, v in result.report.skipped.items() if not k.startswith("part")
            )
            assert kept + dropped == rows, case
    print(f"\nKITTI {part}, {on_error}: {CASES} cases, {dict(outcomes)}")
    assert len(outcomes) > 1


def test_damaged_lists(root):
    draw, outcomes = random.Random("lists"), Counter()
    names = ["000000", "000001", "", " ", "x" * 4000, "../../a", "\u2028", "a\0b", "000001 1", "ü"]
    for _ in range(CASES):
        rows = [draw.choice(names) for _ in range(draw.randrange(5))]
        text = draw.choice(("\n", "\r\n", "\r")).join(rows).encode(draw.choice(("utf-8", "utf-16")))
        if draw.random() < 0.2:
            text = bytes([draw.randrange(256)]) + text
        write(root, frames=text)
        result = opened(root, "skip")
        outcomes[became(result)] += 1
        if not isinstance(result, str):
            listed = {row.strip() for row in rows} - {""}
            left_out = sum(map(len, result.report.skipped.values()))
            assert len(result) + left_out >= len(listed)
    print(f"\nKITTI lists of frames: {CASES} cases, {dict(outcomes)}")
    assert len(outcomes) > 1
