"""Point completion end to end: the law on PoinTr and AdaPoinTr, and the three verbs."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import predicted
from tiny_completion import tiny_config

from jaxaccum import config as configs
from jaxaccum import data, evaluate, train
from jaxaccum.accumulate import Geometry, equivalence
from jaxaccum.accumulate.checks import check
from jaxaccum.data.cloud_sources import CroppedClouds
from jaxaccum.models import completion
from jaxaccum.tasks import Sample
from jaxaccum.tasks.completion import predict
from jaxaccum.tasks.completion.predict import Completed
from jaxaccum.training import inference, run
from jaxaccum.weights import initial

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "completion"
NBS, UPDATES = 6, 2
# SGD, since AdamW's first updates divide small gradients by themselves: there rounding of 1e-14 in
# the gradient becomes 1e-10 in the parameters, on any geometry.
TOLERANCE = equivalence.Tolerance(1e-12, 1e-10)


def few(split="train", length=12):
    """Embedded shapes, only a few of them."""
    return CroppedClouds(data.Shapes(split, length=length), split != "train", "median", 1, 2**28)


def trace(geometry, bn_group, model="adapointr-tiny", x64=True):
    source = few()
    config = tiny_config(
        model=model, nbs=NBS, bn_group=bn_group, microbatch=geometry.microbatch,
        devices=geometry.devices, engine=geometry.engine,
        dtype="float64" if x64 else "float32", **{"optimizer.name": "sgd", "lr.base": 1e-2},
    )  # fmt: skip
    this = run.prepare(config, names=source.names, samples=len(source), identity={})

    def batches():
        return run.make_stream(this, source).windows(0, [NBS] * UPDATES, backend="threads")

    return equivalence.trace(
        this.forward, this.rule, this.recipe, geometry,
        *this.task.initialise(0, np.float64 if x64 else np.float32), batches, UPDATES,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["adapointr-tiny", pytest.param("pointr-tiny", marks=pytest.mark.long)]
)
def test_one_run(x64, model):
    """Groups of four, an uneven tail, two devices: the same run."""
    found = equivalence.differences(trace(Geometry(4, 2), 4, model), trace(Geometry(8), 4, model))
    assert equivalence.within(found, TOLERANCE), found


IN_CI = [("frozen", 2, 2, "multisteps"), (2, 1, 1, "scan")]  # the latter in time


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bn_group", "microbatch", "devices", "engine"),
    [
        pytest.param(*case, engine, marks=[pytest.mark.long] * ((*case, engine) not in IN_CI))
        for case in [
            ("frozen", 2, 2), (2, 2, 4), (2, 1, 1), ("frozen", 1, 1), ("frozen", 4, 4),
            ("frozen", 8, 1), (2, 4, 1), (6, 1, 2),
        ]
        for engine in ("scan", "multisteps")
    ],
)  # fmt: skip
def test_every_geometry_is_one_run(x64, whole, bn_group, microbatch, devices, engine):
    found = equivalence.differences(
        trace(Geometry(microbatch, devices, engine), bn_group), whole[bn_group]
    )
    assert equivalence.within(found, TOLERANCE), found


@pytest.fixture(scope="module")
def whole():
    with jax.enable_x64(True):
        return {group: trace(Geometry(6), group) for group in ("frozen", 2, 6)}


def test_noise_belongs_to_the_sample():
    this = run.prepare(tiny_config(), names=("a",), samples=12, identity={})
    epoch, index = np.zeros(3, np.int32), np.asarray([5, 7, 9], np.int32)
    noise = this.task.noise(epoch, index, np.float32)
    other = this.task.noise(epoch, index[::-1].copy(), np.float32)
    np.testing.assert_array_equal(noise, other[::-1])
    assert np.abs(noise).max() <= 0.05
    again = this.task.noise(epoch + 1, index, np.float32)
    assert not np.allclose(noise, again)
    spread = this.task.noise(np.zeros(4000, np.int32), np.arange(4000, dtype=np.int32), np.float32)
    assert np.std(spread) == pytest.approx(0.01, rel=0.02)


@pytest.mark.slow
def test_denominators_and_parameters_without_gradient():
    """The denominators are constants; what is said to be untrained is, and nothing else."""
    source = few()
    for name in ("adapointr-tiny", "pointr-tiny"):
        this = run.prepare(
            tiny_config(model=name), names=source.names, samples=len(source), identity={}
        )
        params, stats = this.task.initialise(0)
        check(this.grouped, this.rule.objective, params, stats, this.task.example(2))
        batch = next(run.make_stream(this, source).windows(0, [2], backend="threads"))
        sums = jax.jit(lambda p, s, b, this=this: this.rule.objective.sums(this.grouped, p, s, b))(
            params, stats, batch
        )
        dead = {
            "/".join(key.key for key in path)
            for path, leaf in jax.tree_util.tree_leaves_with_path(sums.gradients["samples"])
            if not np.any(leaf)
        }
        said = {
            "/".join(key.key for key in path)
            for path, _ in jax.tree_util.tree_leaves_with_path(params)
            if this.task.untrained("/".join(key.key for key in path))
        }
        assert said <= dead
        # A bias in front of a batch norm has no gradient either, and a ReLU may be off.
        assert all("bias" in path or "coarse_pred" in path for path in dead - said), dead - said


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("completion")
    patch = pytest.MonkeyPatch()
    patch.setattr(data, "open_clouds", lambda path, split, **_: few(split))
    try:
        train.train(tiny_config(**{"eval.unseen": True, "log.tensorboard": True}), workdir)
    finally:
        patch.undo()
    return workdir


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_training_writes_what_a_reader_needs(trained):
    lines = records(trained)
    updates = [r for r in lines if r["kind"] == "train"]
    assert [r["step"] for r in updates] == list(range(1, 7))
    assert {"loss", "loss/coarse", "loss/fine", "loss/denoise"} <= set(updates[0])
    parts = sum(v for k, v in updates[-1].items() if k.startswith("loss/"))
    assert updates[-1]["loss"] == pytest.approx(parts, rel=1e-5)
    last = [r for r in lines if r["kind"] == "eval"][-1]
    assert last["unseen/cd_l1"] > 0 and last["cd_l1/chair"] > 0
    assert (trained / "best").is_dir()
    assert list((trained / "events").iterdir())


@pytest.mark.slow
def test_evaluate_in_all_modes(trained, monkeypatch):
    monkeypatch.setattr(
        data, "open_clouds",
        lambda path, split, mode, **_: CroppedClouds(
            data.Shapes(split, length=4), split != "train", mode, 1, 2**28
        ),
    )  # fmt: skip
    found = evaluate.evaluate(trained)
    modes = [found[f"{mode}/cd_l2"] for mode in ("easy", "median", "hard")]
    assert found["cd_l2"] == pytest.approx(np.mean(modes))
    assert found["unseen/f_score"] is not None
    json.dumps(found)


@pytest.mark.slow
def test_predict_writes_clouds_and_pictures(trained, tmp_path):
    source = tmp_path / "scans"
    source.mkdir()
    cloud = data.Shapes("val", length=1).complete(0)[:3000] * 3 + 5
    data.write_cloud(source / "a.ply", cloud)
    data.write_cloud(source / "a.npy", cloud)
    (source / "broken.pcd").write_text("nothing")
    results = predicted(inference.load(trained), source, tmp_path / "out")
    assert [r["written"] for r in results] == ["a.npy.ply", "a.ply.ply"]
    for result in results:
        written = data.read_cloud(tmp_path / "out" / result["written"])
        assert written.shape == (512, 3)
        # Back in the frame of the scan.
        assert np.linalg.norm(written.mean(0) - cloud.mean(0)) < 3
    assert (tmp_path / "out" / "a.ply.png").stat().st_size > 1000
    with pytest.raises(data.DataError, match="none of the 1 files"):
        predicted(inference.load(trained), source / "broken.pcd", tmp_path / "out")


@pytest.mark.slow
def test_weights_come_in_and_go_out(trained, tmp_path):
    """A run's weights as a file, and a file as a workdir: the same predictions, either frame."""
    from jaxaccum import convert

    file = tmp_path / "weights.safetensors"
    assert convert.write(trained, file) > 50
    report, adopted = convert.convert(file, tmp_path / "converted")
    assert report.complete and adopted.config.model == "adapointr-tiny"
    assert adopted.summary == "clouds: as in its data set"
    before, after = inference.load(trained), inference.load(tmp_path / "converted")
    partial = few("val").sample(0, None)[0][None]
    np.testing.assert_array_equal(
        before.task.predict(before.params, before.stats, partial),
        after.task.predict(after.params, after.stats, partial),
    )
    assert before.facts == {"normalised": True}
    with pytest.raises(convert.WeightsError, match="knows no classes"):
        convert.convert(file, tmp_path / "other", names=["chair"])
    with pytest.raises(
        convert.WeightsError, match=r"no model named 'adapointr-big'.*: did you mean adapointr-"
    ):
        convert.convert(file, tmp_path / "other", model="adapointr-big")


@pytest.mark.slow
def test_init_from_a_workdir(trained):
    task = inference.load(trained).task
    params, _, report = initial.load_initial(
        trained, task.model, *task.initialise(5), (), task.loss_modules
    )
    assert report.complete
    same = jax.tree.map(np.array_equal, params, inference.load(trained).params)
    assert all(jax.tree.leaves(same))


@pytest.mark.slow
def test_predict_does_not_write_over_its_input(trained, tmp_path):
    data.write_cloud(tmp_path / "a.ply", data.Shapes("val", length=1).complete(0))
    with pytest.raises(data.DataError, match="would overwrite"):
        predicted(inference.load(trained), tmp_path, tmp_path)


def test_a_model_of_another_data_set():
    source = few()
    this = run.prepare(
        tiny_config(model="adapointr-pcn"), names=source.names, samples=12, identity={}
    )
    with pytest.raises(configs.ConfigError, match="predicts 16384 points"):
        this.task.notes(this.config, source, 12)


def test_scans_without_a_target(monkeypatch):
    from jaxaccum.metrics.completion import ScanMetrics

    rng = np.random.default_rng(0)
    clouds = [rng.random((50, 3)).astype(np.float32) for _ in range(3)]
    result = ScanMetrics(lambda: clouds)
    result.add_clouds(["a", "b"], clouds[:2], [clouds[0], clouds[1]])
    assert result.compute() == {
        "fidelity": 0.0, "fidelity/scan": 0.0, "samples": 2.0, "mmd": 0.0,
    }  # fmt: skip
    result.add_clouds(["c"], [clouds[2]], [np.full((50, 3), np.nan)])
    assert np.isnan(result.compute()["fidelity"])
    with pytest.raises(ValueError, match="added before"):
        result.add_clouds(["a"], clouds[:1], clouds[1:2])


def test_configs_and_their_errors():
    config = configs.completion()
    config.model = "yolov8-n"
    with pytest.raises(configs.ConfigError, match="no 'yolov8-n' for the task completion"):
        configs.validate(config)
    config.model = "adapointr-projected"
    config.eval.mode = "medium"
    with pytest.raises(configs.ConfigError, match=r"eval\.mode is one of easy, median, hard"):
        configs.validate(config)


def test_the_schedules_of_the_reference():
    """LR factor 0.9^(e/21), at least 0.02; batch-norm momentum 0.9 * 0.5^(e/21), at least 0.01."""
    config = tiny_config(steps=0, epochs=600.0, nbs=12)
    this = run.prepare(config, names=("a",), samples=12, identity={})
    for epoch in (0, 21, 100, 599):
        assert this.schedule.lr(epoch) == pytest.approx(1e-3 * max(0.9 ** (epoch / 21), 0.02))
        wanted = max(0.9 * 0.5 ** (epoch / 21), 0.01)
        assert this.schedule.bn_momentum(epoch) == pytest.approx(wanted)
        assert float(this.rule.statistics_momentum(jax.numpy.int32(epoch))) == pytest.approx(wanted)


@pytest.mark.slow
def test_running_statistics_move_by_the_schedule():
    """After one update the running mean is 0.9 of the batch's."""
    source = few()
    config = tiny_config(steps=3)
    this = run.prepare(config, names=source.names, samples=len(source), identity={})
    found = trace_of(this, source)
    assert found.momentum == pytest.approx(0.9, rel=1e-5)


def trace_of(this, source):
    from types import SimpleNamespace

    from jaxaccum.accumulate import make_engine

    params, stats = this.task.initialise(0)
    batch = next(run.make_stream(this, source).windows(0, [4], backend="threads"))
    moments = this.grouped(params, stats, {k: v[:2] for k, v in batch.items()}).moments
    more = this.grouped(params, stats, {k: v[2:] for k, v in batch.items()}).moments
    total = jax.tree.map(lambda a, b: a + b, moments, more)
    engine = make_engine(this.forward, this.rule, this.window)
    state, _ = engine.update(engine.init(params, stats), batch)
    (first,) = [m for m in jax.tree.leaves(total, is_leaf=lambda t: "count" in t)]
    (mean,) = [m["mean"] for m in jax.tree.leaves(state.stats, is_leaf=lambda t: "mean" in t)]
    ratio = np.asarray(mean) / np.asarray(first["first"] / first["count"])
    return SimpleNamespace(momentum=float(np.median(ratio)))


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/completion")
def test_real_furniture_and_cars(tmp_path):
    """One update and every kind of evaluation on real data."""
    path = f"{REAL}/sweethome3d:ShapeNet-34"
    config = tiny_config(
        **{"data.path": path, "steps": 1, "eval.viewpoints": 1, "eval.unseen": True,
           "eval.every": 1, "checkpoint.every": 1}
    )  # fmt: skip
    best = train.train(config, tmp_path)
    assert best["unseen/samples"] == 82 and best["samples"] == 54
    found = evaluate.evaluate(tmp_path, str(REAL / "kitti_cars"))
    assert found["samples"] == 18 and found["fidelity"] > 0
    assert completion.names()


def test_scans_with_z_up_stand_in_pictures():
    """They lay on their nose."""
    cloud = np.random.default_rng(0).normal(size=(500, 3)) * [1, 3, 2]
    lying = np.stack([cloud[:, 0], -cloud[:, 2], cloud[:, 1]], axis=1)  # the same, with z up
    there = Completed(Sample(cloud), cloud, True).plot()
    assert np.array_equal(Completed(Sample(lying), lying, True, up="z").plot(), there)
    assert not np.array_equal(Completed(Sample(lying), lying, True).plot(), there)


def test_points_left_out_of_a_cloud_are_told(tmp_path):
    """Half of a scan was left out, and the result spoke of the other half alone."""
    points = np.random.default_rng(0).normal(size=(100, 3))
    points[::2, 1] = np.nan
    np.save(tmp_path / "a.npy", points)
    (sample,) = predict.read_cloud(tmp_path / "a.npy")
    result = Completed(sample, np.zeros((512, 3), np.float32), True)
    assert str(result) == (
        "a.npy: 50 points (50 more are not finite and left out), taken in ShapeNet's frame, "
        "completed to 512"
    )
    assert json.loads(json.dumps(sample.facts)) == {"file": "a.npy", "left_out": 50}
    np.save(tmp_path / "a.npy", points[1::2])
    (sample,) = predict.read_cloud(tmp_path / "a.npy")
    assert sample.facts == {"file": "a.npy"}
    assert "left out" not in Completed(sample, sample.value, False).summary()


def test_clouds_in_memory_that_are_none():
    points = np.random.default_rng(0).normal(size=(100, 3))
    assert predict.cloud_of(points).value.dtype == np.float32
    with pytest.raises(data.DataError, match=r"\(3, 100\): give its transpose, array\.T$"):
        predict.cloud_of(points.T)
    with pytest.raises(data.DataError, match=r"a coordinate of .*e\+300, expected at most 1e\+18"):
        predict.cloud_of(points * 1e300)
    points[7] = np.nan
    with pytest.raises(data.DataError, match=r"1 of 100 points are not finite, .* point 7"):
        predict.cloud_of(points)
