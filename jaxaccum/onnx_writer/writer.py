"""A JAX program as a model of ONNX: operation by operation, what is known worked out."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import onnx
from jax.extend.core import Literal
from onnx import helper

from jaxaccum.onnx_writer import axes, products, suppression  # noqa: F401, they register rules
from jaxaccum.onnx_writer.elementwise import ELEMENTWISE, RULES, stretched_of
from jaxaccum.onnx_writer.graph import (
    IR_VERSION,
    OPSET,
    Graph,
    UnwritableError,
    Value,
    constant,
    element_type,
    info,
    names_read,
)  # fmt: skip

# Those that are a program of their own, and the name of the parameter that holds it.
_CALLS = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "remat2": "jaxpr",
    "checkpoint": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}  # fmt: skip
_NEVER_WORKED_OUT = {"scan", "while", "cond", "dim_as_value", "broadcast_in_dim", "iota"}
_LARGEST = 2**22  # elements of a constant that is worked out


def to_onnx(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> onnx.ModelProto:
    """A function of arrays as a model of ONNX, checked by ONNX itself.

    Of operations that depend on the platform it takes the default.

    Args:
      function: of arrays. Its own constants, the weights, become the model's.
      inputs: shapes and dtypes of its arguments; a first dimension that is the expression `n` of
        `jax.export.symbolic_shape` stands for any number of samples.
      name: of the model.
      input_names, output_names: of the arguments, and of the results in the order of their leaves.
    Raises:
      UnwritableError: the program has an operation that has no form here; which, and where.
    """
    closed = jax.make_jaxpr(function)(*inputs)
    graph = Graph()
    arguments = [graph.value(n, aval) for n, aval in zip(input_names, inputs, strict=True)]
    for argument in arguments:
        if argument.rank and not isinstance(argument.shape[0], int):
            graph.counts(argument.name)
            break
    results = _run(graph, closed.jaxpr, closed.consts, arguments)
    graph.scope = ""
    for value, wanted in zip(results, output_names, strict=True):
        graph.nodes.append(helper.make_node("Identity", [graph.tensor(value)], [wanted]))
    nodes = graph.pruned(output_names)
    used = names_read(nodes)
    model = helper.make_model(
        helper.make_graph(
            nodes, name,
            [info(n, v.shape, v.dtype) for n, v in zip(input_names, arguments, strict=True)],
            [info(n, v.shape, v.dtype) for n, v in zip(output_names, results, strict=True)],
            [tensor for tensor in graph.constants.values() if tensor.name in used],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION,
        producer_name="jaxaccum",
    )  # fmt: skip
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UnwritableError(f"ONNX does not accept it: {error}") from error
    return model


def _run(graph: Graph, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Value]):
    """The values of a program's results."""
    known: dict[Any, Value] = dict(zip(jaxpr.invars, arguments, strict=True))
    known |= {
        var: value if isinstance(value, Value) else constant(value)
        for var, value in zip(jaxpr.constvars, consts, strict=True)
    }

    def read(atom: Any) -> Value:
        if isinstance(atom, Literal):
            return constant(atom.val, atom.aval.dtype)  # type: ignore[attr-defined]
        return known[atom]

    uses = collections.Counter(
        atom
        for atoms in (*(e.invars for e in jaxpr.eqns), jaxpr.outvars)
        for atom in atoms
        if not isinstance(atom, Literal)
    )

    def kept(var: Any, value: Value) -> Value:
        """What is used more than once is convolved only once: nothing more goes into it."""
        if value.convolution is None or uses[var] < 2:
            return value
        name = graph.tensor(value, value.order, whole=False)
        return dataclasses.replace(value, name=name, convolution=None)

    known = {var: kept(var, value) for var, value in known.items()}
    outside = graph.scope
    for equation in jaxpr.eqns:
        stack = str(equation.source_info.name_stack)
        graph.scope = "/".join(part for part in (outside, stack) if part)
        results = _equation(graph, equation, [read(atom) for atom in equation.invars])
        known |= {v: kept(v, r) for v, r in zip(equation.outvars, results, strict=True)}
    graph.scope = outside
    return [read(atom) for atom in jaxpr.outvars]


def _equation(graph: Graph, equation: Any, operands: list[Value]) -> list[Value]:
    name, params = equation.primitive.name, equation.params
    if name == "platform_index":
        default = [i for i, names in enumerate(params["platforms"]) if names is None]
        return [constant(default[0] if default else 0, np.int32)]
    if name in _CALLS:
        inner = params[_CALLS[name]]
        consts = getattr(inner, "consts", ())
        return _run(graph, getattr(inner, "jaxpr", inner), consts, operands)
    if (results := _worked_out(equation, operands)) is not None:
        return results
    if name == "cond" and operands[0].constant is not None:
        return _chosen(graph, equation, *operands)
    try:
        if name == "scan":
            return _loop(graph, equation, operands)
        if name not in RULES:
            raise UnwritableError("a choice by the data" if name == "cond" else "no rule for it")
        results = RULES[name](graph, equation, *operands)
        for value, var in zip(results, equation.outvars, strict=True):
            if value.shape != tuple(var.aval.shape) or value.dtype != var.aval.dtype:
                raise UnwritableError(f"the rule gives {value.dtype}{list(value.shape)}")
        return results
    except (UnwritableError, jax.errors.InconclusiveDimensionOperation) as error:
        is_size = not isinstance(error, UnwritableError)
        what = "a size or a place that depends on the batch" if is_size else str(error)
        shapes = ", ".join(str(atom.aval) for atom in equation.invars)
        raise UnwritableError(
            f"the operation {name} of {shapes} in {graph.scope or 'the program'} cannot be written "
            f"as ONNX: {what}"
        ) from error


def _chosen(graph: Graph, equation: Any, which: Value, *operands: Value) -> list[Value]:
    assert which.constant is not None
    branches = equation.params["branches"]
    branch = branches[int(np.clip(which.constant, 0, len(branches) - 1))]
    return _run(graph, branch.jaxpr, branch.consts, operands)


def _worked_out(equation: Any, operands: Sequence[Value]) -> list[Value] | None:
    """The results of an operation on constants, if it can be done now."""
    name = equation.primitive.name
    if name == "select_n" and operands[0].constant is not None and operands[0].rank == 0:
        return [operands[1 + int(operands[0].constant)]]
    if name in _NEVER_WORKED_OUT or not operands or any(v.constant is None for v in operands):
        return None
    arrays = [np.asarray(v.constant) for v in operands]
    (out, *_) = (v.aval for v in equation.outvars)
    if name in ELEMENTWISE:
        full = [i for i, v in enumerate(operands) if v.rank]
        for i, array in zip(full, np.broadcast_arrays(*(arrays[i] for i in full)), strict=True):
            arrays[i] = array
        stretched = stretched_of([operands[i] for i in full], out.shape)
    else:
        if not all(v.static for v in operands):
            return None
        stretched = frozenset()
        arrays = [v.whole() for v in operands]
    if sum(array.size for array in arrays) > _LARGEST:
        return None
    with jax.ensure_compile_time_eval():
        found = equation.primitive.bind(*map(jax.numpy.asarray, arrays), **equation.params)
    found = found if equation.primitive.multiple_results else [found]
    return [
        Value(
            tuple(v.aval.shape), np.dtype(v.aval.dtype), constant=np.asarray(array),
            stretched=stretched,
        )
        for v, array in zip(equation.outvars, found, strict=True)
    ]  # fmt: skip


def _parts_of_scan(equation: Any) -> tuple[int, int]:
    """How many operands of a scan are the same in all steps, and how many are carried.

    By the ranks: what is not carried has an axis of steps outside of the body.
    """
    inner = equation.params["jaxpr"].jaxpr

    def rows(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        return sum(
            len(o.aval.shape) > len(i.aval.shape) for o, i in zip(outside, inside, strict=True)
        )

    carried = len(inner.outvars) - rows(equation.outvars, inner.outvars)
    return len(inner.invars) - rows(equation.invars, inner.invars) - carried, carried


def _loop(graph: Graph, equation: Any, operands: Sequence[Value]) -> list[Value]:
    """A scan as ONNX's Loop, whose body reads what does not change from the graph around it."""
    params = equation.params
    fixed, carried = _parts_of_scan(equation)
    body, inner, length = params["jaxpr"], Graph(graph), params["length"]
    if not isinstance(length, int) or params["reverse"]:
        raise UnwritableError("a scan backwards, or along the batch")

    def laid(value: Value) -> Value:
        if value.constant is not None and value.static:
            return value
        return Value(value.shape, value.dtype, graph.tensor(value))

    consts, carry, rows = (
        [laid(v) for v in part]
        for part in (
            operands[:fixed], operands[fixed : fixed + carried], operands[fixed + carried :],
        )
    )  # fmt: skip
    step, going = inner.name("step"), inner.name("going")
    avals = [v.aval for v in body.jaxpr.invars[fixed:]]
    now = [inner.value(inner.name("carried"), aval) for aval in avals[:carried]]
    row = [
        inner.value(inner.add("Gather", [inner.tensor(v), step], axis=0), aval)
        for v, aval in zip(rows, avals[carried:], strict=True)
    ]
    results = _run(inner, body.jaxpr, body.consts, [*consts, *now, *row])
    outputs = []
    for value in results:
        outputs.append(inner.name("result"))
        inner.nodes.append(helper.make_node("Identity", [inner.tensor(value)], [outputs[-1]]))
    still = inner.add("Identity", [going])
    made = helper.make_graph(
        inner.pruned([still, *outputs]), inner.name("body"),
        [
            info(step, (), np.int64), info(going, (), np.bool_),
            *(info(v.name, v.shape, v.dtype) for v in now),
        ],
        [
            helper.make_tensor_value_info(still, element_type(np.bool_), []),
            *(info(n, v.shape, v.dtype) for n, v in zip(outputs, results, strict=True)),
        ],
    )  # fmt: skip
    starts = [graph.tensor(v) for v in carry]
    names = graph.add(
        "Loop", [graph.array(length, np.int64), graph.array(True), *starts],
        len(equation.outvars), body=made,
    )  # fmt: skip
    names = [names] if isinstance(names, str) else names
    return [graph.value(n, v.aval) for n, v in zip(names, equation.outvars, strict=True)]
