"""A task in a file of its own goes through every public verb as those that ship do."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
import tiny

from jaxaccum import config as configs
from jaxaccum import config_files, data, errors, evaluate, export, fields, pack, tasks, train
from jaxaccum.accumulate import Geometry, checks, equivalence
from jaxaccum.training import inference, run, verification
from jaxaccum.training.distributed import Peers

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "examples" / "own_task"
FILE = FOLDER / "classification.py"


@pytest.fixture(autouse=True)
def found_by_python(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """14 images of bright and dark squares to learn from, 6 to evaluate on; one shows nothing."""
    root = tmp_path_factory.mktemp("squares")
    rng = np.random.default_rng(0)
    for split, count in (("train", 14), ("val", 6)):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(90, 150, (48, 48, 3)).astype(np.uint8)
            rows = []
            for kind in range(2) if i else ():  # both kinds, one of them larger
                side = 22 if kind == i % 2 else 10
                x, y = (int(v) for v in rng.integers(0, 24 - side, 2) + np.array([24 * kind, 10]))
                pixels[y : y + side, x : x + side] = 255 * kind
                rows.append(f"{kind} {(x + side / 2) / 48} {(y + side / 2) / 48} {side / 48} "
                            f"{side / 48}")  # fmt: skip
            cv2.imwrite(str(root / "images" / split / f"{i}.png"), pixels)
            (root / "labels" / split / f"{i}.txt").write_text("\n".join(rows))
    (root / "data.yaml").write_text(
        f"path: {root}\ntrain: images/train\nval: images/val\nnames: [dark, bright]\n"
    )
    return root


def config_for(path: str, **changes):
    config = config_files.load(str(FILE))
    config.update_from_flattened_dict(
        {
            "nbs": 6, "bn_group": 2, "microbatch": 2, "devices": 1, "steps": 6, "log.every": 1,
            "log.images": 1, "log.tensorboard": False, "eval.every": 3, "eval.batch": 4,
            "checkpoint.every": 2, "data.image_size": 32, "data.max_objects": 4,
            "data.path": path, **changes,
        }
    )  # fmt: skip
    return config.lock()


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        workdir = tmp_path_factory.mktemp("own") / "run"
        best = train.train(config_for(str(images / "data.yaml")), workdir)
    return workdir, best


def losses(workdir: Path) -> list[float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_it_holds_the_law(images):
    """Microbatches of 4 and 3 that do not divide 10, an image without objects in the batch."""
    changes = {"nbs": 10, "bn_group": 1, "dtype": "float64", "microbatch": 2}
    config = config_for(str(images / "data.yaml"), **changes)
    source = tasks.of(config).open(config, "train")
    this = run.prepare(config, names=source.names, samples=len(source), identity={})
    (batch,) = run.make_stream(this, source).windows(0, [10])
    batch["valid"][3] = False
    params, stats = this.task.initialise(0, np.float64)
    geometries = [Geometry(10), Geometry(4), Geometry(3, engine="multisteps"), Geometry(1, 2)]
    found = equivalence.verify(
        this.forward, this.rule, this.recipe, params, stats, batch, geometries
    )
    assert found.ok, str(found)


def test_it_trains_evaluates_and_goes_on(trained, images, tmp_path):
    workdir, best = trained
    assert 0 <= best["accuracy"] <= 1 and len(losses(workdir)) == 6
    found = evaluate.evaluate(workdir)
    assert found["accuracy"] == best["accuracy"] and found["step"] == best["step"]
    # Interrupted after update 4, and continued in another geometry: the same losses.
    config = config_for(str(images / "data.yaml"))

    class Stop(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        once = tasks.of(config).evaluator

        def stopping(*args):
            measure, calls = once(*args), []

            def call(*weights):
                calls.append(weights)
                if len(calls) == 2:  # the evaluation after update 6
                    raise Stop
                return measure(*weights)

            return call

        patch.setattr(tasks.of(config), "evaluator", stopping)
        train.train(config, tmp_path / "run")
    again = train.train(
        config_for(str(images / "data.yaml"), microbatch=1, devices=2), tmp_path / "run"
    )
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(workdir), rtol=1e-5)
    assert again["accuracy"] == best["accuracy"]


@pytest.mark.slow
def test_it_predicts(trained, images, tmp_path):
    """From a process of its own, which finds the task by the name in the run's config."""
    command = [sys.executable, "-m", "jaxaccum.predict", f"--workdir={trained[0]}",
               f"--source={images / 'images' / 'val'}", f"--out={tmp_path}"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(FOLDER)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "classes.json").read_text())
    assert [r["file"] for r in results] == [f"{i}.png" for i in range(6)]
    assert {r["class"] for r in results} <= {"dark", "bright"}
    done = subprocess.run(
        [*command, "--conf=0.5"], capture_output=True, text=True, cwd=REPOSITORY, env=environment,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "--conf means nothing to the task classification of this run" in done.stderr
    environment.pop("PYTHONPATH")
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, check=False
    )
    assert done.returncode == 1 and "add its folder to PYTHONPATH" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_is_exported(trained, tmp_path):
    facts = export.export(trained[0], tmp_path / "x", platforms=["cpu"])
    assert facts["output"] == "probabilities (N, classes)"
    found = inference.load(trained[0])
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    np.testing.assert_allclose(
        export.load_exported(tmp_path / "x")(images),
        jax.jit(found.task.predict)(found.params, found.stats, images), rtol=1e-5,
    )  # fmt: skip


def test_it_is_exported_as_onnx(trained, images, tmp_path):
    """A bfloat16 network with blocks to compute again becomes one in float32 without."""
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    facts = export.export(trained[0], tmp_path / "x", format="onnx")
    assert facts["opset"] == 18 and facts["format"] == "onnx"
    session = onnxruntime.InferenceSession((tmp_path / "x").read_bytes())
    batch = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    (found,) = session.run(["probabilities"], {"images": batch})
    model = inference.load(trained[0])
    expected = jax.jit(model.task.predict)(model.params, model.stats, batch)
    assert found.dtype == np.float32 and found.shape == (3, 2)
    np.testing.assert_allclose(found, expected, atol=0.02)  # ours is in bfloat16
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)


def test_it_is_packed(trained, images, tmp_path):
    config = config_for(str(images / "data.yaml"))
    lines = pack.pack(config, tmp_path / "packed", shards=2)
    assert lines[-1].startswith("0.") and "shards of train, val" in lines[-1]
    there = config_for(f"packed:{tmp_path / 'packed'}")
    train.train(there, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(trained[0])
    with pytest.raises(data.DataError, match="packed for the task classification"):
        run.open_source(packed_for_detection(there.data.path), "train")


def packed_for_detection(path: str):
    config = configs.detection()
    config.data.path = path
    return config


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("classification", r"task is one of detection, .* or MODULE:CLASS of your own"),
        ("nowhere:Task", r"'nowhere:Task' cannot be imported \(ModuleNotFoundError: No module"),
        ("classification:Net", "is no subclass of jaxaccum.tasks.Task"),
        ("jaxaccum.tasks:Task", "does not define create, evaluation, .*, fields, .*, unit"),
        ("classification:Missing", "cannot be imported .* has no attribute 'Missing'"),
        (".:x", "cannot be imported"),
        ("", "task is one of"),
        (3, "task is one of"),
        (None, "task is one of"),
    ],
)
def test_a_task_that_is_none(task, message):
    with pytest.raises(configs.ConfigError, match=message):
        tasks.named(task)


def test_what_a_task_leaves_out_is_said(trained):
    """A verb that a task has no part for ends with an error, and no default is a wrong answer."""

    class Bare(tasks.Task):
        name = "bare"

    assert Bare.__abstractmethods__ == {
        "open", "create", "initialise", "objective", "forward", "example", "stream", "evaluation",
        "evaluator", "summary", "predict",
    }  # fmt: skip
    found = inference.load(trained[0])
    for call in (
        lambda: tasks.Task.predictor(found.task, found),
        lambda: tasks.Task.read_file(found.task, Path()),
        lambda: tasks.Task.sample(found.task, None),
        lambda: tasks.Task.interface(found.task, found),
        lambda: Bare.adopt(None, "", (), Path()),
        lambda: Bare.packed_split(None, found.config, "train"),
        lambda: Bare.packed_features(None, ()),
    ):
        with pytest.raises(configs.ConfigError, match=r"the task (classification|bare) "):
            call()


def test_its_fields_are_checked():
    config = config_for("", **{"loss.smoothing": 2.0})
    with pytest.raises(configs.ConfigError, match=r"loss\.smoothing is in 0 to 1; got 2\.0"):
        configs.validate(config)
    with pytest.raises(configs.ConfigError, match=r"loss\.smoothing is in 0 to 1; got nan"):
        configs.validate(config_for("", **{"loss.smoothing": float("nan")}))
    with pytest.raises(configs.ConfigError, match="did you mean plain-8"):
        configs.validate(config_for("", model="plain8"))


def test_fields_that_are_no_numbers(monkeypatch):
    """A list, or a number or a word, is the task's own to check; else it is said what to do."""

    def with_more():
        config = once.defaults()
        config.order = (1, 2)
        config.count = fields.any_of(8)
        return config

    task = tasks.named("classification:ClassificationTask")
    once = task.fields
    monkeypatch.setattr(task, "fields", dataclasses.replace(once, defaults=with_more))
    with pytest.raises(configs.ConfigError, match=r"order: its default is .*Fields\.free"):
        configs.validate(configs.defaults("classification:ClassificationTask"))
    free = dataclasses.replace(task.fields, free=("order", "count"))
    monkeypatch.setattr(task, "fields", free)
    config = configs.defaults("classification:ClassificationTask")
    config.count = "many"
    configs.validate(config)


def test_where_weights_lie_is_not_learned():
    assert "text.point_weights" in configs.not_learned("completion")


def test_the_engine_guards_it(images):
    config = config_for(str(images / "data.yaml"))
    source = tasks.of(config).open(config, "train")
    this = run.prepare(config, names=source.names, samples=len(source), identity={})
    with pytest.raises(checks.ContractError, match="weight"):
        batch = this.task.example(2)
        del batch["weight"]
        checks.check(this.grouped, this.rule.objective, *this.task.initialise(0), batch)


# --- train --verify ---


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"microbatch": "auto"}, {"log.noise_scale": True}])
def test_a_run_that_keeps_the_law_is_begun(images, changes):
    config = config_for(str(images / "data.yaml"))
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict(changes)
    found = verification.require_law(config, Peers())
    assert found.ok and found.tolerance == 1e-12
    assert found.first == Geometry(4)  # two groups of 2; half the microbatch would be one of 1
    assert [geometry for geometry, _ in found.rows] == [Geometry(2, engine="multisteps")]
    assert not jax.config.jax_enable_x64


@pytest.mark.slow
def test_a_run_that_breaks_the_law_is_not(images, monkeypatch):
    config = config_for(str(images / "data.yaml"))
    task = tasks.of(config)
    once = task.forward

    def mean_of_the_microbatch(self, params, stats, batch, groups):
        found = once(self, params, stats, batch, groups)
        return found._replace(
            numerators={k: v / batch["weight"].sum() for k, v in found.numerators.items()}
        )

    monkeypatch.setattr(task, "forward", mean_of_the_microbatch)
    with pytest.raises(errors.TrainingError, match=r"--verify: the geometry changes[\s\S]*ANOTHER"):
        verification.require_law(config, Peers())


def test_what_cannot_be_verified():
    with pytest.raises(configs.ConfigError, match="with compat the geometry changes"):
        verification.require_law(tiny.tiny_config(compat=True), Peers())


@pytest.mark.parametrize(
    ("nbs", "bn_group", "microbatch", "expected"),
    [
        (64, 8, 32, 16), (64, 8, 24, 16), (64, 8, 8, 16), (64, 8, "auto", 16), (8, 8, 8, 8),
        (10, 64, 10, 10), (6, 8, 6, 6), (64, 8, 2, 2), (16, "all", 4, 4),  # groups over devices
        (10, 4, 4, 8), (16, "all", 16, 16), (16, "frozen", 8, 4), (16, "frozen", 1, 2),
    ],
)  # fmt: skip
def test_the_geometry_that_is_verified(nbs, bn_group, microbatch, expected):
    config = tiny.tiny_config(nbs=nbs, bn_group=bn_group, microbatch=microbatch)
    assert verification._half(config) == expected
