"""Plans: the search against brute force, accounts against the compiler's own, auto in training."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import tiny_completion
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config

from jaxaccum import calibrate, plan, train
from jaxaccum import config as configs
from jaxaccum.accumulate import make_engine
from jaxaccum.fields import REMATS
from jaxaccum.plan import calibration, search, targets
from jaxaccum.plan.__main__ import as_json, size, table
from jaxaccum.plan.planner import Measure, Planner
from jaxaccum.plan.search import choose

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def target(memory=GIB):
    return targets.Target("cpu", "cpu", memory, dict.fromkeys(targets._RATES, 1e10), 1e10, kind="x")


class Straight(Planner):
    """A planner whose compiler is a formula: state + batch + base + slope * microbatch + a bend."""

    def __init__(self, base, slope, bend=0.0, remat=0.5, **fields):
        self.config = tiny_config(
            **({"nbs": 64, "bn_group": 2, "microbatch": 2, "dtype": "float32"} | fields)
        )
        self.names, self.samples, self.target = ["a"], 100, target()
        self.number, self.whole, self._known, self._counts = 1, False, {}, {}
        self.base, self.slope, self.bend, self.kept = base, slope, bend, remat
        self.compilations = 0

    def compiled(self, microbatch, engine="scan", remat="none"):
        key = (engine, remat, microbatch)
        if key not in self._known:
            self.compilations += 1
            steps = -(-self.config.nbs // microbatch)
            curve = self.slope * microbatch * (self.kept if remat == "blocks" else 1)
            curve += self.bend * microbatch**0.5
            # What a group keeps is its base; on the host it is not here.
            base = 0 if remat == "host" else self.base
            work = 1e9 * microbatch * (1.3 if remat == "blocks" else 1.0)
            self._counts[key] = (work, 0.0)
            self._known[key] = Measure(
                microbatch, steps, 1, engine, remat, state=1000,
                batch=steps * microbatch, temp=round(base + curve), outputs=0,
                host=9 if remat == "host" else 0, flops=steps * work,
                seconds=self._seconds(steps, work, 0.0, 1000), compiled=True,
            )  # fmt: skip
        return self._known[key]

    def evaluation(self):
        return 0


@settings(deadline=None, max_examples=60)
@given(
    base=st.integers(0, 5000), slope=st.integers(1, 3000), bend=st.integers(0, 2000),
    budget=st.integers(1500, 200_000), nbs=st.integers(1, 300), group=st.integers(1, 16),
)  # fmt: skip
def test_the_search_finds_the_largest_microbatch(base, slope, bend, budget, nbs, group):
    made = Straight(base, slope, bend, nbs=nbs, bn_group=group)
    unit, top = made.unit, made.top
    found, tried = search._largest(made, "scan", "none", budget, unit, top)
    compilations = made.compilations
    fits = [m for m in range(unit, top + 1, unit) if made.compiled(m).peak <= budget]
    if bend == 0 or not fits:
        assert found == max(fits, default=0)
    else:  # where the line bends, the largest of a run of them
        assert made.compiled(found).peak <= budget
        assert found == top or made.compiled(found + unit).peak > budget
    assert compilations <= 10 and len(tried) <= 10


def test_the_choice_is_the_largest_without_padding():
    choice = choose(Straight(0, 10, nbs=20, bn_group=2), GIB)
    assert choice.chosen and (choice.chosen.microbatch, choice.chosen.steps) == (20, 1)
    assert {m.remat for m in choice.rows} == {"none"} == {choice.chosen.remat}
    # 14 of 20 would fit, but two steps of 14 compute eight samples too many; two of 10 do not.
    tight = choose(Straight(0, 10_000, nbs=20, bn_group=2), 141_100, margin=0.0, remats=("none",))
    assert tight.chosen and (tight.chosen.microbatch, tight.chosen.steps) == (10, 2)


def test_rematerialisation_only_where_memory_is_short():
    made = Straight(0, 10_000, nbs=20, bn_group=4)
    choice = choose(made, 30_000, margin=0.0)
    assert choice.chosen and choice.chosen.remat == "blocks" and choice.chosen.microbatch == 4
    assert {m.remat for m in choice.rows} == {"none", "blocks"}
    assert all(m.compiled for m in choice.rows if m == choice.chosen)


def test_parts_of_a_group_where_no_whole_group_fits():
    made = Straight(0, 10_000, nbs=48, bn_group=12)
    choice = choose(made, 45_000, margin=0.0)
    assert choice.chosen and (choice.chosen.microbatch, choice.chosen.remat) == (4, "none")
    # A whole group, if only with rematerialisation, comes first.
    whole = choose(Straight(0, 10_000, nbs=48, bn_group=12), 65_000, margin=0.0).chosen
    assert whole and (whole.microbatch, whole.remat) == (12, "blocks")
    made.number = 4  # a group of 12 as 4 or more microbatches on 4 devices, or 2 on each pair
    assert made.parts == [6, 3, 1]


def test_what_a_group_keeps_is_put_on_the_host_where_nothing_else_fits():
    made = Straight(50_000, 10_000, nbs=48, bn_group=12)
    on_cpu = choose(made, 45_000, margin=0.0)
    assert on_cpu.chosen is None and all(m.remat != "host" for m in on_cpu.rows)
    made.target = dataclasses.replace(target(), platform="gpu")
    choice = choose(made, 45_000, margin=0.0)
    assert choice.chosen and choice.chosen.remat == "host" and choice.chosen.microbatch == 4
    assert choice.chosen in choice.rows and {m.remat for m in choice.rows} == set(REMATS)
    rows = table(choice)
    assert "on host" in rows[0] and sum(row.endswith("<- chosen") for row in rows) == 1
    assert as_json(choice, made.target, 45_000, "float32")["choice"]["remat"] == "host"
    assert choose(made, 65_000, margin=0.0).chosen.remat != "host"  # microbatch 1 fits without
    assert "on host" not in table(choose(made, GIB))[0]


def test_what_would_fit_is_said():
    choice = choose(Straight(0, 10_000, nbs=20, bn_group=8), 9_000, remats=("none",))
    assert choice.chosen is None
    for words in ("remat=blocks", "bn_group", "another recipe", "resolution", "more memory"):
        assert words in choice.why


def test_the_rows_of_a_list_are_compiled_and_of_a_ladder_on_the_line():
    listed = choose(Straight(500, 100, nbs=64, bn_group=1), GIB, microbatches=[2, 8, 16])
    assert {2, 8, 16} <= {m.microbatch for m in listed.rows if m.compiled}
    ladder = choose(Straight(500, 100, nbs=64, bn_group=1), GIB)
    rows = {m.microbatch: m for m in ladder.rows}
    assert {1, 2, 4, 8, 16, 32} <= set(rows)
    for m in (2, 8, 16):
        exact = Straight(500, 100, nbs=64, bn_group=1).compiled(m)
        assert not rows[m].compiled and rows[m].peak == pytest.approx(exact.peak, abs=1)


def test_a_line_is_drawn_between_what_is_compiled_on_both_sides():
    made = Straight(500, 100, bend=300.0, bn_group=1)
    known = {m: made.compiled(m) for m in (1, 4, 31, 37)}
    assert made.predicted(16).temp == pytest.approx(
        known[4].temp + 12 / 27 * (known[31].temp - known[4].temp), abs=1
    )
    assert made.predicted(43).temp == pytest.approx(2 * known[37].temp - known[31].temp, abs=1)


# --- The compiler's account of a real, small detector. ---


def small(cache=None, **fields):
    config = tiny_config(**({"nbs": 8, "bn_group": 2} | fields))
    return Planner(
        config, names=["a", "b"], samples=100, target=plan.here(), devices=config.devices,
        cache=cache,
    )  # fmt: skip


@pytest.mark.slow
def test_the_account_is_the_compilers():
    made = small()
    found = made.compiled(4)
    this = made.prepared(4, "scan", "none")
    engine = make_engine(this.forward, this.rule, this.window)
    state = jax.eval_shape(engine.init, *this.task.initialise(0))
    (program,) = engine.lowered(state, this.task.example(8))
    memory = program.compile().memory_analysis()
    assert found.temp == memory.temp_size_in_bytes
    told = (
        memory.argument_size_in_bytes + memory.output_size_in_bytes
        - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    )  # fmt: skip
    # What the update does not read, such as the samples' indices, is in the plan only.
    assert told <= found.peak <= told + 4096
    assert (found.steps, found.devices, found.compiled) == (2, 1, True) and found.flops > 1e6


@pytest.mark.slow
def test_the_line_is_close_to_the_compiler():
    made = small(nbs=16)
    made.compiled(2), made.compiled(8)
    guess = made.predicted(4)
    exact = small(nbs=16).compiled(4)
    assert not guess.compiled
    assert guess.peak == pytest.approx(exact.peak, rel=0.05)
    assert guess.flops == pytest.approx(exact.flops, rel=0.01)


@pytest.mark.slow
def test_multisteps_holds_accumulators_and_one_microbatch():
    made = small()
    scan, multi = made.compiled(2), made.compiled(2, "multisteps")
    assert multi.batch * 4 == pytest.approx(scan.batch, rel=0.01)
    assert multi.state > scan.state and multi.temp < scan.temp + multi.state


@pytest.mark.slow
def test_two_devices_share_the_samples():
    one, two = small().compiled(2), small(devices=2).compiled(2)
    assert (one.steps, two.steps) == (4, 2)
    assert two.batch * 2 == one.batch and two.state == pytest.approx(one.state, rel=0.01)


@pytest.mark.slow
def test_what_was_compiled_is_kept(tmp_path):
    first, second = small(tmp_path), small(tmp_path)
    assert first.compiled(2) == second.compiled(2)
    assert (first.compilations, second.compilations) == (1, 0)
    assert small(tmp_path, **{"loss.box": 3.0}).compiled(2).temp > 0


def test_an_evaluation_is_planned_too():
    less, more = small(**{"eval.batch": 8}), small(**{"eval.batch": 64})
    assert 0 < less.evaluation() < more.evaluation()


@pytest.mark.slow
@pytest.mark.long
def test_coupled_terms_through_both_engines():
    config = tiny_completion.tiny_config(nbs=4, bn_group=2, **tiny_completion.CAPTIONED)
    made = Planner(config, names=["a", "b"], samples=100, target=plan.here(), devices=1)
    scan = made.compiled(made.unit)
    multi = made.compiled(made.unit, "multisteps")
    assert scan.temp > 0 and multi.temp > 0


# --- auto, in training. ---


@pytest.mark.slow
def test_auto_trains_as_a_number_does(tmp_path, capsys):
    fields = {"steps": 2, "eval.every": -1, "checkpoint.every": -1}
    train.train(tiny_config(microbatch="auto", **fields), tmp_path / "auto")
    told = capsys.readouterr().out
    assert "microbatch auto: 4 x 1 steps, planned" in told
    train.train(tiny_config(microbatch=2, **fields), tmp_path / "number")
    auto, number = (
        [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("auto", "number")
    )
    assert [r["fingerprint"] for r in auto] == [r["fingerprint"] for r in number]
    assert [r["loss"] for r in auto] == pytest.approx([r["loss"] for r in number], rel=1e-4)


@pytest.mark.slow
def test_auto_says_what_would_fit():
    config = tiny_config(microbatch="auto")
    with pytest.raises(plan.PlanError, match=r"nothing fits.*smaller bn_group than 2"):
        plan.settle(config, names=["a"], samples=100, target=target(2**20))


def test_auto_has_no_meaning_elsewhere():
    with pytest.raises(configs.ConfigError, match="with compat the microbatch is part"):
        configs.validate(tiny_config(microbatch="auto", compat=True))
    with pytest.raises(configs.ConfigError, match="or 'auto'; got 'most'"):
        configs.validate(tiny_config(microbatch="most"))


# --- Words and numbers of the command line. ---


def test_sizes():
    assert size("12GiB") == 12 * GIB and size(" 1.5 gb") == 1_500_000_000
    for text in ("12", "GiB", "a lot", "3XB"):
        with pytest.raises(plan.PlanError, match="such as 12GiB"):
            size(text)


def test_what_cannot_be_compiled_for_is_said(monkeypatch):
    def absent(*args, **kwargs):
        raise RuntimeError("no such platform\nmore")

    monkeypatch.setattr(targets.topologies, "get_topology_desc", absent)
    with pytest.raises(plan.PlanError, match=r"compile for h100: no such platform\. Install"):
        targets.find("h100").devices(1)
    with pytest.raises(plan.PlanError, match=r"cannot compile for v5e.*libtpu"):
        targets.find("v5e").devices(1)
    with pytest.raises(plan.PlanError, match="there are h100, a100"):
        targets.find("h1000")
    with pytest.raises(plan.PlanError, match="slice of 4 devices"):
        targets.find("v5e").devices(8)


def test_a_calibration_is_kept_and_used():
    assert calibration.of(target()) == (1.0, calibration.UNCALIBRATED)
    calibration.keep("x", [(100, 110), (200, 230), (100, 112)])
    factor, margin = calibration.of(target())
    assert factor == 1.12 and margin == pytest.approx(1.15 / 1.12 - 1 + 0.02, abs=1e-4)
    limited = choose(Straight(0, 10, nbs=20, bn_group=2), 10_000)
    assert limited.budget == int(10_000 * (1 - margin) / factor)
    assert calibration.of(targets.find("t4")) == (1.0, calibration.UNCALIBRATED)


@pytest.mark.parametrize("content", ["", "{", "[" * 99_999, "[1]", '{"x": 1}', '{"x": {"f": 1}}'])
def test_a_damaged_calibration_is_none(content):
    calibration.file().parent.mkdir(parents=True, exist_ok=True)
    calibration.file().write_text(content)
    assert calibration.of(target()) == (1.0, calibration.UNCALIBRATED)
    calibration.keep("x", [(100, 110)])
    assert calibration.of(target())[0] == 1.1


def test_geometries_of_a_calibration():
    assert calibrate.parse("8:blocks") == {"microbatch": 8, "engine": "scan", "remat": "blocks"}
    assert calibrate.parse("4:multisteps")["engine"] == "multisteps"
    for text in ("x", "8:fast", ""):
        with pytest.raises(plan.PlanError, match="a geometry is a microbatch"):
            calibrate.parse(text)


def test_the_table_and_the_json_agree():
    choice = choose(Straight(0, 10_000, nbs=20, bn_group=4), 100_000, margin=0.0)
    text, told = table(choice), as_json(choice, target(), 100_000, "float32")
    assert len(text) == 1 + len(told["rows"]) and sum("chosen" in line for line in text) == 1
    assert told["choice"] in told["rows"]
    for row in told["rows"]:
        assert row["fits"] == (row["peak_bytes"] <= told["budget_bytes"])


@pytest.mark.slow
def test_the_command():
    command = [
        sys.executable, "-m", "jaxaccum.plan", "--config=configs/quickstart.py",
        "--config.data.image_size=64", "--memory=4GiB", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["choice"]["microbatch"] == 16 and told["evaluation_bytes"] > 0
    bad = subprocess.run(
        [*command[:-2], "--memory=plenty"], cwd=ROOT, capture_output=True, text=True
    )
    assert bad.returncode == 1 and "error: --memory takes sizes" in bad.stderr


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_plan_is_what_is_used():
    done = subprocess.run(
        [
            sys.executable, "-m", "jaxaccum.calibrate", "--config=configs/quickstart.py",
            "--config.data.image_size=128", "--geometries=8,16",
        ],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()[2:4]]
    for name, planned, used, _ in rows:  # MiB; the runtime takes some of its own
        assert 0.9 * float(planned) < float(used) < float(planned) + 40, name


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("h100", "bfloat16"), ("rtx4090", "bfloat16"), ("t4", "float32"), ("v5e", "bfloat16")],
)
def test_auto_is_the_dtype_of_what_is_planned_for(monkeypatch, name, wanted):
    """And not of the machine that plans, which need not be able to compile for it."""
    monkeypatch.setattr(targets.Target, "devices", lambda self, number: [None])
    made = Planner(tiny_config(), names=["a"], samples=9, target=targets.find(name))
    assert made.config.dtype == wanted


def test_auto_is_the_dtype_of_the_device_at_hand():
    assert small().config.dtype == "float32" and small(dtype="tf32").config.dtype == "tf32"


@pytest.mark.slow
def test_a_described_gpu_needs_no_cuda(tmp_path):
    """JAX's plugin raises, and is not there, where it is asked for GPUs and finds no cuDNN."""
    plugin = tmp_path / "jax_plugins" / "other" / "__init__.py"
    plugin.parent.mkdir(parents=True)
    plugin.write_text(
        "import jax\n"
        "def initialize():\n"
        "    print('asked for', jax.config.jax_platforms, flush=True)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-m", "jaxaccum.plan", "--config=configs/quickstart.py", "--target=h100",
         "--classes=2"],
        cwd=ROOT, env=environment | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert "asked for cpu" in done.stdout, done.stderr
