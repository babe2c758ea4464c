"""A plain folder of complete clouds as a data set."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from jaxaccum.data import CloudStream, DataError, open_clouds
from jaxaccum.data.cloud_models import Model
from jaxaccum.data.cloud_sources import has_unseen
from jaxaccum.data.clouds import CloudReport
from jaxaccum.data.formats import cloud_folder
from jaxaccum.data.formats.cloud_files import write_cloud
from jaxaccum.data.formats.cloud_folder import POINTS, chosen


def ball(count, seed=0):
    points = np.random.default_rng(seed).normal(size=(count, 3)).astype(np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True) * np.float32([3, 2, 1]) + 5


def folder(root, files):
    """Clouds of so many points in these files."""
    for seed, (name, count) in enumerate(files.items()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_cloud(root / name, ball(count, seed))
    return str(root)


def names(source):
    return [source.name(i) for i in range(len(source))]


def test_folders_say_split_and_category(tmp_path):
    path = folder(tmp_path, {
        "train/chair/a.ply": 9000, "train/chair/old/b.npy": 9000, "train/mug/c.PLY": 9000,
        "valid/mug/d.ply": 9000, "notes.txt.npy": 300,
    })  # fmt: skip
    train = open_clouds(path, "train", check=True)
    assert names(train) == ["chair/a.ply", "chair/old/b.npy", "mug/c.PLY"]
    assert train.names == ("chair", "mug") and [train.category(i) for i in range(3)] == [0, 0, 1]
    for split in ("val", "test"):
        found = open_clouds(path, split, viewpoints=1, check=True)
        assert names(found) == ["mug/d.ply"] and found.names == ("mug",)
    assert train.points == POINTS and train.normalised and not has_unseen(path)
    assert "no folder val" not in "\n".join(train.report.lines())
    partial, complete = train.sample(0, np.random.default_rng(0))
    assert partial.shape == (2048, 3) and complete.shape == (POINTS, 3)
    assert np.abs(complete.mean(axis=0)).max() < 1e-6
    assert np.linalg.norm(complete, axis=1).max() == pytest.approx(1)


def test_without_folders_some_are_held_back(tmp_path):
    path = folder(tmp_path, {f"{i}.npy": 8192 for i in range(21)})
    train, val = (open_clouds(path, split, viewpoints=1, check=True) for split in ("train", "val"))
    assert len(train) == 18 and len(val) == 3 and not {*names(train)} & {*names(val)}
    assert train.names == val.names == ("shape",)
    assert "3 of 21 clouds are held back for evaluation" in train.report.lines()[-1]
    assert names(open_clouds(path, "test", viewpoints=1)) == names(val)
    assert names(open_clouds(path, "val", viewpoints=1, check=True)) == names(val)  # from the cache


def test_a_folder_train_alone(tmp_path):
    path = folder(tmp_path, {f"train/{i}.npy": 8192 for i in range(5)})
    assert len(open_clouds(path, "train")) == 4
    assert len(open_clouds(path, "val", viewpoints=1)) == 1


def test_every_number_of_points_becomes_one(tmp_path):
    path = folder(tmp_path, {"train/a.npy": 20_000, "train/b.npy": 300, "val/c.npy": 8192})
    source = open_clouds(path, "train", check=True)
    assert source.report.lines()[-1].endswith(
        "1 clouds have fewer than 8192 points (the smallest 300), which count more than once"
    )
    for index in range(2):
        _, complete = source.sample(index, np.random.default_rng(0))
        assert complete.shape == (POINTS, 3) and np.isfinite(complete).all()
    again = open_clouds(path, "train").sample(0, np.random.default_rng(0))
    assert np.array_equal(again[1], source.sample(0, np.random.default_rng(0))[1])


@pytest.mark.parametrize("count", [256, 5000, 8191, 8192, 8193, 100_000])
def test_which_points_stand_for_a_cloud(count):
    which = chosen(count, "a")
    times = np.bincount(which, minlength=count)
    assert len(which) == POINTS and times.max() - times.min() <= 1
    assert np.array_equal(which, chosen(count, "a"))
    if count not in (256, 8192):
        assert not np.array_equal(which, chosen(count, "b"))


def test_the_identity_is_of_what_is_learned_from(tmp_path):
    files = {"train/a.npy": 9000, "train/b.npy": 9000, "val/c.npy": 9000}
    there = [open_clouds(folder(tmp_path / d, files), "train").identity for d in "xy"]
    other = open_clouds(folder(tmp_path / "z", files | {"train/d.npy": 9000}), "train").identity
    assert there[0] == there[1] != other


def test_what_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match=r"a\.npy: 40 points, expected at least 256"):
        open_clouds(folder(tmp_path / "few", {"train/a.npy": 40, "val/b.npy": 300}), "train",
                    check=True)  # fmt: skip
    files = {"train/a.npy": 40, "train/b.npy": 300, "val/b.npy": 300}
    skipped = open_clouds(folder(tmp_path / "skip", files), "train", on_error="skip", check=True)
    assert names(skipped) == ["shape/b.npy"]
    assert "skipped 1 x cloud that cannot be read" in "\n".join(skipped.report.lines())
    with pytest.raises(DataError, match="one cloud, expected at least two"):
        open_clouds(folder(tmp_path / "one", {"a.ply": 300}), "train")
    with pytest.raises(DataError, match="has a folder test and none for training"):
        open_clouds(folder(tmp_path / "test", {"test/a.ply": 300}), "train")
    pairs = {"train/partial/a.ply": 300, "train/complete/a.ply": 300}
    with pytest.raises(DataError, match="has partial clouds in a folder of their own"):
        open_clouds(folder(tmp_path / "pairs", pairs), "train")
    with pytest.raises(DataError, match="has no unseen categories"):
        open_clouds(str(tmp_path / "one"), "unseen")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"for clouds \(\*\.ply, \*\.pcd, \*\.npy\) in it; it has"):
        open_clouds(str(tmp_path / "empty"), "train")


def test_links_are_followed_once_and_what_is_no_cloud_is_counted(tmp_path):
    elsewhere = folder(tmp_path / "elsewhere", {"x.npy": 300, "y.npy": 300})
    path = folder(tmp_path / "set", {"train/a.npy": 300, "val/b.npy": 300})
    os.symlink(elsewhere, tmp_path / "set" / "train" / "chair")
    os.symlink(tmp_path / "set", tmp_path / "set" / "train" / "round")
    (tmp_path / "set" / "train" / "readme.md").write_text("of scans")
    source = open_clouds(path, "train", check=True)
    assert names(source) == ["shape/a.npy", "chair/x.npy", "chair/y.npy"]
    told = "\n".join(source.report.lines())
    assert "followed links to 1 folders" in told and "file that is no cloud" in told
    assert "link to a folder around it, a loop" in told
    assert cloud_folder.is_folder_of_clouds(tmp_path / "set")


# --- what a folder can hold ---


def test_a_split_has_one_folder(tmp_path):
    for first, second in (("Train", "train"), ("train", "training"), ("val", "valid")):
        root = tmp_path / f"{first}-{second}"
        files = dict.fromkeys((f"{first}/a.npy", f"{second}/b.npy", "train/c.npy"), 300)
        for split in ("train", "val"):
            with pytest.raises(DataError, match=f"{first} and {second} are both folders of the"):
                open_clouds(folder(root, files), split)
    path = folder(tmp_path / "link", {"train/a.npy": 300, "val/b.npy": 300})
    os.symlink("val", tmp_path / "link" / "valid")
    assert names(open_clouds(path, "val", viewpoints=1)) == ["shape/b.npy"]


def test_a_category_called_train_is_not_taken_for_the_split(tmp_path):
    files = {f"{name}/{i}.npy": 300 for name in ("bus", "car", "train") for i in range(3)}
    for split in ("train", "val"):
        with pytest.raises(DataError, match=r"or a category like bus, car\? .*into a folder train"):
            open_clouds(folder(tmp_path / "set", files), split)
    moved = folder(tmp_path / "moved", {f"train/{name}": count for name, count in files.items()})
    assert open_clouds(moved, "train").names == ("bus", "car", "train")


def test_what_lies_beside_the_splits_is_counted(tmp_path):
    path = folder(tmp_path, {
        "train/a.npy": 300, "val/b.npy": 300, "more/c.npy": 300, "d.PLY": 300, ".hidden/e.npy": 300,
    })  # fmt: skip
    (tmp_path / "readme.md").write_text("of scans")
    for split in ("train", "val"):
        assert open_clouds(path, split).report.skipped == {
            "folder beside the folders train, val": [(str(tmp_path / "more"), None)],
            "cloud beside the folders train, val": [(str(tmp_path / "d.PLY"), None)],
        }


def test_folders_of_splits_without_clouds(tmp_path):
    path = folder(tmp_path / "val", {"train/a.npy": 300, "train/b.npy": 300})
    (tmp_path / "val" / "val").mkdir()
    assert len(open_clouds(path, "train")) == 2
    with pytest.raises(DataError, match=r"val: no clouds in it.* remove the folder\. Without"):
        open_clouds(path, "val")
    path = folder(tmp_path / "train", {"a.npy": 300, "val/b.npy": 300})
    (tmp_path / "train" / "train").mkdir()
    with pytest.raises(DataError, match=r"train: no clouds in it; .*1 x cloud beside .*a\.npy"):
        open_clouds(path, "train")


def test_a_file_called_train_is_a_file(tmp_path):
    path = folder(tmp_path, {"a.npy": 300, "b.npy": 300})
    (tmp_path / "train").write_text("")
    source = open_clouds(path, "train")
    assert len(source) == 1 and len(open_clouds(path, "val", viewpoints=1)) == 1
    assert source.report.skipped == {"file that is no cloud": [(str(tmp_path / "train"), None)]}


def test_one_name_is_one_cloud(tmp_path):
    path = folder(tmp_path, {"a.npy": 300, "shape/a.npy": 300, "shape/b.npy": 300})
    with pytest.raises(DataError, match=r"/a\.npy and .*/shape/a\.npy would both be called sha"):
        open_clouds(path, "train")


def test_a_shape_in_two_formats_is_on_one_side(tmp_path):
    files = {f"c/{i}.{kind}": 300 for i in range(15) for kind in ("npy", "ply")}
    path = folder(tmp_path, files)
    train, val = (open_clouds(path, split, viewpoints=1) for split in ("train", "val"))
    assert (len(train), len(val)) == (26, 4)
    sides = [{name.rpartition(".")[0] for name in names(one)} for one in (train, val)]
    assert not sides[0] & sides[1]
    told = "\n".join(train.report.lines())
    assert "15 clouds have the name of another one but for its suffix" in told
    assert "4 of 30 clouds are held back" in told
    alone = folder(tmp_path / "alone", {"a.npy": 300, "a.ply": 300})
    with pytest.raises(DataError, match="one cloud, expected at least two"):
        open_clouds(alone, "train")


def test_links_to_clouds_count_once(tmp_path):
    path = folder(tmp_path, {f"{i}.npy": 300 for i in range(12)})
    for i in range(12):
        (tmp_path / f"link{i}.npy").symlink_to(f"{i}.npy")
    os.link(tmp_path / "0.npy", tmp_path / "zero.npy")
    sources = [open_clouds(path, split, viewpoints=1) for split in ("train", "val")]
    assert [len(source) for source in sources] == [10, 2]
    assert not any("link" in name for source in sources for name in names(source))
    assert len(sources[0].report.skipped["link to a cloud that is there already"]) == 13
    path = folder(tmp_path / "set", {"train/a.npy": 300})
    os.symlink("train", tmp_path / "set" / "val")
    told = open_clouds(path, "val").report.lines()
    assert f"  {path}/val is the folder of the training: a link" in told


def test_names_that_are_no_text_are_left_out(tmp_path):
    path = folder(tmp_path, {
        "train/caf\udce9/a.npy": 300, "train/b\udcff.npy": 300, "train/c\n.npy": 300,
        "val/d.npy": 300,
    })  # fmt: skip
    source = open_clouds(path, "train")
    assert names(source) == ["shape/c\n.npy"]
    assert len(source.report.skipped["cloud whose name is not UTF-8"]) == 2
    "\n".join(source.report.lines()).encode()


def test_categories_in_two_cases_are_said(tmp_path):
    path = folder(tmp_path, {"train/Mug/a.npy": 300, "train/mug/a.npy": 300, "val/mug/b.npy": 300})
    source = open_clouds(path, "train")
    assert source.names == ("Mug", "mug")
    assert "upper and lower case alone are different ones: mug" in source.report.lines()[-1]


def test_clouds_of_too_few_points_are_refused_when_they_are_drawn(tmp_path):
    source = open_clouds(folder(tmp_path, {"train/a.npy": 40, "val/b.npy": 300}), "train")
    with pytest.raises(DataError, match=r"a\.npy: 40 points, expected at least 256"):
        source.sample(0, np.random.default_rng(0))


def test_many_clouds_are_parted_in_little_time():
    models = [Model("c", f"{i}.npy", Path("x")) for i in range(100_000)]
    start = time.process_time()
    parts = [cloud_folder._held_back(models, e, CloudReport("x"), Path("x")) for e in (True, False)]
    assert time.process_time() - start < 4  # not the square of their number
    assert [len(part) for part in parts] == [10_000, 90_000]


def test_the_same_by_threads_and_by_processes(tmp_path):
    path = folder(tmp_path, {"train/a.npy": 9000, "train/b.npy": 300, "val/c.npy": 300})
    source = open_clouds(path, "train")
    by = [list(CloudStream(source, seed=1).windows(0, [2, 3], workers=n)) for n in (0, 2)]
    for one, other in zip(*by, strict=True):
        assert all(np.array_equal(one[key], other[key]) for key in one)
