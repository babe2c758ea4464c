"""The benchmark's harness and document, and that all measures run, at tiny sizes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import harness, report
from benchmarks.harness import Context, Found, Measure, Row

ROOT = Path(__file__).resolve().parents[2]

QUICK = Context("cpu", quick=True)


def command(out: Path, *flags: str) -> subprocess.CompletedProcess:
    script = ROOT / "scripts" / "benchmark.py"
    return subprocess.run(
        [sys.executable, script, f"--out={out}", *flags], capture_output=True, text=True
    )


def test_calls_take_turns_and_come_in_both_orders():
    order = []
    times = harness.interleaved(
        {name: lambda name=name: order.append(name) or len(order) for name in "ab"}, 3, warmup=1
    )
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"
    assert times == {"a": [3, 6, 7], "b": [4, 5, 8]}  # the warm-up is not counted


def test_rounds_with_a_neighbour_do_not_count():
    """Two processors, of which another program takes one in some rounds."""
    ours = iter([1.0, 1.0, 1.7, 1.1, 1.0])
    theirs = iter([2.0, 2.0, 2.0, 2.2, 3.9])
    times = harness.interleaved(
        {
            "ours": lambda: harness.Took.of(next(ours), 1.8),
            "theirs": lambda: harness.Took.of(next(theirs), 3.6),
        },
        2,
    )
    assert times == {"ours": [1.0, 1.1], "theirs": [2.0, 2.2]}
    assert times.refused == 1
    assert "2 rounds; 1 more refused, as another program took a processor" in times.words()
    assert "ours: 1800 ms of processors in 1050" in times.words()
    # One that has one processor in its best round is not asked for more.
    alone = harness.interleaved({"a": lambda: harness.Took.of(1.0, 0.9)}, 3)
    assert (len(alone["a"]), alone.refused) == (3, 0)


def test_rounds_that_are_all_disturbed_count_and_are_said():
    """Each call has its best round where the other one is disturbed."""
    ours, theirs = iter([1.0, 3.0] * 4), iter([6.0, 2.0] * 4)  # 4 x 2 rounds: as many as it tries
    times = harness.interleaved(
        {
            "ours": lambda: harness.Took.of(next(ours), 2.0),
            "theirs": lambda: harness.Took.of(next(theirs), 4.0),
        },
        2, warmup=0,
    )  # fmt: skip
    assert times == {"ours": [1.0, 3.0] * 4, "theirs": [6.0, 2.0] * 4}
    assert (times.disturbed, times.refused) == (True, 0)
    assert "DISTURBED" in times.words()


def test_rounds_go_on_until_the_median_is_known():
    values = iter([1.0, 2.0, 1.0, 2.0] + [1.5] * 40)
    narrow = harness.is_narrow("a", "b")
    times = harness.interleaved(
        {"a": lambda: next(values), "b": lambda: 1.0}, 4, warmup=0, narrow=narrow, most=40
    )
    assert 4 < len(times["a"]) < 40
    assert narrow(times)
    noisy = iter([1.0, 2.0] * 20)
    times = harness.interleaved(
        {"a": lambda: next(noisy), "b": lambda: 1.0}, 4, warmup=0, narrow=narrow, most=12
    )
    assert len(times["a"]) == 12
    assert not narrow(times)


@pytest.mark.parametrize(
    ("count", "left_out"), [(5, 0), (6, 0), (8, 0), (9, 1), (20, 5), (100, 39)]
)
def test_the_interval_of_a_median(count, left_out):
    """Ranks from tables of the sign test's interval (95 %, two-sided)."""
    assert harness.interval(list(range(count))[::-1]) == (left_out, count - 1 - left_out)


def test_a_ratio_is_the_median_of_ratios():
    row = harness.ratio_row("r", [2.0, 9.0, 3.0], [1.0, 3.0, 3.0], target=("<=", 2.0))
    assert (row.value, row.low, row.high, row.met) == (2.0, 1.0, 3.0, True)
    assert harness.ratio_row("r", [1.0], [1.0], target=(">=", 1.5)).met is False


def test_the_document_shows_both_platforms_and_what_is_missing(tmp_path):
    measures = [
        Measure("one", "One", lambda *_: None, ("a", "b")),  # type: ignore[arg-type,return-value]
        Measure("two", "Two", lambda *_: None),  # type: ignore[arg-type,return-value]
    ]
    rows = [Row("speed", 1.25, low=1.0, high=1.5, target=(">=", 1.0), note="5 against 4")]
    harness.save(tmp_path, "one.a", QUICK, Found("small", rows, ["a note"]), 1.0)
    harness.save_skipped(tmp_path, "one.b", QUICK, "it needs a thing")
    text = report.render(tmp_path, measures)
    assert "| speed | **1.25 (1 to 1.5)** |  | >= 1 | 5 against 4 |" in text
    assert "- a note" in text and "one.b: skipped. it needs a thing" in text
    assert "GPU**: nothing measured yet" in text and "Not measured yet." in text
    assert "these figures mean nothing" in text
    file = tmp_path / "cpu" / "one.a.json"
    result = json.loads(file.read_text()) | {"platform": "gpu", "quick": False}
    result["rows"][0]["value"] = 0.5
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "one.a.json").write_text(json.dumps(result))
    assert "| speed | **1.25 (1 to 1.5)** | *0.5 (1 to 1.5)* |" in report.render(tmp_path, measures)


def test_what_is_there_is_not_measured_again(tmp_path):
    context = Context("cpu")
    assert not harness.is_done(tmp_path, "m", context)
    harness.save_skipped(tmp_path, "m", context, "no")
    assert not harness.is_done(tmp_path, "m", context)
    harness.save(tmp_path, "m", context, Found("", []), 0.0)
    assert harness.is_done(tmp_path, "m", context) and not harness.is_done(tmp_path, "m", QUICK)


@pytest.mark.slow
def test_measures_run(tmp_path):
    """At tiny sizes, those that do not compile long; without PyTorch what needs it is skipped."""
    parts = "--only=state,points.nearest,assigner,pipeline,yolo.yolov8-n"
    done = command(tmp_path / "b.md", "--quick", parts)
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / "b.md").read_text()
    for words in ("aliased", "objects an image: 20", "SciPy", "OpenCV loader", "1 processes"):
        assert words in text, words
    assert ("yolo.yolov8-n: skipped" in text) == (importlib.util.find_spec("torch") is None)
    again = command(tmp_path / "b.md", "--quick", "--only=assigner")
    assert "assigner: there already" in again.stdout


@pytest.mark.slow
def test_an_unknown_measure_is_named(tmp_path):
    done = command(tmp_path / "b.md", "--only=speed")
    assert done.returncode and "no measure speed; see --list" in done.stderr + done.stdout
