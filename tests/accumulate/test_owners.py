"""Terms whose parameters do not overlap: one accumulator, the update of two, and the proof."""

from __future__ import annotations

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from hlo import computations

from jaxaccum.accumulate import (
    ContractError,
    Coupled,
    Geometry,
    GroupBatchNorm,
    Groups,
    Objective,
    Output,
    Recipe,
    Term,
    UpdateRule,
    Window,
    engine,
    equivalence,
    fsdp,
    grouped,
    make_engine,
    owners,
)
from jaxaccum.accumulate.usual_rule import UsualObjective

NBS, SCALE = 11, 5.0


class Two(nn.Module):
    """A body that the first head teaches, and a second head that reads it and leaves it alone."""

    @nn.compact
    def __call__(self, x, groups, shared=False):
        x = nn.Dense(8, name="body", param_dtype=x.dtype)(x)
        x = GroupBatchNorm(silu=True, name="norm")(x, groups)
        first = nn.Dense(3, name="first", param_dtype=x.dtype)(x)
        x = x if shared else jax.lax.stop_gradient(x)
        x = nn.Dense(4, name="second", param_dtype=x.dtype)(x)
        x = GroupBatchNorm(silu=True, name="second_norm")(x, groups)
        return first, nn.Dense(3, name="second_out", param_dtype=x.dtype)(x)


NET = Two()
TERMS = (Term("fit", 2.0, "many"), Term("calm", 0.5, "many"), Term("once", 3.0, "one"))


def forward(params, stats, batch, groups, shared=False):
    (first, second), changed = NET.apply(
        {"params": params, "batch_stats": stats}, batch["x"], groups, shared, mutable=["moments"]
    )
    weight, objects = batch["weight"][:, None], batch["objects"] * batch["weight"][:, None]
    few = objects * (jnp.arange(5) == 0)
    return Output(
        {
            "fit": jnp.sum(objects * jnp.square(first[..., 0] - batch["y"])),
            "calm": jnp.sum(weight * jnp.square(first[..., 1])),
            "once": jnp.sum(few * jnp.square(second[..., 0] - batch["y"])),
        },
        {"many": jnp.sum(objects), "one": jnp.sum(few)},
        changed.get("moments", {}),
    )


def owner(path):
    return "one" if path.startswith("second") else "many"


def falling(step):
    return 0.8 - 0.25 * step


WEIGHTS = {"many": falling, "one": lambda step: 1 - falling(step)}


def objective(kind=Objective, owner=owner, **more):
    return kind(TERMS, {"many": 1.0, "one": 1.0}, SCALE, owner=owner, weights=WEIGHTS, **more)


def rule_of(objective):
    return UpdateRule(objective, optax.chain(optax.trace(0.9), optax.scale(-0.05)), clip=1.0)


def initial(dtype):
    made = NET.init(jax.random.key(0), jnp.zeros((1, 5, 3), dtype), None)
    made = jax.tree.map(lambda a: np.asarray(a, dtype), made)
    return made["params"], made["batch_stats"]


def run(geometry, bn_group=4, kind=Objective, owner=owner, updates=3, amount=1.0, **more):
    return equivalence.trace(
        forward, rule_of(objective(kind, owner, **more)), Recipe(NBS, bn_group), geometry,
        *initial(np.float64), toy.make_batches(NBS, np.float64, amount=amount), updates,
    )  # fmt: skip


def in_one_pass(bn_group=4, weights=(0.8, 0.2), amount=1.0):
    """The loss of the first effective batch and SCALE times its gradient, written down directly."""
    params, stats = initial(np.float64)
    batch = next(toy.make_batches(NBS, np.float64, amount=amount)())

    def loss(params):
        place = np.arange(12) % NBS
        laid = {k: v[place] for k, v in batch.items()}
        laid["weight"] = (np.arange(12) < NBS).astype(np.float64)
        groups = None if bn_group == "frozen" else Groups(bn_group, laid["weight"])
        out = forward(params, stats, laid, groups)
        n, d = out.numerators, {k: jnp.maximum(v, 1) for k, v in out.denominators.items()}
        many = (2 * n["fit"] + 0.5 * n["calm"]) / d["many"]
        return weights[0] * many + weights[1] * 3 * n["once"] / d["one"]

    value, gradient = jax.value_and_grad(loss)(params)
    return float(value), optax.tree.scale(SCALE, gradient)


@functools.cache
def whole(bn_group, amount=1.0):
    assert jax.config.jax_enable_x64
    return run(Geometry(12), bn_group, amount=amount)


@pytest.mark.parametrize("bn_group", [4, "frozen"])
@pytest.mark.parametrize("amount", [1.0, 0.11])  # both denominators above their floors, and below
def test_the_gradient_of_one_pass(x64, bn_group, amount):
    value, gradient = in_one_pass(bn_group, amount=amount)
    for geometry in (Geometry(4, 2), Geometry(4, 1, "multisteps")):
        found = run(geometry, bn_group, updates=1, amount=amount)
        assert found.logs[0]["loss"] == pytest.approx(value, rel=1e-13)
        assert equivalence.distance(found.gradient, gradient) < 1e-13
        sums = [found.logs[0][f"sums/{name}"] for name in ("many", "one")]
        assert all((value < 1) == (amount < 1) for value in sums)


@pytest.mark.parametrize("engine", ["scan", "multisteps"])
@pytest.mark.parametrize(
    ("bn_group", "microbatch", "devices"),
    [
        ("frozen", 2, 2), (4, 4, 1), (4, 2, 4),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("frozen", 1, 1), (4, 4, 2))),
    ],
)  # fmt: skip
def test_every_geometry_is_one_run(x64, bn_group, microbatch, devices, engine):
    found = equivalence.differences(run(Geometry(microbatch, devices, engine), bn_group),
                                    whole(bn_group))  # fmt: skip
    assert equivalence.within(found, equivalence.Tolerance.of(True)), found


@pytest.mark.parametrize("geometry", [Geometry(4), Geometry(4, 2, "multisteps")], ids=str)
def test_it_is_the_update_of_two_accumulators(x64, geometry):
    found = equivalence.differences(run(geometry), run(geometry, owner=None))
    assert equivalence.within(found, equivalence.Tolerance.of(True)), found


def test_one_denominator_for_both_is_another_gradient(x64):
    """The mistake that a shared sum would be: all of the second head is off by a factor."""

    class Shared(Objective):
        def divisor(self, name, denominators):
            return super().divisor("many", denominators)

    right = run(Geometry(4), updates=1)
    wrong = run(Geometry(4), kind=Shared, updates=1)
    heads = [{k: g for k, g in t.gradient.items() if owner(k) == "one"} for t in (wrong, right)]
    bodies = [{k: g for k, g in t.gradient.items() if owner(k) == "many"} for t in (wrong, right)]
    ratio = right.logs[0]["sums/one"] / right.logs[0]["sums/many"]
    assert ratio < 0.5
    assert equivalence.distance(*heads) == pytest.approx(1 - ratio, rel=1e-9)
    assert equivalence.distance(*bodies) < 1e-13


def test_a_divided_state_is_one_run(x64, monkeypatch):
    monkeypatch.setattr(fsdp, "SMALLEST", 1)
    found = equivalence.differences(run(Geometry(4, 2, fsdp=2)), whole(4))
    assert equivalence.within(found, equivalence.Tolerance.of(True)), found


def test_the_forms_of_gpus_are_the_same_update(x64, monkeypatch):
    expected = whole(4)
    monkeypatch.setattr(engine, "GPUS", ("cpu",))
    found = equivalence.differences(run(Geometry(4, 2)), expected)
    assert equivalence.within(found, equivalence.Tolerance.of(True)), found


@pytest.mark.parametrize("devices", [1, 2])
def test_the_usual_rule_divides_by_each_microbatchs_own(x64, devices):
    params, stats = initial(np.float64)
    batch = next(toy.make_batches(NBS, np.float64)())
    parts = [{k: v[i : i + 4] for k, v in batch.items()} for i in (0, 4)]

    def loss(params):
        total = 0.0
        for part in parts:
            out = forward(params, stats, part, None)
            n, d = out.numerators, {k: jnp.maximum(v, 1) for k, v in out.denominators.items()}
            many = (2 * n["fit"] + 0.5 * n["calm"]) / d["many"]
            total += 4 * (0.8 * many + 0.2 * 3 * n["once"] / d["one"])
        return total

    def first_eight():
        yield {k: v[:8] for k, v in batch.items()}

    value, gradient = jax.value_and_grad(loss)(params)
    found = equivalence.trace(
        forward, rule_of(objective(UsualObjective)), Recipe(8, "frozen"), Geometry(4, devices),
        params, stats, first_eight, 1,
    )  # fmt: skip
    assert found.logs[0]["loss"] == pytest.approx(float(value) / 8, rel=1e-13)
    assert equivalence.distance(found.gradient, gradient) < 1e-13


@pytest.mark.parametrize(
    "geometry",
    [Geometry(4), pytest.param(Geometry(4, 1, "multisteps"), marks=pytest.mark.slow)],
    ids=str,
)
def test_the_noise_scale_is_that_of_two_accumulators(x64, geometry):
    kept = {}
    for one in (owner, None):
        log = run(geometry, owner=one, updates=1, noise=True).logs[0]
        kept[one] = [log["noise/trace"], log["noise/square"]]
    assert kept[owner] == pytest.approx(kept[None], rel=1e-10)


# --- Weights that change during a run. ---


@pytest.mark.parametrize("kind", ["scan", "multisteps"])
def test_weights_are_those_of_the_updates_done_before(x64, kind):
    """A skipped window does not move them, and the log shows them beside terms without them."""
    made = make_engine(
        forward, rule_of(objective()), Window(Recipe(NBS, "frozen"), Geometry(4, 1, kind))
    )
    state, batches = made.init(*initial(np.float64)), toy.make_batches(NBS, np.float64)()
    seen = []
    for number in range(4):
        batch = next(batches)
        if number == 1:
            batch["x"][0] = np.nan
        state, log = made.update(state, batch)
        assert bool(log["ok"]) == (number != 1)
        seen.append((float(log["weight/many"]), float(log["weight/one"])))
        if log["ok"]:
            many = log["loss/fit"] + log["loss/calm"]
            total = seen[-1][0] * many + seen[-1][1] * log["loss/once"]
            assert float(log["loss"]) == pytest.approx(float(total), rel=1e-14)
    assert [a for a, _ in seen] == pytest.approx([0.8, 0.55, 0.55, 0.3], rel=1e-14)
    assert [a + b for a, b in seen] == pytest.approx([1] * 4)


def test_weights_act_on_the_gradient(x64):
    """Of the update, not only in the log."""
    steady = dataclasses.replace(objective(), weights={"one": lambda step: 0.25})
    found = equivalence.trace(
        forward, rule_of(steady), Recipe(NBS, 4), Geometry(4), *initial(np.float64),
        toy.make_batches(NBS, np.float64), 1,
    )  # fmt: skip
    value, gradient = in_one_pass(weights=(1.0, 0.25))
    assert equivalence.distance(found.gradient, gradient) < 1e-13
    assert found.logs[0]["loss"] == pytest.approx(value, rel=1e-13)
    assert "weight/many" not in found.logs[0]


def test_no_weights_no_word_of_them():
    log = equivalence.trace(
        toy.make_forward(), toy.make_rule(8), Recipe(8, 4), Geometry(4), *toy.initial(np.float32),
        toy.make_batches(8, np.float32), 1,
    ).logs[0]  # fmt: skip
    assert not any(key.startswith("weight") for key in log)


def test_what_cannot_be():
    with pytest.raises(ValueError, match=r"weights are given for \['few'\]; the denominators are "):
        Objective(TERMS, {"many": 1.0, "one": 1.0}, weights={"few": falling})
    coupled = (Coupled("c", 1.0, lambda p, f, w: jnp.zeros(())),)
    for more in ({"owner": owner}, {"weights": WEIGHTS}):
        with pytest.raises(ValueError, match=r"with coupled terms all others .* leave out owner"):
            Objective(TERMS, {"many": 1.0, "one": 1.0}, coupled=coupled, **more)


# --- What it saves. ---


def shapes_of(made):
    state = made.init(*initial(np.float32))
    batch = next(toy.make_batches(NBS, np.float32)())
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (state, batch))


def carried(owner):
    """Shapes of the arrays that the loop over microbatches takes from turn to turn."""
    window = Window(Recipe(NBS, "frozen"), Geometry(4))
    made = make_engine(forward, rule_of(objective(owner=owner)), window)
    state, batch = shapes_of(made)
    text = made.lowered(state, batch)[0].compile().as_text()
    (loop,) = (
        line for body in computations(text).values() for line in body.splitlines()
        if " while(" in line and 'op_name="jit(_update)/while"' in line
    )  # fmt: skip
    return re.findall(r"f32\[([\d,]*)\]", loop.split(" while(")[0])


def test_the_loop_carries_one_gradient():
    """Each shape as often as there are parameters of it, and once more to read them."""
    params, _ = initial(np.float32)
    kernels = {",".join(map(str, a.shape)) for a in jax.tree.leaves(params) if a.ndim == 2}
    one, two = carried(owner), carried(None)
    for shape in kernels:
        own = sum(",".join(map(str, a.shape)) == shape for a in jax.tree.leaves(params))
        assert one.count(shape) == 2 * own, shape
        assert two.count(shape) == 3 * own, shape


def test_multisteps_keeps_one_gradient():
    made = make_engine(
        forward, rule_of(objective()), Window(Recipe(NBS, 4), Geometry(4, 1, "multisteps"))
    )
    state, batch = shapes_of(made)
    accumulator = made.lowered(state, batch)[0].in_avals[0][1]
    kept = sum(a.size for a in jax.tree.leaves(accumulator.gradients))
    assert kept == sum(a.size for a in jax.tree.leaves(state.params))
    counts = [objective(owner=one).accumulators for one in (owner, None)]
    assert counts == [1, 2]


def test_one_backward_pass():
    """As many matrix products as one gradient takes, and not twice those."""
    params, stats = initial(np.float32)
    batch = next(toy.make_batches(NBS, np.float32)())

    def products(function, *arguments):
        return str(jax.make_jaxpr(function)(*arguments)).count("dot_general")

    with_owner, without = (
        products(lambda p, o=o: objective(owner=o).sums(grouped(forward, None), p, stats, batch),
                 params)
        for o in (owner, None)
    )  # fmt: skip
    plain = products(
        jax.grad(lambda p: sum(forward(p, stats, batch, None).numerators.values())), params
    )
    assert with_owner == plain < without


# --- The proof. ---


def refused(said, forward=forward, **more):
    made = make_engine(forward, rule_of(objective(**more)), Window(Recipe(NBS, 4), Geometry(4)))
    with pytest.raises(ContractError, match=said):
        made.update(made.init(*initial(np.float32)), next(toy.make_batches(NBS, np.float32)()))


def test_a_parameter_that_learns_from_both_is_named():
    """Without the stop_gradient the second head teaches the body."""
    refused(
        r"the parameter body/\w+ belongs to the denominator 'many', but the backward pass of the "
        "terms over 'one' leads to it",
        functools.partial(forward, shared=True),
    )


def test_an_owner_of_another_name_is_refused():
    refused(
        "owner gives 'few' for the parameter body/bias; expected one of .*many, one",
        owner=lambda path: "few",
    )


def test_the_wrong_owner_is_refused():
    refused(r"the parameter second/\w+ belongs to the denominator 'many', but .* over 'one'",
            owner=lambda path: "many")  # fmt: skip


def answers(function, *arguments, marks):
    """`reached` of a function of as many scalars as there are marks."""
    return owners.reached(jax.make_jaxpr(function)(*arguments).jaxpr, marks)


@jax.custom_vjp
def negated(a, b):
    return -a, -b


negated.defvjp(lambda a, b: ((-a, -b), None), lambda _, ct: (-ct[0], -ct[1]))


def test_what_reaches_what():
    """Through everything that a network's backward pass may be made of."""

    def both(f, marks=(1, 2)):
        return answers(f, 1.0, 2.0, marks=list(marks))

    assert both(lambda a, b: (a * 3, b, a + b, 5.0)) == [1, 2, 3, 0]
    assert both(lambda a, b: jax.jit(lambda x, y: (x, jnp.sin(y)))(a, b)) == [1, 2]
    assert both(lambda a, b: jax.checkpoint(lambda x, y: (jnp.sin(x), y))(a, b)) == [1, 2]
    assert both(lambda a, b: jax.lax.optimization_barrier((a, b))) == [1, 2]
    assert both(lambda a, b: (jax.nn.relu(a), b)) == [1, 2]  # a custom_jvp
    assert both(negated) == [1, 2]
    # Not known in here: all of the outputs from all of the inputs.
    assert both(lambda a, b: jax.lax.sort((jnp.stack([a, a]), jnp.stack([b, b])))) == [3, 3]

    def turned(a, b):
        return jax.lax.fori_loop(0, 3, lambda i, c: (c[0] + i, c[1] * 2, c[1] + c[2]), (a, b, a))

    assert both(turned) == [1, 2, 3]

    def late(a, b):  # it takes two turns for b to come to the front
        return jax.lax.scan(lambda c, x: ((c[1], c[2], c[2]), (c[0], x)), (0.0, 0.0, b),
                            jnp.stack([a, a]))  # fmt: skip

    assert both(late) == [2, 2, 2, 2, 1]

    def unsure(a, b):
        return jax.lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 1, c[1] + b), (a, 0.0))

    assert both(unsure) == [1, 2]  # how often is asked of a, and adds nothing of it


def test_what_only_decides_does_not_reach():
    """And the branches are looked into, both of them."""

    def decided(a, b):
        return jax.lax.cond(a == a, lambda x, y: (x, 0.0), lambda x, y: (y, x), b, 2.0)

    assert answers(decided, 1.0, 2.0, marks=[1, 2]) == [2, 2]


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="this JAX has no references")
def test_references_are_not_followed():
    def through(a, b):
        ref = jax.new_ref(a)
        ref[...] = b
        return ref[...], a

    assert answers(through, 1.0, 2.0, marks=[1, 2]) == [3, 3]


def test_split_and_merged():
    tree = {"second": [np.ones(2), None], "body": {"x": np.zeros(3)}}
    parts = owners.split(tree, owner, ["many", "one"])
    assert [len(jax.tree.leaves(part)) for part in parts.values()] == [1, 1]
    assert parts["one"]["body"] == {"x": None}
    back = owners.merged(list(parts.values()))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert all(map(np.array_equal, jax.tree.leaves(back), jax.tree.leaves(tree)))


def test_a_branch_that_is_computed_anew_is_proved(x64):
    """Both heads in one rematerialised function, whose derivative asks for a NaN in either."""
    from jaxaccum.models import blocks

    def head(params, x):
        return x @ params["many"], jax.lax.stop_gradient(x) @ params["one"]

    def forward(params, stats, batch, groups):
        x = batch["x"][:, 0] @ params["body"]
        first, second = blocks.rematerialised(head, params["head"], x)
        weight = batch["weight"]
        return Output(
            {"a": jnp.sum(weight * jnp.square(first)), "b": jnp.sum(weight * jnp.square(second))},
            {"many": jnp.sum(weight), "one": jnp.sum(weight)}, {},
        )  # fmt: skip

    params = {"body": np.ones((3, 3)), "head": {"many": np.ones(3), "one": np.ones(3)}}
    terms = (Term("a", 1.0, "many"), Term("b", 1.0, "one"))
    floors = {"many": 1.0, "one": 1.0}

    def update(owner):
        made = make_engine(
            forward, rule_of(Objective(terms, floors, owner=owner)),
            Window(Recipe(NBS, "frozen"), Geometry(4)),
        )  # fmt: skip
        return made.update(made.init(params, {}), next(toy.make_batches(NBS, np.float64)()))[0]

    found = update(lambda path: "one" if path == "head/one" else "many")
    assert equivalence.distance(found.params, update(None).params) < 1e-14
    with pytest.raises(ContractError, match=r"the parameter head/one belongs to .*'many'"):
        update(lambda path: "many")
