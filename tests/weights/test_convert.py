"""Weights in and out: files of PyTorch read without it, attacks, other classes, safetensors.

The .pt files here are written opcode by opcode, in the layout that PyTorch and the reference use.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from torch_files import Call, Name, New, Raw, TorchFile, dumps, numpy_scalar, opcodes

from jaxaccum import convert, export, models
from jaxaccum.models import yolo
from jaxaccum.training import inference
from jaxaccum.training.checkpoint import CheckpointError
from jaxaccum.weights import initial, torch_file
from jaxaccum.weights import transfer as weights
from jaxaccum.weights.transfer import Weights, WeightsError

CLASSES = ("person", "dog", "cat")


def tiny(classes=3, seed=0):
    """A tiny model with initial values, and its state dict with random statistics."""
    model = models.create("tiny-t", num_classes=classes)
    example = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    params, stats = models.initialise(model, example, seed)
    rng = np.random.default_rng(seed)
    stats = jax.tree.map(lambda a: rng.uniform(0.5, 1.5, a.shape).astype(a.dtype), stats)
    return model, params, stats, weights.for_pytorch(model, params, stats, 7)


def halved(state):
    return {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in state.items()}


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        np.testing.assert_array_equal(a[key], b[key], key)


@pytest.fixture
def file():
    return TorchFile()


# --- Reading ---


def checkpoint(file, state, training: bool, **more):
    """As the reference saves it: during training, or stripped at its end."""
    module = file.module(
        halved(state),
        names=dict(enumerate(CLASSES)),
        yaml={"nc": 3, "scale": "t", "yaml_file": "tiny-t.yaml"},
        stride=file.tensor(np.float32([8, 16])),
        args=Call(Name("types", "SimpleNamespace"), ()),
        **more,
    )
    moments = {"state": {0: {"momentum_buffer": file.tensor(np.zeros(3, np.float16))}}}
    return {
        "epoch": 4 if training else -1,
        "best_fitness": numpy_scalar(0.25),
        "model": None if training else module,
        "ema": module if training else None,
        "updates": 40 if training else None,
        "optimizer": moments if training else None,
        "train_args": {
            "imgsz": 128,
            "project": Call(Name("pathlib", "PosixPath"), ("runs", "x")),
            "device": Call(Name("torch", "device"), ("cuda", 0)),
        },
        "train_metrics": {"fitness": 0.1},
        "date": "2026-01-01",
    }


@pytest.mark.parametrize("training", [True, False])
def test_a_checkpoint_of_the_reference(tmp_path, file, training):
    *_, state = tiny()
    found = torch_file.read(file.write(tmp_path / "x.pt", checkpoint(file, state, training)))
    expected = {k: v.astype(v.dtype if v.ndim == 0 else np.float32)
                for k, v in halved(state).items()}  # fmt: skip
    same(found.state, expected)
    assert found.names == CLASSES
    assert found.classes == 3
    assert found.image_size == 128
    assert found.model == "tiny-t t"
    assert ("average" in found.origin) == training


def test_numbers_of_numpy():
    assert torch_file.unpickle(dumps([numpy_scalar(0.25)])) == [0.25]


@pytest.mark.parametrize("wrapper", ["", "module.", "model."])
def test_a_state_dict(tmp_path, file, wrapper):
    *_, state = tiny()
    tensors = {f"{wrapper}{k}": file.tensor(v) for k, v in state.items()}
    ordered = Call(Name("collections", "OrderedDict"), ([(k, v) for k, v in tensors.items()],))
    with_attributes = Raw(opcodes(ordered) + opcodes({"_metadata": {}}) + b"b")
    same(torch_file.read(file.write(tmp_path / "x.pt", with_attributes)).state, state)
    same(torch_file.read(file.write(tmp_path / "y.pt", {"state_dict": tensors})).state, state)


def test_views_of_a_shared_storage(tmp_path, file):
    base = np.arange(24, dtype=np.float32)
    shared = file.storage(base)
    root = {
        "a": file.view(shared, 0, (4, 6), (6, 1)),
        "transposed": file.view(shared, 0, (6, 4), (1, 6)),
        "part": file.view(shared, 7, (2, 3), (12, 2)),
        "expanded": file.view(shared, 3, (5,), (0,)),
        "scalar": file.view(shared, 23, (), ()),
        "empty": file.view(shared, 0, (0, 3), (3, 1)),
    }
    state = torch_file.read(file.write(tmp_path / "x.pt", root)).state
    grid = base.reshape(4, 6)
    np.testing.assert_array_equal(state["a"], grid)
    np.testing.assert_array_equal(state["transposed"], grid.T)
    np.testing.assert_array_equal(state["part"], [[7, 9, 11], [19, 21, 23]])
    np.testing.assert_array_equal(state["expanded"], [3] * 5)
    assert state["scalar"] == 23 and state["scalar"].shape == ()
    assert state["empty"].shape == (0, 3)
    assert all(v.flags.c_contiguous and v.flags.writeable for v in state.values())


def test_every_type(tmp_path, file):
    exact = np.float32([1.5, -2.0, 0.0, 3e38])
    brain = (exact.view(np.uint32) >> 16).astype(np.uint16)
    root = {
        "half": file.tensor(np.float16([0.1, -2])),
        "double": file.tensor(np.float64([0.1])),
        "long": file.tensor(np.int64([2**40, -1])),
        "brain": file.view(file.storage(brain, "bfloat16"), 0, (4,), (1,)),
    }
    state = torch_file.read(file.write(tmp_path / "x.pt", root)).state
    assert state["half"].dtype == state["double"].dtype == state["brain"].dtype == np.float32
    np.testing.assert_array_equal(state["half"], np.float32(np.float16([0.1, -2])))
    np.testing.assert_array_equal(state["double"], np.float32([0.1]))
    np.testing.assert_array_equal(state["long"], [2**40, -1])
    np.testing.assert_array_equal(state["brain"], (brain.astype(np.uint32) << 16).view(np.float32))


def write_safetensors(path, data: bytes, **header):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_safetensors_of_halves(tmp_path):
    brain = (np.float32([1.5, -2]).view(np.uint32) >> 16).astype(np.uint16)
    path = tmp_path / "x.safetensors"
    write_safetensors(path, brain.tobytes() + np.float16([3, 4]).tobytes(), **{
        "module.model.0.a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
        "module.model.0.b": {"dtype": "F16", "shape": [1, 2], "data_offsets": [4, 8]},
        "__metadata__": {"names": '["x"]', "model": "yolov8-n", "image_size": "96"},
    })  # fmt: skip
    found = torch_file.read(path)
    same(found.state, {"model.0.a": np.float32([1.5, -2]), "model.0.b": np.float32([[3, 4]])})
    assert (found.names, found.model, found.image_size) == (("x",), "yolov8-n", 96)
    write_safetensors(path, b"ab", a={"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]})
    with pytest.raises(WeightsError, match="F8_E4M3, which is not supported"):
        torch_file.read(path)


def test_bytes_in_the_other_order(tmp_path):
    file = TorchFile()
    root = {"a": file.view(file.storage(np.float32([1, 2, 3]).byteswap()), 0, (3,), (1,))}
    path = file.write(tmp_path / "x.pt", root)
    data = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"big" if name.endswith("byteorder") else old.read(name))
    np.testing.assert_array_equal(torch_file.read(path).state["a"], [1, 2, 3])


def test_buffers_that_are_not_saved_are_left_out(tmp_path, file):
    module = file.module({"a.weight": np.float32([1])})
    module.state["_buffers"] = {"keep": file.tensor(np.float32([2])),
                                "leave": file.tensor(np.float32([3])), "none": None}  # fmt: skip
    module.state["_non_persistent_buffers_set"] = Call(Name("__builtin__", "set"), (["leave"],))
    found = torch_file.read(file.write(tmp_path / "x.pt", {"model": module})).state
    assert list(found) == ["keep", "a.weight"]


# --- What is refused ---


class Marker:
    """Leaves a file behind if it is ever unpickled by Python."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def attacks(marker: Path) -> dict[str, tuple[Any, str]]:
    """Pickles that run something in an ordinary unpickler, and what the refusal names."""
    touch = f"touch {marker}"
    system = Name("os", "system")
    stub = Name("torch.nn.modules.module", "Module")
    opened = f"open({str(marker)!r}, 'w')"
    getattr_ = Name("builtins", "getattr")
    return {
        "system": (Call(system, (touch,)), "os.system"),
        "posix": (Raw(pickle.dumps(Marker(marker), 2)[2:-1]), "posix.system"),
        "protocol 5": (Raw(pickle.dumps(Marker(marker), 5)[2:-1]), "posix.system"),
        "protocol 0": (Raw(pickle.dumps(Marker(marker), 0)[:-1]), "posix.system"),
        "eval": (Call(Name("builtins", "eval"), (opened,)), "builtins.eval"),
        "exec": (Call(Name("__builtin__", "exec"), (opened,)), "__builtin__.exec"),
        "popen": (Call(Name("subprocess", "Popen"), (["touch", str(marker)],)), "subprocess.Popen"),
        "getattr": (
            Call(Call(getattr_, (Call(Name("builtins", "__import__"), ("os",)), "system")), ()),
            "builtins.getattr",
        ),
        "inst": (Raw(b"(" + opcodes(touch) + b"ios\nsystem\n"), "os.system"),
        "obj": (Raw(b"(" + opcodes(system) + opcodes(touch) + b"o"), "os.system"),
        "newobj": (Raw(opcodes(system) + opcodes((touch,)) + b"\x81"), "os.system"),
        "dotted": (Raw(opcodes("torch.nn") + opcodes("modules.module.warnings.sys") + b"\x93"),
                   "modules.module.warnings.sys"),
        "nested": ({"model": New(stub, {"_modules": {"0": New(stub, {"x": [Call(system, (touch,))]})
                                                     }})}, "os.system"),
        "setstate": (New(stub, {"__setstate__": system}), "os.system"),
        "rebuild": (Call(Name("torch._tensor", "_rebuild_from_type_v2"),
                         (system, stub, (touch,), None)), "os.system"),
        "load": (Call(Name("torch.storage", "_load_from_bytes"), (b"x",)), "_load_from_bytes"),
        "numpy": (Call(Name("numpy", "load"), ("x",)), "numpy.load"),
        "extension": (Raw(b"\x82\x01"), "EXT1"),
        "persistent text": (Raw(b"Px\n"), "PERSID"),
    }  # fmt: skip


@pytest.mark.parametrize("name", attacks(Path("m")))
def test_an_attack_is_refused_by_name_and_nothing_runs(tmp_path, file, name):
    marker = tmp_path / "ran"
    root, refused = attacks(marker)[name]
    path = file.write(tmp_path / "x.pt", {"model": None, "ema": None, "evil": root})
    with pytest.raises(WeightsError, match=refused.replace(".", r"\.")):
        convert.convert(path, tmp_path / "out")
    assert not marker.exists()


def test_the_attack_is_real(tmp_path):
    marker = tmp_path / "ran"
    root, _ = attacks(marker)["system"]
    pickle.loads(dumps(root))
    assert marker.exists()


def test_methods_set_on_a_description_are_never_called(tmp_path, file):
    """Attributes named as pickle's hooks, made of names that are admitted, are only kept."""
    stub = New(Name("ultralytics.nn.tasks", "X"), {"__setstate__": Name("torch", "Size")})
    root = Raw(
        opcodes(stub) + opcodes({"append": Name("torch", "Size")}) + b"b" + opcodes(1) + b"a"
    )
    found = torch_file.unpickle(dumps(root))
    assert isinstance(found, torch_file.Record)
    assert found.items == [1]
    assert found.state["__setstate__"] == torch_file.Global("torch.Size")
    with pytest.raises(WeightsError, match="sets attributes of a Global"):
        torch_file.unpickle(dumps(Raw(opcodes(Name("torch", "Size")) + opcodes({"x": 1}) + b"b")))


@pytest.mark.parametrize(
    ("view", "message"),
    [((0, (5,), (1,)), "beyond its storage"), ((2, (2, 2), (2, 1)), "beyond its storage"),
     ((0, (2,), (2**40,)), "beyond its storage"), ((0, (2**40,), (0,)), "far larger"),
     ((-1, (2,), (1,)), "as PyTorch describes"), ((0, (2,), (-1,)), "as PyTorch describes"),
     ((0, (2, 2), (1,)), "as PyTorch describes"), ((0, ("a",), (1,)), "as PyTorch describes"),
     ((0, (2**50,), (0,)), "as PyTorch describes")],
)  # fmt: skip
def test_views_that_reach_too_far(tmp_path, file, view, message):
    root = {"a": file.view(file.storage(np.zeros(4, np.float32)), *view)}
    with pytest.raises(WeightsError, match=message):
        torch_file.read(file.write(tmp_path / "x.pt", root))


def test_many_views_of_one_storage_are_bounded(tmp_path, file):
    shared = file.storage(np.zeros(2**20, np.float32))
    root = {str(i): file.view(shared, 0, (2**20,), (1,)) for i in range(40)}
    with pytest.raises(WeightsError, match="far larger"):
        torch_file.read(file.write(tmp_path / "x.pt", root))


def test_values_that_refer_to_themselves():
    nested = b")q\x01" + b"h\x01h\x01\x86q\x01" * 60
    with pytest.raises(WeightsError, match="as a key"):  # or its hash would take for ever
        torch_file.unpickle(dumps(Raw(nested + b"}h\x01Ns")))
    loop = Raw(opcodes(New(Name("torch.nn", "M"), {})) + b"q\x00}(X\x08\x00\x00\x00_modules"
               b"}(X\x01\x00\x00\x00ah\x00uub")  # fmt: skip
    record = torch_file.unpickle(dumps(loop))
    with pytest.raises(WeightsError, match="without end"):
        list(torch_file._module_tensors(record))


def test_files_that_are_no_weights(tmp_path, file):
    def refused(path, message):
        with pytest.raises(WeightsError, match=message):
            initial.read(path)

    refused(tmp_path / "none.pt", "does not exist")
    legacy = tmp_path / "legacy.pt"
    legacy.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"\x80\x02M\xe9\x03.")
    refused(legacy, "before version 1.6")
    other = tmp_path / "x.pt"
    other.write_bytes(b"hello")
    refused(other, "neither a .pt")
    other.write_bytes(b"")
    refused(other, "neither a .pt")
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("a.txt", "x")
    refused(other, "not one of torch.save")
    refused(file.write(other, {"epoch": 3}), "holds no weights")
    refused(file.write(other, {"a": 1}, **{"constants.pkl": b"x"}), "TorchScript")
    with zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", dumps({}) + bytes(10_000))
    refused(other, "packed")
    whole = file.write(other, {"a": file.tensor(np.arange(1000.0))}).read_bytes()
    for cut in (10, 100, 2000, len(whole) - 10):
        other.write_bytes(whole[:cut])
        refused(other, "damaged|neither")
    other.write_bytes(whole.replace(np.float64(999).tobytes(), b"damaged!"))
    refused(other, "damaged")
    tensors = tmp_path / "x.safetensors"
    tensors.write_bytes(b"\xff" * 100)
    refused(tensors, "damaged")


def test_damaged_bytes_raise_nothing_else(tmp_path, file):
    *_, state = tiny()
    whole = dumps(checkpoint(file, dict(list(state.items())[:12]), True))
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(256)
        with contextlib.suppress(WeightsError):
            torch_file.unpickle(bytes(data))


# --- Into a model ---


@pytest.mark.slow
def test_the_model_is_told_from_the_shapes():
    *_, state = tiny()
    assert weights.guess_model(Weights(state)) == "tiny-t"
    for name in ("yolov8-n", "yolo11-m", "yolov8-p2-s"):
        blank = {k: np.broadcast_to(np.float32(0), s) for k, s in weights.shapes(name, 5).items()}
        assert weights.guess_model(Weights(blank)) == name
    del state["model.3.cv1.bn.bias"]
    with pytest.raises(WeightsError, match=r"9\d% of the tensors of tiny-t fit"):
        weights.guess_model(Weights(state))


def test_the_same_classes_are_copied_whole():
    model, params, stats, state = tiny()
    _, other, other_stats, _ = tiny(seed=1)
    new, new_stats, report = weights.transfer(
        Weights(state, CLASSES), model, other, other_stats, ("Person", "dog", "cat ")
    )
    assert report.complete and report.share == 1 and not report.unused
    for a, b in ((new, params), (new_stats, stats)):
        assert all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
    assert len(report.lines()) == 1


@pytest.mark.parametrize("ours", [("cat", "bird", "person", "fish"), ("cat", "bird", "dog")])
def test_class_rows_follow_their_names(ours):
    """The inner width is 16 here for any number of classes up to 16."""
    *_, state = tiny()
    model, params, stats, initial = tiny(len(ours), seed=1)
    new, _, report = weights.transfer(Weights(state, CLASSES), model, params, stats, ours)
    got = weights.to_reference(new)
    for level in range(2):
        for leaf in ("weight", "bias"):
            key = f"model.5.cv3.{level}.2.{leaf}"
            for row, name in enumerate(ours):
                expected = state[key][CLASSES.index(name)] if name in CLASSES else initial[key][row]
                np.testing.assert_array_equal(got[key][row], expected)
    assert set(report.remapped) == {
        f"model.5.cv3.{i}.2.{leaf}" for i in range(2) for leaf in ("weight", "bias")
    }
    assert report.carried == tuple(n for n in ours if n in CLASSES)
    assert not report.left
    assert "bird" in report.lines()[1]


def test_a_class_branch_of_another_width_stays_at_its_initial_values():
    *_, state = tiny(80)
    names = tuple(f"class {i}" for i in range(77)) + CLASSES
    model, params, stats, initial = tiny(3, seed=1)
    new, new_stats, report = weights.transfer(Weights(state, names), model, params, stats, CLASSES)
    got = weights.to_reference(new) | weights.to_reference(new_stats)
    branch = {k for k in got if k.startswith("model.5.cv3.")}
    assert set(report.left) == branch
    assert not report.remapped
    for key, value in got.items():
        np.testing.assert_array_equal(value, (initial if key in branch else state)[key], key)
    text = "\n".join(report.lines())
    assert "3 here, 80 there" in text and "model.5.cv3.1.2" in text


def test_a_class_layer_with_too_few_rows_is_not_read():
    *_, state = tiny()
    state["model.5.cv3.1.2.bias"] = np.zeros(1, np.float32)
    model, params, stats, _ = tiny(4, seed=1)
    *_, report = weights.transfer(
        Weights(state, CLASSES), model, params, stats, ("cat", "dog", "person", "bird")
    )
    assert list(report.left) == ["model.5.cv3.1.2.bias"]


def test_unknown_names():
    *_, state = tiny()
    _, params, stats, _ = tiny(seed=1)
    model, wider, wider_stats, _ = tiny(4, seed=1)
    for names in (None, ("0", "1", "2"), ("too", "few")):
        found = Weights(state, names)
        *_, report = weights.transfer(found, tiny()[0], params, stats, ("x", "y", "z"))
        assert report.complete
        *_, report = weights.transfer(found, model, wider, wider_stats, ("w", "x", "y", "z"))
        assert len(report.left) == 4
        assert "does not name its own" in report.lines()[1]
    *_, report = weights.transfer(
        Weights(state, CLASSES), tiny()[0], params, stats, ("x", "y", "z")
    )
    assert len(report.left) == 4 and "no class of the file" in report.lines()[1]


def test_the_wrong_model_is_refused_with_the_right_one():
    *_, state = tiny()
    model = models.create("yolov8-n", num_classes=3)
    params, stats = models.initialise(model, jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32), 0)
    with pytest.raises(WeightsError, match="the file fits tiny-t whole"):
        weights.transfer(Weights(state, CLASSES), model, params, stats, CLASSES)
    with pytest.raises(WeightsError, match="no model we know"):
        weights.transfer(Weights({"a": np.zeros(3)}), model, params, stats, CLASSES)


def test_values_that_are_not_finite_are_refused():
    model, params, stats, state = tiny()
    state["model.3.cv1.bn.running_var"][2] = np.inf
    with pytest.raises(WeightsError, match=r"model\.3\.cv1\.bn\.running_var"):
        weights.transfer(Weights(state), model, params, stats, CLASSES)


def test_whole_numbers_are_no_weights():
    model, params, stats, state = tiny()
    state["model.0.conv.weight"] = state["model.0.conv.weight"].astype(np.int8)
    with pytest.raises(WeightsError, match=r"'model\.0\.conv\.weight' holds int8, expected numb"):
        weights.transfer(Weights(state), model, params, stats, CLASSES)


def test_names_in_every_form():
    assert weights.names_from({0: "a", 1: "b"}) == ("a", "b")
    assert weights.names_from({"10": "c", "2": "b"}) == ("b", "c")
    assert weights.names_from('["a", "b"]') == ("a", "b")
    assert weights.names_from(("a", 3)) == ("a", "3")
    for wrong in (None, {"a": 1}, {(): "a"}, "not json", [None], 3):
        assert weights.names_from(wrong) is None


# --- Workdirs ---


def converted(tmp_path, file, out="run", **options):
    *_, state = tiny()
    path = file.write(tmp_path / "x.pt", checkpoint(file, state, True))
    return state, convert.convert(path, tmp_path / out, **options)


def test_a_converted_file_is_a_workdir(tmp_path, file):
    state, (report, adopted) = converted(tmp_path, file)
    assert report.complete
    trained = inference.load(tmp_path / "run")
    assert trained.names == CLASSES == adopted.names
    assert trained.config.model == trained.task.model.model == "tiny-t"
    assert trained.task.image_size == 128
    assert adopted.summary == f"{len(CLASSES)} classes: {', '.join(CLASSES)}"
    assert adopted.hints == ("images of 128 px",)
    got = weights.to_reference(trained.params) | weights.to_reference(trained.stats)
    for key, value in got.items():
        np.testing.assert_array_equal(value, np.float32(np.float16(state[key])), key)
    with pytest.raises(CheckpointError, match="another --out"):
        converted(tmp_path, file)


def test_there_and_back_bit_for_bit(tmp_path, file):
    converted(tmp_path, file)
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert convert.write(tmp_path / "run", first) == len(tiny()[3])
    found = initial.read(first)
    assert (found.names, found.model, found.image_size) == (CLASSES, "tiny-t", 128)
    convert.convert(first, tmp_path / "again")
    convert.write(tmp_path / "again", second)
    same(load_file(first), load_file(second))
    assert convert.write(first, tmp_path / "c.safetensors") == len(tiny()[3])
    same(load_file(first), load_file(tmp_path / "c.safetensors"))
    with pytest.raises(WeightsError, match="is a run, which knows its model and its classes"):
        convert.write(tmp_path / "run", second, "tiny-t")
    facts = [json.loads(p.read_bytes()[8 : 8 + struct.unpack("<Q", p.read_bytes()[:8])[0]])
             ["__metadata__"] for p in (first, second)]  # fmt: skip
    assert facts[0] == facts[1]


def test_the_state_dict_is_whole(shared):
    """Keys and shapes are those of the reference, so that its strict loading takes them."""
    facts = json.loads((shared / "parity/detection/yolov8-n.json").read_text())
    model = models.create(facts["variant"], num_classes=facts["nc"])
    example = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    state = weights.for_pytorch(model, *models.initialise(model, example, 0))
    assert {k: list(v.shape) for k, v in state.items()} == facts["state"]
    assert state["model.0.bn.num_batches_tracked"].dtype == np.int64


def test_initial_weights_from_a_workdir_and_a_file(tmp_path, file):
    state, _ = converted(tmp_path, file)
    model, params, stats, _ = tiny(2, seed=1)
    for path in (tmp_path / "run", str(tmp_path / "x.pt")):
        new, _, report = initial.load_initial(path, model, params, stats, ("dog", "bird"), ())
        assert report.carried == ("dog",) and report.new == ("bird",)
        bias = weights.to_reference(new)["model.5.cv3.0.2.bias"]
        assert bias[0] == np.float16(state["model.5.cv3.0.2.bias"][1])


def test_what_convert_refuses(tmp_path, file):
    with pytest.raises(WeightsError, match="2 --names for the 3 classes"):
        converted(tmp_path, file, names=("a", "b"))
    with pytest.raises(WeightsError, match="no model named"):
        converted(tmp_path, TorchFile(), model="yolov8-q")
    with pytest.raises(WeightsError, match="fits tiny-t whole"):
        converted(tmp_path, TorchFile(), model="yolov8-n")
    *_, state = tiny()
    del state["model.0.bn.bias"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(WeightsError, match="not a whole tiny-t"):
        convert.convert(tmp_path / "part.safetensors", tmp_path / "part", "tiny-t")
    assert not (tmp_path / "part").exists()
    with pytest.raises(CheckpointError, match="no folder 'best'"):
        initial.read(tmp_path)


@pytest.mark.slow
def test_the_command_line(tmp_path, file):
    *_, state = tiny()
    path = file.write(tmp_path / "x.pt", checkpoint(file, state, False))
    bad = file.write(tmp_path / "bad.pt", Call(Name("os", "system"), ("true",)))
    # The tiny family is registered by the tests alone.
    code = "import runpy, tiny; runpy.run_module('jaxaccum.convert', run_name='__main__')"

    def run(*args):
        environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}:{os.getcwd()}"}
        return subprocess.run([sys.executable, "-c", code, *map(str, args)], env=environment,
                              capture_output=True, text=True, check=False)  # fmt: skip

    done = run(f"--from={path}", f"--out={tmp_path / 'run'}", "--names=a,b,c")
    assert done.returncode == 0, done.stderr
    assert "model tiny-t (told from the shapes), 3 classes: a, b, c" in done.stdout
    done = run(f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'o.safetensors'}")
    assert done.returncode == 0, done.stderr
    assert initial.read(tmp_path / "o.safetensors").names == ("a", "b", "c")
    for args, message in (
        ((f"--from={bad}", "--out=x"), "os.system"),
        ((f"--from={path}",), "--to"),
    ):
        done = run(*args)
        assert done.returncode == 1
        assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_same_outputs_and_the_exported_program(tmp_path, file):
    model, params, stats, state = tiny()
    save_file(state, tmp_path / "x.safetensors")
    convert.convert(tmp_path / "x.safetensors", tmp_path / "run")
    trained = inference.load(tmp_path / "run")
    size = trained.task.image_size
    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    variables = {"params": params, "batch_stats": stats}
    anchors = yolo.anchors(size, size, model.strides)
    expected = jax.jit(lambda v, x: yolo.decode(model.apply(v, x), anchors))(variables, images)
    ours = jax.jit(trained.task.predict)(trained.params, trained.stats, images)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    facts = export.export(tmp_path / "run", tmp_path / "program.stablehlo")
    assert facts["platforms"] == ["cpu", "cuda", "tpu"]
    program = export.load_exported(tmp_path / "program.stablehlo")
    for count in (1, 2):
        for a, b in zip(program(images[:count]), ours, strict=True):
            np.testing.assert_allclose(a, b[:count], rtol=1e-4, atol=1e-4)
