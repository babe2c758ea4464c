"""Every format is read alike, and every mistake in a data set is named with its place and cure."""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import yaml

from jaxaccum.data import DataError, Report, open_source
from jaxaccum.data.images import decode

SHARED = Path(os.environ.get("JAXACCUM_SHARED") or Path(__file__).parents[2] / "../shared")
REAL = SHARED / "data" / "detect2d"


def real(name):
    if not (REAL / name).is_dir():
        pytest.skip(f"the data set {name} is not at {REAL}; set JAXACCUM_SHARED to use it")
    return REAL / name


def write_image(file, height=24, width=32, seed=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    cv2.imwrite(str(file), pixels)
    return pixels[..., ::-1]


def yolo(root, labels, *, split="train", **config):
    """Writes a YOLO data set: labels maps image name to label text, or None for no file."""
    for i, (name, text) in enumerate(labels.items()):
        write_image(root / "images" / split / name, seed=i)
        if text is not None:
            file = (root / "labels" / split / name).with_suffix(".txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    content = {"path": ".", split: f"images/{split}", "names": ["cat", "dog"], **config}
    (root / "data.yaml").write_text(yaml.safe_dump(content))
    return str(root / "data.yaml")


def coco(root, *, images=None, annotations=None, categories=None, split="train"):
    """Writes a COCO data set of two images, ids 7 and 9, sizes 32 x 24."""
    for i, name in enumerate(("a.png", "b.png")):
        write_image(root / "images" / split / name, seed=i)
    sized = {"width": 32, "height": 24}
    content = {
        "images": [
            {"id": 7, "file_name": "a.png", **sized},
            {"id": 9, "file_name": "b.png", **sized},
        ]
        if images is None
        else images,
        "annotations": [{"id": 1, "image_id": 7, "category_id": 30, "bbox": [2, 3, 10, 12]}]
        if annotations is None
        else annotations,
        "categories": [{"id": 30, "name": "dog"}, {"id": 4, "name": "cat"}]
        if categories is None
        else categories,
    }
    file = root / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return str(file)


# --- YOLO ---


def test_yolo_reads_boxes_in_pixels_of_the_image(tmp_path):
    path = yolo(tmp_path, {"a.png": "1 0.5 0.5 0.25 0.5\n\n0.0 0.25 0.25 0.5 0.5\n", "b.png": None})
    source = open_source(path, "train")
    np.testing.assert_allclose(source.objects(0).boxes, [[12, 6, 20, 18], [0, 0, 16, 12]])
    assert source.objects(0).classes.tolist() == [1, 0]
    assert source.objects(0).boxes.dtype == np.float32
    assert source.objects(0).classes.dtype == np.int32
    assert source.objects(1).boxes.shape == (0, 4)
    assert source.names == ("cat", "dog")
    assert [source.name(i) for i in range(len(source))] == ["a.png", "b.png"]
    assert (source.report.images, source.report.objects, source.report.backgrounds) == (2, 2, 1)
    assert source.report.skipped == {}


def test_yolo_polygons_become_their_extent(tmp_path):
    path = yolo(tmp_path, {"a.png": "0 0.25 0.5 0.75 0.5 0.5 1.0\n"})
    np.testing.assert_allclose(open_source(path, "train").objects(0).boxes, [[8, 12, 24, 24]])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("0 0.5 0.5 0.5", ["4 columns", "expected 5", "columns it lacks"]),
        ("0 0.5 0.5 0.5 0.5 0.5", ["6 columns", "expected 5"]),
        ("0 0.5 0.5 wide 0.5", ["not a number", "numbers only"]),
        ("0.5 0.5 0.5 0.5 0.5", ["class 0.5", "whole number from 0 to 1"]),
        ("2 0.5 0.5 0.5 0.5", ["class 2", "whole number from 0 to 1", "start at 0"]),
        ("-1 0.5 0.5 0.5 0.5", ["class -1"]),
        ("0 0.5 -0.02 0.5 0.5", ["coordinate -0.02", "Divide"]),
        ("0 0.5 0.5 1.02 0.5", ["coordinate 1.02", "Divide"]),
        ("0 16 12 8 6", ["coordinate 16", "Divide"]),
        ("0 nan 0.5 0.5 0.5", ["not finite"]),
        ("0 0.1 0.1 0.9 0.1 0.9 0.9", ["a polygon in a file of boxes", "one kind of row"]),
    ],
)
def test_yolo_refuses_a_wrong_row_with_its_place_and_cure(tmp_path, row, said):
    path = yolo(tmp_path, {"a.png": f"0 0.5 0.5 0.5 0.5\n{row}\n", "b.png": "0 0.5 0.5 0.5 0.5"})
    with pytest.raises(DataError) as caught:
        open_source(path, "train")
    label = str(tmp_path / "labels" / "train" / "a.txt")
    assert f"{label}:2:" in str(caught.value)
    assert repr(row) in str(caught.value)
    for words in said:
        assert words in str(caught.value)
    assert (caught.value.file, caught.value.line) == (label, 2)
    assert pickle.loads(pickle.dumps(caught.value)).line == 2

    source = open_source(path, "train", on_error="skip")
    assert [source.name(0), len(source)] == ["b.png", 1]
    assert source.report.skipped == {"image with an error in its labels": [(label, 2)]}
    assert f"{label}:2" in "\n".join(source.report.lines())


def test_yolo_tolerates_rounding(tmp_path):
    path = yolo(tmp_path, {"a.png": "0 0.5 0.5 1.005 1.0\n0 0.5 -0.005 0.5 0.5"})
    boxes = open_source(path, "train").objects(0).boxes
    np.testing.assert_allclose(boxes, [[0, 0, 32, 24], [8, 0, 24, 5.88]], rtol=1e-5)


def test_yolo_counts_duplicates_and_boxes_without_area(tmp_path):
    text = "0 0.5 0.5 0.5 0.5\n1 0.5 0.5 0 0.5\n0 0.5 0.5 0.5 0.5\n1 1.005 0.5 0.001 0.5\n"
    source = open_source(yolo(tmp_path, {"a.png": text}), "train")
    label = str(tmp_path / "labels" / "train" / "a.txt")
    assert len(source.objects(0)) == 1
    assert source.report.skipped == {
        "box without area": [(label, 2)],
        "duplicate label": [(label, 3)],
        "box outside the image": [(label, 4)],
    }


def test_yolo_counts_images_it_cannot_use(tmp_path):
    row = "0 0.5 0.5 0.5 0.5"
    path = yolo(tmp_path, {name: row for name in ("a.png", "bad.png", "small.png")})
    folder = tmp_path / "images" / "train"
    (folder / "bad.png").write_bytes(b"no image at all")
    write_image(folder / "small.png", height=9)
    (folder / "notes.md").write_text("x")
    (folder / ".hidden").write_text("x")
    source = open_source(path, "train", on_error="skip")
    assert [source.name(i) for i in range(len(source))] == ["a.png"]
    assert source.report.skipped == {
        "image unreadable": [(str(folder / "bad.png"), None)],
        "image under 10 pixels": [(str(folder / "small.png"), None)],
        "file that is no image": [(str(folder / "notes.md"), None)],
    }


def test_yolo_lists_of_images(tmp_path):
    row = "0 0.5 0.5 0.5 0.5"
    path = yolo(tmp_path, {"a.png": row, "b.png": row}, train=["one.txt", "more"])
    absolute = tmp_path / "images" / "train" / "b.png"
    (tmp_path / "one.txt").write_text(
        f"./images/train/a.png\n\n{absolute}\nimages/train/gone.png\n"
    )
    write_image(tmp_path / "more" / "images" / "c.png")
    source = open_source(path, "train")
    names = [source.name(i) for i in range(len(source))]
    assert names == ["images/train/a.png", "images/train/b.png", "images/c.png"]
    assert [len(source.objects(i)) for i in range(3)] == [1, 1, 0]
    gone = str(tmp_path / "images" / "train" / "gone.png")
    assert source.report.skipped == {"image missing": [(gone, None)]}


def test_yolo_replaces_only_the_last_images_in_the_path(tmp_path):
    path = yolo(tmp_path / "images" / "set", {"a.png": "1 0.5 0.5 0.5 0.5"})
    assert open_source(path, "train").objects(0).classes.tolist() == [1]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"names": {0: "cat", 1: "dog"}}, None),
        ({"names": None, "nc": 2}, None),
        ({"nc": 3}, ["nc is 3", "2 entries", "agree"]),
        ({"nc": "two"}, ["nc is 'two'"]),
        ({"names": {1: "cat", 2: "dog"}}, ["[1, 2]", "0 to 1"]),
        ({"names": None}, ["neither names nor nc"]),
        ({"names": "cat"}, ["names is 'cat'", "a list or a mapping"]),
        ({"channels": 1}, ["channels is 1"]),
        ({"train": None}, ["no `train`", "Add `train: images/train`"]),
        ({"train": "nowhere"}, ["nowhere", "does not exist", "Correct `path`"]),
        ({"train": "nowhere", "download": "x.zip"}, ["`download` key is not run"]),
        ({"train": "data.yaml"}, ["expected a folder of images or a .txt"]),
    ],
)
def test_yolo_yaml(tmp_path, config, said):
    path = yolo(tmp_path, {"a.png": "0 0.5 0.5 0.5 0.5"}, **config)
    if said is None:
        assert len(open_source(path, "train").names) == 2
        return
    with pytest.raises(DataError) as caught:
        open_source(path, "train")
    assert path in str(caught.value)
    for words in said:
        assert words in str(caught.value)


def test_an_empty_data_set_is_refused(tmp_path):
    path = yolo(tmp_path, {"a.png": "0 0.5 0.5 0.5 0.5"})
    image = tmp_path / "images" / "train" / "a.png"
    image.write_bytes(b"damaged")
    with pytest.raises(DataError, match="no usable image") as caught:
        open_source(path, "train", on_error="skip")
    assert str(image) in str(caught.value)
    image.unlink()
    with pytest.raises(DataError, match="no usable image"):
        open_source(path, "train")


def test_labels_in_the_wrong_place_are_noticed(tmp_path):
    path = yolo(tmp_path, {"a.png": None, "b.png": None})
    with pytest.raises(DataError, match="none of the 2 images has a label file") as caught:
        open_source(path, "train")
    assert str(tmp_path / "labels" / "train" / "a.txt") in str(caught.value)


def test_labels_that_are_no_text(tmp_path):
    path = yolo(tmp_path, {"a.png": ""})
    (tmp_path / "labels" / "train" / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"a.txt:1: byte 2 .* is not utf-16"):
        open_source(path, "train")


# --- COCO ---


def test_coco_maps_sparse_ids_in_their_order_and_keeps_backgrounds(tmp_path):
    source = open_source(coco(tmp_path), "train")
    assert source.names == ("cat", "dog")
    assert source.objects(0).classes.tolist() == [1]
    np.testing.assert_allclose(source.objects(0).boxes, [[2, 3, 12, 15]], rtol=1e-6)
    assert (len(source), source.report.backgrounds) == (2, 1)


def test_coco_leaves_out_crowds_and_counts_them(tmp_path):
    rows = [
        {"id": 1, "image_id": 7, "category_id": 4, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        {"id": 2, "image_id": 7, "category_id": 4, "bbox": [0, 0, 9, 9], "iscrowd": 0},
        {"id": 3, "image_id": 7, "category_id": 4, "bbox": [0, 0, 9, 0]},
        {"id": 4, "image_id": 7, "category_id": 4, "bbox": [0, 0, 9, 9]},
    ]
    source = open_source(coco(tmp_path, annotations=rows), "train")
    assert len(source.objects(0)) == 1
    assert source.report.skipped == {
        "crowd box": [("a.png", None)],
        "box without area": [("a.png", None)],
        "duplicate label": [("a.png", None)],
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"category_id": 5}, ["unknown category 5", "[4, 30]"]),
        ({"bbox": [1, 2, 3]}, ["bbox is not four numbers", "[x, y, width, height]"]),
        ({"bbox": [40, 2, 30, 4]}, ["does not lie in the image of 32 x 24"]),
        ({"bbox": [1, 2, -9, 4]}, ["does not lie in the image"]),
        ({"bbox": [1, 2, float("nan"), 4]}, ["does not lie in the image"]),
    ],
)
def test_coco_refuses_a_wrong_annotation(tmp_path, change, said):
    row = {"id": 77, "image_id": 7, "category_id": 4, "bbox": [1, 2, 3, 4], **change}
    path = coco(tmp_path, annotations=[row])
    with pytest.raises(DataError) as caught:
        open_source(path, "train")
    for words in [path, '"id": 77', *said]:
        assert words in str(caught.value)
    source = open_source(path, "train", on_error="skip")
    assert len(source) == 1 and source.name(0) == "b.png"
    assert source.report.skipped == {"image with an error in its labels": [("a.png", None)]}


def test_coco_refuses_what_does_not_fit_together(tmp_path):
    stray = [{"id": 5, "image_id": 8, "category_id": 4, "bbox": [1, 2, 3, 4]}]
    path = coco(tmp_path, annotations=stray)
    with pytest.raises(DataError, match="for image 8, which `images` does not have"):
        open_source(path, "train")
    skipped = open_source(path, "train", on_error="skip").report.skipped
    assert skipped == {"annotation of an unknown image": [("annotation 5", None)]}
    big = [{"id": 7, "file_name": "a.png", "width": 64, "height": 48}]
    with pytest.raises(DataError, match=r"a.png is declared 64 x 48 .* but is 32 x 24"):
        open_source(coco(tmp_path, images=big), "train")
    twice = [{"id": 7, "file_name": "a.png"}, {"id": 7, "file_name": "b.png"}]
    with pytest.raises(DataError, match="two images have the id 7"):
        open_source(coco(tmp_path, images=twice), "train")
    with pytest.raises(DataError, match="ids and names must be unique"):
        same = [{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}]
        open_source(coco(tmp_path, categories=same), "train")
    with pytest.raises(DataError, match=r"annotations\[0\] lacks bbox"):
        open_source(coco(tmp_path, annotations=[{"image_id": 7, "category_id": 4}]), "train")
    Path(path).write_text("[1, 2]")
    with pytest.raises(DataError, match="no list `images`"):
        open_source(path, "train")
    Path(path).write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        open_source(path, "train")


def test_coco_says_where_it_looked_for_images(tmp_path):
    path = coco(tmp_path)
    shutil.move(tmp_path / "images" / "train", tmp_path / "pictures")
    with pytest.raises(DataError, match="none of its 2 images was found") as caught:
        open_source(path, "train")
    assert str(tmp_path / "images" / "train" / "a.png") in str(caught.value)
    assert str(tmp_path / "annotations" / "a.png") in str(caught.value)
    assert "images=" in str(caught.value)
    assert len(open_source(path, "train", images=str(tmp_path / "pictures"))) == 2


def test_coco_counts_missing_images(tmp_path):
    path = coco(tmp_path)
    gone = tmp_path / "images" / "train" / "a.png"
    gone.unlink()
    source = open_source(path, "train")
    assert source.report.skipped == {"image missing": [(str(gone), None)]}


def test_coco_val_uses_the_classes_of_train(tmp_path):
    train = coco(tmp_path)
    with pytest.raises(DataError, match=r"no val json found .*instances_val.json.*val_path"):
        open_source(train, "val")
    # Another id for dog, and no cat: matched by name.
    rows = [{"id": 1, "image_id": 7, "category_id": 1, "bbox": [2, 3, 10, 12]}]
    coco(tmp_path, split="val", categories=[{"id": 1, "name": "dog"}], annotations=rows)
    for names in (None, ("cat", "dog")):
        source = open_source(train, "val", names=names)
        assert source.names == ("cat", "dog")
        assert source.objects(0).classes.tolist() == [1]
    other = coco(tmp_path / "x", split="val", categories=[{"id": 1, "name": "cow"}], annotations=[])
    with pytest.raises(DataError, match=r"\['cow'\] are not among the classes of the train set"):
        open_source(train, "val", val_path=other)


# --- images ---


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16", "CMYK"])
def test_every_mode_comes_out_as_rgb(tmp_path, mode):
    path = yolo(tmp_path, {"a.png": "0 0.5 0.5 0.5 0.5"})
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, 15:] = 255
    if mode == "I;16":
        image = PIL.Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    else:
        image = PIL.Image.fromarray(pixels).convert(mode)
    file = tmp_path / "images" / "train" / "a.png"
    if mode == "CMYK":
        file.unlink()
        file = file.with_suffix(".jpg")
    image.save(file)
    out = open_source(path, "train").image(0)
    assert out.dtype == np.uint8 and out.shape == (20, 30, 3)
    assert np.abs(out.astype(int) - pixels).max() <= 8  # JPEG rings a little


def test_channels_are_red_green_blue(tmp_path):
    path = yolo(tmp_path, {"a.png": "0 0.5 0.5 0.5 0.5"})
    PIL.Image.new("RGB", (20, 20), (250, 10, 90)).save(tmp_path / "images" / "train" / "a.png")
    assert open_source(path, "train").image(0)[3, 3].tolist() == [250, 10, 90]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation):
    path = yolo(tmp_path, {"a.png": "0 0.5 0.5 0.5 0.5"})
    folder = tmp_path / "images" / "train"
    (folder / "a.png").unlink()
    ramp = np.zeros((40, 60, 3), np.uint8)
    ramp[..., 0] = np.arange(60) * 4
    ramp[..., 1] = np.arange(40)[:, None] * 6
    image = PIL.Image.fromarray(ramp)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(folder / "a.jpg", exif=exif, quality=100)
    with PIL.Image.open(folder / "a.jpg") as saved:
        expected = np.asarray(PIL.ImageOps.exif_transpose(saved))
    source = open_source(path, "train")
    out = source.image(0)
    assert out.shape == expected.shape
    assert np.abs(out.astype(int) - expected).max() <= 3
    # The box is a part of the upright image.
    height, width = expected.shape[:2]
    quarter = [width / 4, height / 4, width * 3 / 4, height * 3 / 4]
    np.testing.assert_allclose(source.objects(0).boxes, [quarter])


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_truncated_image_is_named_when_it_is_read(tmp_path, suffix):
    path = yolo(tmp_path, {f"a{suffix}": "0 0.5 0.5 0.5 0.5"})
    file = tmp_path / "images" / "train" / f"a{suffix}"
    write_image(file, 200, 200)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    source = open_source(path, "train")
    with pytest.raises(DataError, match="its pixels are not") as caught:
        source.image(0)
    assert str(file) in str(caught.value) and "Replace the file" in str(caught.value)
    file.unlink()
    with pytest.raises(DataError, match="cannot be read now"):
        source.image(0)


def test_a_truncated_image_is_refused_where_opencv_fills_in_grey(monkeypatch):
    """OpenCV 4 decodes half a JPEG and paints the rest grey; OpenCV 5 refuses it."""
    monkeypatch.setattr(cv2, "imdecode", lambda *_: np.full((200, 200, 3), 128, np.uint8))
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    PIL.Image.fromarray(noise).save(buffer, "JPEG")
    with pytest.raises(DataError, match=r"x\.jpg: .*truncated"):
        decode(buffer.getvalue()[:-2000], "x.jpg")


def test_bytes_after_the_end_of_a_jpeg_do_no_harm():
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (20, 20), (200, 0, 0)).save(buffer, "JPEG")
    assert decode(buffer.getvalue() + b"\0" * 100, "x").shape == (20, 20, 3)


def test_an_image_changed_behind_our_back_is_refused(tmp_path):
    path = yolo(tmp_path, {"a.png": "0 0.5 0.5 0.5 0.5"})
    source = open_source(path, "train")
    write_image(tmp_path / "images" / "train" / "a.png", 30, 30)
    with pytest.raises(DataError, match=r"decoded to \(30, 30\).*said \(24, 32\)"):
        source.image(0)


# --- identity, report, dispatch ---


def test_identity_follows_content_and_not_location(tmp_path):
    row = "0 0.5 0.5 0.5 0.5"
    first = open_source(yolo(tmp_path / "one", {"a.png": row, "b.png": None}), "train")
    assert len(first.identity) == 12 and int(first.identity, 16) >= 0
    moved = open_source(yolo(tmp_path / "two" / "deep", {"a.png": row, "b.png": None}), "train")
    assert moved.identity == first.identity
    changes = {
        "label": yolo(tmp_path / "c1", {"a.png": "1 0.5 0.5 0.5 0.5", "b.png": None}),
        "box": yolo(tmp_path / "c2", {"a.png": "0 0.5 0.5 0.5 0.6", "b.png": None}),
        "image name": yolo(tmp_path / "c3", {"a.png": row, "c.png": None}),
        "class name": yolo(tmp_path / "c4", {"a.png": row, "b.png": None}, names=["cat", "cow"]),
        "one less": yolo(tmp_path / "c5", {"a.png": row}),
    }
    write_image(tmp_path / "c6" / "images" / "train" / "b.png")
    changes["size"] = yolo(tmp_path / "c6", {"a.png": row, "b.png": None})
    write_image(tmp_path / "c6" / "images" / "train" / "b.png", width=33)
    found = {what: open_source(path, "train").identity for what, path in changes.items()}
    assert len({first.identity, *found.values()}) == len(found) + 1, found


def test_identity_of_absolute_lists_does_not_depend_on_location(tmp_path):
    found = set()
    for place in ("one", "two"):
        root = tmp_path / place
        path = yolo(root, {"a.png": "0 0.5 0.5 0.5 0.5"}, train="list.txt")
        (root / "list.txt").write_text(f"{root.resolve()}/images/train/a.png\n")
        found.add(open_source(path, "train").identity)
    assert len(found) == 1


def test_sources_pickle(tmp_path):
    source = open_source(yolo(tmp_path, {"a.png": "0 0.5 0.5 0.5 0.5"}), "train")
    copy = pickle.loads(pickle.dumps(source))
    assert copy.identity == source.identity
    np.testing.assert_array_equal(copy.image(0), source.image(0))


def test_report_lines():
    report = Report("here (train)", images=3, objects=5, backgrounds=1)
    for i in range(5):
        report.skip("image missing", f"{i}.png")
    report.skip("duplicate label", "a.txt", 4)
    assert report.lines(examples=2) == [
        "here (train): 3 images, 5 objects, 1 images without objects",
        "  skipped 5 x image missing: 0.png, 1.png, ...",
        "  skipped 1 x duplicate label: a.txt:4",
    ]


def test_open_source_refuses_what_it_does_not_know(tmp_path):
    with pytest.raises(DataError, match="split is 'test', expected 'train' or 'val'"):
        open_source("", "test")
    with pytest.raises(DataError, match="on_error is 'ignore'"):
        open_source("", "train", on_error="ignore")
    with pytest.raises(DataError, match=r"'photos': no known data set. Expected a YOLO data.yaml"):
        open_source("photos", "train")
    with pytest.raises(DataError, match=r"no such data.yaml"):
        open_source(str(tmp_path / "none.yaml"), "train")
    with pytest.raises(DataError, match="no such COCO json"):
        open_source(str(tmp_path / "none.json"), "train")
    with pytest.raises(DataError, match=r"val_path='v.json' belongs to a COCO train json"):
        open_source("", "train", val_path="v.json")
    with pytest.raises(DataError, match="images='x' belongs to a COCO"):
        open_source("d.yaml", "train", images="x")
    with pytest.raises(DataError, match=r"has the classes \['house'.*expected \['dog'\]"):
        open_source("", "train", names=["dog"])
    assert open_source("", "val").names[0] == "house"
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(DataError, match="not valid YAML"):
        open_source(str(tmp_path / "broken.yaml"), "train")


# --- real data ---


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco128_is_the_same_in_both_formats(split):
    root = real("coco128")
    first = open_source(str(root / "data.yaml"), split)
    second = open_source(str(root / "annotations" / "instances_train2017.json"), split)
    assert first.names == second.names and len(first.names) == 80
    assert len(first) == len(second) == {"train": 128, "val": 40}[split]
    by_name = {second.name(i): i for i in range(len(second))}
    for i in range(len(first)):
        one, other = first.objects(i), second.objects(by_name[first.name(i)])
        order, other_order = (
            np.lexsort((*np.round(o.boxes.T[:2]), o.classes)) for o in (one, other)
        )
        assert one.classes[order].tolist() == other.classes[other_order].tolist()
        np.testing.assert_allclose(one.boxes[order], other.boxes[other_order], atol=0.02)
    if split == "train":
        assert second.report.objects == 929
        assert len(second.report.skipped["crowd box"]) == 10
        assert second.report.backgrounds == 2


@pytest.mark.parametrize(("name", "train", "val"), [("bccd", 205, 65), ("raccoon", 120, 28)])
def test_real_yolo_sets(name, train, val):
    path = str(real(name) / "data.yaml")
    for split, count in (("train", train), ("val", val)):
        source = open_source(path, split)
        assert len(source) == count and source.report.objects > 0
        assert source.image(0).shape[2] == 3


# --- TensorFlow Datasets ---


@pytest.fixture(scope="module")
def tfds():
    return pytest.importorskip("tensorflow_datasets")


@pytest.mark.parametrize(
    ("name", "classes", "known"), [("kitti", 8, "Pedestrian"), ("voc/2007", 20, "aeroplane")]
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_tfds_mock(tfds, name, classes, known, split):
    with tfds.testing.mock_data(num_examples=3):
        source = open_source(f"tfds:{name}", split)
        assert len(source) == 3 and len(source.names) == classes and known in source.names
        for i in range(3):
            image, objects = source.image(i), source.objects(i)
            assert image.dtype == np.uint8 and image.shape[2] == 3
            height, width = image.shape[:2]
            assert (objects.boxes >= 0).all()
            assert (objects.boxes <= [width, height, width, height]).all()
            assert objects.classes.max(initial=0) < classes
        # The mock's boxes are random: many have their corners swapped, and none is forgotten.
        left_out = sum(map(len, source.report.skipped.values()))
        assert source.report.objects > 0 and left_out > 0


@pytest.fixture
def prepared(tfds, tmp_path, monkeypatch):
    """A data set prepared on disk without TensorFlow: one png a split, two boxes in train."""
    pixels = np.zeros((24, 32, 3), np.uint8)
    pixels[6:12, 8:16] = (255, 0, 0)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")

    class JaxaccumToy(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            one = {
                "bbox": tfds.features.BBoxFeature(),
                "label": tfds.features.ClassLabel(names=["cat", "dog"]),
                "is_crowd": np.bool_,
            }
            features = {
                "image": tfds.features.Image(),
                "image/filename": tfds.features.Text(),
                "objects": tfds.features.Sequence(one),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(1), "test": self._generate_examples(0)}

        def _generate_examples(self, count):
            box = tfds.features.BBox(ymin=0.25, xmin=0.25, ymax=0.5, xmax=0.5)
            objects = [
                {"bbox": box, "label": "dog", "is_crowd": False},
                {"bbox": box, "label": "cat", "is_crowd": True},
            ]
            for i in range(2):
                yield (
                    i,
                    {
                        "image": buffer.getvalue(),
                        "image/filename": f"{i}.png",
                        "objects": objects[: 2 * count],
                    },
                )

    builder = JaxaccumToy(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    real_source = tfds.data_source
    real_builder = tfds.builder
    monkeypatch.setattr(
        tfds, "data_source", lambda *a, **k: real_source(*a, **k, data_dir=str(tmp_path))
    )
    monkeypatch.setattr(
        tfds, "builder", lambda *a, **k: real_builder(*a, **k, data_dir=str(tmp_path))
    )
    return pixels


def test_tfds_prepared_on_disk(prepared):
    source = open_source("tfds:jaxaccum_toy", "train")
    assert source.names == ("cat", "dog") and source.name(1) == "1.png"
    np.testing.assert_array_equal(source.image(0), prepared)
    assert source.size(0) == prepared.shape[:2]
    np.testing.assert_allclose(source.objects(0).boxes, [[8, 6, 16, 12]])
    assert source.objects(0).classes.tolist() == [1]
    assert source.report.skipped == {"crowd box": [("0.png", None), ("1.png", None)]}

    val = open_source("tfds:jaxaccum_toy", "val")  # no validation split: test
    assert (val.report.where, val.report.backgrounds) == ("tfds:jaxaccum_toy (test)", 2)
    half = open_source("tfds:jaxaccum_toy:train[:50%]:train[50%:]", "val")
    assert len(half) == 1 and half.name(0) == "1.png"
    with pytest.raises(DataError, match="split 'nothing' of jaxaccum_toy cannot be read"):
        open_source("tfds:jaxaccum_toy:nothing", "train")


def test_tfds_kitti_is_turned_upright(tfds):
    """TFDS writes KITTI's boxes with the origin at the bottom left."""
    from jaxaccum.data.formats.tfds import TfdsSource

    with tfds.testing.mock_data(num_examples=1):
        features = tfds.builder("kitti").info.features
    record = {
        "image": np.zeros((100, 200, 3), np.uint8),
        # 10 to 30 pixels above the bottom edge, in TFDS's words.
        "objects": {"bbox": np.array([[0.1, 0.5, 0.3, 0.75]]), "type": np.array([2])},
    }
    source = TfdsSource("kitti", "train", features, [record])
    np.testing.assert_allclose(source.objects(0).boxes, [[100, 70, 150, 90]], rtol=1e-6)
    upright = TfdsSource("other", "train", features, [record])
    np.testing.assert_allclose(upright.objects(0).boxes, [[100, 10, 150, 30]], rtol=1e-6)


def test_tfds_greyscale(tfds):
    from jaxaccum.data.formats.tfds import TfdsSource

    with tfds.testing.mock_data(num_examples=1):
        features = tfds.builder("voc/2007").info.features
    grey = np.arange(400, dtype=np.uint8).reshape(20, 20, 1)
    record = {"image": grey, "objects": {"bbox": np.zeros((0, 4)), "label": np.zeros(0)}}
    image = TfdsSource("voc", "train", features, [record]).image(0)
    np.testing.assert_array_equal(image, np.repeat(grey, 3, axis=2))


def test_tfds_mistakes(tfds, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="knows no data set 'no_such_thing'"):
        open_source("tfds:no_such_thing", "train")
    with pytest.raises(DataError, match="expected tfds:NAME"):
        open_source("tfds:", "train")
    real_source = tfds.data_source
    monkeypatch.setattr(
        tfds, "data_source", lambda *a, **k: real_source(*a, **k, data_dir=str(tmp_path))
    )
    with pytest.raises(DataError, match=r"download_and_prepare\(\)"):
        open_source("tfds:kitti", "train")
    with tfds.testing.mock_data(num_examples=1), pytest.raises(DataError, match=r"found .*label"):
        open_source("tfds:mnist", "train")
