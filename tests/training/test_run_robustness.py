"""Runs that meet trouble: nothing learned is lost, and what is said is true.

The network is a stand-in that compiles nothing: what is tested is what happens around it, and
tests/training/test_train.py has the rest.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import tiny_config

from jaxaccum import data, evaluate, train
from jaxaccum.draw import save_image
from jaxaccum.errors import TrainingError
from jaxaccum.metrics.detection import DetectionMetrics
from jaxaccum.tasks.detection import DetectionTask, Evaluator
from jaxaccum.training import checkpoint, inference, restart
from jaxaccum.training import loop as training
from jaxaccum.training.divergence import Divergence
from jaxaccum.training.logs import MetricsFile
from jaxaccum.training.workdir import WorkdirError, locked


def images(folder: Path, label: str = "0 0.5 0.5 0.4 0.4\n", val: str | None = None) -> str:
    """A data set of two training images and one to evaluate on."""
    for split, count in (("train", 2), ("val", 1)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(count):
            save_image(folder / "images" / split / f"{i}.png", data.Scenes("train").image(i))
            text = label if split == "train" or val is None else val
            (folder / "labels" / split / f"{i}.txt").write_text(text)
    path = folder / "data.yaml"
    path.write_text("path: .\ntrain: images/train\nval: images/val\nnames: [car, person]\n")
    return str(path)


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    return images(tmp_path_factory.mktemp("set"))


def short(data_set: str, **changes):
    """4 updates, evaluations after 2 and 4, checkpoints after 2 and 4."""
    return tiny_config(
        **{
            "data.path": data_set, "steps": 4, "eval.every": 2, "checkpoint.every": 2,
            "log.images": 0, "eval.batch": 2,
        }
        | changes
    )  # fmt: skip


class Engine:
    """Updates that compile nothing and depend on all samples and on the state before."""

    share, mesh, gradient, fails = None, None, 1.0, None

    def shardings(self, state):
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda _: one, state)

    def place_state(self, state):
        return jax.device_put(state, self.shardings(state))

    def whole(self, tree):
        return tree

    def update(self, state, batch, steps):
        del steps
        step = int(state.step) + 1
        if self.fails and self.fails[0] == step:
            if self.fails[2]:
                jax.tree.map(lambda a: a.delete(), state)
            raise self.fails[1]
        moved = np.float32(batch["image"].mean() * 1e-3)
        params = jax.tree.map(lambda a: np.asarray(a) * np.float32(0.9) + moved, state.params)
        ema = state.ema and jax.tree.map(lambda a: np.asarray(a) * np.float32(0.5), state.ema)
        state = self.place_state(dataclasses.replace(
            state, params=params, ema=ema, step=np.int32(step), windows=np.int32(step)
        ))  # fmt: skip
        loss = np.float32(self.gradient and 4 / step + float(moved))
        log = {"ok": True, "loss": loss, "grad_norm": self.gradient, "skipped_in_row": 0}
        log |= {"step": step, "windows": step, "samples": len(batch["image"])}
        return state, {name: np.asarray(value) for name, value in log.items()}


def score(self, params, *_):
    """An evaluation of weights that compiles nothing; nan without objects, as the real one."""
    value = float(np.mean([np.mean(np.asarray(a)) for a in jax.tree.leaves(params)])) % 1
    value = value if self.source.report.objects else np.nan
    return DetectionMetrics(self.source.names).compute() | {"map50_95": value, "map50": value}, []


@pytest.fixture(autouse=True, scope="module")
def nothing_compiles():
    with pytest.MonkeyPatch.context() as patch:
        initialise = functools.cache(lambda task: DetectionTask.initialise_(task, 0))
        patch.setattr(DetectionTask, "initialise_", DetectionTask.initialise, raising=False)
        patch.setattr(DetectionTask, "initialise", lambda self, seed=0: initialise(self))
        patch.setattr(training, "make_engine", lambda *_: Engine())
        patch.setattr(Evaluator, "__call__", score)
        yield


@pytest.fixture(scope="module")
def plain(data_set, tmp_path_factory):
    """A run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("plain")
    train.train(short(data_set), workdir)
    return workdir


def records(workdir: Path, kind: str) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def state(workdir: Path) -> list[np.ndarray]:
    with checkpoint.Checkpoints(workdir) as checkpoints:
        tree = checkpoints._last.restore(
            checkpoints.latest,
            args=checkpoint.ocp.args.Composite(tree=checkpoint.ocp.args.StandardRestore()),
        )["tree"]
    return [np.asarray(a) for a in jax.tree.leaves(tree)]


def assert_same(ours: Path, theirs: Path) -> None:
    assert (ours / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()
    assert all(map(np.array_equal, state(ours), state(theirs)))
    assert [p.name for p in (ours / "best").iterdir()] == [
        p.name for p in (theirs / "best").iterdir()
    ]


def failing_update(patch, step: int, error: BaseException, donated: bool = False) -> None:
    """Makes an update fail, before or after it took the state's memory."""
    patch.setattr(Engine, "fails", (step, error, donated))


def scores(patch, values) -> None:
    """Evaluations that give these scores, one after the other."""
    left = iter(values)

    def evaluate(self, *args):
        return {"map50": 0.5, "map50_95": next(left)}, []

    patch.setattr(Evaluator, "__call__", evaluate)


# --- What is the best. ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "best"), [([0.0, 0.0], 4), ([0.2, 0.2], 4), ([0.3, 0.2], 2), ([0.2, 0.3], 4)]
)
def test_of_equal_scores_the_later_is_better(data_set, tmp_path, values, best):
    with pytest.MonkeyPatch.context() as patch:
        scores(patch, values)
        assert train.train(short(data_set), tmp_path)["step"] == best
    assert [p.name for p in (tmp_path / "best").iterdir()] == [str(best)]


def test_the_best_after_an_interruption_is_that_without(data_set, tmp_path):
    """Stopped after the second of three equal evaluations, which no checkpoint was taken with."""
    config = short(data_set, **{"eval.every": 1, "checkpoint.every": 4})
    with pytest.MonkeyPatch.context() as patch:
        scores(patch, [0.1, 0.1, 0.1])
        failing_update(patch, 4, SystemExit())  # of which nothing is saved, as of a kill
        with pytest.raises(SystemExit):
            train.train(config, tmp_path)
    assert [p.name for p in (tmp_path / "best").iterdir()] == ["3"]
    with pytest.MonkeyPatch.context() as patch:
        scores(patch, [0.1, 0.1, 0.1, 0.05])
        assert train.train(config, tmp_path)["step"] == 3


def test_no_objects_in_the_validation_set(tmp_path, capfd):
    """Allowed: the last evaluation counts as the best, and nothing is blamed on predictions."""
    config = short(images(tmp_path / "set", val=""))
    best = train.train(config, tmp_path / "run")
    assert best["step"] == 4 and np.isnan(best["map50_95"])
    said = "".join(capfd.readouterr())
    assert said.count(restart.NO_OBJECTS) == 4  # at the start, two evaluations, the end
    assert "not finite" not in said and "mAP50 nan" not in said
    assert [r["map50_95"] for r in records(tmp_path / "run", "eval")] == [None, None]
    train.train(config, tmp_path / "run")
    assert restart.NO_OBJECTS in capfd.readouterr().out
    assert inference.load(tmp_path / "run").step == 4
    found = evaluate.evaluate(tmp_path / "run")
    assert found["map50_95"] is None
    assert "no objects in the validation set" in capfd.readouterr().out


# --- The end, and after it. ---


def test_a_finished_run_says_so_and_compiles_nothing(data_set, plain, capsys):
    compiled = []

    def count(name: str, *_, **__) -> None:
        if "compile" in name:
            compiled.append(name)

    (kept,) = (plain / "best").iterdir()
    before = {p: p.stat().st_mtime_ns for p in plain.rglob("*") if p.is_file()}
    jax.monitoring.register_event_duration_secs_listener(count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_engine", None)
        best = train.train(short(data_set), plain)
    said = capsys.readouterr()
    assert compiled == []
    assert str(best["step"]) == kept.name
    assert "finished: all 4 updates are done; best: update" in said.out
    assert "raise --config.steps (now 4)" in said.out and "--accept_other_recipe" in said.out
    assert f"--config.init_from={plain}" in said.out
    assert {p: p.stat().st_mtime_ns for p in plain.rglob("*") if p.is_file()} == before


def test_a_run_that_owes_an_evaluation_is_not_finished(data_set, plain, tmp_path):
    calls = []

    def second_fails(*args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("this evaluation fails")
        return score(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "__call__", second_fails)
        with pytest.raises(RuntimeError, match="this evaluation fails"):
            train.train(short(data_set), tmp_path)
    assert checkpoint.newest_complete(tmp_path) == 4  # saved first: an evaluation costs nothing
    train.train(short(data_set), tmp_path)
    assert_same(tmp_path, plain)


# --- Errors in the middle. ---


def test_an_evaluation_that_fails_costs_no_checkpoint(data_set, plain, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        error = data.DataError("val/0.png: cannot be decoded")
        patch.setattr(Evaluator, "__call__", lambda *_: (_ for _ in ()).throw(error))
        with pytest.raises(data.DataError, match="cannot be decoded"):
            train.train(short(data_set), tmp_path)
    assert checkpoint.newest_complete(tmp_path) == 2
    train.train(short(data_set), tmp_path)
    assert_same(tmp_path, plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [data.DataError("0.png: cannot be decoded"), OSError(errno.EIO, "gone"), RuntimeError()],
)
def test_an_error_in_the_middle_saves_what_was_learned(data_set, plain, tmp_path, capsys, error):
    with pytest.MonkeyPatch.context() as patch:
        failing_update(patch, 4, error)
        with pytest.raises(type(error)) as raised:
            train.train(short(data_set), tmp_path)
    assert raised.value is error
    assert checkpoint.newest_complete(tmp_path) == 3
    assert (
        "update 3 was saved, and the same command continues from there" in capsys.readouterr().err
    )
    train.train(short(data_set), tmp_path)
    assert_same(tmp_path, plain)


def test_an_error_of_the_samples_saves_what_was_learned(data_set, plain, tmp_path):
    from jaxaccum.data import TrainStream

    windows = TrainStream.windows

    def three(self, *args, **kwargs):
        made = windows(self, *args, **kwargs)
        for _ in range(3):
            yield next(made)
        raise data.DataError("1.png: the disk went away")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStream, "windows", three)
        with pytest.raises(data.DataError, match="went away"):
            train.train(short(data_set), tmp_path)
    assert checkpoint.newest_complete(tmp_path) == 3
    train.train(short(data_set), tmp_path)
    assert_same(tmp_path, plain)


@pytest.mark.slow
def test_what_is_not_sound_is_not_saved(data_set, plain, tmp_path, capsys):
    for name, error, donated in (
        ("lost", RuntimeError("out of memory"), True),
        ("windows", TrainingError("2 windows in a row"), False),
        ("saving", checkpoint.CheckpointError("the disk is full"), False),
    ):
        with pytest.MonkeyPatch.context() as patch:
            failing_update(patch, 4, error, donated)
            with pytest.raises(type(error), match=str(error)):
                train.train(short(data_set), tmp_path / name)
        assert checkpoint.newest_complete(tmp_path / name) == 2
        assert "was saved" not in capsys.readouterr().err
        train.train(short(data_set), tmp_path / name)
        assert_same(tmp_path / name, plain)


def test_a_log_that_cannot_be_written_ends_the_run_without_a_gap(data_set, plain, tmp_path):
    write = MetricsFile.write

    def full(self, record):
        if record["step"] == 3:
            raise WorkdirError("metrics.jsonl: the disk is full")
        write(self, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsFile, "write", full)
        with pytest.raises(WorkdirError, match="disk is full"):
            train.train(short(data_set), tmp_path)
    assert checkpoint.newest_complete(tmp_path) == 2  # a line is missing after it
    train.train(short(data_set), tmp_path)
    assert_same(tmp_path, plain)


def test_errors_that_could_not_be_saved_either_are_the_first_one(data_set, tmp_path, capsys):
    save = checkpoint.Checkpoints.save

    def fails(self, step, *args):
        if step == 3:
            raise checkpoint.CheckpointError("the disk is full")
        save(self, step, *args)

    with pytest.MonkeyPatch.context() as patch:
        failing_update(patch, 4, OSError(errno.EIO, "gone"))
        patch.setattr(checkpoint.Checkpoints, "save", fails)
        with pytest.raises(OSError, match="gone"):
            train.train(short(data_set), tmp_path)
    assert "what came after update 2 is lost (the disk is full)" in capsys.readouterr().err


# --- Workdirs. ---


def test_a_second_training_is_refused(data_set, tmp_path):
    with locked(tmp_path), pytest.raises(WorkdirError, match=f"process {os.getpid()} on"):
        train.train(short(data_set), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run [1]", "a*b/c?d", "back\\slash", "host:1", "ü ‧ 中 100%#"])
def test_workdirs_of_any_name_work_for_every_verb(data_set, plain, tmp_path, name):
    workdir = tmp_path / name
    with pytest.MonkeyPatch.context() as patch:
        failing_update(patch, 4, RuntimeError())
        with pytest.raises(RuntimeError):
            train.train(short(data_set), workdir)
    train.train(short(data_set), workdir)
    assert_same(workdir, plain)
    assert inference.load(workdir).step == inference.load(plain).step
    assert evaluate.evaluate(workdir)["map50_95"] == evaluate.evaluate(plain)["map50_95"] > 0


def test_lines_of_the_log_that_are_no_records_are_left_out(data_set, plain, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        failing_update(patch, 4, RuntimeError())
        with pytest.raises(RuntimeError):
            train.train(short(data_set), tmp_path)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"\n", b"\xff\x00garbage\n", *lines[1:], b"\n"]))
    train.train(short(data_set), tmp_path)
    said = capsys.readouterr().out
    assert "left out 2 lines that are no records (line 2: b''; line 3: b'\\xff" in said
    assert_same(tmp_path, plain)


# --- Data that changes, and runs that diverge. ---


def test_pixels_that_change_are_said(data_set, tmp_path, monkeypatch, capsys):
    now = {"train": "2 files, a, b", "val": "1 files, c, d"}
    opened: list = []

    def signature(source):
        opened.append(source)
        return now["train" if len(source) == 2 else "val"]

    monkeypatch.setattr(training, "signature", signature)
    with pytest.MonkeyPatch.context() as patch:
        failing_update(patch, 4, RuntimeError())
        with pytest.raises(RuntimeError):
            train.train(short(data_set), tmp_path)
    assert "set:" not in capsys.readouterr().out
    now["train"] = "2 files, x, y"
    monkeypatch.setattr(restart.check, "changed_files", lambda s: ["1.png"] * (len(s) == 2))
    train.train(short(data_set), tmp_path)
    said = capsys.readouterr().out
    assert "note: train set: files have changed since" in said and "note: val set" not in said
    assert "note: train set: 1 files were changed while the run learned from them: 1.png" in said


def test_a_dead_network_is_said_and_is_an_error_at_the_end(data_set, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(Engine, "gradient", 0.0)
    with pytest.raises(TrainingError, match=r"the run has diverged: .*Lower lr\.base"):
        train.train(short(data_set), tmp_path)
    assert checkpoint.newest_complete(tmp_path) == 4
    assert capfd.readouterr().err.count("the run has diverged") == 2  # at both evaluations
    train.train(short(data_set), tmp_path)
    said = capfd.readouterr().out
    assert "finished" in said and "the run has diverged" in said


def test_what_counts_as_diverged():
    def told(*updates):
        divergence = Divergence()
        for update in updates:
            divergence.add(*update)
        assert str(Divergence(divergence.state)) == str(divergence)
        return str(divergence)

    assert told() == ""
    dead = [(1e-18, 1e-17)] * 10  # as a detector at a learning rate of 100
    assert "in the last 10 updates the gradient vanished" in told((4.0, 1.0), *dead)
    assert "vanished" in told(*[(0.0, 0.0)] * 20)
    assert told((5.0, 1.0), *dead[:9]) == ""  # samples without objects, perhaps
    assert told((4.0, 1.0), *dead, (1.0, 0.1)) == ""
    assert "over 100 times" in told((4.0, 1.0), *[(500.0, 9.0)] * 10)
    assert " or the loss" in told((4.0, 1.0), *dead[:5], *[(500.0, 9.0)] * 5)
    assert told((4.0, 1.0), *[(500.0, 9.0)] * 9, (300.0, 1.0)) == ""
    assert told((-1.0, 1.0), *[(3.0, 1.0)] * 10) == ""
    assert told(*[(4.0 / n, 1.0 / n) for n in range(1, 100)]) == ""
