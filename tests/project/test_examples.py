"""The examples in examples/ run, hold the law on all their geometries, and learn."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_it_is_one_run_on_every_geometry_and_learns(name, capsys):
    if name.startswith("equinox"):
        pytest.importorskip("equinox", reason="Equinox is not installed")
    load(name).main()
    said = capsys.readouterr().out
    # A part of a group is one more geometry, where there are groups.
    assert said.count("one run") == (6 if "equinox" in name else 7) and said.count("2 devices") == 2
    first, last = map(float, re.findall(r"update +\d+: .* ([\d.]+)$", said, re.MULTILINE))
    assert last < 0.6 * first


@pytest.mark.slow
def test_padding_that_is_not_finite_is_told(monkeypatch):
    """As the norm of a whole group of padding was, when this example was written."""
    import jax.numpy as jnp

    module = load("nnx_contrast")
    embed = module.embed

    def unsafe(*args):
        out, found = embed(*args)
        return out / jnp.linalg.norm(out, axis=-1, keepdims=True), found

    monkeypatch.setattr(module, "embed", unsafe)
    found = module.check()
    assert not found.ok and "inf: something is not finite" in str(found)


@pytest.mark.slow
def test_the_notebook(tmp_path):
    """Its cells in order, in an empty folder, with few updates."""
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert "STEPS = 450" in code
    program = code.replace("STEPS = 450", "STEPS = 2")
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"^mAP50 [\d.]+, mAP50-95 [\d.]+$", done.stdout, re.MULTILINE)
    assert (tmp_path / "runs" / "notebook.stablehlo").is_file()
