"""A packed set is its source: the same samples, labels, names and fingerprint, read at random."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tiny
import tiny_completion
import yaml
from test_clouds_sources import cloud, shapenet, write_pcd

from jaxaccum import data, pack, tasks, train
from jaxaccum.data import DataError
from jaxaccum.data.captions import Captions
from jaxaccum.data.check import changed_files
from jaxaccum.data.formats import packed
from jaxaccum.data.synthetic import scenes, shapes, streets
from jaxaccum.tasks import packing
from jaxaccum.training import run

REPOSITORY = Path(__file__).parents[2]
KINDS = ("scenes", "yolo", "streets", "kitti", "shapes", "shapenet", "pcn")
MAKE = {"detection": tiny.tiny_config, "detection3d": tiny.tiny_config3d,
        "completion": tiny_completion.tiny_config}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def small():
    """Embedded sets of a few samples."""
    with pytest.MonkeyPatch.context() as patch:
        for lengths in (scenes.LENGTHS, streets.COUNTS, shapes.LENGTHS):
            for split, count in zip(lengths, (5, 3, 2, 4), strict=False):
                patch.setitem(lengths, split, count)
        yield


def yolo(root):
    """JPEG files, of which one lies on its side and one is grey; a PNG; a background; a text that
    is no image; labels that are left out."""
    labels = {
        "a.jpg": "0 0.5 0.5 0.2 0.3\n1 0.1 0.4 0.123456789 0.3\n0 0.5 0.5 0.2 0.3\n",
        "side.jpg": "1 0.3 0.3 0.2 0.1\n", "grey.jpg": "0 0.6 0.6 0.3333333 0.2\n",
        "b.png": "0 0.5 0.5 0.4 0.4\n", "nothing.jpg": None,
    }  # fmt: skip
    for split in ("train", "val"):
        images, texts = root / "images" / split, root / "labels" / split
        images.mkdir(parents=True)
        texts.mkdir(parents=True)
        for i, (name, text) in enumerate(labels.items()):
            pixels = np.random.default_rng(i).integers(0, 255, (40 + i, 56, 3), np.uint8)
            image = PIL.Image.fromarray(pixels[..., 0] if name == "grey.jpg" else pixels)
            exif = image.getexif()
            exif[0x0112] = 6 if name == "side.jpg" else 1
            image.save(images / name, exif=exif)
            if text is not None:
                (texts / name).with_suffix(".txt").write_text(text)
        (images / "notes.md").write_text("no image")
    content = {"train": "images/train", "val": "images/val", "names": ["cat", "dog"]}
    (root / "data.yaml").write_text(yaml.safe_dump(content))
    return str(root / "data.yaml")


def pcn(root):
    """Two categories; two partial clouds of each shape of training, one of the others."""
    listed = {"train": ["a", "b"], "val": ["c"], "test": ["d"]}
    categories = [
        {"taxonomy_id": c, "taxonomy_name": n, **listed}
        for c, n in (("02958343", "car"), ("03001627", "chair"))
    ]
    root.mkdir()
    (root / "PCN.json").write_text(json.dumps(categories))
    for split, names in listed.items():
        for i, name in enumerate(f"{c['taxonomy_id']}/{n}" for c in categories for n in names):
            write_pcd(root / split / "complete" / f"{name}.pcd", cloud(64, i))
            for view in range(2 if split == "train" else 1):
                partial = root / split / "partial" / name / f"{view:02d}.pcd"
                write_pcd(partial, cloud(30 + view, 10 * i + view))
    return str(root)


def config_of(kind, root):
    if kind in ("scenes", "yolo"):
        return tiny.tiny_config(**{"data.path": yolo(root) if kind == "yolo" else ""})
    if kind in ("streets", "kitti"):
        path = str(streets.write(root, train=4, val=3, size=(64, 96))) if kind == "kitti" else ""
        return tiny.tiny_config3d(**{"data.path": path})
    path = {"shapes": str, "shapenet": lambda: f"{shapenet(root)}:ShapeNet-34",
            "pcn": lambda: pcn(root)}[kind]()  # fmt: skip
    return tiny_completion.tiny_config(**{"data.path": path})


@pytest.fixture(scope="module")
def sets(tmp_path_factory, small):
    """kind -> (config of the source, of the packed set, the folder); each packed once."""
    made = {}

    def get(kind):
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            config = config_of(kind, root / "source")
            pack.pack(config, root / "packed", shards=2)
            there = config.copy_and_resolve_references()
            there.data.path = f"packed:{root / 'packed'}"
            made[kind] = config, there, root / "packed"
        return made[kind]

    return get


def both(sets, kind, split):
    config, there, _ = sets(kind)
    return run.open_source(config, split), run.open_source(there, split)


def assert_same(one, other):
    """Equal to the bit: also of floats, whose -0.0 and 0.0 are equal to numpy."""
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype and one[key].shape == other[key].shape, key
        assert one[key].tobytes() == other[key].tobytes(), key


def stream_of(config, source):
    this = run.prepare(
        config, names=source.names, samples=len(source),
        identity={"identity": source.identity, "samples": len(source)},
    )  # fmt: skip
    return this.recipe.fingerprint, run.make_stream(this, source)


def windows(stream, workers=0):
    return list(stream.windows(3, [4, 5], workers=workers))


def changed(config, **fields):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(fields)
    return config


def evaluated(config, source):
    if config.task == "detection":
        return list(data.eval_batches(source, image_size=64, batch=2))
    if config.task == "detection3d":
        return list(data.eval_batches3d(source, size=(64, 96), batch=2))
    return list(data.cloud_batches(source, batch=2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_sees_the_same(sets, kind):
    config, there, _ = sets(kind)
    one, other = both(sets, kind, "train")
    assert len(one) == len(other) and one.names == other.names and one.identity == other.identity
    assert [one.name(i) for i in range(len(one))] == [other.name(i) for i in range(len(other))]
    (fingerprint, here), (again, packed) = stream_of(config, one), stream_of(there, other)
    assert fingerprint == again
    for a, b in zip(windows(here), windows(packed), strict=True):
        assert_same(a, b)
    one, other = both(sets, kind, "val")
    assert one.identity == other.identity
    for a, b in zip(evaluated(config, one), evaluated(there, other), strict=True):
        assert_same(a, b)


@pytest.mark.slow
def test_a_run_moves_to_the_packed_set(sets, tmp_path, capsys):
    """Started on the folder, continued on the packed set: as if it had stayed where it was."""
    config, there, _ = sets("yolo")
    short = {"steps": 2, "checkpoint.every": 1, "eval.every": 2}
    train.train(changed(config, **short), tmp_path / "run")
    expected = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(tmp_path / "run" / "last" / "2")
    capsys.readouterr()
    train.train(changed(there, **short), tmp_path / "run")
    said = capsys.readouterr().out
    assert "note: train set: lies in" in said and "files were changed" not in said
    found = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in found] == [json.loads(line) for line in expected]


@pytest.mark.parametrize("kind", ["yolo", "kitti", "pcn"])
def test_records_that_change_are_said(sets, kind):
    _, there, _ = sets(kind)
    source = run.open_source(there, "train")
    assert changed_files(source) == []
    record = next(file for file in source.stamps if "array_record" in file)
    known = os.stat(record)
    os.utime(record, ns=(1, 1))
    assert changed_files(source) == [record]
    os.utime(record, ns=(known.st_atime_ns, known.st_mtime_ns))


@pytest.mark.slow
def test_worker_processes_see_the_same(sets, tmp_path):
    """In a process of its own: workers import __main__, which must not be pytest's."""
    for kind in ("yolo", "kitti", "pcn"):
        config, there, _ = sets(kind)
        expected = windows(stream_of(config, run.open_source(config, "train"))[1])
        with open(tmp_path / f"{kind}.pickle", "wb") as file:
            pickle.dump((there.task, there.data.path, expected), file)
    program = f"""
import pickle, sys
sys.path[:0] = [{str(REPOSITORY / "tests")!r}, {str(REPOSITORY / "tests/data")!r}]
if __name__ == "__main__":
    import test_packed as t
    for kind in ("yolo", "kitti", "pcn"):
        with open({str(tmp_path)!r} + f"/{{kind}}.pickle", "rb") as file:
            task, path, expected = pickle.load(file)
        config = t.MAKE[task](**{{"data.path": path}})
        _, stream = t.stream_of(config, t.run.open_source(config, "train"))
        for a, b in zip(expected, t.windows(stream, workers=2), strict=True):
            t.assert_same(a, b)
    print("same")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False,
        cwd=REPOSITORY,
    )  # fmt: skip
    assert done.stdout.strip().endswith("same"), done.stderr


def test_labels_and_reports_are_kept(sets):
    one, other = both(sets, "yolo", "train")
    for i in range(len(one)):
        assert_same(vars(one.objects(i)), vars(other.objects(i)))
        np.testing.assert_array_equal(one.image(i), other.image(i))
    here, there = one.report, other.report
    assert there.where == f"{sets('yolo')[1].data.path} (train), packed from {here.where}"
    assert there.lines()[0].endswith(": 5 images, 5 objects, 1 images without objects")
    assert there.lines()[1:] == here.lines()[1:] and len(here.skipped) == 2
    assert there.skipped == here.skipped

    for kind in ("streets", "kitti"):
        one, other = both(sets, kind, "train")
        assert one.pixels == other.pixels and one.report.regions == other.report.regions
        for i in range(len(one)):
            assert_same(vars(one.objects(i)), vars(other.objects(i)))
            assert one.camera(i).tobytes() == other.camera(i).tobytes()
            a, b = dict(vars(one.labels(i))), dict(vars(other.labels(i)))
            assert a.pop("kinds") == b.pop("kinds") and a.pop("scores") is b.pop("scores") is None
            assert_same(a, b)


def test_files_keep_their_bytes_and_others_lose_nothing(sets):
    config, _, _ = sets("yolo")
    source, packed = both(sets, "yolo", "val")
    folder = Path(config.data.path).parent / "images" / "val"
    for i in range(len(source)):
        assert packed._records[i]["image"] == (folder / source.name(i)).read_bytes()
    scene, packed = both(sets, "scenes", "val")
    assert packed._records[0]["image"].startswith(b"\x89PNG")
    np.testing.assert_array_equal(scene.image(0), packed.image(0))
    for one, other in ((source, both(sets, "yolo", "val")[1]), (scene, packed)):
        sizes = [one.image(i).shape[:2] for i in range(len(one))]
        assert [one.size(i) for i in range(len(one))] == sizes
        assert [other.size(i) for i in range(len(one))] == sizes


def test_it_is_a_data_set_of_tfds(sets):
    import tensorflow_datasets as tfds

    source = run.open_source(sets("yolo")[0], "train")
    builder = tfds.builder_from_directory(sets("yolo")[2])
    assert builder.info.splits["train"].num_shards == 2
    assert builder.info.features["objects"]["classes"].names == ["cat", "dog"]
    records = builder.as_data_source("train")
    assert len(records) == len(source)
    for i, record in enumerate(records):
        assert record["name"].decode() == source.name(i)
        boxes = np.asarray(record["objects"]["boxes"], np.float32)  # TFDS has [] for none
        assert boxes.tobytes() == source.objects(i).boxes.tobytes()
        assert list(record["objects"]["classes"]) == source.objects(i).classes.tolist()
        assert record["image"].dtype == np.uint8
    solid = tfds.builder_from_directory(sets("kitti")[2]).as_data_source("val")
    source = run.open_source(sets("kitti")[0], "val")
    for i, record in enumerate(solid):
        assert record["camera"].tobytes() == source.camera(i).tobytes()
        yaw = np.asarray(record["objects"]["yaw"], np.float32)
        assert yaw.tobytes() == source.objects(i).yaw.tobytes()
    assert sum(len(source.objects(i)) for i in range(len(source)))
    clouds = tfds.builder_from_directory(sets("pcn")[2])
    assert {s: i.num_examples for s, i in clouds.info.splits.items()} == {
        "train": 4, "train_partials": 8, "val": 2, "val_partials": 2, "test": 2, "test_partials": 2,
    }  # fmt: skip
    record = clouds.as_data_source("train_partials")[1]
    assert record["name"] == b"02958343/a/1" and record["category"] == b"car"
    assert record["cloud"].shape == (31, 3) and record["cloud"].dtype == np.float32


def test_clouds_are_evaluated_and_described_as_their_source(sets):
    config, there, _ = sets("shapes")
    for split in ("test", "unseen"):
        for mode in ("easy", "hard"):
            one, other = (data.open_clouds(c.data.path, split, mode=mode) for c in (config, there))
            assert one.identity == other.identity and len(one) == len(other)
            for a, b in zip(one.sample(1, None), other.sample(1, None), strict=True):
                assert a.tobytes() == b.tobytes()
    assert Captions.of(one).texts == Captions.of(other).texts
    assert data.has_unseen(there.data.path) and not data.has_unseen(sets("pcn")[1].data.path)
    config, there, _ = sets("shapenet")
    one, other = (data.open_clouds(c.data.path, "test") for c in (config, there))
    assert len(one) == len(other) == 16 and one.identity == other.identity
    task = tasks.of(there).create(there, other.names, np.float32)
    assert sorted(task.full_evaluator(there)[0].sources) == [
        "easy/", "hard/", "median/", "unseen/easy/", "unseen/hard/", "unseen/median/"
    ]  # fmt: skip
    captioned = changed(there, **{"text.encoder": "hashed-16"})
    assert run.open_source(captioned, "train").texts.width == 16


def test_val_is_what_was_packed_as_such(sets):
    _, there, _ = sets("kitti")
    overfit = changed(there, **{"data.val_split": "train"})
    assert len(run.open_source(overfit, "val")) == 4
    with pytest.raises(DataError, match=r"the list train \(0.5 of it by seed 0\) was not packed"):
        run.open_source(changed(overfit, **{"data.val_fraction": 0.5}), "val")
    with pytest.raises(DataError, match="packed with compat=False, but the config has compat=True"):
        run.open_source(changed(there, compat=True), "train")


@pytest.mark.slow
def test_the_command(sets, tmp_path):
    config, _, _ = sets("yolo")
    command = [
        sys.executable, "-m", "jaxaccum.pack", "--config=configs/quickstart.py",
        f"--config.data.path={config.data.path}", f"--out={tmp_path / 'out'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "skipped 1 x duplicate label" in done.stdout
    assert lines[-1].endswith(
        f"2 shards of train, val; use --config.data.path=packed:{tmp_path / 'out'}"
    )
    assert len(data.open_source(f"packed:{tmp_path / 'out'}", "train")) == 5
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 1 and "there is something already" in done.stderr
    assert "Traceback" not in done.stderr


# --- mistakes and accidents ---


def test_an_interrupted_pack_leaves_nothing_that_opens(sets, tmp_path, monkeypatch):
    out = tmp_path / "out"
    config, _, _ = sets("yolo")

    def stop(source, index):
        if source.name(index) == "side.jpg":
            raise KeyboardInterrupt
        return encoded(source, index)

    encoded = packing.encoded
    monkeypatch.setattr(packing, "encoded", stop)
    with pytest.raises(KeyboardInterrupt):
        pack.pack(config, out)
    assert not list(tmp_path.iterdir())


def test_a_killed_pack_leaves_nothing_that_opens(sets, tmp_path):
    out = tmp_path / "out"
    config, _, _ = sets("yolo")
    program = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(REPOSITORY / "tests")!r})
import numpy as np, tiny
from jaxaccum import pack
savez = np.savez
def stop(file, **arrays):
    if file.name == "val.npz":  # all records are there
        os.kill(os.getpid(), signal.SIGKILL)
    savez(file, **arrays)
np.savez = stop
pack.pack(tiny.tiny_config(**{{"data.path": {config.data.path!r}}}), Path({str(out)!r}))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False)
    assert done.returncode == -signal.SIGKILL and not out.exists()
    left = tmp_path / "out.incomplete"
    inner = next(left.rglob("train.npz")).parents[1]
    for folder in (out, left, inner):
        with pytest.raises(DataError, match="no packed set; looked for"):
            data.open_source(f"packed:{folder}", "train")
    with pytest.raises(DataError, match=r"one was interrupted\. If none runs, remove it"):
        pack.pack(config, out)
    shutil.rmtree(left)
    out.mkdir()  # an empty folder is fine
    pack.pack(config, out)
    assert len(data.open_source(f"packed:{out}", "val")) == 5


def test_a_damaged_image_is_found_when_packing(tmp_path):
    path = yolo(tmp_path / "source")
    file = tmp_path / "source/images/val/b.png"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"b\.png: the image's header is readable but its pixels"):
        pack.pack(tiny.tiny_config(**{"data.path": path}), tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["source"]


def test_foreign_and_broken_sets_are_refused(sets, tmp_path):
    _, there, folder = sets("yolo")
    with pytest.raises(DataError, match="no packed set; looked for"):
        data.open_source(f"packed:{tmp_path}", "train")
    with pytest.raises(DataError, match=r"packed for the task detection, .* task is completion"):
        data.open_clouds(there.data.path, "train")
    with pytest.raises(DataError, match=r"packed for the task completion, .* is detection3d"):
        data.open_source3d(sets("shapes")[1].data.path, "train")
    with pytest.raises(DataError, match="no split 'unseen' was packed; there are train, val, test"):
        data.open_clouds(sets("pcn")[1].data.path, "unseen")
    with pytest.raises(DataError, match="belongs to a COCO train json"):
        data.open_source(there.data.path, "val", val_path="val.json")
    with pytest.raises(DataError, match=r"has the classes \['cat', 'dog'\], expected \['cow'\]"):
        data.open_source(there.data.path, "val", names=["cow"])
    with pytest.raises(DataError, match="is packed already"):
        pack.pack(there, tmp_path / "again")
    with pytest.raises(DataError, match="there is something already"):
        pack.pack(sets("yolo")[0], folder)


def broken(sets, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(sets("yolo")[2], copy)
    change(copy)
    source = data.open_source(f"packed:{copy}", "train")
    return [source.image(i) for i in range(len(source))]


def flipped(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 0xFF
    file.write_bytes(content)


SHARD = "packed_detection-train.array_record-00001-of-00002"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: (c / SHARD).unlink(), "00001-of-00002 is missing, .* bytes were written"),
        (lambda c: (c / SHARD).write_bytes(b"half"), "00001-of-00002 has 4 bytes"),
        (lambda c: (c / "features.json").unlink(), r"features.json is missing"),
        (lambda c: flipped(c / SHARD, (c / SHARD).stat().st_size // 2), "record . cannot be read"),
        (lambda c: flipped(c / "jaxaccum/train.npz", 200), "train.npz cannot be read"),
        (lambda c: (c / "jaxaccum/set.json").write_text("{"), "set.json is not what was written"),
        (lambda c: (c / "jaxaccum/set.json").write_text('{"format": 9}'), "of format 9, this pro"),
        (lambda c: (c / "jaxaccum/set.json").write_text("[" * 99_999), "set.json is not what was"),
        (lambda c: (c / "jaxaccum/set.json").write_text("9" * 5000), "set.json is not what was w"),
    ],
)  # fmt: skip
def test_a_copy_with_an_error_is_refused(sets, tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        broken(sets, tmp_path, change)


def test_missing_packages_are_named(sets, tmp_path, monkeypatch):
    config, there, _ = sets("yolo")
    found = packed.find_spec
    monkeypatch.setattr(packed, "find_spec", lambda n: None if n == "array_record" else found(n))
    with pytest.raises(DataError, match="pip install array-record"):
        run.open_source(there, "train")
    with pytest.raises(DataError, match="pip install array-record"):
        pack.pack(config, tmp_path / "out")


def test_opening_reads_no_record(sets, monkeypatch):
    def refuse(self, index):
        raise AssertionError("a record was read")

    monkeypatch.setattr(packed.Records, "__getitem__", refuse)
    for kind in ("yolo", "kitti", "pcn"):
        source = run.open_source(sets(kind)[1], "train")
        assert source.names and source.report.lines()


def test_shards_hold_the_samples_in_order():
    assert pack._parts(5, 2) == [range(0, 2), range(2, 5)]
    assert pack._parts(2, 8) == [range(0, 1), range(1, 2)]
