"""Data sets of clouds with something wrong in them: found when they are opened, told with the
file or the field, and left out and counted where data.on_error says so."""

import json
import os

import numpy as np
import pytest
from test_clouds_sources import CHAIR, MODELS, TABLE, cloud, kitti, pcn, projected, shapenet

from jaxaccum.data import DataError, cloud_check, open_clouds, read_cloud
from jaxaccum.data.captions import Captions, read_captions
from jaxaccum.data.check import changed_files, signature

LISTED = "listed shape without a partial cloud"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def reads(monkeypatch):
    """The files that the check reads."""
    seen = []

    def counted(file):
        seen.append(file.name)
        return read_cloud(file)

    monkeypatch.setattr(cloud_check, "read_cloud", counted)
    return seen


def test_a_healthy_set_is_read_once_and_stays_what_it_is(tmp_path, reads):
    root = pcn(tmp_path / "set")
    plain = open_clouds(str(root), "train")
    first = open_clouds(str(root), "train", check=True)
    assert len(reads) == 4 * 9
    again = open_clouds(str(root), "train", check=True)
    assert len(reads) == 4 * 9
    assert plain.identity == first.identity == again.identity
    assert first.report.lines() == plain.report.lines()
    assert first.points == plain.points == 300
    assert signature(first) == signature(again) and signature(first).startswith("36 files, ")
    changed = root / "train" / "partial" / CHAIR / "chair-1" / "03.pcd"
    os.utime(changed, ns=(1, 1))
    assert changed_files(again) == [str(changed)] and changed_files(plain) == []
    touched = open_clouds(str(root), "train", check=True)
    assert changed_files(touched) == []
    assert reads[36:] == ["03.pcd"]
    assert signature(touched) != signature(first) and touched.identity == first.identity


def test_damaged_clouds_are_found_when_the_set_is_opened(tmp_path, reads):
    root = pcn(tmp_path / "set")
    view = root / "train" / "partial" / CHAIR / "chair-1" / "03.pcd"
    view.write_bytes(view.read_bytes()[:-1])
    whole = root / "train" / "complete" / TABLE / "table-2.pcd"
    whole.write_text("x")
    with pytest.raises(DataError, match="2 clouds cannot be used:") as caught:
        open_clouds(str(root), "train", check=True)
    for said in (f"{view}: truncated", f"{whole}: no whole pcd header", "data.on_error=skip"):
        assert said in str(caught.value)
    count = len(reads)
    kept = open_clouds(str(root), "train", on_error="skip", check=True)
    assert len(reads) == count + 2  # what is wrong is looked at again
    assert len(kept) == 3
    (reason,) = kept.report.skipped
    assert reason == "cloud that cannot be read" and len(kept.report.skipped[reason]) == 2
    assert f"skipped 2 x {reason}: {whole}: no whole pcd" in "\n".join(kept.report.lines())
    assert [kept.shapes.views(i) for i in range(3)] == [8, 7, 8]
    for index in range(3):
        for seed in range(20):
            kept.sample(index, np.random.default_rng(seed))


def test_the_number_of_points_is_that_of_most(tmp_path):
    root = shapenet(tmp_path / "set")
    np.save(root / "shapenet_pc" / f"{MODELS[0]}.npy", cloud(65))
    with pytest.raises(DataError, match=r"2\.npy: 65 points, but most complete clouds have 64"):
        open_clouds(f"{root}:ShapeNet-34", "train", check=True)
    kept = open_clouds(f"{root}:ShapeNet-34", "train", on_error="skip", check=True)
    assert (len(kept), kept.points) == (2, 64)
    assert list(kept.report.skipped) == ["cloud with another number of points than most"]


@pytest.mark.parametrize("kind", ["folder", "pipe", "text", "nan", "empty"])
def test_a_set_of_nothing_that_can_be_used_says_why(tmp_path, kind):
    root = shapenet(tmp_path / "set")
    for model in MODELS:
        file = root / "shapenet_pc" / f"{model}.npy"
        file.unlink()
        if kind == "folder":
            file.mkdir()
        elif kind == "pipe":
            os.mkfifo(file)
        elif kind == "text":
            file.write_text("nothing")
        else:
            np.save(file, np.full((64 if kind == "nan" else 0, 3), np.nan, np.float32))
    with pytest.raises(DataError, match="3 clouds cannot be used"):
        open_clouds(f"{root}:ShapeNet-34", "train", check=True)
    with pytest.raises(DataError, match=r"no shapes; .*skipped 3 x cloud that cannot be read \("):
        open_clouds(f"{root}:ShapeNet-34", "train", on_error="skip", check=True)


def test_what_was_left_out_is_told_where_nothing_is_left(tmp_path):
    root = projected(tmp_path / "a")
    for folder in (root / "projected_partial_noise").iterdir():
        folder.rename(folder.with_name(f"{folder.name}x"))
    with pytest.raises(DataError, match=rf"no shapes; skipped 3 x {LISTED} \(.*u1-two-2/models, "):
        open_clouds(f"{root}:Projected-34", "train")
    root = pcn(tmp_path / "b")
    (root / "train" / "partial").rename(root / "train" / "partials")
    with pytest.raises(
        DataError, match=rf"no shapes; skipped 4 x {LISTED} \(.*table-1, .*, \.\.\."
    ):
        open_clouds(str(root), "train")
    root = kitti(tmp_path / "c", ["a", "b"])
    (root / "bboxes").rename(root / "boxes")
    (root / "bboxes").mkdir()
    with pytest.raises(DataError, match="no cars with their boxes in it; skipped 2 x listed car w"):
        open_clouds(str(root), "test")


def test_scans_and_boxes_are_checked(tmp_path):
    root = kitti(tmp_path / "set", ["a", "b", "c", "d"])
    (root / "bboxes" / "b.txt").write_text("1 2 3\n" * 7 + "0_1 2 3\n")
    (root / "bboxes" / "d.txt").write_text("1e30 2 3\n" * 8)
    (root / "cars" / "c.pcd").write_bytes(b"")
    with pytest.raises(DataError, match="3 clouds cannot be used") as caught:
        open_clouds(str(root), "test", check=True)
    assert "b.txt: not a box: line 8: '0_1' is not a number" in str(caught.value)
    assert "d.txt: not a box: line 1: a corner not within 1e+06 m" in str(caught.value)
    kept = open_clouds(str(root), "test", on_error="skip", check=True)
    assert [kept.name(i) for i in range(len(kept))] == ["a"]
    assert len(kept.report.skipped["cloud that cannot be read"]) == 3


def test_a_cache_that_is_damaged_or_cannot_be_written(tmp_path, reads, monkeypatch, capsys):
    path = f"{shapenet(tmp_path / 'set')}:ShapeNet-34"
    open_clouds(path, "train", check=True)
    (kept,) = (tmp_path / "cache" / "jaxaccum" / "clouds").iterdir()
    kept.write_bytes(b"nonsense")
    open_clouds(path, "train", check=True)
    assert "is damaged and is made anew" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(open_clouds(path, "train", check=True)) == 3
    assert "Not a directory" in capsys.readouterr().err
    assert len(reads) == 9


def test_policies_that_are_none():
    with pytest.raises(DataError, match="on_error is 'ignore'"):
        open_clouds("", "train", on_error="ignore")


# --- lists and indices ---


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_indices_and_lists_in_other_encodings(tmp_path, encoding):
    root = pcn(tmp_path / "pcn")
    plain = open_clouds(str(root), "train").identity
    file = root / "PCN.json"
    file.write_text(file.read_text(), encoding=encoding)
    assert open_clouds(str(root), "train").identity == plain
    root = shapenet(tmp_path / "shapenet")
    plain = open_clouds(f"{root}:ShapeNet-34", "train").identity
    listing = root / "ShapeNet-34" / "train.txt"
    listing.write_bytes(listing.read_text().replace("\n", "\r\n").encode(encoding))
    assert open_clouds(f"{root}:ShapeNet-34", "train").identity == plain


def test_lists_that_are_no_text(tmp_path):
    root = shapenet(tmp_path)
    listing = root / "ShapeNet-34" / "train.txt"
    listing.write_bytes(b"%b.npy\n\xd6\xd0-a.npy\n" % MODELS[0].encode())
    with pytest.raises(DataError, match=r"train\.txt:2: byte \d+ \(0xd6\) is not utf-8"):
        open_clouds(f"{root}:ShapeNet-34", "train")
    listing.write_text("x" * 10**6)
    with pytest.raises(DataError, match="expected SYNSET-NAME") as caught:
        open_clouds(f"{root}:ShapeNet-34", "train")
    assert len(str(caught.value)) < 500
    listing.unlink()
    os.mkfifo(listing)
    with pytest.raises(DataError, match=r"train\.txt: not a file, for the split"):
        open_clouds(f"{root}:ShapeNet-34", "train")


def index(**changed):
    return [{"taxonomy_id": "1", "taxonomy_name": "a", "train": ["x"]} | changed]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (3, "it is 3"), (None, "it is None"), ({"a": 1}, r"it is \{'a': 1\}"),
        ([[]], r"category 0 \(counted from 0\) is \[\]"),
        (index(taxonomy_id=7), "taxonomy_id is 7, no text"),
        (index(taxonomy_id="../a"), r"taxonomy_id is '\.\./a', no name"),
        (index(taxonomy_name=None), "taxonomy_name is None, no text"),
        (index(taxonomy_name="\ud800"), "taxonomy_name is '.*', no text"),
        (index(train="x"), "train is 'x', no list"), (index(train={"x": 1}), "train is .*no list"),
        (index(train=["x", 5]), r"train\[1\] is 5, no name of a file"),
        (index(train=["a\0b"]), r"train\[0\] is 'a\\x00b', no name of a file"),
        (index(train=["../../x"]), r"train\[0\] is '\.\./\.\./x', no name of a file"),
        (index(train=["\udc80"]), r"train\[0\] is .*, no name of a file"),
        ([*index(), {}], r"category 1 \(counted from 0\): taxonomy_id is None"),
    ],
)  # fmt: skip
def test_an_index_of_another_form_names_the_field(tmp_path, content, said):
    (tmp_path / "PCN.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"PCN\.json: expected a json list of categories.*{said}"):
        open_clouds(str(tmp_path), "train")


def test_shapes_that_are_listed_again_count_once(tmp_path):
    root = pcn(tmp_path)
    plain = open_clouds(str(root), "train").identity
    listed = json.loads((root / "PCN.json").read_text())
    listed[0]["train"].append("table-1")
    (root / "PCN.json").write_text(json.dumps(listed))
    source = open_clouds(str(root), "train")
    assert (len(source), source.identity) == (4, plain)
    assert source.report.skipped == {
        "shape listed again": [(f"{root}/PCN.json: {TABLE}/table-1", None)]
    }


@pytest.mark.parametrize("value", [None, [1], {"a": 1}, True, "\ud800"])
def test_dictionaries_of_names_are_checked(tmp_path, value):
    root = shapenet(tmp_path)
    (root / "synset_dict.json").write_text(json.dumps({CHAIR: "chair", TABLE: value}))
    with pytest.raises(DataError, match=rf"synset_dict\.json: .*'{TABLE}' is .*, no name"):
        open_clouds(f"{root}:ShapeNet-34", "train")


def test_paths_that_are_none(tmp_path):
    for path in (f"{tmp_path}/a\0b", "x" * 5000, f"{tmp_path}/\udcff"):
        with pytest.raises(DataError, match="no such folder") as caught:
            open_clouds(path, "train")
        str(caught.value).encode()


def test_views_are_numbered_by_digits(tmp_path):
    root = projected(tmp_path)
    models = root / "projected_partial_noise" / CHAIR / "b" / "models"
    for name in ("\u0663.pcd", "0_1.pcd", "+3.pcd"):
        (models / name).write_bytes(b"")
    source = open_clouds(f"{root}:Projected-34", "train", check=True)
    assert source.shapes.views(1) == 16


def test_captions_in_other_encodings(tmp_path):
    source = open_clouds(f"{shapenet(tmp_path)}:ShapeNet-34", "train")
    file = tmp_path / "captions.csv"
    file.write_text(f"{CHAIR}_b,größe\n", encoding="utf-16")
    assert read_captions(file) == {f"{CHAIR}_b": "größe"}
    assert Captions.of(source, file)[1] == "größe"
    file.write_text("x" * 10**5 + ",y\n")
    with pytest.raises(DataError, match="no caption for any shape") as caught:
        Captions.of(source, file)
    assert len(str(caught.value)) < 1000
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(DataError, match="a pipe or a device"):
        read_captions(tmp_path / "pipe.csv")
    file.write_text("a," + "b" * 200_000)
    with pytest.raises(DataError, match=r"captions\.csv:1: not a row of CSV"):
        read_captions(file)


def test_partial_clouds_with_suffixes_in_upper_case_are_read(tmp_path):
    root = pcn(tmp_path)
    for file in [*root.glob("*/*/*/*.pcd"), *root.glob("*/*/*/*/*.pcd")]:
        file.rename(file.with_suffix(".PCD"))
    for split, count in (("train", 4), ("val", 2)):
        source = open_clouds(str(root), split, check=True)
        assert len(source) == count and not source.report.skipped
        assert source.shapes.views(0) == (8 if split == "train" else 1)
        assert len(source.sample(0, None)[1]) == 300
    plain = pcn(tmp_path / "plain")
    assert open_clouds(str(plain), "train").shapes.views(0) == 8


def test_partial_clouds_of_other_names_are_counted(tmp_path):
    root = pcn(tmp_path)
    for folder in (root / "val" / "partial").glob("*/*"):
        (folder / "00.pcd").rename(folder / "view_0.pcd")
    with pytest.raises(DataError) as caught:
        open_clouds(str(root), "val")
    place = root / "val" / "partial" / TABLE / "table-3" / "view_0.pcd"
    assert f"2 x partial cloud whose name is not NUMBER.pcd ({place}, " in str(caught.value)
    assert "2 x listed shape without a partial cloud, but 1 of other names" in str(caught.value)
    folder = root / "train" / "partial" / CHAIR / "chair-1"
    (folder / "07.pcd").rename(folder / "7.ply")
    (folder / "notes.txt").write_text("")
    source = open_clouds(str(root), "train")
    assert source.report.skipped == {
        "partial cloud whose name is not NUMBER.pcd": [(str(folder / "7.ply"), None)]
    }
    for folder in (root / "val" / "partial").glob("*/*"):
        (folder / "view_0.pcd").rename(folder / "01.pcd")
    with pytest.raises(DataError, match=r"2 x listed shape without its partial cloud 0, the one"):
        open_clouds(str(root), "val")


def test_cars_with_suffixes_in_upper_case_are_read(tmp_path):
    root = kitti(tmp_path, ["a", "b"])
    (root / "cars" / "a.pcd").rename(root / "cars" / "a.PCD")
    (root / "bboxes" / "a.txt").rename(root / "bboxes" / "a.TXT")
    (root / "cars" / "c.ply").write_bytes(b"")
    source = open_clouds(str(root), "val", check=True)
    assert [source.name(i) for i in range(2)] == ["a", "b"]
    assert source.report.skipped == {"scan that is no .pcd": [(str(root / "cars" / "c.ply"), None)]}
    assert source.sample(0, None)[0].shape == (2048, 3)


def test_sets_of_transposed_clouds_are_refused(tmp_path):
    root = shapenet(tmp_path)
    for file in (root / "shapenet_pc").iterdir():
        np.save(file, np.load(file).T)
    with pytest.raises(DataError, match=r"3 clouds cannot be used:\n.*\(3, 64\), .*Transpose it"):
        open_clouds(f"{root}:ShapeNet-34", "train", check=True)
    with pytest.raises(DataError, match="Transpose it"):
        open_clouds(f"{root}:ShapeNet-34", "train")
