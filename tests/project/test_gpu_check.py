"""The check of an hour on a GPU: its order and limits, and a rehearsal of it on the CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmarks import harness
from benchmarks.measures import MEASURES

ROOT = Path(__file__).resolve().parents[2]
# Not on the machines that the check is for.
ABSENT = ("grain", "tensorflow_datasets", "array_record", "torch")


@pytest.fixture(scope="module")
def gpu_check():
    """The script as a module, its flags parsed."""
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    from absl import flags

    before = set(flags.FLAGS)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    flags.FLAGS.mark_as_parsed()
    yield module
    del sys.modules["gpu_check"]
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


@pytest.fixture
def check(gpu_check, tmp_path, monkeypatch):
    """A check whose parts are the programs in its `programs`, by name, instead of measures."""

    class Programs(gpu_check.Check):
        programs: dict[str, str] = {}  # noqa: RUF012

        def command(self, part):
            return [sys.executable, "-c", self.programs[part.key]]

    monkeypatch.setattr(gpu_check, "flags_of_xla", lambda *_: {})
    monkeypatch.setattr(gpu_check, "LEAST", 0.5)
    return Programs(tmp_path, 1.0)


def statuses(folder: Path) -> dict[str, str]:
    """The last that is said of every part."""
    lines = [json.loads(line) for line in (folder / "progress.jsonl").open()]
    return {line["part"]: line["status"] for line in lines}


def test_every_part_is_one_of_the_benchmark(gpu_check):
    known = {key for measure in MEASURES for key in measure.keys}
    parts = gpu_check.TOGETHER + gpu_check.ALONE
    assert {part.key for part in parts} <= known
    assert len({part.name for part in parts}) == len(parts)
    # What is compiled beforehand is measured afterwards.
    assert {p.key for p in gpu_check.TOGETHER if p.warm} <= {p.key for p in gpu_check.ALONE}
    assert not any(p.warm for p in gpu_check.ALONE)


def test_a_part_that_takes_too_long_is_ended_with_its_children(gpu_check, check, tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(4); open({str(mark)!r}, 'w')"
    check.programs["slow"] = (
        f"import subprocess; subprocess.run([{sys.executable!r}, '-c', {child!r}])"
    )
    check.run([gpu_check.Part("slow", 1.0)], 1, 50.0)
    assert statuses(tmp_path) == {"slow": "ENDED for lack of time"}
    assert check.left == ["slow"] and not check.failed
    time.sleep(4.5)
    assert not mark.exists()


def test_a_part_that_fails_is_said_and_the_next_goes_on(gpu_check, check, tmp_path, capsys):
    check.programs |= {"bad": "raise SystemExit('the reason')", "good": "print('fine')"}
    check.run([gpu_check.Part("bad", 20.0), gpu_check.Part("good", 20.0)], 1, 50.0)
    assert check.failed == ["bad"] and not check.left
    assert statuses(tmp_path) == {"bad": "FAILED (1)", "good": "done"}
    assert "the reason" in capsys.readouterr().out


def test_nothing_is_begun_when_the_time_is_over(gpu_check, check, tmp_path):
    check.run([gpu_check.Part("late", 20.0)], 1, 0.1)
    assert statuses(tmp_path) == {"late": "NOT BEGUN for lack of time"}
    assert check.left == ["late"]


def test_what_is_there_is_not_measured_again(gpu_check, tmp_path):
    check = gpu_check.Check(tmp_path, 1.0)
    part = gpu_check.Part("depthwise", 10.0)
    assert check.wanted(part)
    context = harness.Context("gpu")
    harness.save(check.results, "depthwise", context, harness.Found("", []), 1.0)
    assert not gpu_check.Check(tmp_path, 1.0).wanted(part)
    warm = gpu_check.Part("update", 10.0, warm=True)
    assert check.wanted(warm)
    (tmp_path / "logs" / f"{warm.name}.done").touch()
    assert not check.wanted(warm)


@pytest.mark.slow
def test_a_rehearsal_without_what_is_absent_there(tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "plain = PathFinder.find_spec\n"
        "def find_spec(name, path=None, target=None):\n"
        f"    absent = name.partition('.')[0] in {ABSENT!r}\n"
        "    return None if absent else plain(name, path, target)\n"
        "PathFinder.find_spec = find_spec\n"
    )
    parts = [
        "train.five", "law.float64", "plans.8",
        "program.yolov8-n.bfloat16", "depthwise", "assigner", "yolo.yolov8-n",
    ]  # fmt: skip
    out = tmp_path / "found"
    done = subprocess.run(
        [
            "bash", str(ROOT / "scripts" / "gpu_check.sh"), f"--out={out}", "--quick",
            "--minutes=20", f"--only={','.join(parts)}",
        ],
        env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(hidden)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = statuses(out)
    assert {found[part] for part in parts} == {"done"}, done.stdout
    results = {path.stem: json.loads(path.read_text()) for path in (out / "results/cpu").iterdir()}
    assert set(results) == set(parts)
    assert "PyTorch is not here" in results.pop("yolo.yolov8-n")["skipped"]
    assert all(result["rows"] for result in results.values())
    gradients = [r for r in results["law.float64"]["rows"] if r["label"].endswith("gradient")]
    assert len(gradients) == 3
    assert all(row["value"] <= 1e-12 for row in gradients)
    assert "## The law" in (out / "page.md").read_text()
