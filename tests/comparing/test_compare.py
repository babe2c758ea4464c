"""Comparisons: what is planned, trained once and trained again, and what the report says."""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxaccum.comparing import comparison, planning, plots, report, runs, subjects
from jaxaccum.config import ConfigError
from jaxaccum.errors import TrainingError

ROOT = Path(__file__).parents[2]
CONFIG = f"""
import dataclasses
import sys

sys.path.insert(0, {str(ROOT / "tests")!r})
from tiny import tiny_config
from jaxaccum.models import yolo

yolo.FAMILIES["tiny-slim"] = dataclasses.replace(yolo.FAMILIES["tiny"], width={{"t": 0.125}})


def get_config(model="tiny-t"):
    return tiny_config(
        **{{"model": model, "steps": 0, "epochs": 0.012, "checkpoint.every": 9, "eval.every": 3,
            "log.images": 0, "lr.base": 0.002, "lr.base_batch": 8}}
    )
"""
LARGEST = {"tiny-t": 4, "tiny-slim-t": 8}  # microbatches that the plan of the tests says fit
UPDATES = 3  # of the check
MIB = 2**20


def fake_plan(arguments, log):
    """Stands for `python -m jaxaccum.plan`: 10 MiB an image for tiny-t, 5 for the slim one."""
    assert {"--json", "--largest", "--remat=none", "--devices=1", "--memory=1GiB"} <= set(arguments)
    model = "tiny-slim-t" if "--config.model=tiny-slim-t" in arguments else "tiny-t"
    rows = [
        {"microbatch": m, "steps": 1, "devices": 1, "engine": "scan", "remat": remat,
         "peak_bytes": m * 40 * MIB // LARGEST[model] // (2 if remat == "blocks" else 1),
         "batch_bytes": m * MIB, "fits": m <= LARGEST[model]}
        for remat in ("none", "blocks") for m in (2, 4, 8, 16)
    ]  # fmt: skip
    choice = next(r for r in rows if r["microbatch"] == LARGEST[model])
    Path(log).write_text("planned\n")
    return {"target": "cpu", "memory_bytes": 50 * MIB, "budget_bytes": 45 * MIB, "rows": rows,
            "choice": choice, "why": "largest"}  # fmt: skip


def start(config: Path, out: Path):
    """The comparison of the tests, to be called here or in a process to kill."""
    planning.ask_plan = fake_plan
    specs = [f"{config}:tiny-t", f"{config}@model=tiny-slim-t"]
    return comparison.compare(
        specs, out, settings=["epochs=0.01"], memory="1GiB", check_updates=UPDATES,
        command=[f"--configs={','.join(specs)}", f"--out={out}"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("configs") / "tiny_models.py"
    file.write_text(CONFIG)
    return file


@pytest.fixture(scope="module")
def killed_and_done(config_file, tmp_path_factory):
    """A comparison killed in its second run, then ended; (folder, results, first run's bytes)."""
    out = tmp_path_factory.mktemp("compared")
    program = (
        f"import sys; sys.path[:0] = [{str(ROOT / 'tests')!r}, {str(Path(__file__).parent)!r}]\n"
        "import tiny, test_compare, pathlib\n"
        f"test_compare.start(*map(pathlib.Path, {(str(config_file), str(out))!r}))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    second = out / "runs" / "tiny-slim-t-nbs8-seed0.log"
    try:
        while not (second.exists() and "compiling" in second.read_text()):
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = untouched(out)
    assert not (out / "report.md").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "ask_plan", None)  # `start` replaces it; put back afterwards
        return out, start(config_file, out), before


def untouched(out: Path) -> dict[str, tuple[bytes, int]]:
    """What a second start must leave alone: the first run, the plans, the check."""
    files = [
        *(out / "plans").iterdir(), out / "check.json", out / "runs" / "tiny-t-nbs4-seed0.log",
        out / "runs" / "tiny-t-nbs4-seed0" / "metrics.jsonl",
    ]  # fmt: skip
    return {str(f): (f.read_bytes(), f.stat().st_mtime_ns) for f in files}


@pytest.mark.slow
def test_what_was_done_is_not_done_again(killed_and_done):
    out, _, before = killed_and_done
    assert untouched(out) == before
    log = (out / "runs" / "tiny-slim-t-nbs8-seed0.log").read_text()
    assert log.count("compiling the update (kept") == 2  # killed, and gone on with


@pytest.mark.slow
def test_a_run_that_is_in_both_phases_is_trained_once(killed_and_done):
    out, results, _ = killed_and_done
    runs = {p.name for p in (out / "runs").iterdir() if p.is_dir()}
    assert runs == {"tiny-t-nbs4-seed0", "tiny-slim-t-nbs8-seed0", "tiny-slim-t-nbs4-seed0"}
    own, fair = results["phases"]
    assert results["shared"] == 4
    assert own["tiny-t"] == fair["tiny-t"]
    prints = own["tiny-slim-t"][0]["fingerprint"], fair["tiny-slim-t"][0]["fingerprint"]
    assert prints[0] != prints[1]
    for phase in results["phases"]:
        for runs_of_model in phase.values():
            for found in runs_of_model:
                lines = (out / "runs" / found["run"] / "metrics.jsonl").read_text().splitlines()
                last = json.loads(lines[-1])
                assert last["fingerprint"] == found["fingerprint"]
                assert last["step"] == found["updates"] == found["last"]["step"]
                assert found["images_per_second"] > 0
                assert found["resident_bytes"] > 100 * MIB


@pytest.mark.slow
def test_the_learning_rate_follows_the_batch(killed_and_done):
    _, results, _ = killed_and_done
    own, fair = results["phases"]
    assert own["tiny-slim-t"][0]["lr"] == pytest.approx(0.002)
    assert fair["tiny-slim-t"][0]["lr"] == pytest.approx(0.001)
    assert all("0.002 * (effective batch) / 8" in rule for rule in results["rules"].values())


@pytest.mark.slow
def test_the_check_is_of_one_recipe_on_three_geometries(killed_and_done):
    _, results, _ = killed_and_done
    check = results["check"]
    assert check["geometries"] == [
        "microbatch 4, scan", "microbatch 2, scan", "microbatch 2, multisteps",
    ]  # fmt: skip
    assert [len(losses) for losses in check["losses"]] == [UPDATES] * 3
    assert check["apart"][0] <= 1e-5
    assert check["fingerprint"] == results["phases"][1]["tiny-t"][0]["fingerprint"]


@pytest.mark.slow
def test_the_report_tells_it(killed_and_done):
    out, results, _ = killed_and_done
    text = (out / "report.md").read_text()
    assert json.loads((out / "results.json").read_text()) == results
    assert str(out.parent) not in text and ".../tiny_models.py:tiny-t" in text
    assert "The own batch of tiny-t is the shared one" in text and "the same run" in text
    assert "Every number is of one run" in text
    assert "these recipes differ in `model` and in nothing else" in text
    assert "| 4 | **40 MiB** | 20 MiB |" in text and "| 80 MiB, too much | **40 MiB** |" in text
    rows = {tuple(r.split(" | ")[:2]) for r in text.splitlines() if r.startswith("| tiny")}
    assert ("| tiny-t", "1 and 2") in rows and ("| tiny-slim-t", "2") in rows
    for name in ("curves", "memory", "speed"):
        assert f"({name}.png)" in text and (out / f"{name}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_several_seeds_have_a_spread(killed_and_done, tmp_path):
    _, results, _ = killed_and_done
    results = copy.deepcopy(results)
    results["seeds"] = [0, 1]
    for phase in results["phases"]:
        for name, each in phase.items():
            phase[name] = each + copy.deepcopy(each)
            for seed, found in enumerate(phase[name]):
                found["best"]["map50_95"] = 0.4 + 0.02 * seed
                found["curve"] = [[e, v + 0.02 * seed] for e, v in found["curve"]]
    text = report.report(results)
    assert "0.4100 ± 0.0141" in text and "+0.0000 ± 0.0200" in text
    assert "standard deviation over 2 seeds" in text
    plots.draw(results, tmp_path)


@pytest.mark.parametrize(
    ("nbs", "group", "largest", "devices", "microbatch"),
    [
        (16, 4, 16, 1, 16), (16, 4, 8, 1, 8), (16, 4, 12, 1, 8), (20, 4, 16, 1, 12),
        (4, 4, 16, 1, 4), (6, 1, 4, 1, 3), (64, 8, 16, 2, 16), (2, 2, 8, 1, 2),
    ],
)  # fmt: skip
def test_the_fewest_steps_then_the_least_padding(nbs, group, largest, devices, microbatch):
    assert planning.layout(nbs, group, largest, devices) == microbatch


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("--set=data.path=/home/me/cells/data.yaml,epochs=3",
         "--set=data.path=.../data.yaml,epochs=3"),
        ("--configs=configs/a.py:x,/tmp/b.py:y@model=m",
         "--configs=configs/a.py:x,.../b.py:y@model=m"),
        ("--out=~/runs/one", "--out=.../one"), ("/tmp/one", ".../one"), ("--nbs=16", "--nbs=16"),
    ],
)  # fmt: skip
def test_the_report_shows_no_places(word, shown):
    assert comparison._without_places(word) == shown


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["nbs=8"], "nbs is not set by hand: set --nbs"), (["seed=1"], "--seeds"),
        (["microbatch=4"], "--memory"), (["epochs"], "'epochs' is not key=value"),
        (["compat=True"], "the geometry changes what is learned"),
        (["bn_group=all"], "bn_group=all"), (["steps=9"], "steps=9 counts updates"),
        (["epoch=9"], 'Did you mean "epochs"'), (["epochs=many"], "epochs"),
        (["eval.every=-1"], r"eval\.every"), (["model=yolov8-q"], "there is no 'yolov8-q'"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared(config_file, settings, message):
    with pytest.raises(ConfigError, match=message):
        subjects.read_models([str(config_file)], settings)


def test_configs_that_are_not_there_or_are_twice(config_file, tmp_path, monkeypatch):
    empty = SimpleNamespace(report=SimpleNamespace(lines=list))
    monkeypatch.setattr(subjects.run, "open_source", lambda *_: empty)
    with pytest.raises(ConfigError, match=r"none\.py"):
        subjects.read_models([str(tmp_path / "none.py")], [])
    with pytest.raises(ConfigError, match="twice"):
        subjects.read_models([str(config_file)] * 2, [])
    two = subjects.read_models([str(config_file), f"{config_file}@loss.box=5"], [])
    assert [m.name for m in two] == [
        "tiny-t-tiny_models.py", "tiny-t-tiny_models.py-loss.box-5",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def model(config_file):
    return subjects.read_models([f"{config_file}:tiny-t"], [])[0]


@pytest.fixture
def cell(model, tmp_path, monkeypatch):
    """A run that was not started."""
    monkeypatch.setattr(planning, "ask_plan", fake_plan)
    (tmp_path / "plans").mkdir()
    planned = planning.plan(model, "1GiB", 64, tmp_path / "plans")
    return runs.make_cell(model, planned, 8, 0, tmp_path)


def test_a_plan_is_made_once(cell, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "ask_plan", lambda *_: pytest.fail("planned again"))
    folder = tmp_path / "plans"
    assert planning.plan(cell.model, "1GiB", 64, folder)["largest"] == 4
    assert planning.plan(cell.model, "1GiB", 3, folder)["largest"] == 2
    with pytest.raises(ConfigError, match="less than one bn_group of 2"):
        planning.plan(cell.model, "1GiB", 1, folder)
    nothing = {"choice": None, "why": "nothing fits into 1 MiB"}
    monkeypatch.setattr(planning, "ask_plan", lambda *_: nothing)
    with pytest.raises(TrainingError, match="tiny-t: nothing fits into 1 MiB"):
        planning.plan(cell.model, "1MiB", 64, folder)


@pytest.mark.parametrize("planned", ["bfloat16", None])
def test_the_dtype_is_that_of_the_device_that_trains(model, tmp_path, monkeypatch, planned):
    """Of the plan, which was made there: here no accelerator is seen. Older plans had float32."""
    monkeypatch.setattr(planning, "ask_plan", fake_plan)
    plan = planning.plan(model, "1GiB", 64, tmp_path) | ({"dtype": planned} if planned else {})
    cell = runs.make_cell(model, plan, 8, 0, tmp_path)
    assert cell.overrides["dtype"] == cell.run.config.dtype == (planned or "float32")
    assert cell.run.recipe.as_dict()["dtype"] == cell.run.config.dtype


def test_a_run_that_fails_shows_the_end_of_its_log(cell):
    wrong = dataclasses.replace(cell, overrides={"nsb": "8"})
    with pytest.raises(TrainingError, match=r'(?s)-nbs8-seed0 failed \(1\).*Did you mean "nbs"'):
        runs.train(wrong, "1/1")


def test_a_run_of_an_earlier_start_is_waited_for(tmp_path, capsys):
    with (tmp_path / "log").open("ab") as theirs, (tmp_path / "log").open("ab") as ours:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        release = threading.Timer(0.3, theirs.close)
        began = time.perf_counter()
        release.start()
        runs._own(ours, "a run")
        assert time.perf_counter() - began > 0.25
    assert re.search("a run is being trained by an earlier start", capsys.readouterr().out)
