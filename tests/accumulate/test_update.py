"""The end of a window by hand: every number that an update makes, against numpy in float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxaccum.accumulate import Objective, Term, UpdateRule
from jaxaccum.accumulate.terms import Sums
from jaxaccum.accumulate.update import State, advance, all_finite, close_window

MOMENTUM = [0.5, 0.25, 0.125, 0.0625]  # of the statistics, by updates done before
DECAY = [0.0, 0.1, 0.3, 0.6, 0.9]  # of the average, by updates done, this one included
RATE = [1.0, 0.5, 0.25, 0.125]  # of learning, by updates done before
SCALE, CLIP = 8.0, 3.0


def table(values):
    array = jnp.asarray(values)
    return lambda step: array[step]


def make_rule(clip: float = CLIP, average: bool = True) -> UpdateRule:
    return UpdateRule(
        Objective(
            (Term("a", 2.0, "objects"), Term("b", 3.0, "pixels")),
            {"objects": 4.0, "pixels": 1.0}, SCALE,
        ),
        optax.chain(optax.scale_by_schedule(table(RATE)), optax.scale(-1.0)),
        clip=clip,
        statistics_momentum=table(MOMENTUM),
        ema_decay=table(DECAY) if average else None,
    )  # fmt: skip


def make_sums(seed: int, *, objects: float = 10.0, bad: float = 0.0, broken: str = "") -> Sums:
    """A window's sums; `broken` names a part that holds a NaN."""
    rng = np.random.default_rng(seed)
    nan = {name: np.nan if name == broken else 0.0 for name in ("gradient", "loss", "moments")}
    gradients = {
        name: {"w": jnp.asarray(rng.normal(size=3)), "v": jnp.asarray(rng.normal(size=(2, 2)))}
        for name in ("objects", "pixels")
    }
    gradients["pixels"]["v"] += nan["gradient"]
    moments = {
        "count": jnp.asarray(12.0),
        "first": jnp.asarray(rng.normal(size=2)) + nan["moments"],
        "second": jnp.asarray(rng.uniform(20, 30, size=2)),
    }
    return Sums(
        gradients,
        {"a": jnp.asarray(5.0) + nan["loss"], "b": jnp.asarray(7.0)},
        {"objects": jnp.asarray(objects), "pixels": jnp.asarray(100.0)},
        {"norm": moments},
        jnp.asarray(6.0), jnp.asarray(bad),
    )  # fmt: skip


def start(rule: UpdateRule) -> State:
    return rule.init(
        {"w": jnp.asarray([1.0, 2.0, 3.0]), "v": jnp.asarray([[1.0, -1.0], [0.5, 2.0]])},
        {"norm": {"mean": jnp.asarray([0.1, -0.2]), "var": jnp.asarray([1.0, 2.0])}},
    )


def do(rule: UpdateRule, state: State, sums: Sums):
    closed, opt_state = close_window(rule).update(sums, state.opt_state, state.params)
    return advance(rule, state, closed, opt_state)


def by_hand(state, sums: Sums, clip: float, average: bool):
    """The same in numpy, of a finite window: (params, stats, ema, norm, losses)."""
    step = int(state.step)
    divisors = {k: max(float(v), {"objects": 4.0, "pixels": 1.0}[k])
                for k, v in sums.denominators.items()}  # fmt: skip
    gradient = {
        k: sum(SCALE * np.asarray(sums.gradients[d][k]) / divisors[d] for d in divisors)
        for k in ("w", "v")
    }
    norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
    shrink = min(1.0, clip / norm) if clip else 1.0
    params = {
        k: np.asarray(state.params[k]) - RATE[step] * shrink * gradient[k] for k in ("w", "v")
    }
    m, old = sums.moments["norm"], state.stats["norm"]
    count = float(m["count"])
    offset = np.asarray(m["first"]) / count
    var = (np.asarray(m["second"]) / count - offset**2) * count / (count - 1)
    rate = MOMENTUM[step]
    stats = {
        "mean": np.asarray(old["mean"]) + rate * offset,
        "var": (1 - rate) * np.asarray(old["var"]) + rate * var,
    }
    ema = None
    if average:
        decay = DECAY[step + 1]

        def mix(a, b):
            return decay * np.asarray(a) + (1 - decay) * b

        ema = {
            "params": {k: mix(state.ema["params"][k], params[k]) for k in params},
            "stats": {"norm": {k: mix(state.ema["stats"]["norm"][k], stats[k]) for k in stats}},
        }
    losses = {"loss/a": 2.0 * 5.0 / divisors["objects"], "loss/b": 3.0 * 7.0 / divisors["pixels"]}
    return params, {"norm": stats}, ema, norm, losses


def close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-15), found, expected
    )


@pytest.mark.parametrize("clip", [0.0, CLIP, 1e6])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("objects", [10.0, 1.0])  # above the floor of 4, and below
def test_three_updates_by_hand(x64, clip, average, objects):
    rule = make_rule(clip, average)
    state = start(rule)
    for number in range(3):
        sums = make_sums(number, objects=objects)
        params, stats, ema, norm, losses = by_hand(state, sums, clip, average)
        state, log = do(rule, state, sums)
        close(state.params, params)
        close(state.stats, stats)
        assert (state.ema is None) == (ema is None)
        if average:
            close(state.ema, ema)
        assert float(log["grad_norm"]) == pytest.approx(norm, rel=1e-13)  # before clipping
        assert {k: float(log[k]) for k in losses} == pytest.approx(losses, rel=1e-13)
        assert float(log["loss"]) == pytest.approx(sum(losses.values()), rel=1e-13)
        assert float(log["samples"]) == 6.0 and bool(log["ok"])
        assert float(log["sums/objects"]) == objects and float(log["sums/pixels"]) == 100.0
        counts = (number + 1, number + 1, 0)
        assert (int(state.step), int(state.windows), int(state.skipped_in_row)) == counts
        assert (int(log["step"]), int(log["windows"]), int(log["skipped_in_row"])) == counts


@pytest.mark.parametrize(
    "what", [{"broken": "gradient"}, {"broken": "loss"}, {"broken": "moments"}, {"bad": 1.0}]
)
def test_a_skipped_window_moves_nothing(x64, what):
    """Nor does it move the schedules: the next update is the one that would have come."""
    rule = make_rule()
    state, _ = do(rule, start(rule), make_sums(0))
    before = jax.device_get(state)
    for number in (1, 2):
        state, log = do(rule, state, make_sums(1, **what))
        assert not bool(log["ok"])
        for name in ("params", "stats", "opt_state", "ema"):
            jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(before, name))
        assert (int(state.step), int(state.windows), int(state.skipped_in_row)) == (
            1, 1 + number, number,
        )  # fmt: skip
    if "bad" in what:  # the rest of the window's sums were left out of it
        assert np.isnan(float(log["loss"]))
    expected, *_ = by_hand(state, make_sums(3), CLIP, True)
    state, log = do(rule, state, make_sums(3))
    close(state.params, expected)
    assert (int(state.step), int(state.windows), int(state.skipped_in_row)) == (2, 4, 0)


def test_the_optimizer_sees_the_clipped_gradient(x64):
    seen = []
    watch = optax.GradientTransformation(
        lambda p: (), lambda g, s, p=None: (seen.append(optax.tree.norm(g)) or g, s)
    )
    rule = dataclasses.replace(make_rule(clip=0.5), optimizer=watch)
    do(rule, start(rule), make_sums(0))
    assert float(seen[0]) == pytest.approx(0.5, rel=1e-12)


def test_a_gradient_of_zeros_is_clipped_to_zeros(x64):
    rule = make_rule()
    state, sums = start(rule), make_sums(0)
    sums = sums._replace(gradients=jax.tree.map(jnp.zeros_like, sums.gradients))
    after, log = do(rule, state, sums)
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    assert bool(log["ok"]) and float(log["grad_norm"]) == 0.0


def test_the_gradient_is_that_of_the_loss_itself_unless_told_otherwise(x64):
    rule, sums = make_rule(clip=0.0), make_sums(0)
    given = {f: getattr(rule.objective, f) for f in ("terms", "floors")}
    plain = dataclasses.replace(rule, objective=Objective(**given))
    scaled = close_window(rule).update(sums, start(rule).opt_state, start(rule).params)[0]
    closed = close_window(plain).update(sums, start(plain).opt_state, start(plain).params)[0]
    close(jax.tree.map(lambda u: SCALE * u, closed.updates), scaled.updates)
    assert float(closed.norm) == pytest.approx(float(scaled.norm) / SCALE, rel=1e-13)


def test_a_denominator_without_a_floor_is_refused():
    with pytest.raises(ValueError, match=r"no floor given for the denominators \['pixels'\]"):
        Objective((Term("a", 1.0, "objects"), Term("b", 1.0, "pixels")), {"objects": 1.0})


def test_a_state_keeps_its_dtypes(x64):
    """Decays and rates in float64 widen nothing: the next update would be another program."""
    rule = make_rule()
    state, sums = jax.tree.map(
        lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a,
        (start(rule), make_sums(0)),
    )
    after, _ = do(rule, state, sums)
    before = [a.dtype for a in jax.tree.leaves(state)]
    assert [a.dtype for a in jax.tree.leaves(after)] == before


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_all_finite(value, place):
    leaves = [jnp.zeros(3), jnp.zeros((2, 2)), jnp.zeros([])]
    assert bool(all_finite(leaves))
    leaves[place] = leaves[place].at[(-1,) * leaves[place].ndim].set(value)
    assert not bool(all_finite(leaves))


def test_the_state_shares_nothing_with_what_it_was_made_of():
    rule = make_rule()
    params = {"w": jnp.ones(3)}
    stats = {"norm": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}
    state = rule.init(params, stats)
    pointers = [a.unsafe_buffer_pointer() for a in jax.tree.leaves((params, stats, state))]
    assert len(set(pointers)) == len(pointers)
