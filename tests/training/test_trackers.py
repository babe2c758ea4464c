"""Trackers: they get what a run logs, one run there is one run here, and they cost no training."""

from __future__ import annotations

import importlib.util
import json
import re
import struct
import sys
import threading
import types
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_config

from jaxaccum import config as configs
from jaxaccum import config_files, train
from jaxaccum.tasks.detection import DetectionTask
from jaxaccum.training import services, trackers
from jaxaccum.training.preemption import Preempted
from jaxaccum.training.workdir import WorkdirError

ON = {"log.wandb": True, "log.mlflow": True}
RUN = ON | {"log.report": True, "steps": 6, "eval.every": 3, "checkpoint.every": 3}
VARIABLES = ("WANDB_", "MLFLOW_")
OF_THE_MACHINE = {"images_per_second", "memory_gib/host"}


def records(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def expected(workdir: Path) -> dict[tuple[str, int], float]:
    """(tag, update) -> number, of all that the file has."""
    found = {}
    for record in records(workdir):
        head = "val/" if record["kind"] == "eval" else ""
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                found[head + key, record["step"]] = value
    return found


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in [name for name in trackers.os.environ if name.startswith(VARIABLES)]:
        monkeypatch.delenv(name)


# --- Services in memory. ---


class FakeWandb(types.ModuleType):
    """As much of the package as is used, and what its runs were told."""

    def __init__(self):
        super().__init__("wandb")
        self.runs = []
        self.Settings = lambda **named: named
        self.Image = lambda array, file_type: ("image", array, file_type)

    def init(self, **given):
        run = types.SimpleNamespace(given=given, rows=[], metrics=[], ended=None, offline=True)
        run.define_metric = lambda name, **named: run.metrics.append((name, named))
        run.log = lambda row: run.rows.append(row)
        run.mark_preempting = lambda: run.rows.append("preempting")
        run.finish = lambda exit_code: setattr(run, "ended", exit_code)
        self.runs.append(run)
        return run


Metric = namedtuple("Metric", "key value timestamp step")
Param = namedtuple("Param", "key value")
RunTag = namedtuple("RunTag", "key value")


class FakeMlflow(types.ModuleType):
    """The same of MLflow; a run that is not there is an error, and parameters do not change."""

    def __init__(self):
        super().__init__("mlflow")
        self.store, self.uris = {}, []
        self.entities = types.ModuleType("mlflow.entities")
        for kind in (Metric, Param, RunTag):
            setattr(self.entities, kind.__name__, kind)
        module = self

        class MlflowClient:
            def __init__(self, tracking_uri=None):
                module.uris.append(tracking_uri)

            def get_experiment_by_name(self, name):
                return None

            def create_experiment(self, name, artifact_location=None):
                return name

            def create_run(self, experiment, run_name=None):
                run = types.SimpleNamespace(
                    info=types.SimpleNamespace(run_id=f"run{len(module.store)}"), name=run_name,
                    experiment=experiment, metrics=[], params={}, tags={}, images=[], dicts={},
                    status=["RUNNING"],
                )  # fmt: skip
                module.store[run.info.run_id] = run
                return run

            def get_run(self, run_id):
                if run_id not in module.store:
                    raise RuntimeError(f"Run {run_id!r} not found")
                return module.store[run_id]

            def update_run(self, run_id, status):
                module.store[run_id].status.append(status)

            def set_terminated(self, run_id, status):
                module.store[run_id].status.append(status)

            def log_batch(self, run_id, metrics=(), params=(), tags=()):
                run = module.store[run_id]
                assert len(metrics) <= 1000 and len(params) <= 100 and len(tags) <= 100
                run.metrics += metrics
                for key, value in params:
                    assert run.params.setdefault(key, value) == value, "parameters cannot change"
                run.tags.update(tags)

            def log_dict(self, run_id, facts, name):
                module.store[run_id].dicts[name] = facts

            def log_image(self, run_id, image, key, step):
                module.store[run_id].images.append((key, step, image))

        self.MlflowClient = MlflowClient


@pytest.fixture
def fakes(monkeypatch):
    found = FakeWandb(), FakeMlflow()
    monkeypatch.setitem(sys.modules, "wandb", found[0])
    monkeypatch.setitem(sys.modules, "mlflow", found[1])
    monkeypatch.setitem(sys.modules, "mlflow.entities", found[1].entities)
    return found


def test_they_get_all_that_the_workdir_gets(fakes, tmp_path, capsys):
    wandb, mlflow = fakes
    train.train(tiny_config(**RUN), tmp_path / "mine")
    (ours,), (theirs,) = wandb.runs, mlflow.store.values()
    wanted = expected(tmp_path / "mine")
    assert len(wanted) > 60 and ("val/map50", 3) in wanted and ("loss/box", 1) in wanted

    rows = [row for row in ours.rows if not any(isinstance(v, tuple) for v in row.values())]
    sent = {(k, row["update"]): v for row in rows for k, v in row.items() if k != "update"}
    named = {(m.key, m.step): m.value for m in theirs.metrics}
    # Not in the file, which a resumed run writes as an uninterrupted one does.
    of_the_machine = {(key, step) for key in OF_THE_MACHINE for step in range(1, 7)}
    for found in (sent, named):
        assert found.keys() - wanted.keys() == of_the_machine
        assert {key: found[key] for key in wanted} == wanted

    pictures = {f"pictures/{f.stem}" for f in (tmp_path / "mine" / "pictures").iterdir()}
    assert len(pictures) == 6
    seen = {(key, row["update"]): value[1] for row in ours.rows for key, value in row.items()
            if isinstance(value, tuple)}  # fmt: skip
    assert {key for key, _ in seen} == pictures | {"val/samples"}
    assert {step for key, step in seen if key == "val/samples"} == {3, 6}
    assert ("pictures/batch", 0) in seen and ("pictures/results", 6) in seen
    assert {(key, step) for key, step, _ in theirs.images} == seen.keys()
    for array in seen.values():
        assert array.dtype == np.uint8 and array.ndim == 3 and array.std() > 5

    facts = ours.given["config"]
    assert facts["fingerprint"] == records(tmp_path / "mine")[0]["fingerprint"]
    assert facts["geometry"] == {
        "microbatch": 2, "devices": 1, "engine": "scan", "fsdp": 1, "offload": False, "steps": 2
    }  # fmt: skip
    assert facts["recipe"]["nbs"] == 4 and facts["config"]["lr"]["base"] == 1e-3
    assert theirs.dicts == {"run.json": facts} and json.dumps(facts)
    assert theirs.params["lr.base"] == "0.001" and theirs.params["log.wandb"] == "True"
    assert theirs.tags["fingerprint"] == facts["fingerprint"]
    assert theirs.tags["geometry.microbatch"] == "2"
    assert ours.ended == 0 and theirs.status == ["RUNNING", "FINISHED"]
    assert ours.given["project"] == theirs.experiment == "jaxaccum"
    assert ours.given["name"] == theirs.name == "mine"
    assert ("*", {"step_metric": "update"}) in ours.metrics
    assert mlflow.uris == [f"sqlite:///{tmp_path / 'mine' / 'mlflow.db'}"]
    said, err = capsys.readouterr()
    assert re.search(r"^memory: host [\d.]+ of [\d.]+ GiB$", err, re.MULTILINE)
    assert "Weights & Biases: run " in said and "MLflow: run run0" in said and "note" not in said


class Stop(Exception):
    pass


def stopped_and_continued(workdir: Path, **changes) -> None:
    """A run that an error ends before its first evaluation, and that goes on from there."""

    def stopping(*arguments):
        raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(DetectionTask, "evaluator", lambda *arguments: stopping)
        train.train(tiny_config(**changes), workdir)
    train.train(tiny_config(**changes | {"microbatch": 4}), workdir)


@pytest.mark.slow
def test_a_run_that_goes_on_is_the_same_run_there(fakes, tmp_path):
    wandb, mlflow = fakes
    stopped_and_continued(tmp_path, **RUN)
    (theirs,), (first, second) = mlflow.store.values(), wandb.runs
    kept = json.loads((tmp_path / trackers.IDS).read_text())
    assert first.given["id"] == second.given["id"] == kept["wandb"]["id"]
    assert second.given["resume"] == "allow" and second.given["allow_val_change"]
    assert (first.ended, second.ended) == (1, 0)
    assert kept["mlflow"] == {"run_id": theirs.info.run_id}
    assert theirs.status == ["RUNNING", "FAILED", "RUNNING", "FINISHED"]
    # Parameters stay those of the first start; tags and run.json are of the last.
    assert theirs.params["microbatch"] == "2" and theirs.tags["geometry.microbatch"] == "4"
    assert theirs.dicts["run.json"]["geometry"]["microbatch"] == 4
    named = {(m.key, m.step): m.value for m in theirs.metrics if m.key not in OF_THE_MACHINE}
    assert named == expected(tmp_path)

    # A run that is over is not opened again.
    train.train(tiny_config(**RUN), tmp_path)
    assert len(wandb.runs) == 2 and theirs.status[-1] == "FINISHED"


def test_a_run_that_is_gone_there_is_an_error(fakes, tmp_path):
    wandb, _ = fakes
    (tmp_path / trackers.IDS).write_text('{"mlflow": {"run_id": "lost"}}')
    with pytest.raises(configs.ConfigError, match=r"log\.mlflow.*'lost' not found.*trackers\.json"):
        train.train(tiny_config(**RUN), tmp_path)
    assert wandb.runs[0].ended == 1  # what had begun is ended
    (tmp_path / trackers.IDS).write_text("[1")
    with pytest.raises(WorkdirError, match=r"trackers\.json should say which runs.*remove it"):
        train.train(tiny_config(**RUN), tmp_path)


def test_the_environment_says_where(fakes, tmp_path, monkeypatch):
    for name, value in {
        "WANDB_PROJECT": "cells", "WANDB_NAME": "third", "WANDB_DIR": "elsewhere",
        "WANDB_RUN_ID": "abc", "MLFLOW_TRACKING_URI": "http://tracking.invalid",
        "MLFLOW_EXPERIMENT_NAME": "cells",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    facts = {"fingerprint": "f", "window": "w", "geometry": {}, "config": {"a": {"b": 1}}}
    ours = services.Wandb(tmp_path, {}, facts)
    theirs = services.Mlflow(tmp_path, {}, facts)
    given = fakes[0].runs[0].given
    assert [given[k] for k in ("project", "name", "dir", "id")] == [
        "cells", "third", "elsewhere", "abc"
    ]  # fmt: skip
    assert fakes[1].uris == ["http://tracking.invalid"]
    assert fakes[1].store["run0"].experiment == "cells"
    assert ours.kept == {"id": "abc"} and theirs.kept == {"run_id": "run0"}
    assert "tracking.invalid" not in theirs.said  # it may hold a password


def test_long_and_many_parameters(fakes, tmp_path):
    config = {"many": {f"f{i}": i for i in range(250)}, "long": "x" * 9000, "names": ["a"] * 4000}
    facts = {"fingerprint": "f", "window": "w", "geometry": {}, "config": config}
    services.Mlflow(tmp_path, {}, facts)
    run = fakes[1].store["run0"]
    assert len(run.params) == 252 and run.params["many.f249"] == "249"
    assert len(run.params["long"]) == 500 and run.params["long"].endswith("... (run.json)")
    assert run.dicts["run.json"]["config"]["long"] == "x" * 9000


def test_names_that_mlflow_does_not_take(fakes, tmp_path):
    facts = {"fingerprint": "f", "window": "w", "geometry": {}, "config": {}}
    theirs = services.Mlflow(tmp_path, {}, facts)
    theirs.scalars({"ap/a(b": 1, "ap/a)b": 2, "ap/naïve cat-1": 3}, 5)
    found = {m.key: (m.value, m.step) for m in fakes[1].store["run0"].metrics}
    assert found == {"ap/a_28_b": (1, 5), "ap/a_29_b": (2, 5), "ap/naïve cat-1": (3, 5)}


# --- What goes wrong. ---


@pytest.mark.parametrize("name", list(trackers.SERVICES))
def test_a_package_that_is_absent_ends_the_run_before_it_begins(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(DetectionTask, "open", lambda *arguments: pytest.fail("read the data"))
    with pytest.raises(configs.ConfigError, match=rf"log\.{name}=True needs .*pip install {name}"):
        train.train(tiny_config(**{f"log.{name}": True}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_its_name_is_not_the_package(tmp_path, monkeypatch):
    """Weights & Biases leaves a folder `wandb` where it runs, which Python imports."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(configs.ConfigError, match="is a folder, and no package"):
        services.imported("wandb")
    del sys.modules["wandb"]  # monkeypatch puts back what was there before


def test_what_it_says_at_the_start_is_the_users(fakes, tmp_path):
    def refused(**given):
        raise ValueError("api_key not configured")

    fakes[0].init = refused
    with pytest.raises(configs.ConfigError, match=r"api_key not configured.*WANDB_MODE=offline"):
        train.train(tiny_config(**RUN), tmp_path)
    assert not fakes[1].store


@pytest.mark.slow
def test_a_network_that_goes_away_is_said_once_and_ends_nothing(fakes, tmp_path, capsys):
    wandb, mlflow = fakes

    def gone(*arguments, **named):
        raise ConnectionError("no route\nto host")

    mlflow.MlflowClient.log_image = gone
    plain = wandb.init

    def flaky(**given):
        run = plain(**given)
        run.log = gone
        return run

    wandb.init = flaky
    train.train(tiny_config(**RUN), tmp_path)
    said = "".join(capsys.readouterr())
    for name in ("wandb", "mlflow"):
        told = f"note: log.{name} did not take what was logged (ConnectionError: no route to host)"
        assert said.count(told) == 1
    lost = dict(re.findall(r"note: log\.(\w+): (\d+) records or pictures were not taken", said))
    assert len(records(tmp_path)) == 8 and int(lost["mlflow"]) >= 8  # pictures, which are fewer
    assert int(lost["wandb"]) == int(lost["mlflow"]) + 8
    (theirs,) = mlflow.store.values()
    named = {(m.key, m.step): m.value for m in theirs.metrics if m.key not in OF_THE_MACHINE}
    assert named == expected(tmp_path) and theirs.status[-1] == "FINISHED"


class Slow:
    """A service that hangs until it is let go."""

    kept, said = {}, ""

    def __init__(self):
        self.go, self.took, self.outcome = threading.Event(), [], None

    def scalars(self, values, step):
        self.go.wait(60)
        self.took.append(step)

    def image(self, tag, image, step):
        self.took.append((tag, step))

    def close(self, outcome):
        self.outcome = outcome


def test_nobody_waits_for_a_slow_one(monkeypatch, capsys):
    monkeypatch.setattr(trackers, "PATIENCE", {"finished": 0.2})
    monkeypatch.setattr(trackers, "_ROOM", 5)
    slow = Slow()
    with trackers.Trackers({"slow": slow}) as sent:
        for step in range(1, 11):
            sent.scalars({"loss": 1.0}, step)
    said = capsys.readouterr().out
    assert "(5 records wait for it already)" in said
    assert "not all was sent within 0.2 s" in said
    assert "log.slow: 4 records or pictures were not taken" in said or "log.slow: 5" in said
    slow.go.set()


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(None, "finished"), (RuntimeError, "failed"), (KeyboardInterrupt, "stopped"),
     (lambda: Preempted(75), "stopped")],
)  # fmt: skip
def test_they_end_as_the_run_ends(error, outcome):
    slow = Slow()
    slow.go.set()

    def used():
        with trackers.Trackers({"slow": slow}, start=4) as sent:
            sent.image("first", np.zeros((2, 2, 3), np.uint8))
            sent.scalars({"loss": 1.0}, 5)
            sent.image("later", np.zeros((2, 2, 3), np.uint8))
            if error:
                raise error()

    if error:
        with pytest.raises(BaseException):  # noqa: B017, PT011
            used()
    else:
        used()
    assert slow.took == [("first", 4), 5, ("later", 5)] and slow.outcome == outcome


def test_only_the_first_process_has_them(fakes, tmp_path):
    this = types.SimpleNamespace(config=tiny_config(**ON))
    trackers.started(this, {}, tmp_path, 0, first=False).scalars({"loss": 1.0}, 1)
    assert not fakes[0].runs and not fakes[1].store and not list(tmp_path.iterdir())


def test_they_are_no_part_of_the_recipe():
    plain = configs.recipe_of(tiny_config(), 5, {})
    assert configs.recipe_of(tiny_config(**ON), 5, {}) == plain
    assert not trackers.wanted(tiny_config())
    with pytest.raises(configs.ConfigError, match=r'Did you mean "log\.wandb"'):
        config_files.parse("quickstart", {"log.wandbb": True})
    with pytest.raises(configs.ConfigError, match="bool"):
        config_files.parse("quickstart", {"log.mlflow": "maybe"})


# --- The packages themselves, where they are installed. ---


def rows_of(file: Path) -> list[dict]:
    """The rows in a file that Weights & Biases wrote offline: a log as LevelDB has it, in blocks of
    32 KiB, behind 7 bytes of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, part, rows = file.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + 7])
        part += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record, part = Record.FromString(part), b""
            if record.HasField("history"):
                rows.append({
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                })  # fmt: skip
    return rows


@pytest.mark.slow
def test_weights_and_biases_itself(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    stopped_and_continued(tmp_path, **RUN | {"log.mlflow": False})
    (name,) = json.loads((tmp_path / trackers.IDS).read_text())["wandb"].values()
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(files) == 2  # one a start, both of one run
    rows = [row for file in files for row in rows_of(file)]
    found = {(key, row["update"]): value for row in rows for key, value in row.items()}
    wanted = expected(tmp_path)
    assert {key: found.get(key) for key in wanted} == wanted
    pictures = {key for key, _ in found if key.endswith("/_type")}
    names = [f"pictures/{file.stem}" for file in (tmp_path / "pictures").iterdir()]
    assert pictures == {f"{name}/_type" for name in (*names, "val/samples")}


@pytest.mark.slow
def test_mlflow_itself(tmp_path, capsys):
    mlflow = pytest.importorskip("mlflow")
    for needed in ("sqlalchemy", "alembic"):  # of its database
        pytest.importorskip(needed)
    workdir = tmp_path / "a run"
    stopped_and_continued(workdir, **RUN | {"log.wandb": False})
    client = mlflow.MlflowClient(f"sqlite:///{workdir / 'mlflow.db'}")
    (name,) = json.loads((workdir / trackers.IDS).read_text())["mlflow"].values()
    run = client.get_run(name)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "a run")
    found = {(key, point.step): point.value for key in run.data.metrics
             for point in client.get_metric_history(name, key)}  # fmt: skip
    wanted = expected(workdir)
    assert {key: found.get(key) for key in wanted} == wanted
    assert run.data.params["lr.base"] == "0.001" and run.data.params["microbatch"] == "2"
    assert run.data.tags["geometry.microbatch"] == "4"
    assert run.data.tags["fingerprint"] == records(workdir)[0]["fingerprint"]
    facts = json.loads((workdir / "mlartifacts" / name / "artifacts" / "run.json").read_text())
    assert facts["geometry"]["microbatch"] == 4 and facts["recipe"]["nbs"] == 4
    images = [Path(one.path).name for one in client.list_artifacts(name, "images")]
    for file in (workdir / "pictures").iterdir():
        assert any(one.startswith(f"pictures~{file.stem}+step") for one in images), images
    assert "note" not in capsys.readouterr().out
