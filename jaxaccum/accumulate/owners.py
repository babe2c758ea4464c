"""Terms whose parameters do not overlap: every parameter learns from those of one denominator.

    gradient of p = scale / max(D_d, floor_d) * d(sum of gain * numerator over the terms of d) / dp

with d = owner(p). A head of two branches is so, of which one learns and does not teach the network
below it (`jax.lax.stop_gradient`). Then one backward pass of the sum of all numerators leaves in
each parameter the gradient of its own terms and of no others, and one accumulator does for all
denominators: the division, another one for each owner's leaves, comes at the update as ever.

It rests on the claim that no parameter learns from another's terms. `reached` proves that from the
program of the backward pass, before it is compiled: `checks.check` refuses owners without it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend import core

PyTree = Any

# Primitives that are a function called with their operands, as they are named by versions of JAX.
CALLS = frozenset({
    "jit", "pjit", "closed_call", "core_call", "eval_jaxpr", "checkpoint", "remat", "remat2",
    "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr",
})  # fmt: skip


def path_of(path: Sequence[Any]) -> str:
    """A path into a tree as "a/b/kernel"."""
    return "/".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )


def split(tree: PyTree, owner: Callable[[str], str], names: Iterable[str]) -> dict[str, PyTree]:
    """Name -> the tree with None where the owner is another: together they have each leaf once.

    Args:
      tree: of the parameters, or like it.
      owner: path ("a/b/kernel") -> one of the names.
    """

    def own(name: str) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if owner(path_of(path)) == name else None, tree
        )

    return {name: own(name) for name in names}


def merged(parts: Sequence[PyTree]) -> PyTree:
    """The tree that was split."""
    return jax.tree.map(
        lambda *leaves: next((leaf for leaf in leaves if leaf is not None), None),
        *parts, is_leaf=lambda leaf: leaf is None,
    )  # fmt: skip


def reached(jaxpr: core.Jaxpr, marks: Sequence[int]) -> list[int]:
    """The marks of the inputs that an output's value is made of, for each output, as bits.

    Values that only decide which branch of a `cond` is taken, or how often a loop turns, are left
    out. For a function that is linear in the marked inputs, as a backward pass is in its
    cotangents, that is no gap: where the others are zero each branch gives zero, so what decides
    between them adds nothing. (Rematerialisation asks its cotangents for a NaN so.)

    Operations that are not known in here give all of their inputs' marks to all of their outputs,
    so an answer may name too many, and never too few.

    Args:
      marks: of each input, some bits.
    """
    found = dict(zip(jaxpr.invars, marks, strict=True))

    def read(v: Any) -> int:
        return 0 if isinstance(v, core.Literal) else found.get(v, 0)

    for equation in jaxpr.eqns:
        # What is written into a reference is not followed.
        if any(type(v.aval).__name__ == "AbstractRef" for v in equation.invars):
            return [_union(marks)] * len(jaxpr.outvars)
        through = _through(equation, [read(v) for v in equation.invars])
        found.update(zip(equation.outvars, through, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _through(equation: Any, marks: list[int]) -> list[int]:
    """Marks of the outputs of one operation."""
    name, options = equation.primitive.name, equation.params
    if name == "optimization_barrier":  # each output is its own input
        return marks
    if name == "cond":
        branches = [reached(_open(branch), marks[1:]) for branch in options["branches"]]
        return [_union(marks) for marks in zip(*branches, strict=True)]
    if name == "while":
        start = options["cond_nconsts"]
        stop = start + options["body_nconsts"]
        return _turning(options["body_jaxpr"], marks[start:stop], marks[stop:], [])
    inner = [v for v in options.values() if isinstance(v, core.Jaxpr | core.ClosedJaxpr)]
    if name == "scan":
        # Constants, carry, rows in; carry, rows out. Of rows the body has one axis less.
        body = _open(inner[0])
        rows = _longer(equation.invars, body.invars)
        carry = len(body.outvars) - _longer(equation.outvars, body.outvars)
        stop = len(marks) - rows
        start = stop - carry
        return _turning(body, marks[:start], marks[start:stop], marks[stop:])
    if name in CALLS and len(inner) == 1:
        return reached(_open(inner[0]), marks)
    return [_union(marks)] * len(equation.outvars)


def _turning(body: Any, constants: list[int], carry: list[int], rows: list[int]) -> list[int]:
    """Marks after any number of turns of a loop: of what it carries, and of what it stacks."""
    while True:
        out = reached(_open(body), [*constants, *carry, *rows])
        after = [old | new for old, new in zip(carry, out[: len(carry)], strict=True)]
        if after == carry:
            return [*carry, *out[len(carry) :]]
        carry = after


def _longer(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many values have an axis more outside of a loop than in its body."""
    return sum(a.aval.ndim > b.aval.ndim for a, b in zip(outside, inside, strict=True))


def _open(jaxpr: Any) -> core.Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _union(marks: Iterable[int]) -> int:
    return functools.reduce(operator.or_, marks, 0)
