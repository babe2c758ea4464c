"""What operations of JAX are in ONNX, a rule for each; here those that work element by element."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import lax

from jaxaccum.onnx_writer.graph import Graph, UnwritableError, Value, element_type

Rule = Callable[..., list[Value]]
RULES: dict[str, Rule] = {}
ELEMENTWISE: set[str] = set()  # those whose result depends element by element on their operands


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule: (graph, equation, *operands) -> values of the results."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


# --- Element by element ---


def is_number(size: Any, number: int) -> bool:
    return isinstance(size, int) and size == number


def elementwise(*names: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Registers a rule (graph, equation, *names of tensors) -> name of the result's."""

    def register(function: Callable[..., str]) -> Callable[..., str]:
        def write(graph: Graph, equation: Any, *operands: Value) -> list[Value]:
            return [_each(graph, equation, operands, function)]

        RULES.update(dict.fromkeys(names, write))
        ELEMENTWISE.update(names)
        return function

    return register


def _each(graph: Graph, equation: Any, operands: Sequence[Value], function) -> Value:
    out = equation.outvars[0].aval
    full = [v for v in operands if v.rank == len(out.shape) and v.rank]
    # As the tensors lie, if one of them lies otherwise than the program says.
    orders = [v.order for v in full if v.constant is None]
    plain = tuple(range(len(out.shape)))
    order = next((o for o in orders if o != plain), plain)
    names = [
        graph.tensor(v, order if v.rank else (), whole=False) for v in operands
    ]  # ONNX broadcasts what is stretched, and numbers
    name = function(graph, equation, *names)
    return graph.value(name, out, order, stretched_of(full, out.shape))


def stretched_of(operands: Sequence[Value], shape: Sequence[Any]) -> frozenset[int]:
    """The axes along which every operand, and so the result of that shape, has one element."""
    return frozenset(
        axis
        for axis, size in enumerate(shape)
        if not is_number(size, 1)
        and operands
        and all(axis in v.stretched or is_number(v.shape[axis], 1) for v in operands)
    )


_SAME_NAME = {
    "exp": "Exp", "log": "Log", "tanh": "Tanh", "logistic": "Sigmoid", "erf": "Erf",
    "sqrt": "Sqrt", "neg": "Neg", "abs": "Abs", "sin": "Sin", "cos": "Cos", "floor": "Floor",
    "ceil": "Ceil", "sign": "Sign", "lt": "Less", "le": "LessOrEqual",
    "gt": "Greater", "ge": "GreaterOrEqual", "eq": "Equal", "pow": "Pow", "atan": "Atan",
    "max": "Max", "min": "Min", "tan": "Tan", "asin": "Asin", "acos": "Acos", "sinh": "Sinh",
    "cosh": "Cosh", "asinh": "Asinh", "acosh": "Acosh", "atanh": "Atanh",
}  # fmt: skip


def _plainly(kind: str) -> Callable[..., str]:
    return lambda graph, equation, *names: graph.add(kind, names)


for _primitive, _kind in _SAME_NAME.items():
    elementwise(_primitive)(_plainly(_kind))


def _per_channel(value: Value, by: Value, shape: Sequence[Any]) -> np.ndarray | None:
    """A constant as one number, or one for each feature of a convolution's result."""
    if value.convolution is None or by.constant is None or by.dtype != value.dtype:
        return None
    axis = value.order[1]
    if value.shape != tuple(shape) or axis in value.stretched:  # its result is larger than itself
        return None
    if by.constant.size == 1:
        return by.constant.reshape(1)
    if by.rank != value.rank or by.constant.shape[axis] != by.constant.size:
        return None
    return by.constant.reshape(-1)


@rule("add", "sub", "mul", "div")
def _arithmetic(graph: Graph, equation: Any, a: Value, b: Value) -> list[Value]:
    """What follows a convolution and is one number for a feature goes into its kernel and bias."""
    name, folded, shape = equation.primitive.name, None, equation.outvars[0].aval.shape
    if (by := _per_channel(a, b, shape)) is not None and a.convolution is not None:
        folded = {
            "add": lambda c: c.shifted(by),
            "sub": lambda c: c.shifted(-by),
            "mul": lambda c: c.scaled(by),
            "div": lambda c: c.scaled(1 / by),
        }[name](a.convolution)
        return [dataclasses.replace(a, convolution=folded)]
    if name in ("add", "mul") and (by := _per_channel(b, a, shape)) is not None:
        assert b.convolution is not None
        folded = b.convolution.shifted(by) if name == "add" else b.convolution.scaled(by)
        return [dataclasses.replace(b, convolution=folded)]
    kind = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div"}[name]
    return [_each(graph, equation, (a, b), _plainly(kind))]


ELEMENTWISE.update(("add", "sub", "mul", "div"))


@elementwise("rsqrt")
def _rsqrt(graph, equation, x):
    return graph.add("Reciprocal", [graph.add("Sqrt", [x])])


@elementwise("square")
def _square(graph, equation, x):
    return graph.add("Mul", [x, x])


@elementwise("integer_pow")
def _integer_pow(graph, equation, x):
    power = equation.params["y"]
    if power == 2:
        return graph.add("Mul", [x, x])
    return graph.add("Pow", [x, graph.array(power, equation.invars[0].aval.dtype)])


@elementwise("log1p")
def _log1p(graph, equation, x):
    one = graph.array(1, equation.invars[0].aval.dtype)
    return graph.add("Log", [graph.add("Add", [x, one])])


@elementwise("expm1")
def _expm1(graph, equation, x):
    one = graph.array(1, equation.invars[0].aval.dtype)
    return graph.add("Sub", [graph.add("Exp", [x]), one])


@elementwise("exp2")
def _exp2(graph, equation, x):
    return graph.add("Pow", [graph.array(2, equation.invars[0].aval.dtype), x])


@elementwise("is_finite")
def _is_finite(graph, equation, x):
    return graph.add("Not", [graph.add("Or", [graph.add("IsInf", [x]), graph.add("IsNaN", [x])])])


@elementwise("erfc")
def _erfc(graph, equation, x):
    one = graph.array(1, equation.invars[0].aval.dtype)
    return graph.add("Sub", [one, graph.add("Erf", [x])])


@elementwise("ne")
def _ne(graph, equation, a, b):
    return graph.add("Not", [graph.add("Equal", [a, b])])


@elementwise("and", "or", "xor", "not")
def _logical(graph, equation, *names):
    if equation.invars[0].aval.dtype != np.dtype(bool):
        raise UnwritableError("arithmetic on bits")
    kinds = {"and": "And", "or": "Or", "xor": "Xor", "not": "Not"}
    return graph.add(kinds[equation.primitive.name], names)


@elementwise("rem")
def _rem(graph, equation, a, b):
    return graph.add("Mod", [a, b], fmod=1)


@elementwise("round")
def _round(graph, equation, x):
    if equation.params["rounding_method"] is lax.RoundingMethod.TO_NEAREST_EVEN:
        return graph.add("Round", [x])
    half = graph.array(0.5, equation.invars[0].aval.dtype)
    size = graph.add("Floor", [graph.add("Add", [graph.add("Abs", [x]), half])])
    return graph.add("Mul", [graph.add("Sign", [x]), size])


@elementwise("atan2")
def _atan2(graph, equation, y, x):
    dtype = equation.outvars[0].aval.dtype
    zero, pi = graph.array(0, dtype), graph.array(np.pi, dtype)
    below, left = graph.add("Less", [y, zero]), graph.add("Less", [x, zero])
    right = graph.add("Atan", [graph.add("Div", [y, graph.add("Abs", [x])])])  # x may be -0
    half = graph.add("Where", [below, graph.add("Neg", [pi]), pi])
    angle = graph.add("Where", [left, graph.add("Sub", [half, right]), right])
    nowhere = graph.add("And", [graph.add("Equal", [y, zero]), graph.add("Equal", [x, zero])])
    return graph.add("Where", [nowhere, zero, angle])


@elementwise("clamp")
def _clamp(graph, equation, low, x, high):
    return graph.add("Min", [graph.add("Max", [x, low]), high])


@elementwise("select_n")
def _select(graph, equation, which, *cases):
    if len(cases) != 2:
        raise UnwritableError(f"a choice between {len(cases)} arrays by number")
    if equation.invars[0].aval.dtype != np.dtype(bool):
        which = graph.add("Cast", [which], to=element_type(bool))
    if equation.outvars[0].aval.dtype != np.dtype(bool):
        return graph.add("Where", [which, cases[1], cases[0]])
    # onnxruntime chooses between no booleans.
    yes = graph.add("And", [which, cases[1]])
    return graph.add("Or", [yes, graph.add("And", [graph.add("Not", [which]), cases[0]])])


@elementwise("convert_element_type")
def _convert(graph, equation, x):
    return graph.add("Cast", [x], to=element_type(equation.params["new_dtype"]))


@rule("stop_gradient", "copy", "copy_p", "optimization_barrier")
def _same(graph: Graph, equation: Any, *operands: Value) -> list[Value]:
    return list(operands)
