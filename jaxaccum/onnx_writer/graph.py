"""A graph of ONNX under construction, whose values are transposed and stretched only where needed.

JAX's networks are channels last and broadcast by operations of their own; ONNX's convolutions are
channels first, and its arithmetic broadcasts by itself. A `Value` therefore says how its tensor
lies (`order`) and along which axes it is stored once for all (`stretched`), and most transpositions
and copies are never written.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

OPSET = 18
IR_VERSION = 8
BATCH = "n"  # the dimension that any number of samples has
_LINEAR = re.compile(rf"(?:(\d+)\*)?{BATCH}(?: ([+-]) (\d+))?")


class UnwritableError(ValueError):
    """A program has an operation that has no form here."""


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """What an array of the JAX program is in the graph.

    Attributes:
      shape: as in the JAX program; a dimension is an integer or an expression of the batch.
      dtype: of its elements.
      name: of its tensor; "" of a constant or a convolution not yet written.
      constant: its values, axes as in `shape`.
      order: axis i of the tensor is axis order[i] of `shape`.
      stretched: axes of `shape` along which the tensor, or constant, has one element for all.
      narrow: what was stretched to this in axes of its own, if that is all that was done.
      convolution: a convolution whose kernel and bias may still take what is multiplied and added.
    """

    shape: tuple[Any, ...]
    dtype: np.dtype
    name: str = ""
    constant: np.ndarray | None = None
    order: tuple[int, ...] = ()
    stretched: frozenset[int] = frozenset()
    narrow: Value | None = None
    convolution: Convolution | None = None

    def __post_init__(self) -> None:
        if not self.order:
            object.__setattr__(self, "order", tuple(range(len(self.shape))))

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def static(self) -> bool:
        """Whether its shape holds nothing but numbers."""
        return all(isinstance(size, int) for size in self.shape)

    def whole(self) -> np.ndarray:
        """The elements of a constant of static shape."""
        assert self.constant is not None
        return np.broadcast_to(self.constant, self.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Convolution:
    """One that is not yet in the graph.

    Attributes:
      image: name of the tensor (N, C, ...).
      kernel: (features, C / groups, ...). bias: (features,).
      attributes: of the node.
    """

    image: str
    kernel: np.ndarray
    bias: np.ndarray
    attributes: dict[str, Any]

    def scaled(self, by: np.ndarray) -> Convolution:
        """Its result times `by`, of one or `features` elements."""
        by = np.broadcast_to(by, self.bias.shape)
        kernel = self.kernel * by.reshape(-1, *[1] * (self.kernel.ndim - 1))
        return dataclasses.replace(self, kernel=kernel, bias=self.bias * by)

    def shifted(self, by: np.ndarray) -> Convolution:
        """Its result plus `by`, of one or `features` elements."""
        return dataclasses.replace(self, bias=self.bias + by)


def constant(array: Any, dtype: Any = None) -> Value:
    """A value that is known while the graph is written."""
    array = np.asarray(array, dtype)
    return Value(array.shape, array.dtype, constant=array)


def element_type(dtype: Any) -> int:
    """ONNX's number of an element type."""
    try:
        return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    except KeyError as error:
        raise UnwritableError(f"ONNX has no elements of {np.dtype(dtype)}") from error


class Graph:
    """Nodes and constants; a body of a loop sees the names of the graph that it is in."""

    def __init__(self, outer: Graph | None = None) -> None:
        self.outer = outer
        self.nodes: list[onnx.NodeProto] = []
        self.scope: str = outer.scope if outer else ""
        self._numbers: Any = outer._numbers if outer else itertools.count()
        self.constants: dict[Any, onnx.TensorProto] = outer.constants if outer else {}
        self._made: dict[Any, str] = {}
        self._kept: list[Any] = []  # what the keys of _made are the identity of
        self._batch: str = outer._batch if outer else ""

    def name(self, kind: str) -> str:
        """A name that nothing else has."""
        return f"{self.scope}{'/' if self.scope else ''}{kind}_{next(self._numbers)}"

    def add(self, kind: str, inputs: Iterable[str], outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node; its output's name, or those of its outputs."""
        name = self.name(kind)
        made = [name if outputs == 1 else f"{name}:{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), made, name=name, **attributes))
        return made[0] if outputs == 1 else made

    def array(self, array: Any, dtype: Any = None) -> str:
        """The name of a constant tensor."""
        array = np.asarray(array, dtype, order="C")
        key = (array.shape, str(array.dtype), array.tobytes())
        if key not in self.constants:
            if array.dtype == np.dtype(object):
                raise UnwritableError("a constant of Python objects")
            self.constants[key] = numpy_helper.from_array(array, f"constant_{len(self.constants)}")
        return self.constants[key].name

    def integers(self, numbers: Iterable[int]) -> str:
        """The name of a constant vector of int64."""
        return self.array(np.asarray(list(numbers), np.int64))

    def counts(self, image: str) -> None:
        """Says that the first dimension of a tensor is the batch."""
        self._batch = self.add("Shape", [image], start=0, end=1)

    def sizes(self, shape: Sequence[Any]) -> str:
        """The name of a vector of int64 that holds a shape."""
        if all(isinstance(size, int) for size in shape):
            return self.integers(shape)
        return self.add("Concat", [self._size(size) for size in shape], axis=0)

    def _size(self, size: Any) -> str:
        if isinstance(size, int):
            return self.integers([size])
        if ("size", str(size)) in self._made:
            return self._made["size", str(size)]
        found = _LINEAR.fullmatch(str(size))
        if found is None or not self._batch:
            raise UnwritableError(f"a size of {size}")
        factor, sign, rest = found.groups()
        name = self._batch
        if factor:
            name = self.add("Mul", [name, self.integers([int(factor)])])
        if rest:
            name = self.add("Add" if sign == "+" else "Sub", [name, self.integers([int(rest)])])
        self._made["size", str(size)] = name
        return name

    def tensor(self, value: Value, order: Sequence[int] = (), whole: bool = True) -> str:
        """The name of a tensor with the elements of a value.

        Args:
          value: of the program.
          order: of its axes, as `Value.order`; the program's if it is not given.
          whole: along every axis; else those stretched stay at one element.
        """
        order = tuple(order) or tuple(range(value.rank))
        whole = whole and bool(value.stretched)
        key = (id(value), order, whole)
        graph: Graph | None = self
        while graph is not None:
            if key in graph._made:
                return graph._made[key]
            graph = graph.outer
        self._kept.append(value)
        self._made[key] = name = self._laid(value, order, whole)
        return name

    def _laid(self, value: Value, order: tuple[int, ...], whole: bool) -> str:
        if value.constant is not None:
            array = np.asarray(value.constant)
            if whole and value.static and math.prod(value.shape) < 2**16:
                return self.array(value.whole().transpose(order))
            name = self.array(array.transpose(order))
        elif order == value.order and not whole and value.convolution is None:
            return value.name
        elif order != value.order:
            name = self.tensor(value, value.order, whole=False)
            name = self.add("Transpose", [name], perm=[value.order.index(a) for a in order])
        elif value.convolution is not None:
            made = value.convolution
            name = self.add(
                "Conv",
                [made.image, self.array(made.kernel), self.array(made.bias)],
                **made.attributes,
            )
        else:
            name = value.name
        if whole:
            name = self.add("Expand", [name, self.sizes([value.shape[a] for a in order])])
        return name

    def value(self, name: str, like: Any, order: Sequence[int] = (), stretched=()) -> Value:
        """The value of a tensor. like: has its shape and dtype in the program."""
        return Value(
            tuple(like.shape), np.dtype(like.dtype), name, order=tuple(order),
            stretched=frozenset(stretched),
        )  # fmt: skip

    def reshaped(self, name: str, shape: Sequence[Any]) -> str:
        """A tensor with another shape."""
        unknown = [i for i, size in enumerate(shape) if not isinstance(size, int)]
        if len(unknown) == 1:
            known = [-1 if i == unknown[0] else size for i, size in enumerate(shape)]
            return self.add("Reshape", [name, self.integers(known)])
        return self.add("Reshape", [name, self.sizes(shape)])

    def pruned(self, wanted: Sequence[str]) -> list[onnx.NodeProto]:
        """The nodes that these tensors need."""
        needed, kept = set(wanted), []
        for node in reversed(self.nodes):
            if needed & set(node.output):
                kept.append(node)
                needed |= names_read([node])
        return kept[::-1]


def names_read(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Names of the tensors that nodes read, in the bodies of their loops, too."""
    names: set[str] = set()
    for node in nodes:
        names |= set(node.input)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                names |= {output.name for output in attribute.g.output}
                names |= names_read(attribute.g.node)
    return names


def info(name: str, shape: Sequence[Any], dtype: Any) -> onnx.ValueInfoProto:
    """The type of a tensor, whose unknown dimensions go by their expression."""
    sizes = [size if isinstance(size, int) else str(size) for size in shape]
    return helper.make_tensor_value_info(name, element_type(dtype), sizes)
