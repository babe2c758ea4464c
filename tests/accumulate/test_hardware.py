"""The law on the user's own machine: what scripts/equivalence.py runs, refuses and says."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import hardware
import pytest
from hardware import Laid

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
import os, sys
import small
from jaxaccum import config as configs

def get_config():
    {first}
    config = configs.detection()
    config.model = "small-t"
    config.nbs, config.bn_group = 10, 2
    config.data.image_size, config.data.max_objects = 32, 8
    config.optimizer.name, config.lr.base = "sgd", 1e-4
    return config
"""


def check(
    folder: Path, *flags: str, first: str = "pass", xla: str = os.environ["XLA_FLAGS"]
) -> subprocess.CompletedProcess:
    """Runs the script with a network that compiles in seconds."""
    config = folder / "config.py"
    config.write_text(CONFIG.format(first=first))
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "equivalence.py", f"--config={config}", *flags],
        text=True, capture_output=True, timeout=900, cwd=folder,
        env=os.environ | {"XLA_FLAGS": xla},
    )  # fmt: skip


def rows(said: str) -> dict[str, tuple[str, list[float]]]:
    """Of each geometry the verdict and the differences."""
    lines = [line.split() for line in said.splitlines()]
    return {
        line[0]: (line[2], [float(x) for x in line[3:]])
        for line in lines
        if len(line) == 9 and line[0][0].isdigit()
    }


@pytest.mark.slow
def test_processes_and_a_divided_state_are_one_run(tmp_path):
    # The last has groups of four: two microbatches of each of two processes.
    laid = ["12x1x1", "4x2x2p2", "4x1x4x2", "4x1x4x2p2", "1x6x2p2"]
    done = check(
        tmp_path, f"--geometries={','.join(laid)}", "--engines=scan", "--x64", "--updates=2",
        "--config.bn_group=4",
        "--repeat", "--platform=cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(done.stdout)
    assert list(found) == laid
    for name, (verdict, (gradient, loss, *_)) in found.items():
        assert verdict == "ok"
        assert gradient < 1e-12 and loss < 1e-12
        assert (gradient > 0) == (name != "12x1x1")  # they were computed in another order
    assert "on cpu, 4 devices\n" in done.stdout
    assert "12x1x1 scan run again: bit for bit\n" in done.stdout
    assert "one run on every geometry" in done.stdout


@pytest.mark.slow
def test_the_law_as_users_compile(tmp_path):
    """With all of XLA's optimizations, which other tests leave out (tests/conftest.py)."""
    done = check(tmp_path, "--geometries=12x1x1,4x2x2", "--x64", "--updates=2", xla="")
    assert done.returncode == 0, done.stdout + done.stderr
    for verdict, (gradient, loss, *_) in rows(done.stdout).values():
        assert verdict == "ok" and gradient < 1e-12 and loss < 1e-12


@pytest.mark.slow
def test_the_law_in_float32(tmp_path):
    """To rounding: oneDNN, where it is, cuts a convolution by the rows of the microbatch."""
    done = check(tmp_path, "--geometries=12x1x1,4x3x1,4x2x2", "--engines=scan", "--updates=1")
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(done.stdout)
    assert len(found) == 3
    for verdict, (gradient, loss, *_) in found.values():
        assert verdict == "ok" and gradient < 1e-4 and loss < 1e-5


@pytest.mark.slow
@pytest.mark.long
def test_multisteps_in_processes_in_bfloat16(tmp_path):
    done = check(
        tmp_path, "--geometries=12x1x1,4x2x2p2", "--engines=multisteps", "--updates=2",
        "--config.dtype=bfloat16", "--platform=cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    verdict, (gradient, *_) = rows(done.stdout)["4x2x2p2"]
    assert verdict == "ok" and gradient > 1e-5
    assert "XLA_FLAGS: added --xla_allow_excess_precision=false" in done.stdout
    assert "bfloat16 is " in done.stdout and "from float32 in the first gradient" in done.stdout


@pytest.mark.slow
def test_a_process_that_dies_is_told(tmp_path):
    """While the other one waits for it."""
    first = 'if ",2,1" in str(sys.argv): raise RuntimeError("nothing to see")'
    began = time.monotonic()
    done = check(tmp_path, "--geometries=4x2x2p2", "--engines=scan", first=first)
    assert done.returncode == 1
    assert "process 1 of 2 ended with status 1" in done.stderr
    assert "nothing to see" in done.stderr and "(geometry 4x2x2p2, scan)" in done.stderr
    assert time.monotonic() - began < 200


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_processes_that_end_well():
    hardware.together([python("pass"), python("import os; assert os.environ['X'] == '1'")],
                      [{}, {"X": "1"}], 60)  # fmt: skip


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("print('so it was'); raise SystemExit(3)", "ended with status 3"),
        (
            "print('so it was', flush=True); import os; os.kill(os.getpid(), 9)",
            "was ended by signal 9",
        ),
    ],
)
def test_one_that_fails_ends_the_others(code, status):
    waits = python("import time; time.sleep(600)")
    began = time.monotonic()
    with pytest.raises(SystemExit, match=f"process 1 of 2 {status}(.|\n)*so it was"):
        hardware.together([waits, python(code)], [{}, {}], 500, grace=0.1)
    assert time.monotonic() - began < 60


def test_processes_that_hang_are_ended():
    waits = python("print('here', flush=True); import time; time.sleep(600)")
    with pytest.raises(SystemExit, match=r"2 processes were not done after 5 s(.|\n)*here"):
        hardware.together([waits, waits], [{}, {}], 5)


def test_geometries_are_read():
    texts = ["8x1x1", "4x1x4x2", "4x2x2p2", "4x1x4x2p4"]
    laid = hardware.parse_geometries(texts)
    assert laid == [
        Laid(8, 1, 1), Laid(4, 1, 4, 2), Laid(4, 2, 2, processes=2), Laid(4, 1, 4, 2, 4)
    ]  # fmt: skip
    assert list(map(str, laid)) == texts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8x1", "'8x1' is not MICROBATCHxSTEPSxDEVICES"),
        ("8x0x1", "'8x0x1' is not"),
        ("4x2x2p", "'4x2x2p' is not"),
        ("4x2x1p2", "1 devices in all cannot be those of 2 processes.*as in 4x2x2p2"),
    ],
)
def test_other_geometries_are_refused(text, said):
    with pytest.raises(SystemExit, match=said):
        hardware.parse_geometries([text])


@pytest.mark.parametrize(
    ("laid", "backend", "there", "said"),
    [
        (Laid(4, 2, 2), "gpu", 1, "4x2x2 wants 2 devices, and here are: D. 4x4x1 would fit"),
        (
            Laid(4, 2, 2, processes=2), "gpu", 1,
            r"4x2x2p2 wants 2 devices \(2 processes need one each\), and here are: D. 4x4x1 would",
        ),
        (Laid(4, 1, 8, 2), "tpu", 4, "4x1x8x2 wants 8 devices, and here are: D. 4x2x4 would fit"),
        (Laid(4, 2, 2, processes=2), "tpu", 4, "not on tpu: 4x2x2 would run"),
    ],
)  # fmt: skip
def test_more_than_there_is_is_refused(laid, backend, there, said):
    with pytest.raises(SystemExit, match=said):
        hardware.require_devices([laid], backend, there, "D")
    hardware.require_devices([laid], "cpu", 1, "D")
    hardware.require_devices([laid._replace(processes=1)], backend, 8, "D")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (None, "--a_flag=true --b=false", "XLA_FLAGS: added --a_flag=true --b=false"),
        ("--x=1", "--x=1 --a_flag=true --b=false", "XLA_FLAGS: added --a_flag=true --b=false"),
        (
            "--a_flag=false --x=1", "--a_flag=false --x=1 --b=false",
            "XLA_FLAGS: added --b=false, a_flag as you set it",
        ),
        ("--b --a_flag", "--b --a_flag", "XLA_FLAGS: a_flag as you set it, b as you set it"),
        ("a.txt", "a.txt", "XLA_FLAGS names a file; it should have --a_flag=true --b=false"),
    ],
)  # fmt: skip
def test_the_users_own_xla_flags_stand(monkeypatch, before, after, said):
    monkeypatch.setenv("XLA_FLAGS", before or "")  # so that it is put back, also where none was
    if before is None:
        monkeypatch.delenv("XLA_FLAGS")
    assert hardware.tell_xla(["--a_flag=true", "--b=false"]) == said
    assert os.environ["XLA_FLAGS"] == after


def test_nothing_is_told_where_nothing_is_wanted(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--x=1")
    assert hardware.tell_xla([]) == "" and os.environ["XLA_FLAGS"] == "--x=1"


@pytest.mark.parametrize(
    ("platform", "environment", "gpu"),
    [("cpu", "cuda", False), ("gpu", "", True), (None, "cuda,cpu", True), (None, "cpu", False)],
)
def test_whether_it_may_be_a_gpu(monkeypatch, platform, environment, gpu):
    monkeypatch.setenv("JAX_PLATFORMS", environment)
    assert hardware.may_be_gpu(platform) == gpu


def test_a_cpu_knows_the_flags_for_a_gpu():
    """An unknown one would end the process before it could say so."""
    flags = f"{hardware.DETERMINISTIC} {hardware.ROUNDED}"
    for text, status in ((flags, 0), (f"{flags} --xla_no_such_flag=1", 1)):
        done = subprocess.run(
            python("import jax; jax.devices()"), text=True, capture_output=True,
            env=os.environ | {"XLA_FLAGS": text, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        assert bool(done.returncode) == bool(status), done.stderr


def test_a_platform_that_is_not_here_is_refused():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import hardware; "
        "hardware.start('tpu', 1)"
    )
    done = subprocess.run(python(code), text=True, capture_output=True)
    assert done.returncode == 1
    assert "error: --platform=tpu: JAX cannot use it here: " in done.stderr
    assert "Traceback" not in done.stderr
