"""Logs: what a kill may not tear, what a resumed run must repeat, what a reader sees."""

import errno
import io
import json
import os
import re
import struct
from contextlib import suppress

import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccum.training.logs import Board, Console, MetricsFile, format_line
from jaxaccum.training.workdir import WorkdirError


def train(step):
    return {"step": step, "kind": "train", "loss": 1 / (step + 2), "lr": np.float32(0.1) / step}


def evaluation(step):
    return {"step": step, "kind": "eval", "map50": step / 7}


def write_steps(log, steps):
    for step in steps:
        log.write(train(step))
        if step % 2 == 0:
            log.write(evaluation(step))


def test_lines_keep_order_and_values(tmp_path):
    log = MetricsFile(tmp_path / "run" / "metrics.jsonl", "abc")
    log.write(
        {
            "step": np.int64(3),
            "kind": "train",
            "loss": 0.1 + 0.2,
            "lr": np.float32(0.1),
            "norm": jnp.float32(1.5),
            "half": jnp.bfloat16(2.5),
            "skipped": np.bool_(True),
            "terms": {"box": jnp.asarray(1, jnp.int32)},
            "sizes": [1, np.uint8(2)],
            "note": None,
            "bad": float("nan"),
            "worse": jnp.inf,
        }
    )
    line = log.path.read_text()
    assert line == (
        '{"step": 3, "kind": "train", "loss": 0.30000000000000004, "lr": 0.10000000149011612, '
        '"norm": 1.5, "half": 2.5, "skipped": true, "terms": {"box": 1}, "sizes": [1, 2], '
        '"note": null, "bad": null, "worse": null, "fingerprint": "abc"}\n'
    )
    assert json.loads(line)["loss"] == 0.1 + 0.2
    assert np.float32(json.loads(line)["lr"]) == np.float32(0.1)


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"kind": "train"}, ValueError),
        ({"step": 1.5, "kind": "train"}, ValueError),
        ({"step": 1, "kind": "test"}, ValueError),
        ({"step": 1, "kind": "train", "fingerprint": "mine"}, ValueError),
        ({"step": 1, "kind": "train", "x": np.zeros(2)}, TypeError),
        ({"step": 1, "kind": "train", "x": object()}, TypeError),
    ],
)
def test_a_refused_record_leaves_no_trace(tmp_path, record, error):
    log = MetricsFile(tmp_path / "metrics.jsonl", "abc")
    with pytest.raises(error):
        log.write(record)
    assert not log.path.exists()


def test_a_line_is_on_disk_when_write_returns(tmp_path, monkeypatch):
    synced = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), sync(fd)))
    log = MetricsFile(tmp_path / "metrics.jsonl", "abc")
    for step in (1, 2):
        log.write(train(step))
        assert synced[-1] == log.path.stat().st_size
        assert log.path.read_bytes().endswith(b"\n")
    assert log.path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("checkpoint", [0, 1, 2, 4, 6])
@pytest.mark.parametrize("torn", [0, 1, 25, "newline"])
def test_a_resumed_file_equals_the_uninterrupted_one(tmp_path, checkpoint, torn):
    whole = MetricsFile(tmp_path / "whole.jsonl", "abc")
    write_steps(whole, range(1, 7))
    expected = whole.path.read_bytes()

    cut = tmp_path / "cut.jsonl"
    lines = expected.splitlines(keepends=True)
    # killed while the last line was written: `torn` bytes of it arrived, or all but its newline
    tail = lines[-1][:-1] if torn == "newline" else lines[-1][:torn]
    cut.write_bytes(b"".join(lines[:-1]) + tail)
    resumed = MetricsFile(cut, "abc")
    resumed.rewind(checkpoint)
    write_steps(resumed, range(checkpoint + 1, 7))
    if checkpoint == 6 and torn != "newline":  # everything but the torn evaluation was kept
        resumed.write(evaluation(6))
    assert cut.read_bytes() == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.jsonl", "whole.jsonl"]


def test_rewind_counts_what_it_drops_and_writing_goes_on(tmp_path):
    log = MetricsFile(tmp_path / "metrics.jsonl", "abc")
    assert log.rewind(5) == 0  # no file yet
    write_steps(log, range(1, 5))  # six lines
    assert log.rewind(4) == 0
    assert log.rewind(2) == 3
    log.write(train(3))
    steps = [json.loads(line)["step"] for line in log.path.read_text().splitlines()]
    assert steps == [1, 2, 2, 3]
    assert log.rewind(-1) == 4
    assert log.path.read_bytes() == b""


def test_rewind_replaces_the_file_in_one_move(tmp_path, monkeypatch):
    log = MetricsFile(tmp_path / "metrics.jsonl", "abc")
    write_steps(log, range(1, 5))
    before = log.path.read_bytes()
    synced = []

    def killed(source, target):
        assert synced == [os.stat(source).st_size], "the new file must be on disk before the move"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        log.rewind(2)
    assert log.path.read_bytes() == before


@pytest.mark.parametrize(
    "line", [b"", b'{"st', b"\xff\x00", b"[1, 2]", b'{"step": "2"}', b"[" * 100_000, b"1" * 5000]
)
def test_lines_that_are_no_records_are_left_out_and_said(tmp_path, capsys, line):
    log = MetricsFile(tmp_path / "metrics.jsonl", "abc")
    write_steps(log, range(1, 5))
    whole = log.path.read_bytes()
    lines = whole.splitlines(keepends=True)
    log.path.write_bytes(b"".join([lines[0], line + b"\n", *lines[1:]]))
    assert log.evaluated(2) and not log.evaluated(3)
    assert log.rewind(4) == 1
    assert log.path.read_bytes() == whole
    said = capsys.readouterr().out
    assert "left out 1 lines that are no records (line 2: " in said and len(said) < 1000
    assert log.rewind(4) == 0 and capsys.readouterr().out == ""


def test_a_file_that_cannot_be_read_or_written_is_an_error_of_ours(tmp_path, monkeypatch):
    log = MetricsFile(tmp_path / "metrics.jsonl", "abc")
    log.path.mkdir()
    for call in (lambda: log.write(train(1)), lambda: log.rewind(1), lambda: log.evaluated(1)):
        with pytest.raises(WorkdirError, match=r"metrics\.jsonl: Is a directory"):
            call()
    log.path.rmdir()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkdirError, match=r"metrics\.jsonl: the disk is full"):
        log.write(train(1))


def test_nothing_is_appended_to_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "ki')
    log = MetricsFile(path, "abc")
    with pytest.raises(ValueError, match="torn line"):
        log.write(train(2))
    assert log.rewind(1) == 1
    log.write(train(2))
    assert json.loads(path.read_text())["step"] == 2


def read_events(folder):
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_board_writes_scalars_images_and_the_purge_mark(tmp_path):
    board = Board(tmp_path, start=4)
    record = {"step": 5, "kind": "train", "loss": jnp.float32(0.5), "bad": np.float32("nan")}
    board.scalars(record, 5)
    board.image("picture", np.zeros((4, 6, 3), np.uint8), 5)
    board.close()
    events = read_events(tmp_path)
    starts = [event.step for event in events if event.HasField("session_log")]
    assert starts == [5]  # TensorBoard forgets earlier events from here on
    values = {value.tag: (e.step, value) for e in events for value in e.summary.value}
    assert set(values) == {"loss", "picture"}
    assert values["loss"][0] == values["picture"][0] == 5
    assert values["loss"][1].simple_value == 0.5
    image = values["picture"][1].image
    assert (image.height, image.width) == (4, 6)
    assert image.encoded_image_string.startswith(b"\x89PNG")


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_images_per_second_leaves_out_pauses_and_the_compiling_update():
    clock = Clock()
    console = Console(100, 0, 64, stream=io.StringIO(), clock=clock)
    assert np.isnan(console.per_second)
    clock.now += 64
    console.update()
    assert console.per_second == 1.0  # nothing better is known yet
    for _ in range(3):
        clock.now += 2
        console.update()
        assert console.per_second == 32.0
        with console.pause():
            clock.now += 1000
    clock.now += 4
    console.update(samples=32)
    assert console.per_second == (192 + 32) / 10
    with suppress(RuntimeError), console.pause():
        clock.now += 1000
        raise RuntimeError
    clock.now += 4
    console.update(2)
    assert console.per_second == (192 + 32 + 128) / 14


def test_images_per_second_follows_the_recent_updates():
    clock = Clock()
    console = Console(1000, 0, 10, stream=io.StringIO(), clock=clock)
    for seconds in [1] * 50 + [5] * 40:
        clock.now += seconds
        console.update()
    assert console.per_second == 2.0


def test_console_prints_plain_lines_without_a_terminal():
    stream = io.StringIO()
    console = Console(3, stream=stream)
    console.update()
    console.line("one line")
    console.close()
    assert stream.getvalue() == "one line\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_that_goes_away_does_not_end_the_run(terminal):
    class Gone(io.StringIO):
        def isatty(self):
            return terminal

        def write(self, text):
            if self.gone:
                raise OSError(errno.EIO, "Input/output error")
            return super().write(text)

    stream = Gone()
    stream.gone = False
    console = Console(3, stream=stream)
    console.line("one")
    stream.gone = True
    for _ in range(3):
        console.update()
        console.line("two")
    console.close()
    assert "one" in stream.getvalue() and "two" not in stream.getvalue()


def test_console_keeps_its_bar_below_the_lines():
    stream, clock = Terminal(), Clock()
    console = Console(520, 118, 64, stream=stream, clock=clock)
    for _ in range(2):
        clock.now += 2
        console.update()
        console._bar.refresh()
    console.line("one line")
    console.close()
    text = stream.getvalue()
    assert "120/520 updates, 32.0 images/s, 13:20 left" in text
    assert re.search(r"\r *\rone line\n", text), "the bar must be cleared before the line"
    assert "118/520" in text.split("one line")[0]
    assert "120/520" in text.split("one line")[1]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_young_run_is_not_silent_where_there_is_no_bar(terminal):
    stream, clock = Terminal() if terminal else io.StringIO(), Clock()
    console = Console(5000, 0, 8, stream=stream, clock=clock)
    for _ in range(1000):
        clock.now += 1
        console.update()
        console.sign()
    console.close()
    lines = stream.getvalue().splitlines()
    if terminal:
        assert not [line for line in lines if line.startswith("now")]
        return
    assert lines[:2] == ["now       3/5000 | 8.0 images/s", "now       6/5000 | 8.0 images/s"]
    assert len(lines) == 199  # every three seconds for ten minutes, then no more


def test_a_line_is_no_silence():
    stream, clock = io.StringIO(), Clock()
    console = Console(50, stream=stream, clock=clock)
    for _ in range(5):
        clock.now += 2
        console.line("said")
        clock.now += 2
        console.update()
        console.sign()
    assert stream.getvalue() == "said\n" * 5


def test_format_line_of_an_update():
    record = {
        "step": 120,
        "kind": "train",
        "epoch": 9.2,
        "loss": jnp.float32(4.812),
        "loss/box": 2.1,
        "loss/cls": np.float32(1.7),
        "loss/dfl": 1.0,
        "lr": 1.3e-3,
        "grad_norm": 12.3,
        "skipped": np.int32(0),
        "images_per_second": 24.12,
        "fingerprint": "abc",
    }
    assert format_line(120, 520, record) == (
        "update 120/520 | epoch 9.20 | loss 4.812 (box 2.1 cls 1.7 dfl 1) | lr 1.30e-03"
        " | grad norm 12.3 | skipped 0 | 24.1 images/s"
    )


def test_format_line_of_an_evaluation():
    record = {"kind": "eval", "map50": 0.91234, "images": 65, "best": True, "bad": float("nan")}
    record |= {f"ap50/c{i}": i / 10 for i in range(10)}
    assert format_line(5, 520, record) == (
        "eval     5/520 | map50 0.9123 | images 65 | best True | bad nan"
        " | ap50 (c0 0 c1 0.1 c2 0.2 c3 0.3 c4 0.4 c5 0.5 c6 0.6 c7 0.7 and 2 more)"
    )
