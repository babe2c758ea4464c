"""Broadcasts, reshapes, parts, reductions and orders in ONNX; see `elementwise`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxaccum.onnx_writer.elementwise import is_number, rule
from jaxaccum.onnx_writer.graph import Graph, UnwritableError, Value, element_type


@rule("iota")
def _iota(graph: Graph, equation: Any) -> list[Value]:
    shape, along = equation.params["shape"], equation.params["dimension"]
    if not isinstance(shape[along], int):
        return [_numbers_along_the_batch(graph, equation, shape, along)]
    sizes = [size if i == along else 1 for i, size in enumerate(shape)]
    numbers = np.arange(shape[along], dtype=equation.params["dtype"]).reshape(sizes)
    stretched = frozenset(i for i, size in enumerate(shape) if i != along and size != 1)
    return [Value(tuple(shape), numbers.dtype, constant=numbers, stretched=stretched)]


def _number(graph: Graph, size: Any) -> str:
    """A dimension as a number, int64."""
    return graph.add("Squeeze", [graph.sizes([size]), graph.integers([0])])


def _numbers_along_the_batch(graph: Graph, equation: Any, shape: Any, along: int) -> Value:
    zero, one = graph.array(0, np.int64), graph.array(1, np.int64)
    name = graph.add("Range", [zero, _number(graph, shape[along]), one])
    out = equation.outvars[0].aval
    name = graph.add("Cast", [name], to=element_type(out.dtype))
    if others := [axis for axis in range(len(shape)) if axis != along]:
        name = graph.add("Unsqueeze", [name, graph.integers(others)])
    stretched = (axis for axis in others if not is_number(shape[axis], 1))
    return graph.value(name, out, (), stretched)


@rule("dim_as_value")
def _dimension(graph: Graph, equation: Any) -> list[Value]:
    name = _number(graph, equation.params["dim"])
    out = equation.outvars[0].aval
    return [graph.value(graph.add("Cast", [name], to=element_type(out.dtype)), out)]


@rule("broadcast_in_dim")
def _broadcast(graph: Graph, equation: Any, x: Value, *sizes: Value) -> list[Value]:
    shape = tuple(equation.params["shape"])
    axes = tuple(equation.params["broadcast_dimensions"])
    new = [axis for axis in range(len(shape)) if axis not in axes]
    stretched = {axis for axis in new if not is_number(shape[axis], 1)} | {
        axis
        for i, axis in enumerate(axes)
        if i in x.stretched or (is_number(x.shape[i], 1) and not is_number(shape[axis], 1))
    }
    if x.constant is not None:
        stored = [1] * len(shape)
        for i, axis in enumerate(axes):
            stored[axis] = x.constant.shape[i]
        array = x.constant.reshape(stored)
        return [Value(shape, x.dtype, constant=array, stretched=frozenset(stretched))]
    out = equation.outvars[0].aval
    if not new:
        return [dataclasses.replace(x, shape=shape, stretched=frozenset(stretched))]
    name = graph.tensor(x, whole=False)
    value = graph.value(graph.add("Unsqueeze", [name, graph.integers(new)]), out, (), stretched)
    return [dataclasses.replace(value, narrow=None if x.stretched else x)]


@rule("reshape")
def _reshape(graph: Graph, equation: Any, x: Value, *sizes: Value) -> list[Value]:
    shape, out = tuple(equation.params["new_sizes"]), equation.outvars[0].aval
    if equation.params["dimensions"] is not None:
        raise UnwritableError("a reshape that transposes")
    if (larger := _upsampled(graph, x, shape)) is not None:
        return [larger]
    return [graph.value(graph.reshaped(graph.tensor(x), shape), out)]


def _upsampled(graph: Graph, x: Value, shape: tuple[Any, ...]) -> Value | None:
    """Images each of whose pixels was repeated along axes of their own, as one operation."""
    small = x.narrow
    if small is None or small.rank != 4 or x.rank != 6 or x.stretched != {2, 4}:
        return None
    high, wide = x.shape[2], x.shape[4]
    n, h, w, c = small.shape
    if x.shape != (n, h, high, w, wide, c) or shape != (n, h * high, w * wide, c):
        return None
    order = (0, 3, 1, 2)
    name = graph.add(
        "Resize",
        [
            graph.tensor(small, order), "",
            graph.array([1, 1, high, wide], np.float32),
        ],
        mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip
    return Value(shape, x.dtype, name, order=order)


@rule("transpose")
def _transpose(graph: Graph, equation: Any, x: Value) -> list[Value]:
    """Only what the axes are called."""
    new = tuple(equation.params["permutation"])
    shape = tuple(x.shape[axis] for axis in new)
    stretched = frozenset(new.index(axis) for axis in x.stretched)
    if x.constant is not None:
        array = x.constant.transpose(new)
        return [Value(shape, x.dtype, constant=array, stretched=stretched)]
    order = tuple(new.index(axis) for axis in x.order)
    return [
        dataclasses.replace(x, shape=shape, order=order, stretched=stretched, narrow=None)
    ]  # fmt: skip


@rule("squeeze")
def _squeeze(graph: Graph, equation: Any, x: Value) -> list[Value]:
    gone = tuple(equation.params["dimensions"])
    left = [axis for axis in range(x.rank) if axis not in gone]
    stretched = frozenset(left.index(axis) for axis in x.stretched if axis in left)
    if x.constant is not None:
        array = x.constant.squeeze(gone)
        shape = tuple(x.shape[axis] for axis in left)
        return [Value(shape, x.dtype, constant=array, stretched=stretched)]
    name = graph.tensor(x, x.order, whole=False)
    places = sorted(x.order.index(axis) for axis in gone)
    order = tuple(left.index(axis) for axis in x.order if axis not in gone)
    name = graph.add("Squeeze", [name, graph.integers(places)])
    return [graph.value(name, equation.outvars[0].aval, order, stretched)]


def _order_of(values: Sequence[Value]) -> tuple[int, ...]:
    plain = tuple(range(values[0].rank))
    return next((v.order for v in values if v.constant is None and v.order != plain), plain)


@rule("concatenate")
def _concatenate(graph: Graph, equation: Any, *values: Value) -> list[Value]:
    order = _order_of(values)
    names = [graph.tensor(v, order) for v in values]
    name = graph.add("Concat", names, axis=order.index(equation.params["dimension"]))
    return [graph.value(name, equation.outvars[0].aval, order)]


@rule("stack")
def _stack(graph: Graph, equation: Any, *values: Value) -> list[Value]:
    axis = equation.params["axis"]
    names = [graph.add("Unsqueeze", [graph.tensor(v), graph.integers([axis])]) for v in values]
    out = equation.outvars[0].aval
    return [graph.value(graph.add("Concat", names, axis=axis), out)]


@rule("unstack")
def _unstack(graph: Graph, equation: Any, x: Value) -> list[Value]:
    axis = equation.params["axis"]
    return [
        graph.value(
            graph.add("Gather", [graph.tensor(x), graph.array(i, np.int64)], axis=axis), v.aval
        )
        for i, v in enumerate(equation.outvars)
    ]


@rule("split")
def _split(graph: Graph, equation: Any, x: Value) -> list[Value]:
    axis, sizes = equation.params["axis"], equation.params["sizes"]
    if len(sizes) == 1:
        return [x]
    names = graph.add(
        "Split", [graph.tensor(x, x.order), graph.integers(sizes)], len(sizes),
        axis=x.order.index(axis),
    )  # fmt: skip
    return [
        graph.value(name, v.aval, x.order) for name, v in zip(names, equation.outvars, strict=True)
    ]


def _cut(graph: Graph, x: Value, cuts: dict[int, tuple[int, int, int]]) -> str:
    """A tensor in x's order with (start, stop, step) along some axes."""
    name = graph.tensor(x, x.order)
    if not cuts:
        return name
    starts, stops, steps = zip(*cuts.values(), strict=True)
    places = [x.order.index(axis) for axis in cuts]
    lists = (starts, stops, places, steps)
    return graph.add("Slice", [name, *(graph.integers(numbers) for numbers in lists)])


@rule("slice")
def _slice(graph: Graph, equation: Any, x: Value) -> list[Value]:
    strides = equation.params["strides"] or (1,) * x.rank
    cuts = {}
    for axis, (start, stop, step) in enumerate(
        zip(
            equation.params["start_indices"], equation.params["limit_indices"], strides,
            strict=True,
        )
    ):  # fmt: skip
        if is_number(start, 0) and stop == x.shape[axis] and step == 1:
            continue
        if not isinstance(stop, int):
            raise UnwritableError("a part of the batch")
        cuts[axis] = (start, stop, step)
    return [graph.value(_cut(graph, x, cuts), equation.outvars[0].aval, x.order)]


@rule("rev")
def _reverse(graph: Graph, equation: Any, x: Value) -> list[Value]:
    cuts = {axis: (-1, np.iinfo(np.int64).min, -1) for axis in equation.params["dimensions"]}
    return [graph.value(_cut(graph, x, cuts), equation.outvars[0].aval, x.order)]


@rule("pad")
def _pad(graph: Graph, equation: Any, x: Value, filler: Value) -> list[Value]:
    config = equation.params["padding_config"]
    if any(inner for _, _, inner in config):
        raise UnwritableError("padding between elements")
    pads = [config[axis][side] for side in (0, 1) for axis in x.order]
    names = [graph.tensor(x, x.order), graph.integers(pads), graph.tensor(filler)]
    return [graph.value(graph.add("Pad", names), equation.outvars[0].aval, x.order)]


# --- Sums, places, orders ---

_REDUCTIONS = {
    "reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin",
    "reduce_prod": "ReduceProd",
}  # fmt: skip


@rule(*_REDUCTIONS)
def _reduce(graph: Graph, equation: Any, x: Value) -> list[Value]:
    axes = tuple(equation.params["axes"])
    if not axes:
        return [x]
    left = [axis for axis in range(x.rank) if axis not in axes]
    order = tuple(left.index(axis) for axis in x.order if axis not in axes)
    places = graph.integers(sorted(x.order.index(axis) for axis in axes))
    kind = _REDUCTIONS[equation.primitive.name]
    name = graph.add(kind, [graph.tensor(x, x.order), places], keepdims=0)
    return [graph.value(name, equation.outvars[0].aval, order)]


@rule("reduce_or", "reduce_and")
def _any_or_all(graph: Graph, equation: Any, x: Value) -> list[Value]:
    if x.dtype != np.bool_:
        raise UnwritableError("arithmetic on bits")
    kind = "ReduceMax" if equation.primitive.name == "reduce_or" else "ReduceMin"
    number = graph.add("Cast", [graph.tensor(x)], to=element_type(np.int32))
    name = graph.add(kind, [number, graph.integers(equation.params["axes"])], keepdims=0)
    out = equation.outvars[0].aval
    return [graph.value(graph.add("Cast", [name], to=element_type(np.bool_)), out)]


@rule("argmax", "argmin")
def _where_best(graph: Graph, equation: Any, x: Value) -> list[Value]:
    (axis,) = equation.params["axes"]
    kind = "ArgMax" if equation.primitive.name == "argmax" else "ArgMin"
    name = graph.add(kind, [graph.tensor(x)], axis=axis, keepdims=0)
    out = equation.outvars[0].aval
    return [graph.value(graph.add("Cast", [name], to=element_type(out.dtype)), out)]


@rule("cumsum")
def _cumulated(graph: Graph, equation: Any, x: Value) -> list[Value]:
    axis = graph.array(equation.params["axis"], np.int64)
    backwards = int(equation.params["reverse"])
    name = graph.add("CumSum", [graph.tensor(x), axis], reverse=backwards)
    return [graph.value(name, equation.outvars[0].aval)]


def _best(graph: Graph, x: str, k: int, axis: int, largest: bool) -> list[str]:
    """Values and places (int64); of equal values the first one comes first."""
    return graph.add("TopK", [x, graph.integers([k])], 2, axis=axis, largest=int(largest))


@rule("top_k")
def _top_k(graph: Graph, equation: Any, x: Value) -> list[Value]:
    axis = equation.params.get("axis", x.rank - 1) % x.rank
    values, places = _best(graph, graph.tensor(x), equation.params["k"], axis, True)
    found, where = (v.aval for v in equation.outvars)
    places = graph.add("Cast", [places], to=element_type(where.dtype))
    return [graph.value(values, found), graph.value(places, where)]


@rule("sort")
def _sort(graph: Graph, equation: Any, *values: Value) -> list[Value]:
    axis = equation.params["dimension"]
    length = values[0].shape[axis]
    if equation.params["num_keys"] != 1 or not isinstance(length, int):
        raise UnwritableError("sorting by several keys, or along the batch")
    keys, places = _best(graph, graph.tensor(values[0]), length, axis, False)
    others = (graph.add("GatherElements", [graph.tensor(v), places], axis=axis) for v in values[1:])
    return [
        graph.value(name, v.aval) for name, v in zip((keys, *others), equation.outvars, strict=True)
    ]


def places_of(value: Value) -> np.ndarray:
    """A constant's elements, as integers."""
    return np.asarray(value.whole(), np.int64)


@rule("dynamic_slice")
def _dynamic_slice(graph: Graph, equation: Any, x: Value, *starts: Value) -> list[Value]:
    """A part whose first element, kept inside, the data may say."""
    axes = [
        axis for axis, size in enumerate(equation.params["slice_sizes"]) if size != x.shape[axis]
    ]
    if not axes:
        return [x]
    sizes = graph.integers(equation.params["slice_sizes"][axis] for axis in axes)
    zero = graph.integers([0])
    first = graph.add("Concat", [
        graph.add("Unsqueeze", [
            graph.add("Cast", [graph.tensor(starts[axis])], to=element_type(np.int64)), zero,
        ])
        for axis in axes
    ], axis=0)  # fmt: skip
    last = graph.add("Sub", [graph.sizes([x.shape[axis] for axis in axes]), sizes])
    first = graph.add("Min", [graph.add("Max", [first, zero]), last])
    stop = graph.add("Add", [first, sizes])
    places = graph.integers(x.order.index(axis) for axis in axes)
    name = graph.add("Slice", [graph.tensor(x, x.order), first, stop, places])
    return [graph.value(name, equation.outvars[0].aval, x.order)]
