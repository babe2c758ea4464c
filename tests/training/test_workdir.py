"""Workdirs: what can be one, and that two trainings do not share one."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxaccum.training import workdir as workdirs
from jaxaccum.training.workdir import WorkdirError, locked, why_not_written

ROOT = Path(__file__).parents[2]


def another(folder: Path) -> subprocess.Popen:
    """A process that trains in a folder for as long as it lives."""
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from jaxaccum.training.workdir import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    print('in', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "in\n"
    return process


def test_the_second_is_told_who_is_there_and_a_killed_one_is_recovered_at_once(tmp_path, capsys):
    folder = tmp_path / "runs" / "mine"
    process = another(folder)
    try:
        with (
            pytest.raises(WorkdirError, match=rf"process {process.pid} on .*, since 20\d\d-.*Wait"),
            locked(folder),
        ):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (folder / "lock").exists()
        with locked(folder):
            assert json.loads((folder / "lock").read_text())["process"] == os.getpid()
    finally:
        process.kill()
    assert capsys.readouterr().out == ""  # there was nothing to wait for


def test_a_folder_that_was_made_for_nothing_is_not_left(tmp_path):
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / "lock").exists()
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "a"):
        (tmp_path / "a" / "metrics.jsonl").touch()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize("system_lock", [True, False])
def test_the_lock_of_another_machine_is_watched(tmp_path, monkeypatch, capsys, alive, system_lock):
    """A shared file system may know nothing of the other's lock, so its signs of life decide."""
    monkeypatch.setattr(workdirs, "BEAT", 0.05)
    told = {"process": 7, "host": "elsewhere", "since": "2026-01-02", "machine": "another"}
    path = tmp_path / "lock"
    path.write_text(json.dumps(told))
    if not system_lock:

        def unknown(*_):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        monkeypatch.setattr(workdirs.fcntl, "flock", unknown)
    if alive:
        sleep = workdirs.time.sleep
        monkeypatch.setattr(workdirs.time, "sleep", lambda s: (sleep(s), os.utime(path)))
        with pytest.raises(WorkdirError, match="process 7 on elsewhere"), locked(tmp_path):
            pass
        assert json.loads(path.read_text()) == told
    else:
        with locked(tmp_path):
            assert json.loads(path.read_text())["process"] == os.getpid()
        assert "no sign of life" in capsys.readouterr().out


def test_a_training_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(workdirs, "BEAT", 0.01)
    with locked(tmp_path):
        os.utime(tmp_path / "lock", (1, 1))
        for _ in range(200):
            if (tmp_path / "lock").stat().st_mtime > 1:
                break
            workdirs.time.sleep(0.01)
        assert (tmp_path / "lock").stat().st_mtime > 1


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\xff\xfe", "[" * 100_000])
def test_a_damaged_lock_is_nobodys(tmp_path, text):
    (tmp_path / "lock").write_text(text, encoding="latin-1")
    with locked(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()


def below_a_file(folder):
    (folder / "file").touch()
    return folder / "file" / "a" / "b", "file is a file, not a folder"


def a_file(folder):
    (folder / "file").touch()
    return folder / "file", "file is a file, not a folder"


def a_dead_link(folder):
    (folder / "link").symlink_to(folder / "nothing")
    return folder / "link" / "a", "link is a link that leads nowhere"


def a_name_too_long(folder):
    return folder / ("x" * 300), "File name too long"


def with_a_nul(folder):
    return folder / "a\0b", "cannot hold a NUL"


def a_bucket(folder):
    return Path("gs://bucket/run"), "gs:/bucket/run: that is an address"


def an_s3_bucket(folder):
    return Path("s3://bucket/run"), "that is an address"


def metrics_in_a_folder(folder):
    (folder / "metrics.jsonl").mkdir()
    return folder, "metrics.jsonl in it is not a file"


def a_file_for_checkpoints(folder):
    (folder / "last").touch()
    return folder, "last in it is not a folder"


def a_pipe_for_metrics(folder):
    os.mkfifo(folder / "metrics.jsonl")
    return folder, "metrics.jsonl in it is not a file"


@pytest.mark.parametrize(
    "make",
    [below_a_file, a_file, a_dead_link, a_name_too_long, with_a_nul, a_bucket, an_s3_bucket,
     metrics_in_a_folder, a_file_for_checkpoints, a_pipe_for_metrics],
)  # fmt: skip
def test_what_cannot_be_a_workdir_is_refused(tmp_path, make):
    folder, words = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(WorkdirError, match=words) as refused, locked(folder):
        pass
    assert str(refused.value).startswith("--workdir=")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EROFS, "the file system is read-only"), (errno.EACCES, "no right to write there"),
     (errno.EIO, "Input/output error")],
)  # fmt: skip
@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_disks_that_cannot_be_written(tmp_path, monkeypatch, number, words, call):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(WorkdirError, match=words), locked(tmp_path / "new"):
        pass


def test_reasons_are_true(tmp_path):
    def why(number, text=None):
        error = RuntimeError(text) if text else OSError(number, os.strerror(number))
        return " ".join(why_not_written(error, tmp_path, 1 << 60))

    assert "MiB free) Free some space" in why(errno.ENOSPC)
    library = "RESOURCE_EXHAUSTED: Error writing ... [OS error 28: ENOSPC No space left on device]"
    assert "the disk is full" in why(0, library)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, words in ((old[0], "larger than"), (1 << 40, "may be (1,099,511,627,776 bytes)")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        try:
            for text in (None, "UNKNOWN: ... [OS error 27: EFBIG File too large]"):
                said = why(errno.EFBIG, text)
                assert words in said and "full" not in said and "space" not in said
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "quota" in why(errno.EDQUOT)
    assert "read-only" in why(errno.EROFS)
