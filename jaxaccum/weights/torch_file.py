"""Weights out of .pt and .safetensors files, without PyTorch and without running what is in them.

A .pt file is a zip archive: a pickle that describes objects, see `torch_pickle`, and the raw bytes
of the tensors. What is read of a file is bounded by its size.
"""

from __future__ import annotations

import math
import os
import re
import stat
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxaccum.data.texts import shown, shown_path
from jaxaccum.weights.torch_pickle import (
    DTYPES,
    MAX_PICKLE,
    Global,
    Record,
    Storage,
    Tensor,
    unpickle,
    word_of,
)
from jaxaccum.weights.transfer import Weights, WeightsError, names_from

__all__ = ["Archive", "Global", "Record", "Storage", "Tensor", "read", "unpickle", "without_prefix"]

_MAX_MODULES = 100_000
_MAX_VISITS = 200_000  # of entries of modules
_MAX_DEPTH = 100
_MAX_KEY = 1000
# What a damaged archive or header provokes in the libraries that read them; among them
# NotImplementedError (packed in a way unknown here) and UnicodeDecodeError.
_DAMAGE = (
    zipfile.BadZipFile, SafetensorError, OSError, RuntimeError, EOFError, ValueError, TypeError,
    LookupError, ArithmeticError, struct.error, MemoryError,
)  # fmt: skip


def read(path: Path) -> Weights:
    """The weights in a file of PyTorch (.pt, zip format) or safetensors.

    Of a training checkpoint the weight average is taken, else the model. Floating values come as
    float32, others as they are.

    Raises:
      WeightsError: it cannot be read, or asks for something that weights do not need.
    """
    name = shown_path(path)
    start = _start(path)
    try:
        if start[:4] == b"PK\x03\x04":
            return _read_zip(path)
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
    except WeightsError as error:
        raise WeightsError(f"{name}: {error}") from None
    except _DAMAGE as error:
        raise WeightsError(f"{name} is damaged or cut short: {str(error)[:200]}") from error
    # Before the zip format (PyTorch 1.6): a tar archive, or a pickled magic number.
    if start[2:14] == b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19" or b"ustar" in _peek(path, 257, 5):
        raise WeightsError(
            f"{name} is in PyTorch's format of before version 1.6: load it in PyTorch and save its "
            "state dict again with torch.save, or as safetensors"
        )
    raise WeightsError(f"{name} is neither a .pt file of PyTorch 1.6 or later nor .safetensors")


def _start(path: Path) -> bytes:
    """The first bytes of a regular file; of a pipe one would wait for ever."""
    name = shown_path(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            kind = "a folder" if path.is_dir() else "a pipe or a device"
            raise WeightsError(f"{name}: {kind}, expected a file of weights")
        return _peek(path, 0, 16)
    except OSError as error:
        raise WeightsError(f"cannot read {name}: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"cannot read {name}: {error}") from None  # a NUL in the path


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
                value = file.get_tensor(key)
            except (TypeError, AttributeError):
                value = np.zeros(0, object)
            except (ValueError, OverflowError) as error:  # a shape of 0 times too much
                raise WeightsError(f"{shown(key)} is damaged: {error}") from None
            if value.dtype.kind not in "biuf" and value.dtype != ml_dtypes.bfloat16:
                kind = file.get_slice(key).get_dtype()
                raise WeightsError(f"{shown(key)} holds {kind}, which is not supported")
            state[key] = _plain(value)
    size = facts.get("image_size", "")
    return Weights(
        without_prefix(state), names_from(facts.get("names")), facts.get("model", "")[:100],
        f"{shown_path(path.name)}, a state dict",
        int(size) if re.fullmatch("[0-9]{1,6}", size) else None,
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
        file_name = shown_path(path.name)
        origin = f"{file_name}, a state dict"
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
                    root, origin = root[key], f"{file_name}, {words}"
                    break
        facts: Mapping[str, Any] = {}
        found: list[tuple[str, Tensor]] = []
        if isinstance(root, Record):
            facts, found = root.state, list(_module_tensors(root))
        elif isinstance(root, dict):
            found = [(_named(k), v) for k, v in root.items() if isinstance(v, Tensor)]
        if not found:
            raise WeightsError("it holds no weights: no module and no state dict was found in it")
        state = dict[str, np.ndarray]()
        for key, value in found:
            if key in state:
                raise WeightsError(f"two of its tensors are called {shown(key)}")
            state[key] = archive.array(value)
    yaml = facts.get("yaml")
    size = train_args.get("imgsz") if isinstance(train_args, dict) else None
    return Weights(
        without_prefix(state), names_from(facts.get("names")),
        _model_words(yaml if isinstance(yaml, dict) else {}), origin,
        size if type(size) is int and 0 < size < 10**6 else None,
    )  # fmt: skip


def _model_words(yaml: Mapping[str, Any]) -> str:
    """What the description of a network calls itself: "yolo11n", "yolov8-p2 s", or ""."""
    file, scale = (yaml.get(key) for key in ("yaml_file", "scale"))
    # Cut: it is only shown, and says nothing if it is longer than a name.
    stem = (
        re.split(r"[/\\]", file[-1000:])[-1].removesuffix(".yaml") if isinstance(file, str) else ""
    )
    return f"{stem[:100]} {scale[:100]}".strip() if isinstance(scale, str) else stem[:100]


def _module_tensors(root: Record) -> Iterator[tuple[str, Tensor]]:
    """The state dict of a module, in its order. Modules may share what they hold, so that a small
    file can describe more than there is memory for: all that is looked at is counted."""
    waiting: list[tuple[str, Any, int]] = [("", root, 0)]
    modules = visits = 0
    while waiting:
        prefix, module, depth = waiting.pop()
        modules += 1
        if not isinstance(module, Record):
            raise WeightsError(f"{shown(prefix[:-1])} is not a module")
        state = module.state
        hidden = state.get("_non_persistent_buffers_set")
        hidden = hidden if isinstance(hidden, (set, frozenset, list, tuple)) else ()
        children = _mapping(state.get("_modules"))
        groups = {g: _mapping(state.get(g)) for g in ("_parameters", "_buffers")}
        visits += len(hidden) + len(children) + sum(map(len, groups.values()))
        if depth > _MAX_DEPTH or modules > _MAX_MODULES or visits > _MAX_VISITS:
            raise WeightsError(
                f"its modules are nested without end: deeper than {_MAX_DEPTH}, more than "
                f"{_MAX_MODULES:,} or with more than {_MAX_VISITS:,} entries, the limits"
            )
        skipped = {name for name in hidden if isinstance(name, str)}
        for group, values in groups.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and not (group == "_buffers" and name in skipped):
                    yield _named(name, prefix), value
        waiting.extend(
            (f"{_named(name, prefix)}.", child, depth + 1)
            for name, child in reversed(list(children.items()))
            if child is not None
        )


def _named(name: Any, prefix: str = "") -> str:
    """The key of a tensor or module."""
    word = word_of(name)
    if len(prefix) + len(word) > _MAX_KEY:
        raise WeightsError(
            f"a name in it, {shown(prefix + word[:100])}, has more than {_MAX_KEY} characters, "
            "the limit"
        )
    return prefix + word


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
        listed = self._file.infolist()
        members = {member.filename: member for member in listed}
        if len(members) < len(listed):
            raise WeightsError("it was not written by torch.save: two members have one name")
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
        if packed or sum(m.file_size for m in listed) > size:
            raise WeightsError(
                "it was not written by torch.save: its members are packed or overlap (the limit "
                f"is the file's {size:,} bytes)"
            )
        if members[pickles[0]].file_size > MAX_PICKLE:
            raise WeightsError(
                f"its pickle has {members[pickles[0]].file_size:,} bytes, expected at most "
                f"{MAX_PICKLE:,}"
            )
        self._members = members
        # Bytes of tensors, views of views included: those of half precision take twice theirs.
        self._budget = self._limit = 8 * size + 2**22
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
        dtype = DTYPES[storage.dtype]
        count = math.prod(tensor.shape)
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
        if count and tensor.offset + last >= storage.size:
            raise WeightsError(
                f"a tensor of shape {tensor.shape} reaches beyond its storage {storage.key!r} of "
                f"{storage.size} elements"
            )
        self._budget -= count * max(dtype.itemsize, 4) + 200
        if self._budget < 0:
            raise WeightsError(
                f"its tensors together are far larger than the file: over {self._limit:,} bytes, "
                "the limit"
            )
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
