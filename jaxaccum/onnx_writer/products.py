"""Convolutions, pooling, products, gathers and loops in ONNX; see `elementwise`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from jaxaccum.onnx_writer.axes import places_of
from jaxaccum.onnx_writer.elementwise import rule
from jaxaccum.onnx_writer.graph import (
    Convolution,
    Graph,
    UnwritableError,
    Value,
    constant,
    element_type,
)  # fmt: skip


@rule("conv_general_dilated")
def _convolution(graph: Graph, equation: Any, x: Value, kernel: Value) -> list[Value]:
    """(N, C, ...) whatever the program's order is: only the axes' names differ."""
    params = equation.params
    dims = params["dimension_numbers"]
    if set(params["lhs_dilation"]) != {1} or params["batch_group_count"] != 1:
        raise UnwritableError("a transposed convolution")
    if kernel.constant is None:
        raise UnwritableError("a convolution by a computed kernel")
    if x.dtype != np.float32 or min(n for pad in params["padding"] for n in (0, *pad)) < 0:
        raise UnwritableError("a convolution that is not of float32, or pads by less than nothing")
    weights = np.asarray(kernel.whole().transpose(dims.rhs_spec), np.float32)
    made = Convolution(
        graph.tensor(x, dims.lhs_spec), weights, np.zeros(len(weights), np.float32),
        {
            "strides": list(params["window_strides"]),
            "pads": [pad[side] for side in (0, 1) for pad in params["padding"]],
            "dilations": list(params["rhs_dilation"]),
            "group": params["feature_group_count"],
            "kernel_shape": list(weights.shape[2:]),
        },
    )  # fmt: skip
    out = equation.outvars[0].aval
    return [
        Value(tuple(out.shape), np.dtype(out.dtype), order=tuple(dims.out_spec), convolution=made)
    ]


@rule("reduce_window_max", "reduce_window_sum")
def _pool(graph: Graph, equation: Any, x: Value) -> list[Value]:
    params = equation.params
    largest = equation.primitive.name == "reduce_window_max"
    pads, windows = params["padding"], params["window_dimensions"]
    still = [
        axis
        for axis in range(x.rank)
        if windows[axis] == params["window_strides"][axis] == 1 and tuple(pads[axis]) == (0, 0)
    ]
    dilations = (*params["base_dilation"], *params["window_dilation"])
    if len(still) < 2 or set(dilations) != {1}:
        raise UnwritableError("windows of more than space, or dilated ones")
    space = [axis for axis in range(x.rank) if axis not in still]
    # Two axes that do not move are samples and channels; a third would be space of size 1.
    order = (still[0], still[-1], *sorted([*still[1:-1], *space]))
    moving = order[2:]
    sizes = [windows[axis] for axis in moving]
    name = graph.add(
        "MaxPool" if largest else "AveragePool", [graph.tensor(x, order)], kernel_shape=sizes,
        strides=[params["window_strides"][axis] for axis in moving],
        pads=[pads[axis][side] for side in (0, 1) for axis in moving],
        **({} if largest else {"count_include_pad": 1}),
    )  # fmt: skip
    if not largest:
        name = graph.add("Mul", [name, graph.array(np.prod(sizes), x.dtype)])
    return [graph.value(name, equation.outvars[0].aval, order)]


@rule("dot_general")
def _product(graph: Graph, equation: Any, a: Value, b: Value) -> list[Value]:
    ((a_sum, b_sum), (a_batch, b_batch)) = equation.params["dimension_numbers"]
    a_free = [axis for axis in range(a.rank) if axis not in (*a_sum, *a_batch)]
    b_free = [axis for axis in range(b.rank) if axis not in (*b_sum, *b_batch)]
    out = equation.outvars[0].aval
    left = graph.tensor(a, (*a_batch, *a_free, *a_sum)) if a.rank else graph.tensor(a)
    right = graph.tensor(b, (*b_batch, *b_sum, *b_free)) if b.rank else graph.tensor(b)
    batch = [a.shape[axis] for axis in a_batch]
    rows, columns = [a.shape[i] for i in a_free], [b.shape[i] for i in b_free]
    length = _all([a.shape[axis] for axis in a_sum])
    several_rows = bool(batch) or len(columns) != 1  # MatMul knows rows of any shape before these
    if len(a_sum) != 1 or (len(rows) != 1 and several_rows):
        left = graph.reshaped(left, [*batch, _all(rows), length])
    if len(b_sum) != 1 or len(columns) != 1:
        right = graph.reshaped(right, [*batch, length, _all(columns)])
    name = graph.add("MatMul", [left, right])
    if (len(rows) != 1 and several_rows) or len(columns) != 1 or len(a_sum) != 1:
        name = graph.reshaped(name, [*batch, *rows, *columns])
    return [graph.value(name, out)]


def _all(sizes: Sequence[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


@rule("gather")
def _gather(graph: Graph, equation: Any, x: Value, indices: Value) -> list[Value]:
    """Elements or rows at places; what there is in place of those outside is as JAX has it."""
    params, out = equation.params, equation.outvars[0].aval
    dims = params["dimension_numbers"]
    sizes = params["slice_sizes"]
    if indices.constant is not None and indices.rank == 1:
        return [_fixed_part(graph, equation, x, places_of(indices))]
    starts = dims.start_index_map
    if indices.constant is not None and indices.static:
        x, indices, starts = _same_part_for_all(graph, equation, x, indices)
    batch = tuple(dims.operand_batching_dims)
    modes = lax.GatherScatterMode
    clips, fills = params["mode"] == modes.CLIP, params["mode"] == modes.FILL_OR_DROP
    columns = [  # Where a part is the whole axis, there is only one place for it.
        column
        for column, i in enumerate(starts)
        if not clips or i in dims.collapsed_slice_dims or sizes[i] != x.shape[i]
    ]
    axes = tuple(starts[column] for column in columns)
    rest = [i for i in range(x.rank) if i not in axes and i not in batch]
    whole = all(sizes[i] == x.shape[i] for i in rest) and all(sizes[i] == 1 for i in axes)
    if not (whole and axes and set(dims.collapsed_slice_dims) <= set(axes)):
        raise UnwritableError("a gather of parts")
    batch_of_indices = tuple(dims.start_indices_batching_dims)
    free = [i for i in range(indices.rank - 1) if i not in batch_of_indices]
    order = (*batch_of_indices, *free, indices.rank - 1)
    places, data = graph.tensor(indices, order), graph.tensor(x, (*batch, *axes, *rest))
    if len(columns) < indices.shape[-1]:
        places = graph.add("Gather", [places, graph.integers(columns)], axis=indices.rank - 1)
    inside = ""
    if clips or fills:
        asked = graph.add("Cast", [places], to=element_type(np.int64))
        last = graph.add("Sub", [graph.sizes([x.shape[i] for i in axes]), graph.integers([1])])
        places = graph.add("Max", [graph.add("Min", [asked, last]), graph.integers([0])])
        if fills:
            same = graph.add(
                "Cast", [graph.add("Equal", [asked, places])], to=element_type(np.int32)
            )
            column = graph.integers([indices.rank - 1])
            inside = graph.add("ReduceMin", [same, column], keepdims=0)
    if batch or len(axes) > 1:
        places = graph.add("Cast", [places], to=element_type(np.int64))
        name = graph.add("GatherND", [data, places], batch_dims=len(batch))
    else:
        places = graph.add("Squeeze", [places, graph.integers([indices.rank - 1])])
        name = graph.add("Gather", [data, places], axis=0)
    if inside:
        fill = _filler(params["fill_value"], x.dtype)
        if rest:
            ends = range(indices.rank - 1, indices.rank - 1 + len(rest))
            inside = graph.add("Unsqueeze", [inside, graph.integers(ends)])
        inside = graph.add("Cast", [inside], to=element_type(np.bool_))
        name = graph.add("Where", [inside, name, graph.array(fill, x.dtype)])
    # The tensor: batch, places, rest. The program: the rest at offset_dims, the others around it.
    around = [i for i in range(len(out.shape)) if i not in dims.offset_dims]
    by_index = dict(zip((i for i in range(indices.rank - 1)), around, strict=True))
    parts = [i for i in range(x.rank) if i not in dims.collapsed_slice_dims and i not in batch]
    offsets = dict(zip(parts, dims.offset_dims, strict=True))
    ones = [i for i in axes if i in parts]  # axes of size 1 in the result
    if ones:
        rank = len(out.shape)
        name = graph.add("Unsqueeze", [name, graph.integers(range(rank - len(ones), rank))])
    result = [by_index[i] for i in order[:-1]] + [offsets[i] for i in (*rest, *ones)]
    return [graph.value(name, out, result)]


def _filler(value: Any, dtype: np.dtype) -> Any:
    """What JAX gives for places outside: as it is told, else nan or the least integer."""
    if dtype == np.bool_:
        raise UnwritableError("a gather of booleans from places that may be outside")
    if value is not None:
        return value
    if np.issubdtype(dtype, np.floating):
        return np.nan
    limits = np.iinfo(dtype)
    return limits.min if limits.min < 0 else limits.max


def _same_part_for_all(
    graph: Graph, equation: Any, x: Value, indices: Value
) -> tuple[Value, Value, tuple[int, ...]]:
    """The array cut where all ask for the same part of an axis, the other indices, their axes."""
    dims, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    columns, left, whole = places_of(indices), [], x
    for i, axis in enumerate(dims.start_index_map):
        first = int(columns[..., i].flat[0])
        if axis in dims.collapsed_slice_dims or (columns[..., i] != first).any():
            left.append(i)
        else:
            ends = (graph.integers([n]) for n in (first, first + sizes[axis], axis))
            shape = (*x.shape[:axis], sizes[axis], *x.shape[axis + 1 :])
            x = Value(shape, x.dtype, graph.add("Slice", [graph.tensor(x), *ends]))
    if not left:
        return whole, indices, dims.start_index_map
    axes = tuple(dims.start_index_map[i] for i in left)
    return x, constant(columns[..., left], indices.dtype), axes


def _fixed_part(graph: Graph, equation: Any, x: Value, starts: np.ndarray) -> Value:
    """A gather of one part at a place that is known: a slice."""
    params = equation.params
    dims, sizes = params["dimension_numbers"], params["slice_sizes"]
    cuts: dict[int, int] = dict(zip(dims.start_index_map, starts.tolist(), strict=True))
    lists: list[list[int]] = [[], [], []]
    for axis, start in cuts.items():
        first = min(max(start, 0), x.shape[axis] - sizes[axis])
        if first != start:
            raise UnwritableError("a part outside of its array")
        for numbers, number in zip(lists, (start, start + sizes[axis], axis), strict=True):
            numbers.append(number)
    name = graph.add("Slice", [graph.tensor(x), *(graph.integers(n) for n in lists)])
    if dims.collapsed_slice_dims:
        name = graph.add("Squeeze", [name, graph.integers(dims.collapsed_slice_dims)])
    return graph.value(name, equation.outvars[0].aval)
