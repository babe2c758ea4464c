"""The documentation as a site: it builds, every link leads somewhere, the reference is whole."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")
pytest.importorskip("material")
REPOSITORY = Path(__file__).resolve().parents[2]


def build(root, out):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file",
               str(root / "scripts" / "site" / "mkdocs.yml"), "--site-dir", str(out)]  # fmt: skip
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def copied(folder):
    """What the site is made of, to change."""
    for name in ("docs", "scripts", "jaxaccum", "tests", "examples", "configs", "constraints"):
        shutil.copytree(
            REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    done = build(REPOSITORY, out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_its_pages_are_whole(site):
    start = (site / "index.html").read_text()
    assert "Two commands" in start and "images/quickstart.jpg" in start
    assert (site / "images" / "quickstart.jpg").stat().st_size > 10_000
    for name in ("own_data", "fine_tune", "small_memory"):
        assert (site / "tutorials" / name / "index.html").exists()
    reference = (site / "reference" / "api" / "index.html").read_text()
    for said in ("jaxaccum.api.load", "jaxaccum.api.Model", "Raises", "the workdir or file"):
        assert said in reference, said
    core = (site / "reference" / "accumulate" / "index.html").read_text()
    for said in ("Recipe", "Geometry", "Objective", "make_engine", "verify", "Coupled"):
        assert f"{said}</" in core or f".{said}" in core, said


def test_files_that_pages_name_are_there(site):
    page = (site / "accumulation" / "index.html").read_text()
    link = re.search(r'href="([^"]*source/jaxaccum/accumulate/in_time[^"]*)"', page)
    assert link
    target = (site / "accumulation" / link[1] / "index.html").resolve()
    assert "over_group" in target.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong", ["[x](nowhere.md)", "[x](accumulation.md#no-such-heading)", "[x](../jaxaccum/none.py)"]
)
def test_a_link_that_leads_nowhere_ends_it(tmp_path, wrong):
    root = copied(tmp_path / "root")
    page = root / "docs" / "python.md"
    page.write_text(f"{page.read_text()}\n{wrong}\n")
    done = build(root, tmp_path / "out")
    assert done.returncode != 0 and "python.md" in done.stderr
