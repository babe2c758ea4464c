"""COCO files as exporters and people really write them: right, left out and counted, or refused by
an error that names the row and the field."""

import json
import os
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from jaxaccum.data import DataError, open_source

BOX = [2, 3, 10, 12]
CORNERS = [[2, 3, 12, 15]]
CLIPPED = "part of a box outside the image, clipped"


def write_image(file, height=24, width=32):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(file), np.full((height, width, 3), 90, np.uint8))


def annotation(image=7, category=4, bbox=BOX, **others):
    return {"id": 1, "image_id": image, "category_id": category, "bbox": bbox, **others}


def coco(root, images=None, annotations=None, categories=None, split="train", text=None):
    """Writes a.png and b.png, 32 x 24, ids 7 and 9, with the rows given, and the json."""
    for name in ("a.png", "b.png"):
        write_image(root / "images" / split / name)
    sized = {"width": 32, "height": 24}
    two = [{"id": 7, "file_name": "a.png", **sized}, {"id": 9, "file_name": "b.png", **sized}]
    content = {
        "images": two if images is None else images,
        "annotations": [annotation()] if annotations is None else annotations,
        "categories": [{"id": 4, "name": "cat"}, {"id": 30, "name": "dog"}]
        if categories is None
        else categories,
    }
    file = root / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content) if text is None else text(json.dumps(content)))
    return str(file)


def refused(path, **options):
    with pytest.raises(DataError) as caught:
        open_source(path, "train", **options)
    message = str(caught.value)
    assert caught.value.file and len(message) < 3000
    assert message.isprintable() or message.replace("\n", "").isprintable()
    return message


# --- what is meant is clear: taken ---


@pytest.mark.parametrize("size", [0, "0", 0.0, None, "", ...])
@pytest.mark.parametrize("side", ["width", "height"])
def test_an_unknown_size_is_that_of_the_file(tmp_path, size, side):
    """A size of 0 was "declared 0 x 24 but is 32 x 24"."""
    image = {"id": 7, "file_name": "a.png", "width": 32, "height": 24, side: size}
    if size is ...:
        del image[side]
    source = open_source(coco(tmp_path, images=[image]), "train")
    np.testing.assert_allclose(source.objects(0).boxes, CORNERS, rtol=1e-6)
    assert source.report.skipped == {}


def test_numbers_in_texts_are_numbers_on_ids_as_well(tmp_path):
    """ "32" was "declared 32 x 24 but is 32 x 24", and "7" another image than 7."""
    plain = open_source(coco(tmp_path / "plain"), "train")
    written = open_source(
        coco(
            tmp_path / "texts",
            images=[
                {"id": "7", "file_name": "a.png", "width": "32", "height": "24.0"},
                {"id": 9.0, "file_name": "b.png", "width": 32.0, "height": " 24 "},
            ],
            annotations=[annotation(7, "04", ["2", "3", "10", "12"], iscrowd="0")],
            categories=[{"id": "30", "name": "dog"}, {"id": 4.0, "name": "cat"}],
        ),
        "train",
    )
    assert written.names == plain.names == ("cat", "dog")
    assert written.report.skipped == {}
    assert written.identity == plain.identity


def test_ids_may_be_words(tmp_path):
    path = coco(
        tmp_path,
        images=[{"id": "one", "file_name": "a.png"}, {"id": "1e3", "file_name": "b.png"}],
        annotations=[annotation("one", "x"), annotation("1e3", 2)],
        categories=[{"id": "x", "name": "last"}, {"id": 10, "name": "ten"}, {"id": 2, "name": "2"}],
    )
    source = open_source(path, "train")
    assert source.names == ("2", "ten", "last")
    assert [source.objects(i).classes.tolist() for i in (0, 1)] == [[2], [0]]


@pytest.mark.parametrize("crowd", [0, False, "0", None, 0.0])
def test_what_is_no_crowd_is_kept(tmp_path, crowd):
    """The text "0" is true in Python: its box was dropped."""
    source = open_source(coco(tmp_path, annotations=[annotation(iscrowd=crowd)]), "train")
    assert len(source.objects(0)) == 1 and source.report.skipped == {}


@pytest.mark.parametrize("crowd", [1, True, "1", 1.0])
def test_crowds_are_counted_whatever_their_box(tmp_path, crowd):
    path = coco(tmp_path, annotations=[annotation(iscrowd=crowd, bbox=[])])
    assert open_source(path, "train").report.skipped == {"crowd box": [("a.png", None)]}


def test_backslashes_separate_folders(tmp_path):
    rows = [{"id": 7, "file_name": "images\\train\\a.png"}, {"id": 9, "file_name": "train\\b.png"}]
    source = open_source(coco(tmp_path, images=rows[:1]), "train")
    assert source.name(0) == "images/train/a.png" and source.image(0).shape == (24, 32, 3)
    rooted = [{"id": 7, "file_name": "\\train\\a.png"}, {"id": 9, "file_name": ".\\b.png"}]
    assert len(open_source(coco(tmp_path, images=rooted[:1]), "train")) == 1
    assert len(open_source(coco(tmp_path, images=rooted[1:], annotations=[]), "train")) == 1
    assert len(open_source(coco(tmp_path, images=rows[1:], annotations=[]), "train")) == 1
    write_image(tmp_path / "images/train/c\\d.png")  # a lawful name elsewhere
    source = open_source(coco(tmp_path, images=[{"id": 7, "file_name": "c\\d.png"}]), "train")
    assert source.name(0) == "c\\d.png"


def test_marks_and_line_separators_in_the_json(tmp_path):
    plain = open_source(coco(tmp_path), "train").identity
    assert open_source(coco(tmp_path, text=lambda t: "\ufeff" + t), "train").identity == plain
    names = [{"id": 4, "name": "a\u2028b"}]
    path = coco(tmp_path, categories=names, text=lambda t: t.replace("\\u2028", "\u2028"))
    assert open_source(path, "train").names == ("a\u2028b",)


@pytest.mark.skipif(os.name != "posix", reason="names of bytes")
def test_names_that_are_not_utf_8(tmp_path):
    """Python's own json writes such a name of a file so; its hash ended in a UnicodeEncodeError."""
    path = coco(
        tmp_path, images=[{"id": 7, "file_name": "\udcff.png"}, {"id": 9, "file_name": "b.png"}]
    )
    write_image(tmp_path / "x.png")
    try:
        os.rename(tmp_path / "x.png", os.fsencode(tmp_path) + b"/images/train/\xff.png")
    except OSError:
        pytest.skip("this file system takes no such name")
    source = open_source(path, "train")
    assert len(source) == 2 and source.name(0) == "\\udcff.png"
    assert source.image(0).shape == (24, 32, 3)


# --- left out and counted ---


@pytest.mark.parametrize(
    ("first", "rest"),
    [
        ({"id": 0, "name": "pets", "supercategory": "none"}, "pets"),
        ({"id": 0, "name": "cat", "supercategory": "none"}, "pets"),
        ({"id": 0, "name": "project", "supercategory": "none"}, "pets"),
        ({"id": 0, "name": "pets", "supercategory": "pets"}, "pets"),
        ({"id": 99, "name": "pets"}, "pets"),
        ({"id": 99, "name": "dog"}, "pets"),
    ],
)
def test_an_unused_root_category_is_left_out_and_said(tmp_path, first, rest):
    """It was one class more, or refused for having the name of another."""
    rows = [{"id": 4, "name": "cat", "supercategory": rest}]
    rows += [first, {"id": 30, "name": "dog", "supercategory": rest}]
    for split in ("train", "val"):
        path = coco(
            tmp_path, categories=rows, annotations=[annotation()] * (split == "train"), split=split
        )
    path = path.replace("_val", "_train")
    train, val = open_source(path, "train"), open_source(path, "val")
    assert train.names == val.names == ("cat", "dog")
    assert train.objects(0).classes.tolist() == [0]
    said = {"supercategory that no annotation uses": [(f"categories[1] {first['name']!r}", None)]}
    assert train.report.skipped == val.report.skipped == said


def test_a_category_that_is_used_or_below_others_stays(tmp_path):
    rows = [
        {"id": 1, "name": "person", "supercategory": "person"},
        {"id": 2, "name": "car", "supercategory": "vehicle"},
        {"id": 3, "name": "vehicle", "supercategory": "none"},
        {"id": 4, "name": "bus", "supercategory": "none"},
    ]
    used = [annotation(category=3)]
    source = open_source(coco(tmp_path, categories=rows, annotations=used), "train")
    assert source.names == ("person", "car", "vehicle", "bus") and not source.report.skipped
    # A model that was trained with the class keeps it.
    path = coco(tmp_path, categories=rows, annotations=[])
    assert len(open_source(path, "train").names) == 3
    names = [row["name"] for row in rows]
    assert open_source(path, "train", names=names).names == tuple(names)


def test_images_that_are_not_there_are_counted_however_many_come_first(tmp_path):
    """Looked for were only the first 20."""
    rows = [{"id": i + 100, "file_name": f"gone{i}.png"} for i in range(50)]
    rows.append({"id": 7, "file_name": "a.png"})
    source = open_source(coco(tmp_path, images=rows), "train")
    assert len(source) == 1 and source.report.objects == 1
    assert len(source.report.skipped["image missing"]) == 50


@pytest.mark.parametrize("name", ["x" * 3000, "a\0b.png", "\ud800", "..", "/nowhere/a.png"])
def test_names_that_no_file_can_have_are_missing_or_refused(tmp_path, name):
    rows = [{"id": 7, "file_name": name}, {"id": 9, "file_name": "b.png"}]
    path = coco(tmp_path, images=rows)
    if "\0" in name:
        assert "images[0].file_name" in refused(path)
        path, reason = coco(tmp_path, images=rows), "image with an error in its row"
    else:
        reason = "image missing"
    source = open_source(path, "train", on_error="skip")
    assert source.name(0) == "b.png" and list(source.report.skipped) == [reason]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no fifos here")
def test_a_pipe_is_no_image(tmp_path):
    path = coco(tmp_path)
    (tmp_path / "images/train/a.png").unlink()
    os.mkfifo(tmp_path / "images/train/a.png")
    assert list(open_source(path, "train").report.skipped) == ["image missing"]


@pytest.mark.parametrize(
    ("bbox", "corners"),
    [
        ([20, 2, 30, 4], [20, 2, 32, 6]),
        ([-5, -4, 10, 12], [0, 0, 5, 8]),
        ([-5, -4, 100, 120], [0, 0, 32, 24]),
        ([31, 2, 1000, 4], [31, 2, 32, 6]),
        (["20", "2", "30", "4"], [20, 2, 32, 6]),
    ],
)
def test_a_box_partly_outside_is_clipped_and_counted(tmp_path, bbox, corners):
    source = open_source(coco(tmp_path, annotations=[annotation(bbox=bbox)]), "train")
    np.testing.assert_allclose(source.objects(0).boxes, [corners], rtol=1e-6)
    assert source.report.skipped == {CLIPPED: [("a.png", None)]}


def test_the_rounding_of_a_border_is_not_said(tmp_path):
    source = open_source(coco(tmp_path, annotations=[annotation(bbox=[-0.2, 3, 32.4, 9])]), "train")
    np.testing.assert_allclose(source.objects(0).boxes, [[0, 3, 32, 12]], rtol=1e-6)
    assert source.report.skipped == {}


# --- refused, or by on_error left out and counted ---

WRONG_ANNOTATIONS = [
    *(("bbox", bbox) for bbox in (
        [], None, "1234", {"0": 1, "1": 2, "2": 3, "3": 4}, [1, 2, 3], [1, 2, 3, 4, 5], 5, True,
        [False, 5, 6, 7], [1, 2, "x", 4], [1, 2, None, 4], [[1], 2, 3, 4], [1, 2, "٣", 4],
        [1, 2, "1_0", 4], [1, 2, 10**400, 4], [1, 2, float("inf"), 4], [float("nan"), 2, 3, 4],
        [1, 2, -9, 4], [40, 2, 3, 4], [1, 30, 3, 4], [-9, 2, 3, 4], [0, 0, 1e30, 9], ...,
    )),
    *(("category_id", key) for key in (None, True, [], {}, "", 1.5, float("nan"), 5, "cat", ...)),
    *(("iscrowd", flag) for flag in ({}, [], "a", -float("inf"), 2, "yes", [[1], 2])),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG_ANNOTATIONS)
def test_a_wrong_annotation_names_row_and_field_and_can_be_skipped(tmp_path, field, value):
    """12 of these were tracebacks, 10 were taken as if they were right."""
    wrong = {**annotation(), "id": 77, field: value}
    if value is ...:
        del wrong[field]
    path = coco(tmp_path, annotations=[annotation(9), wrong])
    message = refused(path)
    assert path in message and "annotations[1]" in message and field in message
    assert '"id": 77' in message and "on_error" in message
    source = open_source(path, "train", on_error="skip")
    assert [source.name(i) for i in range(len(source))] == ["b.png"]
    assert source.report.skipped == {"image with an error in its labels": [("a.png", None)]}


WRONG_IMAGES = [
    *(("file_name", name) for name in (None, 5, [], {}, True, "", "  ", ...)),
    *(("id", key) for key in (None, True, [], [1], {}, "", 1.5, float("inf"), ...)),
    *(("width", side) for side in (-32, 1.5, "wide", [], True, float("nan"), 1e300, 10**400)),
    ("height", -1),
]


@pytest.mark.parametrize(("field", "value"), WRONG_IMAGES)
def test_a_wrong_image_names_row_and_field_and_can_be_skipped(tmp_path, field, value):
    wrong = {"id": 7, "file_name": "a.png", "width": 32, "height": 24, field: value}
    if value is ...:
        del wrong[field]
    path = coco(tmp_path, images=[{"id": 9, "file_name": "b.png"}, wrong])
    message = refused(path)
    assert "images[1]" in message and field in message
    source = open_source(path, "train", on_error="skip")
    assert [source.name(i) for i in range(len(source))] == ["b.png"]
    counted = source.report.skipped
    assert counted["image with an error in its row"] == [("images[1]", None)]
    assert ("annotation of an unknown image" in counted) == (field == "id")


@pytest.mark.parametrize("key", [None, True, [], {}, 1.5, ...])
def test_an_annotation_of_no_image(tmp_path, key):
    wrong = annotation(key)
    if key is ...:
        del wrong["image_id"]
    path = coco(tmp_path, annotations=[annotation(), wrong])
    assert "annotations[1]" in refused(path) and "image_id" in refused(path)
    source = open_source(path, "train", on_error="skip")
    assert len(source) == 2 and len(source.objects(0)) == 1
    assert source.report.skipped == {"annotation of an unknown image": [("annotations[1]", None)]}


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            ("name", name)
            for name in (None, 5, -1, [], [1, 2], {}, True, "", "a\0b", "\ud800", ...)
        ),
        *(("id", key) for key in (None, True, [], {}, "", 1.5, ...)),
    ],
)
def test_a_wrong_category_is_always_refused(tmp_path, field, value, on_error):
    """A list was taken for the name "[1, 2]"; mixed ids could not be sorted."""
    wrong = {"id": 30, "name": "dog", field: value}
    if value is ...:
        del wrong[field]
    message = refused(
        coco(tmp_path, categories=[{"id": 4, "name": "cat"}, wrong]), on_error=on_error
    )
    assert "categories[1]" in message and field in message


@pytest.mark.parametrize("list_", ["images", "annotations", "categories"])
@pytest.mark.parametrize("row", [5, None, "x", [], True])
def test_rows_that_are_no_objects(tmp_path, list_, row):
    """A number was a TypeError, a text one that "lacks id"."""
    message = refused(coco(tmp_path, **{list_: [row]}))
    assert f"{list_}[0]" in message and "expected an object" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (lambda t: t[: len(t) // 2], "not valid JSON"),
        (lambda t: "[" * 100_000, "nested too deeply"),
        (lambda t: t.replace('"id": 7', '"id": ' + "9" * 5000), "not valid JSON"),
        (lambda t: "[1, 2]", "no list `images`"),
        (lambda t: '{"images": {}}', "no list `images`"),
        (lambda t: "null", "no list `images`"),
        (lambda t: t.replace("[2, 3, 10, 12]", "[" * 900 + "]" * 900), "annotations[0].bbox"),
        (lambda t: t.replace("[2, 3, 10, 12]", f'"{"x" * 3_000_000}"'), "annotations[0].bbox"),
        (lambda t: t.replace('"a.png"', f'["{"x" * 3_000_000}"]'), "images[0].file_name"),
    ],
)
def test_damaged_jsons(tmp_path, text, said):
    assert said in refused(coco(tmp_path, text=text))


def test_a_json_that_is_a_folder(tmp_path):
    (tmp_path / "instances_train.json").mkdir()
    assert "a folder, expected a file" in refused(str(tmp_path / "instances_train.json"))


@pytest.mark.parametrize(
    ("bbox", "said"),
    [
        ([0.1, 0.2, 0.5, 0.4], "lies between 0 and 1"),
        ([12, 10, 30, 22], "left, top, right, bottom"),
    ],
)
def test_boxes_in_other_units_are_refused(tmp_path, bbox, said):
    """Clipping would make boxes of nearly all of them, wrong ones."""
    rows = [annotation(i % 2 * 2 + 7, bbox=[bbox[0] + i / 100, *bbox[1:]]) for i in range(10)]
    assert said in refused(coco(tmp_path, annotations=rows))


def test_time_grows_with_the_rows(tmp_path):
    """A duplicate id among 20,001 images took 7 s, 60,000 ids that collide in a dict 14 s."""
    many = [{"id": i, "file_name": "a.png"} for i in range(20_000)]
    start = time.process_time()
    message = refused(coco(tmp_path, images=[*many, {"id": "19999", "file_name": "b.png"}]))
    assert "two images have the id" in message and "images[20000]" in message
    clash = [annotation((2**61 - 1) * i) for i in range(60_000)]
    assert "does not have" in refused(coco(tmp_path, annotations=clash))
    assert time.process_time() - start < 10  # the two took 21 s


# --- the cases of the field ---


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("14_coco_size_zero", {}),
        ("14b_coco_size_strings", {}),
        ("15_coco_category_id_strings", {}),
        ("16_coco_root_category_same_name", {"supercategory that no annotation uses": 1}),
        ("16b_coco_root_category", {"supercategory that no annotation uses": 1}),
        ("17_coco_backslash", {}),
        ("18_coco_first_20_missing", {"image missing": 20}),
        ("21_coco_box_partly_outside", {CLIPPED: 1}),
    ],
)
def test_cases_that_are_read(shared, case, said):
    path = str(shared / "cases" / case / "annotations" / "instances_train.json")
    for split, count in (("train", 6), ("val", 3)):
        source = open_source(path, split)
        assert source.names == ("red", "green")
        assert (len(source), source.report.objects) == (count, 2 * count)
        assert {k: len(v) for k, v in source.report.skipped.items()} == said


@pytest.mark.parametrize(
    ("case", "said", "reason"),
    [
        ("19_coco_file_name_null", "images[0].file_name is null", "image with an error in its row"),
        ("20_coco_bbox_empty", "annotations[0].bbox", "image with an error in its labels"),
    ],
)
def test_cases_that_are_refused_or_skipped(shared, case, said, reason):
    path = str(shared / "cases" / case / "annotations" / "instances_train.json")
    assert said in refused(path)
    for split, count in (("train", 5), ("val", 2)):
        source = open_source(path, split, on_error="skip")
        assert len(source) == count and list(source.report.skipped) == [reason]


def test_a_file_of_two_rows_is_refused_or_left_out(tmp_path):
    """It would be learned twice, each time with a part of its boxes."""
    rows = [
        {"id": 7, "file_name": "a.png", "width": 32, "height": 24},
        {"id": 9, "file_name": "a.png", "width": 32, "height": 24},
        {"id": 8, "file_name": "b.png", "width": 32, "height": 24},
    ]
    path = coco(tmp_path, rows, [annotation(7), annotation(9), annotation(8)])
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "images" / "train" / name)
    assert "images[1].file_name is 'a.png', as that of images[0]" in str(refused(path))
    source = open_source(path, "train", on_error="skip")
    assert [source.name(i) for i in range(len(source))] == ["b.png"]
    assert source.report.skipped["image with several rows"] == [("a.png", None)] * 2


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("annotations/instances_train.json", "annotations/instances_val.json"),
        ("annotations/train.json", "annotations/valid.json"),
        ("train/_annotations.coco.json", "valid/_annotations.coco.json"),
    ],
)
def test_the_json_of_another_split_is_found_beside_it(tmp_path, monkeypatch, train, val):
    for split, name in (("train", train), ("val", val), ("val", val.replace("val", "test", 1))):
        name = name.replace("testid", "test")
        text = Path(coco(tmp_path, split=split)).read_text()
        for image in ("a.png", "b.png"):
            write_image((tmp_path / name).parent / image)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        found = [open_source(str(tmp_path / train), split) for split in ("train",)]
        assert len(found[0]) == 2
    for split in ("val", "test"):
        assert f" ({split})" in open_source(str(tmp_path / train), split).report.where
    monkeypatch.chdir((tmp_path / train).parent)
    assert len(open_source(Path(train).name, "val")) == 2
    (tmp_path / val).unlink()
    message = refused_split(str(tmp_path / train), "val")
    assert "no val json found (tried " in message and "Name it: val_path=" in message


def refused_split(path, split):
    with pytest.raises(DataError) as caught:
        open_source(path, split)
    return str(caught.value)
