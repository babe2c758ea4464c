"""Videos in, drawn videos out: all frames, of one size and rate, or a line that says why not."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import cv2
import numpy as np
import pytest

import jaxaccum
from jaxaccum import data
from jaxaccum.draw import videos
from jaxaccum.tasks.predicting import predict_files


def pictures(count, size=(48, 64), noise=False):
    """Grey ones, each lighter than the one before, or noise, which codecs cannot make small."""
    rng = np.random.default_rng(0)
    for i in range(count):
        plain = np.full((*size, 3), 20 + 150 * i // count, np.uint8)
        yield rng.integers(0, 255, plain.shape, np.uint8) if noise else plain


def write(file: Path, count=12, rate=12.5, **options) -> Path:
    found = list(pictures(count, **options))
    writer = videos.VideoWriter(file, found[0].shape[:2], rate)
    for one in found:
        writer.add(one)
    writer.close()
    return file


def read(file: Path):
    """(frames as RGB, frames a second)."""
    capture = cv2.VideoCapture(str(file), cv2.CAP_FFMPEG)
    assert capture.isOpened()
    found = []
    while True:
        there, pixels = capture.read()
        if not there:
            break
        found.append(pixels[..., ::-1])
    return found, capture.get(cv2.CAP_PROP_FPS)


def damage(file: Path, start: float, end: float) -> None:
    whole = bytearray(file.read_bytes())
    first, last = int(len(whole) * start), int(len(whole) * end)
    whole[first:last] = np.random.default_rng(1).integers(0, 255, last - first, np.uint8).tobytes()
    file.write_bytes(whole)


@pytest.mark.parametrize("suffix", videos.CODECS)
def test_a_video_of_every_container(detector, tmp_path, suffix, capfd):
    """What comes out has the frames of what goes in, its size and its rate; its name, too."""
    rate = 25 if suffix in (".mpg", ".mpeg") else 12.5
    source = write(tmp_path / f"v{suffix}", 12, rate)
    out, failed = tmp_path / "out", []
    lines = predict_files(detector, source, out, failed, conf=1.0)
    assert failed == [] and len(lines) == 12
    frames, told = read(out / f"v{suffix}")
    assert len(frames) == 12 and told == pytest.approx(rate, abs=1e-3)
    for frame, picture in zip(frames, pictures(12), strict=True):  # nothing is found at conf 1
        assert frame.shape == picture.shape
        assert np.abs(frame.astype(int) - picture).mean() < 8
    assert len(list(out.glob("v_*.png"))) == len(json.loads((out / "detections.json").read_text()))
    said = capfd.readouterr()
    assert f"12 frames drawn in {out / f'v{suffix}'}" in said.out and said.err == ""


def test_boxes_are_in_the_video(detector, detector3d, tmp_path):
    source = write(tmp_path / "v.mp4")
    for model in (detector, detector3d):
        plain, drawn = tmp_path / f"{model.task.name}_plain", tmp_path / model.task.name
        predict_files(model, source, plain, [], conf=1.0)
        predict_files(model, source, drawn, [], conf=0.0)
        (one, _), (other, _) = read(plain / "v.mp4"), read(drawn / "v.mp4")
        assert {frame.shape for frame in one + other} == {(48, 64, 3)}
        assert np.abs(one[0].astype(int) - other[0]).max() > 100


def test_the_last_row_of_an_odd_size_is_left_out_and_said(detector, tmp_path, capsys):
    writer = cv2.VideoWriter(
        str(tmp_path / "v.avi"), cv2.CAP_OPENCV_MJPEG, cv2.VideoWriter.fourcc(*"MJPG"), 5, (65, 48)
    )
    for one in pictures(3, (48, 65)):
        writer.write(one)
    writer.release()
    predict_files(detector, tmp_path / "v.avi", tmp_path / "out", [])
    assert "its last column of pixels is left out" in capsys.readouterr().out
    assert [frame.shape for frame in read(tmp_path / "out" / "v.avi")[0]] == [(48, 64, 3)] * 3


def test_pictures_alone_where_no_video_is_wanted(detector, tmp_path):
    source = write(tmp_path / "v.mp4", 3)
    predict_files(detector, source, tmp_path / "out", [], save_video=False, codec="XXXX")
    assert not (tmp_path / "out" / "v.mp4").exists()
    assert len(list((tmp_path / "out").glob("v_*.png"))) == 3


# --- What is damaged, or cannot be written. ---


def test_frames_that_cannot_be_decoded_are_counted_and_those_behind_them_used(detector, tmp_path):
    """Before: the first of them ended the video."""
    source = write(tmp_path / "v.mp4", 60, noise=True)
    damage(source, 0.4, 0.42)
    failed = []
    lines = predict_files(detector, source, tmp_path / "out", failed)
    missing = 60 - len(lines)
    assert 0 < missing < 10
    (said,) = failed
    assert f"{missing} of its 60 frames could not be decoded; the other {len(lines)} were" in said
    assert len(read(tmp_path / "out" / "v.mp4")[0]) == len(lines)


def test_frames_that_the_decoder_passes_over_are_counted(detector, tmp_path, capsys):
    """It gives the next one instead, without a word: nothing was said."""
    source = write(tmp_path / "v.avi", 60, noise=True)
    whole = source.read_bytes()
    fault = whole.index(b"00dc", len(whole) // 2)
    source.write_bytes(whole[: fault + 8] + bytes(400) + whole[fault + 408 :])
    failed = []
    count = len(predict_files(detector, source, tmp_path / "out", failed))
    assert 50 < count < 60
    said = capsys.readouterr().err + "".join(failed)
    assert f"{60 - count} are in no result" in said or f"{60 - count} of its 60 frames" in said
    assert len(read(tmp_path / "out" / "v.avi")[0]) == count


def test_what_there_is_of_a_video_that_is_cut_off(detector, tmp_path):
    source = write(tmp_path / "v.avi", 40, noise=True)
    whole = source.read_bytes()
    source.write_bytes(whole[: len(whole) // 2])
    failed = []
    count = len(predict_files(detector, source, tmp_path / "out", failed))
    assert 3 < count < 30 and f"only its first {count} frames" in failed[0]
    assert len(read(tmp_path / "out" / "v.avi")[0]) == count


def test_a_codec_that_cannot_be_written_is_said_before_anything_is_done(detector, tmp_path, capfd):
    source = write(tmp_path / "v.mp4", 3)
    with pytest.raises(videos.VideoError, match=r"cannot write \.mp4 with the codec XXXX") as no:
        predict_files(detector, source, tmp_path / "out", [], codec="XXXX")
    assert "--codec, such as mp4v" in str(no.value) and "--nosave_video" in str(no.value)
    assert list((tmp_path / "out").iterdir()) == [] and capfd.readouterr() == ("", "")
    for wrong in ("mp4", "mp4v1", "mp\u00e44"):
        with pytest.raises(videos.VideoError, match="codec is four letters"):
            predict_files(detector, source, tmp_path / "out", [], codec=wrong)
    predict_files(detector, source, tmp_path / "out", [], codec="vp09")
    assert len(read(tmp_path / "out" / "v.mp4")[0]) == 3


def test_a_video_that_cannot_be_written_costs_no_pictures(detector, tmp_path):
    """MPEG-1 knows only some rates; a small one that is tried before has a usual one."""
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "v.mpg", 3, 12.5)
    failed = []
    lines = predict_files(detector, tmp_path / "in", tmp_path / "out", failed, codec="PIM1")
    assert len(lines) == 3 and len(list((tmp_path / "out").glob("v_*.png"))) == 3
    assert len(failed) == 1 and "no video of it: OpenCV" in failed[0] and "12 frames" in failed[0]
    assert not (tmp_path / "out" / "v.mpg").exists()


def test_a_file_that_lost_frames_is_no_result(tmp_path):
    """OpenCV says nothing where the disk is full."""
    writer = videos.VideoWriter(tmp_path / "v.mp4", (48, 64), 5)
    for one in pictures(5):
        writer.add(one)
    writer.frames += 1
    with pytest.raises(videos.VideoError, match=r"of 6 frames .* the file holds 5 frames"):
        writer.close()
    with pytest.raises(videos.VideoError, match="frame 1 is uint8 of 60 x 48 pixels"):
        videos.VideoWriter(tmp_path / "w.mp4", (48, 64), 5).add(np.zeros((48, 60, 3), np.uint8))


# --- Where it is written. ---


def test_another_video_of_that_name_is_not_written_over(detector, tmp_path):
    source = write(tmp_path / "in.mp4", 3)
    out = tmp_path / "out"
    out.mkdir()
    (out / "in.mp4").write_bytes(b"mine")
    with pytest.raises(data.DataError, match=r"would overwrite .*in\.mp4, which no earlier"):
        predict_files(detector, source, out, [])
    assert (out / "in.mp4").read_bytes() == b"mine" and len(list(out.iterdir())) == 1
    (out / "in.mp4").unlink()
    for _ in range(2):  # its own it may replace
        predict_files(detector, source, out, [])
    before = source.read_bytes()
    with pytest.raises(data.DataError, match=r"would overwrite .*in\.mp4: give another folder"):
        predict_files(detector, source, tmp_path, [])
    assert source.read_bytes() == before


def test_videos_of_one_stem_are_two(detector, tmp_path):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "v.mp4", 3)
    write(tmp_path / "in" / "v.avi", 4)
    predict_files(detector, tmp_path / "in", tmp_path / "out", [])
    assert [len(read(tmp_path / "out" / f"v{s}")[0]) for s in (".mp4", ".avi")] == [3, 4]


def test_one_that_is_stopped_leaves_nothing_half_written(detector, tmp_path, monkeypatch):
    source = write(tmp_path / "v.mp4")
    add, done = videos.VideoWriter.add, []

    def stopped(self, picture):
        done.append(picture.shape)
        if self.size == (48, 64) and len(done) > 6:
            raise KeyboardInterrupt
        add(self, picture)

    monkeypatch.setattr(videos.VideoWriter, "add", stopped)
    with pytest.raises(KeyboardInterrupt):
        predict_files(detector, source, tmp_path / "out", [])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "v_000003.png" in names and not [n for n in names if "writing" in n or n == "v.mp4"]


def test_frames_are_not_kept(detector, tmp_path, monkeypatch):
    source = write(tmp_path / "v.mp4", 9)
    kept, most = [], []
    predictor = detector.task.predictor(detector)

    def seen(self, trained, **options):
        def one(sample):
            gc.collect()
            most.append(sum(result() is not None for result in kept))
            result = predictor(sample)
            kept.append(weakref.ref(result))
            return result

        return one

    monkeypatch.setattr(type(detector.task), "predictor", seen)
    predict_files(detector, source, tmp_path / "out", [])
    assert len(most) == 9 and max(most) <= 1


def test_in_python(detector, tmp_path):
    source, model = write(tmp_path / "v.mp4"), jaxaccum.Model(detector)
    assert model.video(source, tmp_path / "drawn.avi", conf=0.5) == 12
    frames, rate = read(tmp_path / "drawn.avi")
    assert len(frames) == 12 and rate == pytest.approx(12.5)
    with pytest.raises(videos.VideoError, match=r"videos are written as \.avi"):
        model.video(source, tmp_path / "drawn.txt")
    damage(source, 0.05, 0.9)
    with pytest.raises(data.DataError):
        model.video(source, tmp_path / "other.mp4")
    assert {path.name for path in tmp_path.iterdir()} == {"v.mp4", "drawn.avi"}
