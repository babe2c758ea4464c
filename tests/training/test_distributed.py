"""Runs of several processes: the same run, shared work, one writer, and one end.

python tests/training/test_distributed.py JSON is one process of such a run, see `start`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_completion
from tiny import tiny_config

from jaxaccum import tasks, train
from jaxaccum.training import checkpoint, distributed, run
from jaxaccum.training import loop as training

ROOT = Path(__file__).parents[2]
# An effective batch of 10 leaves a tail on 4 devices: 2 steps of 8, the last 6 samples padded. The
# rate is low, as 20 updates of a new network make much of the last bit.
SMALL = {
    "nbs": 10, "steps": 20, "eval.every": 10, "checkpoint.every": 10, "checkpoint.keep": 3,
    "optimizer.name": "sgd", "lr.base": 1e-4, "ema.decay": 0.9,
}  # fmt: skip
SHARED = {"devices": 0}


def quickstart(**changes):
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "configs" / "quickstart.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.update_from_flattened_dict(changes)
    return config.lock()


CONFIGS = {"tiny": tiny_config, "quickstart": quickstart}


def start(workdir: Path, changes: dict, number: int = 2, **more) -> list[subprocess.Popen]:
    """Starts the processes of a run, with 2 devices each, on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for index in range(number):
        job = {"flag": f"{address},{number},{index}", "workdir": str(workdir), "changes": changes}
        processes.append(
            subprocess.Popen(
                [sys.executable, __file__, json.dumps(job | more)], cwd=ROOT, text=True,
                env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    return processes


def finish(processes: list[subprocess.Popen], status: int = 0) -> list[tuple[str, str]]:
    """What they printed, once all have ended with the status."""
    try:
        said = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [status] * len(processes), said
    return said


def records(workdir: Path, kind: str = "train") -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def saved(workdir: Path, step: int) -> dict:
    manager = checkpoint.ocp.CheckpointManager(workdir / "last")
    only = checkpoint.ocp.args.Composite(tree=checkpoint.ocp.args.StandardRestore())
    with manager:
        return manager.restore(step, args=only)["tree"]


def assert_same_run(
    ours: Path, theirs: Path, tolerance: float = 1e-5, logged: float = 1e-4
) -> None:
    """The same log and the same last state, to rounding.

    Args:
      tolerance: of the state. logged: of losses and gradient norms, which lie far apart where a
        gradient changes fast.
    """
    for kind in ("train", "eval"):
        a, b = records(ours, kind), records(theirs, kind)
        assert [r["step"] for r in a] == [r["step"] for r in b]
        assert all(x.keys() == y.keys() for x, y in zip(a, b, strict=True))
        assert {r["fingerprint"] for r in a} == {r["fingerprint"] for r in b}
    for a, b in zip(records(ours), records(theirs), strict=True):
        for key in ("loss", "grad_norm", "samples", "epoch"):
            assert a[key] == pytest.approx(b[key], rel=logged), (a["step"], key)
    last = records(theirs)[-1]["step"]
    a, b = saved(ours, last), saved(theirs, last)
    assert (a["step"], a["windows"]) == (b["step"], b["windows"])
    for part in ("params", "stats", "ema"):
        x, y = (
            np.concatenate([[0.0], *(np.ravel(v) for v in jax.tree.leaves(t[part]))])
            for t in (a, b)
        )
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), part


def cut(workdir: Path, step: int, to: Path) -> Path:
    """A copy of a run as it was killed after the checkpoint of an update."""
    shutil.copytree(workdir, to)
    for folder in (to / "last").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)
    return to


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One process with one device."""
    workdir = tmp_path_factory.mktemp("one")
    train.train(tiny_config(**SMALL), workdir)
    return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two processes with two devices each, and what they printed."""
    workdir = tmp_path_factory.mktemp("two")
    return workdir, finish(start(workdir, SMALL | SHARED))


@pytest.mark.slow
def test_two_processes_compute_what_one_does(one, two):
    workdir, said = two
    assert_same_run(workdir, one)
    assert "update 20/20" in said[0][1] and "update" not in said[1][0] + said[1][1]
    assert not (workdir / "broken").exists()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("steps", "dtype", "rate", "tolerance", "logged"),
    [
        (8, "float64", 2e-3, 1e-6, 1e-5), (20, "float64", 2e-3, 1e-6, 1e-5),
        (20, "float32", 2e-5, 1e-5, 1e-2),
    ],
)  # fmt: skip
def test_the_quickstart_recipe(tmp_path, steps, dtype, rate, tolerance, logged):
    """At its own rate in float64, at a hundredth of it in float32: AdamW's first updates are signs
    of gradients, so any rounding near zero becomes a step of full size.

    A batch-norm group lies on two devices.
    """
    changes = {
        "steps": steps, "lr.base": rate, "log.every": 1, "log.images": 0,
        "log.tensorboard": False, "eval.every": -1, "checkpoint.every": steps, "dtype": dtype,
    }  # fmt: skip
    more = {"config": "quickstart", "x64": dtype == "float64"}
    finish(start(tmp_path / "one", changes | {"devices": 1}, number=1, **more))
    finish(start(tmp_path / "two", changes | SHARED | {"microbatch": 4}, **more))
    assert_same_run(tmp_path / "two", tmp_path / "one", tolerance, logged)


@pytest.mark.slow
def test_each_loads_only_its_share(two):
    """Places 0-3, 8-11 of the 16 are process 0's; from place 10 on the batch repeats as padding."""
    workdir, _ = two
    loaded = [json.loads((workdir / f"loaded-{i}.json").read_text()) for i in range(2)]
    shares = [{0, 1, 2, 3, 8, 9}, {2, 3, 4, 5, 6, 7}]
    this = tiny_config(**SMALL)
    stream = run.make_stream(
        run.prepare(this, names=run.open_source(this, "train").names, samples=512, identity={}),
        run.open_source(this, "train"),
    )
    for indices, share in zip(loaded, shares, strict=True):
        # What a loader had prepared ahead may be more, so only the windows of the run are compared.
        windows = [stream.indices(10 * w, 10) for w in range(20)]
        assert sorted(indices[: 20 * len(share)])[0] >= 0
        wanted = {int(window[i]) for window in windows for i in share}
        ahead = {int(i) for w in range(20, 24) for i in stream.indices(10 * w, 10)[sorted(share)]}
        assert wanted <= set(indices) <= wanted | ahead
        assert len(indices) <= len(share) * 24


@pytest.mark.slow
def test_saved_by_two_and_continued_by_one(one, two, tmp_path):
    workdir = cut(two[0], 10, tmp_path / "w")
    train.train(tiny_config(**SMALL), workdir)
    assert_same_run(workdir, one)


@pytest.mark.slow
def test_saved_by_one_and_continued_by_two(one, tmp_path):
    workdir = cut(one, 10, tmp_path / "w")
    said = finish(start(workdir, SMALL | SHARED | {"data.workers": 1}))
    assert "continuing from update 10" in said[0][0]
    assert_same_run(workdir, one)


@pytest.mark.slow
@pytest.mark.long
def test_multisteps_in_two_processes(tmp_path):
    changes = SMALL | {"steps": 6, "eval.every": -1, "checkpoint.every": 6, "log.every": 1}
    train.train(tiny_config(**changes), tmp_path / "one")
    finish(start(tmp_path / "two", changes | SHARED | {"engine": "multisteps"}))
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_state_divided_among_processes(one, tmp_path):
    """Saved whole by process 0, and continued by one process that holds all."""
    short = SMALL | {"steps": 20, "eval.every": 10}
    finish(start(tmp_path / "two", short | SHARED | {"fsdp": 0}))
    assert_same_run(tmp_path / "two", one)
    workdir = cut(tmp_path / "two", 10, tmp_path / "w")
    train.train(tiny_config(**SMALL), workdir)
    assert_same_run(workdir, one)


@pytest.mark.slow
def test_batch_norm_groups_across_processes(tmp_path):
    changes = SMALL | {"bn_group": 4, "steps": 6, "eval.every": -1, "checkpoint.every": 6}
    train.train(tiny_config(**changes, microbatch=4, devices=1), tmp_path / "one")
    finish(start(tmp_path / "two", changes | SHARED | {"microbatch": 1}))
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("whom", [1, pytest.param(0, marks=pytest.mark.long)])
def test_sigterm_to_one_stops_both_after_the_same_update(tmp_path, whom):
    changes = SMALL | SHARED | {"steps": 400, "checkpoint.every": 400, "eval.every": -1}
    finish(start(tmp_path / "w", changes, stop=[whom, 4]), status=75)
    kept = checkpoint.newest_complete(tmp_path / "w")
    assert kept and 4 <= kept <= 8
    assert [r["step"] for r in records(tmp_path / "w")] == list(range(1, kept + 1))
    if whom == 1:  # continued by one, 3 updates more, and never stopped
        changes |= {"devices": 1}
        for workdir in (tmp_path / "w", tmp_path / "plain"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(training, "make_engine", _stopping(training.make_engine, kept + 3))
                with pytest.raises(SystemExit):
                    train.train(tiny_config(**changes), workdir)
        assert_same_run(tmp_path / "w", tmp_path / "plain")


def _stopping(make_engine: Callable, steps: int) -> Callable:
    """Makes engines that ask their process to stop, twice, after an update."""

    def make(*args):
        engine = make_engine(*args)
        update = engine.update

        def counted(state, *args):
            new, log = update(state, *args)
            if int(new.step) == steps:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            return new, log

        engine.update = counted
        return engine

    return make


@pytest.mark.slow
def test_an_error_in_one_ends_both(tmp_path):
    processes = start(tmp_path / "w", SMALL | SHARED, fail_at=3)
    said = finish(processes, status=1)
    assert "nothing to see" in said[1][1]
    assert "process 1 failed: RuntimeError: nothing to see" in said[0][1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("atuo", "expected auto, or HOST:PORT,NUM,ID"),
        ("localhost,2,0", "expected auto, or HOST:PORT,NUM,ID"),
        ("localhost:1,2", "expected auto, or HOST:PORT,NUM,ID"),
        ("localhost:1,two,0", "expected auto, or HOST:PORT,NUM,ID"),
        ("localhost:1,2,2", "of 2 processes, ID is one of 0 to 1"),
    ],
)
def test_a_mistyped_flag_is_explained(text, said):
    with pytest.raises(distributed.DistributedError, match=said):
        distributed.initialise(text)


@pytest.mark.slow
def test_auto_where_there_is_nothing():
    done = subprocess.run(
        [sys.executable, "-m", "jaxaccum.train", "--distributed=auto",
         "--config=configs/quickstart.py"], cwd=ROOT, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "auto works on Slurm, Open MPI and TPUs; elsewhere give HOST:PORT,NUM,ID" in done.stderr


def test_alone_nothing_is_shared():
    peers = distributed.initialise("")
    assert peers.first and peers.alone and peers.begin(3)
    assert peers.from_first("x", [1, float("inf")]) == [1, float("inf")]
    assert peers.furthest(7) == 7
    peers.stop(15)
    assert peers.begin(4)


def test_shares_of_a_window_are_its_columns():
    from jaxaccum.accumulate import Geometry, Recipe, Window

    window = Window(Recipe(10, 2), Geometry(2, 4))
    batch = {"x": np.arange(10), "weight": np.ones(10, np.float32)}
    whole = window.split(batch)
    parts = []
    for devices in (range(0, 2), range(2, 4)):
        rows = window.share(devices)
        parts.append(window.split_share({k: v[rows] for k, v in batch.items()}, devices))
    for key in whole:
        np.testing.assert_array_equal(
            np.concatenate([part[key] for part in parts], axis=1), whole[key]
        )


def _captioned(**changes):
    """A loss that couples all samples of the effective batch."""
    return tiny_completion.tiny_config(**tiny_completion.CAPTIONED, **changes)


CONFIGS |= {"captioned": _captioned}


@pytest.mark.slow
@pytest.mark.long
def test_coupled_terms_in_two_processes(tmp_path, monkeypatch, x64):
    """In float64: a contrast of a network with nearest neighbours amplifies rounding."""
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    changes = {
        "nbs": 10, "bn_group": "frozen", "optimizer.name": "sgd", "lr.base": 1e-4, "steps": 3,
        "eval.every": -1, "checkpoint.every": 3, "dtype": "float64",
    }  # fmt: skip
    train.train(_captioned(**changes, devices=1), tmp_path / "one")
    finish(start(tmp_path / "two", changes | SHARED, config="captioned"))
    assert_same_run(tmp_path / "two", tmp_path / "one", 1e-6)  # parameters are float32


def _one_of_many(job: dict) -> None:
    """One process of `start`: trains, and writes down the indices that its loader made."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    run.use_compilation_cache()
    if job.get("x64"):
        jax.config.update("jax_enable_x64", True)
        # A run keeps its state in float32, whatever it computes in.
        tasks.DetectionTask.initialise.__defaults__ = (np.float64,)  # type: ignore[attr-defined]
    from jaxaccum.data.stream import SampleStream

    fill, loaded = SampleStream._fill, []

    def noted(self, batch, row, position):
        loaded.append(int(self.order(position // self._length)[position % self._length]))
        if job.get("fail_at") and len(loaded) > 10 * job["fail_at"] and not peers.first:
            raise RuntimeError("nothing to see")
        return fill(self, batch, row, position)

    with distributed.joined(job["flag"]) as peers:
        if not job["changes"].get("data.workers"):  # a worker process could not be sent this
            SampleStream._fill = noted  # type: ignore[method-assign]
        whom, steps = job.get("stop", (None, 0))
        if whom == peers.index:
            training.make_engine = _stopping(training.make_engine, steps)
        config = CONFIGS[job.get("config", "tiny")](**job["changes"])
        train.train(config, Path(job["workdir"]), peers=peers)
        Path(job["workdir"], f"loaded-{peers.index}.json").write_text(json.dumps(loaded))


if __name__ == "__main__":
    _one_of_many(json.loads(sys.argv[1]))
