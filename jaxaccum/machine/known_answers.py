"""Small computations whose right values are known, done before a verb trusts what JAX computes.

A compiler can compute wrong numbers without a word (jaxlib 0.10.2 on CPUs: JAX issue 39103), and
nothing that is learned from them shows it. Every case here goes through the code that training
uses, and its right values are worked out by numpy in float64, which shares no code with it. What
was right once is remembered for the same machine, versions and flags; a wrong answer never is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from jaxaccum.accumulate import batchnorm
from jaxaccum.errors import UserError
from jaxaccum.machine import onednn, user_cache, xla_flags
from jaxaccum.machine.waiting import waiting
from jaxaccum.models import ops

FLAG_HELP = "go on, with a warning, where JAX fails the check that it computes right numbers here"

Arrays = Mapping[str, np.ndarray]


class WrongNumbersError(UserError, RuntimeError):
    """What is computed here cannot be trusted; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One computation.

    Attributes:
      name: in messages.
      make: inputs of it, from a generator; floating-point ones in float64.
      compute: outputs by name, from the inputs, in JAX.
      right: the same outputs in numpy, from inputs in float64, each with the error that rounding
        may make in each element (or in all), in units of the dtype's epsilon; 0 if none.

    Such an error is that of the usual analysis to first order: a sum of n products is off by no
    more than n roundings of the sum of their absolute values, in whatever order it is taken. An
    epsilon is two roundings, and leaves that much for fast library algorithms.
    """

    name: str
    make: Callable[[np.random.Generator], Arrays]
    compute: Callable[..., Mapping[str, jax.Array]]
    right: Callable[..., Mapping[str, tuple[np.ndarray, Any]]]


# --- A matrix times many vectors, squared and summed. ---


def _make_products(rng):
    # As many as JAX issue 39103 needs: one less, or twice as many, are right.
    return {"matrix": rng.standard_normal((3, 3)), "vectors": rng.standard_normal((32_769, 3))}


def _products(matrix, vectors):
    return {"sums": jax.vmap(lambda v: jnp.sum((matrix @ v) ** 2))(vectors)}


def _right_products(matrix, vectors):
    def sums(matrix, vectors):
        return np.square(vectors @ matrix.T).sum(1)

    # Three products in a sum, twice as many when it is squared, the square, and three of these.
    return {"sums": (sums(matrix, vectors), 10 * sums(np.abs(matrix), np.abs(vectors)))}


# --- Convolutions and both gradients; several microbatches in a loop, as in an update. ---


def _convolution(
    name: str, kernel: int, stride: int = 1, microbatches: int = 1, depthwise: bool = False
) -> Case:
    pad, size, channels, features = kernel // 2, 9, 8, 8 if depthwise else 16
    after = (size + 2 * pad - kernel) // stride + 1

    def make(rng):
        return {
            "x": rng.standard_normal((microbatches, 2, size, size, channels)),
            "w": rng.standard_normal((kernel, kernel, 1 if depthwise else channels, features)),
            "dy": rng.standard_normal((microbatches, 2, after, after, features)),
        }

    def compute(x, w, dy):
        def forward(x, w):
            return ops.conv_general_dilated(
                x, w, (stride, stride), [(pad, pad)] * 2,
                feature_group_count=channels if depthwise else 1,
            )  # fmt: skip

        def microbatch(total, each):
            x, dy = each
            y, pull = jax.vjp(forward, x, w)
            dx, dw = pull(dy)
            return total + dw, (y, dx)

        dw, (y, dx) = jax.lax.scan(microbatch, jnp.zeros_like(w), (x, dy))
        return {"y": y, "dx": dx, "dw": dw}

    def values(x, w, dy):
        """y, dx and dw, one element of the kernel after the other."""
        shapes = dy.shape, x.shape
        x, dy = x.reshape(-1, *x.shape[2:]), dy.reshape(-1, *dy.shape[2:])
        padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        y, dpadded, dw = np.zeros_like(dy), np.zeros_like(padded), np.zeros_like(w)
        reach = (after - 1) * stride + 1
        for i in range(kernel):
            for j in range(kernel):
                at = np.s_[:, i : i + reach : stride, j : j + reach : stride]
                if depthwise:
                    y += padded[at] * w[i, j, 0]
                    dpadded[at] += dy * w[i, j, 0]
                    dw[i, j, 0] = (padded[at] * dy).sum((0, 1, 2))
                else:
                    y += padded[at] @ w[i, j]
                    dpadded[at] += dy @ w[i, j].T
                    dw[i, j] = np.tensordot(padded[at], dy, ((0, 1, 2), (0, 1, 2)))
        dx = dpadded[:, pad : pad + size, pad : pad + size]
        return {"y": y.reshape(shapes[0]), "dx": dx.reshape(shapes[1]), "dw": dw}

    def right(x, w, dy):
        places = kernel * kernel
        terms = {
            "y": places * (1 if depthwise else channels),
            "dx": places * (1 if depthwise else features),
            "dw": 2 * microbatches * after * after,
        }
        largest = values(np.abs(x), np.abs(w), np.abs(dy))
        return {
            name: (value, (terms[name] + 2) * largest[name])
            for name, value in values(x, w, dy).items()
        }

    return Case(name, make, compute, right)


# --- Batch norm over groups, with SiLU, and its gradients. ---

_GROUP, _EPS = 4, 1e-3


def _make_batch_norm(rng):
    x = rng.standard_normal((2 * _GROUP, 4, 4, 32)) + 0.5
    weight = np.ones(len(x))
    weight[-1] = 0  # a padded sample
    dy = rng.standard_normal(x.shape) * weight[:, None, None, None]
    scale, bias = 1 + 0.2 * rng.standard_normal((2, 32))
    return {"x": x, "scale": scale, "bias": bias, "weight": weight, "dy": dy}


def _batch_norm(x, scale, bias, weight, dy):
    def forward(x, scale, bias):
        y, *statistics = batchnorm.normalise(
            x, scale, bias, batchnorm.Groups(_GROUP, weight), _EPS, True
        )
        return y, statistics

    y, pull, (mean, var, _) = jax.vjp(forward, x, scale, bias, has_aux=True)
    dx, dscale, dbias = pull(dy)
    return {"y": y, "mean": mean, "var": var, "dx": dx, "dscale": dscale, "dbias": dbias}


def _right_batch_norm(x, scale, bias, weight, dy):
    # Each value is followed by what rounding may do to it: e_value.
    found: dict[str, list] = {}
    for start in range(0, len(x), _GROUP):
        group = slice(start, start + _GROUP)
        real, axes = weight[group] > 0, (0, 1, 2)
        g, d = x[group], dy[group]
        n = real.sum() * g.shape[1] * g.shape[2]
        mean = g[real].mean(axes)
        e_mean = n * np.abs(g[real]).mean(axes)
        var = np.square(g[real] - mean).mean(axes)
        reach = np.abs(g) + np.abs(g[real]).mean(axes)  # nothing cancels
        e_var = n * np.square(reach[real]).mean(axes)
        inv = 1 / np.sqrt(var + _EPS)
        e_inv = inv * (0.5 * e_var * inv**2 + 4)
        xhat = (g - mean) * inv
        e_xhat = e_mean * inv + np.abs(g - mean) * e_inv + 4 * reach * inv
        z = xhat * scale + bias
        e_z = e_xhat * np.abs(scale) + 2 * (np.abs(xhat * scale) + np.abs(bias))
        sigmoid = 1 / (1 + np.exp(-z))
        slope = sigmoid * (1 + z * (1 - sigmoid))  # of SiLU; at most 1.1, its own at most 0.5
        y, e_y = z * sigmoid, 1.1 * e_z + 8 * np.abs(z)
        dz, e_dz = d * slope, np.abs(d) * (0.5 * e_z + 8)
        sum_dz, sum_dz_xhat = dz.sum(axes), (dz * xhat).sum(axes)
        e_sum = e_dz.sum(axes) + n * np.abs(dz).sum(axes)
        e_sum_xhat = (e_dz * np.abs(xhat) + np.abs(dz) * e_xhat).sum(axes)
        e_sum_xhat += n * np.abs(dz * xhat).sum(axes)
        pulled = (dz - (sum_dz + xhat * sum_dz_xhat) / n) * inv * scale
        terms = np.abs(dz) + (np.abs(sum_dz) + np.abs(xhat * sum_dz_xhat)) / n
        e_pulled = e_dz + (e_sum + e_xhat * np.abs(sum_dz_xhat) + np.abs(xhat) * e_sum_xhat) / n
        e_pulled = (e_pulled + 6 * terms + terms * e_inv / inv) * inv * np.abs(scale)
        dx = pulled * real[:, None, None, None]
        for name, value in {
            "y": (y, e_y), "mean": (mean, e_mean), "var": (var, e_var), "dx": (dx, e_pulled),
            "dscale": (sum_dz_xhat, e_sum_xhat), "dbias": (sum_dz, e_sum),
        }.items():  # fmt: skip
            found.setdefault(name, []).append(value)
    joined = {
        name: [np.concatenate(parts) for parts in zip(*found[name], strict=True)]
        for name in ("y", "dx")
    }
    stacked = {
        name: [np.stack(parts) for parts in zip(*found[name], strict=True)]
        for name in ("mean", "var", "dscale", "dbias")
    }
    added = {name: [part.sum(0) for part in stacked[name]] for name in ("dscale", "dbias")}
    return {name: (value, error) for name, (value, error) in (joined | stacked | added).items()}


# --- Sums into places, and the largest of many: whole numbers, so nothing is rounded. ---


def _make_scatter(rng):
    return {
        "into": rng.integers(-9, 10, (4, 64, 3)).astype(float),
        "place": rng.integers(0, 64, (4, 512)),
        "values": rng.integers(-9, 10, (4, 512, 3)).astype(float),
    }


def _scatter(into, place, values):
    return {"sums": into.at[jnp.arange(len(into))[:, None], place].add(values)}


def _right_scatter(into, place, values):
    sums = into.copy()
    for sample in range(len(into)):
        for i, value in zip(place[sample], values[sample], strict=True):
            sums[sample, i] += value
    return {"sums": (sums, 0)}


def _make_top(rng):
    return {"scores": rng.permutation(8 * 2000).reshape(8, 2000).astype(float)}


def _top(scores):
    value, place = jax.lax.top_k(scores, 10)
    return {"value": value, "place": place}


def _right_top(scores):
    place = np.argsort(-scores, axis=1)[:, :10]
    return {"value": (np.take_along_axis(scores, place, 1), 0), "place": (place, 0)}


CASES = (
    Case("sums of squared products", _make_products, _products, _right_products),
    _convolution("3x3 convolution and its gradients", 3, stride=2, microbatches=2),
    _convolution("1x1 convolution and its gradients", 1),
    _convolution("depthwise convolution and its gradients", 2, depthwise=True),
    Case("batch norm over groups and its gradients", _make_batch_norm, _batch_norm,
         _right_batch_norm),
    Case("sums scattered into places", _make_scatter, _scatter, _right_scatter),
    Case("the largest of many", _make_top, _top, _right_top),
)  # fmt: skip


# --- The check. ---


def wrong(case: Case, dtype: Any = np.float32) -> str | None:
    """What is wrong with JAX's answer to a case, in words; None if it is right.

    Args:
      dtype: to compute in; products are exact to it, whatever the process's default is.
    """
    made = case.make(np.random.default_rng(0))
    given = {k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in made.items()}
    exact = {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in given.items()}
    # Said here, since a thread has its own of these, and they are part of what float32 means.
    with jax.enable_x64(dtype == np.float64), jax.default_matmul_precision("highest"):
        answer = jax.device_get(jax.jit(case.compute)(**given))
    right = case.right(**exact)
    for name, (value, error) in right.items():
        got = np.asarray(answer[name], np.float64)
        if got.shape != value.shape:
            return f'"{case.name}": {name} has the shape {got.shape} instead of {value.shape}'
        # In float64 the right value is rounded, too.
        allowed = np.broadcast_to(error * (np.finfo(dtype).eps + np.finfo(float).eps), value.shape)
        off = np.abs(got - value)
        bad = ~(off <= allowed)  # so that NaN is wrong
        if bad.any():
            worst = np.unravel_index(
                np.where(bad, np.nan_to_num(off, nan=np.inf), -1).argmax(), bad.shape
            )
            place = ", ".join(map(str, worst))
            return (
                f'"{case.name}" in {np.dtype(dtype)}: {name}[{place}] is {got[worst]:.9g} and '
                f"should be {value[worst]:.9g}, of which rounding explains {allowed[worst]:.1g} "
                f"({bad.sum()} of {bad.size} values are wrong)"
            )
    return None


def require(allow_wrong: bool = False) -> None:
    """Makes sure, once for a machine and its versions, that JAX computes right on its device here.

    Starts JAX's backend. Every process of several checks its own device, by itself.

    Args:
      allow_wrong: a wrong answer is a warning on stderr only.
    Raises:
      WrongNumbersError: an answer is wrong.
    """
    device = jax.local_devices()[0]
    first = jax.process_index() == 0
    if first and device.platform == "cpu" and (line := xla_flags.note()):
        print(line, file=sys.stderr, flush=True)
    circumstances = _circumstances(device)
    name = hashlib.sha256(json.dumps(circumstances, sort_keys=True).encode()).hexdigest()[:32]
    file = user_cache.folder() / "known_answers" / f"{name}.json"
    if user_cache.load(file) == circumstances:
        return
    once = "checking what JAX computes here (once for a machine and its versions)"
    with waiting(once), ThreadPoolExecutor() as pool:  # compiling takes nearly all of the time
        asked = itertools.product(CASES, _dtypes(device))
        found = [text for text in pool.map(lambda each: wrong(*each), asked) if text]
    if not found:
        user_cache.save(file, circumstances)
        return
    kind = f"{device.platform} ({_processor() if device.platform == 'cpu' else device.device_kind})"
    message = (
        f"jaxlib {jaxlib.__version__} computes wrong numbers on this {kind}: {'; '.join(found)}. "
        "Install another version of jax and jaxlib, or change what it runs with (XLA_FLAGS is "
        f"{os.environ.get('XLA_FLAGS', '')!r})"
    )
    if not allow_wrong:
        raise WrongNumbersError(
            f"{message}. To compute with it all the same, pass --allow_wrong_numbers"
        )
    if first:
        print(f"warning: {message}. Going on as asked to", file=sys.stderr, flush=True)


def _dtypes(device: jax.Device) -> Sequence[Any]:
    """What training may compute in here; a TPU's float64 is not that of numpy."""
    both = jax.config.read("jax_enable_x64") and device.platform != "tpu"
    return (np.float32, np.float64) if both else (np.float32,)


def _circumstances(device: jax.Device) -> dict[str, Any]:
    """All that an answer may depend on."""
    code = hashlib.sha256()
    for module in (__file__, batchnorm.__file__, ops.__file__, onednn.__file__, onednn.SOURCE):
        code.update(Path(module).read_bytes())
    return {
        "jaxlib": jaxlib.__version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "platform": device.platform,
        "device_kind": device.device_kind,
        "runtime": device.client.platform_version,
        "onednn": onednn.version() if device.platform == "cpu" else "",
        "machine": [platform.node(), platform.machine(), _processor(), os.cpu_count()],
        "dtypes": [np.dtype(dtype).name for dtype in _dtypes(device)],
        "environment": {
            name: os.environ.get(name, "")
            for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
        },
        "code": code.hexdigest(),
    }


def _processor() -> str:
    """The kind of CPU; XLA compiles for it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
