"""The pickle inside a .pt file, read without running what is in it and within bounded memory.

A pickle is a program, and Python's own `pickle` carries out whatever it calls. The small machine
here instead builds descriptions: an object becomes a `Record`, a tensor a `Tensor`, the few calls
that describe these are functions of this file, and a file that names anything else is refused.
A program of a few bytes can also copy without end; what this one makes is counted, see `Budget`.
"""

from __future__ import annotations

import math
import pickletools
import re
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from jaxaccum.weights.pickle_parts import ENTRY, Budget, Global, Record, Storage, Tensor
from jaxaccum.weights.transfer import WeightsError

MAX_PICKLE = 16 * 2**20  # bytes; the pickle of a large training checkpoint has one MiB
_OPCODE = 64  # bytes counted for an instruction
_NAME = 1000  # most characters of a name

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(name)
    for name in ("float16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32",
                 "int64", "uint16", "uint32", "uint64")
}  # fmt: skip
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
_STORAGES = {
    "torch.HalfStorage": "float16", "torch.BFloat16Storage": "bfloat16",
    "torch.FloatStorage": "float32", "torch.DoubleStorage": "float64",
    "torch.BoolStorage": "bool", "torch.ByteStorage": "uint8", "torch.CharStorage": "int8",
    "torch.ShortStorage": "int16", "torch.IntStorage": "int32", "torch.LongStorage": "int64",
    "torch.UntypedStorage": "uint8", "torch.storage.UntypedStorage": "uint8",
}  # fmt: skip

# Classes whose objects are kept as descriptions; none of their code is known here.
_INERT_PREFIXES = ("ultralytics.", "torch.nn.")
_INERT = {
    "argparse.Namespace", "collections.defaultdict", "datetime.date", "datetime.datetime",
    "datetime.timedelta", "datetime.timezone", "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct", "numpy.dtype", "numpy.ndarray", "torch.Tensor",
    "types.SimpleNamespace", "utils.metrics.Metrics",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__")
      for name in ("bool", "dict", "float", "int", "list", "str", "tuple")),
    *(f"torch.{name}" for name in DTYPES),
    *_STORAGES,
}  # fmt: skip


def _view(storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
    sized = all(isinstance(v, (tuple, list)) and len(v) <= 32 for v in (shape, strides))
    numbers = (offset, *shape, *strides) if sized else (None,)
    if (
        not isinstance(storage, Storage)
        or len(shape) != len(strides)
        or any(type(n) is not int or not 0 <= n < 2**48 for n in numbers)
        # Also of a tensor without values, of which numpy multiplies the others.
        or math.prod(n for n in shape if n) >= 2**48
    ):
        raise WeightsError("a tensor is not described as PyTorch describes one")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _tensor(budget: Budget, storage, offset, shape, strides, *_) -> Tensor:
    budget.take(1000)
    return _view(storage, offset, shape, strides)


def _tensor_of_dtype(
    budget: Budget, storage, offset, shape, strides, grad, hooks, dtype, *_
) -> Tensor:
    budget.take(1000)
    name = dtype.name.removeprefix("torch.") if isinstance(dtype, Global) else ""
    if name not in DTYPES or not isinstance(storage, Storage) or storage.dtype != "uint8":
        raise WeightsError(f"a tensor has the dtype {name or 'unknown'}, which is not supported")
    size = storage.size // DTYPES[name].itemsize
    return _view(Storage(storage.key, name, size), offset, shape, strides)


def _parameter(budget: Budget, data, *_) -> Tensor:
    if not isinstance(data, Tensor):
        raise WeightsError("a parameter holds no tensor")
    return data


def _tensor_subclass(budget: Budget, rebuild, kind, args, *_) -> Tensor:
    if not isinstance(rebuild, Global) or rebuild.name not in _TENSOR_CALLS:
        raise WeightsError("a tensor is not described as PyTorch describes one")
    if not isinstance(args, tuple) or len(args) > 32:
        raise WeightsError("a tensor is not described as PyTorch describes one")
    function: Callable[..., Tensor] = _TENSOR_CALLS[rebuild.name]
    return function(budget, *args)


def _size(budget: Budget, values=()) -> tuple:
    if not isinstance(values, (tuple, list)):
        raise WeightsError(f"its pickle has a {type(values).__name__} in the place of a shape")
    budget.take(8 * len(values))
    return tuple(values)


def _joined(sign: str) -> Callable[..., str]:
    def join(budget: Budget, *words: Any) -> str:
        plain = [word_of(word) for word in words]
        # One wide character makes all of the others as wide.
        widest = max(map(_width, plain), default=1)
        budget.take(widest * sum(len(word) + 1 for word in plain))
        return sign.join(plain)

    return join


def _width(text: str) -> int:
    return 1 if text.isascii() else 4


def _ordered_dict(budget: Budget, pairs=()) -> dict:
    if not isinstance(pairs, (tuple, list)):
        raise WeightsError(f"its pickle has a {type(pairs).__name__} in the place of pairs")
    return {budget.key(key): value for key, value in pairs}


def _members(kind: Callable[..., Any]) -> Callable[..., Any]:
    def make(budget: Budget, values=()) -> Any:
        if not isinstance(values, (tuple, list, set, frozenset)):
            raise WeightsError(f"its pickle has a {type(values).__name__} in the place of members")
        return kind(map(budget.key, values))

    return make


def _encode(budget: Budget, text, encoding="latin1") -> bytes:
    word = word_of(text)
    budget.take(4 * len(word))
    return word.encode("utf-8" if encoding in ("utf-8", "utf8") else "latin1")


def _number(budget: Budget, dtype, data=b"") -> Any:
    """A numpy scalar as a plain number."""
    code = word_of(dtype.args[0]) if isinstance(dtype, Record) and dtype.args else ""
    state: Any = dtype.state.get("state", ()) if isinstance(dtype, Record) else ()
    if not re.fullmatch(r"[fiu][1248]|b1", code) or code == "f1" or not isinstance(data, bytes):
        return None
    order = ">" if isinstance(state, (tuple, list)) and len(state) > 1 and state[1] == ">" else "<"
    kind = np.dtype(order + code)
    return np.frombuffer(data, kind)[0].item() if len(data) == kind.itemsize else None


_TENSOR_CALLS: dict[str, Callable[..., Tensor]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
_CALLS: dict[str, Callable[..., Any]] = {
    **_TENSOR_CALLS,
    "torch._tensor._rebuild_from_type_v2": _tensor_subclass,
    "torch.Size": _size,
    "torch.device": _joined(":"),
    "collections.OrderedDict": _ordered_dict,
    "_codecs.encode": _encode,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
}
for _module in ("builtins", "__builtin__"):
    _CALLS[f"{_module}.set"] = _members(set)
    _CALLS[f"{_module}.frozenset"] = _members(frozenset)
for _module in ("pathlib", "pathlib._local"):
    for _class in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath",
                   "PureWindowsPath"):  # fmt: skip
        _CALLS[f"{_module}.{_class}"] = _joined("/")


def _refusal(name: str) -> WeightsError:
    return WeightsError(
        f"refused: the file asks for {name[:200]!r}, which weights do not need and which could run "
        "anything. Nothing of the file was run. If you trust it, load it where it was made and "
        "save its state dict as safetensors"
    )


def _global(budget: Budget, module: Any, name: Any) -> Global:
    words = word_of(module), word_of(name)
    if sum(map(len, words)) > _NAME:
        raise _refusal(words[0][:100] + "." + words[1][:100])
    full = ".".join(words)
    budget.take(sys.getsizeof(full))
    if words[1].isidentifier() and (
        full in _CALLS or full in _INERT or full.startswith(_INERT_PREFIXES)
    ):
        return Global(full)
    raise _refusal(full)


def word_of(value: Any) -> str:
    """A string or number as a string. Not str(): nested values can take for ever to print.

    Raises:
      WeightsError: it is something else, or a number of over 18 digits.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        if abs(value) < 10**18:
            return str(value)
        raise WeightsError("its pickle has a number of over 18 digits in the place of a name")
    raise WeightsError(f"its pickle has a {type(value).__name__} in the place of a name")


def _call(budget: Budget, function: Any, args: Any) -> Any:
    if not isinstance(function, Global) or not isinstance(args, tuple):
        raise WeightsError("its pickle calls something that is not a name")
    if function.name in _CALLS:
        budget.take(8 * len(args))
        return _CALLS[function.name](budget, *args)
    budget.take(400)
    return Record(function.name, args)


def _build(budget: Budget, target: Any, state: Any) -> None:
    """Sets the attributes of a record; no method of anything is called."""
    if isinstance(target, Record):
        parts = state if type(state) is tuple and len(state) == 2 else (state,)
        if all(part is None or isinstance(part, dict) for part in parts):
            for part in parts:
                budget.take(ENTRY * len(part or {}))
                target.state.update(part or {})
        else:
            target.state["state"] = state
    elif not isinstance(target, (dict, set)):  # attributes of a state dict say nothing we need
        raise WeightsError(f"its pickle sets attributes of a {type(target).__name__}")


def _storage(identity: Any) -> Storage:
    if (
        not isinstance(identity, tuple)
        or len(identity) != 5
        or identity[0] != "storage"
        or not isinstance(identity[1], Global)
        or identity[1].name not in _STORAGES
        or not isinstance(identity[2], str)
        or len(identity[2]) > _NAME
        or type(identity[4]) is not int
        or not 0 <= identity[4] < 2**48
    ):
        raise WeightsError("a storage is not described as PyTorch describes one")
    return Storage(identity[2], _STORAGES[identity[1].name], identity[4])


def unpickle(data: bytes) -> Any:
    """What a pickle describes: plain values, `Record`, `Tensor`, `Storage` and `Global`.

    Raises:
      WeightsError: it is damaged, names something that is not admitted, or makes more than a
        `Budget` of its size allows.
    """
    if len(data) > MAX_PICKLE:
        raise WeightsError(
            f"its pickle has {len(data):,} bytes, expected at most {MAX_PICKLE:,}: save the state "
            "dict alone, or as safetensors"
        )
    try:
        return _run(data)
    except WeightsError:
        raise
    # Whatever else a crafted pickle provokes is an error in it.
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, struct.error,
            MemoryError, RecursionError) as error:  # fmt: skip
        raise WeightsError(f"its pickle is damaged: {str(error)[:200]}") from error


# Opcodes whose argument is the value.
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
    "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_MAKERS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set,
}  # fmt: skip


def _run(data: bytes) -> Any:
    """What the instructions of a pickle leave behind."""
    machine = _Machine(len(data))
    for opcode, argument, _ in pickletools.genops(data):
        name: str = opcode.name
        machine.budget.take(_OPCODE)
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return machine.stack.pop()
        if not (
            machine.keeps(name, argument) or machine.collects(name) or machine.makes(name, argument)
        ):
            raise WeightsError(
                f"its pickle has the instruction {name}, which torch.save never uses"
            )
    raise WeightsError("its pickle is cut short")


class _Machine:
    """The pickle machine: a stack, marks on it, and a memo.

    Its instructions are in three groups; a method of a group follows one of it, or returns False.
    """

    def __init__(self, size: int) -> None:
        """Starts empty; size: bytes of the pickle."""
        self.stack: list[Any] = []
        self.budget = Budget(size)
        self._size = size
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def keeps(self, name: str, argument: Any) -> bool:
        """Plain values, the memo, and what only moves the stack."""
        stack = self.stack
        if name in _VALUES:
            self.budget.take(sys.getsizeof(argument))
            stack.append(argument)
        elif name in _MAKERS:
            stack.append(_MAKERS[name]())
            self.budget.take(sys.getsizeof(stack[-1]))
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memo[int(argument)])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._keep(int(argument))
        elif name == "MEMOIZE":
            self._keep(len(self._memo))
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name == "POP_MARK":
            self._since_mark()
        elif name == "POP":
            self._pop(1)
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            return False
        return True

    def collects(self, name: str) -> bool:
        """Tuples, lists, dicts and sets."""
        if name == "TUPLE":
            self.stack.append(tuple(self._since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            self.stack.append(tuple(self._pop(int(name[-1]))))
        elif name == "LIST":
            self.stack.append(self._since_mark())
        elif name == "FROZENSET":
            self.stack.append(frozenset(map(self.budget.key, self._since_mark())))
        elif name == "DICT":
            values = self._since_mark()
            self.stack.append({})
            _set_items(self.budget, self.stack[-1], values)
        elif name in ("SETITEM", "SETITEMS"):
            values = self._pop(2) if name == "SETITEM" else self._since_mark()
            _set_items(self.budget, self.stack[-1], values)
        elif name in ("APPEND", "APPENDS"):
            values = self._pop(1) if name == "APPEND" else self._since_mark()
            _append(self.stack[-1], values)
        elif name == "ADDITEMS":
            values = self._since_mark()
            if not isinstance(self.stack[-1], set):
                raise WeightsError("its pickle is damaged: it adds members to what is no set")
            self.stack[-1].update(map(self.budget.key, values))
        else:
            return False
        return True

    def makes(self, name: str, argument: Any) -> bool:
        """Objects, of the few kinds that are admitted."""
        if name == "GLOBAL":
            self.stack.append(_global(self.budget, *argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            self.stack.append(_global(self.budget, *self._pop(2)))
        elif name in ("REDUCE", "NEWOBJ"):
            self.stack.append(_call(self.budget, *self._pop(2)))
        elif name == "NEWOBJ_EX":
            kind, args, options = self._pop(3)
            if options:
                raise WeightsError("its pickle makes an object from named arguments")
            self.stack.append(_call(self.budget, kind, args))
        elif name == "INST":
            kind = _global(self.budget, *argument.split(" ", 1))
            self.stack.append(_call(self.budget, kind, tuple(self._since_mark())))
        elif name == "OBJ":
            kind, *rest = self._since_mark()
            self.stack.append(_call(self.budget, kind, tuple(rest)))
        elif name == "BUILD":
            (state,) = self._pop(1)
            _build(self.budget, self.stack[-1], state)
        elif name == "BINPERSID":
            self.stack.append(_storage(self._pop(1)[0]))
            self.budget.take(200)
        else:
            return False
        return True

    def _since_mark(self) -> list[Any]:
        mark = self._marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        self.budget.take(16 * len(values))
        return values

    def _pop(self, count: int) -> list[Any]:
        if count > len(self.stack) - (self._marks[-1] if self._marks else 0):
            raise WeightsError("its pickle is damaged: it takes more than it put")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def _keep(self, place: int) -> None:
        if not 0 <= place < self._size:  # writers count; other numbers can be made to collide
            raise WeightsError("its pickle is damaged: a place in its memo beyond its length")
        self.budget.take(ENTRY)
        self._memo[place] = self.stack[-1]


def _set_items(budget: Budget, target: Any, values: Sequence[Any]) -> None:
    pairs = zip(map(budget.key, values[::2]), values[1::2], strict=True)
    if isinstance(target, dict):
        target.update(pairs)
    elif isinstance(target, Record):
        target.items.extend(pairs)
    else:
        raise WeightsError("its pickle is damaged: it sets items of what is no dict")


def _append(target: Any, values: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(values)
    elif isinstance(target, Record):
        target.items.extend(values)
    else:
        raise WeightsError("its pickle is damaged: it appends to what is no list")
