"""Seeded damage to COCO jsons: right, or an error of ours that names the file and the row.

JAXACCUM_FUZZ=N runs N cases of each class."""

import copy
import json
import os
import random
import re
import time
from collections import Counter

import cv2
import numpy as np
import pytest

from jaxaccum.data import DataError, open_source

CASES = int(os.environ.get("JAXACCUM_FUZZ", "150"))
VALUES = [
    None, True, False, 0, 1, 2, -1, 7, 1.5, 1e300, -1e39, 1e30, 10**400, float("nan"),
    float("inf"), -float("inf"), "", " ", "0", "1", "-1", "1.0", "1e3", "0_1", "٣", "a", "0.png",
    "\ud800", "\0", "\u2028", "x" * 3000, "../0.png", "C:\\0.png", [], {}, [1], [1, 2, 3, 4],
    ["1", "2", "3", "4"], {"0": 1, "1": 2, "2": 3, "3": 4}, [[1], 2, 3, 4], [60, 40, 30, 30],
    [0, 0, 0, 0], [-9, -9, 5, 5],
]  # fmt: skip


def healthy():
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 48, "width": 64} for i in range(3)],
        "annotations": [
            {
                "id": i,
                "image_id": i % 3,
                "category_id": 1 + i % 2,
                "bbox": [4.0, 5.0, 20.0 + i, 21.0],
                "iscrowd": 0,
            }
            for i in range(5)
        ],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    for i in range(3):
        cv2.imwrite(str(root / f"{i}.png"), np.full((48, 64, 3), 60 * i, np.uint8))
    return root


def damaged(draw, content):
    """Changes one value, key or row."""
    rows = content[draw.choice(list(content))]
    index = draw.randrange(len(rows))
    kind = draw.random()
    if kind < 0.1:
        rows[index] = copy.deepcopy(draw.choice(VALUES))
    elif kind < 0.15:
        rows.append(copy.deepcopy(rows[index]))
    elif kind < 0.2:
        del rows[index]
    elif isinstance(rows[index], dict) and rows[index]:
        key = draw.choice(list(rows[index]))
        if kind < 0.3:
            del rows[index][key]
        elif key == "bbox" and kind < 0.6 and isinstance(rows[index][key], list):
            rows[index][key] = list(rows[index][key])
            rows[index][key][draw.randrange(4) : 4] = [copy.deepcopy(draw.choice(VALUES))]
        else:
            rows[index][key] = copy.deepcopy(draw.choice(VALUES))
    return content


def plain_number(value):
    if isinstance(value, str):
        return bool(re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", value, re.A))
    return isinstance(value, int | float) and not isinstance(value, bool)


def nonsense(content):
    """What no reader may take for right, found without the reader's own code."""
    for row in content["annotations"]:
        if not isinstance(row, dict) or isinstance(row.get("image_id"), bool | list | dict | None):
            return "annotation"
        if isinstance(row.get("category_id"), bool | list | dict | None):
            return "category_id"
        crowd = row.get("iscrowd")
        if not (crowd is None or crowd in (0, 1) or str(crowd).strip() in ("0", "1", "1.0")):
            return "iscrowd"
        box = row.get("bbox")
        if crowd in (0, None) and not (
            isinstance(box, list) and len(box) == 4 and all(map(plain_number, box))
        ):
            return "bbox"
    for row in content["images"]:
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            return "file_name"
    for row in content["categories"]:
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            return "name"
    return ""


def check(source):
    """A source that was opened holds what can be learned from."""
    report = source.report
    assert report.images == len(source) > 0
    for i in range(len(source)):
        objects = source.objects(i)
        left, top, right, bottom = objects.boxes.T
        assert np.isfinite(objects.boxes).all()
        assert ((left >= 0) & (left < right) & (right <= 64)).all()
        assert ((top >= 0) & (top < bottom) & (bottom <= 48)).all()
        assert ((objects.classes >= 0) & (objects.classes < len(source.names))).all()
    "\n".join(report.lines()).encode()
    assert len(source.identity) == 12


def opened(file, on_error):
    """The source, or the error: of ours, short, printable, with the file's name."""
    start = time.perf_counter()
    try:
        source = open_source(str(file), "train", images=str(file.parent), on_error=on_error)
    except DataError as error:
        message = str(error)
        assert "instances_train.json" in message and len(message) < 4000
        assert message.replace("\n", "").isprintable()
        return message
    finally:
        assert time.perf_counter() - start < 5
    check(source)
    return source


def became(result) -> str:
    if isinstance(result, str):
        return "refused"
    return "read, with some of it skipped and counted" if result.report.skipped else "read"


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_rows_with_wrong_values(folder, on_error):
    draw = random.Random(f"rows {on_error}")
    file, outcomes = folder / "instances_train.json", Counter()
    for case in range(CASES):
        content = healthy()
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            if all(content.values()):
                damaged(draw, content)
        file.write_text(json.dumps(content))
        result = opened(file, on_error)
        outcomes[became(result)] += 1
        if isinstance(result, str):
            named = re.search(r"(images|annotations|categories)\[\d+\]|`\w+`|none of its", result)
            assert named or "no usable image" in result, (case, result)
        elif on_error == "raise":
            assert not nonsense(content), (case, nonsense(content), content)
        else:
            # Every object is kept, or its image or itself is in the report.
            lost = 5 - result.report.objects
            assert lost <= 0 or result.report.skipped or len(content["annotations"]) < 5, case
    print(f"\nCOCO rows, {on_error}: {CASES} cases, {dict(outcomes)}")
    assert outcomes["refused"] > 0


def test_healthy_is_unchanged(folder):
    file = folder / "instances_train.json"
    file.write_text(json.dumps(healthy()))
    source = opened(file, "raise")
    assert source.report.objects == 5 and source.report.skipped == {}
    assert source.names == ("a", "b")


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_damaged_text(folder, on_error):
    draw = random.Random(f"text {on_error}")
    file, outcomes = folder / "instances_train.json", Counter()
    for _ in range(CASES):
        data = bytearray(json.dumps(healthy()).encode())
        for _ in range(draw.choice((1, 1, 2, 8))):
            at, kind = draw.randrange(len(data)), draw.randrange(4)
            if kind == 0:
                data[at] = draw.randrange(256)
            elif kind == 1:
                del data[at : at + draw.randrange(1, 60)]
            elif kind == 2:
                data[at:at] = draw.choice(
                    (b"[" * 5000, b"\xff\xfe", b"\0", b'"', b"9" * 5000, b"\xe2\x80\xa8")
                )
            else:
                del data[at:]
            if not data:
                data = bytearray(b" ")
        file.write_bytes(bytes(data))
        outcomes[became(opened(file, on_error))] += 1
    print(f"\nCOCO text, {on_error}: {CASES} cases, {dict(outcomes)}")
    assert outcomes["refused"] > outcomes["read"]


def test_cases_of_the_field(shared, folder):
    """The smallest input of each failure that was found; taken are numbers in texts, and
    ids that are words."""
    file = folder / "instances_train.json"
    cases = sorted((shared / "cases/fuzz/b_coco_json").glob("*/instances_train.json"))
    assert len(cases) > 10
    for case in cases:
        file.write_bytes(case.read_bytes())
        result = opened(file, (case.parent / "mode.txt").read_text().strip())
        what = (case.parent / "WHAT.txt").read_text()
        if "accepted bbox of str" in what:
            assert list(result.report.skipped) == ["box without area"]
        elif "'<' not supported between instances of 'str' and 'int'" in what:
            assert result.names == ("a", "b")
        else:
            assert isinstance(result, str), case
