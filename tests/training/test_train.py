"""Runs from end to end: learning, resuming, refusing, and being killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from tiny import predicted, tiny_config

from jaxaccum import config as configs
from jaxaccum import data, evaluate, fields, train
from jaxaccum.accumulate import Recipe
from jaxaccum.errors import TrainingError
from jaxaccum.metrics import detection as detection_metrics
from jaxaccum.tasks.detection.evaluator import Evaluator
from jaxaccum.training import checkpoint, inference, preemption, restart, run
from jaxaccum.training import loop as training
from jaxaccum.training.cadence import Cadence
from jaxaccum.weights import initial
from jaxaccum.weights import transfer as weights_module

ROOT = Path(__file__).parents[2]


def records(workdir: Path, kind: str = "train") -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def weights(workdir: Path) -> list[np.ndarray]:
    with checkpoint.Checkpoints(workdir) as checkpoints:
        manager, step = checkpoints._last, checkpoints.latest
        tree = manager.restore(
            step, args=checkpoint.ocp.args.Composite(tree=checkpoint.ocp.args.StandardRestore())
        )["tree"]
    return [np.asarray(a) for a in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    train.train(tiny_config(**{"log.tensorboard": True}), workdir)
    return workdir


def test_a_run_logs_every_update_and_evaluation(trained):
    logged = records(trained)
    assert [r["step"] for r in logged] == list(range(1, 13))
    assert {r["samples"] for r in logged} == {4}
    assert all(r["loss"] == pytest.approx(r["loss/box"] + r["loss/cls"] + r["loss/dfl"], rel=1e-5)
               for r in logged)  # fmt: skip
    assert all(np.isfinite(r["loss"]) and r["skipped"] == 0 for r in logged)
    evaluations = records(trained, "eval")
    assert [r["step"] for r in evaluations] == [6, 12]
    assert {"map50", "map50_95", "ap50/car"} <= set(evaluations[0])
    assert len({r["fingerprint"] for r in logged + evaluations}) == 1
    assert list((trained / "events").iterdir())


def test_evaluate_repeats_the_runs_own_evaluation(trained):
    result = evaluate.evaluate(trained)
    best = max(records(trained, "eval"), key=lambda r: r["map50_95"])
    assert result["map50_95"] == pytest.approx(best["map50_95"], abs=1e-6)
    assert result["images"] == 256
    json.dumps(result, allow_nan=False)


@pytest.mark.slow
def test_evaluate_takes_the_json_of_the_images_to_evaluate_on(trained, tmp_path):
    """It looked for that of another split beside it, and had no flag to be told."""
    scenes, rows, boxes = data.Scenes("val", size=64), [], []
    for i in range(5):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(scenes.image(i)).save(tmp_path / "images" / f"{i}.png")
        rows.append({"id": i, "file_name": f"{i}.png"})
        for (x1, y1, x2, y2), c in zip(scenes.objects(i).boxes.tolist(), scenes.objects(i).classes,
                                       strict=True):  # fmt: skip
            box = [x1, y1, x2 - x1, y2 - y1]
            boxes.append({"id": len(boxes), "image_id": i, "category_id": int(c), "bbox": box})
    names = [{"id": c, "name": name} for c, name in enumerate(scenes.names)]
    file = tmp_path / "labels.json"
    file.write_text(json.dumps({"images": rows, "annotations": boxes, "categories": names}))
    found = evaluate.evaluate(trained, str(file))
    assert (found["images"], found["objects"]) == (5, len(boxes))
    with pytest.raises(configs.ConfigError, match="--split=test: the json given is that of the"):
        evaluate.evaluate(trained, str(file), split="test")
    with pytest.raises(data.DataError, match="embedded scenes: split is 'test', expected 'train'"):
        evaluate.evaluate(trained, split="test")


def test_evaluation_does_not_depend_on_the_batch(trained):
    from jaxaccum.tasks.detection import Evaluator

    found = inference.load(trained)
    source = data.Scenes("val", length=10)
    results = []
    for batch in (4, 10):
        found.config.eval.batch = batch
        results.append(
            Evaluator(found.task, source, found.config.eval)(found.params, found.stats)[0]
        )
    assert results[0]["images"] == 10
    assert results[0]["map50_95"] == pytest.approx(results[1]["map50_95"], abs=1e-5)


@pytest.mark.slow
def test_precise_statistics_are_of_the_data_alone(trained):
    from jaxaccum.training.precise_bn import recompute_statistics

    found = inference.load(trained)
    source = data.Scenes("train", length=8)
    this = run.prepare(found.config, names=found.names, samples=8, identity={})
    others = jax.tree.map(lambda a: a * 3 + 1, found.stats)
    ours, theirs = (
        recompute_statistics(
            this, found.params, stats, run.make_stream(this, source, plain=True), 8
        )
        for stats in (found.stats, others)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4)
    assert evaluate.evaluate(trained, precise_bn=8)["images"] == 256


def test_predict_draws_and_writes(trained, tmp_path):
    from jaxaccum.draw import save_image

    source = tmp_path / "images"
    source.mkdir()
    for i in range(2):
        save_image(source / f"{i}.png", data.Scenes("val").image(i))
    (source / "broken.jpg").write_bytes(b"not an image")
    results = predicted(inference.load(trained), source, tmp_path / "out", conf=0.001)
    assert [r["file"] for r in results] == ["0.png", "1.png"]
    assert (tmp_path / "out" / "detections.json").is_file()
    for result in results:
        for found in result["detections"]:
            x1, y1, x2, y2 = found["box"]
            assert 0 <= x1 < x2 <= result["width"] and 0 <= y1 < y2 <= result["height"]
    assert (tmp_path / "out" / "1.png").stat().st_size > 1000
    with pytest.raises(data.DataError, match="neither a file nor a folder"):
        predicted(inference.load(trained), tmp_path / "nothing", tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(data.DataError, match="holds nothing to use"):
        predicted(inference.load(trained), empty, tmp_path / "out")


def test_a_workdir_without_weights(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="no trained weights"):
        evaluate.evaluate(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"microbatch": 4}, marks=pytest.mark.long), {"devices": 2},
        {"engine": "multisteps"}, {"microbatch": 4, "devices": 2}, {"data.workers": 1},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.slow
def test_the_log_does_not_show_the_geometry(trained, tmp_path, changes):
    train.train(tiny_config(**changes), tmp_path)
    for ours, theirs in zip(records(tmp_path), records(trained), strict=True):
        assert ours["fingerprint"] == theirs["fingerprint"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), ours["step"]


def test_auto_keeps_the_dtype_that_the_run_began_with(tmp_path, capsys):
    """On a device of bfloat16, and continued on this one, which would take float32."""
    changes = {"steps": 2, "eval.every": -1, "checkpoint.every": 1, "log.report": False}
    with pytest.MonkeyPatch.context() as patch:
        for module in (configs, fields):
            patch.setattr(module, "best_dtype", lambda device: "bfloat16")
        train.train(tiny_config(**changes), tmp_path)
    assert "dtype auto: bfloat16 (cpu)" in capsys.readouterr().out
    train.train(tiny_config(**changes | {"steps": 2, "epochs": 1.0}), tmp_path)  # is finished
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        meta = checkpoints.meta()
    assert meta["recipe"]["dtype"] == meta["config"]["dtype"] == "bfloat16"
    said = capsys.readouterr().out
    assert f"dtype auto: bfloat16, as the run in {tmp_path} began (here: float32)" in said
    with pytest.raises(checkpoint.CheckpointError, match="dtype: checkpoint 'bfloat16', config"):
        train.train(tiny_config(dtype="float32", **changes), tmp_path)
    loaded = inference.load(tmp_path)
    assert loaded.config.dtype == "bfloat16" and loaded.task.model.dtype == np.float32
    assert "computed in float32, trained in bfloat16" in capsys.readouterr().err


def test_the_dtype_of_a_run_whose_newest_state_is_damaged(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
        for step, dtype in ((1, "float32"), (2, "bfloat16"), (3, "bfloat16")):
            meta = {"recipe": {"dtype": dtype}}
            checkpoints.save(step, {"a": np.zeros(2, np.float32)}, meta)
    assert restart.kept_dtype(tmp_path / "none") is None
    for path in (tmp_path / "last" / "3" / "meta").iterdir():
        path.write_bytes(b"")
    assert restart.kept_dtype(tmp_path) == "bfloat16"
    for path in (tmp_path / "last" / "2" / "meta").iterdir():
        path.unlink()
    assert restart.kept_dtype(tmp_path) == "float32"


@pytest.mark.parametrize("own", ["auto", "float32", "bfloat16"])
def test_every_process_asks_for_the_dtype_of_the_first(tmp_path, own):
    """Also one that was told another, or those that ask would wait for it."""
    asked = []

    class Second:
        first = False

        def from_first(self, name, value):
            asked.append(name)
            return "bfloat16"

    config = training._with_dtype(tiny_config(dtype=own), tmp_path, Second())
    assert asked == ["dtype"] and config.dtype == ("bfloat16" if own == "auto" else own)


def test_weights_of_another_dtype_leave_the_precision_alone(tmp_path, monkeypatch):
    """Of products: it is of the process, and of the run that starts from them."""
    run.compute_dtype(tiny_config(dtype="bfloat16"))
    monkeypatch.setattr(initial, "load", lambda path, computes: pytest.fail(str(computes)))
    with pytest.raises(pytest.fail.Exception, match="False"):
        initial.read(tmp_path)
    assert jax.config.jax_default_matmul_precision is None


def test_a_resumed_run_is_the_uninterrupted_one(trained, tmp_path):
    """Stopped by an error after update 8 (the newest checkpoint is of 6), and started again."""
    config, calls = tiny_config(), 0
    plain = training.make_engine

    def failing(*args):
        engine = plain(*args)
        update = engine.update

        def counted(*args):
            nonlocal calls
            calls += 1
            if calls == 9:
                raise KeyboardInterrupt
            return update(*args)

        engine.update = counted
        return engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_engine", failing)
        with pytest.raises(KeyboardInterrupt):
            train.train(config, tmp_path)
    train.train(config, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()
    assert all(map(np.array_equal, weights(tmp_path), weights(trained)))


def _terminate_in(patch, where: str, call: int) -> None:
    """Sends this process a SIGTERM in the middle of an update, an evaluation or a save."""
    from jaxaccum.tasks.detection import Evaluator

    calls = 0

    def terminating(plain):
        def method(*args):
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGTERM)
                if where == "evaluation":  # it is abandoned, so there is no end to wait for
                    time.sleep(60)
            return plain(*args)

        return method

    if where == "evaluation":
        patch.setattr(Evaluator, "__call__", terminating(Evaluator.__call__))
    elif where == "save":
        patch.setattr(checkpoint.Checkpoints, "save", terminating(checkpoint.Checkpoints.save))
    else:
        make_engine = training.make_engine

        def make(*args):
            engine = make_engine(*args)
            engine.update = terminating(engine.update)
            return engine

        patch.setattr(training, "make_engine", make)


@pytest.mark.parametrize(
    ("where", "call", "kept"),
    [
        ("evaluation", 1, 6),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("update", 6, 6),  # the evaluation after it is due, and left to the next start
                ("evaluation", 2, 12),
                ("save", 2, 6),  # before the evaluation of the same update, which is made up for
            ]
        ),
        *(
            pytest.param(*case, marks=[pytest.mark.slow, pytest.mark.long])
            for case in [("update", 1, 1), ("update", 8, 8), ("save", 1, 3)]
        ),
    ],
)
def test_sigterm_keeps_the_update_under_way(trained, tmp_path, capsys, where, call, kept):
    config = tiny_config()
    with pytest.MonkeyPatch.context() as patch:
        _terminate_in(patch, where, call)
        with pytest.raises(preemption.Preempted) as stopped:
            train.train(config, tmp_path)
    assert stopped.value.code == preemption.TRY_AGAIN == 75
    assert checkpoint.newest_complete(tmp_path) == kept
    assert f"stopped by SIGTERM: update {kept} is kept" in capsys.readouterr().err
    evaluated = [r["step"] for r in records(tmp_path, "eval")]
    assert evaluated == ([6] if (where, call) in (("evaluation", 2), ("update", 8)) else [])
    train.train(config, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()
    assert all(map(np.array_equal, weights(tmp_path), weights(trained)))
    assert [p.name for p in (tmp_path / "best").iterdir()] == [
        p.name for p in (trained / "best").iterdir()
    ]


@pytest.mark.slow
def test_killed_between_a_made_up_evaluation_and_the_next_checkpoint(trained, tmp_path):
    """The evaluation was left to the second start, which was killed after it: no second line."""
    config = tiny_config()
    for where, call in (("evaluation", 1), ("update", 1)):
        with pytest.MonkeyPatch.context() as patch:
            _terminate_in(patch, where, call)
            if where == "update":
                patch.setattr(checkpoint.Checkpoints, "save", lambda *args: None)
            with pytest.raises(preemption.Preempted):
                train.train(config, tmp_path)
    assert checkpoint.newest_complete(tmp_path) == 6
    train.train(config, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_a_broken_checkpoint_is_put_aside_and_the_run_goes_on(trained, tmp_path, capsys):
    import shutil

    shutil.copytree(trained, tmp_path / "w")
    (tmp_path / "w" / "last" / "12" / "tree" / "manifest.ocdbt").unlink()
    train.train(tiny_config(), tmp_path / "w")
    said = capsys.readouterr().out
    assert "last/12" in said and "manifest.ocdbt is missing" in said and "update 9 instead" in said
    ours, theirs = (w / "metrics.jsonl" for w in (tmp_path / "w", trained))
    assert ours.read_bytes() == theirs.read_bytes()
    assert all(map(np.array_equal, weights(tmp_path / "w"), weights(trained)))
    assert [p.name for p in (tmp_path / "w" / "broken").iterdir()] == ["last-12"]


@pytest.mark.slow
def test_another_recipe_is_refused(trained):
    with pytest.raises(
        checkpoint.CheckpointError, match=r"(?s)lr\.base: checkpoint 0\.001, config"
    ):
        train.train(tiny_config(**{"lr.base": 0.02}), trained)


@pytest.mark.slow
def test_another_recipe_if_the_user_insists(trained, tmp_path):
    import shutil

    shutil.copytree(trained, tmp_path / "copy")
    train.train(tiny_config(**{"lr.base": 0.02, "steps": 13}), tmp_path / "copy", True)
    assert records(tmp_path / "copy")[-1]["step"] == 13


@pytest.mark.slow
def test_fine_tuning_from_a_workdir(trained, tmp_path, capsys):
    """Other classes: what fits is loaded, the class branch goes by name, and it is said."""
    path = yolo_folder(tmp_path / "set", "0 0.5 0.5 0.2 0.2\n")
    path.write_text(path.read_text().replace("[cat, dog]", "[car, dog]"))
    config = tiny_config(**{"data.path": str(path), "init_from": str(trained), "steps": 1})
    train.train(config, tmp_path / "w")
    said = capsys.readouterr().out
    assert "loaded" in said and "car" in said
    train.train(config, tmp_path / "w")  # the same weights: the same recipe
    with pytest.raises(checkpoint.CheckpointError, match=r"data\.init"):
        train.train(tiny_config(**{"data.path": str(path), "steps": 1}), tmp_path / "w")
    with pytest.raises(weights_module.WeightsError, match="neither a file nor a workdir"):
        train.train(tiny_config(init_from=str(tmp_path / "none.pt")), tmp_path / "w2")


@pytest.mark.slow
def test_windows_that_are_not_finite_stop_the_run_and_name_the_samples(tmp_path):
    config = tiny_config(**{"lr.base": 1e30, "max_skipped": 2, "optimizer.clip": 0.0,
                            "eval.every": -1, "checkpoint.every": -1})  # fmt: skip
    with pytest.raises(TrainingError, match=r"2 windows in a row.*samples \[\d+.*scene"):
        train.train(config, tmp_path)


@pytest.mark.slow
def test_compat_is_another_recipe_and_trains(tmp_path):
    config = tiny_config(compat=True, nbs=8, steps=6, **{"lr.warmup_epochs": 0.02})
    train.train(config, tmp_path)
    samples = [r["samples"] for r in records(tmp_path)]
    assert samples[0] < samples[-1] == 8  # the number of microbatches ramps up


@pytest.mark.slow
def test_a_full_disk_says_so(tmp_path, monkeypatch):
    import collections

    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage(100, 99, 1))
    with pytest.raises(checkpoint.CheckpointError, match=r"disk is full.*Last complete.*none"):
        train.train(tiny_config(), tmp_path)


@pytest.mark.slow
def test_a_disk_that_fills_up_during_a_save(tmp_path):
    """A real write error in the middle of an asynchronous save, through a file size limit."""
    # What was raised goes to a file: threads that are cut short write to stderr at the same time.
    program = (
        "import resource, signal, sys; sys.path[:0] = ['tests', '.']\n"
        "from pathlib import Path\n"
        "from tiny import tiny_config\n"
        "from jaxaccum import train\nfrom jaxaccum.training import checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "config = tiny_config(**{'log.every': 100, 'eval.every': -1})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try:\n"
        f"    train.train(config, Path({str(tmp_path / 'w')!r}))\n"
        "except checkpoint.CheckpointError as error:\n"
        f"    Path({str(tmp_path / 'said')!r}).write_text(str(error))\n"
        "    raise\n"
    )
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert (tmp_path / "said").exists(), done.stderr[-3000:]
    said = (tmp_path / "said").read_text()
    assert said.startswith("cannot save a checkpoint"), said
    assert "Last complete checkpoint: none" in said
    assert not [p for p in (tmp_path / "w" / "last").iterdir() if p.name.isdigit()]


# --- Bad input, as a user meets it. ---


def yolo_folder(folder: Path, label: str) -> Path:
    from jaxaccum.draw import save_image

    for split in ("train", "val"):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
        save_image(folder / "images" / split / "a.png", data.Scenes("train").image(0))
        (folder / "labels" / split / "a.txt").write_text(label)
    path = folder / "data.yaml"
    path.write_text("path: .\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n")
    return path


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("0 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.2\n", ["a.txt", "line 2", "5"]),
        ("7 0.5 0.5 0.2 0.2\n", ["a.txt", "line 1", "7"]),
    ],
)
def test_bad_labels_are_named(tmp_path, label, words):
    path = yolo_folder(tmp_path / "set", label)
    with pytest.raises(data.DataError) as error:
        train.train(tiny_config(**{"data.path": str(path)}), tmp_path / "w")
    text = str(error.value)
    assert words[0] in text and words[2] in text
    assert words[1] in text or f":{words[1].split()[1]}" in text


@pytest.mark.slow
def test_bad_labels_can_be_skipped_and_are_counted(tmp_path, capsys):
    path = yolo_folder(tmp_path / "set", "0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "set" / "labels" / "train" / "b.txt").write_text("9 0.5 0.5 0.2 0.2\n")
    image = tmp_path / "set" / "images" / "train" / "a.png"
    (image.parent / "b.png").write_bytes(image.read_bytes())
    train.train(
        tiny_config(**{"data.path": str(path), "data.on_error": "skip", "steps": 1}), tmp_path / "w"
    )
    assert "skipped 1 x" in capsys.readouterr().out


def test_command_line_errors_are_clear(tmp_path):
    def command(module, *arguments):
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True
        )
        return done.returncode, done.stderr + done.stdout

    code, text = command("jaxaccum.train", "--config=configs/quickstart.py", "--config.nsb=8")
    assert code != 0 and 'Did you mean "nbs"' in text
    code, text = command(
        "jaxaccum.train", "--config=configs/quickstart.py", "--config.microbatch=6",
        f"--workdir={tmp_path}",
    )  # fmt: skip
    assert code == 1 and "take 2 or 4 or a multiple of 8" in text and "Traceback" not in text
    code, text = command("jaxaccum.evaluate", f"--workdir={tmp_path / 'none'}")
    assert code == 1 and "no such folder" in text and "Traceback" not in text


# --- kill -9 ---


@pytest.mark.slow
@pytest.mark.long
def test_killed_at_random_the_run_is_the_uninterrupted_one(tmp_path):
    def start(workdir):
        return subprocess.Popen(
            [sys.executable, "tests/tiny.py", str(workdir)], cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    rng, kills = random.Random(int(os.environ.get("KILL_SEED", "0"))), 0
    while kills < 6:
        process = start(killed)
        # Wait for the run to do something, then a random moment: in updates, saves, evaluations.
        before = _progress(killed)
        while process.poll() is None and _progress(killed) == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.7))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 3
    assert start(killed).wait() == 0
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    ours, theirs = weights(killed), weights(whole)
    assert len(ours) == len(theirs) > 10
    assert all(map(np.array_equal, ours, theirs))


@pytest.mark.slow
def test_sigterm_to_the_group_ends_loader_processes_quietly(tmp_path):
    """As Slurm sends it: the loader's processes get the signal, too."""
    program = (
        "import sys; sys.path[:0] = ['tests', '.']\n"
        "from pathlib import Path\n"
        "from tiny import tiny_config\n"
        "from jaxaccum import train\nfrom jaxaccum.training import run\n"
        "if __name__ == '__main__':\n"
        "    run.use_compilation_cache()\n"
        "    config = tiny_config(**{'steps': 4000, 'eval.every': -1, 'data.workers': 2})\n"
        f"    train.train(config, Path({str(tmp_path)!r}))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    log = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 3):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "Traceback" not in said
    kept = checkpoint.newest_complete(tmp_path)
    assert kept and kept == records(tmp_path)[-1]["step"]
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


@pytest.mark.slow
def test_sigterm_during_a_compilation_ends_the_command_after_the_grace(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxaccum.train", "--config=configs/quickstart.py",
         "--config.checkpoint.grace=0.5", f"--workdir={tmp_path}"],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": ""},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr
    for line in process.stderr:
        if "compiling the update: 4 s" in line:  # samples came first
            break
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "not done within checkpoint.grace=0.5 s): no update is kept yet" in said


def _progress(workdir: Path):
    last = workdir / "last"
    names = sorted(p.name for p in last.iterdir()) if last.is_dir() else []
    log = workdir / "metrics.jsonl"
    return names, log.stat().st_size if log.exists() else 0


def test_recipe_differences_name_what_is_missing():
    assert Recipe(4, 2, {"a": {"b": 1}}).differences({"nbs": 4, "bn_group": 2}) == {
        "a.b": (None, 1)
    }


@pytest.mark.slow
def test_a_line_has_the_mean_of_its_updates(tmp_path, capfd):
    """One update's loss, of few samples, says little; metrics.jsonl has it."""
    train.train(tiny_config(**{"log.every": 5, "steps": 10}), tmp_path / "five")
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("update")]
    train.train(tiny_config(steps=10), tmp_path / "each")
    each = [json.loads(line) for line in (tmp_path / "each" / "metrics.jsonl").open()]
    losses = [r["loss"] for r in each if r["kind"] == "train"]
    told = [float(line.split("loss ")[1].split()[0]) for line in said]
    assert told == pytest.approx([np.mean(losses[:5]), np.mean(losses[5:])], rel=1e-3)
    assert all(" | mean loss " in line and len(line) < 130 for line in said)
    five = [json.loads(line) for line in (tmp_path / "five" / "metrics.jsonl").open()]
    assert [r["loss"] for r in five if r["kind"] == "train"] == [losses[4], losses[9]]


def scored(monkeypatch, values):
    """Evaluations that give these scores, one after the other."""
    left = iter(values)
    monkeypatch.setattr(
        Evaluator, "__call__",
        lambda self, *_: ({"map50_95": next(left), "map50": 0.5, "images": 1, "objects": 1}, []),
    )  # fmt: skip


@pytest.mark.parametrize(
    "geometry",
    [
        {},
        pytest.param({"devices": 2}, marks=pytest.mark.slow),
        *(
            pytest.param(geometry, marks=[pytest.mark.slow, pytest.mark.long])
            for geometry in ({"engine": "multisteps"}, {"microbatch": 4})
        ),
    ],
    ids=str,
)
def test_patience_ends_a_run_and_a_new_start_knows_it(tmp_path, monkeypatch, capfd, geometry):
    """After the same update on every geometry."""
    changes = {"eval.every": 2, "eval.patience": 2, "checkpoint.every": 5, **geometry}
    scored(monkeypatch, [0.1, 0.3, 0.2, 0.2])
    best = train.train(tiny_config(**changes), tmp_path)
    assert best["step"] == 4 and checkpoint.newest_complete(tmp_path) == 8
    said = capfd.readouterr()
    assert "stopped early: 2 evaluations were no better than that of update 4" in said.err
    assert train.train(tiny_config(**changes), tmp_path) == best  # without any evaluation
    assert "finished: stopped at update 8 of 12, as 2 evaluations" in capfd.readouterr().out
    scored(monkeypatch, [0.4, 0.3])  # of updates 10 and 12
    assert train.train(tiny_config(**changes | {"eval.patience": 3}), tmp_path)["step"] == 10
    assert "continuing from update 8" in capfd.readouterr().out
    assert checkpoint.newest_complete(tmp_path) == 12


def test_patience_survives_a_stop(tmp_path, monkeypatch):
    """Evaluations before a stop count: it ends where it would have ended."""
    changes = {"eval.every": 2, "eval.patience": 2, "checkpoint.every": 3}
    scored(monkeypatch, [0.3, 0.2])
    short = tiny_config(**changes | {"steps": 12})

    def stop(record):
        if record["step"] == 5:
            raise RuntimeError("a stop")

    with pytest.raises(RuntimeError, match="a stop"):
        train.train(short, tmp_path, watch=stop)
    scored(monkeypatch, [0.2])
    assert train.train(short, tmp_path)["step"] == 2
    assert checkpoint.newest_complete(tmp_path) == 6


def test_every_in_epochs(tmp_path):
    config = tiny_config(**{"eval.every": 0, "eval.every_epochs": 0.5, "checkpoint.every": 0,
                            "checkpoint.every_epochs": 2.0, "nbs": 64, "steps": 300})  # fmt: skip
    this = run.prepare(config, names=("a",), samples=1024, identity={})
    cadence = Cadence(this, 1024, None)
    assert [s for s in range(1, 40) if cadence.due("eval", s)] == [8, 16, 24, 32]
    assert [s for s in range(1, 70) if cadence.due("checkpoint", s)] == [32, 64]
    for wrong, said in (
        ({"eval.every": 3, "eval.every_epochs": 1.0}, "eval.every is 3 updates and eval.every_ep"),
        ({"eval.every": -1, "eval.patience": 1}, "with eval.every=-1 there are none"),
    ):
        with pytest.raises(configs.ConfigError, match=said):
            configs.validate(tiny_config(**wrong))


@pytest.mark.slow
@pytest.mark.parametrize("coco", [False, True])
def test_predictions_are_saved_under_the_ids_of_the_data_set(trained, tmp_path, monkeypatch, coco):
    monkeypatch.setattr(
        detection_metrics, "nms",
        lambda boxes, *_, **__: detection_metrics.Detections(
            np.float32([[8, 8, 40, 32]]), np.float32([0.5]), np.int32([len(boxes) % 2])
        ),
    )  # fmt: skip
    scenes, truth = data.Scenes("val", size=64), tmp_path / "p.truth.json"
    if coco:
        (tmp_path / "images").mkdir()
        truth = tmp_path / "labels.json"
        images, boxes = [], []
        for i in range(5):
            Image.fromarray(scenes.image(i)).save(tmp_path / "images" / f"{i}.png")
            images.append({"id": 1000 - 3 * i, "file_name": f"{i}.png"})
            box = scenes.objects(i).boxes[:1].tolist() or [[0, 0, 9, 9]]
            boxes += [{"id": i + 1, "image_id": 1000 - 3 * i, "category_id": 12,
                       "bbox": [x, y, r - x, b - y]} for x, y, r, b in box]  # fmt: skip
        kinds = [{"id": 7 * c + 5, "name": name} for c, name in enumerate(scenes.names)]
        truth.write_text(json.dumps({"images": images, "annotations": boxes, "categories": kinds}))
    evaluate.evaluate(trained, str(truth) if coco else "", predictions=tmp_path / "p.json")
    assert coco != (tmp_path / "p.truth.json").exists()
    tool = COCO(str(truth))
    found = tool.loadRes(str(tmp_path / "p.json"))  # refuses images that are not in it
    assert len(found.anns) == len(tool.imgs) == (5 if coco else 256)
    assert {a["category_id"] for a in found.anns.values()} <= set(tool.cats)
