"""Files of weights as they come: damaged and contrived ones are read right, or refused by an error
that names the file, in memory and time bounded by their size, and nothing of them is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import time
import zipfile

import numpy as np
import pytest
from damaged_files import cases, damaged, memory_below
from torch_files import Call, Name, New, Raw, TorchFile, dumps, opcodes

from jaxaccum.weights import pickle_parts, torch_file
from jaxaccum.weights.transfer import WeightsError

ODD = Name("collections", "OrderedDict")


def small(file: TorchFile):
    """A checkpoint with what training checkpoints have: modules, sets, sizes, paths, dates."""
    state = {"0.weight": np.float32([[1, 2]]), "0.bias": np.float16([3]), "1.0.weight": np.ones(3)}
    return {
        "ema": file.module(state, names={0: "a", 1: "b"}, yaml={"yaml_file": "x/yolo11n.yaml"}),
        "sizes": Call(Name("torch", "Size"), ((1, 2),)),
        "path": Call(Name("pathlib", "PosixPath"), ("runs", "x")),
        "device": Call(Name("torch", "device"), ("cuda", 0)),
        "order": Call(ODD, ([("a", 1)],)),
        "set": Call(Name("builtins", "frozenset"), (["a", 3],)),
        "text": Call(Name("_codecs", "encode"), ("abc", "latin1")),
        "train_args": {"imgsz": 64},
    }


def archive(pickled: bytes, storages: list[bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        for i, data in enumerate(storages):
            file.writestr(f"archive/data/{i}", data)
    return buffer.getvalue()


def safetensors(header: bytes | dict, body: bytes) -> bytes:
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text)) + text + body


HEADER = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "__metadata__": {"names": '["x"]', "image_size": "64"},
}


def outcome(read, *given):
    """What it returns, or the error of ours; any other goes on."""
    try:
        return read(*given), None
    except WeightsError as error:
        return None, error


@pytest.mark.parametrize("kind", ["pickle", "zip", "safetensors"])
def test_damaged_weights_are_read_or_refused(tmp_path, kind):
    rng = np.random.default_rng(len(kind))
    torch = TorchFile()
    pickled = dumps(small(torch))
    # Also what a pickler of the newest protocol writes: other opcodes, frames, a memo.
    others = [pickled, pickle.dumps({"a": ({1, 2}, b"x" * 300, 1.5, -(2**70)), "b": [()] * 3}, 5)]
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pt")
    whole = {
        "pickle": pickled,
        "zip": archive(pickled, torch.storages),
        "safetensors": safetensors(HEADER, bytes(32)),
    }[kind]
    refused = 0
    with memory_below(100):
        for number in range(cases(300)):
            content = damaged(whole, rng, others[number % 2])
            path.write_bytes(archive(content, torch.storages) if kind == "pickle" else content)
            start = time.process_time()
            found, error = outcome(torch_file.read, path)
            assert time.process_time() - start < 10, content
            if error is None:
                assert found.state and all(v.dtype != object for v in found.state.values())
            else:
                refused += 1
                assert str(path) in str(error) and len(str(error)) < 1000, content
    assert refused > cases(300) // 10


# --- what small files can be made to do ---


def memo(number: int) -> bytes:
    return b"r" + struct.pack("<I", number)


def get(number: int) -> bytes:
    return b"j" + struct.pack("<I", number)


def plain(text: str) -> bytes:
    """A string that takes no place in the memo."""
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def products(call: Name, text: str = "a" * 1000) -> bytes:
    """Strings of ten times the one before, fifteen times."""
    code = plain(text) + memo(0)
    for n in range(15):
        code += opcodes(call) + b"(" + get(n) * 10 + b"tR" + memo(n + 1)
    return code


def copies(made: bytes, copy: bytes, count: int = 20_000) -> bytes:
    """Copies of a large thing, all kept."""
    return b"](" + made + memo(0) + copy * count + b"e"


def items(count: int, values: bool = False) -> bytes:
    """Different short strings, or pairs of them and None."""
    return b"".join(plain(f"k{i}") + (b"N" if values else b"") for i in range(count))


LARGE = b"(" + items(5000) + b"t"
PAIRS = b"(" + b"".join(plain(f"k{i}") + b"N\x86" for i in range(5000)) + b"t"
LARGE_DICT = b"}(" + items(5000, values=True) + b"u"
RECORD = opcodes(Name("torch.nn", "M")) + b")\x81"


def bombs() -> dict[str, bytes]:
    """Programs of at most some 500 kB that copy without end."""

    def called(module, name):
        return opcodes(Name(module, name)) + get(0) + b"\x85R"

    collide = [opcodes(i * (2**61 - 1)) for i in range(1, 30_000)]
    return {
        **{f"{m}.{n}": products(Name(m, n)) for m, n in (
            ("pathlib", "Path"), ("pathlib", "PurePosixPath"), ("pathlib._local", "PosixPath"),
            ("torch", "device"))},
        "wide strings": products(Name("pathlib", "Path"), "\U0001f600" * 1000),
        "size": copies(b"](" + items(5000) + b"e", called("torch", "Size")),
        "ordered dict": copies(PAIRS, called("collections", "OrderedDict")),
        "set": copies(LARGE, called("builtins", "set")),
        "frozenset": copies(LARGE, called("__builtin__", "frozenset")),
        "encode": copies(plain("\xe9" * 10_000), called("_codecs", "encode")),
        "build": copies(LARGE_DICT, RECORD + get(0) + b"b"),
        "build of two": copies(LARGE_DICT, RECORD + get(0) + get(0) + b"\x86b"),
        "tensor": copies(b"(" + opcodes(TorchFile().tensor(np.zeros(1))) + items(5000) + b"t",
                         opcodes(Name("torch._utils", "_rebuild_parameter")) + get(0) + b"R"),
        "keys that are tuples": copies(LARGE, b"}" + get(0) + b"Ns"),
        "keys that are long": copies(plain("a" * 100_000), b"}" + get(0) + b"Ns"),
        "keys that collide": b"}(" + b"N".join(collide) + b"Nu",
        "members that collide": b"\x8f(" + b"".join(collide) + b"\x90",
        "keys that are large": b"}(" + b"".join(opcodes(i << 40) + b"N" for i in range(1, 12_000))
                               + b"u",
        "long names": copies(plain("a" * 900), plain("torch.nn") + get(0) + b"\x93"),
        "empty sets": b"](" + b"\x8f" * 400_000 + b"e",
        "empty records": b"](" + opcodes(Name("torch.nn", "M")) + memo(0)
                         + (get(0) + b")\x81") * 60_000 + b"e",
        "instructions": b"N0" * 2_000_000 + b"N",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", bombs())
def test_what_a_pickle_makes_is_bounded_by_its_size(tmp_path, monkeypatch, name):
    monkeypatch.setattr(pickle_parts, "_FREE", 4 << 20)  # as with more, but sooner
    if name == "instructions":
        monkeypatch.setattr(pickle_parts, "_PER_BYTE", 4)
    path = tmp_path / "x.pt"
    path.write_bytes(archive(dumps({"a": Raw(bombs()[name])}), []))
    start = time.process_time()
    with memory_below(120), pytest.raises(WeightsError, match=r"the limit|over 18 digits"):
        torch_file.read(path)
    assert time.process_time() - start < 20


def test_the_limit_is_told_with_its_reason(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(archive(dumps(Raw(products(Name("pathlib", "Path")))), []))
    with (
        memory_below(100),
        pytest.raises(WeightsError, match="more than 64 MiB, the limit: 64 MiB and 32 times its s"),
    ):
        torch_file.read(path)


def test_a_pickle_beyond_the_limit_of_pickles(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(archive(b"N" * (torch_file.MAX_PICKLE + 1), []))
    with pytest.raises(WeightsError, match="16,777,217 bytes, expected at most 16,777,216"):
        torch_file.read(path)


def test_large_honest_checkpoints_are_read(tmp_path):
    torch = TorchFile()
    state = {f"layers.{i}.{k}.weight": np.float32([i]) for i in range(600) for k in range(5)}
    moments = {i: {"step": 3.0, "exp_avg": torch.tensor(np.zeros(1))} for i in range(3000)}
    root = {
        "model": {k: torch.tensor(v) for k, v in state.items()},
        "optimizer": {"state": moments, "param_groups": [{"params": list(range(3000))}]},
        "names": {i: f"class {i}" for i in range(20_000)},
        "addresses": {140_000_000_000_000 + 64 * i: i for i in range(5000)},
    }
    found = torch_file.read(torch.write(tmp_path / "x.pt", root)).state
    assert found.keys() == state.keys()
    assert found["layers.599.4.weight"] == [599]


def module(**state) -> New:
    return New(Name("torch.nn", "M"), state)


def tensor_code(torch) -> bytes:
    return opcodes(torch.tensor(np.float32([1])))


@pytest.mark.parametrize(
    "code",
    [
        # A name that is long, of a tensor in many modules; many tensors in many modules; many
        # modules in many modules; many names that are not saved in many modules.
        b"}(" + plain("_parameters") + b"}" + plain("a" * 50_000) + b"%tNs" + memo(1) + b"u",
        b"}(" + plain("_parameters") + b"}(" + b"".join(plain(f"p{i}") + b"%t" for i in range(500))
        + b"u" + memo(1) + b"u",
        b"}(" + plain("_non_persistent_buffers_set") + b"](" + items(5000) + b"e" + b"u",
    ],
)  # fmt: skip
def test_modules_that_share_what_they_hold_are_bounded(tmp_path, code):
    torch = TorchFile()
    code = code.replace(b"%tN", tensor_code(torch)).replace(b"%t", tensor_code(torch))
    nn = opcodes(Name("torch.nn", "M"))
    leaf = nn + b")\x81" + code + b"b" + memo(2)
    many = b"}(" + b"".join(plain(f"m{i}") + get(2) for i in range(3000)) + b"u"
    root = leaf + b"0" + nn + b")\x81}(" + plain("_modules") + many + b"ub"
    path = torch.write(tmp_path / "x.pt", {"model": Raw(root)})
    start = time.process_time()
    with memory_below(100), pytest.raises(WeightsError, match="limit"):
        torch_file.read(path)
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    ("root", "said"),
    [
        ({10**5000: "%t"}, "over 18 digits"), ({10**20: "%t"}, "over 18 digits"),
        ({"a": "%t", "x": Call(Name("pathlib", "Path"), (10**5000,))}, "over 18 digits"),
        ({1: "%t", "1": "%t"}, "two of its tensors are called '1'"),
        ({"a" * 2000: "%t"}, "more than 1000 characters"),
        ({"model": module(_parameters={"a": "%t"}, names=["a" * 20_000])}, "expected at most"),
        ({"a": (0, (0, 2**47, 2**47), (1, 1, 1))}, "as PyTorch describes"),
        ({"a": (0, (2**24, 0, 2**24), (1, 1, 1))}, "as PyTorch describes"),
        ({"a": (0, (1,) * 40, (1,) * 40)}, "as PyTorch describes"),
        ({"a": (0, "ab", (1, 1))}, "as PyTorch describes"),
    ],
)  # fmt: skip
def test_other_contrived_archives(tmp_path, root, said):
    torch = TorchFile()
    values = torch.storage(np.float32([1]))

    def filled(value):
        if value == "%t":
            return torch.view(values, 0, (1,), (1,))
        if isinstance(value, tuple) and len(value) == 3 and value[0] == 0:
            call = torch.view(values, 0, (1,), (1,))
            shape = value[1] if isinstance(value[1], str) else tuple(value[1])
            return Call(call.function, (values, 0, shape, value[2], *call.args[4:]))
        if isinstance(value, New):
            return New(value.kind, filled(value.state))
        return {k: filled(v) for k, v in value.items()} if isinstance(value, dict) else value

    path = torch.write(tmp_path / "x.pt", filled(root))
    with pytest.raises(WeightsError, match=said) as caught:
        torch_file.read(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000


def test_archives_that_unpack_to_more_than_they_are(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", dumps({}))
        file.writestr("archive/data/0", bytes(50_000_000))
    with memory_below(20), pytest.raises(WeightsError, match="packed or overlap"):
        torch_file.read(path)
    # A directory whose entries all say that they are as long as the file, and are one.
    whole = archive(dumps({}), [bytes(1000)] * 50)
    path.write_bytes(whole.replace(struct.pack("<II", 1000, 1000), struct.pack("<II", 9000, 9000)))
    with memory_below(20), pytest.raises(WeightsError, match="overlap"):
        torch_file.read(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", dumps({}))
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("archive/data.pkl", dumps({"a": 1}))
    with pytest.raises(WeightsError, match="two members have one name"):
        torch_file.read(path)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"a": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}, "damaged"),
        ({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, "damaged"),
        ({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 24]}}, "damaged"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 24]}}, "damaged"),
        ({"a": {"dtype": "F32", "shape": [6], "data_offsets": [24, 0]}}, "damaged"),
        ({"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]},
          "b": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}, "damaged"),
        ({"a": {"dtype": "F99", "shape": [6], "data_offsets": [0, 24]}}, "damaged"),
        ({"a": {"dtype": "C64", "shape": [3], "data_offsets": [0, 24]}}, "not supported|damaged"),
        ({"a": 1}, "damaged"), (b"[]", "damaged"), (b"{" * 5000, "damaged"),
        (b"\xff" * 10, "damaged"),
    ],
)  # fmt: skip
def test_headers_of_safetensors_that_cannot_be(tmp_path, header, said):
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors(header, bytes(24)))
    with memory_below(20), pytest.raises(WeightsError, match=said) as caught:
        torch_file.read(path)
    assert str(path) in str(caught.value)


def test_facts_beside_safetensors_that_make_no_sense(tmp_path):
    path = tmp_path / "x.safetensors"
    for facts in ({"image_size": "9" * 5000}, {"image_size": "\u0663"}, {"names": "[" * 10**5},
                  {"names": json.dumps([9] * 3).replace("9", "9" * 5000)}):  # fmt: skip
        path.write_bytes(safetensors(HEADER | {"__metadata__": facts}, bytes(32)))
        found = torch_file.read(path)
        assert (found.image_size, found.names) == (None, None)
    for size in (2**62, 2**40, 100 * 2**20):
        path.write_bytes(struct.pack("<Q", size) + b"{}")
        with memory_below(20), pytest.raises(WeightsError, match="damaged"):
            torch_file.read(path)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    for name, said in {"pipe.pt": "a pipe or a device", "": "a folder", "a\0.pt": "null"}.items():
        with pytest.raises(WeightsError, match=said):
            torch_file.read(tmp_path / name)


def test_the_cases_of_weights(shared):
    """What each of them was: GiB taken by kilobytes, and tracebacks."""
    folder = shared / "cases" / "fuzz" / "h_weights"
    if not folder.is_dir():
        pytest.skip("these cases are not here")
    files = [f for f in sorted(folder.glob("*/*")) if f.suffix in (".pt", ".pth", ".safetensors")]
    assert len(files) > 6
    for file in files:
        start = time.monotonic()
        with memory_below(400), pytest.raises(WeightsError, match=file.name):
            torch_file.read(file)
        assert time.monotonic() - start < 10, file
