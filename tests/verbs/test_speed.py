"""What is said of how long a sample takes: only what was measured, and that rightly."""

from __future__ import annotations

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_completion
from test_predict import image

import jaxaccum
from jaxaccum import data, full_evaluation
from jaxaccum.tasks.evaluating import overlapped
from jaxaccum.tasks.predicting import new_speed, predict_files
from jaxaccum.tasks.speed import Phases, Speed, collected, of_evaluation, timed


def test_the_first_sample_is_left_out():
    speed = Speed("images", "64 px")
    assert speed.line() == (
        "speed: not measured: there was no image at 64 px but the first, which compiles the network"
    )
    speed.add_one({"network": 5000.0, "NMS": 7.0})
    assert "not measured" in speed.line() and speed.phases() == {}
    for network in (8.0, 9.0):
        speed.add_one({"network": network, "NMS": 0.05})
    assert speed.phases() == {"network": 8.5, "NMS": pytest.approx(0.05)}
    assert speed.line() == (
        "speed: 8.5 ms network, 0.050 ms NMS an image, over 2 images at 64 px (the first, "
        "compiling image left out)"
    )
    assert speed.to_json() == {
        "milliseconds": {"network": 8.5, "NMS": 0.05}, "unit": "images", "samples": 2,
        "left_out": 1, "at": "64 px", "batch": 1,
    }  # fmt: skip


def test_phases_follow_each_other():
    phases = Phases()
    time.sleep(0.03)
    phases.end("one")
    phases.end("two")
    assert 30 <= phases.milliseconds["one"] < 200 and phases.milliseconds["two"] < 20

    def slow():
        for i in range(2):
            time.sleep(0.02)
            yield i

    found = []
    for took, one in timed(slow()):
        time.sleep(0.05)  # is not theirs
        found.append(one)
        assert 20 <= took < 65
    assert found == [0, 1]


def batches(shapes, rows=4):
    for n, (width, real) in enumerate(shapes):
        weight = np.zeros(rows, np.float32)
        weight[:real] = 1
        index = np.where(weight > 0, np.arange(rows) + rows * n, -1)
        yield {"image": np.zeros((rows, width), np.float32), "weight": weight, "index": index}


def test_phases_side_by_side_are_not_mixed_up():
    """The network takes 30 ms a batch, what the host does with it 80: neither has the other's, and
    the compilation, of each shape, is in none."""

    def waited(x):
        time.sleep(0.03)
        return x

    def network(params, stats, x):
        return jax.pure_callback(waited, jax.ShapeDtypeStruct(x.shape, x.dtype), x + params + stats)

    def use(batch, output):
        np.asarray(output)
        time.sleep(0.08)
        return {"NMS": 12.0}

    with collected() as speeds:
        speed = of_evaluation("images", "some px")
        speed.prepared.update({index: 2.0 for index in range(40)})
        overlapped(
            jax.jit(network), jnp.zeros(()), jnp.zeros(()),
            batches([(8, 4)] * 4 + [(16, 4)] * 3 + [(16, 2)]), lambda batch: (batch["image"],), use,
            30, "images", speed,
        )  # fmt: skip
    assert speeds == [speed]
    assert (speed.samples, speed.left_out, speed.batch) == (3 * 4 + 2 * 4 + 2, 8, 4)
    found = speed.phases()
    assert list(found) == ["reading and preparation", "network", "NMS"]
    assert found["reading and preparation"] == 2 and found["NMS"] == pytest.approx(6 * 12 / 22)
    assert 30 / 4 <= found["network"] < 90 / 4  # with the host's it would be 110 / 4
    assert speed.together >= 80 / 4
    assert "(the first, compiling batch of each shape left out)" in speed.line()
    assert f"({speed.together:.1f} ms together, side by side)" in speed.line()


def test_one_batch_alone_tells_nothing():
    speed = of_evaluation("images", "8 px")
    overlapped(
        lambda params, stats, x: x, 0, 0, batches([(8, 3)]), lambda batch: (batch["image"],),
        lambda batch, output: None, 3, "images", speed,
    )  # fmt: skip
    assert speed.line() == (
        "speed: not measured: all 3 images were in the first batch at 8 px, which compiles the "
        "network"
    )


def test_an_error_of_the_device_ends_an_evaluation():
    def refused(x):
        raise ValueError("of the device")

    def network(params, stats, x):
        return jax.pure_callback(refused, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    with pytest.raises(Exception, match="of the device"):
        overlapped(
            jax.jit(network), 0, 0, batches([(8, 4)] * 3), lambda batch: (batch["image"],),
            lambda batch, output: None, 12, "images",
        )  # fmt: skip


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    config = tiny.tiny_config(**{"eval.batch": 64})
    names = data.Scenes("val").names
    return tiny.untrained(tmp_path_factory.mktemp("run") / "2d", config, names)


@pytest.fixture(scope="module")
def detector26(tmp_path_factory):
    config = tiny.tiny_config(**{"model": "tiny-26-t", "eval.end_to_end": True})
    return tiny.untrained(tmp_path_factory.mktemp("run") / "26", config, data.Scenes("val").names)


def test_of_predict(detector, detector26, tmp_path):
    for i in range(4):
        image(tmp_path / "in" / f"{i}.png", i)
    for model, last in ((detector, "NMS"), (detector26, "choosing")):
        speed = new_speed(model)
        predict_files(model, tmp_path / "in", tmp_path / model.config.model, [], speed=speed)
        phases = ["reading", "preparation", "network", last, "drawing and writing"]
        assert list(speed.phases()) == phases and all(ms > 0 for ms in speed.phases().values())
        assert (speed.samples, speed.left_out) == (3, 1)
        assert f"ms {last}, " in speed.line() and "over 3 images at 64 px" in speed.line()
        python = jaxaccum.Model(model)
        first, *others = python.predict(tmp_path / "in")
        assert list(first.speed) == phases[1:4] and "speed" not in first.to_json()
        # The first has the compilation.
        assert first.speed["network"] > max(one.speed["network"] for one in others)
        assert python.speed.samples == 3
        assert python.speed.phases()["network"] < first.speed["network"]


def test_of_evaluate(detector, capsys):
    found = full_evaluation.evaluate(detector)
    told = found["speed"]
    assert list(told["milliseconds"]) == ["reading and preparation", "network", "NMS"]
    assert (told["samples"], told["left_out"], told["batch"]) == (192, 64, 64)
    assert told["samples"] + told["left_out"] == found["images"]
    assert all(ms > 0 for ms in told["milliseconds"].values()) and told["together"] > 0
    json.dumps(found, allow_nan=False)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("speed: ") and "over 192 images at 64 px in batches of 64" in last
    assert jaxaccum.Model(detector).evaluate()["map50"] == found["map50"]


@pytest.mark.slow
def test_of_boxes_in_space(tmp_path, capsys):
    names = data.open_source3d("", "val").names
    model = tiny.untrained(tmp_path / "3d", tiny.tiny_config3d(), names)
    told = full_evaluation.evaluate(model)["speed"]
    assert list(told["milliseconds"]) == ["reading and preparation", "network", "NMS"]
    assert told["at"] == "64 x 96 px" and told["left_out"] == 8
    for i in range(2):
        image(tmp_path / "in" / f"{i}.png", i)
    speed = new_speed(model)
    predict_files(model, tmp_path / "in", tmp_path / "out", [], speed=speed)
    assert list(speed.phases())[1:4] == ["preparation", "network", "NMS"]


@pytest.mark.slow
def test_of_clouds(tmp_path, capsys):
    model = tiny.untrained(tmp_path / "c", tiny_completion.tiny_config(), (), {"normalised": True})
    (tmp_path / "in").mkdir()
    for i in range(2):
        data.write_cloud(tmp_path / "in" / f"{i}.npy", data.Shapes("val", length=2).complete(i))
    speed = new_speed(model)
    predict_files(model, tmp_path / "in", tmp_path / "out", [], speed=speed)
    assert list(speed.phases())[1:4] == ["preparation", "network", "restoring"]
    assert "ms drawing and writing a cloud, over 1 cloud at 2,048 points" in speed.line()
    told = full_evaluation.evaluate(model)["speed"]
    assert list(told["milliseconds"]) == ["reading and preparation", "network"]
    assert told["unit"] == "clouds" and told["samples"] > 0


def test_tasks_that_say_nothing_of_their_phases_have_those_around_them(detector, tmp_path):
    """A task of one's own, whose results have no speed."""
    for i in range(2):
        image(tmp_path / "in" / f"{i}.png", i)
    whole = detector.task.predictor(detector)

    class Own(type(detector.task)):
        def predictor(self, trained, **options):
            return lambda sample: dataclasses.replace(whole(sample), speed={})

    own = Own(**{f.name: getattr(detector.task, f.name) for f in dataclasses.fields(detector.task)})
    speed = new_speed(detector)
    predict_files(
        dataclasses.replace(detector, task=own), tmp_path / "in", tmp_path / "out", [], speed=speed
    )
    assert list(speed.phases()) == ["reading", "preparation and network", "drawing and writing"]
