"""Huge pages and memory that is kept: when they are asked for, and that it has its effect."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from jaxaccum.machine import host_memory

NAME, VALUE = host_memory.VARIABLE, host_memory.SETTING


@pytest.fixture
def glibc(monkeypatch):
    def set_version(library="glibc", version="2.36"):
        monkeypatch.setattr(host_memory.platform, "libc_ver", lambda: (library, version))

    set_version()
    return set_version


@pytest.fixture
def mode(tmp_path):
    file = tmp_path / "enabled"
    file.write_text("always [madvise] never\n")
    return file


def test_asked_for_where_linux_wants_to_be_asked(glibc, mode):
    assert host_memory.setting({}, mode) == {NAME: VALUE}
    mode.write_text("[always] madvise never\n")
    assert host_memory.setting({}, mode) == {}
    mode.write_text("always madvise [never]\n")
    assert host_memory.setting({}, mode) == {}
    mode.unlink()
    assert host_memory.setting({}, mode) == {}


@pytest.mark.parametrize("given", ["glibc.malloc.hugetlb=0", f"glibc.malloc.arena_max=1:{VALUE}"])
def test_what_the_user_decided_stays(glibc, mode, given):
    assert host_memory.setting({NAME: given}, mode) == {}


def test_other_tunables_are_kept(glibc, mode):
    given = "glibc.malloc.arena_max=1"
    assert host_memory.setting({NAME: given}, mode) == {NAME: f"{given}:{VALUE}"}


@pytest.mark.parametrize(("library", "version"), [("glibc", "2.34"), ("", ""), ("musl", "1.2.5")])
def test_libraries_that_cannot(glibc, mode, library, version):
    glibc(library, version)
    assert host_memory.setting({}, mode) == {}


def test_the_setting_saves_page_faults():
    without = {key: value for key, value in os.environ.items() if key != NAME}
    added = host_memory.setting(without)
    if not added:
        pytest.skip("this system gives huge pages to all or to none")
    program = (
        "import resource; start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "block = bytearray(256 << 20)\n"
        "block[::4096] = bytes(len(block) // 4096)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)"
    )

    def faults(environment):
        command = [sys.executable, "-c", program]
        return int(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)

    assert faults(without) > 60_000
    assert faults(without | added) < 30_000  # some: a machine may be short of huge pages


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again():
    program = (
        "import resource\n"
        "from jaxaccum.machine import host_memory\n"
        "{}\n"
        "def images():\n"
        "    for _ in range(100):\n"
        "        several = [bytearray(b'x') * (1 << 20) for _ in range(20)]\n"
        "        del several\n"
        "images()\n"
        "start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "images()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)"
    )
    environment = {key: value for key, value in os.environ.items() if key != NAME}

    def faults(first):
        command = [sys.executable, "-c", program.format(first)]
        return int(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)

    assert faults("assert host_memory.keep_freed()") < 5_000
    assert faults("") > 50_000


def test_other_libraries_are_left_alone(glibc):
    glibc("", "")
    assert host_memory.keep_freed() is False


# --- Verbs start themselves once more, with huge pages. ---


@pytest.mark.parametrize(
    "words",
    [
        ["python", "-m", "jaxaccum.train", "--config=a.py"],
        ["python", "-X", "dev", "-m", "jaxaccum", "predict", "-m"],
        ["python", "/usr/bin/jaxaccum", "train"],
    ],
)
def test_a_verb_starts_itself_once_more(words, monkeypatch):
    began = []
    monkeypatch.setattr(host_memory.os, "execve", lambda *given: began.append(given))
    monkeypatch.setattr(host_memory, "setting", lambda environment: {"GLIBC_TUNABLES": "wanted"})
    host_memory.restart("jaxaccum", words)
    ((program, arguments, environment),) = began
    assert program == sys.executable
    assert arguments == [sys.executable, *words[1:]]
    assert environment == os.environ | {"GLIBC_TUNABLES": "wanted"}
    monkeypatch.setattr(host_memory, "setting", lambda environment: {})
    host_memory.restart("jaxaccum", words)
    assert len(began) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["python"],
        ["python", "-c", "import jaxaccum.train"],
        ["python", "train.py", "jaxaccum"],
        ["python", "-m", "pytest", "jaxaccum"],
        ["python", "-m", "jaxaccumulate.train"],
    ],
)
def test_other_programs_are_left_alone(words, monkeypatch):
    monkeypatch.setattr(host_memory.os, "execve", lambda *given: pytest.fail(str(given)))
    monkeypatch.setattr(host_memory, "setting", lambda environment: {"GLIBC_TUNABLES": "wanted"})
    host_memory.restart("jaxaccum", words)


def test_the_second_start_has_huge_pages(tmp_path):
    """Told by a module that every Python imports at its start."""
    environment = {k: v for k, v in os.environ.items() if k != host_memory.VARIABLE}
    added = host_memory.setting(environment)
    if not added:
        pytest.skip("there is nothing to gain from huge pages here")
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        f"with open({str(tmp_path / 'starts')!r}, 'a') as file:\n"
        f"    print(os.getpid(), os.environ.get({host_memory.VARIABLE!r}), file=file)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "jaxaccum", "--version"], cwd=Path(__file__).parents[2],
        env=environment | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("jaxaccum ")
    first, second = (tmp_path / "starts").read_text().splitlines()
    number = first.split()[0]
    assert first == f"{number} None"
    assert second == f"{number} {added[host_memory.VARIABLE]}"
