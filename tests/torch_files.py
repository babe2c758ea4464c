"""Writes files as torch.save does, opcode by opcode, without PyTorch."""

from __future__ import annotations

import dataclasses
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

STORAGE = {
    "float16": "HalfStorage", "float32": "FloatStorage", "float64": "DoubleStorage",
    "int64": "LongStorage", "bfloat16": "BFloat16Storage",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Name:
    """A global."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    """A REDUCE."""

    function: Any
    args: tuple


@dataclasses.dataclass(eq=False)
class New:
    """An object made by NEWOBJ and BUILD."""

    kind: Name
    state: Any


@dataclasses.dataclass(frozen=True)
class Persistent:
    identity: tuple


@dataclasses.dataclass(frozen=True)
class Raw:
    """Opcodes as they are."""

    code: bytes


class TorchFile:
    """Writes what torch.save writes: a zip with data.pkl and the storages."""

    def __init__(self):
        self.storages: list[bytes] = []

    def storage(self, values: np.ndarray, dtype: str = "") -> Persistent:
        self.storages.append(values.tobytes())
        kind = Name("torch", STORAGE[dtype or values.dtype.name])
        return Persistent(("storage", kind, str(len(self.storages) - 1), "cpu", values.size))

    def view(self, storage, offset, shape, strides) -> Call:
        hooks = Call(Name("collections", "OrderedDict"), ())
        return Call(
            Name("torch._utils", "_rebuild_tensor_v2"),
            (storage, offset, tuple(shape), tuple(strides), False, hooks),
        )

    def tensor(self, values: np.ndarray) -> Call:
        values = np.ascontiguousarray(values)
        strides = [s // values.itemsize for s in values.strides]
        return self.view(self.storage(values), 0, values.shape, strides)

    def parameter(self, values: np.ndarray) -> Call:
        hooks = Call(Name("collections", "OrderedDict"), ())
        return Call(Name("torch._utils", "_rebuild_parameter"), (self.tensor(values), True, hooks))

    def module(self, state: dict[str, np.ndarray], kind=("ultralytics.nn.tasks", "DetectionModel"),
               **more) -> New:  # fmt: skip
        """The module whose state dict that is."""
        own: dict[str, Any] = {"_parameters": {}, "_buffers": {}, "_modules": {}}
        children: dict[str, dict[str, np.ndarray]] = {}
        for key, value in state.items():
            head, dot, rest = key.partition(".")
            if dot:
                children.setdefault(head, {})[rest] = value
            elif head.startswith(("running_", "num_batches")):
                own["_buffers"][head] = self.tensor(value)
            else:
                own["_parameters"][head] = self.parameter(value)
        for name, child in children.items():
            own["_modules"][name] = self.module(child, ("torch.nn.modules.module", "Module"))
        own["_non_persistent_buffers_set"] = Call(Name("__builtin__", "set"), ([],))
        return New(Name(*kind), {"training": False, **own, **more})

    def write(self, path: Path, root: Any, **members: bytes) -> Path:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", dumps(root))
            file.writestr("archive/byteorder", "little")
            for i, data in enumerate(self.storages):
                file.writestr(f"archive/data/{i}", data)
            file.writestr("archive/version", "3\n")
            for name, data in members.items():
                file.writestr(f"archive/{name}", data)
        return path


def dumps(value: Any) -> bytes:
    return b"\x80\x02" + opcodes(value) + b"."


def opcodes(value: Any) -> bytes:
    if isinstance(value, Raw):
        return value.code
    if isinstance(value, Name):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, Call):
        return opcodes(value.function) + opcodes(value.args) + b"R"
    if isinstance(value, New):
        return opcodes(value.kind) + b")\x81" + opcodes(value.state) + b"b"
    if isinstance(value, Persistent):
        return opcodes(value.identity) + b"Q"
    if isinstance(value, dict):
        pairs = (opcodes(k) + opcodes(v) for k, v in value.items())
        return b"}(" + b"".join(pairs) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(opcodes, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(opcodes, value)) + b"t"
    return pickle.dumps(value, 2)[2:-1]


def numpy_scalar(value: float) -> Call:
    dtype = New(Name("numpy", "dtype"), (3, "<", None, None, None, -1, -1, 0))
    made = Raw(opcodes(Call(dtype.kind, ("f8", False, True))) + opcodes(dtype.state) + b"b")
    text = struct.pack("<d", value).decode("latin1")
    data = Call(Name("_codecs", "encode"), (text, "latin1"))
    return Call(Name("numpy._core.multiarray", "scalar"), (made, data))
