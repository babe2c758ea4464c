"""What `predict` reads, what it writes and over what it does not, and what its options may be."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_completion

import jaxaccum
from jaxaccum import data, draw
from jaxaccum.config import ConfigError
from jaxaccum.tasks import files, outputs
from jaxaccum.tasks.predicting import paths_of, predict_files


@pytest.fixture(scope="module")
def completion(tmp_path_factory):
    facts = {"normalised": True}
    return tiny.untrained(
        tmp_path_factory.mktemp("c") / "r", tiny_completion.tiny_config(), (), facts
    )


def image(file: Path, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 64, 3), np.uint8)
    draw.save_image(file, pixels)
    return file.read_bytes()


def everything(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*")) if file.is_file()
    }  # fmt: skip


# --- What is there is not written over. ---


def test_true_labels_are_not_written_over(detector, tmp_path):
    """Before: they were replaced by what the network found, exit 0."""
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    image(tmp_path / "images" / "a.jpg")
    before = everything(tmp_path)
    with pytest.raises(data.DataError, match=r"overwrite .*labels/a\.txt, which no earlier") as no:
        predict_files(
            detector, tmp_path / "images", tmp_path, [], conf=0.0, max_det=3, save_txt=True
        )
    assert "give another folder by --out" in str(no.value)
    assert everything(tmp_path) == before
    predict_files(detector, tmp_path / "images", tmp_path, [], conf=0.0)  # writes no labels
    assert (tmp_path / "labels" / "a.txt").read_text() == "0 0.5 0.5 0.5 0.5\n"


@pytest.mark.parametrize("source", ["a.jpg", "*.jpg"])
def test_another_picture_of_that_name_is_not_written_over(detector, tmp_path, source):
    image(tmp_path / "a.jpg")
    mine = image(tmp_path / "a.png", 1)
    with pytest.raises(data.DataError, match=r"would overwrite .*a\.png, which no earlier"):
        predict_files(detector, str(tmp_path / source), tmp_path, [])
    assert (tmp_path / "a.png").read_bytes() == mine
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "there", ["a.png", "labels/a.txt", "crops/a/a_1.png", "crops/mine/a_7.png", "detections.json"]
)
def test_nothing_else_is_written_over(detector, tmp_path, there):
    image(tmp_path / "in" / "a.jpg")
    out = tmp_path / "out"
    (out / there).parent.mkdir(parents=True)
    (out / there).write_text("mine")
    with pytest.raises(data.DataError, match=rf"would overwrite .*{there}, which no"):
        predict_files(
            detector, tmp_path / "in", out, [], conf=0.0, max_det=3, save_txt=True, save_crop=True
        )
    assert everything(out) == {there: b"mine"}


def test_a_file_where_a_folder_is_to_be(detector, tmp_path):
    image(tmp_path / "in" / "a.jpg")
    (tmp_path / "labels").write_text("mine")
    with pytest.raises(data.DataError, match="labels is no folder"):
        predict_files(detector, tmp_path / "in", tmp_path, [], conf=0.0, save_txt=True)


def test_frames_do_not_write_over_pictures(detector, tmp_path):
    import PIL.Image

    first, second = (PIL.Image.new("RGB", (40, 30), c) for c in ("red", "blue"))
    first.save(tmp_path / "d.gif", save_all=True, append_images=[second])
    first.save(tmp_path / "e.png", save_all=True, append_images=[second])
    first.save(tmp_path / "f.png")
    for name in ("d", "e"):
        mine = image(tmp_path / f"{name}_000002.png")
        file = tmp_path / ("d.gif" if name == "d" else "e.png")
        with pytest.raises(data.DataError, match=rf"overwrite .*{name}_000002\.png, which no"):
            predict_files(detector, file, tmp_path, [])
        assert (tmp_path / f"{name}_000002.png").read_bytes() == mine
    image(tmp_path / "out" / "f_000002.png")
    predict_files(detector, tmp_path / "f.png", tmp_path / "out", [])  # one picture, no frames


def test_a_second_time_into_the_same_folder(detector, tmp_path):
    image(tmp_path / "in" / "a.jpg")
    image(tmp_path / "in" / "b.jpg", 1)
    out = tmp_path / "out"

    def predict(conf, max_det):
        predict_files(
            detector, tmp_path / "in", out, [], conf=conf, max_det=max_det, save_txt=True,
            save_crop=True,
        )  # fmt: skip
        return everything(out)

    first, second = predict(0.0, 2), predict(0.0, 1)
    assert first["labels/a.txt"] != second["labels/a.txt"] and first.keys() == second.keys()
    assert len([name for name in first if name.startswith("crops/")]) == 4
    assert predict(0.0, 2) == first | {outputs.LIST: second[outputs.LIST]}  # nothing new to list
    # Beside what is read, too.
    for _ in range(2):
        predict_files(detector, tmp_path / "in" / "a.jpg", tmp_path / "in", [])
    # A copy of the folder is known, whatever the times of its files.
    shutil.copytree(out, tmp_path / "copy", copy_function=shutil.copyfile)
    predict_files(detector, tmp_path / "in", tmp_path / "copy", [], conf=0.0, save_txt=True)


def test_what_was_corrected_by_hand_is_kept(detector, tmp_path):
    image(tmp_path / "in" / "a.jpg")
    options = {"conf": 0.0, "save_txt": True}
    predict_files(detector, tmp_path / "in", tmp_path / "out", [], **options)
    label = tmp_path / "out" / "labels" / "a.txt"
    right = label.read_text().replace("0.", "0.1", 1)
    label.write_text(right)
    with pytest.raises(data.DataError, match=r"labels/a\.txt, which was changed since"):
        predict_files(detector, tmp_path / "in", tmp_path / "out", [], **options)
    assert label.read_text() == right
    label.unlink()
    label.symlink_to(tmp_path / "in" / "a.jpg")
    with pytest.raises(data.DataError, match="would overwrite"):
        predict_files(detector, tmp_path / "in", tmp_path / "out", [], **options)


def test_a_run_that_was_stopped_may_be_repeated(detector, tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        image(tmp_path / "in" / f"{name}.jpg")
    done = []

    def stopped(path):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(path)
        yield from files.read_pictures(path)

    with monkeypatch.context() as patched:
        patched.setattr(type(detector.task), "read_file", staticmethod(stopped))
        with pytest.raises(KeyboardInterrupt):
            predict_files(detector, tmp_path / "in", tmp_path / "out", [])
    assert {"a.png", "b.png", outputs.LIST} == set(everything(tmp_path / "out"))
    predict_files(detector, tmp_path / "in", tmp_path / "out", [])
    assert len(json.loads((tmp_path / "out" / "detections.json").read_text())) == 3


def test_a_damaged_list_is_no_leave_to_write_over(detector, tmp_path):
    image(tmp_path / "in" / "a.jpg")
    predict_files(detector, tmp_path / "in", tmp_path / "out", [])
    listed = tmp_path / "out" / outputs.LIST
    whole = listed.read_bytes()
    for part in (b"", b'["a.png"', b"\xff\n[[]]\n{}\n3\n" + b"[" * 5000, b'[["a"], 1, 2]\n'):
        listed.write_bytes(part)
        with pytest.raises(data.DataError, match="would overwrite"):
            predict_files(detector, tmp_path / "in", tmp_path / "out", [])
    listed.write_bytes(b"\xff\n" + whole + b'["a.p')
    predict_files(detector, tmp_path / "in", tmp_path / "out", [])


def test_labels_of_kitti_are_not_written_over(detector3d, tmp_path):
    image(tmp_path / "in" / "a.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("mine")
    with pytest.raises(data.DataError, match=r"would overwrite .*data/a\.txt, which no earlier"):
        predict_files(detector3d, tmp_path / "in", tmp_path, [])
    assert (tmp_path / "data" / "a.txt").read_text() == "mine"
    for _ in range(2):
        predict_files(detector3d, tmp_path / "in", tmp_path / "out", [])


@pytest.mark.slow
def test_clouds_are_not_written_over(completion, tmp_path):
    cloud = data.Shapes("val", length=1).complete(0)
    data.write_cloud(tmp_path / "a.npy", cloud)
    data.write_cloud(tmp_path / "a.ply", cloud[:100])
    mine = (tmp_path / "a.ply").read_bytes()
    with pytest.raises(data.DataError, match=r"would overwrite .*a\.ply, which no earlier"):
        predict_files(completion, tmp_path / "a.npy", tmp_path, [])
    assert (tmp_path / "a.ply").read_bytes() == mine and len(list(tmp_path.iterdir())) == 2
    for _ in range(2):
        predict_files(completion, tmp_path / "a.npy", tmp_path / "out", [])
    written = json.loads((tmp_path / "out" / "completions.json").read_text())[0]["written"]
    assert (tmp_path / "out" / written).is_file()


# --- What is read. ---


def test_a_folder_of_brackets(detector, tmp_path):
    folder = tmp_path / "mi[1]"
    image(folder / "a.jpg")
    image(folder / "sub" / "b.jpg")
    image(tmp_path / "mi1" / "c.jpg")
    task = detector.task
    assert paths_of(f"{folder}/*.jpg", task) == [folder / "a.jpg"]
    assert paths_of(f"{folder}/**/*.jpg", task) == [folder / "a.jpg", folder / "sub" / "b.jpg"]
    assert paths_of(f"{tmp_path}/m[i]1/[abc].jpg", task) == [tmp_path / "mi1" / "c.jpg"]
    with pytest.raises(data.DataError, match=r"matches no files.*write \[\[\] for \["):
        paths_of(f"{tmp_path}/x[2]/*.jpg", task)
    with pytest.raises(data.DataError, match=r"matches no files(?!.*signs)"):
        paths_of(f"{tmp_path}/x/*.jpg", task)


def test_a_pattern_from_here(detector, tmp_path, monkeypatch):
    image(tmp_path / "mi[1]" / "a.jpg")
    monkeypatch.chdir(tmp_path)
    for pattern in ("mi[1]/*.jpg", "./mi[1]/*", "*/*.jpg", "**/*.jpg"):
        assert paths_of(pattern, detector.task) == [Path("mi[1]/a.jpg")]


def test_hidden_files_of_a_folder_are_left_out(detector, tmp_path, capsys):
    image(tmp_path / "in" / "a.jpg")
    (tmp_path / "in" / "._a.jpg").write_bytes(b"\0\5\x16\7 of macOS")
    (tmp_path / "in" / ".DS_Store").write_bytes(b"")
    failed = []
    predict_files(detector, tmp_path / "in", tmp_path / "out", failed)
    assert failed == [] and "left out of" in (said := capsys.readouterr().out)
    assert "2 hidden" in said
    assert paths_of(tmp_path / "in" / "._a.jpg", detector.task)  # one that is named is taken


def test_a_name_of_two_lines_is_one_in_what_is_said(detector, detector3d, tmp_path):
    name = "a\nerror: b.jpg"
    image(tmp_path / "in" / "a.jpg")
    os.rename(tmp_path / "in" / "a.jpg", tmp_path / "in" / name)
    for model in (detector, detector3d):
        (said,) = predict_files(model, tmp_path / "in", tmp_path / model.task.name, [])
        assert said.startswith(r"a\nerror: b.jpg: ") and "\n" not in said
        told = json.loads((tmp_path / model.task.name / "detections.json").read_text())
        assert told[0]["file"] == name


@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".Txt"])
def test_calibration_is_found_as_in_training(detector3d, tmp_path, suffix):
    file = tmp_path / "image_2" / "000002.png"
    image(file)
    rows = "".join(f"{v} " for v in (500, 0, 32, 0, 0, 500, 24, 0, 0, 0, 1, 0))
    calib = tmp_path / "calib" / f"000002{suffix}"
    calib.parent.mkdir()
    calib.write_text(f"P2: {rows}\n")
    for options in ({}, {"calib": tmp_path / "calib"}, {"calib": str(tmp_path / "calib")}):
        (result,) = jaxaccum.Model(detector3d).predict(file, **options)
        assert result.camera_of == calib.name and result.camera[0, 0] == 500
    calib.unlink()
    with pytest.raises(data.DataError, match=r"000002\.txt: no calibration of 000002\.png"):
        jaxaccum.Model(detector3d).predict(file, calib=tmp_path / "calib")
    calib.symlink_to("nowhere")
    with pytest.raises(data.DataError, match="where there is nothing"):
        jaxaccum.Model(detector3d).predict(file)


# --- Options. ---

PICTURE = np.zeros((40, 60, 3), np.uint8)
WRONG = [
    ("conf", "a", "conf is a number in 0 to 1; got 'a'"),
    ("conf", 2, "conf is a number in 0 to 1; got 2"),
    ("conf", -0.1, "conf is a number"), ("conf", float("nan"), "conf is a number"),
    ("conf", None, "conf is a number in 0 to 1; got None"), ("conf", True, "conf is a number"),
    ("conf", [0.5], "conf is a number"), ("conf", 1j, "conf is a number"),
    ("conf", np.zeros(3), "conf is a number"), ("conf", 10**400, "conf is a number"),
    ("iou", 1.5, "iou is a number in 0 to 1; got 1.5"), ("iou", "0.5", "iou is a number"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "said"), WRONG, ids=lambda one: str(one)[:20])
def test_wrong_options_of_all_detectors(detector, detector3d, tmp_path, name, value, said):
    """Before: TypeErrors, and words about internals."""
    image(tmp_path / "a.jpg")
    for trained in (detector, detector3d):
        with pytest.raises(ConfigError) as caught:
            jaxaccum.Model(trained).predict(PICTURE, **{name: value})
        assert str(caught.value).startswith(said)
        with pytest.raises(ConfigError) as caught:  # also of the verb
            predict_files(trained, tmp_path, tmp_path / "out", [], **{name: value})
        assert str(caught.value).startswith(said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("max_det", 0, "max_det is a whole number in 1 to 100000; got 0"),
        ("max_det", 2.5, "max_det is a whole"), ("max_det", "3", "max_det is a whole"),
        ("max_det", True, "max_det is a whole"), ("agnostic", "no", "agnostic is True or False"),
        ("save_txt", 2, "save_txt is True or False; got 2"), ("save_crop", None, "save_crop is"),
        ("classes", "a", "classes is a list of names or numbers of classes; got 'a'"),
        ("classes", 1, "classes is a list"), ("classes", [None], "classes is a list"),
        ("classes", [1.5], "classes is a list"), ("classes", ["c"], "classes: 'c' is no class"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_options_of_a_detector(detector, name, value, said):
    with pytest.raises(ConfigError) as caught:
        jaxaccum.Model(detector).stream(PICTURE, **{name: value})  # before the first result
    assert str(caught.value).startswith(said)


def test_other_wrong_options(detector3d, completion):
    with pytest.raises(ConfigError, match="calib is the path of a folder; got 3"):
        jaxaccum.Model(detector3d).predict(PICTURE, calib=3)
    for name, value, said in (
        ("format", "obj", "format is one of"), ("normalise", True, "normalise is one of"),
        ("up", "x", "up is one of"), ("caption", 3, "caption is a text; got 3"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            jaxaccum.Model(completion).predict(np.zeros((9, 3)), **{name: value})


def test_options_of_other_types_that_mean_the_same(detector):
    model = jaxaccum.Model(detector)
    expected = [r.to_json() for r in model.predict(PICTURE, conf=0, max_det=2, classes=[1])]
    found = model.predict(
        PICTURE, conf=np.float32(0), max_det=np.int64(2), classes=(n for n in np.array([1])),
        agnostic=np.bool_(False),
    )  # fmt: skip
    assert [r.to_json() for r in found] == expected and len(found[0]) == 2
