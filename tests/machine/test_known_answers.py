"""The known answers that verbs ask JAX for, and the XLA flags that a version of it needs."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

from jaxaccum.accumulate import batchnorm
from jaxaccum.machine import known_answers, user_cache, xla_flags
from jaxaccum.models import ops

ROOT = Path(__file__).parents[2]
FLAG = "--xla_cpu_experimental_ynn_fusion_type=-reduce"
CASES = {case.name: case for case in known_answers.CASES}
# The cheapest one.
LARGEST = CASES["the largest of many"]
BROKEN = dataclasses.replace(
    LARGEST,
    compute=lambda scores: {
        "value": jax.lax.top_k(scores, 10)[0].at[3, 4].add(1),
        "place": jax.lax.top_k(scores, 10)[1],
    },
)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder of the user's, and cheap cases alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(known_answers, "CASES", (LARGEST,))
    return tmp_path / "cache" / "jaxaccum" / "known_answers"


# --- The cases. ---


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CASES)
def test_jax_computes_right_here(name, dtype):
    assert known_answers.wrong(CASES[name], dtype) is None


@pytest.mark.parametrize("name", CASES)
def test_one_wrong_element_is_named(name):
    """In any output, and no more than a hundredth of the largest value wrong."""
    case = CASES[name]
    rng = np.random.default_rng(1)
    inputs = case.make(np.random.default_rng(0))
    exact = {k: v.astype(np.float32).astype(v.dtype) for k, v in inputs.items()}
    right = case.right(**exact)
    for output, (value, _) in right.items():
        for error in (np.abs(value).max() / 100, -np.abs(value).max() / 100, np.nan):
            place = tuple(rng.integers(0, size) for size in value.shape)
            answer = {k: np.array(v, np.float32) for k, (v, _) in right.items()}
            answer[output][place] += error
            broken = dataclasses.replace(
                case, compute=lambda answer=answer, **_: jax.tree.map(jnp.asarray, answer)
            )
            said = known_answers.wrong(broken)
            assert said is not None, (output, place, error)
            assert said.startswith(f'"{name}" in float32: {output}[{", ".join(map(str, place))}]')
            assert f"(1 of {value.size} values" in said


@pytest.fixture
def traced_anew():
    """JAX keeps what it traced of a function, whatever is put in place of what that calls."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    ("name", "owner", "function"),
    [
        ("3x3 convolution and its gradients", ops, "conv_general_dilated"),
        ("1x1 convolution and its gradients", ops, "conv_general_dilated"),
        ("depthwise convolution and its gradients", ops, "conv_general_dilated"),
        ("batch norm over groups and its gradients", batchnorm, "normalise"),
        ("sums of squared products", jnp, "sum"),
        ("the largest of many", jax.lax, "top_k"),
    ],
)
def test_the_code_in_use_is_what_is_checked(name, owner, function, monkeypatch, traced_anew):
    """One element of what a case calls is wrong; its right values do not call it."""
    real = getattr(owner, function)

    def wrong_in_one(*args, **kwargs):
        out = real(*args, **kwargs)
        if isinstance(out, (tuple, list)):
            return out[0].at[(0,) * out[0].ndim].add(0.1), *out[1:]
        return out.at[(0,) * out.ndim].add(0.1)

    monkeypatch.setattr(owner, function, wrong_in_one)
    said = known_answers.wrong(CASES[name])
    assert said is not None and said.startswith(f'"{name}"')


def test_a_sum_that_loses_one_of_its_terms_is_caught():
    case = CASES["sums scattered into places"]

    def loses(into, place, values):
        return case.compute(into, place, values.at[2, 100].set(0))

    said = known_answers.wrong(dataclasses.replace(case, compute=loses))
    assert said is not None and said.startswith('"sums scattered into places"')


# --- What is remembered. ---


def test_the_second_start_computes_nothing(cache, monkeypatch):
    known_answers.require()
    assert len(list(cache.iterdir())) == 1
    asked = []
    monkeypatch.setattr(known_answers, "wrong", lambda *a: asked.append(a))
    known_answers.require()
    assert not asked
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")  # may change results
    known_answers.require()
    assert len(asked) == 1 and len(list(cache.iterdir())) == 2


def test_what_an_answer_depends_on(monkeypatch):
    def circumstances():
        return known_answers._circumstances(jax.local_devices()[0])

    here = circumstances()
    assert here == circumstances()
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    assert circumstances() != here
    monkeypatch.undo()
    monkeypatch.setattr(jaxlib, "__version__", "0.10.2.other")
    assert circumstances() != here
    monkeypatch.undo()
    with jax.enable_x64(True):
        assert circumstances()["dtypes"] == ["float32", "float64"]


def test_a_wrong_answer_is_never_remembered(cache, monkeypatch, capsys):
    monkeypatch.setattr(known_answers, "CASES", (BROKEN,))
    for _ in range(2):
        with pytest.raises(known_answers.WrongNumbersError) as raised:
            known_answers.require()
        said = str(raised.value)
        assert '"the largest of many" in float32: value[3, 4]' in said
        assert jaxlib.__version__ in said and "--allow_wrong_numbers" in said
    known_answers.require(allow_wrong=True)
    assert capsys.readouterr().err.splitlines()[-1].startswith("warning: jaxlib")
    assert not cache.exists()
    monkeypatch.setattr(known_answers, "CASES", (LARGEST,))
    known_answers.require()


def test_a_cache_that_cannot_be_written_or_read(cache, monkeypatch, tmp_path):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    known_answers.require()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(known_answers, "CASES", (LARGEST,))
    known_answers.require()
    (file,) = cache.iterdir()
    file.write_text(file.read_text()[:20])
    asked = []
    monkeypatch.setattr(known_answers, "wrong", lambda *a: asked.append(a))
    known_answers.require()
    assert asked and json.loads(file.read_text())


def test_many_at_once_leave_one_whole_file(tmp_path):
    file = tmp_path / "folder" / "answer.json"
    circumstances = {"environment": "x" * 200_000}
    seen = []

    def start():
        user_cache.save(file, circumstances)
        seen.append(user_cache.load(file) == circumstances)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 8
    assert list(file.parent.iterdir()) == [file]


def test_the_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert user_cache.folder() == Path("/somewhere/jaxaccum")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert user_cache.folder() == Path("/home/me/.cache/jaxaccum")


# --- The verbs. ---

PROGRAM = f"""
import runpy, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}, {str(ROOT / "tests/machine")!r}]
import tiny, test_known_answers
from jaxaccum.machine import known_answers
known_answers.CASES = (test_known_answers.BROKEN,)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
VERBS = {
    "evaluate": (["--workdir=nowhere"], "nowhere: no such folder"),
    "predict": (
        ["--workdir=nowhere", "--source=x", "--out=y"], "nowhere: no such folder",
    ),
    "train": (
        ["--config=configs/quickstart.py", "--config.data.path=/nowhere", "--workdir=nowhere"],
        "/nowhere",
    ),
}  # fmt: skip


def start(cache: Path, verb: str, *arguments: str) -> subprocess.CompletedProcess:
    """A verb in a process of its own, where one answer is wrong and nothing is remembered."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache),
        "JAX_COMPILATION_CACHE_DIR": str(user_cache.folder() / "xla"),
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, f"jaxaccum.{verb}", *arguments], cwd=ROOT,
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "verb", ["evaluate", *(pytest.param(v, marks=pytest.mark.slow) for v in ("predict", "train"))]
)
def test_a_verb_refuses_and_goes_on_if_told_to(verb, tmp_path):
    arguments, next_error = VERBS[verb]
    done = start(tmp_path, verb, *arguments)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert '"the largest of many"' in line and "--allow_wrong_numbers" in line
    assert next_error not in done.stderr
    done = start(tmp_path, verb, *arguments, "--allow_wrong_numbers")
    assert done.returncode == 1, done.stderr
    assert "warning: jaxlib" in done.stderr and '"the largest of many"' in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert next_error in line


@pytest.mark.slow
def test_a_training_goes_on_to_its_end_if_told_to(tmp_path):
    arguments = [
        "--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}", "--config.steps=2",
        "--config.model=tiny-t", "--config.data.image_size=64", "--config.eval.every=-1",
        "--config.data.workers=0", "--config.nbs=4", "--config.microbatch=2", "--config.bn_group=2",
        "--config.log.images=0", "--config.data.max_objects=20",
    ]  # fmt: skip
    assert start(tmp_path, "train", *arguments).returncode == 1
    assert not (tmp_path / "run").exists()
    done = start(tmp_path, "train", *arguments, "--allow_wrong_numbers")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_each_of_several_processes_asks_its_own_device(broken, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    program = f"""
import sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "tests/machine")!r}]
import test_known_answers
from jaxaccum.machine import known_answers
from jaxaccum.training.distributed import joined
if {broken}:
    known_answers.CASES = (test_known_answers.BROKEN,)
with joined(sys.argv[1]):
    known_answers.require()
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, f"{address},2,{i}"], cwd=ROOT, env=environment,
            stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [int(broken)] * 2, said
    assert len(list(tmp_path.rglob("*.json"))) == (not broken)
    if broken:
        assert all('"the largest of many"' in text for text in said)


# --- XLA's flags. ---


@pytest.fixture
def before_jax(monkeypatch):
    """As if no backend had started yet."""
    monkeypatch.setattr(jax._src.xla_bridge, "backends_are_initialized", lambda: False)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("", FLAG),
        ("--xla_dump_to=x", f"--xla_dump_to=x {FLAG}"),
        (FLAG, FLAG),
        ("--xla_cpu_experimental_ynn_fusion_type=reduce", None),
        (f"--xla_dump_to=x {FLAG}", None),
    ],
)
def test_the_flag_is_added_to_those_of_the_user(given, kept, before_jax):
    environment = {"XLA_FLAGS": given} if given else {}
    xla_flags.set_needed(environment, "0.10.2")
    assert environment == {"XLA_FLAGS": given if kept is None else kept}
    again = dict(environment)
    xla_flags.set_needed(again, "0.10.2")  # a process that this one starts
    assert again == environment


@pytest.mark.parametrize("version", ["0.10.1", "0.11.0", "0.11.2", "0.12.0.1", "0.13.0"])
def test_no_other_version_gets_the_flag(version, before_jax):
    environment = {"XLA_FLAGS": "--xla_dump_to=x"}
    xla_flags.set_needed(environment, version)
    assert environment == {"XLA_FLAGS": "--xla_dump_to=x"}
    assert xla_flags.note(version) is None


def test_flags_in_a_file_are_kept(tmp_path, before_jax):
    (tmp_path / "flags").write_text("--xla_dump_to=x\n--xla_dump_hlo_as_text\n")
    environment = {"XLA_FLAGS": str(tmp_path / "flags")}
    xla_flags.set_needed(environment, "0.10.2")
    assert environment["XLA_FLAGS"].split() == ["--xla_dump_to=x", "--xla_dump_hlo_as_text", FLAG]


def test_a_flag_that_comes_too_late_is_a_warning():
    jax.devices()
    environment: dict[str, str] = {}
    with pytest.warns(UserWarning, match="import jaxaccum first"):
        xla_flags.set_needed(environment, "0.10.2")
    assert environment == {}


def test_what_a_user_is_told_of_the_flag(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=x {FLAG}")
    assert f"XLA runs with {FLAG}" in xla_flags.note("0.10.2")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=reduce")
    assert "XLA_FLAGS is left as it was given" in xla_flags.note("0.10.2")


@pytest.mark.skipif(jaxlib.__version__ not in xla_flags.NEEDED, reason="this jaxlib is right")
@pytest.mark.parametrize("given", ["", "--xla_cpu_experimental_ynn_fusion_type=reduce"])
def test_the_jaxlib_that_needs_the_flag(given, tmp_path):
    """It is wrong without, which is caught, and right with it; said once, in both cases."""
    program = (
        "from jaxaccum.machine import known_answers\n"
        "known_answers.CASES = known_answers.CASES[:1]\n"
        "known_answers.require()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False,
        env=environment | ({"XLA_FLAGS": given} if given else {}),
    )  # fmt: skip
    assert done.stderr.count("JAX issue 39103") == 1
    assert done.returncode == bool(given), done.stderr
    if given:
        assert "WrongNumbersError" in done.stderr and '"sums of squared products"' in done.stderr
