"""python -m jaxaccum.export --workdir=DIR --out=FILE [--format=stablehlo|onnx]
    [--platforms=cpu,cuda,tpu] [--batch=N]

Writes a run's best weights and its network as one program: StableHLO, which `load_exported`, or any
runtime of StableHLO, runs without this package's models; or ONNX, of a detector.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax import export as jax_export

from jaxaccum.config import ConfigError
from jaxaccum.machine.waiting import waiting
from jaxaccum.models import blocks
from jaxaccum.training.checkpoint import CheckpointError
from jaxaccum.training.inference import Trained, load, require_run

FORMATS = ("stablehlo", "onnx")
PLATFORMS = ("cpu", "cuda", "tpu")
_KNOWN = (*PLATFORMS, "rocm")


def export(
    workdir: Path,
    file: Path,
    platforms: Sequence[str] = PLATFORMS,
    batch: int = 0,
    format: str = "stablehlo",
) -> dict[str, Any]:
    """Writes FILE, the program, and FILE.json, what it takes and gives.

    The program of a detector maps images (N, S, S, 3) uint8 RGB to boxes (N, A, 4), x1 y1 x2 y2 in
    pixels, and class probabilities (N, A, classes), before non-maximum suppression; of a 3D
    detector images and cameras (N, 3, 4) to these and locations (N, A, 3), sizes (N, A, 3) and
    yaw (N, A). That of a completion network maps partial clouds (N, 2048, 3) float32, and
    vectors of captions (N, T) if it takes them, to complete clouds (N, P, 3). The weights are in
    it.

    Args:
      workdir: of the run.
      file: to write.
      platforms: a StableHLO program can run on.
      batch: samples per call; 0 for any number.
      format: "stablehlo"; or "onnx", in float32 and with the names that the task gives (`images`,
        `boxes` and `probabilities` of a detector), which needs the package jax2onnx.
    Returns:
      what FILE.json holds.
    Raises:
      CheckpointError: the workdir holds no weights, or the file cannot be written.
      ConfigError: an unknown platform or format, or ONNX without its package or of no detector.
    """
    if not platforms or not set(platforms) <= set(_KNOWN):
        raise ConfigError(f"platforms are of {', '.join(_KNOWN)}; got {', '.join(platforms)!r}")
    if format not in FORMATS:
        raise ConfigError(f"the format is one of {', '.join(FORMATS)}; got {format!r}")
    require_run(workdir)
    _make_folder(file)
    trained = load(workdir)
    with waiting("exporting"):
        program, facts = (_onnx if format == "onnx" else _stablehlo)(trained, batch, platforms)
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


def _make_folder(file: Path) -> None:
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


def _stablehlo(trained: Trained, batch: int, platforms: Sequence[str]):
    """The program as bytes, and facts of it."""
    params, stats = jax.device_get((trained.params, trained.stats))
    samples = trained.task.interface(trained).inputs
    count = batch or jax_export.symbolic_shape("n")[0]

    def program(*inputs):
        outputs = jax.tree.leaves(trained.task.predict(params, stats, *inputs))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    exported = jax_export.export(jax.jit(program), platforms=tuple(platforms))(
        *(jax.ShapeDtypeStruct((count, *s.shape), s.dtype) for s in samples)
    )
    return exported.serialize(), {"platforms": list(exported.platforms)}


def _onnx(trained: Trained, batch: int, platforms: Sequence[str]):
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
    with blocks.portable():
        program = jax2onnx.to_onnx(
            lambda *inputs: task.predict(params, stats, *inputs),
            [jax.ShapeDtypeStruct((batch or "n", *s.shape), s.dtype) for s in interface.inputs],
            model_name=trained.config.model,
            input_names=interface.onnx[0],
            output_names=interface.onnx[1],
        )
    return program.SerializeToString(), {"opset": program.opset_import[0].version}


if __name__ == "__main__":
    from jaxaccum import command_line

    _WORKDIR = flags.DEFINE_string("workdir", None, "the run whose weights to use", required=True)
    _OUT = flags.DEFINE_string("out", None, "the file to write", required=True)
    _FORMAT = flags.DEFINE_enum("format", FORMATS[0], FORMATS, "of the program")
    _PLATFORMS = flags.DEFINE_list("platforms", list(PLATFORMS), "where a StableHLO program runs")
    _BATCH = flags.DEFINE_integer("batch", 0, "samples per call; 0 for any number", 0, 65536)

    def main() -> int:
        facts = export(
            Path(_WORKDIR.value), Path(_OUT.value), _PLATFORMS.value, _BATCH.value, _FORMAT.value
        )
        print(json.dumps(facts))
        return 0

    command_line.run_verb(
        main,
        __doc__,
        (
            ("export --workdir=runs/mine --out=mine.stablehlo", "one file for any platform"),
            (
                "export --workdir=runs/mine --out=mine.onnx --format=onnx --batch=1",
                "a detector of 2D boxes, for other runtimes",
            ),
        ),
    )
