"""A batch-norm group that is computed one microbatch after the other, and is exact all the same.

Batch norm needs sums over its group before it can go on, so a group is usually one pass. Here a
function of one microbatch says where it adds up over all of its group (`over_group`), is
differentiated as it stands, and is then computed *segment by segment*: between two such sums every
microbatch runs by itself, in a loop; at a sum the loop ends, and the next begins with the total.

    f(fixed, x_1), ..., f(fixed, x_T)  with  over_group(v) = v_1 + ... + v_T  inside of f

It is `jax.vmap` with a `psum` in it, in time instead of in space. The derivative of a sum over the
group is the sum of the cotangents over the group, so the backward pass is cut in the same way, by
the same rule; gradients of parameters are sums over the microbatches and are accumulated in the
loop that makes them.

What a later segment needs of an earlier one is kept for the whole group; that is the price. Of the
inside of a segment there is never more than one microbatch. What costs next to nothing (a cast, an
activation, a normalisation: elementwise functions of what is kept) is computed anew instead of
kept, so that of a convolution, its batch norm and its activation one array is kept: the
convolution's result. Rematerialised blocks keep what they are given alone.

What is kept may lie in the host's memory (`offload`): a loop writes a microbatch's part of it there
while it computes the next one, and reads it back in the same way. Then a device needs the room of
one microbatch, whatever the group. The numbers are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching

from jaxaccum.accumulate.recipe import GeometryError

PyTree = Any

# Named by what they are called in one or another version of JAX.
INLINED = frozenset({
    "jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2",
    "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr",
})  # fmt: skip
CHEAP = frozenset({
    "abs", "add", "add_any", "and", "broadcast_in_dim", "cbrt", "ceil", "clamp", "concatenate",
    "convert_element_type", "copy", "copy_p", "cos", "div", "eq", "erf", "exp", "exp2", "expm1",
    "floor", "ge", "gt", "integer_pow", "iota", "is_finite", "le", "log", "log1p", "logistic", "lt",
    "max", "min", "mul", "ne", "neg", "not", "or", "pad", "pcast", "pow", "pvary",
    "reduce_precision", "reshape", "rev", "round", "rsqrt", "select_n", "sign", "sin", "slice",
    "split", "sqrt", "square", "squeeze", "stop_gradient", "sub", "tanh", "transpose", "xor",
})  # fmt: skip

MOST_ROOTS = 8  # values that one is computed from again
_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
LEAST_OFFLOADED = 2**16  # bytes of a microbatch's part; smaller ones stay on the device

over_group_p = core.Primitive("over_group")


def over_group(value: jax.Array) -> jax.Array:
    """The sum of a value over the microbatches of a group, in a function given to `computed`."""
    return over_group_p.bind(value)


@over_group_p.def_impl
def _outside(value):
    raise NotImplementedError(
        "over_group is the sum over a group's microbatches; it is known only inside of a function "
        "that in_time.computed runs over all of them"
    )


over_group_p.def_abstract_eval(lambda value: value)
ad.deflinear2(over_group_p, lambda cotangent, _: [over_group(cotangent)])
batching.defvectorized(over_group_p)


@dataclasses.dataclass(frozen=True)
class _Node:
    """One operation. Values are numbered in the order in which they are made.

    Attributes:
      equation: as JAX has it. inputs: numbers of its operands. outputs: of its results.
      cheap: whether it may be computed again instead of keeping its results.
      run: the operation as a function of values of its inputs.
    """

    equation: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    cheap: bool
    run: Callable[..., list[Any]]

    @property
    def is_sum(self) -> bool:
        return self.equation.primitive is over_group_p


class _Program:
    """A function as a list of operations without calls, those that nothing needs left out.

    Attributes:
      avals: of every value. known: number -> the constants. nodes: the operations, in order.
      fixed, varying: numbers of the arguments that all microbatches share, and of the others.
      summed, stacked: numbers of the results.
    """

    def __init__(self, closed: core.ClosedJaxpr, fixed: int, summed: int):
        self.avals: list[Any] = []
        self.known: dict[int, Any] = {}
        self.nodes: list[_Node] = []
        inputs = [self._new(v.aval) for v in closed.jaxpr.invars]
        outputs = self._flatten(closed.jaxpr, closed.consts, inputs)
        self.fixed, self.varying = inputs[:fixed], inputs[fixed:]
        self.summed, self.stacked = outputs[:summed], outputs[summed:]
        self._drop_unused(outputs)
        self.maker = {v: node for node in self.nodes for v in node.outputs}

    def _new(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def _constant(self, value: Any, aval: Any) -> int:
        number = self._new(aval)
        self.known[number] = value
        return number

    def _flatten(self, jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: list[int]) -> list[int]:
        numbers = dict(zip(jaxpr.invars, inputs, strict=True))
        for v, value in zip(jaxpr.constvars, consts, strict=True):
            numbers[v] = self._constant(value, v.aval)

        def read(v: Any) -> int:
            return self._constant(v.val, v.aval) if isinstance(v, core.Literal) else numbers[v]

        for equation in jaxpr.eqns:
            given = [read(v) for v in equation.invars]
            inner = _called(equation)
            if inner is not None:
                made = self._flatten(inner.jaxpr, inner.consts, given)
            else:
                if equation.primitive is not over_group_p and _has_sum(equation):
                    raise GeometryError(
                        f"there is batch norm inside of `{equation.primitive.name}`: a group that "
                        "is computed one microbatch after the other needs its batch norms outside "
                        "of loops and branches. Use a microbatch of whole groups, bn_group samples"
                    )
                made = [self._new(v.aval) for v in equation.outvars]
                run = _alone(jaxpr, equation)
                node = _Node(equation, tuple(given), tuple(made), _is_cheap(equation), run)
                self.nodes.append(node)
            numbers.update(zip(equation.outvars, made, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _drop_unused(self, outputs: Sequence[int]) -> None:
        needed, kept = set(outputs), []
        for node in reversed(self.nodes):
            if needed & set(node.outputs) or node.equation.effects:
                needed |= set(node.inputs)
                kept.append(node)
        self.nodes = kept[::-1]


class _Plan:
    """In which segment each value is made, and which of them are kept for later ones.

    Attributes:
      varies: whether a value differs between the microbatches.
      segment: number -> the segment in which it is made; of a value that does not differ, the
        first in which it is known.
      segments: how many there are.
      sums: by segment, the nodes that add up over the group at its end.
      totals: by segment, results of the function that are summed over the microbatches.
      kept: by segment, what it makes that is kept for all microbatches.
      inside: by segment, the operations of its loop.
      read: by segment, what its loop takes of earlier ones and of the arguments, by microbatch.
    """

    def __init__(self, program: _Program):
        self._program = program
        self.varies = [False] * len(program.avals)
        self.segment = [0] * len(program.avals)
        self._roots: list[frozenset[int]] = [frozenset()] * len(program.avals)
        self.segments = 1 + self._place()
        self.sums: list[list[_Node]] = [[] for _ in range(self.segments)]
        for node in program.nodes:
            if node.is_sum and self.varies[node.inputs[0]]:
                self.sums[self.segment[node.outputs[0]] - 1].append(node)
        self.totals: list[list[int]] = [[] for _ in range(self.segments)]
        for v in dict.fromkeys(program.summed):
            if self.varies[v]:
                self.totals[self.segment[v]].append(v)
        self.kept: list[set[int]] = [set() for _ in range(self.segments)]
        self._arguments = arguments = frozenset(program.varying)
        for v in program.stacked:
            if self.varies[v] and v not in arguments:
                self.kept[self.segment[v]].add(v)
        self.inside: list[list[_Node]] = [[] for _ in range(self.segments)]
        self.read: list[list[int]] = [[] for _ in range(self.segments)]
        for s in reversed(range(self.segments)):  # a later one says what an earlier one keeps
            self.inside[s], self.read[s] = self._gather(s)

    def _place(self) -> int:
        """Marks every value; in the order of the program, so that what it computes late (as what a
        checkpoint computes anew) is late here. Returns the last segment."""
        for v in self._program.varying:
            self.varies[v], self._roots[v] = True, frozenset({v})
        now = last = 0
        for node in self._program.nodes:
            ready = max((self.segment[v] for v in node.inputs), default=0)
            differs = any(self.varies[v] for v in node.inputs)
            if differs:
                now = ready = max(now, ready)
            last = max(last, ready)
            roots = frozenset().union(*(self._roots[v] for v in node.inputs))
            again = node.cheap and len(roots) <= MOST_ROOTS
            for v in node.outputs:
                if node.is_sum:
                    self.segment[v] = ready + 1 if differs else ready
                    last = max(last, self.segment[v])
                    continue
                self.segment[v], self.varies[v] = ready, differs
                if differs:
                    self._roots[v] = roots if again else frozenset({v})
        return last

    def _is_kept(self, v: int) -> bool:
        """Whether a value of an earlier segment is kept; else it is computed again from others.

        These are mostly kept anyway. Up to two that are not may be kept in its place: what needs
        one value of them mostly needs several (dy and x of batch norm).
        """
        made = self.segment[v]
        if self._roots[v] == {v} or v in self.kept[made]:
            return True
        avals = self._program.avals
        more = [r for r in self._roots[v] if r not in self._arguments]
        more = [r for r in more if r not in self.kept[self.segment[r]]]
        return sum(_bytes(avals[r]) for r in more) > 2 * _bytes(avals[v])

    def _gather(self, s: int) -> tuple[list[_Node], list[int]]:
        wanted = [*(node.inputs[0] for node in self.sums[s]), *self.totals[s], *self.kept[s]]
        inside: dict[int, _Node] = {}
        read: set[int] = set()
        seen: set[int] = set()
        while wanted:
            v = wanted.pop()
            if v in seen:
                continue
            seen.add(v)
            if v in self._arguments:
                read.add(v)
            elif self.varies[v] and self.segment[v] < s and self._is_kept(v):
                read.add(v)
                self.kept[self.segment[v]].add(v)
            elif self.varies[v] or self.is_made_inside(v):
                node = self._program.maker[v]
                inside[node.outputs[0]] = node
                wanted += node.inputs
        return [inside[k] for k in sorted(inside)], sorted(read)

    def is_made_inside(self, v: int) -> bool:
        """Whether a value that does not differ is made in the loops that need it: constants, and
        what is a small value repeated (a loop would have to be given it as an array)."""
        node = self._program.maker.get(v)
        if node is None or node.is_sum:
            return False
        size = sum(
            _size(self._program.avals[i]) for i in node.inputs if i not in self._program.known
        )
        return (node.cheap and _size(self._program.avals[v]) > size) or not node.inputs


def computed(
    function: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    microbatches: int,
    fixed: PyTree,
    batches: PyTree,
    offload: bool = False,
) -> tuple[PyTree, PyTree]:
    """Runs a function for each microbatch of a group, with its sums over the group.

    Args:
      function: (fixed, batch) -> (totals, values), in which `over_group` adds up.
      microbatches: of the group.
      fixed: what all of them share. batches: leaves (microbatches, ...).
      offload: keep in the host's memory what a later segment needs.
    Returns:
      totals, summed over the microbatches, and values, leaves (microbatches, ...).
    Raises:
      GeometryError: a sum over the group inside of a loop or a branch of the function.
    """
    first = jax.tree.map(lambda a: a[0], batches)
    closed, (totals, values) = jax.make_jaxpr(function, return_shape=True)(fixed, first)
    leaves = jax.tree.leaves(fixed)
    program = _Program(closed, len(leaves), len(jax.tree.leaves(totals)))
    run = _Run(program, microbatches, leaves, jax.tree.leaves(batches), offload)
    summed, stacked = run.results()
    return (
        jax.tree.unflatten(jax.tree.structure(totals), summed),
        jax.tree.unflatten(jax.tree.structure(values), stacked),
    )


class _Run:
    """The segments of a program, one after the other, on values (or what stands for them)."""

    def __init__(
        self, program: _Program, microbatches: int, fixed: list, batches: list, offload: bool
    ):
        self._program, self._plan = program, _Plan(program)
        self._microbatches, self._offload = microbatches, offload
        self._on_host: set[int] = set()
        self._shared = program.known | dict(zip(program.fixed, fixed, strict=True))
        self._kept = dict(zip(program.varying, batches, strict=True))
        self._totals: dict[int, Any] = {}
        self._last: Any = None  # a sum of the segment before
        for segment in range(self._plan.segments):
            self._compute(segment)

    def results(self) -> tuple[list, list]:
        """The results that are summed, and those of each microbatch."""
        count = self._microbatches

        def total(v: int) -> Any:
            if self._plan.varies[v]:
                return self._totals[v]
            shared = self._value(v)
            return shared * jnp.asarray(count, shared.dtype)

        def each(v: int) -> Any:
            if self._plan.varies[v]:
                return _moved(self._kept[v], _DEVICE) if v in self._on_host else self._kept[v]
            shared = self._value(v)
            return jnp.broadcast_to(shared, (count, *jnp.shape(shared)))

        return [total(v) for v in self._program.summed], [each(v) for v in self._program.stacked]

    def _value(self, v: int) -> Any:
        """A value that all microbatches share; made when it is asked for first."""
        wanted = [v]
        needed: dict[int, _Node] = {}
        while wanted:
            u = wanted.pop()
            if u not in self._shared:
                node = self._program.maker[u]
                needed[node.outputs[0]] = node
                wanted += node.inputs
        for first in sorted(needed):
            node = needed[first]
            given = [self._shared[u] for u in node.inputs]
            made = [given[0] * self._microbatches] if node.is_sum else node.run(*given)
            self._shared.update(zip(node.outputs, made, strict=True))
        return self._shared[v]

    def _compute(self, segment: int) -> None:
        plan, program = self._plan, self._program
        inside, read, keep = plan.inside[segment], plan.read[segment], sorted(plan.kept[segment])
        sums, totals = plan.sums[segment], plan.totals[segment]
        if not (sums or totals or keep):
            return
        adding = [*(node.inputs[0] for node in sums), *totals]
        own = {v for node in inside for v in node.outputs} | set(read)
        needed = {v for node in inside for v in node.inputs} | set(adding) | set(keep)
        shared = {v: self._value(v) for v in sorted(needed - own)}

        def body(carry, given):
            totals, kept = carry
            index, parts = given
            values = shared | parts | {v: _moved(parts[v], _DEVICE) for v in parts if v in back}
            for node in inside:
                made = node.run(*(values[v] for v in node.inputs))
                values.update(zip(node.outputs, made, strict=True))
            totals = [total + values[v] for total, v in zip(totals, adding, strict=True)]
            kept = {
                v: jax.lax.dynamic_update_index_in_dim(room, values[v], index, 0)
                for v, room in kept.items()
            }
            collected = {v: values[v] for v in keys} | {v: _moved(values[v], _HOST) for v in away}
            return (totals, kept), collected

        keys = [v for v in keep if jnp.issubdtype(program.avals[v].dtype, jax.dtypes.extended)]
        back = self._on_host & set(read)
        away = [v for v in keep if v not in keys and self._is_offloaded(program.avals[v])]
        start = (
            [self._zeros(program.avals[v]) for v in adding],
            {
                v: self._zeros(program.avals[v], self._microbatches)
                for v in keep
                if v not in keys and v not in away
            },
        )
        given = jnp.arange(self._microbatches), {v: self._kept[v] for v in read}
        (done, kept), collected = jax.lax.scan(body, start, given)
        self._kept.update(kept | collected)
        self._on_host.update(away)
        # Of sums, which are finite in an update that counts; what is kept may have NaN in places
        # that are masked later.
        floating = (total for total in done if jnp.issubdtype(total.dtype, jnp.floating))
        self._last = next(floating, self._last)
        for node, total in zip(sums, done, strict=False):
            self._shared[node.outputs[0]] = total
        self._totals.update(zip(totals, done[len(sums) :], strict=True))

    def _is_offloaded(self, aval: Any) -> bool:
        return self._offload and _bytes(aval) >= LEAST_OFFLOADED

    def _zeros(self, aval: Any, *leading: int) -> jax.Array:
        """Zeros to add to or to write into, made when the segment before is done.

        XLA's CPU backend makes what depends on nothing when the program begins, and would hold the
        room of all segments at once.
        """
        shape, axes = (*leading, *aval.shape), frozenset(_own_axes(aval))
        zeros = jnp.zeros(shape, aval.dtype)
        if self._last is not None and _own_axes(jax.typeof(self._last)) <= axes:
            number = self._last.ravel()[0]
            # XLA cannot know that this is no NaN; if it is one, so is the update.
            zeros = zeros + jnp.where(number == number, 0, number).astype(aval.dtype)
        axes -= _own_axes(jax.typeof(zeros))
        return jax.lax.pcast(zeros, tuple(axes), to="varying") if axes else zeros


def _called(equation: Any) -> core.ClosedJaxpr | None:
    """The function that an operation merely calls, or None."""
    if equation.primitive.name not in INLINED:
        return None
    inner = [v for v in equation.params.values() if isinstance(v, core.Jaxpr | core.ClosedJaxpr)]
    if len(inner) != 1:
        return None
    return inner[0] if isinstance(inner[0], core.ClosedJaxpr) else core.ClosedJaxpr(inner[0], ())


def _inner(equation: Any) -> list[core.Jaxpr]:
    """All functions of an operation: bodies, branches."""
    found = []
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr):
                found.append(one.jaxpr)
            elif isinstance(one, core.Jaxpr):
                found.append(one)
    return found


def has_sums(jaxpr: core.Jaxpr) -> bool:
    """Whether a program adds up over a group."""
    return any(e.primitive is over_group_p or _has_sum(e) for e in jaxpr.eqns)


def _has_sum(equation: Any) -> bool:
    return any(has_sums(jaxpr) for jaxpr in _inner(equation))


def _is_cheap(equation: Any) -> bool:
    """Elementwise, or a choice by platform of what is."""
    if equation.primitive.name in CHEAP or equation.primitive.name == "platform_index":
        return True
    if equation.primitive.name not in ("cond", "optimization_barrier", *INLINED):
        return False
    if equation.primitive.name == "optimization_barrier":
        return True
    return all(_is_cheap(inner) for jaxpr in _inner(equation) for inner in jaxpr.eqns)


def _alone(jaxpr: core.Jaxpr, equation: Any) -> Callable[..., list[Any]]:
    """An operation of a program as a function of its operands."""
    made = [core.Var(v.aval) for v in equation.outvars]
    given = [core.Var(v.aval) for v in equation.invars]
    closed = core.ClosedJaxpr(
        jaxpr.replace(
            constvars=[], invars=given, outvars=made,
            eqns=[equation.replace(invars=given, outvars=made)],
            debug_info=jaxpr.debug_info.with_unknown_names(),
        ),
        (),
    )  # fmt: skip
    return core.jaxpr_as_fun(closed)


def _moved(value: jax.Array, space: Any) -> jax.Array:
    """A value of a program in another memory; XLA copies it while other things are computed."""
    return jax.device_put(value, space)


def _size(aval: Any) -> int:
    return getattr(aval, "size", 1)


def _bytes(aval: Any) -> int:
    return _size(aval) * getattr(aval.dtype, "itemsize", 8)


def _own_axes(aval: Any) -> frozenset[str]:
    """Axes of the mesh along which each device has a value of its own, inside of shard_map."""
    if hasattr(aval, "manual_axis_type"):  # from JAX 0.11 on
        return frozenset(aval.manual_axis_type.varying)
    return frozenset(getattr(aval, "vma", ()))
