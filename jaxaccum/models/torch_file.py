"""Weights out of .pt and .safetensors files, without PyTorch and without running what is in them.

A .pt file is a zip archive: a pickle that describes objects, and the raw bytes of the tensors. A
pickle is a program, and Python's own `pickle` carries out whatever it calls. The small machine
here instead builds descriptions: an object becomes a `Record`, a tensor a `Tensor`, the few calls
that describe these are functions of this file, and a file that names anything else is refused.
"""

from __future__ import annotations

import dataclasses
import math
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxaccum.models.weights import Weights, WeightsError, names_from

_MAX_PICKLE = 64 * 2**20
_MAX_MODULES = 100_000
_MAX_DEPTH = 100
_MAX_KEY = 1000

_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(name)
    for name in ("float16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32",
                 "int64", "uint16", "uint32", "uint64")
}  # fmt: skip
_DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
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
    *(f"torch.{name}" for name in _DTYPES),
    *_STORAGES,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Global:
    """A name that a pickle asked for; nothing was imported."""

    name: str


@dataclasses.dataclass(eq=False, repr=False)
class Record:
    """The description of an object.

    Attributes:
      kind: its class, as a dotted name.
      args: what it was made from.
      state: its attributes.
      items: what it holds, if its class is a container.
    """

    kind: str
    args: tuple
    state: dict[str, Any] = dataclasses.field(default_factory=dict)
    items: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Storage:
    """Raw elements: the archive's member data/KEY, `size` of a dtype."""

    key: str
    dtype: str
    size: int


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A strided view of a storage; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(path: Path) -> Weights:
    """The weights in a file of PyTorch (.pt, zip format) or safetensors.

    Of a training checkpoint the weight average is taken, else the model. Floating values come as
    float32, others as they are.

    Raises:
      WeightsError: it cannot be read, or asks for something that weights do not need.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from None
    try:
        if start[:4] == b"PK\x03\x04":
            return _read_zip(path)
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except (zipfile.BadZipFile, SafetensorError, OSError, RuntimeError, EOFError) as error:
        raise WeightsError(f"{path} is damaged or cut short: {error}") from error
    # Before the zip format (PyTorch 1.6): a tar archive, or a pickled magic number.
    if start[2:14] == b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19" or b"ustar" in _peek(path, 257, 5):
        raise WeightsError(
            f"{path} is in PyTorch's format of before version 1.6: load it in PyTorch and save its "
            "state dict again with torch.save, or as safetensors"
        )
    raise WeightsError(f"{path} is neither a .pt file of PyTorch 1.6 or later nor .safetensors")


def _peek(path: Path, at: int, count: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(at)
        return file.read(count)


def _read_safetensors(path: Path) -> Weights:
    with safe_open(path, framework="numpy") as file:
        facts: dict[str, str] = file.metadata() or {}
        state = {}
        for key in file.keys():  # noqa: SIM118 not a mapping
            try:
                state[key] = _plain(file.get_tensor(key))
            except (TypeError, AttributeError):
                kind = file.get_slice(key).get_dtype()
                raise WeightsError(f"{key!r} holds {kind}, which is not supported") from None
    size = facts.get("image_size", "")
    return Weights(
        without_prefix(state), names_from(facts.get("names")), facts.get("model", ""),
        f"{path.name}, a state dict", int(size) if size.isdecimal() else None,
    )  # fmt: skip


def _plain(value: np.ndarray) -> np.ndarray:
    """A contiguous copy, float32 if it is of a floating type."""
    floating = value.dtype.kind == "f" or value.dtype == ml_dtypes.bfloat16
    return np.array(value, np.float32 if floating else value.dtype, order="C")


def without_prefix(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Keys without the wrappers that training put around the model.

    A detector's go from "model.0." on, where all have the same before that; a completion network's
    lose every "module.", as where its authors load them.
    """
    plain = {key.replace("module.", ""): value for key, value in state.items()}
    if any(key.startswith("base_model.") for key in plain):
        return plain
    found = next((m for m in map(re.compile(r"(.+\.)model\.0\.").match, state) if m), None)
    if found is None or not all(key.startswith(found[1]) for key in state):
        return state
    return {key.removeprefix(found[1]): value for key, value in state.items()}


def _read_zip(path: Path) -> Weights:
    with Archive(path) as archive:
        root = archive.load()
        origin = f"{path.name}, a state dict"
        train_args: Any = None
        if isinstance(root, dict):
            train_args = root.get("train_args")
            for key, words in {
                "base_model": "the model of a checkpoint",
                "ema": "the weight average of a training checkpoint",
                "model": "the model of a checkpoint",
                "state_dict": "the state dict of a checkpoint",
            }.items():
                if isinstance(root.get(key), (dict, Record)):
                    root, origin = root[key], f"{path.name}, {words}"
                    break
        if isinstance(root, Record):
            facts, tensors = root.state, dict(_module_tensors(root))
        elif isinstance(root, dict):
            facts, tensors = {}, {k: v for k, v in root.items() if isinstance(v, Tensor)}
        else:
            facts, tensors = {}, {}
        if not tensors:
            raise WeightsError("it holds no weights: no module and no state dict was found in it")
        state = {_word(key): archive.array(value) for key, value in tensors.items()}
    yaml = facts.get("yaml")
    size = train_args.get("imgsz") if isinstance(train_args, dict) else None
    return Weights(
        without_prefix(state), names_from(facts.get("names")),
        _model_words(yaml if isinstance(yaml, dict) else {}), origin,
        size if type(size) is int else None,
    )  # fmt: skip


def _model_words(yaml: Mapping[str, Any]) -> str:
    """What the description of a network calls itself: "yolo11n", "yolov8-p2 s", or ""."""
    file, scale = (yaml.get(key) for key in ("yaml_file", "scale"))
    stem = re.split(r"[/\\]", file)[-1].removesuffix(".yaml") if isinstance(file, str) else ""
    return f"{stem} {scale}".strip() if isinstance(scale, str) else stem


def _module_tensors(root: Record) -> Iterator[tuple[str, Tensor]]:
    """The state dict of a module, in its order."""
    waiting: list[tuple[str, Any, int]] = [("", root, 0)]
    seen = 0
    while waiting:
        prefix, module, depth = waiting.pop()
        seen += 1
        if depth > _MAX_DEPTH or seen > _MAX_MODULES or len(prefix) > _MAX_KEY:
            raise WeightsError("its modules are nested without end")
        if not isinstance(module, Record):
            raise WeightsError(f"{prefix[:-1]!r} is not a module")
        state = module.state
        skipped = state.get("_non_persistent_buffers_set")
        skipped = skipped if isinstance(skipped, (set, frozenset, list, tuple)) else ()
        for group in ("_parameters", "_buffers"):
            for name, value in _mapping(state.get(group)).items():
                if isinstance(value, Tensor) and not (group == "_buffers" and name in skipped):
                    yield f"{prefix}{_word(name)}", value
        children = [
            (f"{prefix}{_word(name)}.", child, depth + 1)
            for name, child in _mapping(state.get("_modules")).items()
            if child is not None
        ]
        waiting.extend(reversed(children))


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, dict) else {}


class Archive:
    """A zip file written by torch.save; a context manager."""

    def __init__(self, path: Path):
        self._file = zipfile.ZipFile(path)
        try:
            self._open(path)
        except BaseException:
            self._file.close()
            raise

    def _open(self, path: Path) -> None:
        members = {member.filename: member for member in self._file.infolist()}
        pickles = [name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise WeightsError("it is a zip archive, but not one of torch.save (no data.pkl)")
        self._prefix = pickles[0].removesuffix("data.pkl")
        if f"{self._prefix}constants.pkl" in members:
            raise WeightsError(
                "it is a TorchScript program, not weights: save the state dict instead"
            )
        # torch.save stores without compression, so what is read is never larger than the file.
        size = path.stat().st_size
        packed = [m.filename for m in members.values() if m.compress_type != zipfile.ZIP_STORED]
        if packed or sum(m.file_size for m in members.values()) > size:
            raise WeightsError(
                "it was not written by torch.save: its members are packed or overlap"
            )
        if members[pickles[0]].file_size > _MAX_PICKLE:
            raise WeightsError(f"its pickle is larger than {_MAX_PICKLE // 2**20} MiB")
        self._members = members
        self._budget = 4 * size + 2**20  # elements that may be read, views of views included
        order = f"{self._prefix}byteorder"
        self._big = order in members and self._file.read(order).strip() == b"big"
        self._cache: dict[str, bytes] = {}

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def load(self) -> Any:
        """What was saved, as plain values, records and tensors."""
        return unpickle(self._file.read(f"{self._prefix}data.pkl"))

    def array(self, tensor: Tensor) -> np.ndarray:
        """The values of a tensor."""
        storage = tensor.storage
        dtype = _DTYPES[storage.dtype]
        count = math.prod(tensor.shape)
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
        if count and tensor.offset + last >= storage.size:
            raise WeightsError(
                f"a tensor of shape {tensor.shape} reaches beyond its storage {storage.key!r} of "
                f"{storage.size} elements"
            )
        self._budget -= count
        if self._budget < 0:
            raise WeightsError("its tensors together are far larger than the file")
        raw = self._bytes(storage.key)
        if len(raw) < storage.size * dtype.itemsize:
            raise WeightsError(
                f"storage {storage.key!r} holds {len(raw)} bytes and should hold "
                f"{storage.size * dtype.itemsize}"
            )
        if not count:
            return _plain(np.zeros(tensor.shape, dtype))
        flat = np.frombuffer(raw, dtype, storage.size)
        view = np.lib.stride_tricks.as_strided(
            flat[tensor.offset :], tensor.shape, [s * dtype.itemsize for s in tensor.strides],
            writeable=False,
        )  # fmt: skip
        return _plain(view.byteswap() if self._big else view)

    def _bytes(self, key: str) -> bytes:
        if key not in self._cache:
            name = f"{self._prefix}data/{key}"
            if name not in self._members:
                raise WeightsError(f"it has no storage {key!r}")
            self._cache[key] = self._file.read(name)
        return self._cache[key]


def _view(storage, offset, shape, strides) -> Tensor:
    shape, strides = tuple(shape), tuple(strides)
    numbers = (offset, *shape, *strides)
    if (
        not isinstance(storage, Storage)
        or len(shape) != len(strides)
        or len(shape) > 32
        or any(type(n) is not int or not 0 <= n < 2**48 for n in numbers)
    ):
        raise WeightsError("a tensor is not described as PyTorch describes one")
    return Tensor(storage, offset, shape, strides)


def _tensor(storage, offset, shape, strides, *_) -> Tensor:
    return _view(storage, offset, shape, strides)


def _tensor_of_dtype(storage, offset, shape, strides, grad, hooks, dtype, *_) -> Tensor:
    name = dtype.name.removeprefix("torch.") if isinstance(dtype, Global) else ""
    if name not in _DTYPES or not isinstance(storage, Storage) or storage.dtype != "uint8":
        raise WeightsError(f"a tensor has the dtype {name or 'unknown'}, which is not supported")
    size = storage.size // _DTYPES[name].itemsize
    return _view(Storage(storage.key, name, size), offset, shape, strides)


def _parameter(data, *_) -> Tensor:
    if not isinstance(data, Tensor):
        raise WeightsError("a parameter holds no tensor")
    return data


def _tensor_subclass(rebuild, kind, args, *_) -> Tensor:
    if not isinstance(rebuild, Global) or rebuild.name not in _TENSOR_CALLS:
        raise WeightsError("a tensor is not described as PyTorch describes one")
    function: Callable[..., Tensor] = _TENSOR_CALLS[rebuild.name]
    return function(*args)


def _ordered_dict(pairs=()) -> dict:
    return {_hashable(key): value for key, value in pairs}


def _encode(text, encoding="latin1") -> bytes:
    return _word(text).encode("utf-8" if encoding in ("utf-8", "utf8") else "latin1")


def _number(dtype, data=b"") -> Any:
    """A numpy scalar as a plain number."""
    code = _word(dtype.args[0]) if isinstance(dtype, Record) and dtype.args else ""
    state: Any = dtype.state.get("state", ()) if isinstance(dtype, Record) else ()
    if not re.fullmatch(r"[fiu][1248]|b1", code) or not isinstance(data, bytes):
        return None
    order = ">" if len(state) > 1 and state[1] == ">" else "<"
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
    "torch.Size": lambda values=(): tuple(values),
    "torch.device": lambda *words: ":".join(map(_word, words)),
    "collections.OrderedDict": _ordered_dict,
    "_codecs.encode": _encode,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
}
for _module in ("builtins", "__builtin__"):
    _CALLS[f"{_module}.set"] = lambda values=(): {_hashable(v) for v in values}
    _CALLS[f"{_module}.frozenset"] = lambda values=(): frozenset(_hashable(v) for v in values)
for _module in ("pathlib", "pathlib._local"):
    for _name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath",
                  "PureWindowsPath"):  # fmt: skip
        _CALLS[f"{_module}.{_name}"] = lambda *parts: "/".join(map(_word, parts))


def _refusal(name: str) -> WeightsError:
    return WeightsError(
        f"refused: the file asks for {name!r}, which weights do not need and which could run "
        "anything. Nothing of the file was run. If you trust it, load it where it was made and "
        "save its state dict as safetensors"
    )


def _global(module: Any, name: Any) -> Global:
    full = f"{_word(module)}.{_word(name)}"
    if name.isidentifier() and (
        full in _CALLS or full in _INERT or full.startswith(_INERT_PREFIXES)
    ):
        return Global(full)
    raise _refusal(full)


def _word(value: Any) -> str:
    """A string or number as a string. Not str(): nested values can take for ever to print."""
    if isinstance(value, (str, int)):
        return str(value)
    raise WeightsError(f"its pickle has a {type(value).__name__} in the place of a name")


def _hashable(key: Any) -> Any:
    """A key of a dict or member of a set; tuples one level deep, since hashes are recursive."""
    plain = (str, int, float, bool, bytes, type(None), Global, Record, Tensor)
    if isinstance(key, plain) or (type(key) is tuple and all(isinstance(k, plain) for k in key)):
        return key
    raise WeightsError(f"its pickle uses a {type(key).__name__} as a key")


def _call(function: Any, args: Any) -> Any:
    if not isinstance(function, Global) or not isinstance(args, tuple):
        raise WeightsError("its pickle calls something that is not a name")
    if function.name in _CALLS:
        return _CALLS[function.name](*args)
    return Record(function.name, args)


def _build(target: Any, state: Any) -> None:
    """Sets the attributes of a record; no method of anything is called."""
    if isinstance(target, Record):
        parts = state if type(state) is tuple and len(state) == 2 else (state,)
        if all(part is None or isinstance(part, dict) for part in parts):
            for part in parts:
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
        or type(identity[4]) is not int
        or identity[4] < 0
    ):
        raise WeightsError("a storage is not described as PyTorch describes one")
    return Storage(identity[2], _STORAGES[identity[1].name], identity[4])


def unpickle(data: bytes) -> Any:
    """What a pickle describes: plain values, `Record`, `Tensor`, `Storage` and `Global`.

    Raises:
      WeightsError: it is damaged, or names something that is not admitted.
    """
    try:
        return _run(data)
    except WeightsError:
        raise
    # Whatever else a crafted pickle provokes is an error in it.
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise WeightsError(f"its pickle is damaged: {error}") from error


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
    """The pickle machine: a stack, marks on it, and a memo."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        mark = marks.pop()
        values = stack[mark:]
        del stack[mark:]
        return values

    def pop(count: int) -> list[Any]:
        if count > len(stack) - (marks[-1] if marks else 0):
            raise WeightsError("its pickle is damaged: it takes more than it put")
        values = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return values

    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        name: str = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name in _VALUES:
            stack.append(argument)
        elif name in _MAKERS:
            stack.append(_MAKERS[name]())
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(argument)])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "POP_MARK":
            since_mark()
        elif name == "POP":
            pop(1)
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(pop(int(name[-1]))))
        elif name == "LIST":
            stack.append(since_mark())
        elif name == "FROZENSET":
            stack.append(frozenset(map(_hashable, since_mark())))
        elif name == "DICT":
            values = since_mark()
            stack.append({})
            _set_items(stack[-1], values)
        elif name in ("SETITEM", "SETITEMS"):
            values = pop(2) if name == "SETITEM" else since_mark()
            _set_items(stack[-1], values)
        elif name in ("APPEND", "APPENDS"):
            values = pop(1) if name == "APPEND" else since_mark()
            _append(stack[-1], values)
        elif name == "ADDITEMS":
            values = since_mark()
            if not isinstance(stack[-1], set):
                raise WeightsError("its pickle is damaged: it adds members to what is no set")
            stack[-1].update(map(_hashable, values))
        elif name == "GLOBAL":
            stack.append(_global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(_global(*pop(2)))
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(_call(*pop(2)))
        elif name == "NEWOBJ_EX":
            kind, args, options = pop(3)
            if options:
                raise WeightsError("its pickle makes an object from named arguments")
            stack.append(_call(kind, args))
        elif name == "INST":
            stack.append(_call(_global(*argument.split(" ", 1)), tuple(since_mark())))
        elif name == "OBJ":
            kind, *rest = since_mark()
            stack.append(_call(kind, tuple(rest)))
        elif name == "BUILD":
            (state,) = pop(1)
            _build(stack[-1], state)
        elif name == "BINPERSID":
            stack.append(_storage(pop(1)[0]))
        elif name == "STOP":
            return stack.pop()
        else:
            raise WeightsError(
                f"its pickle has the instruction {name}, which torch.save never uses"
            )
    raise WeightsError("its pickle is cut short")


def _set_items(target: Any, values: list[Any]) -> None:
    pairs = zip(map(_hashable, values[::2]), values[1::2], strict=True)
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
