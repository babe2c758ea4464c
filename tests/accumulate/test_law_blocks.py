"""The law on the blocks of the real families, each in the smallest network that has it.

The detector's own pipeline and loss, as in test_detection.py; float64, both engines, one device and
two, uneven tails.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from tiny import tiny_config

from jaxaccum import data
from jaxaccum.accumulate import Geometry, equivalence
from jaxaccum.models import blocks, yolo
from jaxaccum.training import run

NBS, GROUP, UPDATES = 10, 2, 2
STEM = (
    (-1, 1, "Conv", (8, 3, 2)),  # 0, stride 2
    (-1, 1, "Conv", (16, 3, 2)),  # 1, stride 4
    (-1, 1, "Conv", (32, 3, 2)),  # 2, stride 8
)
NETWORKS = {
    # YOLO11: both kinds of C3k2, pooling, attention, depthwise convolutions in the class branch.
    "eleven-t": {
        "rows": (
            *STEM,
            (-1, 1, "C3k2", (32, False, 0.25)),
            (-1, 1, "Conv", (64, 3, 2)),
            (-1, 1, "C3k2", (64, True)),
            (-1, 1, "SPPF", (64, 5)),
            (-1, 1, "C2PSA", (64,)),
            ((3, 7), 1, "Detect", ()),
        ),
        "depthwise_head": True,
    },
    # YOLO12: area attention in stripes, whole, and left out; with the scaled residual of scale l.
    "twelve-l": {
        "rows": (
            *STEM,
            (-1, 1, "Conv", (64, 3, 1)),
            (-1, 1, "A2C2f", (64, 4)),
            (-1, 1, "A2C2f", (64, 1)),
            (-1, 1, "A2C2f", (32, 0)),
            ((6,), 1, "Detect", ()),
        ),
        "depthwise_head": True,
    },
    # YOLO26: residual pooling without an activation, attention in a C3k2, two sets of branches; of
    # one level, as one-to-one may have no positive on another.
    "twentysix-t": {
        "rows": (
            *STEM,
            (-1, 1, "SPPF", (32, 5, True)),
            (-1, 1, "C3k2", (64, True, 0.5, True)),
            ((4,), 1, "Detect", ()),
        ),
        "depthwise_head": True,
        "bins": 1,
        "one_to_one": True,
    },
    # The authors' later form: grouped convolutions, another attention.
    "turbo-t": {
        "rows": (
            *STEM[:2],
            (-1, 1, "Conv", (64, 3, 2, 4)),
            (-1, 1, "A2C2f", (64, 4)),
            ((3,), 1, "Detect", ()),
        ),
        "turbo": True,
    },
    # A head on stride 4, by the way up.
    "p2-t": {
        "rows": (
            *STEM,
            (-1, 1, "Upsample", ()),
            ((-1, 1), 1, "Concat", ()),
            (-1, 1, "C2f", (16, False)),
            (-1, 1, "Conv", (16, 3, 2)),
            ((-1, 2), 1, "Concat", ()),
            (-1, 1, "C2f", (32, False)),
            ((5, 8), 1, "Detect", ()),
        ),
    },
}
# The last has groups of two microbatches.
GEOMETRIES = [Geometry(4, 1), Geometry(2, 2, "multisteps"), Geometry(1)]


@pytest.fixture(scope="module", autouse=True)
def networks():
    """The networks as models, for this file only."""
    for name, table in NETWORKS.items():
        family, _, scale = name.rpartition("-")
        yolo.FAMILIES[family] = yolo.Family({scale: 1.0}, {scale: 1.0}, {scale: 1024}, **table)
    yield
    for name in NETWORKS:
        del yolo.FAMILIES[name.rpartition("-")[0]]


def trace(model: str, geometry: Geometry) -> equivalence.Trace:
    source = data.Scenes("train", size=64, length=40)
    config = tiny_config(
        model=model, nbs=NBS, bn_group=GROUP, microbatch=geometry.microbatch,
        devices=geometry.devices, engine=geometry.engine, dtype="float64",
    )  # fmt: skip
    this = run.prepare(config, names=source.names, samples=len(source), identity={})
    return equivalence.trace(
        this.forward, this.rule, this.recipe, geometry,
        *this.task.initialise(0, np.float64),
        lambda: run.make_stream(this, source).windows(0, [NBS] * UPDATES, backend="threads"),
        UPDATES,
    )  # fmt: skip


@functools.cache
def whole(model: str) -> equivalence.Trace:
    """The reference: the effective batch in one microbatch, in float64."""
    with jax.enable_x64(True):
        return trace(model, Geometry(NBS))


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        name
        if name[0] in "et" and name != "turbo-t"
        else pytest.param(name, marks=pytest.mark.long)
        for name in NETWORKS
    ],
)
def test_one_run_on_every_geometry(x64, model):
    expected = whole(model)
    assert np.isfinite(expected.logs[-1]["loss"])
    # Every parameter takes part: a block that is not learned from could not break the law.
    silent = [
        jax.tree_util.keystr(path)
        for path, gradient in jax.tree_util.tree_leaves_with_path(expected.gradient)
        if not np.any(gradient)
    ]
    assert not silent
    for geometry in GEOMETRIES:
        found = equivalence.differences(trace(model, geometry), expected)
        assert equivalence.within(found, equivalence.Tolerance.of(True)), (geometry, found)


@pytest.mark.slow
@pytest.mark.long
def test_the_check_notices_a_block_that_mixes_samples(x64, monkeypatch):
    """Pooling that leaks a thousandth of the microbatch's mean into each of its samples."""
    expected, plain = whole("eleven-t"), blocks.ops.max_pool

    def leaking(x, size):
        return plain(x, size) + 1e-3 * x.mean(0, keepdims=True)

    monkeypatch.setattr(blocks.ops, "max_pool", leaking)
    found = equivalence.differences(trace("eleven-t", Geometry(4, 1)), expected)
    assert found["gradient"] > 1e-6
