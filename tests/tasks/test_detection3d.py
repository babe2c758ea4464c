"""3D detection: what outputs mean, the loss, the law on a whole detector, and the verbs."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import predicted, tiny_config3d

from jaxaccum import config as configs
from jaxaccum import convert, data, evaluate, export, train
from jaxaccum.accumulate import Geometry, equivalence
from jaxaccum.accumulate.checks import check
from jaxaccum.data.synthetic import streets
from jaxaccum.data.synthetic.streets import StreetsSource
from jaxaccum.losses import boxes3d as losses
from jaxaccum.losses.detection import Assignment
from jaxaccum.metrics import kitti
from jaxaccum.models import boxes3d
from jaxaccum.models.boxes3d import ORIGINAL, Coding
from jaxaccum.training import inference, run
from jaxaccum.weights import transfer as weights

WIDTH = 640
CAMERA = np.asarray([[370, 0, 318, 20], [0, 370, 95, 0.1], [0, 0, 1, 0.003]])
OBJECT = {"where": (-7.3, 1.63, 23.4), "size": (1.5, 1.6, 3.9), "yaw": 2.9}


def targets(camera=CAMERA, where=OBJECT["where"], size=OBJECT["size"], yaw=OBJECT["yaw"]):
    return losses.Targets3D(
        *(jnp.asarray(v, jnp.float64)[None, None] for v in (where, size)),
        jnp.full((1, 1), yaw), jnp.ones(1), jnp.asarray(camera)[None],
    )  # fmt: skip


def one_anchor(score=0.4):
    return Assignment(jnp.zeros((1, 1), int), jnp.ones((1, 1), bool), jnp.full((1, 1), score))


def best_logits(coding, published=False, **changes):
    """The logits (1, 1, 1207) of the smallest loss, found by following its gradient."""

    def loss(logits):
        found, _ = losses.boxes3d_loss(
            logits, one_anchor(), targets(**changes), coding, WIDTH, 0.0, published
        )
        return sum(found.values())

    def step(logits, i):  # ever smaller steps, as the distance in metres has a kink
        return logits - 5.0 * 0.998 ** jnp.maximum(i - 20000, 0) * jax.grad(loss)(logits), None

    steps = jnp.arange(26000)
    return jax.jit(lambda x: jax.lax.scan(step, x, steps)[0])(jnp.zeros((1, 1, 1207)))


def decoded(logits, coding, camera=CAMERA, box=None):
    found = boxes3d.decode(logits, coding)
    boxes = jnp.asarray(np.zeros(4) if box is None else box)[None, None]
    return boxes3d.in_camera(found, boxes, jnp.asarray(camera)[None], WIDTH, coding)


@pytest.mark.slow
def test_the_optimum_is_the_label(x64):
    """Half a bin, one temperature: logits of the smallest loss decode to the labelled box."""
    coding = Coding(place="predicted")
    found = decoded(best_logits(coding), coding)
    np.testing.assert_allclose(found.locations[0, 0], OBJECT["where"], atol=0.01)
    np.testing.assert_allclose(found.sizes[0, 0], OBJECT["size"], atol=1e-3)
    assert float(found.yaw[0, 0]) == pytest.approx(OBJECT["yaw"], abs=1e-3)


def test_the_published_optimum_is_off_by_half_a_bin(x64):
    """Section 14.3: unshifted targets decode 0.125 m above the label, at the loss's temperature."""
    logits = best_logits(ORIGINAL, published=True)
    found = boxes3d.expectation(boxes3d.split(logits)[0])[0, 0]
    np.testing.assert_allclose(found - np.asarray(OBJECT["where"]), 0.125, atol=0.01)
    sharper = boxes3d.decode(logits, ORIGINAL).locations[0, 0]  # and another one at inference
    assert np.abs(sharper - found).max() > 0.005


@pytest.mark.slow
def test_depth_is_that_of_one_lens(x64):
    """Zoomed by 1.5, a camera shows the object larger, as if nearer: the network may say so."""
    zoom = np.diag([1.5, 1.5, 1]) @ CAMERA
    coding = Coding(place="predicted")
    near = boxes3d.decode(best_logits(coding, camera=zoom), coding).locations[0, 0, 2]
    far = boxes3d.decode(best_logits(coding), coding).locations[0, 0, 2]
    assert float(far / near) == pytest.approx(1.5, abs=2e-3)
    depth = decoded(best_logits(coding, camera=zoom), coding, zoom).locations[0, 0, 2]
    assert float(depth) == pytest.approx(OBJECT["where"][2], abs=0.02)
    plain = Coding(place="predicted", focal=0.0)
    metres = boxes3d.decode(best_logits(plain, camera=zoom), plain).locations[0, 0, 2]
    assert float(metres) == pytest.approx(OBJECT["where"][2], abs=0.02)


def test_back_projection_inverts_the_camera():
    rng = np.random.default_rng(0)
    points = np.stack([rng.uniform(-9, 9, 20), rng.uniform(-2, 2, 20), rng.uniform(4, 60, 20)])
    u, v, w = CAMERA @ np.concatenate([points, np.ones((1, 20))])
    box = np.stack([u / w - 3, v / w - 5, u / w + 3, v / w + 5], axis=1)[None]
    x, y = boxes3d.back_projected(jnp.asarray(box), jnp.asarray(points[2])[None], CAMERA[None])
    np.testing.assert_allclose(x[0], points[0], atol=1e-4)
    np.testing.assert_allclose(y[0], points[1], atol=1e-4)


def test_a_box_is_placed_by_its_middle():
    """Projected: the 2D box shows the middle of the object, its location is half a height below."""
    coding = Coding(heading="world")
    where, height = np.asarray(OBJECT["where"]), OBJECT["size"][0]
    middle = np.append(where - [0, height / 2, 0], 1)
    u, v, w = CAMERA @ middle
    found = boxes3d.Boxes3D(
        jnp.asarray([[[0, 0, where[2] / (370 / (0.58 * WIDTH))]]]),
        jnp.asarray(OBJECT["size"])[None, None], jnp.zeros((1, 1)),
    )  # fmt: skip
    box = jnp.asarray([u / w - 9, v / w - 4, u / w + 9, v / w + 4])[None, None]
    placed = boxes3d.in_camera(found, box, jnp.asarray(CAMERA)[None], WIDTH, coding)
    np.testing.assert_allclose(placed.locations[0, 0], where, rtol=1e-4)


def test_a_heading_has_no_ends(x64):
    """From any output the smallest loss is reached the shorter way; a bounded one can be stuck."""
    left = {}
    for turn in ("axis", "free", "bounded"):
        coding = Coding(place="predicted", turn=turn)
        # Some turns on; bounded: at pi; axis: far out in a wrong direction.
        logits = jnp.zeros((1, 1, boxes3d.outputs(coding))).at[..., -1].set(12.0)

        def loss(x, coding=coding):
            return numerators(x, coding=coding, yaw=-1.2)[0]["heading"]

        step = jax.jit(lambda x, loss=loss: x - 0.5 * jax.grad(loss)(x))
        x = logits
        for _ in range(200):
            x = step(x)
        left[turn] = float(loss(x))
    assert left["axis"] < 1e-6 and left["free"] < 1e-6 and left["bounded"] > 0.1


def test_an_axis_and_its_front():
    """The axis is exact whatever the doubt about the front, which only has to be on its side."""
    coding = Coding(place="predicted", focal=0.0)
    assert boxes3d.outputs(coding) == 1207 and boxes3d.outputs(ORIGINAL) == 1204
    for angle in (-3.0, -1.2, 0.0, 0.4, 1.57, 3.1):
        for doubt in (0.02, 1.0):
            exact = boxes3d.directions_of(jnp.asarray(angle), coding)
            rough = boxes3d.directions_of(jnp.asarray(angle + 1.2), coding)
            output = jnp.concatenate([doubt * rough[:2], 0.3 * exact[2:]])
            found = boxes3d.decode(jnp.zeros((1, 1, 1207)).at[..., -4:].set(output), coding)
            assert float(found.yaw[0, 0]) == pytest.approx(angle, abs=1e-5)
            output = output.at[:2].multiply(-1)
            found = boxes3d.decode(jnp.zeros((1, 1, 1207)).at[..., -4:].set(output), coding)
            apart = float(found.yaw[0, 0]) - angle
            assert abs(apart) == pytest.approx(np.pi, abs=1e-5)


def test_a_heading_is_what_is_seen():
    """Coded by the ray, a car that passes by keeps its look only if its coded angle changes."""
    coding = Coding(place="predicted")
    for x in (-20.0, 0.0, 20.0):
        found = boxes3d.Boxes3D(
            jnp.asarray([[[x, 1.6, 20.0]]]), jnp.ones((1, 1, 3)), jnp.full((1, 1), 3.0)
        )
        yaw = boxes3d.in_camera(
            found, jnp.zeros((1, 1, 4)), jnp.asarray(CAMERA)[None], WIDTH, Coding(
                place="predicted", focal=0.0
            )
        ).yaw[0, 0]  # fmt: skip
        expected = 3.0 + np.arctan2(x, 20.0)
        assert float(yaw) == pytest.approx((expected + np.pi) % (2 * np.pi) - np.pi, abs=1e-5)
    assert coding.heading == "seen"


def numerators(logits=None, published=False, assignment=None, coding=None, **changes):
    logits = jnp.zeros((1, 1, 1207)) if logits is None else logits
    return losses.boxes3d_loss(
        logits, assignment or one_anchor(), targets(**changes), coding or Coding(), WIDTH, 0.1,
        published,
    )  # fmt: skip


def test_uniform_logits_have_a_known_loss(x64):
    found, _ = numerators(coding=Coding(focal=0.0))
    assert float(found["x"]) == pytest.approx(0.4 * (np.log(400) + 0.1 * 7.3))
    assert float(found["z"]) == pytest.approx(0.4 * (np.log(400) + 0.1 * (50 - 23.4)))
    assert float(found["size"]) == pytest.approx(0.4 * sum(abs(10 - s) for s in OBJECT["size"]))
    published, denominators = numerators(published=True, coding=ORIGINAL)
    assert float(published["x"]) == pytest.approx(np.log(400) + 0.1 * 7.3)  # whatever the score
    assert float(denominators["x_positives"]) == 1.0


def test_what_is_not_labelled_or_out_of_reach_teaches_nothing(x64):
    flat, _ = numerators(size=(-1.0, -1.0, -1.0), where=(-1000.0, -1000.0, -1000.0))
    assert all(float(v) == 0 for v in flat.values())
    far, _ = numerators(where=(-60.0, 1.6, 30.0))
    assert float(far["x"]) == 0 and float(far["z"]) > 0 and float(far["size"]) > 0
    gradient = jax.grad(lambda p: sum(numerators(p, where=(1.0, 1.6, 400.0))[0].values()))(
        jnp.zeros((1, 1, 1207))
    )
    assert np.all(np.isfinite(gradient)) and not np.any(gradient[..., 800:1200])


# --- the law ---


def small(split="train", count=12):
    return StreetsSource(split, count=count, size=(64, 96))


def trace(geometry, x64=True, **changes):
    dtype = "float64" if x64 else "float32"
    config = tiny_config3d(
        microbatch=geometry.microbatch, devices=geometry.devices, engine=geometry.engine,
        dtype=dtype, **{"nbs": 10, "bn_group": "frozen", **changes},
    )  # fmt: skip
    source = small()
    this = run.prepare(config, names=source.names, samples=len(source), identity={})

    def batches():
        sizes = [this.sizes.of(0)] * 2
        return run.make_stream(this, source).windows(0, sizes, backend="threads")

    return equivalence.trace(
        this.forward, this.rule, this.recipe, this.window.geometry,
        *this.task.initialise(0, np.dtype(dtype)), batches, 2,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bn_group", "geometry"),
    [
        ("frozen", Geometry(1, 4)), (4, Geometry(8, 1, "multisteps")), (4, Geometry(2)),
        pytest.param("frozen", Geometry(4, 1, "multisteps"), marks=pytest.mark.long),
        pytest.param(4, Geometry(4, 2), marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_one_run(x64, whole, bn_group, geometry):
    found = equivalence.differences(trace(geometry, bn_group=bn_group), whole[bn_group])
    assert equivalence.within(found, equivalence.Tolerance.of(True)), found


@pytest.fixture(scope="module")
def whole():
    with jax.enable_x64(True):
        return {group: trace(Geometry(12), bn_group=group) for group in ("frozen", 4)}


@pytest.mark.slow
def test_the_published_rule_weighs_location_by_the_microbatches(x64):
    """Section 14.3: K microbatches count location some K times; here the geometry changes nothing.

    Eight images as one microbatch, and as eight: the axis terms' share of the total.
    """
    original = {"compat": True, "nbs": 8, "loss.location": 200.0, "loss.metres": 0.02}
    original |= {f"box3d.{k}": getattr(ORIGINAL, k) for k in ("temperature", "largest", "turn")}
    shares = {}
    for changes in (original, {"nbs": 8}):
        for microbatch in (8, 1):
            log = trace(Geometry(microbatch), **changes).logs[0]
            axes = sum(log[f"loss/{a}"] for a in "xyz")
            flat = sum(log[f"loss/{k}"] for k in ("box", "cls", "dfl"))
            shares["compat" in changes, microbatch] = axes / flat
    assert shares[True, 1] > 2 * shares[True, 8]
    assert shares[False, 1] == pytest.approx(shares[False, 8], rel=1e-12)


def test_denominators_are_constants():
    for compat in (False, True):
        config = tiny_config3d(compat=compat)
        this = run.prepare(config, names=data.open_source3d("", "val").names, samples=12,
                           identity={})  # fmt: skip
        params, stats = jax.eval_shape(lambda t=this.task: t.initialise(0))
        check(this.grouped, this.rule.objective, params, stats, this.task.example(2))


# --- the verbs ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("3d")
    patch = pytest.MonkeyPatch()
    patch.setattr(data, "open_source3d", lambda path, split, **_: small(split, 8))
    try:
        train.train(tiny_config3d(), workdir)
    finally:
        patch.undo()
    return workdir


@pytest.mark.slow
def test_training_and_evaluation_report_kittis_metrics(trained, monkeypatch, tmp_path):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if line["kind"] == "train"]
    assert {"loss/x", "loss/y", "loss/z", "loss/size", "loss/heading"} <= set(updates[0])
    assert {"ap40_3d/Car/moderate", "aos40/Car/easy", "depth/all"} <= set(lines[-1])
    monkeypatch.setattr(data, "open_source3d", lambda path, split, **_: small(split, 8))
    found = evaluate.evaluate(trained, drawn=tmp_path / "drawn.png", pictures=1)
    assert (tmp_path / "drawn.png").stat().st_size > 1000
    best = max(
        (line for line in lines if line["kind"] == "eval"),
        key=lambda line: (line["ap40_3d/mean/moderate"], -line["step"]),
    )
    assert found["depth/all"] == best["depth/all"] or np.isnan(best["depth/all"])


@pytest.mark.slow
def test_predict_writes_what_kitti_reads(trained, tmp_path):
    streets.write(tmp_path / "kitti", train=2, val=1, size=(64, 96))
    model = inference.load(trained)
    folder = tmp_path / "kitti" / "training" / "image_2"
    results = predicted(model, folder, tmp_path / "out", conf=0.0001)
    assert len(results) == 3 and all(r["camera"].endswith(".txt") for r in results)
    for result in results:
        stem = result["file"].rpartition(".")[0]
        text = (tmp_path / "out" / "data" / f"{stem}.txt").read_text()
        labels = kitti.parse(text, "x")
        assert len(labels) == len(result["detections"]) > 0
        first = result["detections"][0]
        np.testing.assert_allclose(labels.locations[0], first["location"], atol=0.006)
        alpha = first["rotation_y"] - np.arctan2(first["location"][0], first["location"][2])
        assert np.cos(alpha - first["alpha"]) == pytest.approx(1, abs=1e-5)
        assert (tmp_path / "out" / f"{stem}.png").is_file()
    with pytest.raises(data.DataError, match="none of the 3 files"):
        predicted(model, folder, tmp_path / "o2", calib=tmp_path / "kitti")


@pytest.mark.slow
def test_an_image_without_a_calibration_is_said_to_have_the_usual(trained, tmp_path):
    from jaxaccum.draw import save_image

    save_image(tmp_path / "a.png", small("val", 1).image(0))
    (result,) = predicted(inference.load(trained), tmp_path / "a.png", tmp_path / "out")
    assert result["camera"] == "KITTI's usual"


@pytest.mark.slow
def test_weights_go_out_and_come_in_with_their_coding(trained, tmp_path):
    """A file does not say what its outputs mean; but only ours have four for the heading."""
    file, out = tmp_path / "w.safetensors", tmp_path / "in"
    convert.write(trained, file)
    report, adopted = convert.convert(file, out, "tiny-3d-t")
    assert report.complete and adopted.hints == ("images of 192 x 640 px",)
    ours, theirs = inference.load(trained), inference.load(out)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    assert theirs.task.coding == ours.task.coding == Coding()
    state = {  # as the original would have it
        key: value[: boxes3d.OUTPUTS] if re.search(r"\.cv4\.\d\.2\.", key) else value
        for key, value in load_file(file).items()
    }
    save_file(state, tmp_path / "o.safetensors")
    report, adopted = convert.convert(
        tmp_path / "o.safetensors", tmp_path / "original", "tiny-3d-t"
    )
    assert report.complete
    assert adopted.config.box3d.to_dict() == {
        field.name: getattr(ORIGINAL, field.name) for field in dataclasses.fields(ORIGINAL)
    }
    assert inference.load(tmp_path / "original").task.coding == ORIGINAL


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.height": 100}, "use 96 or 128"),
        ({"box3d.heading": "north"}, "seen, world"),
        ({"model": "yolov8-n"}, "there is no 'yolov8-n' for the task detection3d"),
        ({"augment.scale": 3.0}, "augment"),
    ],
)
def test_configs_that_cannot_be(changes, message):
    config = tiny_config3d(**changes)
    with pytest.raises(configs.ConfigError, match=message):
        source = small()
        this = run.prepare(config, names=source.names, samples=8, identity={})
        run.make_stream(this, source)


def test_the_published_recipe_is_one_argument():
    import runpy

    made = runpy.run_path("configs/yolo3d_n.py")["get_config"]
    assert not made().compat and made("original").compat
    assert made("original").loss.location == 200
    with pytest.raises(configs.ConfigError, match="original"):
        made("orignal")


@pytest.mark.slow
def test_the_exported_program_takes_cameras(trained, tmp_path):
    facts = export.export(trained, tmp_path / "program", platforms=["cpu"], batch=1)
    assert facts["image_size"] == [64, 96]
    model = inference.load(trained)
    image, camera = small("val", 1).image(0)[None], small("val", 1).camera(0)[None]
    found = export.load_exported(tmp_path / "program")(image, camera)
    expected = model.task.predict(model.params, model.stats, image, camera)
    for a, b in zip(found, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scale", "count"),
    [
        ("n", 13_522_596),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("s", 22_165_316), ("m", 34_450_500), ("l", 41_286_212), ("x", 77_115_364))
        ),
    ],
)
def test_parameters_of_the_original(scale, count):
    """Of all scales with 8 classes; the original counts 16 fixed bins as well."""
    shapes = weights.shapes(f"yolov12-3d-{scale}", 8)
    learned = sum(int(np.prod(s)) for k, s in shapes.items() if "running_" not in k)
    assert learned + 16 == count


@pytest.mark.slow
def test_a_3d_checkpoint_is_told_from_a_2d_one():
    for name in ("yolov12-3d-n", "yolov12-turbo-n"):
        state = {k: np.broadcast_to(np.float32(0), s) for k, s in weights.shapes(name, 8).items()}
        assert weights.guess_model(weights.Weights(state)) == name
