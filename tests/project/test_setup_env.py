"""The two commands take the right Python and the same versions every day.

Interpreters are small shell scripts in a temporary HOME, which say of themselves what a real one is
asked; PATH holds them and the few tools that the scripts use.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
TOOLS = (
    "bash",
    "cat",
    "cmp",
    "cp",
    "cut",
    "dirname",
    "env",
    "mkdir",
    "mktemp",
    "rm",
    "sed",
    "sort",
)
LATER = (14, 13, 12)

# Writes down the modules that it is asked to run, and fails at those named in FAKE_FAILS.
PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
  "-c "*json*) echo "${{FAKE_NEWEST-}}" ;;
  "-c "*jax*) echo 0.12.0 ;;
  "-c "*) echo "{said}" ;;
  "-m venv")
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python" ;;
  "-m "*)
    echo "$0 $*" >> "$FAKE_LOG"
    [[ " ${{FAKE_FAILS-}} " != *" $2 "* ]] ;;
  "- "*) echo "$*" ;;
  *) exit 9 ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """A machine with the files of the repository that `install` reads, and no Python."""
    machine = Machine(tmp_path)
    for name in TOOLS:
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    return machine


class Machine:
    def __init__(self, home):
        self.home, self.repo, self.log = home, home / "repo", home / "pip.log"
        for name in ("bin", "repo/scripts", "repo/constraints"):
            (home / name).mkdir(parents=True)
        shutil.copy(ROOT / "scripts/setup_env.sh", self.repo / "scripts")
        for file in ("requirements.txt", "requirements-cpu.txt", "requirements-test.txt"):
            (self.repo / file).write_text(f"# {file}\n")
        (self.repo / "constraints/py311.txt").write_text("jax==0.10.2\n")
        (self.repo / "constraints/py312.txt").write_text("jax==0.12.0\n")

    def python(self, folder, version, kind="stable", name=None):
        """An interpreter in HOME/folder, which says "VERSION KIND" of itself."""
        name = name or f"python3.{version.split('.')[1]}"
        return self.program(f"{folder}/{name}", PYTHON.format(said=f"{version} {kind}"))

    def broken(self, path):
        return self.program(path, "#!/usr/bin/env bash\necho not selected >&2\nexit 127\n")

    def program(self, path, text):
        file = self.home / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
        return file

    def run(self, *command, **env):
        return subprocess.run(
            [shutil.which("bash"), *command], cwd=self.repo, capture_output=True, text=True,
            check=False, timeout=60,
            env={"HOME": str(self.home), "PATH": str(self.home / "bin"), "FAKE_LOG": str(self.log)}
            | {name: str(value) for name, value in env.items()},
        )  # fmt: skip

    def shell(self, line, **env):
        line = f"set -euo pipefail; source scripts/setup_env.sh; {line}"
        return self.run("-c", line, **env)

    def logged(self):
        """What Pythons were asked to run since the last look."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines

    def found(self, minors=LATER, **env):
        done = self.shell(f"find_python {' '.join(map(str, minors))}", **env)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def installed(self):
        """What pip was asked for since the last look: (requirement file, constraints)."""
        asked = [tuple(re.findall(r"-[rc] (\S+)", line)) for line in self.logged()]
        return [files for files in asked if files]


OTHERS = """
import sys, sysconfig
class Release(tuple): releaselevel = "candidate"
def built_with(name, real=sysconfig.get_config_var):
    sysconfig.get_config_var = lambda asked: asked == name or real(asked)
"""

PLACES = {
    "the PATH": ("bin", {}),
    "pyenv": (".pyenv/versions/3.13.1/bin", {}),
    "pyenv's root": ("my pyenv/versions/3.13.1/bin", {"PYENV_ROOT": "my pyenv"}),
    "an environment of pyenv's conda": (".pyenv/versions/miniconda3/envs/x/bin", {}),
    "uv": (".local/share/uv/python/cpython-3.13.1-linux-x86_64-gnu/bin", {}),
    "uv's folder": ("uv/cpython-3.13.1/bin", {"UV_PYTHON_INSTALL_DIR": "uv"}),
    "conda's base": ("miniconda3/bin", {}),
    "conda's environment": ("miniforge3/envs/x/bin", {}),
    "anaconda's environment": ("anaconda3/envs/x/bin", {}),
    "the environment that conda is in": ("conda/here", {"CONDA_PREFIX": "conda"}),
    "the conda that is used": ("c/envs/x/bin", {"CONDA_EXE": "c/bin/conda"}),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_python_is_found_at(machine, place):
    folder, env = PLACES[place]
    folder = folder.replace("here", "bin")
    file = machine.python(folder, "3.13.1")
    assert machine.found(**{name: machine.home / value for name, value in env.items()}) == (
        f"3.13.1 {file}"
    )
    assert machine.found([11]) == ""


def test_the_newest_is_taken_wherever_it_is(machine):
    machine.python("bin", "3.12.9")
    machine.python(".pyenv/versions/3.13.9/bin", "3.13.9")
    file = machine.python(".pyenv/versions/3.13.10/bin", "3.13.10")
    assert machine.found() == f"3.13.10 {file}"
    file = machine.python("miniconda3/envs/new/bin", "3.14.0")
    assert machine.found() == f"3.14.0 {file}"


def test_of_equals_the_one_on_the_path_is_taken(machine):
    machine.python(".pyenv/versions/3.13.1/bin", "3.13.1")
    file = machine.python("bin", "3.13.1")
    assert machine.found() == f"3.13.1 {file}"


@pytest.mark.parametrize("kind", ["pre-release", "debug-build", "free-threaded", "without-ssl"])
def test_a_special_build_is_left(machine, kind):
    machine.python("bin", "3.14.0", kind)
    file = machine.python(".pyenv/versions/3.12.1/bin", "3.12.1")
    assert machine.found() == f"3.12.1 {file}"


def test_what_does_not_run_or_is_another_version_is_left(machine):
    machine.broken("bin/python3.14")  # pyenv's shim of a version that is not selected
    machine.python("bin", "3.15.0", name="python3")
    machine.python(".pyenv/versions/3.10.1/bin", "3.10.1")
    file = machine.python("bin", "3.12.1", name="python")
    assert machine.found((14, 13, 12, 11)) == f"3.12.1 {file}"


@pytest.mark.parametrize(
    ("about", "kind"),
    [
        ("", "stable"),
        ("sys.modules['ensurepip'] = None", "without-ensurepip"),
        ("sys.modules['ssl'] = None", "without-ssl"),
        ("built_with('Py_DEBUG')", "debug-build"),
        ("built_with('Py_GIL_DISABLED')", "free-threaded"),
        ("sys.version_info = Release(sys.version_info)", "pre-release"),
    ],
)
def test_what_an_interpreter_is(machine, about, kind):
    """The real interpreter, made to look like another."""
    (machine.home / "sitecustomize.py").write_text(OTHERS + about + "\n")
    done = machine.shell(f"describe '{sys.executable}'", PYTHONPATH=machine.home)
    assert done.stdout.split() == ["{}.{}.{}".format(*sys.version_info), kind]


def test_the_version_is_said_and_pip_gets_its_constraints(machine):
    machine.python("bin", "3.11.9")
    file = machine.python(".pyenv/versions/3.13.1/bin", "3.13.1")
    done = machine.shell("install requirements-test.txt")
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.splitlines()[0] == f"making .venv with Python 3.13.1 ({file}), the newest found"
    )
    assert machine.installed() == [
        ("requirements-cpu.txt", "constraints/py312.txt"),
        ("requirements-test.txt", "constraints/py312.txt"),
    ]


def test_python_3_11_is_the_last_choice_and_said(machine):
    file = machine.python("bin", "3.11.9")
    machine.python("bin", "3.14.0", "pre-release")
    done = machine.shell("install")
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    made = f"making .venv with Python 3.11.9 ({file}), the newest found"
    assert first == f"{made}; JAX for it is the older 0.10.2"
    assert machine.installed() == [("requirements-cpu.txt", "constraints/py311.txt")]


def test_pip_runs_again_only_where_a_file_has_changed(machine):
    machine.python("bin", "3.13.1")
    again = [("requirements-cpu.txt", "constraints/py312.txt")]
    machine.shell("install")
    assert machine.installed() == again
    machine.shell("install")
    assert machine.installed() == []
    for file in ("requirements-cpu.txt", "constraints/py312.txt"):
        (machine.repo / file).write_text("# another\n")
        machine.shell("install")
        assert machine.installed() == again
    (machine.repo / "constraints/py311.txt").write_text("# another\n")
    machine.shell("install")
    assert machine.installed() == []


def test_a_gpu_gets_the_requirements_for_cuda(machine):
    machine.python("bin", "3.13.1")
    machine.program("bin/nvidia-smi", "#!/usr/bin/env bash\necho 'GPU 0: any'\n")
    machine.shell("install")
    assert machine.installed() == [("requirements.txt", "constraints/py312.txt")]


def test_the_environment_that_is_there_is_kept(machine):
    machine.python("bin", "3.11.9")
    machine.shell("install")
    machine.installed()
    newer = machine.python("bin", "3.13.1")
    assert machine.shell("install").returncode == 0
    assert machine.shell("version_of $python venv").stdout == "3.11.9\n"
    done = machine.shell("install", JAXACCUM_PYTHON=newer)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: JAXACCUM_PYTHON={newer} is of Python 3.13.1 and .venv of Python 3.11.9:"
        " remove .venv, then start this again\n"
    )
    assert machine.shell("install", JAXACCUM_PYTHON=machine.home / "bin/python3.11").returncode == 0


def test_a_python_that_is_asked_for_is_taken(machine):
    machine.python("bin", "3.13.1")
    file = machine.python("my builds", "3.14.0", "pre-release", name="py")
    done = machine.shell("install", JAXACCUM_PYTHON=file)
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert first == f"making .venv with Python 3.14.0 ({file}), as JAXACCUM_PYTHON says"


@pytest.mark.parametrize("env", [False, True])
@pytest.mark.parametrize("version", ["3.10.1", None])
def test_an_unfit_python_is_an_error(machine, env, version):
    """Asked for, or in .venv."""
    folder = "bin" if env else "repo/.venv/bin"
    if version:
        file = machine.python(folder, version, name="python")
    else:
        file = machine.broken(f"{folder}/python")
    done = machine.shell("install", **({"JAXACCUM_PYTHON": file} if env else {}))
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    what = f"JAXACCUM_PYTHON={file}" if env else ".venv (remove it, then start this again)"
    says = f"is of Python {version}" if version else "does not run as a Python"
    assert f"{what} {says}" in done.stderr and "3.11 or later" in done.stderr
    assert machine.installed() == []


def test_no_python_is_an_error_that_names_what_was_left(machine):
    file = machine.python("bin", "3.13.1", "without-ensurepip")
    done = machine.shell("install")
    assert done.returncode == 1
    assert "needs Python 3.11 to 3.14" in done.stderr and "JAXACCUM_PYTHON=" in done.stderr
    assert f"3.13.1 without-ensurepip {file}" in done.stderr


# --- the versions ---


def requirements(file):
    lines = (line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


@pytest.mark.parametrize(("lane", "version"), [("py311", "3.11"), ("py312", "3.13")])
def test_the_constraints_keep_the_bounds(lane, version):
    pins = {}
    for pin in requirements(f"constraints/{lane}.txt"):
        (spec,) = pin.specifier
        assert spec.operator == "=="
        pins[re.sub("[-_.]+", "-", pin.name).lower()] = spec.version
    for file in ("requirements.txt", "requirements-cpu.txt", "requirements-test.txt"):
        for needed in requirements(file):
            if needed.marker is None or needed.marker.evaluate({"python_version": version}):
                name = re.sub("[-_.]+", "-", needed.name).lower()
                assert needed.specifier.contains(pins[name]), f"{file}: {needed}, {pins[name]}"


def test_gpu_and_cpu_need_the_same():
    assert [str(r).replace("[cuda12]", "") for r in requirements("requirements.txt")] == [
        str(r) for r in requirements("requirements-cpu.txt") if r.name != "onednn-cpu-gomp"
    ]


# --- the tests and CI ---


def test_sh_uses_every_processor_unless_told(machine):
    machine.python("bin", "3.13.1")
    shutil.copy(ROOT / "scripts/test.sh", machine.repo / "scripts")

    def arguments(*args):
        assert machine.run("scripts/test.sh", *args).returncode == 0
        return machine.logged()[-1].removeprefix(".venv/bin/python ")

    every = "-m pytest -n auto --dist loadfile --no-loadscope-reorder"
    assert arguments() == every
    assert arguments("-n", "1", "-m", "slow or not slow") == f"{every} -n 1 -m slow or not slow"
    assert arguments("-p", "no:xdist", "-x") == "-m pytest -p no:xdist -x"
    assert arguments("-pno:xdist") == "-m pytest -pno:xdist"


def test_sh_fails_with_any_part(machine):
    machine.python("bin", "3.13.1")
    shutil.copy(ROOT / "scripts/test.sh", machine.repo / "scripts")
    for part in ("ruff", "mypy", "pytest"):
        assert machine.run("scripts/test.sh", FAKE_FAILS=part).returncode == 1
        assert " -m pytest " in machine.logged()[-1]


def test_auto_is_the_processors_this_process_may_use(monkeypatch, request):
    if not request.config.pluginmanager.hasplugin("xdist"):
        pytest.skip("without pytest-xdist")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert request.config.hook.pytest_xdist_auto_num_workers(config=request.config) == 3


@pytest.fixture
def lane(machine):
    """Starts scripts/lane.sh."""
    shutil.copy(ROOT / "scripts/lane.sh", machine.repo / "scripts")
    return lambda *args, **env: machine.run("scripts/lane.sh", *args, **env)


def test_the_lane_of_python_3_11(machine, lane):
    machine.python("bin", "3.13.1")
    done = lane("3.11")
    assert done.returncode == 0 and done.stdout == "lane 3.11: SKIPPED, Python 3.11 is not here\n"
    machine.python("miniconda3/envs/old/bin", "3.11.9")
    done = lane("3.11")
    assert done.returncode == 0 and done.stdout.endswith("- 3.11 0\n"), done.stderr
    logged = machine.logged()
    assert all(line.startswith(".venv-3.11/bin/python -m ") for line in logged)
    assert "constraints/py311.txt" in logged[0]
    tests, training = logged[-2:]
    assert "-m pytest -n auto" in tests and "-m jaxaccum.train" in training
    files = re.findall(r"tests/\S+", tests)
    assert files and all((ROOT / file).exists() for file in files)
    for part in ("pytest", "jaxaccum.train"):
        done = lane("3.11", FAKE_FAILS=part)
        assert done.returncode == 1 and done.stdout.endswith("- 3.11 1\n")
        assert "-m jaxaccum.train" in machine.logged()[-1]


def test_the_lane_of_the_newest_jax(machine, lane):
    machine.python("bin", "3.13.1")
    done = lane("pre", FAKE_NEWEST="0.12.0")
    said = "lane pre: SKIPPED, no JAX newer than 0.12.0 is to be had"
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == said
    assert not (machine.repo / ".venv-pre").exists()
    machine.logged()
    done = lane("pre", FAKE_NEWEST="0.13.0rc1")
    assert done.returncode == 0 and done.stdout.endswith("- pre 0\n"), done.stderr
    logged = [line for line in machine.logged() if line.startswith(".venv-pre")]
    (newest,) = [line for line in logged if "--upgrade jax" in line]
    assert "--pre" in newest and "constraints" not in newest
    assert "-m pytest" in logged[-2]


def test_an_unknown_lane_is_an_error(lane):
    for args in ((), ("3.9",)):
        done = lane(*args)
        assert done.returncode == 1 and "usage: scripts/lane.sh 3.11|pre" in done.stderr


@pytest.mark.parametrize("failing", [(), ("3.11",), ("pre",), ("all",), ("3.11", "pre", "all")])
def test_ci_fails_with_the_main_and_the_older_lane(machine, failing):
    (machine.repo / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", machine.repo / ".ci")
    (machine.home / "bin/timeout").symlink_to(shutil.which("timeout"))
    statuses = {name: int(name in failing) for name in ("3.11", "pre", "all")}
    for name, lane in {"lane.sh": "$1", "test.sh": "all"}.items():
        cases = " ".join(f"{name}) exit {status} ;;" for name, status in statuses.items())
        machine.program(
            f"repo/scripts/{name}",
            f'#!/usr/bin/env bash\necho "summary of {lane}"\ncase {lane} in {cases} esac\n',
        )
    done = machine.run(".ci/run")
    assert done.returncode == int("3.11" in failing or "all" in failing)
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("summary")] == [
        "summary of 3.11", "summary of pre", "summary of all"
    ] and lines[-1] == "summary of all"  # fmt: skip
    assert ("lane 3.11: FAILED (above); all tests follow" in lines) == ("3.11" in failing)
    assert any("lane pre: FAILED" in line for line in lines) == ("pre" in failing)
