"""What the compiled programs of an update look like: where they reduce, and what they hold."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from hlo import collectives, reductions
from jax.sharding import PartitionSpec as P

from jaxaccum.accumulate import Geometry, Recipe, fsdp, make_engine, scan
from jaxaccum.accumulate.recipe import Window

DEVICES = 4


def engine(kind="scan", devices=DEVICES, nbs=32, microbatch=4, fsdp=1):
    window = Window(Recipe(nbs, 4), Geometry(microbatch, devices, kind, fsdp))
    made = make_engine(toy.make_forward(), toy.make_rule(nbs), window)
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
    plain = scan.varying

    def unmarked(tree, *specs):
        return tree if isinstance(tree, dict) else plain(tree, *specs)

    monkeypatch.setattr(scan, "varying", unmarked)
    with pytest.raises(ValueError, match="axis types do not match"):
        made.lower(state, *made.place(batch))


def test_multisteps_reduces_only_when_it_closes_a_window():
    made, state, batch = engine("multisteps")
    adding, closing = (p.compile().as_text() for p in made.lowered(state, batch))
    assert " all-reduce(" not in adding
    assert len(re.findall(r" all-reduce(?:-start)?\(", closing)) == 1


def test_the_finite_marks_of_all_sums_meet_once():
    """Not in every operation that asks whether all are finite: those take minutes to compile."""
    made, state, batch = engine("multisteps", devices=1)
    one = jax.tree.map(lambda a: a[0], made.window.split(batch))
    sums_of = functools.partial(made.rule.objective.sums, made.forward)
    sums = len(jax.tree.leaves(jax.eval_shape(sums_of, state.params, state.stats, one)))
    for program in made.lowered(state, batch):
        fusions = re.findall(r" fusion\((.*?)\), kind", program.compile().as_text())
        assert len(fusions) > sums > max(operands.count("%") for operands in fusions)


@pytest.mark.parametrize("devices", [1, 4])
def test_the_state_is_donated(devices):
    made, state, batch = engine(devices=devices)
    compiled = made.lower(state, *made.place(batch)).compile()
    size = sum(a.nbytes for a in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= size


def test_multisteps_donates_its_accumulator_and_the_state():
    """Neither is held twice."""
    made, state, batch = engine("multisteps")
    adding, closing = (p.compile().memory_analysis() for p in made.lowered(state, batch))
    parameters = sum(a.nbytes for a in jax.tree.leaves(state.params))
    accumulator = 2 * parameters  # of two denominators
    assert adding.alias_size_in_bytes >= accumulator
    assert closing.alias_size_in_bytes >= accumulator + sum(
        a.nbytes for a in jax.tree.leaves((state.params, state.opt_state, state.ema))
    )


@pytest.mark.parametrize("geometry", [{"kind": "scan", "fsdp": 2}, {"kind": "multisteps"}])
def test_what_is_lowered_for_shapes_is_what_runs(all_leaves, geometry):
    """A plan tells the memory of the program that trains."""
    made, state, batch = engine(**geometry)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (state, batch))
    programs = made.lowered(*shapes)
    used = []
    for name in ("_jitted",) if geometry["kind"] == "scan" else ("_add", "_close"):
        call = getattr(made, name)

        def seen(*arguments, call=call):
            used.append(call.lower(*arguments))
            return call(*arguments)

        setattr(made, name, seen)
    made.update(state, batch)
    assert [p.as_text() for p in programs] == [p.as_text() for p in used]


def test_memory_is_flat_in_the_number_of_microbatches():
    def temporary(nbs):
        made, state, batch = engine(devices=1, nbs=nbs)
        compiled = made.lower(state, *made.place(batch)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(256) <= 1.01 * temporary(16)


def compiled(**geometry):
    made, state, batch = engine(**geometry)
    return made.lower(state, *made.place(batch)).compile()


@pytest.mark.parametrize("kind", ["scan", "multisteps"])
def test_a_group_on_two_devices_is_reduced_over_these_two(kind):
    """Three small sums in the loop (mean, variance, the derivative's), the update's one outside."""
    made, state, batch = engine(kind, microbatch=2)
    if kind == "scan":
        found = collectives(made.lower(state, *made.place(batch)).compile().as_text())
        assert [c for c in found if c.looped] == [("all-reduce", True, "{{0,1},{2,3}}")] * 3
        assert [c for c in found if not c.looped] == [("all-reduce", False, "{{0,1,2,3}}")]
        return
    adding, closing = (collectives(p.compile().as_text()) for p in made.lowered(state, batch))
    assert adding == [("all-reduce", False, "{{0,1},{2,3}}")] * 3
    assert closing == sorted([*adding, ("all-reduce", False, "{{0,1,2,3}}")])


@pytest.fixture
def all_leaves(monkeypatch):
    """Divides the toy's leaves, too, where their shapes allow."""
    monkeypatch.setattr(fsdp, "SMALLEST", 1)


def test_a_divided_state_is_gathered_once_and_scattered_once(all_leaves):
    found = collectives(compiled(fsdp=4).as_text())
    assert not any(c.looped for c in found)
    groups = "{{0,1,2,3}}"
    kinds = [c.kind for c in found]
    assert kinds.count("all-gather") == kinds.count("reduce-scatter") == 1
    # One for sums that are not gradients, one for the number that is the gradient's norm.
    assert kinds.count("all-reduce") == 2 and len(kinds) == 4
    assert {c.groups for c in found} == {groups}


def test_both_axes_of_the_mesh(all_leaves):
    """Scattered over the parts, {0,1} and {2,3}; these sums reduced over the rest, {0,2}, {1,3}."""
    found = collectives(compiled(fsdp=2).as_text())
    assert not any(c.looped for c in found)
    by_kind = {
        kind: [c.groups for c in found if c.kind == kind] for kind in {c.kind for c in found}
    }
    assert by_kind.keys() == {"all-gather", "reduce-scatter", "all-reduce"}
    assert by_kind["all-gather"] == by_kind["reduce-scatter"] == ["{{0,1},{2,3}}"]
    assert sorted(by_kind["all-reduce"]) == ["{{0,1,2,3}}", "{{0,1},{2,3}}", "{{0,2},{1,3}}"]


def test_every_device_holds_its_part_and_donates_it(all_leaves):
    made, state, batch = engine(fsdp=4)
    leaves = jax.tree.leaves((state.params, state.opt_state, state.ema["params"]))
    divided = [a for a in leaves if not a.sharding.is_fully_replicated]
    assert divided and all(a.addressable_data(0).size * 4 == a.size for a in divided)
    own = sum(a.addressable_data(0).nbytes for a in jax.tree.leaves(state))
    assert own < sum(a.nbytes for a in jax.tree.leaves(state))
    program = made.lower(state, *made.place(batch)).compile()
    assert program.memory_analysis().alias_size_in_bytes >= own
    after, _ = made.update(state, batch)
    kept = [a.sharding for a in jax.tree.leaves(after)]
    assert kept == jax.tree.leaves(made.shardings(after))
    whole = made.whole(after.params)
    assert all(a.is_fully_replicated for a in jax.tree.leaves(whole))
    jax.tree.map(np.testing.assert_array_equal, whole, after.params)


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,1},{2,3}}", "{{0,1},{2,3}}"),
        ("mesh['data'=1,'a'=2,'b'=2] {'b'}", "{{0,1},{2,3}}"),
        ("mesh['data'=1,'a'=2,'b'=2] {'a'}", "{{0,2},{1,3}}"),
        ("mesh['data'=1,'a'=2,'b'=2] {'a','b'}", "{{0,1,2,3}}"),
        ("mesh['data'=2,'a'=2] {'data','a'}", "{{0,1,2,3}}"),
    ],
)
def test_both_ways_to_write_groups_are_read(written, groups):
    assert [c.groups for c in collectives(reduction(written))] == [groups]


def test_groups_of_one_device_each_are_no_collective():
    assert collectives(reduction("mesh['data'=1,'a'=2] {'data'}")) == []


def reduction(groups: str) -> str:
    """The text of a program that adds over groups of devices."""
    line = f"  %r = f32[] all-reduce(%x), replica_groups={groups}, to_apply=%add"
    return f"ENTRY %main (x: f32[]) -> f32[] {{\n{line}\n}}\n"
