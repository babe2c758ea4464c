"""One pass over a data set decodes every image before training, and only once."""

import json
import os
import re
import shutil

import cv2
import numpy as np
import pytest
from tiny import tiny_config, tiny_config3d

from jaxaccum import data, tasks
from jaxaccum.data import DataError, check, images
from jaxaccum.machine import user_cache


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return user_cache.folder() / "images"


@pytest.fixture
def decoded(monkeypatch):
    """The names of what is decoded."""
    names = []

    def spy(data, name, *args, original=images.decode, **options):
        names.append(name.rpartition("/")[2])
        return original(data, name, *args, **options)

    monkeypatch.setattr(images, "decode", spy)
    return names


def write_image(file, seed=0, height=60, width=80):
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    cv2.imwrite(str(file), noise)


def break_image(file):
    """Its header stays as it is, and the header is all that opening a data set reads."""
    content = file.read_bytes()
    half = content[: len(content) // 2]
    if file.suffix == ".tif":  # whose header is at its end
        half = half[:100] + bytes(len(half) - 100) + content[len(half) :]
    file.write_bytes(half)


SUFFIXES = ("webp", "jpg", "png", "bmp", "tif")


def yolo(root, count=6):
    for split in ("train", "val"):
        for i in range(count):
            write_image(root / "images" / split / f"{i}.{SUFFIXES[i % 5]}", i)
            label = root / "labels" / split / f"{i}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text("0 0.5 0.5 0.5 0.5\n")
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat]\n")
    return tiny_config(**{"data.path": str(root / "data.yaml")})


def coco(root, count=6):
    for split in ("train", "val"):
        rows, boxes = [], []
        for i in range(count):
            name = f"{i}.{SUFFIXES[i % 5]}"
            write_image(root / "images" / split / name, i)
            rows.append({"id": i, "file_name": name, "height": 60, "width": 80})
            box = [20, 20, 20, 20]
            boxes.append({"id": i, "image_id": i, "category_id": 1, "bbox": box})
        content = {
            "images": rows, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}],
        }  # fmt: skip
        (root / f"{split}.json").write_text(json.dumps(content))
    return tiny_config(**{"data.path": str(root / "train.json")})


def kitti(root, count=6):
    for folder in ("image_2", "label_2", "calib"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        write_image(root / "image_2" / f"{i:06}.png", i, 96, 320)
        label = f"Car 0.00 0 -1.58 50 40 100 80 1.6 1.6 3.9 {i} 1.7 20 -1.6\n"
        label += "DontCare -1 -1 -10 5 5 30 30 -1 -1 -1 -1000 -1000 -1000 -10\n" * i
        (root / "label_2" / f"{i:06}.txt").write_text(label)
        own = data.DEFAULT_CAMERA + np.float32([[i, 0, 0, 0], [0, i, 0, 0], [0, 0, 0, 0]])
        camera = " ".join(map(str, own.reshape(-1)))
        (root / "calib" / f"{i:06}.txt").write_text(f"P2: {camera}\n")
    (root / "ImageSets").mkdir()
    frames = "".join(f"{i:06}\n" for i in range(count))
    for split in ("train", "val"):
        (root / "ImageSets" / f"{split}.txt").write_text(frames)
    return tiny_config3d(**{"data.path": str(root)})


KINDS = {"yolo": yolo, "coco": coco, "kitti": kitti}


def opened(config, split="train", **changes):
    config = config.copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(changes)
    return tasks.of(config).open(config, split)


def skipping(config, split="train"):
    return opened(config, split, **{"data.on_error": "skip"})


def files_of(source):
    return [images.Path(source.file(i)) for i in range(len(source))]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", KINDS)
def test_images_that_do_not_decode_are_found_when_a_data_set_is_opened(tmp_path, kind, split):
    config = KINDS[kind](tmp_path / "set")
    files = files_of(opened(config, split))
    assert len(files) == 6
    for file in files[1:5]:
        break_image(file)
    with pytest.raises(DataError) as caught:
        opened(config, split)
    said = str(caught.value)
    assert f"({split}): 4 of 6 images cannot be decoded" in said
    for file in files[1:5]:
        assert f"{file}: the image's header is readable but its pixels are not" in said
    assert "data.on_error=skip" in said and caught.value.file == str(files[1])


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_images_leave_what_a_set_without_them_is(tmp_path, kind):
    config = KINDS[kind](tmp_path / "set")
    whole = opened(config)
    files, names = files_of(whole), [whole.name(i) for i in range(6)]
    for i in (1, 4):
        break_image(files[i])
    source = skipping(config)
    kept = [0, 2, 3, 5]
    assert [source.name(i) for i in range(len(source))] == [names[i] for i in kept]
    assert source.report.skipped == {check.SKIPPED: [(str(files[i]), None) for i in (1, 4)]}
    assert (source.report.images, source.report.objects) == (4, 4)
    assert "skipped 2 x image that cannot be decoded" in "\n".join(source.report.lines())
    for i, was in enumerate(kept):
        np.testing.assert_array_equal(source.objects(i).boxes, whole.objects(was).boxes)
        assert source.image(i).shape[:2] == source.header(i).size
        if kind == "kitti":
            np.testing.assert_array_equal(source.camera(i), whole.camera(was))
            assert source.labels(i) is not None and len(source.labels(i)) == was + 1
            np.testing.assert_array_equal(source.objects(i).locations, whole.objects(was).locations)
    for i in (1, 4):
        files[i].unlink()
    without = opened(config)  # what is missing has always been left out
    assert source.identity == without.identity != whole.identity
    if kind == "kitti":
        assert source.report.regions == without.report.regions == 0 + 2 + 3 + 5


def test_nothing_left_is_an_error_whatever_the_policy(tmp_path):
    config = kitti(tmp_path / "set", 2)
    for file in files_of(opened(config)):
        break_image(file)
    with pytest.raises(DataError, match=r"no image can be decoded.*\n.*0\.png, .*1\.png"):
        skipping(config)


def test_one_broken_image_is_said_in_one_sentence(tmp_path):
    config = yolo(tmp_path / "set")
    break_image(files_of(opened(config))[3])
    with pytest.raises(DataError, match=r"^[^\n]*3\.bmp: the image's header.*\n.*on_error=skip"):
        opened(config)


@pytest.mark.parametrize("case", ["05_truncated_jpeg", "05b_truncated_in_val", "06_float_tiff"])
def test_the_cases_are_found_before_the_first_update(shared, case):
    path = str(shared / "cases" / case / "data.yaml")
    config = tiny_config(**{"data.path": path})
    split = "val" if case.endswith("val") else "train"
    truncated = "the image's header is readable but its pixels"
    name, fault = {
        "05_truncated_jpeg": ("f003.jpg", truncated),
        "05b_truncated_in_val": ("f010.jpg", truncated),
        "06_float_tiff": ("g.tif", r"its pixels have 32 bits\. Save it with 8 bits a channel"),
    }[case]
    with pytest.raises(DataError, match=f"{re.escape(name)}: {fault}"):
        opened(config, split)
    source = skipping(config, split)
    assert [file.rpartition("/")[2] for file, _ in source.report.skipped[check.SKIPPED]] == [name]


# --- what is known ---


def test_what_has_not_changed_is_not_decoded_again(tmp_path, decoded, cache):
    config = yolo(tmp_path / "set")
    files = files_of(opened(config))
    assert sorted(decoded) == [file.name for file in files]
    assert len(list(cache.iterdir())) == 1
    decoded.clear()
    opened(config)
    assert decoded == []
    write_image(files[2], 99)
    write_image(tmp_path / "set" / "images" / "train" / "new.png", 98)
    opened(config)
    assert sorted(decoded) == ["2.png", "new.png"]
    decoded.clear()
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    opened(yolo(tmp_path / "copy"))
    assert len(decoded) == 7  # elsewhere, nothing is known


def test_broken_images_are_known_too_and_known_to_be_mended(tmp_path, decoded):
    config = yolo(tmp_path / "set")
    file = files_of(opened(config))[1]
    whole = file.read_bytes()
    break_image(file)
    first = skipping(config)
    decoded.clear()
    again = skipping(config)
    assert decoded == [] and again.report.skipped == first.report.skipped
    with pytest.raises(DataError, match=r"1\.jpg: the image's header is readable"):
        opened(config)
    file.write_bytes(whole)
    assert len(opened(config)) == 6 and decoded == ["1.jpg"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "nonsense", "other decoders"])
def test_a_damaged_cache_is_ignored_and_rewritten(tmp_path, decoded, cache, monkeypatch, damage):
    config = yolo(tmp_path / "set")
    opened(config)
    (file,) = cache.iterdir()
    content = file.read_bytes()
    if damage == "other decoders":
        monkeypatch.setattr(cv2, "__version__", "9.9")
    else:
        file.write_bytes({
            "cut": content[:-10], "flipped": content.replace(b"files", b"filet"), "empty": b"",
            "nonsense": b"[]",
        }[damage])  # fmt: skip
    decoded.clear()
    opened(config)
    assert len(decoded) == 6
    opened(config)
    assert len(decoded) == 6 and [f.name for f in cache.iterdir()] == [file.name]


def test_without_a_place_for_the_cache_the_check_runs_each_time(tmp_path, decoded, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    config = yolo(tmp_path / "set")
    for times in (1, 2):
        opened(config)
        assert len(decoded) == 6 * times


def test_what_the_disk_does_is_not_remembered(tmp_path, decoded):
    config = yolo(tmp_path / "set")
    source = data.open_source(config.data.path, "train")
    file = images.Path(source.file(0))
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(DataError, match="cannot be read now"):
        check.checked(source, "raise")
    file.write_bytes(content)
    decoded.clear()
    assert len(opened(config)) == 6 and decoded == ["0.webp"]


def test_an_interrupted_pass_goes_on_where_it_was(tmp_path, decoded, monkeypatch):
    config = yolo(tmp_path / "set", 60)
    seen = []

    def interrupting(self, index, *, strict=False, original=images.FileSource.image):
        seen.append(index)
        if len(seen) == 50:
            raise KeyboardInterrupt
        return original(self, index, strict=strict)

    with monkeypatch.context() as patch:
        patch.setattr(images.FileSource, "image", interrupting)
        with pytest.raises(KeyboardInterrupt):
            opened(config)
    decoded.clear()
    assert len(opened(config)) == 60
    assert len(decoded) < 60


def test_other_sources_are_as_they_are():
    scenes = data.Scenes("train")
    assert check.checked(scenes, "raise") is scenes
    assert check.signature(scenes) is None and check.changed_files(scenes) == []


# --- the signature ---


def test_the_signature_tells_copies_from_changes(tmp_path):
    config = yolo(tmp_path / "set")
    source = opened(config)
    before = check.signature(source)
    assert before == check.signature(opened(config)) and before.startswith("6 files, ")
    assert check.changed_since(before, before) is None and check.changed_files(source) == []
    file = files_of(source)[4]
    content = file.read_bytes()
    os.utime(file, ns=(1, 1))
    touched = check.signature(opened(config))
    assert "copied, or changed" in check.changed_since(before, touched)
    assert check.changed_files(source) == [str(file)]
    file.write_bytes(content + b"\0")
    changed = check.signature(opened(config))
    assert "files have changed" in check.changed_since(before, changed)
    file.unlink()
    assert "in 5 files" in check.changed_since(before, check.signature(opened(config)))
    assert check.changed_files(source) == [str(file)]
