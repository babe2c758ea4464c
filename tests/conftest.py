"""Test set-up: four host devices, and where the development data lies if it is there."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all the time of the tests is XLA's, and two fifths of that are optimizations of LLVM, which
# change speed and the last bit. The lanes (scripts/lane.sh) and a test in
# tests/accumulate/test_hardware.py compile as users do; XLA_FLAGS= scripts/test.sh does so for all.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# Processes that tests start say nothing of their imports, however busy the machine is.
os.environ.setdefault("JAXACCUM_SILENT_IMPORTS", "1")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)

import tiny  # noqa: F401 registers the model "tiny-t"

from jaxaccum.training import run

run.use_compilation_cache()

# A shell starts what it puts in the background without them, and what tests start inherits that.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for ended in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(ended, signal.SIG_DFL)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """Processes of `-n auto`: the processors that this process may use (xdist would take the cores
    of the machine); None, where the system does not tell, leaves it to xdist."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


# The files that take minutes, the longest first. They come after the others, so that a limit of
# time leaves out the fewest tests, and in this order, so that no processor is idle for long at the
# end: a file stays in one process.
LONGEST = (
    "train", "completion_models", "parity", "plan", "captioned", "distributed", "detection3d",
    "completion", "equivalence", "compare", "hardware", "law_blocks", "coupled", "golden",
    "own_task", "examples", "packed", "known_answers", "run_robustness", "verbs", "models",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, -1))


START = time.monotonic()
MINUTES = float(os.environ.get("JAXACCUM_TEST_MINUTES", "inf"))


def pytest_runtest_setup(item):
    """Where time is limited (JAXACCUM_TEST_MINUTES), what has not begun by then is skipped, and
    said to be."""
    if time.monotonic() - START > 60 * MINUTES:
        pytest.skip(f"not run: the {MINUTES:g} minutes of JAXACCUM_TEST_MINUTES are over")


def environment() -> dict[str, str]:
    """What decides how a process started now computes, and where it looks; libraries set other
    variables when they are imported."""
    ours = ("JAX", "XDG_", "XLA_", "PYTHON", "GLIBC_", "OMP_", "CUDA_")
    return {name: value for name, value in os.environ.items() if name.startswith(ours)}


@pytest.fixture(autouse=True)
def the_environment_stays():
    """A variable left behind decides what the next test starts, on some orders of tests only."""
    before = environment()
    yield
    assert environment() == before


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of development data; a test that needs it skips where it is absent."""
    folder = Path(os.environ.get("JAXACCUM_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip("development data (JAXACCUM_SHARED or ../shared) is not here")
    return folder


@pytest.fixture(scope="module", autouse=True)
def programs_end_with_their_module():
    """Every compiled program holds memory maps, and Linux allows a process 65530 of them: a run of
    all tests ended in a segmentation fault."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def x64():
    """Computes in float64."""
    with jax.enable_x64(True):
        yield
