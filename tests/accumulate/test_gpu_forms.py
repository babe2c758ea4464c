"""The forms that GPUs get, computed on a CPU: they are the update that every other device makes."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from jaxaccum.accumulate import (
    Geometry,
    Groups,
    Recipe,
    Window,
    batchnorm,
    engine,
    equivalence,
    fsdp,
    make_engine,
    packing,
)
from jaxaccum.accumulate.usual_rule import UsualObjective

NBS = 11


def trace(geometry, updates=3):
    return equivalence.trace(
        toy.make_forward(), toy.make_rule(NBS), Recipe(NBS, 2), geometry,
        *toy.initial(np.float64), toy.make_batches(NBS, np.float64), updates,
    )  # fmt: skip


@pytest.mark.parametrize(
    "geometry", [Geometry(4), Geometry(12), Geometry(2, 2), Geometry(2, 4, fsdp=2)], ids=str
)
def test_the_update_is_the_same(x64, monkeypatch, geometry):
    monkeypatch.setattr(fsdp, "SMALLEST", 1)
    traced = trace(geometry)
    monkeypatch.setattr(engine, "GPUS", ("cpu",))
    known = trace(geometry)
    for part in ("gradient", "params", "stats"):
        assert equivalence.distance(getattr(known, part), getattr(traced, part)) < 1e-13


def test_batch_norm_reads_again_and_finds_the_same(x64, monkeypatch):
    rng = np.random.default_rng(0)
    x, probe = rng.normal(2.0, 3.0, (2, 6, 5, 4))
    weight = np.array([1.0, 1, 1, 1, 1, 0])

    def gradient(x, scale, bias):
        def loss(x, scale, bias):
            y = batchnorm.normalise(x, scale, bias, Groups(3, weight), 1e-3, True)[0]
            return jnp.sum(y * probe * weight[:, None, None])

        return jax.jit(jax.grad(loss, (0, 1, 2)))(x, scale, bias)

    wanted = gradient(x, np.ones(4), np.zeros(4))
    asked = []

    def on_cuda(*args, cuda, **others):
        asked.append(others.keys())
        return cuda(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", on_cuda)
    found = gradient(x, np.ones(4), np.zeros(4))
    assert len(asked) == 1 and equivalence.distance(found, wanted) < 1e-15


def length_of_the_loop(geometry, objective=None):
    rule = toy.make_rule(NBS) if objective is None else toy.make_rule(NBS, objective)
    made = make_engine(toy.make_forward(), rule, Window(Recipe(NBS, 2), geometry))
    state = jax.eval_shape(rule.init, *toy.initial(np.float32))
    (program,) = made.lowered(state, next(toy.make_batches(NBS, np.float32)()))
    text = program.compile().as_text()
    (loop,) = (
        line for line in text.splitlines()
        if " while(" in line and 'op_name="jit(_update)/while"' in line
    )  # fmt: skip
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop)
    return found and int(found[1])


def test_the_length_of_a_whole_window_is_known(monkeypatch):
    """To the compiler: else the host would wait for the device in each turn."""
    assert length_of_the_loop(Geometry(4)) is None
    monkeypatch.setattr(engine, "GPUS", ("cpu",))
    assert length_of_the_loop(Geometry(4)) == 3
    assert length_of_the_loop(Geometry(4), UsualObjective) is None  # its windows ramp up


def test_a_shorter_window_has_a_program_of_its_own(x64, monkeypatch):
    monkeypatch.setattr(engine, "GPUS", ("cpu",))
    rule = toy.make_rule(NBS)
    made = make_engine(toy.make_forward(), rule, Window(Recipe(NBS, 2), Geometry(4)))
    batch = next(toy.make_batches(NBS, np.float64)())
    short = jax.tree.map(lambda a: a[:8], batch)
    _, steps = made.place(short, 2)
    assert steps == 2 and made.place(batch)[1] is None and made.place(batch, 3)[1] is None
    state, log = made.update(made.init(*toy.initial(np.float64)), short, 2)
    assert float(log["samples"]) == 8
    monkeypatch.undo()
    other = make_engine(toy.make_forward(), rule, Window(Recipe(NBS, 2), Geometry(4)))
    wanted, _ = other.update(other.init(*toy.initial(np.float64)), short, 2)
    assert equivalence.distance(state.params, wanted.params) < 1e-13


@pytest.mark.parametrize("small", [0, 3, 100])
def test_what_was_packed_comes_out(x64, small):
    tree = {
        "a": np.arange(4.0), "b": [np.float32(2), np.arange(6, dtype=np.int32).reshape(2, 3)],
        "c": np.zeros((0, 3)), "d": np.arange(3.0).reshape(3, 1), "e": (),
    }  # fmt: skip
    packing_ = packing.Packing(tree, small)
    large, vectors = packing_.pack(tree)
    assert sum(a.size for a in [*large, *vectors]) == 4 + 1 + 6 + 3
    assert all(a.size > small for a in large) and all(a.ndim == 1 for a in vectors)
    assert len(vectors) == len({str(a.dtype) for a in vectors})
    out = packing_.unpack((large, vectors))
    assert jax.tree.structure(out) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, out, tree)
