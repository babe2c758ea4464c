"""The layouts of point completion's data sets, and the embedded shapes."""

import itertools
import json
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jaxaccum.data import CloudStream, DataError, Shapes, cloud_batches, open_clouds
from jaxaccum.data.cloud_ops import CORNERS, fixed_crop, random_crop, subsampled
from jaxaccum.data.cloud_sources import SYNSETS, CroppedClouds
from jaxaccum.data.synthetic.shape_parts import (
    box,
    cushion,
    loft,
    surface_points,
    tube,
    turned,
    wheel,
)
from jaxaccum.data.synthetic.shapes import SEEN, UNSEEN

SHARED = Path(os.environ.get("JAXACCUM_SHARED") or Path(__file__).parents[2] / "../shared")
REAL = SHARED / "data" / "completion"
CHAIR, TABLE, ROCKET = "03001627", "04379243", "04099429"


def real(name):
    if not (REAL / name).is_dir():
        pytest.skip(f"the data set {name} is not at {REAL}; set JAXACCUM_SHARED to use it")
    return REAL / name


def cloud(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 3)).astype(np.float32)


def write_pcd(file, points):
    file.parent.mkdir(parents=True, exist_ok=True)
    header = (
        f"VERSION 0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH {len(points)}\n"
        f"HEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {len(points)}\nDATA binary\n"
    )
    file.write_bytes(header.encode() + np.ascontiguousarray(points, "<f4").tobytes())


def write_lines(file, lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))


def rows(points):
    return set(map(tuple, points.tolist()))


# --- ShapeNet-55 and -34 ---


MODELS = [f"{CHAIR}-u1-two-2", f"{CHAIR}-b", f"{TABLE}-c.d"]


def shapenet(root, points=64):
    """Three seen shapes, one unseen; the benchmark's second list is not in order."""
    for seed, model in enumerate([*MODELS, f"{ROCKET}-r"]):
        file = root / "shapenet_pc" / f"{model}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, cloud(points, seed) * 3 + 5)
    for name in ("ShapeNet-34", "ShapeNet-55"):
        write_lines(root / name / "train.txt", [f"{m}.npy" for m in MODELS])
        write_lines(root / name / "test.txt", [f"{MODELS[2]}.npy", "", f"{MODELS[0]}.npy"])
    write_lines(root / "ShapeNet-Unseen21" / "test.txt", [f"{ROCKET}-r.npy"])
    return root


def test_shapenet_shapes_have_their_names_categories_and_frame(tmp_path):
    source = open_clouds(f"{shapenet(tmp_path)}:ShapeNet-55", "train")
    assert len(source) == 3 and source.points == 64 and source.names == ("chair", "table")
    assert [source.category(i) for i in range(3)] == [0, 0, 1]
    assert [source.name(i) for i in range(3)] == [
        f"{CHAIR}/u1-two-2", f"{CHAIR}/b", f"{TABLE}/c.d"
    ]  # fmt: skip
    assert source.report.lines() == [
        f"{tmp_path}/ShapeNet-55/train.txt (train): 3 samples of 3 shapes in 2 categories"
    ]
    assert source.report.shapes == {"chair": 2, "table": 1}
    partial, complete = source.sample(1, np.random.default_rng(3))
    points = np.load(tmp_path / "shapenet_pc" / f"{MODELS[1]}.npy")
    centred = points - points.mean(axis=0)
    expected = centred / np.linalg.norm(centred, axis=1).max()
    np.testing.assert_allclose(complete, expected, atol=1e-6)
    np.testing.assert_array_equal(partial, random_crop(complete, np.random.default_rng(3)))


def test_shapenet_evaluation_is_eight_fixed_crops_of_each_shape(tmp_path):
    path = f"{shapenet(tmp_path)}:ShapeNet-34"
    for split, mode in itertools.product(("val", "test"), ("easy", "median", "hard")):
        source = open_clouds(path, split, mode=mode)
        assert len(source) == 16 and source.report.samples == 16
        assert [source.category(i) for i in range(16)] == [1] * 8 + [0] * 8
        assert source.name(13) == f"{CHAIR}/u1-two-2/5"
        for index in (0, 5, 13):
            partial, complete = source.sample(index, None)
            np.testing.assert_array_equal(partial, fixed_crop(complete, index % 8, mode))
            again = open_clouds(path, split, mode=mode, cache_bytes=0).sample(index, None)
            np.testing.assert_array_equal(again[0], partial)
    assert len({open_clouds(path, "val", mode=m).identity for m in ("easy", "hard")}) == 2
    # Fewer viewpoints differ from shape to shape.
    few = open_clouds(path, "val", viewpoints=3)
    assert len(few) == 6
    corners = [int(few.name(i).rpartition("/")[2]) for i in range(6)]
    assert corners == [0, 1, 2, 1, 2, 3]
    partial, complete = few.sample(5, None)
    np.testing.assert_array_equal(partial, fixed_crop(complete, 3, "median"))


def test_unseen_categories_have_a_list_of_their_own(tmp_path):
    path = shapenet(tmp_path)
    source = open_clouds(f"{path}:ShapeNet-34", "unseen")
    assert source.names == ("rocket",) and len(source) == 8
    assert open_clouds(f"{path}:ShapeNet-Unseen21", "test").identity == source.identity
    with pytest.raises(DataError, match="ShapeNet-55 has no unseen categories"):
        open_clouds(f"{path}:ShapeNet-55", "unseen")


def test_a_benchmark_is_named_after_a_colon_or_as_a_folder(tmp_path):
    root = shapenet(tmp_path / "a:b")
    identity = open_clouds(f"{root}:ShapeNet-34", "train").identity
    for path in (f"{root}/ShapeNet-34", f"{root}/:ShapeNet-34", f"{root}:shapenet-34"):
        assert open_clouds(path, "train").identity == identity
    with pytest.raises(DataError, match=r"which benchmark.*ShapeNet-34, ShapeNet-55, ShapeNet-Un"):
        open_clouds(str(root), "train")
    with pytest.raises(DataError, match=r"no benchmark 'ShapeNet-33'.*There are: ShapeNet-34"):
        open_clouds(f"{root}:ShapeNet-33", "train")
    with pytest.raises(DataError, match=r"train\.txt: no such list, for the split 'train'"):
        open_clouds(f"{root}:ShapeNet-Unseen21", "train")


def test_names_are_the_data_sets_own_where_it_has_some(tmp_path):
    path = shapenet(tmp_path)
    (path / "synset_dict.json").write_text(json.dumps({CHAIR: "throne", "1": "x"}))
    assert open_clouds(f"{path}:ShapeNet-34", "train").names == ("throne", "table")
    (path / "synset_dict.json").write_text("[1]")
    with pytest.raises(DataError, match="not a json of category ids and names"):
        open_clouds(f"{path}:ShapeNet-34", "train")
    (path / "synset_dict.json").unlink()
    write_lines(path / "ShapeNet-34" / "train.txt", ["123-a.npy"])
    np.save(path / "shapenet_pc" / "123-a.npy", cloud(9))
    assert open_clouds(f"{path}:ShapeNet-34", "train").names == ("123",)
    assert len(SYNSETS) == 55 and len(set(SYNSETS.values())) == 55


def test_what_is_wrong_with_a_list_is_named(tmp_path):
    path = shapenet(tmp_path)
    listing = path / "ShapeNet-34" / "train.txt"
    for row in ("chair.npy", f"{CHAIR}-.npy", f"{CHAIR}-a.pcd"):
        write_lines(listing, [f"{MODELS[0]}.npy", row])
        with pytest.raises(DataError, match=r"expected SYNSET-NAME\.npy") as caught:
            open_clouds(f"{path}:ShapeNet-34", "train")
        assert (caught.value.file, caught.value.line) == (str(listing), 2)
    write_lines(listing, [f"{CHAIR}-absent.npy", *[f"{MODELS[0]}.npy"] * 2])
    source = open_clouds(f"{path}:ShapeNet-34", "train")
    assert len(source) == 1
    assert source.report.skipped == {
        "shape listed again": [(str(listing), 3)],
        "listed shape without its complete cloud": [
            (str(path / "shapenet_pc" / f"{CHAIR}-absent.npy"), None)
        ],
    }
    assert source.report.lines()[1].startswith("  skipped 1 x shape listed again: ")
    write_lines(listing, [f"{CHAIR}-absent.npy"])
    with pytest.raises(DataError, match=r"no shapes; looked for .*-absent\.npy"):
        open_clouds(f"{path}:ShapeNet-34", "train")
    write_lines(listing, [])
    with pytest.raises(DataError, match="no shapes"):
        open_clouds(f"{path}:ShapeNet-34", "train")


def test_clouds_of_different_sizes_or_not_finite_are_refused(tmp_path):
    path = shapenet(tmp_path)
    files = [path / "shapenet_pc" / f"{m}.npy" for m in MODELS]
    np.save(files[1], cloud(65))
    source = open_clouds(f"{path}:ShapeNet-34", "train")
    assert source.sample(0, None)[1].shape == (64, 3)
    with pytest.raises(DataError, match=r"b\.npy: 65 points, but .*2\.npy has 64"):
        source.sample(1, None)
    np.save(files[2], np.full((64, 3), np.nan))
    with pytest.raises(DataError, match=r"c\.d\.npy: none of its 64 points is finite"):
        source.sample(2, None)


def test_identity_is_of_the_data_and_not_of_its_place(tmp_path):
    path = shapenet(tmp_path / "here")
    identity = open_clouds(f"{path}:ShapeNet-34", "train").identity
    assert len(identity) == 12
    shutil.copytree(path, tmp_path / "there")
    there = tmp_path / "there"
    assert open_clouds(f"{there}:ShapeNet-34", "train").identity == identity
    assert open_clouds(f"{there}:ShapeNet-34", "train", mode="hard").identity == identity
    np.save(there / "shapenet_pc" / f"{MODELS[1]}.npy", cloud(70))
    changed = open_clouds(f"{there}:ShapeNet-34", "train").identity
    write_lines(there / "ShapeNet-34" / "train.txt", [f"{MODELS[0]}.npy"])
    assert len({identity, changed, open_clouds(f"{there}:ShapeNet-34", "train").identity}) == 3


def test_decoded_clouds_are_kept_up_to_a_bound_and_not_pickled(tmp_path, monkeypatch):
    path = f"{shapenet(tmp_path)}:ShapeNet-34"
    reads = Counter()
    from jaxaccum.data import cloud_models

    def counted(file, real_read=cloud_models.read_cloud):
        reads[file.name] += 1
        return real_read(file)

    source = open_clouds(path, "train")
    small = open_clouds(path, "train", cache_bytes=64 * 12)
    monkeypatch.setattr(cloud_models, "read_cloud", counted)
    for _ in range(3):
        for i in range(3):
            source.sample(i, np.random.default_rng(i))
    assert set(reads.values()) == {1} and len(reads) == 3
    with pytest.raises(ValueError, match="read-only"):
        source.sample(0, None)[1][0] = 0
    for _ in range(3):
        small.sample(0, np.random.default_rng(0))
    assert reads[f"{MODELS[0]}.npy"] == 2
    small.sample(1, np.random.default_rng(0))
    small.sample(0, np.random.default_rng(0))
    assert reads[f"{MODELS[0]}.npy"] == 3
    copy = pickle.loads(pickle.dumps(source))
    for ours, theirs in zip(source.sample(2, None), copy.sample(2, None), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert reads[f"{MODELS[2]}.npy"] == 2


# --- Projected ShapeNet ---


def projected(root):
    shapenet(root)
    for name in ("34", "55"):
        folder = root / f"Projected_ShapeNet-{name}_noise"
        write_lines(folder / "train.txt", [f"shapenet_pc/{m}.npy" for m in MODELS])
        write_lines(folder / "test.txt", [f"shapenet_pc/{MODELS[1]}.npy"])
    for m, model in enumerate(MODELS):
        synset, _, name = model.partition("-")
        for view in range(16):
            file = root / "projected_partial_noise" / synset / name / "models" / f"{view}.pcd"
            write_pcd(file, cloud(100 + view, 100 * m + view))
    return root


def test_projected_partials_are_of_any_view_in_training_and_the_first_in_evaluation(tmp_path):
    root = projected(tmp_path)
    source = open_clouds(f"{root}:Projected_ShapeNet-34_noise", "train")
    assert (len(source), source.points, source.names) == (3, 64, ("chair", "table"))
    seen = set()
    for seed in range(60):
        partial, complete = source.sample(0, np.random.default_rng(seed))
        filled = partial[np.any(partial != 0, axis=1)]
        view = len(filled) - 100
        assert rows(filled) == rows(cloud(100 + view, view)) and not partial[len(filled) :].any()
        seen.add(view)
    assert seen == set(range(16))
    # The complete cloud keeps its frame.
    np.testing.assert_array_equal(
        complete, np.load(root / "shapenet_pc" / f"{MODELS[0]}.npy")
    )  # fmt: skip
    rng = np.random.default_rng(9)
    view = int(rng.integers(16))
    np.testing.assert_array_equal(
        source.sample(0, np.random.default_rng(9))[0], subsampled(cloud(100 + view, view), rng)
    )
    test = open_clouds(f"{root}:Projected-34", "test")
    assert len(test) == 1
    partial, _ = test.sample(0, None)
    assert rows(partial[:100]) == rows(cloud(100, 100))
    np.testing.assert_array_equal(test.sample(0, None)[0], partial)
    assert open_clouds(f"{root}:Projected-55_noise", "val").identity == test.identity


def test_projected_shapes_without_their_views_are_reported(tmp_path):
    root = projected(tmp_path)
    models = root / "projected_partial_noise" / CHAIR
    shutil.rmtree(models / "u1-two-2")
    (models / "b" / "models" / "0.pcd").unlink()
    train = open_clouds(f"{root}:Projected-34", "train")
    assert len(train) == 2
    gone = str(models / "u1-two-2" / "models")
    assert train.report.skipped == {"listed shape without a partial cloud": [(gone, None)]}
    with pytest.raises(DataError, match="no shapes"):
        open_clouds(f"{root}:Projected-34", "test")


# --- PCN ---


def pcn(root):
    index = []
    for synset, name in ((TABLE, "table"), (CHAIR, "chair")):
        splits = {"train": [f"{name}-1", f"{name}-2"], "val": [f"{name}-3"], "test": []}
        index.append({"taxonomy_id": synset, "taxonomy_name": name, **splits})
        for split, models in splits.items():
            for m, model in enumerate(models):
                write_pcd(root / split / "complete" / synset / f"{model}.pcd", cloud(300, m))
                for view in range(8 if split == "train" else 1):
                    file = root / split / "partial" / synset / model / f"{view:02d}.pcd"
                    write_pcd(file, cloud(2100 + view, 10 + view))
    (root / "PCN.json").write_text(json.dumps(index))
    return root


def test_pcn_partials_are_of_any_view_in_training_and_the_first_in_evaluation(tmp_path):
    root = pcn(tmp_path)
    source = open_clouds(str(root), "train")
    assert (len(source), source.points, source.names) == (4, 300, ("chair", "table"))
    assert [source.category(i) for i in range(4)] == [1, 1, 0, 0]
    assert source.name(1) == f"{TABLE}/table-2"
    views = set()
    for seed in range(40):
        partial, complete = source.sample(1, np.random.default_rng(seed))
        match = [v for v in range(8) if rows(partial) < rows(cloud(2100 + v, 10 + v))]
        assert len(match) == 1 and len(rows(partial)) == 2048
        views.add(match[0])
    assert views == set(range(8))
    np.testing.assert_array_equal(complete, cloud(300, 1))
    val = open_clouds(str(root), "val")
    assert len(val) == 2 and rows(val.sample(1, None)[0]) < rows(cloud(2100, 10))
    with pytest.raises(DataError, match=r"\(test\): no shapes"):
        open_clouds(str(root), "test")
    with pytest.raises(DataError, match="PCN has no unseen categories"):
        open_clouds(str(root), "unseen")


@pytest.mark.parametrize(
    "index",
    ["{", "{}x", "[1]", '[{"taxonomy_id": "1"}]', '{"a": 1}',
     '[{"taxonomy_id": 1, "taxonomy_name": "a", "train": []}]',
     '[{"taxonomy_id": "1", "taxonomy_name": "a", "train": [2]}]'],
)  # fmt: skip
def test_an_index_that_makes_no_sense(tmp_path, index):
    (tmp_path / "PCN.json").write_text(index)
    with pytest.raises(DataError, match=r"PCN\.json(: expected a json list of cat|:1: not valid)"):
        open_clouds(str(tmp_path), "train")


# --- KITTI ---


def kitti(root, names, listed=None):
    for k, name in enumerate(names):
        write_pcd(root / "cars" / f"{name}.pcd", cloud(150, k) * (0.5, 0.2, 0.2) + (10, 2, 0))
        corners = [(x, y, z) for z in (-1, 1) for x, y in ((-2, 1), (-2, -1), (2, -1), (2, 1))]
        box_file = root / "bboxes" / f"{name}.txt"
        box_file.parent.mkdir(exist_ok=True)
        np.savetxt(box_file, np.array(corners) + np.array([10, 2, 0]))
    if listed:
        category = {"taxonomy_id": "k", "taxonomy_name": "Car", "test": listed}
        (root / "KITTI.json").write_text(json.dumps([category]))
    return root


def test_cars_are_brought_into_their_boxes_and_have_no_complete_cloud(tmp_path):
    source = open_clouds(str(kitti(tmp_path, ["frame_1_car_0", "frame_2_car_0"])), "test")
    assert (len(source), source.points, source.names) == (2, 0, ("car",))
    assert source.name(1) == "frame_2_car_0" and source.category(1) == 0
    partial, complete = source.sample(0, None)
    assert partial.shape == (2048, 3) and complete.shape == (0, 3)
    scan = (cloud(150, 0) * (0.5, 0.2, 0.2)).astype(np.float32)[:, [0, 2, 1]] / 4
    order = np.lexsort(scan.T)
    found = partial[:150]
    np.testing.assert_allclose(found[np.lexsort(found.T)], scan[order], atol=1e-5)
    assert not partial[150:].any()
    batch = next(cloud_batches(source, batch=3))
    assert batch["complete"].shape == (3, 0, 3) and batch["weight"].tolist() == [1, 1, 0]
    np.testing.assert_array_equal(batch["partial"][0], partial)


def test_lists_of_cars_and_what_they_lack(tmp_path):
    root = kitti(tmp_path, ["a", "b", "c"], listed=["c", "a", "x"])
    (root / "bboxes" / "a.txt").unlink()
    source = open_clouds(str(root), "val")
    assert [source.name(i) for i in range(len(source))] == ["c"]
    assert source.report.skipped == {
        "listed car without its box": [(str(root / "bboxes" / "a.txt"), None)],
        "listed car without its scan": [(str(root / "cars" / "x.pcd"), None)],
    }
    with pytest.raises(DataError, match="no complete clouds to learn from"):
        open_clouds(str(root), "train")
    for content in ("1 2 3\n", "1 2\n3\n", "nan 0 0\n" * 8, "x\n"):
        (root / "bboxes" / "c.txt").write_text(content)
        with pytest.raises(DataError, match=r"c\.txt: not a box"):
            source.sample(0, None)
    (root / "bboxes" / "c.txt").unlink()
    with pytest.raises(DataError, match="no cars with their boxes"):
        open_clouds(str(root), "val")


# --- opening ---


def test_wrong_arguments_say_what_was_expected(tmp_path):
    with pytest.raises(DataError, match="split is 'dev', expected one of train, val, test, uns"):
        open_clouds("", "dev")
    with pytest.raises(DataError, match="mode is 'all', expected one of easy, median, hard"):
        open_clouds("", "val", mode="all")
    with pytest.raises(DataError, match="viewpoints is 9, expected 1 to 8"):
        open_clouds("", "val", viewpoints=9)
    with pytest.raises(DataError, match="absent: no such folder"):
        open_clouds(str(tmp_path / "absent"), "train")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"Looked for PCN\.json, shapenet_pc, cars.*has a\.txt"):
        open_clouds(str(tmp_path), "train")


# --- the embedded shapes ---


@pytest.mark.parametrize("split", ["train", "unseen"])
def test_embedded_shapes_are_clouds_in_shapenets_frame(split):
    shapes = Shapes(split)
    assert shapes.names == tuple(UNSEEN if split == "unseen" else SEEN)
    assert sum(shapes.report.shapes.values()) == len(shapes)
    for index in range(3 * len(shapes.names)):
        points = shapes.complete(index)
        assert points.shape == (8192, 3) and points.dtype == np.float32
        assert shapes.category(index) == index % len(shapes.names)
        assert shapes.name(index) == f"{shapes.names[shapes.category(index)]}_{split}_{index:05d}"
        np.testing.assert_allclose(points.mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(points, axis=1).max(), 1, rtol=1e-5)
        # Solid things, in which no two points are one.
        assert (np.ptp(points, axis=0) > 0.08).all()
        assert len(rows(points)) > 8150
    with pytest.raises(IndexError):
        shapes.complete(len(shapes))


def test_embedded_shapes_are_functions_of_seed_split_and_index():
    clouds = [
        shapes.complete(index).tobytes()
        for shapes in (Shapes("train"), Shapes("val"), Shapes("test"), Shapes("train", seed=1))
        for index in (0, 10, 20)
    ]
    assert len(set(clouds)) == 12
    assert Shapes("train", length=11).complete(10).tobytes() == clouds[1]
    assert len({Shapes(s).identity for s in ("train", "val", "unseen")}) == 3
    assert Shapes("train", seed=1).identity != Shapes("train").identity
    with pytest.raises(DataError, match="length is 0"):
        Shapes("train", length=0)
    with pytest.raises(DataError, match="split is 'dev'"):
        Shapes("dev")
    assert Shapes("val", length=13).report.shapes["bed"] == 2
    assert not set(SEEN) & set(UNSEEN)


@pytest.mark.parametrize("name", [*SEEN, *UNSEEN])
def test_every_choice_of_a_category_is_made_of_sound_parts(name):
    import random

    sizes = set()
    for seed in range(60):
        parts = (SEEN | UNSEEN)[name](random.Random(seed))
        assert len(parts) > 0
        for part in parts:
            assert part.shape[1:] == (3, 3) and np.isfinite(part).all()
        sizes.add(tuple(np.round(np.ptp(np.concatenate(parts), axis=(0, 1)), 3)))
    assert len(sizes) > 50


def area(part):
    a, b, c = part.transpose(1, 0, 2)
    return np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2


def test_parts_have_the_surface_they_should():
    assert area(box((5, 0, 1), (1, 2, 3))) == pytest.approx(2 * (2 + 3 + 6))
    cylinder = turned([(2, 0), (2, 5)], sides=400)
    assert area(cylinder) == pytest.approx(2 * np.pi * 2 * (2 + 5), rel=1e-3)
    open_one = turned([(2, 0), (2, 5)], sides=400, closed=False)
    assert area(open_one) == pytest.approx(2 * np.pi * 2 * 5, rel=1e-3)
    assert area(tube([(0, 0, 0), (0, 0, 3), (0, 0, 7)], 0.5, 300)) == pytest.approx(
        2 * np.pi * 0.5 * (0.5 + 7), rel=1e-3
    )
    assert area(wheel(1, 1e-6)) == pytest.approx(2 * np.pi, rel=0.03)
    assert np.ptp(wheel(1, 0.2), axis=(0, 1))[0] == pytest.approx(0.2)
    ball = cushion((0, 0, 0), (2, 2, 2), 2)
    assert area(ball) == pytest.approx(4 * np.pi, rel=0.06)
    ends = np.ptp(cushion((1, 1, 1), (1, 2, 3), 8), axis=(0, 1))
    np.testing.assert_allclose(ends, (1, 2, 3), rtol=1e-6)
    ring = np.array([(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0)], float)
    assert area(loft(np.array([ring, ring + np.array([0, 0, 2])]))) == pytest.approx(2 + 8)


def test_points_are_spread_by_area():
    small, large = box((0, 0, 0), (1, 1, 1)), box((10, 0, 0), (3, 3, 3))
    points = surface_points(np.concatenate([small, large]), 10000, np.random.default_rng(0))
    assert points.shape == (10000, 3)
    assert np.count_nonzero(points[:, 0] < 5) == pytest.approx(1000, abs=2)
    one = np.array([[(0, 0, 0), (1, 0, 0), (0, 1, 0)]], float)
    inside = surface_points(one, 20000, np.random.default_rng(1))
    assert (inside >= 0).all() and (inside.sum(axis=1) <= 1 + 1e-6).all()
    np.testing.assert_allclose(inside.mean(axis=0), (1 / 3, 1 / 3, 0), atol=0.01)
    # A quarter of the area lies within half the height of each corner.
    assert np.mean(inside.sum(axis=1) < 0.5) == pytest.approx(0.25, abs=0.02)
    assert np.mean(inside[:, 0] > 0.5) == pytest.approx(0.25, abs=0.02)


def test_embedded_shapes_train_and_evaluate():
    source = open_clouds("", "train")
    run = CloudStream(source, seed=0)
    batch = next(run.windows(0, [3], backend="threads"))
    assert batch["partial"].shape == (3, 2048, 3) and batch["complete"].shape == (3, 8192, 3)
    for partial, complete in zip(batch["partial"], batch["complete"], strict=True):
        assert rows(partial) < rows(complete)
    val = open_clouds("", "val")
    assert len(val) == 200 and open_clouds("", "val", viewpoints=8).report.samples == 1600
    corner = 11 % 8
    partial, complete = val.sample(11, None)
    np.testing.assert_array_equal(partial, fixed_crop(complete, corner, "median"))
    assert (partial @ CORNERS[corner]).mean() < 0
    unseen = open_clouds("", "unseen", mode="hard")
    assert set(unseen.names).isdisjoint(val.names)
    short = CroppedClouds(Shapes("train", length=4), False, "easy", 1, 0)
    assert len(short) == 4 and short.name(3) == "bookshelf_train_00003"


# --- the development data ---


def test_real_shapenet():
    root = real("sweethome3d")
    train = open_clouds(f"{root}:ShapeNet-55", "train")
    assert len(train) == 272 and train.points == 8192
    assert train.report.shapes["chair"] == 38 and train.report.shapes["table"] == 31
    test = open_clouds(f"{root}:ShapeNet-55", "test", viewpoints=1)
    assert len(test) == 68 and test.report.shapes["lamp"] == 5
    assert len(open_clouds(f"{root}/ShapeNet-34", "train")) == 204
    assert len(open_clouds(f"{root}:ShapeNet-34", "unseen")) == 82 * 8
    partial, complete = train.sample(0, np.random.default_rng(0))
    assert rows(partial) <= rows(complete)
    np.testing.assert_allclose(np.linalg.norm(complete, axis=1).max(), 1, rtol=1e-5)


def nearest_distances(points, cloud):
    return np.sqrt(((points[:, None] - cloud[None]) ** 2).sum(axis=-1).min(axis=1))


def test_real_projected_partials_lie_on_their_shapes():
    source = open_clouds(f"{real('sweethome3d')}:Projected-55", "train")
    assert len(source) == 6
    for index in range(2):
        partial, complete = source.sample(index, np.random.default_rng(index))
        away = nearest_distances(partial[:200], complete)
        assert np.quantile(away, 0.95) < 0.05


def test_real_pcn_partials_lie_on_their_shapes():
    root = real("sweethome3d_pcn")
    train = open_clouds(str(root), "train")
    assert (len(train), train.points, len(train.names)) == (12, 16384, 6)
    assert len(open_clouds(str(root), "val")) == len(open_clouds(str(root), "test")) == 6
    partial, complete = train.sample(4, np.random.default_rng(1))
    filled = partial[np.any(partial != 0, axis=1)]
    away = nearest_distances(filled[:200], complete)
    assert np.quantile(away, 0.95) < 0.03


def test_real_cars_lie_in_their_boxes():
    source = open_clouds(str(real("kitti_cars")), "test")
    assert len(source) == 18
    for index in range(18):
        partial, _ = source.sample(index, None)
        filled = partial[np.any(partial != 0, axis=1)]
        assert (np.abs(filled[:, 0]) <= 0.51).all()
        # In metres a car is less than 1.9 high (y) and wide.
        assert (np.abs(filled[:, 1:]) * source.pose(index).scale < 0.95).all()
        assert np.ptp(filled[:, 0]) > 0.2
