"""What the compiled programs of an update look like: where they reduce, and what they hold."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.sharding import PartitionSpec as P

from jaxaccum.accumulate import Geometry, Recipe, make_engine
from jaxaccum.accumulate.recipe import Window

DEVICES = 4


def computations(text: str) -> dict[str, str]:
    """Name -> body of every computation of an HLO module."""
    return {
        m.group(1): m.group(2)
        for m in re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S)
    }


def reductions(text: str) -> tuple[int, int]:
    """(all-reduces inside of while loops, all-reduces elsewhere)."""
    bodies = computations(text)
    inside: set[str] = set()
    stack = re.findall(r"body=%?([\w.\-]+)", text)
    assert stack, "no loop in the program"
    while stack:
        name = stack.pop()
        if name not in inside:
            inside.add(name)
            stack += [n for n in re.findall(r"%([\w.\-]+)", bodies[name]) if n in bodies]
    count = {n: len(re.findall(r" all-reduce(?:-start)?\(", b)) for n, b in bodies.items()}
    return (
        sum(v for n, v in count.items() if n in inside),
        sum(v for n, v in count.items() if n not in inside),
    )


def engine(kind="scan", devices=DEVICES, nbs=32):
    window = Window(Recipe(nbs, 4), Geometry(4, devices, kind))
    made = make_engine(toy.make_forward(4), toy.make_rule(nbs), window)
    state = made.init(*toy.initial(np.float32))
    return made, state, next(toy.make_batches(nbs, np.float32)())


def test_one_reduction_after_the_loop():
    made, state, batch = engine()
    text = made.lower(state, *made.place(batch)).compile().as_text()
    assert reductions(text) == (0, 1)


def test_the_count_sees_a_reduction_in_a_loop():
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:DEVICES]), ("data",))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P())
    def summed(x):
        def body(i, total):
            return total + jax.lax.psum(x[i].sum() * i, "data")

        return jax.lax.fori_loop(0, 5, body, jnp.zeros(()))

    text = jax.jit(summed).lower(jnp.ones((32, 3))).compile().as_text()
    assert reductions(text)[0] == 1


def test_parameters_that_are_not_marked_as_varying_are_refused(monkeypatch):
    """Autodiff would reduce them in every microbatch; the batch norm's derivative notices."""
    made, state, batch = engine()
    plain = type(made)._varying

    def unmarked(self, tree):
        return tree if isinstance(tree, dict) else plain(self, tree)

    monkeypatch.setattr(type(made), "_varying", unmarked)
    with pytest.raises(ValueError, match="axis types do not match"):
        made.lower(state, *made.place(batch))


def test_multisteps_reduces_only_when_it_closes_a_window():
    made, state, batch = engine("multisteps")
    one = jax.tree.map(lambda a: a[0], made.window.split(batch))
    accumulator = made._empty(state, one)
    args = (state, accumulator, one, np.int32(0), np.int32(2))
    adding = made._add.lower(*args).compile().as_text()
    closing = made._close.lower(*args).compile().as_text()
    assert " all-reduce(" not in adding
    assert len(re.findall(r" all-reduce(?:-start)?\(", closing)) == 1


@pytest.mark.parametrize("devices", [1, 4])
def test_the_state_is_donated(devices):
    made, state, batch = engine(devices=devices)
    compiled = made.lower(state, *made.place(batch)).compile()
    size = sum(a.nbytes for a in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= size


def test_memory_is_flat_in_the_number_of_microbatches():
    def temporary(nbs):
        made, state, batch = engine(devices=1, nbs=nbs)
        compiled = made.lower(state, *made.place(batch)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(256) <= 1.01 * temporary(16)
