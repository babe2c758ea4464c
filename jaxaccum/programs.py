"""A trained network as one program for other runtimes: StableHLO or ONNX."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from jaxaccum.config import ConfigError
from jaxaccum.data.texts import shown_path
from jaxaccum.machine import onednn
from jaxaccum.machine.waiting import waiting
from jaxaccum.models import blocks
from jaxaccum.tasks import Trained
from jaxaccum.training.checkpoint import CheckpointError
from jaxaccum.training.run import compute_dtype

FORMATS = ("stablehlo", "onnx")
PLATFORMS = ("cpu", "cuda", "tpu")
_KNOWN = (*PLATFORMS, "rocm")
_SUFFIXES = {
    ".onnx": "onnx", ".stablehlo": "stablehlo", ".mlir": "stablehlo", ".hlo": "stablehlo",
}  # fmt: skip


def write(
    trained: Trained,
    file: Path,
    platforms: Sequence[str] = PLATFORMS,
    batch: int = 0,
    format: str = "",
    end_to_end: bool | None = None,
) -> dict[str, Any]:
    """Writes FILE, the program, and FILE.json, what it takes and gives.

    The program of a detector maps images (N, S, S, 3) uint8 RGB to boxes (N, A, 4), x1 y1 x2 y2 in
    pixels, and class probabilities (N, A, classes), before non-maximum suppression; end to end to
    boxes (N, K, 4), scores (N, K) and classes (N, K), which need none. The program of a 3D
    detector images and cameras (N, 3, 4) to these and locations (N, A, 3), sizes (N, A, 3) and
    yaw (N, A). That of a completion network maps partial clouds (N, 2048, 3) float32, and
    vectors of captions (N, T) if it takes them, to complete clouds (N, P, 3). The weights are in
    it.

    Args:
      trained: the network.
      file: to write.
      platforms: a StableHLO program can run on.
      batch: samples per call; 0 for any number.
      format: "stablehlo"; or "onnx", in float32 and with the names that the task gives (`images`,
        `boxes` and `probabilities` of a detector), which needs the package jax2onnx; "" goes by the
        suffix of the file, and is StableHLO for a file without one.
      end_to_end: by the one-to-one branch, or not; None: as its config says.
    Returns:
      what FILE.json holds.
    Raises:
      CheckpointError: the file cannot be written.
      ConfigError: an unknown platform, format or suffix, a format that the suffix contradicts,
        ONNX without its package or of no detector, or there is no such branch.
    """
    if not platforms or not set(platforms) <= set(_KNOWN):
        raise ConfigError(f"platforms are of {', '.join(_KNOWN)}; got {', '.join(platforms)!r}")
    format = format_of(file, format)
    trained = trained.with_end_to_end(end_to_end)
    make_folder(file)
    with waiting("exporting"):
        program, facts = (onnx if format == "onnx" else stablehlo)(trained, batch, platforms)
    facts = {
        "model": trained.config.model,
        "names": list(trained.names),
        "batch": batch or "any",
        "format": format,
        **facts,
        **trained.task.interface(trained).facts,
    }
    try:
        file.write_bytes(program)
        file.with_name(f"{file.name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    except OSError as error:
        raise CheckpointError(f"cannot write {file}: {error}") from error
    return facts


def format_of(file: Path, format: str = "") -> str:
    """The format of a program, as it is asked for or as the file's suffix says.

    Raises:
      ConfigError: there is no such format, the suffix is that of another, or it is of none and no
        format is asked for.
    """
    meant = _SUFFIXES.get(file.suffix.lower())
    if format and format not in FORMATS:
        raise ConfigError(f"the format is one of {', '.join(FORMATS)}; got {format!r}")
    if format and meant and format != meant:
        raise ConfigError(
            f"{file.name} is the name of a program as {meant}, and --format={format}: leave one of "
            "them out"
        )
    if file.suffix and not format and not meant:
        known = ", ".join(f"{suffix} ({kind})" for suffix, kind in _SUFFIXES.items())
        raise ConfigError(
            f"{shown_path(file)}: {shown_path(file.suffix)} is the suffix of no program that is "
            f"written; end the name in one of {known} or in none, or give --format"
        )
    return format or meant or FORMATS[0]


def make_folder(file: Path) -> None:
    """Makes the folder of a file, before there is anything to write.

    Raises:
      CheckpointError: it cannot be made, or the file is a folder.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {file}: {error}") from error
    if file.is_dir():
        raise CheckpointError(f"cannot write {file}: it is a folder, expected a file")


def load_exported(file: Path) -> Callable[[jax.Array], Any]:
    """The StableHLO program in a file, as a function of its inputs."""
    return jax.jit(jax_export.deserialize(bytearray(file.read_bytes())).call)


def stablehlo(trained: Trained, batch: int, platforms: Sequence[str]):
    """The program as bytes, and facts of it."""
    params, stats = jax.device_get((trained.params, trained.stats))
    # As it was trained, whatever the machine that writes it computes in.
    dtype = compute_dtype(trained.config)
    task = type(trained.task).create(trained.config, trained.names, dtype)
    samples = trained.task.interface(trained).inputs
    count = batch or jax_export.symbolic_shape("n")[0]

    def program(*inputs):
        outputs = jax.tree.leaves(task.predict(params, stats, *inputs))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    with onednn.without():  # it runs elsewhere
        exported = jax_export.export(jax.jit(program), platforms=tuple(platforms))(
            *(jax.ShapeDtypeStruct((count, *s.shape), s.dtype) for s in samples)
        )
    facts = {"platforms": list(exported.platforms), "dtype": np.dtype(dtype).name}
    return exported.serialize(), facts


def onnx(trained: Trained, batch: int, platforms: Sequence[str]):
    """The program as bytes, and facts of it. It runs wherever its runtime does."""
    del platforms
    interface = trained.task.interface(trained)
    if interface.onnx is None:
        raise ConfigError(
            f"{trained.config.model} is no detector of 2D boxes: the task {trained.task.name} "
            "names no inputs and outputs for ONNX"
        )
    try:
        jax2onnx = importlib.import_module("jax2onnx")
    except ImportError as error:
        raise ConfigError(
            f"--format=onnx needs the package jax2onnx ({error}): pip install onnx-ir equinox "
            "dm-pix, then pip install --no-deps jax2onnx (it asks for an orbax-checkpoint older "
            "than the one that reads the checkpoints, but does not use it)"
        ) from error
    config = trained.config.copy_and_resolve_references()
    with config.unlocked():
        config.update(dtype="float32", remat=False)
    task = type(trained.task).create(config, trained.names, jnp.float32)
    params, stats = jax.device_get((trained.params, trained.stats))
    with blocks.portable(), onednn.without():
        program = jax2onnx.to_onnx(
            lambda *inputs: task.predict(params, stats, *inputs),
            [jax.ShapeDtypeStruct((batch or "n", *s.shape), s.dtype) for s in interface.inputs],
            model_name=trained.config.model,
            input_names=interface.onnx[0],
            output_names=interface.onnx[1],
        )
    return program.SerializeToString(), {"opset": program.opset_import[0].version}
