"""A sample that cannot be read in the midst of a run weighs 0, whatever fetches it; no other sample
changes, and the run says so."""

import importlib.util
import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from jaxaccum import data, tasks, train
from jaxaccum.data import (
    Augment,
    Augment3D,
    CloudStream,
    DataError,
    Objects,
    Report,
    Shapes,
    TrainStream,
    TrainStream3D,
    cloud_batches,
    eval_batches,
    eval_batches3d,
)
from jaxaccum.data.cloud_sources import CroppedClouds
from jaxaccum.data.synthetic.streets import StreetsSource
from jaxaccum.models import boxes3d
from jaxaccum.tasks.detection3d import Evaluator

BACKENDS = [
    "threads",
    pytest.param(
        "grain",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("grain") is None, reason="grain is not installed"
        ),
    ),
]


class Source:
    """Random images in memory, of which some cannot be read."""

    names = ("a", "b")
    identity = "0" * 12

    def __init__(self, length=11, gone=()):
        self.length, self.gone, self.report = length, set(gone), Report("memory")

    def __len__(self):
        return self.length

    def image(self, index):
        if index in self.gone:
            raise DataError(f"{index}.png: gone", file=f"{index}.png")
        return np.random.default_rng(index).integers(0, 255, (40 + index, 50, 3), np.uint8)

    def objects(self, index):
        corner = np.random.default_rng(index + 99).uniform(0, 15, (2, 2))
        return Objects(np.hstack([corner, corner + 20]).astype(np.float32), np.zeros(2, np.int32))

    def name(self, index):
        return f"{index}.png"


def stream(gone=(), mosaic=0.0, on_error="skip", **more):
    options = {"image_size": 32, "max_objects": 9, "seed": 5, "on_error": on_error, **more}
    return TrainStream(Source(gone=gone), augment=Augment(mosaic=mosaic), **options)


def joined(batches):
    batches = list(batches)
    return {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [[8, 8, 6], [22], [2] * 11])
def test_a_lost_sample_weighs_0_and_no_other_changes(backend, sizes):
    whole = joined(stream().windows(3, sizes, backend=backend))
    run = stream(gone=[4])
    rows = joined(run.windows(3, sizes, backend=backend))
    lost = rows["index"] == 4
    assert lost.sum() == 2 == run.lost
    np.testing.assert_array_equal(rows["weight"], np.where(lost, 0, 1))
    for key in ("index", "epoch"):
        np.testing.assert_array_equal(rows[key], whole[key])
    for key in rows:
        if key != "weight":
            np.testing.assert_array_equal(rows[key][~lost], whole[key][~lost], err_msg=key)


def test_a_lost_sample_is_padded_as_windows_are_by_a_sample_that_is_there():
    """A blank image, normalised by the statistics of others, can overflow in a deep network."""
    for batch in stream(gone=[4]).windows(0, [4] * 6):
        (lost,) = np.nonzero(batch["weight"] == 0)
        for row in lost:
            others = [i for i in range(4) if batch["weight"][i]]
            assert any((batch["image"][row] == batch["image"][i]).all() for i in others)
            assert batch["index"][row] == 4


def test_a_mosaic_with_a_lost_image_is_lost_as_a_whole():
    whole, run = stream(mosaic=1.0), stream(gone=[4], mosaic=1.0)
    rows, expected = joined(run.windows(0, [10] * 4)), joined(whole.windows(0, [10] * 4))
    lost = rows["weight"] == 0
    assert lost[rows["index"] == 4].all() and 4 < lost.sum() < 40
    np.testing.assert_array_equal(rows["image"][~lost], expected["image"][~lost])
    np.testing.assert_array_equal(rows["boxes"][~lost], expected["boxes"][~lost])


def test_where_it_is_fetched_does_not_matter():
    run = stream(gone=[4, 6])
    rows = joined(run.windows(0, [11, 11]))
    for position in range(22):
        assert run.sample(position)["weight"] == rows["weight"][position]
    shares = [
        joined(stream(gone=[4, 6]).windows(0, [11, 11], share=np.arange(part, 11, 2)))
        for part in (0, 1)
    ]
    for key in ("weight", "index"):
        laid = np.empty(22)
        for part, share in enumerate(shares):
            laid[[w * 11 + i for w in (0, 1) for i in range(part, 11, 2)]] = share[key]
        np.testing.assert_array_equal(laid, rows[key])
    again = joined(pickle.loads(pickle.dumps(run)).windows(5, [6, 11]))
    np.testing.assert_array_equal(again["weight"], rows["weight"][5:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_said_by_name_and_then_counted(backend):
    run = stream(gone=[2])
    list(run.windows(0, [11] * 9, backend=backend))
    news = run.news()
    assert run.lost == 9 and run.news() == []
    assert [line.partition(" so far")[0].rpartition(" ")[2] for line in news] == list("12348")
    assert news[0] == "sample left out (weight 0), 1 so far: 2.png: gone"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_disk_that_is_gone_ends_the_run(backend):
    run = stream(gone=range(11))
    with pytest.raises(DataError, match=r"16 samples in a row .* Is the disk there\?.*png: gone"):
        list(run.windows(0, [4] * 20, backend=backend))
    run = stream(gone=range(11))
    with pytest.raises(DataError, match="20 samples in a row could not be read"):
        list(run.windows(0, [20] * 20, backend=backend))
    half = stream(gone=range(7))  # of 11
    assert sum(b["weight"].sum() for b in half.windows(0, [11] * 9, backend=backend)) == 4 * 9


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_policy_raise_ends_with_the_first(backend):
    run = stream(gone=[4], on_error="raise")
    with pytest.raises(DataError, match=r"4\.png: gone"):
        list(run.windows(0, [11], backend=backend))
    with pytest.raises(ValueError, match="on_error is 'ignore', expected 'raise' or 'skip'"):
        stream(on_error="ignore")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("grain") is None, reason="grain is not installed")
def test_worker_processes_lose_the_same(tmp_path):
    """In a process of its own: workers import __main__, which must not be pytest's."""
    for i in range(5):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((20, 20, 3), 50 * i, np.uint8))
    (tmp_path / "images.txt").write_text("".join(f"{i}.png\n" for i in range(5)))
    (tmp_path / "data.yaml").write_text("train: images.txt\nval: images.txt\nnames: [a]\n")
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    program = f"""
import os
import numpy as np
from jaxaccum.data import Augment, TrainStream, open_source

def rows(workers):
    source = open_source({str(tmp_path / "data.yaml")!r}, "train")
    run = TrainStream(source, image_size=32, max_objects=3, augment=Augment(mosaic=0.0), seed=1,
                      on_error="skip")
    if os.path.exists({str(tmp_path / "3.png")!r}):
        os.rename({str(tmp_path / "3.png")!r}, {str(tmp_path / "gone")!r})
    batches = list(run.windows(3, [4, 5], workers=workers))
    os.rename({str(tmp_path / "gone")!r}, {str(tmp_path / "3.png")!r})
    assert "3.png: the image was there" in run.news()[0], run.news()
    return run.lost, {{k: np.concatenate([b[k] for b in batches]) for k in batches[0]}}

if __name__ == "__main__":
    (lost, here), (also_lost, there) = rows(0), rows(2)
    assert lost == also_lost > 0
    assert all(np.array_equal(here[k], there[k]) for k in here)
    print("same")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip().endswith("same"), done.stderr


class Streets(StreetsSource):
    gone = ()

    def image(self, index):
        if index in self.gone:
            raise DataError(f"{index}: gone")
        return super().image(index)


def test_streams_with_boxes_in_space_do_the_same():
    whole, lossy = (Streets("train", count=5, size=(64, 96)) for _ in range(2))
    lossy.gone = (1,)
    options = {"size": (32, 64), "max_objects": 3, "augment": Augment3D(), "seed": 1}
    expected = joined(TrainStream3D(whole, **options).windows(0, [10]))
    rows = joined(TrainStream3D(lossy, on_error="skip", **options).windows(0, [10]))
    np.testing.assert_array_equal(rows["weight"], np.where(rows["index"] == 1, 0, 1))
    for key in rows.keys() - {"weight"}:
        kept = rows["weight"] > 0
        np.testing.assert_array_equal(rows[key][kept], expected[key][kept])


class Clouds(CroppedClouds):
    gone = ()

    def sample(self, index, rng):
        if index in self.gone:
            raise DataError(f"{index}: gone")
        return super().sample(index, rng)


def test_clouds_do_the_same():
    whole, lossy = (Clouds(Shapes("train", length=5), False, "median", 1, 2**28) for _ in range(2))
    lossy.gone = (1,)
    expected = joined(CloudStream(whole, seed=1, mirror=True).windows(0, [10]))
    rows = joined(CloudStream(lossy, seed=1, mirror=True, on_error="skip").windows(0, [10]))
    np.testing.assert_array_equal(rows["weight"], np.where(rows["index"] == 1, 0, 1))
    for key in rows.keys() - {"weight"}:
        kept = rows["weight"] > 0
        np.testing.assert_array_equal(rows[key][kept], expected[key][kept])
    with pytest.raises(DataError, match="1: gone"):
        list(CloudStream(lossy, seed=1).windows(0, [10]))
    lost = []
    rows = joined(cloud_batches(lossy, batch=3, lost=lost))
    assert rows["index"].tolist() == [0, -1, 2, 3, 4, -1] and lost == ["1: gone"]
    with pytest.raises(DataError, match="1: gone"):
        list(cloud_batches(lossy, batch=3))


# --- evaluation ---


def test_an_evaluation_leaves_out_what_cannot_be_read_and_hands_over_why():
    whole = joined(eval_batches(Source(), image_size=32, batch=4))
    lost = []
    rows = joined(eval_batches(Source(gone=[0, 5]), image_size=32, batch=4, lost=lost))
    assert lost == ["0.png: gone", "5.png: gone"]
    assert rows["index"].tolist() == [-1, 1, 2, 3, 4, -1, 6, 7, 8, 9, 10, -1]
    np.testing.assert_array_equal(rows["weight"], rows["index"] >= 0)
    for key in rows.keys() - {"weight", "index"}:
        kept = rows["weight"] > 0
        np.testing.assert_array_equal(rows[key][kept], whole[key][kept])
    with pytest.raises(DataError, match=r"0\.png: gone"):
        list(eval_batches(Source(gone=[0, 5]), image_size=32, batch=4))
    with pytest.raises(DataError, match=r"none of 11 samples could be read.*10\.png: gone"):
        list(eval_batches(Source(gone=range(11)), image_size=32, batch=4, lost=[]))
    streets = Streets("val", count=3, size=(64, 96))
    streets.gone = (1,)
    rows = joined(eval_batches3d(streets, size=(32, 64), batch=2, lost=lost))
    assert rows["index"].tolist() == [0, -1, 2, -1] and lost[2:] == ["1: gone"]


# --- whole runs ---


def folder(root, count=8):
    """Scenes as a YOLO data set."""
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        scenes = data.Scenes(split)
        for i in range(count):
            image, objects = scenes.image(i), scenes.objects(i)
            cv2.imwrite(str(root / "images" / split / f"{i}.png"), image[..., ::-1])
            height, width = image.shape[:2]
            rows = (objects.boxes.reshape(-1, 2, 2) / [width, height]).astype(float)
            (root / "labels" / split / f"{i}.txt").write_text(
                "".join(
                    f"{c} {(a[0] + b[0]) / 2} {(a[1] + b[1]) / 2} {b[0] - a[0]} {b[1] - a[1]}\n"
                    for c, (a, b) in zip(objects.classes, rows, strict=True)
                )
            )
    names = list(data.Scenes("train").names)
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {names}\n")
    return str(root / "data.yaml")


def breaking(monkeypatch, *names):
    """From the first window on, files of these names cannot be read."""
    task = tasks.of(tiny_config())
    original = task.stream

    def stream(self, config, source, *rest, **more):
        for split in ("train", "val"):
            for name in names:
                file = source.file(0).rpartition("/images/")[0] + f"/images/{split}/{name}"
                with open(file, "wb") as opened:
                    opened.write(b"no longer an image")
        return original(self, config, source, *rest, **more)

    monkeypatch.setattr(task, "stream", stream)


def run_of(workdir, path, **changes):
    config = tiny_config(
        **{
            "data.path": path, "steps": 3, "eval.every": 3, "augment.mosaic": 0.0,
            "checkpoint.every": 3, "log.images": 0, **changes,
        }
    )  # fmt: skip
    train.train(config, workdir)
    return [line for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_training_goes_on_without_it_on_any_geometry(tmp_path, monkeypatch, capsys):
    path = folder(tmp_path / "set")
    contents = {f: f.read_bytes() for f in (tmp_path / "set" / "images").rglob("*.png")}
    breaking(monkeypatch, "2.png", "5.png")
    found = []
    for number, geometry in enumerate(({"microbatch": 4}, {"microbatch": 2, "devices": 2})):
        for file, content in contents.items():
            file.write_bytes(content)
        changes = {"data.on_error": "skip", "nbs": 8, **geometry}
        lines = run_of(tmp_path / f"w{number}", path, **changes)
        said = capsys.readouterr()
        assert "sample left out (weight 0), 1 so far" in said.out + said.err
        assert "2 of 8 images left out" in said.err and "val/2.png: image unreadable" in said.err
        found.append([json.loads(line) for line in lines])
    for one, other in zip(*found, strict=True):
        for key in one.keys() - {"fingerprint"}:
            if isinstance(one[key], float):
                assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key
            else:
                assert one[key] == other[key], key
    trained = [record for record in found[0] if record["kind"] == "train"]
    assert [record["samples"] for record in trained] == [6, 6, 6]


def test_the_policy_raise_ends_training_with_the_name_of_the_file(tmp_path, monkeypatch):
    path = folder(tmp_path / "set")
    breaking(monkeypatch, "2.png")
    with pytest.raises(DataError, match=r"2\.png: image unreadable"):
        run_of(tmp_path / "w", path, nbs=8)


def test_a_3d_evaluation_compares_what_is_left_with_its_own_truth(capsys):
    source = Streets("val", count=4, size=(96, 320))
    names = source.names

    def predict(params, stats, images, cameras):
        count = len(images)
        boxes, scores = jnp.zeros((count, 3, 4)), jnp.zeros((count, 3, len(names)))
        own = boxes3d.Boxes3D(*(jnp.zeros((count, 3, *n)) for n in ((3,), (3,), ())))
        return boxes, scores, own

    task = SimpleNamespace(
        monitor=("ap40_3d/mean/moderate", True), size=(96, 320), names=names, predict=predict
    )
    evaluator = Evaluator(task, source, SimpleNamespace(batch=3, conf=0.1, iou=0.5, max_det=9),
                          "skip")  # fmt: skip
    truths = lambda: evaluator({}, {})[0]["truths/all"]  # noqa: E731
    whole, each = truths(), []
    for gone in range(4):
        source.gone = (gone,)
        each.append(whole - truths())
        assert f"1 of 4 images left out:\n  {gone}: gone" in capsys.readouterr().err
    assert sum(each) == whole and len(set(each)) > 1
