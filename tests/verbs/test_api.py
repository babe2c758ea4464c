"""jaxaccum in Python: the three lines, whatever the source is, and what errors say."""

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest
import tiny
import tiny_completion

import jaxaccum
from jaxaccum import config as configs
from jaxaccum import data, draw
from jaxaccum.training import checkpoint, inference, loop
from jaxaccum.training.preemption import Preempted

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A detector trained in Python, and the records that were seen."""
    records = []
    workdir = tmp_path_factory.mktemp("api") / "run"
    model = jaxaccum.train(tiny.tiny_config(), workdir, watch=records.append)
    return model, workdir, records


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(3):
        draw.save_image(folder / f"{i}.png", data.Scenes("val").image(i))
    return folder


def test_training_gives_the_best_weights_and_tells_every_record(watched):
    model, workdir, records = watched
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["kind"]) for r in records] == [(r["step"], r["kind"]) for r in lines]
    assert records[-1].keys() <= lines[-1].keys()
    assert repr(model) == f"Model('tiny-t', 6 classes, of update {model.trained.step})"
    assert model.names == data.Scenes("val").names and model.config.nbs == 4


def test_a_finished_run_gives_its_weights_again(watched, capsys):
    model, workdir, _ = watched
    again = jaxaccum.train(tiny.tiny_config(), str(workdir))
    assert "finished: all 12 updates are done" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, again.trained.params, model.trained.params)


def test_other_weights_than_the_best(watched):
    model, workdir, _ = watched
    best, steps = model.trained.step, (9, 12)  # a checkpoint every 3 updates, 2 of them kept
    assert jaxaccum.load(workdir, weights="best").trained.step == best
    assert jaxaccum.load(workdir, weights="last").trained.step == 12
    for step in steps:
        found = jaxaccum.load(workdir, weights=step).trained
        assert found.step == step and found.config.nbs == 4
    params = [jaxaccum.load(workdir, weights=n).trained.params for n in (9, "last")]
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), *params)))
    for word in (7, "first", "-9", "\u0669"):
        with pytest.raises(checkpoint.CheckpointError, match=rf"no weights .*best \(update {best}"):
            jaxaccum.load(workdir, weights=word)


def test_every_kind_of_source_gives_the_same(watched, images, tmp_path):
    model, workdir, _ = watched
    model = jaxaccum.load(workdir)
    pixels = [data.Scenes("val").image(i) for i in range(3)]
    expected = [r.to_json() for r in model.predict(images, conf=0.0)]
    assert len(expected) == 3 and any(r["detections"] for r in expected)
    sources = {
        "text": str(images), "pattern": f"{images}/*.png", "paths": sorted(images.iterdir()),
        "arrays": pixels, "generator": (one for one in pixels),
        "Pillow": [PIL.Image.fromarray(one) for one in pixels],
    }  # fmt: skip
    for kind, source in sources.items():
        found = model.predict(source, conf=0.0)
        assert [r.to_json() for r in found] == expected, kind
    (one,) = model.predict(pixels[0], conf=0.0)
    assert one.to_json() == expected[0] and one.summary() in str(one)
    assert one.plot().dtype == np.uint8 and one.boxes.shape == (len(one), 4)
    assert (one.scores[:-1] >= one.scores[1:]).all()
    assert one.save(tmp_path / "one") == {} and (tmp_path / "one.png").is_file()
    stream = model.stream(str(images / "1.png"), conf=0.0)
    assert next(stream).to_json() == expected[1] and list(stream) == []
    assert str(model.predict(images / "2.png", conf=1.0)[0]).startswith("2.png: nothing (highest")


def test_the_verb_writes_what_python_gives(watched, images, tmp_path):
    model, _, _ = watched
    told = tiny.predicted(model.trained, str(images / "[01].png"), tmp_path / "out", conf=0.0)
    assert [r["file"] for r in told] == ["0.png", "1.png"]
    found = model.predict(images, conf=0.0)
    assert told == [{"file": f"{i}.png", **r.to_json()} for i, r in enumerate(found[:2])]


def test_what_is_looked_for_and_how_much_of_it(watched, images, tmp_path):
    model, _, _ = watched
    every = model.predict(images, conf=0.0)
    assert len({c for r in every for c in r.classes}) > 1 and model.names[2] == "car"
    for word in ("car", 2):
        for result in model.predict(images, conf=0.0, classes=[word, "boat"]):
            assert len(result) and {result.names[c] for c in result.classes} <= {"boat", "car"}
    assert all(len(r) == 3 for r in model.predict(images, conf=0.0, max_det=3))
    apart, together = (
        sum(map(len, model.predict(images, conf=0.0, iou=0.3, agnostic=a))) for a in (False, True)
    )
    assert together < apart
    with pytest.raises(configs.ConfigError, match=r"'cat' is no class .* mean car\?"):
        model.predict(images, classes=["cat"])
    with pytest.raises(configs.ConfigError, match="'6' is no class of this model: there are house"):
        model.predict(images, classes=["6"])
    tiny.predicted(
        model.trained, images, tmp_path / "out", conf=0.0, max_det=4, save_txt=True, save_crop=True
    )
    few = model.predict(images, conf=0.0, max_det=4)
    crops = list((tmp_path / "out" / "crops").rglob("*.png"))
    assert len(crops) == sum(map(len, few))
    for result, stem in zip(few, ("0", "1", "2"), strict=True):
        rows = [row.split() for row in (tmp_path / "out/labels" / f"{stem}.txt").open()]
        height, width = result.sample.value.shape[:2]
        for row, box, c in zip(rows, result.boxes, result.classes, strict=True):
            x, y, w, h = np.array(row[1:5], float) * [width, height, width, height]
            assert int(row[0]) == c and 0 <= float(row[5]) <= 1
            np.testing.assert_allclose([x - w / 2, y - h / 2, x + w / 2, y + h / 2], box, atol=1e-3)
        for crop, (x1, y1, x2, y2) in zip(result.crops(), result.boxes, strict=True):
            assert abs(crop.shape[0] - (y2 - y1)) < 2 and abs(crop.shape[1] - (x2 - x1)) < 2


def test_the_verb_holds_one_result_at_a_time(watched, images, tmp_path, monkeypatch):
    """A video has as many as it has frames, each with its pixels."""
    model, _, _ = watched
    kept, most = [], []
    predictor = model.trained.task.predictor(model.trained)

    def seen(self, trained, **options):
        def one(sample):
            gc.collect()
            most.append(sum(one() is not None for one in kept))
            kept.append(weakref.ref(result := predictor(sample)))
            return result

        return one

    monkeypatch.setattr(type(model.trained.task), "predictor", seen)
    tiny.predicted(model.trained, images, tmp_path / "out")
    assert most == [0, 1, 1]


def test_evaluate_export_and_save(watched, tmp_path):
    model, workdir, _ = watched
    found = model.evaluate()
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    (best,) = (r for r in lines if r["kind"] == "eval" and r["step"] == model.trained.step)
    assert found["map50"] == best["map50"] and found["images"] == 256
    facts = model.export(tmp_path / "m.stablehlo")
    assert facts["format"] == "stablehlo" and (tmp_path / "m.stablehlo").stat().st_size > 1000
    assert model.save(tmp_path / "m.safetensors") > 10
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == 0o666 & ~current_umask()
    again = jaxaccum.load(tmp_path / "m.safetensors", model="tiny-t")
    np.testing.assert_allclose(
        again.predict(data.Scenes("val").image(0), conf=0.0)[0].scores,
        jaxaccum.load(workdir).predict(data.Scenes("val").image(0), conf=0.0)[0].scores, atol=1e-6,
    )  # fmt: skip


def current_umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_cannot_be_is_said(watched, images, tmp_path):
    model, workdir, _ = watched
    for source, said in (
        ("http://host/a.jpg", "nothing is downloaded"),
        (f"{images}/*.jpg", "matches no files"),
        (np.zeros((4, 4, 4), np.uint8), r"an image is an array .* got ndarray uint8 \(4, 4, 4\)"),
        (np.zeros((40, 40, 3)), "got ndarray float64"),
        (tmp_path / "none", "neither a file nor a folder"),
    ):
        with pytest.raises(data.DataError, match=said):
            model.predict(source)
    with pytest.raises(configs.ConfigError, match=r"confidence is no option .* takes conf, iou"):
        model.predict(images, confidence=0.5)
    with pytest.raises(configs.ConfigError, match="give the workdir"):
        jaxaccum.train(tiny.tiny_config())
    with pytest.raises(configs.ConfigError, match="knows its model"):
        jaxaccum.load(workdir, model="tiny-t")
    with pytest.raises(configs.ConfigError, match="by its name"):
        jaxaccum.train(tiny.tiny_config(), tmp_path, {"epochs": 2})
    with pytest.raises(configs.ConfigError, match=r"Did you mean .*epochs"):
        jaxaccum.train("yolo_n", tmp_path, {"epoch": 2})
    with pytest.raises(configs.ConfigError, match="program as onnx, and --format=stablehlo"):
        model.export(tmp_path / "m.onnx", format="stablehlo")
    with pytest.raises(Exception, match=r"name it m\.safetensors"):
        model.save(tmp_path / "m.pt")
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = jaxaccum.trian


def test_a_broken_file_of_a_folder_is_a_warning(watched, images, tmp_path):
    model, _, _ = watched
    (tmp_path / "a.png").write_bytes((images / "0.png").read_bytes())
    (tmp_path / "b.png").write_bytes(b"none")
    with pytest.warns(UserWarning, match=r"skipped: .*b\.png"):
        assert len(model.predict(tmp_path)) == 1
    with pytest.raises(data.DataError, match=r"b\.png"):
        model.predict(tmp_path / "b.png")


def test_stopped_by_hand(monkeypatch, tmp_path):
    def stopped(*given, signals, **named):
        assert signals is not interactive
        raise Preempted(130)

    monkeypatch.setattr(loop, "train", stopped)
    for interactive in (False, True):
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
        if not interactive:
            monkeypatch.delattr(sys, "ps1")
        with pytest.raises(KeyboardInterrupt):
            jaxaccum.train(tiny.tiny_config(), tmp_path)


def test_a_session_that_is_stopped_keeps_what_it_learned(monkeypatch, tmp_path):
    """Where no signal may end the process, Ctrl-C is raised anywhere."""
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)

    def stop(record):
        if record["step"] == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jaxaccum.train(tiny.tiny_config(), tmp_path, watch=stop)
    assert checkpoint.newest_complete(tmp_path) >= 8
    jaxaccum.train(tiny.tiny_config(), tmp_path)
    assert inference.load(tmp_path).step in (6, 12)


@pytest.mark.slow
def test_clouds(tmp_path):
    model = jaxaccum.train(tiny_completion.tiny_config(steps=1), tmp_path / "run")
    cloud = data.Shapes("val", length=1).complete(0)[:2000]
    data.write_cloud(tmp_path / "a.ply", cloud)
    (of_array,), (of_file,) = model.predict(cloud), model.predict(tmp_path / "a.ply")
    np.testing.assert_allclose(of_array.cloud, of_file.cloud, atol=1e-5)
    assert str(of_file).startswith("a.ply: 2000 points, taken in") and of_file.plot().ndim == 3
    assert of_file.save(tmp_path / "b") == {"written": "b.ply"} and (tmp_path / "b.ply").is_file()
    for wrong in (np.zeros((5, 2)), np.full((5, 3), np.nan), np.array([["a"] * 3])):
        with pytest.raises(data.DataError, match="a cloud"):
            model.predict(wrong)


def command(*words):
    return subprocess.run(
        [sys.executable, "-m", "jaxaccum", *words], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_one_command():
    from jaxaccum.__main__ import VERBS

    files = (ROOT / "jaxaccum").glob("*.py")
    there = {file.stem.replace("_", "-") for file in files if "run_verb(" in file.read_text()}
    assert set(VERBS) == (there - {"command-line"}) | {"plan", "models"}
    assert command("--version").stdout == f"jaxaccum {jaxaccum.__version__}\n"
    usage = command("--help")
    assert usage.returncode == 0 and all(f"  {verb} " in usage.stdout for verb in VERBS)
    assert command().returncode == 2
    wrong = command("trian")
    assert wrong.returncode == 2 and "did you mean train?" in wrong.stderr


@pytest.mark.slow
def test_the_command_takes_the_flags_of_its_verbs():
    done = command("train", "--config=yolo_n", "--config.epoch=3")
    assert done.returncode == 1 and "epochs" in done.stderr
    assert "Examples:" in command("predict", "--help").stdout
    assert "yolo11-p2-m" in command("models", "yolo11-p2").stdout
    assert command("plan", "--help").returncode == 0


def test_importing_the_core_brings_neither():
    program = (
        "import sys, jaxaccum.accumulate; "
        "assert not {'jaxaccum.api', 'jaxaccum.train', 'flax', 'cv2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
