"""Seeded damage to YOLO data sets: the right result, or an error of ours that names its place.

JAXACCUM_FUZZ=N runs N cases of each class instead of 150; `-s` shows the outcomes.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections import Counter

import cv2
import numpy as np
import pytest

from jaxaccum.data import DataError, open_source
from jaxaccum.data.base import CLIPPED

CASES = int(os.environ.get("JAXACCUM_FUZZ", "150"))
LIMIT = 20  # seconds of one case
STRICT = re.compile(rb"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
KEY_POINTS = {"boxes": "null", "polygons": "null", "pose": "[2, 3]"}


def prepare(root, images=("a", "b")):
    """Two images of 32 x 24 with a label of one and two boxes."""
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    data = cv2.imencode(".png", pixels)[1].tobytes()
    for kind in ("images", "labels"):
        (root / kind / "train").mkdir(parents=True)
    for i, name in enumerate(images):
        (root / "images" / "train" / f"{name}.png").write_bytes(data)
        rows = [f"{j} 0.5 0.5 0.25 0.5\n" for j in range(i + 1)]
        (root / "labels" / "train" / f"{name}.txt").write_text("".join(rows))
    return root / "data.yaml"


def opened(path, outcomes, on_error="raise"):
    """The source or the error of ours, counted, in time."""
    start = time.process_time()
    try:
        found = open_source(str(path), "train", on_error=on_error)
    except DataError as error:
        found = error
    if isinstance(found, DataError):
        outcomes["refused"] += 1
        assert len(str(found)) < 2000
        str(found).encode()  # can be printed
    else:
        outcomes["read"] += 1
    assert time.process_time() - start < LIMIT
    return found


# --- label files ---

WORDS = [
    "nan", "inf", "-inf", "1e999", "-0.0", "+0.5", ".5", "5.", "1e-3", "0_1", "\uff11", "\u0661",
    "0x1", "1,0", "--1", "", "NaN", "1e", "0.5f", "\u00bd", "1" * 400, "0" * 400, "\ufeff0.5", "-1",
    "3", "1.009", "1.02", "-0.009", "True", "None", "\x00", "\u2212" "1", "1e-320", "2.0",
    "0.5\u2028",
]  # fmt: skip
SPACES = [" ", "  ", "\t", "\u00a0", "\u3000", "\x0b", "\x0c", "\u2028", "\x85", ",", ";", "\x1c"]
ENDS = ["\n", "\r\n", "\r", "\n\n", "\n \n"]


def row(rng, kind):
    """The words of a row without a fault."""
    label = str(rng.integers(3))
    if kind == "polygons":
        return [label, *(f"{v:.6f}" for v in rng.uniform(0, 1, 2 * rng.integers(3, 8)))]
    words = [label, *(f"{v:.{rng.integers(1, 7)}f}" for v in rng.uniform(0.2, 0.8, 4))]
    points = [w for x, y in rng.uniform(0, 1, (2, 2)) for w in (f"{x:.4f}", f"{y:.4f}", "2")]
    return words + (points if kind == "pose" and rng.random() < 0.8 else [])


def label_text(rng, kind):
    """Rows, of which half of the files have damage to one to three words, spaces or bytes."""
    rows = [row(rng, kind) for _ in range(rng.integers(0, 6))]
    damaged = rng.random() < 0.5
    for _ in range(rng.integers(1, 4) if damaged and rows else 0):
        words = rows[rng.integers(len(rows))]
        what, at = rng.integers(5), rng.integers(len(words)) if words else 0
        if what == 0 or not words:
            words.insert(at, str(rng.choice(WORDS)))
        elif what == 1:
            del words[at]
        elif what == 2:
            words[:] = row(rng, ["boxes", "polygons", "pose"][rng.integers(3)])
        else:
            words[at] = str(rng.choice(WORDS))
    text = ""
    for words in rows:
        text += (str(rng.choice(SPACES)) if damaged else " ").join(words)
        text += str(rng.choice(ENDS)) if damaged else "\n"
    data = text.encode(str(rng.choice(["utf-8", "utf-8-sig", "utf-16"])) if damaged else "utf-8")
    if damaged and rng.random() < 0.2 and data:
        changed = bytearray(data)
        changed[rng.integers(len(changed))] = rng.integers(256)
        data = bytes(changed)
    return data


def reference(data, kind):
    """What a label file says, read another way: ([class and (min x, min y, max x, max y) of each
    row], None), or ([], the line of the first fault; 0 for any)."""
    try:
        encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return [], 0
    if "\0" in text:
        return [], 0
    found, columns = [], set()
    for i, line in enumerate(re.split("\r\n|\r|\n", text), 1):
        words = [word.encode() for word in line.split()]
        if not words:
            continue
        box = len(words) == 5
        long = len(words) == 11 if kind == "pose" else len(words) > 5 and len(words) % 2
        columns.add(box or kind == "pose")
        if not (box or long) or len(columns) > 1 or not all(map(STRICT.fullmatch, words)):
            return [], i
        label, *numbers = map(float, words)
        if not all(map(math.isfinite, numbers)) or label not in (0, 1, 2):
            return [], i
        numbers = numbers if len(columns) == 1 and columns == {False} else numbers[:4]
        if not all(-0.01 <= v <= 1.01 for v in numbers):
            return [], i
        if columns == {False}:
            edges = [f(numbers[axis::2]) for f in (min, max) for axis in (0, 1)]
        else:
            x, y, w, h = numbers
            edges = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        found.append((int(label), *edges))
    return found, None


@pytest.mark.parametrize("kind", ["boxes", "polygons", "pose"])
def test_label_files(tmp_path, kind):
    path, outcomes = prepare(tmp_path), Counter()
    path.write_text(f"train: images/train\nnames: [a, b, c]\nkpt_shape: {KEY_POINTS[kind]}\n")
    label = tmp_path / "labels" / "train" / "a.txt"
    for case in range(CASES):
        rng = np.random.default_rng([case, *kind.encode()])
        data = label_text(rng, kind)
        label.write_bytes(data)
        expected, wrong = reference(data, kind)
        source = opened(path, outcomes)
        if wrong is not None:
            assert isinstance(source, DataError), (case, data)
            assert str(source).startswith(f"{label}:"), (case, str(source))
            assert source.file == str(label), case
            assert wrong in (0, source.line), (case, data, str(source))
            left = open_source(str(path), "train", on_error="skip")
            assert [left.name(i) for i in range(len(left))] == ["b.png"]
            reason = "image with an error in its labels"
            assert left.report.skipped == {reason: [(str(label), source.line)]}
            continue
        assert not isinstance(source, DataError), (case, data, str(source))
        left_out = dict(source.report.skipped)
        clipped = len(left_out.pop(CLIPPED, ()))
        objects, skipped = source.objects(0), sum(map(len, left_out.values()))
        assert len(objects) + skipped == len(expected), (case, data)
        edges = np.array([row[1:] for row in expected]).reshape(-1, 4)
        beyond = ((np.r_[0, 0, -1, -1] - edges * [1, 1, -1, -1]) * [32, 24, 32, 24]).max(
            axis=1
        ) >= 1
        assert beyond.sum() - skipped <= clipped <= beyond.sum(), (case, data)
        whole = np.clip(edges, 0, 1)
        whole = np.float32(whole * [32, 24, 32, 24])
        for box, name in zip(objects.boxes, objects.classes, strict=True):
            near = np.abs(whole - box).max(axis=1) < 1e-4
            assert any(near & (np.array([row[0] for row in expected]) == name)), (case, data)
    print(f"\nlabels of {kind}: {CASES} cases, {dict(outcomes)}")
    assert min(outcomes["read"], outcomes["refused"]) > CASES / 20


# --- the data.yaml ---

VALUES = [
    "", "~", "null", "true", "0", "1", "-1", "2", "3", "1e9", "1000000000", "0x10", "1_0", "2.5",
    ".nan", "'2'", '"\\0"', '"\\ud800"', "\u0662", "2024-02-31", "!!int x", "!!int 2",
    "!!timestamp abc", "!!binary zz", "!!python/name:os.system", "!!set {a, b}", "!!float x",
    "&a [*a]", "*a", "{a: b}", "{}", "[]", "[a]", "[a, b]", "[a, a]", "[a, b, c]", "[null, a]",
    "[[a], b]", "{0: a, 1: b}", "{1: b, 0: a}", "{0: a, 2: b}", "{0: a, 0: b}", "{~: a}",
    "[a, '']", "images/train", "[images/train]", "[images/train, images/train]",
    "../images/train", "..\\images\\train", "nowhere", ".", "list.txt",
    "[list.txt, images/train]", "x" * 5000, "data.yaml", "images/train/a.png", "[3, 2]", "[1, 3]",
    "[a, 2]", "|\n  a\n  b", ">-\n  images/train", "[" * 60 + "]" * 60, "@", "%", "`",
    "'unclosed", "[unclosed", "a: b: c", "# nothing", "\u00fc", "[\u00fc, \u4e2d]", "<<", "--- a",
]  # fmt: skip
KEYS = ["path", "train", "val", "names", "nc", "kpt_shape", "channels", "download", "<<", "0", "~"]
GOOD = {"path": ".", "train": "images/train", "names": "[a, b]"}


def yaml_text(rng):
    """A data.yaml with one to three values changed and, at times, damage to its bytes."""
    config = dict(GOOD)
    for _ in range(rng.integers(1, 4)):
        config[str(rng.choice(KEYS))] = str(rng.choice(VALUES))
    text = "".join(f"{key}: {value}\n" for key, value in config.items())
    if rng.random() < 0.1:
        text += f"{rng.choice(KEYS)}: {rng.choice(VALUES)}\n"
    codec = str(rng.choice(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "gb18030"]))
    data = bytearray(text.encode(codec))
    for _ in range(rng.integers(1, 4) if rng.random() < 0.3 else 0):
        at = rng.integers(len(data))
        data[at : at + rng.integers(3)] = rng.bytes(int(rng.integers(3)))
        data = data or bytearray(b" ")
    return bytes(data)


def test_data_yamls(tmp_path):
    path, outcomes = prepare(tmp_path), Counter()
    (tmp_path / "list.txt").write_text("images/train/b.png\n")
    objects = {"a.png": 1, "b.png": 2}
    for case in range(CASES):
        data = yaml_text(np.random.default_rng([case, 7]))
        path.write_bytes(data)
        source = opened(path, outcomes)
        if isinstance(source, DataError):
            assert str(tmp_path) in str(source), (case, data, str(source))
            continue
        assert 1 <= len(source.names) <= 100_000, (case, data)
        assert len(set(source.names)) == len(source.names), (case, data)
        assert all(isinstance(n, str) and n.strip() and n.isprintable() for n in source.names)
        for i in range(len(source)):
            name = source.name(i)
            assert len(source.objects(i)) == objects[name.rpartition("/")[2]], (case, data)
            assert source.objects(i).classes.max() < len(source.names)
        "\n".join(source.report.lines()).encode()
    print(f"\ndata.yaml: {CASES} cases, {dict(outcomes)}")
    assert min(outcomes["read"], outcomes["refused"]) > CASES / 20
