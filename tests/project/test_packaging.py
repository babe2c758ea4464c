"""What is installed: the core by itself, the trainer as an extra, the configs in the wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CORE = {"jax", "jaxlib", "numpy", "optax"}


def listed(file: str) -> list[str]:
    lines = (line.strip() for line in (ROOT / file).read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def test_the_extras_are_the_requirement_files():
    extras = PROJECT["project"]["optional-dependencies"]
    base = PROJECT["project"]["dependencies"]
    assert sorted(base + extras["all"] + extras["cpu"]) == sorted(listed("requirements-cpu.txt"))
    with_cuda = [line.replace("jax>", "jax[cuda12]>") for line in base + extras["all"]]
    assert sorted(with_cuda) == sorted(listed("requirements.txt"))
    assert extras["test"] == ["jaxaccum[all]", *listed("requirements-test.txt")]
    assert {name for name in map(_name, base)} <= CORE


def _name(requirement: str) -> str:
    return requirement.partition(">")[0]


def test_every_package_is_in_the_wheel():
    found = {
        ".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "jaxaccum").rglob("*.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | {
        "jaxaccum.configs", "jaxaccum.configs.guides", "jaxaccum.configs.repro",
    }  # fmt: skip


def run(code: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder)} | more
    return subprocess.run(
        [sys.executable, "-c", code], text=True, capture_output=True, cwd=folder, env=environment
    )


# What is imported of jaxaccum, and what else, in a process that has only what the core needs.
ALONE = f"""
import sys, importlib.abc
class Nothing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        hidden = {{"flax", "orbax", "ml_collections", "grain", "cv2", "yaml", "tqdm", "psutil",
                  "tensorflow_datasets", "hotcoco", "tensorboardX", "matplotlib",
                  "safetensors", "PIL"}}
        if top in hidden:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Nothing())
sys.path.insert(0, {str(ROOT)!r})
"""


def test_the_core_needs_no_more_than_jax_numpy_and_optax(tmp_path):
    done = run(
        ALONE + """
import jax.numpy as jnp, numpy as np, optax
from jaxaccum.accumulate import Objective, Output, Recipe, Term, UpdateRule, verify
from jaxaccum import accumulate
def forward(params, stats, batch, groups):
    return Output({"a": jnp.sum(batch["weight"] * batch["x"] * params)},
                  {"n": jnp.sum(batch["weight"])}, {})
rule = UpdateRule(Objective((Term("a", 1.0, "n"),), {"n": 1.0}), optax.sgd(1.0))
batch = {"x": np.arange(5, dtype=np.float32), "weight": np.ones(5, np.float32)}
found = verify(forward, rule, Recipe(5, "frozen"), np.float32(2), {}, batch)
print(found.ok)
try:
    accumulate.GroupBatchNorm
except ImportError as error:
    print(error)
""",
        tmp_path, JAX_PLATFORMS="cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "True"
    assert second.startswith("accumulate.GroupBatchNorm is a layer of Flax: pip install flax.")


def test_a_verb_without_its_packages_names_the_extra(tmp_path):
    done = run(
        ALONE + """
import runpy
sys.argv = ["-m"]
import jaxaccum
sys.argv = ["jaxaccum.train", "--config=configs/quickstart.py"]
runpy.run_module("jaxaccum.train", run_name="__main__", alter_sys=True)
""",
        tmp_path,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: no package '")
    assert "pip install 'jaxaccum[all]'" in done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", reason="setuptools builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    for name in ("pyproject.toml", "jaxaccum", "configs"):  # as it is here, committed or not
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w",
         str(folder), str(source)], check=True,
    )  # fmt: skip
    (made,) = folder.glob("*.whl")
    return made


@pytest.mark.slow
def test_a_config_of_the_wheel_is_found_by_its_name(wheel, tmp_path):
    site, here = tmp_path / "site", tmp_path / "here"
    here.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert (site / "jaxaccum" / "machine" / "onednn.cc").exists()
    assert not (site / "tests").exists() and (site / "jaxaccum" / "configs" / "yolo_s.py").exists()
    environment = os.environ | {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}

    def verb(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *words], text=True, capture_output=True, cwd=here,
            env=environment,
        )  # fmt: skip

    done = verb(
        "jaxaccum.train", "--config=quickstart", "--config.steps=2", "--config.microbatch=8",
        "--config.data.image_size=64", "--config.eval.every=2", "--config.log.every=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (here / "runs" / "quickstart" / "best").is_dir()
    done = verb("jaxaccum.train", "--config=yolo_s:13")
    assert done.returncode == 1 and "yolo13-s" in done.stderr
    done = verb("jaxaccum.train")
    assert "jaxaccum/configs/quickstart.py" in done.stderr + done.stdout


def test_a_name_stands_for_a_config_that_ships(monkeypatch, tmp_path):
    from jaxaccum import config_files

    monkeypatch.chdir(ROOT)
    assert config_files.find("yolo_s") == "configs/yolo_s.py"
    assert config_files.find("yolo_s:12-p2") == "configs/yolo_s.py:12-p2"
    assert config_files.find("yolo_z") == "yolo_z"
    assert config_files.find("configs/yolo_s.py:12") == "configs/yolo_s.py:12"
    assert config_files.load("yolo_s:12-p2").model == "yolo12-p2-s"
    monkeypatch.chdir(tmp_path)
    assert config_files.find("yolo_s") == str(ROOT / "configs" / "yolo_s.py")
    (tmp_path / "yolo_s").write_text("a file of one's own comes first")
    assert config_files.find("yolo_s") == "yolo_s"
