"""YOLO data sets as people really have them: odd paths, links, key points, damaged files."""

from __future__ import annotations

import os
import time

import cv2
import numpy as np
import pytest

from jaxaccum.data import DataError, open_source, texts, walking
from jaxaccum.data.base import Findings, Objects, Report, identify
from jaxaccum.data.formats import yolo

ROW = "0 0.5 0.5 0.5 0.5\n"


def picture(file, seed=0):
    """A PNG of 32 x 24 pixels."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), np.uint8)
    data = cv2.imencode(".png", pixels)[1].tobytes()  # imwrite refuses names that are not UTF-8
    file.write_bytes(data)


def data_set(root, labels, config="train: images/train\nnames: [cat, dog]\n", folder="train"):
    """Images and labels below images/FOLDER and labels/FOLDER (label None: no file), and the
    data.yaml, whose path is returned."""
    for i, (name, text) in enumerate(labels.items()):
        picture(root / "images" / folder / f"{name}.png", i)
        if text is not None:
            file = root / "labels" / folder / f"{name}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    root.mkdir(exist_ok=True)
    (root / "data.yaml").write_bytes(config.encode() if isinstance(config, str) else config)
    return str(root / "data.yaml")


def names(source):
    return [source.name(i) for i in range(len(source))]


def refused(path, *said, split="train"):
    """The error of a data set that may not be opened, which says all of `said` in few words."""
    with pytest.raises(DataError) as caught:
        open_source(path, split)
    for words in said:
        assert words in str(caught.value)
    assert len(str(caught.value)) < 1500
    return caught.value


# --- where the images are ---


@pytest.mark.parametrize(
    "written", ["../train/images", "..\\train\\images", "./../train/images", "train\\images"]
)
@pytest.mark.parametrize("root", ["", "path: .\n"])
@pytest.mark.parametrize("in_list", [False, True])
def test_a_folder_one_level_nearer_is_used_and_said(tmp_path, written, root, in_list):
    """A popular exporter writes ../train/images beside the folders themselves (was: an error)."""
    entry = f"[{written!r}]".replace("\\\\", "\\") if in_list else written
    path = str(tmp_path / "set" / "data.yaml")
    picture(tmp_path / "set" / "train" / "images" / "a.png")
    (tmp_path / "set" / "train" / "labels").mkdir()
    (tmp_path / "set" / "train" / "labels" / "a.txt").write_text(ROW)
    (tmp_path / "set" / "data.yaml").write_text(f"{root}train: {entry}\nnames: [cat]\n")
    source = open_source(path, "train")
    assert names(source) == ["a.png"] and len(source.objects(0)) == 1
    assert source.report.lines()[-1].endswith(
        f"where there is nothing; read {tmp_path / 'set' / 'train' / 'images'} instead"
    )

    if ".." in written:  # what is there as it is written is what is meant
        picture(tmp_path / "train" / "images" / "b.png")
        (tmp_path / "train" / "labels").mkdir()
        (tmp_path / "train" / "labels" / "b.txt").write_text(ROW)
        if "\\" not in written:
            source = open_source(path, "train")
            assert names(source) == ["b.png"] and source.report.notes == []


def test_a_folder_that_is_nowhere_near_is_refused(tmp_path):
    path = data_set(tmp_path, {"a": ROW}, "train: ../train/images\nnames: [cat]\n")
    refused(path, "`train` names", "../train/images, which does not exist", "Correct `path`")


def test_lists_in_other_encodings_and_with_other_slashes(tmp_path):
    path = data_set(tmp_path, {"a": ROW, "ü": ROW}, "train: list.txt\nnames: [cat]\n")
    listed = "images\\train\\a.png\r\n../images/train/\u00fc.png\r\n\r\n./images/train/a\u2028.png"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "list.txt").write_bytes(listed.encode(encoding))
        source = open_source(path, "train")
        assert names(source) == ["images/train/a.png", "images/train/ü.png"]
        assert [len(source.objects(i)) for i in range(2)] == [1, 1]
        assert source.report.notes[0].startswith("2 lines of")
        missing = str(tmp_path / "images" / "train" / "a\u2028.png")
        assert source.report.skipped == {"image missing": [(missing, None)]}
        assert "a\\u2028.png" in source.report.lines()[1]
    (tmp_path / "list.txt").write_bytes("images/train/\u4e2d.png".encode("gbk"))
    refused(path, "list.txt:1: byte 13 (0xd6) is not utf-8")


def test_a_list_of_what_is_no_file_is_counted(tmp_path):
    path = data_set(tmp_path, {"a": ROW}, "train: list.txt\nnames: [cat]\n")
    os.mkfifo(tmp_path / "pipe.png")
    long = "x" * 5000
    (tmp_path / "list.txt").write_text(f"pipe.png\nimages\n{long}.png\nimages/train/a.png\n")
    source = open_source(path, "train")
    assert names(source) == ["images/train/a.png"]
    assert [len(source.report.skipped[r]) for r in ("listed, but no file", "image missing")] == [
        2,
        1,
    ]
    assert max(map(len, source.report.lines())) < 5000


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("train: {a: b}\nnames: [a]", "`train` is {'a': 'b'}, expected a path"),
        ("train: [images/train, ~]\nnames: [a]", "`train`[1] is None, expected a path"),
        ("train: [[images/train]]\nnames: [a]", "`train`[0] is ['images/train'], expected a path"),
        ("train: []\nnames: [a]", "no `train`"),
        ("path: [null, a]\ntrain: images/train\nnames: [a]", "`path` is [None, 'a'], expected"),
        ('path: "\\0"\ntrain: images/train\nnames: [a]', "`path` is '\\x00', which is no path"),
        ('path: "\\ud800"\ntrain: images/train\nnames: [a]', "`path` is '\\ud800', which no file"),
        ('train: "a\\0b"\nnames: [a]', "`train` is 'a\\x00b', which is no path"),
        (f"train: {'x' * 5000}\nnames: [a]", "cannot be read (File name too long)"),
        ("train: ring\nnames: [a]", "cannot be read (Too many levels of symbolic links)"),
        ("train: gone\nnames: [a]", "is a link that leads nowhere"),
        ("train: pipe\nnames: [a]", "names the file"),
        ("train: true\nnames: [a]", "/true, which does not exist"),
        ("path: ring\ntrain: images/train\nnames: [a]", "cannot be read"),
    ],
)
def test_paths_that_cannot_be(tmp_path, config, said):
    """Was: a path made of repr(value), or OSError, ValueError and UnicodeEncodeError."""
    path = data_set(tmp_path, {"a": ROW}, config)
    (tmp_path / "ring").symlink_to("ring")
    (tmp_path / "gone").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    assert path in str(refused(path, said))


# --- folders and links ---


def test_links_to_folders_are_followed_once(tmp_path):
    """Was: nothing below a link was read, silently."""
    path = data_set(tmp_path, {"b": ROW, "z/c": ROW})
    data_set(tmp_path / "store", {"a": ROW, "in/d": ROW}, folder="one")
    images = tmp_path / "images" / "train"
    (images / "more").symlink_to("../../store/images/one")
    (tmp_path / "labels" / "train" / "more").symlink_to("../../store/labels/one")
    (images / "y_again").symlink_to("../../store/images/one/in")
    (images / "a_inside").symlink_to("z")
    (images / "loop").symlink_to(".")
    (images / "up").symlink_to("../..")
    (images / "ring").symlink_to("ring")
    (images / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "store" / "images" / "one" / "in" / "loop").symlink_to("..")
    source = open_source(path, "train")
    assert names(source) == ["b.png", "more/a.png", "more/in/d.png", "z/c.png"]
    assert [len(source.objects(i)) for i in range(4)] == [1, 1, 1, 1]
    reasons = {r: sorted(f for f, _ in places) for r, places in source.report.skipped.items()}
    assert reasons == {
        "folder that is read by another path": [
            str(images / name) for name in ("a_inside", "more/in/loop", "y_again")
        ],
        "link to a folder around it, a loop": [str(images / "loop"), str(images / "up")],
        "link that leads nowhere": [str(images / "gone.png"), str(images / "ring")],
    }
    assert f"  followed links to 1 folders: {images / 'more'}" in source.report.lines()


def test_links_to_folders_of_which_only_the_images_are_linked(tmp_path):
    """Without a link beside it for the labels they lie where the images do; else the images of a
    link would be taken for backgrounds."""
    path = data_set(tmp_path, {"b": ROW})
    data_set(tmp_path / "store", {"a": ROW, "in/d": None}, folder="one")
    (tmp_path / "images" / "train" / "more").symlink_to("../../store/images/one")
    source = open_source(path, "train")
    assert names(source) == ["b.png", "more/a.png", "more/in/d.png"]
    assert [len(source.objects(i)) for i in range(3)] == [1, 1, 0]
    assert "labels of 1 images read where a link leads" in source.report.notes


def test_images_that_are_named_again_are_read_again_and_said(tmp_path):
    config = "train: [images/train, images, images/train/in]\nnames: [cat]\n"
    source = open_source(data_set(tmp_path, {"a": ROW, "in/b": ROW}, config), "train")
    assert names(source) == ["a.png", "in/b.png", "train/a.png", "train/in/b.png", "b.png"]
    assert source.report.notes == ["3 images are named again in `train`, and are read again"]


def test_the_order_of_images_is_that_of_their_paths(tmp_path):
    """As it always was: the identity of a data set depends on it."""
    path = data_set(tmp_path, dict.fromkeys(["a/z", "a.b/y", "a-c", "a0", "a/b/c", "B"], ROW))
    (tmp_path / "images" / "train" / "x.JPG").symlink_to("B.png")
    folder = tmp_path / "images" / "train"
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    source = open_source(path, "train")
    assert names(source) == [file.relative_to(folder).as_posix() for file in files]


def test_hidden_images_pipes_and_folders_not_ours_are_counted(tmp_path, monkeypatch):
    path = data_set(tmp_path, {"a": ROW, ".cache/b": ROW, "closed/c": ROW, ".b": ROW})
    folder = tmp_path / "images" / "train"
    os.mkfifo(folder / "pipe.png")
    scandir = os.scandir

    def closed(place):
        if os.path.basename(place) == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(place)

    monkeypatch.setattr(os, "scandir", closed)  # root may read everything
    source = open_source(path, "train")
    assert names(source) == ["a.png"]
    assert source.report.skipped == {
        "hidden file": [(str(folder / ".b.png"), None)],
        "hidden folder": [(str(folder / ".cache"), None)],
        "folder unreadable": [(str(folder / "closed"), None)],
        "pipe or device": [(str(folder / "pipe.png"), None)],
    }


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc")
def test_folders_of_the_system_end_soon(tmp_path):
    """Was: FileNotFoundError and PermissionError, when a process ended or was another's."""
    path = data_set(tmp_path, {}, "train: /proc\nnames: [a]")
    before = time.process_time()
    refused(path, "/proc")
    assert time.process_time() - before < 20


def test_a_folder_of_other_things_is_refused_in_time(tmp_path, monkeypatch):
    path = data_set(tmp_path, {"a": ROW})
    for i in range(30):
        (tmp_path / "images" / "train" / f"{i}.md").write_text("")
    assert len(open_source(path, "train").report.skipped["file that is no image"]) == 30
    monkeypatch.setattr(walking, "MOST_OTHERS", 20)
    refused(path, "holds over 20 things that are no images, and 1 images so far")


def test_names_that_are_not_utf8(tmp_path):
    """Was: UnicodeEncodeError. Data sets of plain names keep their identity."""
    path = data_set(tmp_path, {"a": ROW, "b\udcff\n": ROW, "c\udcfe": "0 1 2"})
    with pytest.raises(DataError, match=r"c\\xfe\.txt:1: 3 columns"):
        open_source(path, "train")
    source = open_source(path, "train", on_error="skip")
    assert names(source) == ["a.png", "b\udcff\n.png"]
    assert len(source.image(1)) == 24 and len(source.objects(1)) == 1
    "\n".join(source.report.lines()).encode()
    assert r"c\xfe.txt:1" in source.report.lines()[1]
    assert source.identity == open_source(path, "train", on_error="skip").identity


def test_identity_of_plain_names_is_what_it_was():
    one = Objects(np.array([[1, 2, 3, 4]], np.float32), np.array([1], np.int32))
    assert identify(["cat", "dög"], [("a.png", (24, 32), one)]) == "57d11fec75e9"
    names_of = [("a\udcff.png", (24, 32), one)], [("a\udcfe.png", (24, 32), one)]
    assert identify(["cat"], names_of[0]) != identify(["cat"], names_of[1])


def test_report_lines_are_printable_and_short():
    report = Report("set (train)")
    report.skip("image missing", "a\udcff\n\x1b[2J.png", 3)
    report.skip("image missing", "x" * 10**6)
    report.notes.append("a note")
    lines = report.lines()
    assert lines[1].startswith(r"  skipped 2 x image missing: a\xff\n\x1b[2J.png:3, xxx")
    assert max(map(len, lines)) < 5000 and lines[2] == "  a note"
    assert isinstance(report, Findings)


# --- label files ---


def mangle(root, kind):
    """Puts something that is no readable label file where the labels of image `a` should be."""
    label = root / "labels" / "train" / "a.txt"
    if kind == "labels are a file":
        label.unlink()
        label.parent.rmdir()
        label.parent.write_text("")
        return
    label.unlink()
    if kind == "pipe":
        os.mkfifo(label)
    elif kind == "folder":
        label.mkdir()
    elif kind == "ring":
        label.symlink_to("a.txt")
    elif kind == "broken link":
        label.symlink_to("gone.txt")
    elif kind == "device":
        label.symlink_to("/dev/zero")
    elif kind == "no text":
        label.write_bytes(b"0 0.5 \xff 0.5 0.5")
    elif kind == "too long":
        with label.open("wb") as file:
            file.truncate(1 << 27)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("pipe", "a pipe or a device"), ("folder", "a folder"), ("ring", "symbolic links"),
        ("broken link", "a link to gone.txt"), ("device", "a pipe or a device"),
        ("no text", "a.txt:1: byte 6 (0xff)"), ("labels are a file", "Not a directory"),
        ("too long", "expected at most"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_read(tmp_path, kind, said):
    """Was: hung (pipe), read for ever (device), IsADirectoryError, NotADirectoryError, OSError."""
    path = data_set(tmp_path, {"a": ROW}, "train: [images/train, other]\nnames: [a]")
    picture(tmp_path / "other" / "b.png")
    (tmp_path / "other" / "b.txt").write_text(ROW)
    mangle(tmp_path, kind)
    label = str(tmp_path / "labels" / "train" / "a.txt")
    assert refused(path, said, label).file == label
    source = open_source(path, "train", on_error="skip")
    assert names(source) == ["b.png"]
    [(reason, [(file, _)])] = source.report.skipped.items()
    assert (reason, file) == ("image with an error in its labels", label)
    assert label in "\n".join(source.report.lines())


def test_skipped_labels_are_listed_one_by_one(tmp_path):
    labels = {"a": ROW, "b": ROW + "0 2 2 2 2", "c": "x", "d": ROW + "\n\n7 0.5 0.5 0.1 0.1"}
    source = open_source(data_set(tmp_path, labels), "train", on_error="skip")
    folder = tmp_path / "labels" / "train"
    assert names(source) == ["a.png"] and source.report.images == 1
    assert source.report.skipped == {
        "image with an error in its labels": [
            (str(folder / "b.txt"), 2), (str(folder / "c.txt"), 1), (str(folder / "d.txt"), 4)
        ]
    }  # fmt: skip


@pytest.mark.parametrize("word", ["0_1", "\uff10.\uff11", "\u0661", "0.\u0665", "1e-1_0", "0x1"])
@pytest.mark.parametrize("column", [0, 2])
def test_only_ascii_digits_are_numbers(tmp_path, word, column):
    """Was: read as numbers."""
    fields = ["0", "0.5", "0.5", "0.5", "0.5"]
    fields[column] = word
    refused(data_set(tmp_path, {"a": ROW + " ".join(fields)}), "a.txt:2: not a number")


def test_numbers_as_people_write_them(tmp_path):
    text = "\ufeff0 .5 5e-1 +0.5 1.\r\n1\t0.5\u00a00.5 5E-1 0.25\r\n"
    source = open_source(data_set(tmp_path, {"a": text}), "train")
    np.testing.assert_allclose(source.objects(0).boxes, [[8, 0, 24, 24], [8, 9, 24, 15]])


def test_lines_are_counted_as_editors_do(tmp_path):
    """Was: U+2028, U+0085, form feeds and so on ended a line."""
    text = "0 0.5\u2028 0.5 0.5 0.5\n0 0.5 0.5\x0b0.5 0.25\r0 0.5 0.5 0.5\x85\n0 9 9 9 9\n"
    error = refused(data_set(tmp_path, {"a": text}), "a.txt:3: 4 columns")
    assert error.line == 3


def test_a_long_row_is_not_printed_whole(tmp_path):
    refused(data_set(tmp_path, {"a": "0 0.5 " * 500_000}), "a.txt:1: ", "...")
    refused(data_set(tmp_path, {"a": "9" * 10**6 + " 0.5 0.5 0.5 0.5"}), "a.txt:1: class 999")


def test_boxes_too_small_for_float32_are_counted(tmp_path):
    """Was: kept as boxes without area."""
    text = "0 0.5 0.5 1e-12 0.5\n" + ROW + "1 0.25 0.25 1e-300 1e-300\n1 1.005 0.5 0.001 0.5\n"
    source = open_source(data_set(tmp_path, {"a": text}), "train")
    label = str(tmp_path / "labels" / "train" / "a.txt")
    assert source.report.skipped == {
        "box without area": [(label, 1), (label, 3)], "box outside the image": [(label, 4)]
    }  # fmt: skip
    np.testing.assert_allclose(source.objects(0).boxes, [[8, 6, 24, 18]])


# --- key points ---


POSE2 = "1 0.5 0.4 0.2 0.4 0.45 0.3 0.55 0.5 0.5 0.4\n0 0.3 0.3 0.1 0.1 0.28 0.3 0.3 0.32 0 0\n"
POSE3 = "1 0.5 0.4 0.2 0.4 0.45 0.3 2 0.55 0.5 1 0 0 0 0.5 0.5 2\n"
KEYS = "train: images/train\nnames: [cat, dog]\nkpt_shape: "


@pytest.mark.parametrize(("text", "shape"), [(POSE2, "[3, 2]"), (POSE3, "[4, 3]")])
def test_rows_with_key_points_give_their_own_box(tmp_path, text, shape):
    """Was: the box around the points, silently."""
    text += "1 0.1 0.1 0.1 0.1\n"  # a box alone
    source = open_source(data_set(tmp_path, {"a": text}, KEYS + shape), "train")
    np.testing.assert_allclose(
        source.objects(0).boxes[[0, -1]], [[12.8, 4.8, 19.2, 14.4], [1.6, 1.2, 4.8, 3.6]], atol=1e-5
    )
    refused(data_set(tmp_path, {"a": text}, KEYS + "[5, 2]"), "expected 5", "15 (those and the key")


@pytest.mark.parametrize("shape", [
    "x", "[3]", "[3, 4]", "[0, 2]", "[-1, 2]", "[1.5, 2]", "''", "[3, 2, 1]", "{a: b}",
    "[1000000000, 2]", "[[1], 2]",
])  # fmt: skip
def test_kpt_shapes_that_cannot_be(tmp_path, shape):
    refused(data_set(tmp_path, {"a": POSE2}, KEYS + shape), "kpt_shape is", "[number of key")


@pytest.mark.parametrize(
    ("text", "shape"),
    [(POSE2, "[3, 2] or [2, 3]"), ("0 .5 .5 .2 .2 .45 .45 1 .5 .5 1\n", "[2, 3]")],
)
def test_rows_that_could_be_either_are_refused(tmp_path, text, shape):
    error = refused(
        data_set(tmp_path, {"a": text}), "a.txt:1: 11 columns", shape, "kpt_shape: null"
    )
    assert error.line == 1
    path = data_set(tmp_path, {"a": text, "b": text}, KEYS + "~")
    assert open_source(path, "train").report.objects > 0  # the user says that they are polygons


@pytest.mark.parametrize("text", [POSE3, POSE3.replace("0 0 0 0.5 0.5 2", "").replace(" 2", " 1")])
def test_other_rows_with_key_points_are_refused_with_a_hint(tmp_path, text):
    refused(data_set(tmp_path, {"a": text}), "a.txt:1: ", "kpt_shape")


def polygon(rng, points):
    """A polygon around a random place."""
    turn = np.sort(rng.uniform(0, 2 * np.pi, points))
    centre, radius = rng.uniform(0.2, 0.8, 2), rng.uniform(0.02, 0.2)
    return (centre + radius * np.stack([np.cos(turn), np.sin(turn)], axis=1)).reshape(-1)


@pytest.mark.parametrize(("fewest", "most"), [(3, 12), (4, 4), (20, 20)])
def test_ordinary_polygons_are_read(tmp_path, fewest, most):
    """Also those of oriented boxes and of one number of points."""
    rng = np.random.default_rng(0)
    labels, expected = {}, []
    for image in range(8):
        shapes = [polygon(rng, rng.integers(fewest, most + 1)) for _ in range(3)]
        labels[f"i{image}"] = "".join(f"0 {' '.join(f'{v:.6f}' for v in p)}\n" for p in shapes)
        expected += [[p[0::2].min(), p[1::2].min(), p[0::2].max(), p[1::2].max()] for p in shapes]
    source = open_source(data_set(tmp_path, labels), "train")
    found = np.concatenate([source.objects(i).boxes for i in range(8)])
    np.testing.assert_allclose(found, np.array(expected) * [32, 24, 32, 24], atol=1e-4)


@pytest.mark.parametrize("text", [
    "0 0.4 0.4 0.6 0.4 0.6 0.6 0.4 0.6\n", "0 0.4 0.4 0.4 0.6 0.6 0.6 0.6 0.4 0.4 0.4\n",
    "0 0.1 0.1 0.9 0.1 0.9 0.9\n",
])  # fmt: skip
def test_one_polygon_that_is_no_pose(tmp_path, text):
    assert open_source(data_set(tmp_path, {"a": text}), "train").report.objects == 1


# --- the data.yaml ---


@pytest.mark.parametrize(
    ("names_of", "said"),
    [
        ("[null, a]", "names[0] is null"), ("[a, ~]", "names[1] is null"),
        ("[a, [b]]", "names[1] is ['b']"), ("[{0: a}, {1: b}]", "names[0] is {'0': 'a'}"),
        ("[a, '']", "names[1] is ''"), ("['  ']", "names[0] is '  '"),
        ('["a\\0b"]', "control characters"), ('["a\\nb"]', "control characters"),
        ('["\\ud800"]', "control characters"), (f"[{'x' * 2000}]", "1 to 1000 characters"),
        ("{0: a, 1: null}", "names[1] is null"), ("{0: a, 1: [b]}", "names[1] is ['b']"),
        ("{0: a, 2: b}", "class ids [0, 2]"), ("{0: a, 00: b}", "class ids [0, 00]"),
        ("{0: a, 0: b}", "the key '0' is in line 2 already"),
        ("{~: a}", "class ids [None]"), ("{-1: a, 0: b}", "class ids [-1, 0]"),
        ("{0.5: a}", "class ids ['0.5']"), ("{0_0: a}", "class ids ['0_0']"),
        ("[a, b, a]", "names has 'a' more than once (0, 2)"), ("a", "names is 'a'"),
        ("&a [*a]", "contains itself"), ("{? !!int 5 : a}", "tag of a number"),
    ],
)  # fmt: skip
def test_class_names_that_cannot_be(tmp_path, names_of, said):
    """Was: str(None), str(["b"]) and so on as names; or the last of two of one id."""
    path = data_set(tmp_path, {"a": ROW}, f"train: images/train\nnames: {names_of}\n")
    assert path in str(refused(path, said))


def test_class_names_are_as_written(tmp_path):
    config = "train: images/train\nnames: [no, 007, 1_0, 2024-02-31, 1e3, 'null', ünï, 0x1, true]\n"
    source = open_source(data_set(tmp_path, {"a": ROW}, config), "train")
    assert source.names == ("no", "007", "1_0", "2024-02-31", "1e3", "null", "ünï", "0x1", "true")
    config = "train: images/train\nnames: {10: k, 2: c, 0: a, 1: b, 3: d, 4: e, 5: f, 6: g, 7: h, "
    source = open_source(data_set(tmp_path, {"a": ROW}, config + "8: i, 9: j}"), "train")
    assert source.names == tuple("abcdefghijk")


@pytest.mark.parametrize("count", ["1000000000", "100001", "0", "-1", "2.0", "true", "[2]", "1_0",
                                   "{a: b}", "'x'", "9" * 30, "\uff12"])  # fmt: skip
def test_numbers_of_classes_that_cannot_be(tmp_path, count):
    """Was: memory without end from 10,000,000 on; true counted as 1."""
    path = data_set(tmp_path, {"a": ROW}, f"train: images/train\nnc: {count}\n")
    refused(path, "nc is", "expected a whole number from 1 to 100,000")


def test_more_names_than_classes_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr(yolo, "MOST_CLASSES", 3)
    path = data_set(tmp_path, {"a": ROW}, "train: images/train\nnames: [a, b, c, d]\n")
    refused(path, "names has 4 entries, expected at most 3")


def test_many_names_of_one_hash_take_no_longer(tmp_path):
    """Was: integers as keys, of which all multiples of 2**61 - 1 have one hash: 14 s."""
    rows = [f"  {i * (2**61 - 1)}: a\n" for i in range(2000)]
    path = data_set(tmp_path, {"a": ROW}, "train: images/train\nnames:\n" + "".join(rows))
    refused(path, "class ids [0, ", ", ...]")


@pytest.mark.parametrize("tag", ["int", "float"])
def test_no_key_has_the_tag_of_a_number(tmp_path, tag):
    path = data_set(tmp_path, {"a": ROW}, f"train: images/train\nnames:\n  !!{tag} 0: a\n")
    refused(path, "data.yaml:3: ", "a key with the tag of a number")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"a", b"names", b"\xdf", b"{", b"train: !!int x", b"train: !!timestamp abc",
        b"a: 2024-02-31\nb: !!binary x", b"[" * 3000, b"\xff\xfea", b"\0", b"a: \x01",
        b"train: a\ntrain: b", b"? [a]\n: b", b"!!python/object:os.system x", b"--- a\n--- b",
        b"a: *b", b"%YAML 9.9\n--- a", b"a: &a {<<: *a}", b"!<tag> {}", b"\xef\xbb\xbf: :",
    ],
)  # fmt: skip
def test_yaml_that_cannot_be(tmp_path, content):
    """Was: 14 kinds of tracebacks."""
    path = data_set(tmp_path, {"a": ROW}, content)
    error = refused(path, path)
    assert error.file == path


def test_yaml_that_merges_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "_MOST_NODES", 200)
    text = "a: &a {b: c, d: e, f: g}\n" + "".join(f"b{i}: {{<<: *a}}\n" for i in range(80))
    refused(data_set(tmp_path, {"a": ROW}, text), "merged keys")


def test_yaml_that_is_no_file(tmp_path):
    (tmp_path / "data.yaml").mkdir()
    refused(str(tmp_path / "data.yaml"), "a folder, expected a file")
    os.mkfifo(tmp_path / "pipe.yaml")
    refused(str(tmp_path / "pipe.yaml"), "a pipe or a device")
    (tmp_path / "ring.yaml").symlink_to("ring.yaml")
    refused(str(tmp_path / "ring.yaml"), "symbolic links")
    refused(str(tmp_path / "absent.yaml"), "no such data.yaml")
    refused("a\0.yaml", "no path")
    with pytest.raises(DataError, match="too long"):
        open_source("x" * 5000 + "/data.yaml", "train")


def test_the_folder_of_a_data_yaml_is_no_data_set(tmp_path):
    path = data_set(tmp_path, {"a": ROW})
    refused(str(tmp_path), "a folder. Give the data.yaml in it", path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_yaml_in_other_encodings(tmp_path, encoding):
    config = "train: images/train\nnames: [größe, 中]\n".encode(encoding)
    source = open_source(data_set(tmp_path, {"a": ROW}, config), "train")
    assert source.names == ("größe", "中")


def test_yaml_in_the_encoding_of_the_system(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(texts.locale, "getencoding", lambda: "gbk")
    monkeypatch.setattr(texts, "_said", set())
    config = "train: images/train\nnames: [红, 绿]\n".encode("gbk")
    assert open_source(data_set(tmp_path, {"a": ROW}, config), "train").names == ("红", "绿")
    assert "read as gbk" in capsys.readouterr().err
    monkeypatch.setattr(texts.locale, "getencoding", lambda: "UTF-8")
    refused(str(tmp_path / "data.yaml"), "data.yaml:2: byte 28", "not utf-8")


def test_channels(tmp_path):
    for said in ("3", "'3'", "~"):
        config = f"train: images/train\nnames: [a]\nchannels: {said}\n"
        assert len(open_source(data_set(tmp_path, {"a": ROW}, config), "train")) == 1
    for said in ("1", "[3]", "3.5", "rgb"):
        config = f"train: images/train\nnames: [a]\nchannels: {said}\n"
        refused(data_set(tmp_path, {"a": ROW}, config), "channels is ", "only 3 (RGB)")


# --- the inputs of the field ---


def test_the_cases_of_the_field(shared):
    cases = shared / "cases"
    source = open_source(str(cases / "01_roboflow_dotdot" / "data.yaml"), "train")
    assert (source.report.images, source.report.objects, len(source.report.notes)) == (6, 12, 1)
    for name in ("utf16", "list", "data"):
        path = str(cases / "02_yaml_not_utf8" / f"{name}.yaml")
        assert open_source(path, "train").names == ("red", "green")
    for name in ("gbk", "cp1252"):
        refused(str(cases / "02_yaml_not_utf8" / f"{name}.yaml"), "yaml:1: byte", "not utf-8")
    source = open_source(str(cases / "10_pose_labels" / "data.yaml"), "train")
    np.testing.assert_allclose(
        source.objects(0).boxes[0] / np.array([128, 96, 128, 96]),
        [0.101562, 0.145834, 0.312500, 0.385417],
        atol=1e-5,
    )


@pytest.mark.parametrize("kind", ["a_yolo_labels", "c_data_yaml"])
def test_the_damage_that_was_found(shared, tmp_path, kind):
    """Every input kept of the seeded damage is refused by an error that names it."""
    folders = sorted((shared / "cases" / "fuzz" / kind).iterdir())
    assert folders
    for folder in folders:
        if (folder / "data.yaml").is_file():
            config = (folder / "data.yaml").read_bytes()
            if b"train: /" in config or b"train: .." in config:
                continue  # the whole disk: see the tests of folders above
            path = data_set(tmp_path, {"a": ROW}, config)
            assert path in str(refused(path))
        elif (folder / "0.txt").is_file():
            rows = (folder / "0.txt").read_text(encoding="utf-8")
            path = data_set(tmp_path, {"a": rows}, "train: images/train\nnames: [a, b, c]\n")
            assert refused(path, "a.txt:1: not a number").line == 1


# --- labels that are not where or what they seem ---


def linked(tmp_path):
    """Three labelled images elsewhere, and one here."""
    path = data_set(tmp_path, {"a": ROW})
    data_set(tmp_path / "disk2", dict.fromkeys(("s0", "s1", "s2"), ROW))
    return path


def test_a_split_that_is_a_link_has_its_labels(tmp_path):
    linked(tmp_path)
    (tmp_path / "images" / "more").symlink_to("../disk2/images/train")
    path = data_set(tmp_path, {}, "train: [images/train, images/more]\nnames: [cat]\n")
    source = open_source(path, "train")
    assert [len(source.objects(i)) for i in range(4)] == [1, 1, 1, 1]
    assert "labels of 3 images read where a link leads" in source.report.notes


@pytest.mark.parametrize("listed", [False, True])
def test_images_that_are_links_have_their_labels(tmp_path, listed):
    linked(tmp_path)
    (tmp_path / "images" / "train" / "s0.png").symlink_to("../../disk2/images/train/s0.png")
    (tmp_path / "list.txt").write_text("images/train/a.png\nimages/train/s0.png\n")
    where = "list.txt" if listed else "images/train"
    source = open_source(data_set(tmp_path, {}, f"train: {where}\nnames: [cat]\n"), "train")
    assert [len(source.objects(i)) for i in range(2)] == [1, 1]
    assert "labels of 1 images read where a link leads" in source.report.notes


def test_images_without_a_label_file_are_counted(tmp_path):
    path = data_set(tmp_path, {"a": ROW, "b": None, "c": None, "d": None, "e": ""})
    (tmp_path / "images" / "train" / "d.txt").write_text(ROW)
    source = open_source(path, "train")
    [note] = source.report.notes
    assert note.startswith("3 images have no label file, and count as images without objects: ")
    assert "labels/train/b.txt" in note and "beside 1 of them lies a .txt, which is not" in note
    assert source.report.backgrounds == 4


@pytest.mark.parametrize(
    ("image", "label"),
    [("a.png", "a.TXT"), ("e\u0301.png", "\u00e9.txt"), ("\u00e9.png", "e\u0301.txt")],
)
def test_labels_under_another_spelling_are_read_and_said(tmp_path, image, label):
    path = data_set(tmp_path, {"z": ROW, image.removesuffix(".png"): None})
    (tmp_path / "labels" / "train" / label).write_text(ROW)
    source = open_source(path, "train")
    assert source.report.objects == 2
    assert any("labels of 1 images read from names in another" in n for n in source.report.notes)


def test_labels_without_their_image_are_counted(tmp_path):
    path = data_set(tmp_path, dict.fromkeys(("a", "b", "in/c", "in/d"), ROW))
    for gone in ("b", "in/d"):
        (tmp_path / "images" / "train" / f"{gone}.png").unlink()
    (tmp_path / "labels" / "train" / "classes.txt").write_text("cat\n")
    labels = tmp_path / "labels" / "train"
    skipped = open_source(path, "train").report.skipped
    assert skipped == {
        "label file without its image": [
            (str(labels / "b.txt"), None), (str(labels / "in" / "d.txt"), None),
        ]
    }  # fmt: skip


def test_a_list_of_some_images_says_nothing_of_the_other_labels(tmp_path):
    data_set(tmp_path, {"a": ROW, "b": ROW})
    (tmp_path / "list.txt").write_text("images/train/a.png\n")
    source = open_source(data_set(tmp_path, {}, "train: list.txt\nnames: [cat]\n"), "train")
    assert source.report.skipped == {} and source.report.notes == []


def test_images_that_share_a_label_file_are_said(tmp_path):
    path = data_set(tmp_path, {"a": ROW, "b": ROW})
    picture(tmp_path / "images" / "train" / "a.jpg")
    [note] = open_source(path, "train").report.notes
    assert note.startswith("1 images share their label file with another of the same name but the")


@pytest.mark.parametrize("more", ["0.93 0.88", "1 0", "0 1", "0.95 0.85 0.1 0.3"])
def test_boxes_with_further_numbers_are_refused(tmp_path, more):
    """Two scores, or difficult and truncated: they were taken for points of a polygon."""
    rows = [f"0 {0.4 + i / 50:.2f} 0.5 0.2 0.2 {more}\n" for i in range(6)]
    config = "train: images/train\nnames: [cat]\n"
    path = data_set(tmp_path, {f"i{i}": row for i, row in enumerate(rows)}, config)
    refused(path, "could be a polygon as well as a box with its key points or other numbers",
            "`kpt_shape: null` if they are polygons", "Delete scores")  # fmt: skip
    data_set(tmp_path, {}, f"{config}kpt_shape: null\n")
    assert open_source(path, "train").report.objects == 6


def test_turned_boxes_are_read_as_what_they_are(tmp_path):
    turned = "0 0.5 0.3 0.7 0.5 0.5 0.7 0.3 0.5\n"
    source = open_source(data_set(tmp_path, {f"i{i}": turned for i in range(6)}), "train")
    assert source.objects(0).boxes[0] == pytest.approx([0.3 * 32, 0.3 * 24, 0.7 * 32, 0.7 * 24])


def test_corners_in_the_place_of_centre_and_size_are_refused(tmp_path):
    rows = "0 0.30 0.35 0.70 0.90\n1 0.55 0.50 0.95 0.98\n"
    path = data_set(tmp_path, {f"i{i}": rows for i in range(6)})
    refused(path, "i0.txt:1: 12 of 12 boxes reach beyond", "all lie in it as class x1 y1 x2 y2")


def test_boxes_that_reach_beyond_their_image_are_counted(tmp_path):
    source = open_source(data_set(tmp_path, {"a": "0 0.05 0.5 0.8 0.4\n0 0.49 0.5 1 1\n"}), "train")
    label = str(tmp_path / "labels" / "train" / "a.txt")
    assert source.report.skipped == {"part of a box outside the image, clipped": [(label, 1)]}
    assert source.objects(0).boxes[0] == pytest.approx([0, 0.3 * 24, 0.45 * 32, 0.7 * 24])


def test_commas_between_the_numbers(tmp_path):
    refused(data_set(tmp_path, {"a": "0,0.5,0.5,0.2,0.2\n"}), "Separate the numbers by spaces")


def test_damaged_images_are_for_on_error_to_decide(tmp_path):
    path = data_set(tmp_path, {"a": ROW, "b": ROW, "c": ROW})
    for name in "bc":
        (tmp_path / "images" / "train" / f"{name}.png").write_bytes(b"<html>")
    refused(path, "2 files cannot be used", "b.png", "c.png", "data.on_error=skip")
    source = open_source(path, "train", on_error="skip")
    assert names(source) == ["a.png"] and len(source.report.skipped["image unreadable"]) == 2


def test_folders_and_lists_that_are_empty_are_named(tmp_path):
    config = "train: [images/train, images/none, list.txt]\nnames: [cat]\n"
    path = data_set(tmp_path, {"a": ROW}, config)
    (tmp_path / "images" / "none").mkdir()
    (tmp_path / "list.txt").write_text("\n\n")
    assert open_source(path, "train").report.skipped == {
        "folder without images": [(str(tmp_path / "images" / "none"), None)],
        "list without images": [(str(tmp_path / "list.txt"), None)],
    }
    data_set(tmp_path, {}, "train: images/none\nnames: [cat]\n")
    refused(path, "no usable image", "folder without images", "images/none")


def test_backslashes_in_the_root(tmp_path):
    data_set(tmp_path / "set" / "cats", {"a": ROW})
    config = "path: set\\cats\ntrain: images/train\nnames: [cat]\n"
    assert names(open_source(data_set(tmp_path, {}, config), "train")) == ["a.png"]


def test_a_split_called_test(tmp_path):
    config = "train: images/train\nval: images/train\ntest: images/test\nnames: [cat]\n"
    data_set(tmp_path, {"t": ROW}, folder="test")
    path = data_set(tmp_path, {"a": ROW}, config)
    assert names(open_source(path, "test")) == ["t.png"]
    data_set(tmp_path, {}, config.replace("test: images/test\n", ""))
    refused(path, "no `test`; the file has 'train', 'val', 'names'", split="test")
    refused(path, "split is 'dev', expected 'train' or 'val' or 'test'", split="dev")
