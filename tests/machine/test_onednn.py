"""Convolutions by oneDNN: the numbers of XLA's, whatever they are cut into, or XLA's own."""

from __future__ import annotations

import concurrent.futures
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxaccum.machine import known_answers, onednn
from jaxaccum.models import ops

ROOT = Path(__file__).parents[2]
EPS = np.finfo(np.float32).eps

needed = pytest.mark.skipif(
    not onednn.version(), reason=onednn.note() or f"{onednn.PACKAGE} is not installed"
)


def by_numpy(x, w, dy, strides, pads, groups):
    """A convolution and its gradients in float64, one place of the kernel after the other.

    (XLA's own gradients of such shapes end the process now and then, in its simplifier.)
    """
    x, w, dy = (np.float64(a) for a in (x, w, dy))
    n, oh, ow, out = dy.shape
    padded = np.pad(x, ((0, 0), *pads, (0, 0)))
    y, dx, dw = np.zeros(dy.shape), np.zeros(padded.shape), np.zeros(w.shape)
    each = w.shape[2], out // groups
    for i, j in np.ndindex(*w.shape[:2]):
        at = (
            slice(None), slice(i, i + (oh - 1) * strides[0] + 1, strides[0]),
            slice(j, j + (ow - 1) * strides[1] + 1, strides[1]),
        )  # fmt: skip
        seen = padded[at].reshape(n, oh, ow, groups, each[0])
        kernel = w[i, j].reshape(each[0], groups, each[1])
        pulled = dy.reshape(n, oh, ow, groups, each[1])
        y += np.einsum("nhwgc,cgo->nhwgo", seen, kernel).reshape(y.shape)
        dx[at] += np.einsum("nhwgo,cgo->nhwgc", pulled, kernel).reshape(dx[at].shape)
        dw[i, j] = np.einsum("nhwgc,nhwgo->cgo", seen, pulled).reshape(each[0], out)
    (top, _), (left, _) = pads
    return y, dx[:, top : top + x.shape[1], left : left + x.shape[2]], dw


def both_ways(function, x, w, dy):
    """A convolution's result and its gradients."""
    y, pull = jax.vjp(function, x, w)
    return y, *pull(dy)


@st.composite
def convolutions(draw):
    """Shapes of x and of the kernel, strides, pads, groups, and what the work is cut into."""
    kernel = draw(st.tuples(*[st.sampled_from([1, 2, 3, 5, 7])] * 2))
    strides = tuple(draw(st.integers(1, min(k, 3))) for k in kernel)
    pads = tuple(tuple(draw(st.integers(0, k - 1)) for _ in range(2)) for k in kernel)
    sides = tuple(
        draw(st.integers(max(1, k - sum(p)), 14)) for k, p in zip(kernel, pads, strict=True)
    )
    groups, each, out = draw(st.sampled_from([
        (1, 3, 16), (1, 16, 8), (1, 20, 20), (1, 1, 1),
        (2, 8, 8), (4, 4, 8), (16, 1, 1), (20, 1, 1),
    ]))  # fmt: skip
    x = (draw(st.integers(1, 5)), *sides, groups * each)
    return x, (*kernel, each, groups * out), strides, pads, groups, draw(st.integers(0, 7))


@needed
@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_the_numbers_of_float64(drawn):
    """Within the usual bound of rounding, for every cut of the work, its gradients included."""
    x_shape, w_shape, strides, pads, groups, pieces = drawn
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal(x_shape), rng.standard_normal(w_shape)
    sides = (
        (n + sum(pad) - k) // stride + 1
        for n, pad, k, stride in zip(x_shape[1:3], pads, w_shape, strides, strict=False)
    )
    shape = (x_shape[0], *sides, w_shape[3])
    x, w, dy = (np.float32(a) for a in (x, w, rng.standard_normal(shape)))

    def ours(x, w):
        return ops.conv_general_dilated(x, w, strides, pads, feature_group_count=groups)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "_PIECES", pieces)
        lowered = jax.jit(functools.partial(both_ways, ours)).lower(x, w, dy)
        assert lowered.as_text().count("jaxaccum_onednn_") == 3
        got = lowered.compile()(x, w, dy)
    right = by_numpy(x, w, dy, strides, pads, groups)
    largest = by_numpy(*(np.abs(a) for a in (x, w, dy)), strides, pads, groups)
    places = w_shape[0] * w_shape[1]
    terms = (places * w_shape[2], places * w_shape[3] // groups, np.prod(shape[:3]))
    for a, b, size, count in zip(got, right, largest, terms, strict=True):
        assert a.shape == b.shape
        assert np.all(np.abs(np.float64(a) - b) <= (count + 2) * EPS * size)


@needed
def test_large_ones_are_cut_by_themselves():
    """By the size of the work; the numbers differ by rounding alone."""
    rng = np.random.default_rng(0)
    x, w = (np.float32(rng.standard_normal(s)) for s in ((3, 40, 40, 32), (3, 3, 32, 32)))
    dy = np.float32(rng.standard_normal((3, 40, 40, 32)))
    ours = functools.partial(
        both_ways, lambda x, w: ops.conv_general_dilated(x, w, (1, 1), ((1, 1), (1, 1)))
    )
    with onednn.without():
        right = jax.jit(ours)(x, w, dy)
    for a, b in zip(jax.jit(lambda *given: ours(*given))(x, w, dy), right, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3)


@needed
def test_many_at_once_do_not_wait_for_each_other():
    """Programs on all host devices, from more threads than there are processors."""
    rng = np.random.default_rng(0)
    x, w = (np.float32(rng.standard_normal(s)) for s in ((4, 24, 24, 32), (3, 3, 32, 32)))

    @jax.jit
    def chain(x, w):
        for _ in range(4):
            y, pull = jax.vjp(
                lambda x, w: ops.conv_general_dilated(x, w, (1, 1), ((1, 1), (1, 1))), x, w
            )
            x, w = jax.tree.map(lambda a: a / jnp.abs(a).max(), pull(y))
        return x, w

    wanted = jax.device_get(chain(x, w))

    def one(number):
        device = jax.devices()[number % len(jax.devices())]
        return jax.device_get(chain(*jax.device_put((x, w), device)))

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for found in pool.map(one, range(48)):
            for a, b in zip(found, wanted, strict=True):
                np.testing.assert_array_equal(a, b)


@needed
def test_what_it_is_not_asked_for(x64):
    """Other dtypes, a kernel with holes, and programs that go elsewhere."""

    def text(dtype, kernel=3, stride=1):
        x, w = jnp.zeros((1, 8, 8, 4), dtype), jnp.zeros((kernel, kernel, 4, 4), dtype)
        program = jax.jit(lambda x, w: ops.conv_general_dilated(
            x, w, (stride, stride), ((0, 0), (0, 0))
        ))  # fmt: skip
        return program.lower(x, w).as_text()

    assert "jaxaccum_onednn" in text(jnp.float32)
    assert "jaxaccum_onednn" not in text(jnp.float64)
    assert "jaxaccum_onednn" not in text(jnp.bfloat16)
    assert "jaxaccum_onednn" not in text(jnp.float32, kernel=1, stride=2)
    with onednn.without():
        assert "jaxaccum_onednn" not in text(jnp.float32)


@needed
def test_a_program_that_was_traced_before_is_traced_anew():
    """Plans count operations without it, and what they trace is no part of training."""
    inner = jax.jit(lambda x, w: ops.conv_general_dilated(x, w, (1, 1), ((1, 1), (1, 1))))
    x, w = jnp.zeros((1, 8, 8, 4)), jnp.zeros((3, 3, 4, 4))

    def text():
        return jax.jit(lambda x, w: inner(x, w)).lower(x, w).as_text()

    assert "jaxaccum_onednn" in text()
    with onednn.without():
        assert "jaxaccum_onednn" not in text()
    assert "jaxaccum_onednn" in text()


# --- Where it is not, or cannot be used. ---


def said(**environment: str) -> str:
    """What a new process says of it, and what its programs call."""
    program = (
        "import jax, jax.numpy as jnp\n"
        "from jaxaccum.machine import onednn\n"
        "from jaxaccum.models import ops\n"
        "x = jnp.zeros((1, 8, 8, 4))\n"
        "conv = jax.jit(lambda x: ops.conv_general_dilated(x, x[0, :3, :3, :, None] + "
        "jnp.zeros(4), (1, 1), ((1, 1), (1, 1))))\n"
        "print(onednn.note())\n"
        "print('by oneDNN' if 'jaxaccum_onednn' in conv.lower(x).as_text() else 'by XLA')\n"
        "conv(x)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@needed
def test_it_can_be_left_alone():
    out = said(JAXACCUM_ONEDNN="off")
    assert "convolutions are computed by XLA" in out
    assert out.endswith("by XLA\n")


def test_a_file_that_is_not_there(tmp_path):
    missing = tmp_path / "libdnnl.so.3"
    out = said(JAXACCUM_ONEDNN=str(missing))
    assert f"oneDNN is here and not used: JAXACCUM_ONEDNN={missing}: no such file" in out
    assert out.endswith("by XLA\n")


@needed
def test_a_library_of_something_else():
    other = next(
        path for path in Path("/proc/self/maps").read_text().split() if path.endswith("libc.so.6")
    )
    out = said(JAXACCUM_ONEDNN=other)
    assert "not used" in out
    assert "no function dnnl_" in out
    assert out.endswith("by XLA\n")


@needed
def test_without_a_compiler(tmp_path):
    """Said once with what to do; what was compiled before needs none."""
    out = said(XDG_CACHE_HOME=str(tmp_path), CXX="no-such-compiler")
    assert "there is no no-such-compiler on the PATH" in out
    assert "apt install g++" in out
    assert out.endswith("by XLA\n")
    out = said(XDG_CACHE_HOME=str(tmp_path), CXX="false")
    assert "cannot compile" in out
    assert out.endswith("by XLA\n")
    out = said(XDG_CACHE_HOME=str(tmp_path))
    assert out.endswith("by oneDNN\n")
    (kept,) = (tmp_path / "jaxaccum" / "onednn").iterdir()
    assert said(XDG_CACHE_HOME=str(tmp_path), CXX="no-such-compiler").endswith("by oneDNN\n")
    kept.write_bytes(b"damaged")
    assert said(XDG_CACHE_HOME=str(tmp_path)).endswith("by oneDNN\n")
    assert kept.stat().st_size > 10_000


@needed
def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "jaxaccum").write_text("a file")
    assert said(XDG_CACHE_HOME=str(tmp_path)).endswith("by oneDNN\n")


def test_known_answers_are_asked_again_with_another_library(monkeypatch):
    device = jax.local_devices()[0]
    found = []
    for version in ("", "3.2.0"):
        monkeypatch.setattr(onednn, "version", lambda version=version: version)
        found.append(known_answers._circumstances(device))
    assert found[0] != found[1]
