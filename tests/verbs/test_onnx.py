"""Programs as ONNX: every rule, and every kind of network, in onnxruntime beside JAX."""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_completion
from jax import export as jax_export
from jax import lax

from jaxaccum import programs, tasks
from jaxaccum.config import ConfigError
from jaxaccum.metrics import detection as metrics
from jaxaccum.tasks import Trained

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
onnx_writer = pytest.importorskip("jaxaccum.onnx_writer")
RULES = sys.modules["jaxaccum.onnx_writer.elementwise"].RULES


def run(model, inputs):
    """A model's results in its order. model: bytes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options)
    names = [i.name for i in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs, strict=True)))


def written(function, *shapes, batch="n"):
    """A function of arrays with a first axis of samples, as a model."""
    count = jax_export.symbolic_shape("n")[0] if batch == "n" else batch
    avals = [jax.ShapeDtypeStruct((count, *shape), dtype) for shape, dtype in shapes]
    concrete = [jax.ShapeDtypeStruct((2, *shape), dtype) for shape, dtype in shapes]
    outputs = [f"y{i}" for i in range(len(jax.tree.leaves(jax.eval_shape(function, *concrete))))]
    return onnx_writer.to_onnx(function, avals, "f", [f"x{i}" for i in range(len(shapes))], outputs)


def close(found, expected, rtol=1e-5, atol=2e-6):
    """Equal to rounding, which is that of the largest value."""
    expected = jax.tree.leaves(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        size = float(np.max(np.abs(b), initial=1))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol * size)


IMAGE = ((6, 5, 4), np.float32)
ROW = ((5,), np.float32)
RNG = np.random.default_rng(0)
KERNEL = RNG.standard_normal((3, 3, 4, 6)).astype(np.float32)
DEPTHWISE = RNG.standard_normal((3, 3, 1, 4)).astype(np.float32)
EVERYWHERE = RNG.standard_normal((6, 5, 4, 2)).astype(np.float32)
WHOLE = RNG.standard_normal((6, 5, 4, 6)).astype(np.float32)
CHANNELS = RNG.standard_normal(6).astype(np.float32)
NHWC = ("NHWC", "HWIO", "NHWC")


def conv(x, kernel=KERNEL, strides=(1, 1), pads=((1, 1), (1, 1)), **options):
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=NHWC, **options)


def farthest(x):
    """A loop whose body reads x, and whose state and results depend on it."""
    first = x[:, 0]

    def step(carry, row):
        carry = jnp.minimum(carry, jnp.sum((x - row) ** 2, -1))
        return carry, (jnp.argmax(carry, -1), carry[:, 0])

    return lax.scan(step, jnp.full(x.shape[:2], 9.0), jnp.arange(12.0).reshape(3, 4) * first[0, 0])


def twice(x):
    """A loop whose inner one reads what was computed before both."""
    w = jnp.sin(x)

    def outer(carry, _):
        return lax.scan(lambda d, _: (d + w, d[:, 0]), carry, None, length=2)

    return lax.scan(outer, x, None, length=3)


CASES = {
    "arithmetic": (lambda x, y: (x + y, x - y, x * y, x / (y**2 + 1), -x, abs(x)), ROW, ROW),
    "functions": (
        lambda x: [
            f(x)
            for f in (
                jnp.exp, jnp.tanh, jax.nn.sigmoid, jax.nn.silu, lax.erf, jnp.sin, jnp.cos, jnp.tan,
                jnp.floor, jnp.ceil, jnp.sign, jnp.round, jax.nn.relu, jnp.arctan, jnp.sinh,
                jnp.cosh, jnp.arcsinh, jnp.expm1, jnp.exp2, jnp.square, jnp.isfinite,
                lambda a: jax.nn.gelu(a, approximate=False), lambda a: a**3, lambda a: a**2,
                lambda a: jnp.sqrt(a * a), lambda a: lax.rsqrt(a * a + 1),
                lambda a: jnp.log(a * a + 1), lambda a: jnp.log1p(a * a), jax.nn.softmax,
                lambda a: jnp.arcsin(jnp.tanh(a)), lambda a: jnp.arccos(jnp.tanh(a)),
                lambda a: jnp.arctanh(0.9 * jnp.tanh(a)), lambda a: jnp.arccosh(1 + a * a),
                lambda a: jnp.power(jnp.abs(a), 1.5), lambda a: jnp.clip(a, -0.5, 0.5),
                lambda a: lax.clamp(-0.5, a, 0.25),
                lambda a: lax.erfc(a / 2),
            )
        ],
        ROW,
    ),
    "comparisons": (
        lambda x, y: (
            x < y, x <= y, x > y, x >= y, x == y, x != y, (x < 0) & (y < 0), (x < 0) | (y < 0),
            ~(x < 0), (x < 0) ^ (y < 0), jnp.where(x < y, x, 2.0), jnp.maximum(x, 0.1),
            jnp.minimum(x, y),
        ),
        ROW, ROW,
    ),
    "angles": (
        lambda x, y: (jnp.arctan2(x, y), jnp.arctan2(jnp.zeros_like(x), abs(0 * y))), ROW, ROW,
    ),
    "remainders": (lambda x, y: (lax.rem(x, 0.7 * jnp.ones_like(x)), x % 0.7, y % 3 - y // 2),
                   ROW, ((5,), np.int32)),
    "integers": (lambda x: (x.astype(np.float32) / 255, x.astype(np.int32) * 3), ((5,), np.uint8)),
    "broadcasts": (
        lambda x: (
            x + jnp.arange(5.0), x[:, None] * jnp.ones((1, 3, 1)), jnp.broadcast_to(x[:, :, None],
            (*x.shape, 2)), x[:, :1] + x, jnp.ones_like(x), x.shape[0] * x,
            jnp.zeros((x.shape[0], 3)) + jnp.arange(3.0), jnp.repeat(x, 2, axis=1),
        ),
        ROW,
    ),
    "axes": (
        lambda x: (
            x.transpose(0, 3, 1, 2), x.reshape(x.shape[0], -1), x.reshape(-1, 4), x[:, ::2, 1:3],
            x[:, ::-1], jnp.stack([x[..., 0], x[..., 1]], 1), jnp.split(x, [1, 3], -1)[1],
            jnp.concatenate([x, 2 * x], 2), jnp.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0))),
            jnp.moveaxis(x, -1, 0)[2], x[:, 2], jnp.swapaxes(x, 1, 2)[:, None].squeeze(1),
            lax.dynamic_slice_in_dim(x, 2, 3, axis=1), x[0], x[-1, 2],
            lax.dynamic_slice(x, (0, (9 * x[0, 0, 0, 0]).astype(int), 1, 0), (x.shape[0], 2, 3, 4)),
            lax.broadcasted_iota(np.int32, (x.shape[0], 3), 0),
        ),
        IMAGE,
    ),
    "reductions": (
        lambda x: (
            x.sum(), x.sum(1), x.mean((1, 2)), x.max(-1), x.min(2), x.transpose(0, 3, 1, 2).sum(2),
            jnp.argmax(x, 1), jnp.argmin(x, -1), jnp.cumsum(x, 1), jnp.var(x, -1),
            jnp.prod(x, (1, 3)), lax.cumsum(x, 2, reverse=True), jax.nn.logsumexp(x, -1),
        ),
        IMAGE,
    ),
    "orders": (
        lambda x: (*lax.top_k(x, 3), jnp.sort(x, 1), jnp.argsort(x, 1),
                   lax.top_k(jnp.zeros_like(x), 2)[1]), ROW,
    ),
    "gathers": (
        lambda x, i: (
            jnp.take_along_axis(x, i % 6, 1), x[jnp.arange(x.shape[0]), i[:, 0, 0, 0] % 6],
            jnp.take(x, jnp.array([3, 0, 3]), axis=2),
            jax.vmap(lambda a, b: a[b])(x, i[:, :, 0, 0] % 6),
            jnp.asarray(CHANNELS)[i % 6], x[:, [1, 0], :, 2],
        ),
        IMAGE, ((6, 1, 1), np.int32),
    ),
    "products": (
        lambda x, y: (
            x @ jnp.ones((4, 3)), jnp.einsum("nhwc,nhwd->nhcd", x, x),
            jnp.einsum("nhwc,nhwc->n", x, x), jnp.einsum("nhwc,ck->nkhw", x, KERNEL[0, 0]),
            jnp.einsum("nhwc,nuvc->nhwuv", x, x), jnp.einsum("nhwc,n->hwc", x, y[:, 0]),
            jnp.einsum("hwc,nw->nhc", KERNEL[:, [0, 1, 2, 0, 1], 0], y),
            y @ jnp.ones(5), jnp.einsum("nhwc,hwcd->nd", x, EVERYWHERE),
        ),
        IMAGE, ROW,
    ),
    "convolutions": (
        lambda x: (
            conv(x), conv(x, strides=(2, 1)), conv(x, pads=((0, 2), (1, 0))),
            conv(x, rhs_dilation=(2, 1)), conv(x, DEPTHWISE, feature_group_count=4),
            lax.conv_general_dilated(x.transpose(0, 3, 1, 2), KERNEL.transpose(3, 2, 0, 1), (1, 1),
                                     "VALID"),
            lax.conv_general_dilated(x[:, 0], KERNEL[0], (1,), ((1, 1),),
                                     dimension_numbers=("NWC", "WIO", "NWC")),
        ),
        IMAGE,
    ),
    "normalised": (
        lambda x: (
            (conv(x) - CHANNELS) * CHANNELS / 3 + 1, 2 * conv(x) + CHANNELS, CHANNELS - conv(x),
            conv(x) * CHANNELS[:, None][:5, :1], conv(x) / CHANNELS, conv(x) + conv(x),
            CHANNELS / (5 + conv(x) ** 2), jax.nn.silu(conv(conv(x)[..., :4] * 2) + CHANNELS),
            (lambda y: (y, y + CHANNELS, y * 2))(conv(x)),
        ),
        IMAGE,
    ),
    # JAX's arithmetic broadcasts axes of one element by itself.
    "more than the convolution": (
        lambda x: (
            (conv(x, KERNEL[..., :1]) + CHANNELS).sum(-1), conv(x, KERNEL[..., :1]) * CHANNELS,
            conv(x, WHOLE, pads=((0, 0), (0, 0))) * np.full((6, 5, 6), 2.0, np.float32),
            conv(x.mean(0, keepdims=True)) + jnp.ones((x.shape[0], 6, 5, 6)),
            jnp.broadcast_to(conv(x, KERNEL[..., :1]), (x.shape[0], 6, 5, 6)) + CHANNELS,
            conv(x) * CHANNELS[:1], 3 - conv(x),
        ),
        IMAGE,
    ),
    "places outside": (
        lambda x, i: (
            jnp.take(x, jnp.array([0, -2, 9]), 1, mode="clip"),
            jnp.take(x, jnp.array([0, -2, 9]), 1, mode="fill"),
            jnp.take_along_axis(x, 3 * i - 9, 1, mode="clip"),
            jnp.take_along_axis(x, 3 * i - 9, 1, mode="fill", fill_value=7.0),
            jnp.take_along_axis(i, 3 * i - 9, 1), x.at[:, 3 * i[:, 0] - 9].get(mode="clip"),
        ),
        ROW, ((4,), np.int32),
    ),
    "choices": (
        lambda x, y: (
            jnp.where(x > 0, x > 1, x < -1), jnp.where(True, x, y),
            jax.vmap(lambda a, b: lax.cond(a[0] > 0, lambda: a, lambda: b))(x, y),
            jnp.any(x > 1, 1), jnp.all(x < 1, (0, 1)), x // 0.3, lax.round(2 * x),
            jnp.isfinite(jnp.arange(3)), jnp.arctan2(x, -0.0 * abs(y)),
        ),
        ROW, ROW,
    ),
    "loops in loops": (twice, ROW),
    "constant places": (
        lambda x: (
            jax.vmap(lambda a, i: a[i])(x, jnp.full((x.shape[0],), 3)),
            jax.vmap(lambda a, i: a[i])(x, jnp.arange(x.shape[0]) % 5),
        ),
        ROW,
    ),
    "windows": (
        lambda x: (
            lax.reduce_window(x, -jnp.inf, lax.max, (1, 5, 5, 1), (1, 1, 1, 1), "SAME"),
            lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 3, 1), (1, 2, 1, 1), "VALID"),
            lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
            lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME"),
            lax.reduce_window(x[:, 0], -jnp.inf, lax.max, (1, 3, 1), (1, 2, 1), "SAME"),
        ),
        IMAGE,
    ),
    "larger": (
        lambda x: jnp.broadcast_to(
            x[:, :, None, :, None], (x.shape[0], 6, 2, 5, 3, 4)
        ).reshape(x.shape[0], 12, 15, 4),
        IMAGE,
    ),
    "loops": (farthest, ((7, 4), np.float32)),
    "images along other axes": (
        lambda x: (
            jnp.concatenate([conv(x), conv(2 * x)], -1).sum((1, 2)),
            jnp.split(conv(x), 2, -1)[1][:, 1:3], conv(x).reshape(x.shape[0], -1, 6),
            jnp.pad(conv(x), ((0, 0), (0, 0), (1, 0), (0, 0)), constant_values=2.0),
            conv(x).transpose(0, 2, 1, 3)[:, ::2][:, :1].squeeze(1), jnp.argmax(conv(x), -1),
            conv(x)[..., 0] + conv(x)[..., 1], jnp.where(conv(x) > 0, conv(x), 0.0),
        ),
        IMAGE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_rule(case):
    function, *shapes = CASES[case]
    models = {batch: written(function, *shapes, batch=batch) for batch in ("n", 3)}
    rng = np.random.default_rng(1)
    for count, batch in ((1, "n"), (3, "n"), (4, "n"), (3, 3)):
        inputs = [
            rng.integers(0, 200, (count, *shape)).astype(dtype)
            if np.issubdtype(dtype, np.integer)
            else rng.standard_normal((count, *shape)).astype(dtype)
            for shape, dtype in shapes
        ]
        close(run(models[batch].SerializeToString(), inputs), jax.jit(function)(*inputs))


def test_what_is_used_twice_is_convolved_once():
    def function(x):
        y = conv(x) * CHANNELS + 1
        return jax.nn.leaky_relu(y), y

    assert kinds(written(function, IMAGE)).count("Conv") == 1


def test_of_platforms_the_default():
    def function(x):
        return lax.platform_dependent(x, cpu=lambda x: x + 100, default=lambda x: x + 1)

    x = np.ones((2, 5), np.float32)
    close(run(written(function, ROW).SerializeToString(), [x]), [x + 1])


def kinds(model):
    return [node.op_type for node in model.graph.node]


def test_what_follows_a_convolution_is_in_its_kernel():
    """Batch norm costs nothing, and nothing is transposed between two convolutions."""

    def function(x):
        x = jax.nn.silu((conv(x) - CHANNELS) * (CHANNELS * 2) + 1)
        return conv(x, np.ones((3, 3, 6, 2), np.float32))

    found = kinds(written(function, IMAGE))
    assert found.count("Conv") == 2 and found.count("Transpose") == 2  # in and out
    assert sorted(set(found)) == ["Conv", "Identity", "Mul", "Sigmoid", "Transpose"]
    assert found.count("Mul") == 1  # silu's
    assert "Resize" in kinds(written(*CASES["larger"]))
    assert "Expand" not in kinds(written(*CASES["larger"]))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, 2 * c[1]), (0, x))[1],
         "while"),
        (lambda x: lax.cond(x[0, 0] > 0, lambda: x, lambda: -x), "by the data"),
        (lambda x: jnp.zeros((x.shape[0], 9)).at[:, jnp.arange(5)].set(x), "scatter"),
        (lambda x: x[1:], "depends on the batch"),
        (lambda x: (x < 0).astype(np.uint16).sum(dtype=np.uint16), "ONNX does not accept it"),
        (lambda x: jnp.linalg.cholesky(x[:, :, None] * x[:, None]), "cholesky"),
        (lambda x: lax.scan(lambda c, r: (c + r, c), x[0], x)[1], "along the batch"),
    ],
)  # fmt: skip
def test_what_has_no_form_is_named(function, said):
    with pytest.raises(onnx_writer.UnwritableError, match=said):
        written(function, ROW)


# --- Networks ---


def network(config, names=("a", "b", "c"), facts=None):
    """An untrained network whose statistics are random."""
    task = tasks.of(config).create(config, names, jnp.float32)
    params, stats = task.initialise(0)
    rng = np.random.default_rng(0)
    stats = jax.tree.map(lambda a: rng.uniform(0.5, 1.5, a.shape).astype(a.dtype), stats)
    return Trained(task, params, stats, config, names, 0, "", facts or {})


def inputs_of(trained, count, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for spec in trained.task.interface(trained).inputs:
        shape = (count, *spec.shape)
        if spec.dtype == np.uint8:
            found.append(rng.integers(0, 256, shape, np.uint8))
        elif spec.shape == (3, 4):
            camera = np.array([[70, 0, 48, 4], [0, 70, 32, 1], [0, 0, 1, 0.01]], np.float32)
            found.append(np.broadcast_to(camera, shape) * rng.uniform(0.9, 1.1, shape))
        else:
            found.append(rng.standard_normal(shape))
        found[-1] = found[-1].astype(spec.dtype)
    return found


def expected_of(trained, inputs):
    predict = jax.jit(trained.task.predict)
    return jax.tree.leaves(predict(trained.params, trained.stats, *inputs))


NETWORKS = {
    "2d": lambda: network(tiny.tiny_config()),
    "26": lambda: network(tiny.tiny_config(model="tiny-26-t")),
    "3d": lambda: network(tiny.tiny_config3d()),
    "adapointr": lambda: network(tiny_completion.tiny_config(), (), {"normalised": True}),
    "pointr": lambda: network(
        tiny_completion.tiny_config(model="pointr-tiny"), (), {"normalised": False}
    ),
    "captioned": lambda: network(
        tiny_completion.tiny_config(**tiny_completion.CAPTIONED), (), {"normalised": True}
    ),
    # The real ones, for their blocks.
    **{
        name: lambda name=name: network(tiny.tiny_config(model=name))
        for name in ("yolov8-p2-n", "yolo11-n", "yolo12-n", "yolo26-n", "yolov12-turbo-n")
    },
}  # fmt: skip
SLOW = {"pointr", "captioned"} | {name for name in NETWORKS if "-n" in name}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k in SLOW)) for k in NETWORKS]
)
def test_every_kind_of_network(kind, tmp_path):
    trained = NETWORKS[kind]()
    facts = programs.write(trained, tmp_path / "m.onnx")
    assert facts == json.loads((tmp_path / "m.onnx.json").read_text())
    assert (facts["format"], facts["batch"], facts["opset"]) == ("onnx", "any", 18)
    for count in (1, 3):
        inputs = inputs_of(trained, count)
        found = run((tmp_path / "m.onnx").read_bytes(), inputs)
        close(found, expected_of(trained, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["2d", "3d"])
def test_suppression_inside(kind, tmp_path):
    """What our own non-maximum suppression leaves of what the program without it gives."""
    trained = NETWORKS[kind]()
    inputs = inputs_of(trained, 3)
    programs.write(trained, tmp_path / "all.onnx")
    all_boxes, scores_of_all, *all_others = run((tmp_path / "all.onnx").read_bytes(), inputs)
    # Untrained, it is sure of nothing: the best third of what there is.
    conf = float(np.quantile(scores_of_all.max(-1), 0.67))
    choice = {"conf": conf, "iou": 0.4, "max_det": 20}
    facts = programs.write(trained, tmp_path / "m.onnx", nms=True, **choice)
    assert choice.items() <= facts.items() and "after non-maximum supp" in facts["output"]
    boxes, scores, classes, *others = run((tmp_path / "m.onnx").read_bytes(), inputs)
    assert len(others) == len(all_others) == (3 if kind == "3d" else 0)
    lengths = []
    for i in range(3):
        ours = metrics.nms(all_boxes[i], scores_of_all[i], multi_label=False, **choice)
        lengths.append(n := len(ours))
        np.testing.assert_array_equal(boxes[i, :n], ours.boxes)
        np.testing.assert_array_equal(scores[i, :n], ours.scores)
        np.testing.assert_array_equal(classes[i, :n], ours.classes)
        assert not scores[i, n:].any()
        for a, b in zip(others, all_others, strict=True):
            np.testing.assert_array_equal(a[i, :n], b[i][ours.anchors])
    assert len(all_boxes[0]) > max(lengths) > 1, lengths


def test_suppression_of_drawn_boxes():
    """Many boxes of several classes, some fewer than K."""
    rng = np.random.default_rng(0)
    corner, size = rng.uniform(0, 60, (3, 400, 2)), rng.uniform(2, 40, (3, 400, 2))
    boxes = np.concatenate([corner, corner + size], -1).astype(np.float32)
    scores = rng.uniform(0, 1, (3, 400, 4)).astype(np.float32) ** 3
    scores[2] *= 0.25
    boxes[:, ::7, 2:] = boxes[:, ::7, :2]  # without area,
    boxes[:, 1::7] = boxes[:, 1::7, [2, 1, 0, 3]]  # inside out,
    boxes[:, 2::7, 3] = np.nan  # or nowhere
    choice = {"conf": 0.25, "iou": 0.45, "max_det": 50}
    model = written(
        lambda b, s: onnx_writer.best_of(b, s, **choice), ((400, 4), np.float32),
        ((400, 4), np.float32),
    )  # fmt: skip
    found = run(model.SerializeToString(), [boxes, scores])
    lengths = []
    for i in range(3):
        ours = metrics.nms(boxes[i], scores[i], multi_label=False, **choice)
        lengths.append(len(ours))
        for a, b in zip(found, (ours.boxes, ours.scores, ours.classes), strict=True):
            np.testing.assert_array_equal(a[i, : len(ours)], b)
        assert not found[1][i, len(ours) :].any()
    assert lengths[2] == 0 and max(lengths) == 50


def test_what_is_not_written(tmp_path, monkeypatch):
    file = tmp_path / "m.onnx"
    end_to_end = network(tiny.tiny_config(**{"model": "tiny-26-t", "eval.end_to_end": True}))
    with pytest.raises(ConfigError, match=r"--nms: tiny-26-t gives no boxes .* one-to-one"):
        programs.write(end_to_end, file, nms=True)
    clouds = NETWORKS["adapointr"]()
    with pytest.raises(ConfigError, match="--nms: adapointr-tiny gives no boxes"):
        programs.write(clouds, file, nms=True)
    with pytest.raises(ConfigError, match="--nms is for ONNX"):
        programs.write(clouds, tmp_path / "m.stablehlo", nms=True)
    with pytest.raises(ConfigError, match=r"--conf and --iou are in \[0, 1\]"):
        programs.write(clouds, file, nms=True, conf=1.5)
    with pytest.raises(ConfigError, match="--conf, --iou: only with --nms"):
        programs.write(clouds, file, conf=0.5, iou=0.5)
    with pytest.raises(ConfigError, match="'tflite'"):
        programs.write(clouds, tmp_path / "x", format="tflite")
    for name in [name for name in sys.modules if name.startswith("jaxaccum.onnx_writer")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("jaxaccum.onnx_writer", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match="pip install onnx"):
        programs.write(clouds, file)
    assert not file.exists()


def test_every_rule_has_a_test():
    """A rule that no case above and no network uses would be held by nothing."""
    used: set[str] = set()

    def collect(jaxpr):
        for equation in jaxpr.eqns:
            used.add(equation.primitive.name)
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else [value]:
                    if hasattr(inner, "eqns") or hasattr(getattr(inner, "jaxpr", None), "eqns"):
                        collect(getattr(inner, "jaxpr", inner))

    for function, *shapes in CASES.values():
        collect(jax.make_jaxpr(function)(*(jnp.ones((3, *s), d) for s, d in shapes)).jaxpr)
    only_of_some_versions = {"copy", "copy_p", "stack", "unstack", "optimization_barrier"}
    elsewhere = {"stop_gradient", "iota", "dim_as_value", "non_max_suppression", "not"}
    assert set(RULES) - used <= only_of_some_versions | elsewhere
