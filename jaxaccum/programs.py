"""A trained network as one program for other runtimes: StableHLO or ONNX."""

from __future__ import annotations

import dataclasses
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
from jaxaccum.tasks import Trained
from jaxaccum.training.checkpoint import CheckpointError
from jaxaccum.training.run import compute_dtype

FORMATS = ("stablehlo", "onnx")
PLATFORMS = ("cpu", "cuda", "tpu")
_KNOWN = (*PLATFORMS, "rocm")
_SUFFIXES = {
    ".onnx": "onnx", ".stablehlo": "stablehlo", ".mlir": "stablehlo", ".hlo": "stablehlo",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Suppression:
    """How a program chooses among its boxes; see `metrics.detection.nms`.

    Attributes:
      conf: scores are above it. iou: of two boxes of a class that overlap more, one is left.
      max_det: K, boxes of an image at most.
    """

    conf: float = 0.25
    iou: float = 0.7
    max_det: int = 300

    def __post_init__(self) -> None:
        if not (0 <= self.conf <= 1 and 0 <= self.iou <= 1 and self.max_det > 0):
            raise ConfigError(
                f"--conf and --iou are in [0, 1] and --max_det is positive; got {self}"
            )

    def described(self, others: Sequence[str]) -> str:
        """What the program gives."""
        of_them = f"; {', '.join(others)} of these boxes" if others else ""
        return (
            "boxes (N, K, 4) x1 y1 x2 y2 in pixels, scores (N, K), the highest first, 0 where "
            f"there are fewer, classes (N, K) int32, K = {self.max_det} or the anchors if these "
            f"are fewer, after non-maximum suppression{of_them}"
        )


def write(
    trained: Trained,
    file: Path,
    platforms: Sequence[str] = PLATFORMS,
    batch: int = 0,
    format: str = "",
    end_to_end: bool | None = None,
    nms: bool = False,
    **choice: float,
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
        `boxes` and `probabilities` of a detector), which needs the package onnx; "" goes by the
        suffix of the file, and is StableHLO for a file without one.
      end_to_end: by the one-to-one branch, or not; None: as its config says.
      nms: of ONNX, with non-maximum suppression inside: boxes (N, K, 4), scores (N, K), the highest
        first, 0 where there are fewer, classes (N, K), and what else there is of these boxes.
      choice: with nms, what `Suppression` has: `conf`, `iou`, `max_det`.
    Returns:
      what FILE.json holds.
    Raises:
      CheckpointError: the file cannot be written.
      ConfigError: an unknown platform, format or suffix, a format that the suffix contradicts,
        ONNX without its package, or of a program that has no form in it, or there is no such
        branch, or no boxes to suppress.
    """
    if not platforms or not set(platforms) <= set(_KNOWN):
        raise ConfigError(f"platforms are of {', '.join(_KNOWN)}; got {', '.join(platforms)!r}")
    format = format_of(file, format)
    trained = trained.with_end_to_end(end_to_end)
    if choice and not nms:
        raise ConfigError(f"--{', --'.join(choice)}: only with --nms, which is not given")
    suppression = Suppression(**choice) if nms else None  # type: ignore[arg-type]
    if suppression and format != "onnx":
        raise ConfigError("--nms is for ONNX: StableHLO has no operation that suppresses boxes")
    make_folder(file)
    with waiting("exporting"):
        if format == "onnx":
            program, facts = onnx(trained, batch, suppression)
        else:
            program, facts = stablehlo(trained, batch, platforms)
    facts = {
        "model": trained.config.model,
        "names": list(trained.names),
        "batch": batch or "any",
        "format": format,
        **trained.task.interface(trained).facts,
        **facts,
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


def onnx(trained: Trained, batch: int, suppression: Suppression | None):
    """The program as bytes, and facts of it. It runs wherever its runtime does."""
    interface = trained.task.interface(trained)
    if interface.onnx is None:
        raise ConfigError(
            f"{trained.config.model}: the task {trained.task.name} names no inputs and outputs for "
            "ONNX"
        )
    try:
        from jaxaccum import onnx_writer
    except ImportError as error:
        raise ConfigError(
            f"--format=onnx needs the package onnx ({error}): pip install onnx"
        ) from error
    config = trained.config.copy_and_resolve_references()
    with config.unlocked():
        config.update(dtype="float32", remat="none")
    task = type(trained.task).create(config, trained.names, jnp.float32)
    params, stats = jax.device_get((trained.params, trained.stats))
    inputs, outputs = interface.onnx
    facts: dict[str, Any] = {}
    if suppression is not None:
        if not interface.candidates:
            raise ConfigError(
                f"--nms: {trained.config.model} gives no boxes that non-maximum suppression "
                "chooses from, or has chosen by its one-to-one branch"
            )
        outputs = ["boxes", "scores", "classes", *outputs[2:]]
        facts = {"output": suppression.described(outputs[3:]), **dataclasses.asdict(suppression)}

    def program(*arrays: Any) -> Any:
        found = jax.tree.leaves(task.predict(params, stats, *arrays))
        if suppression is None:
            return found
        return onnx_writer.best_of(*found, **dataclasses.asdict(suppression))

    count = batch or jax_export.symbolic_shape(onnx_writer.BATCH)[0]
    shapes = [jax.ShapeDtypeStruct((count, *s.shape), s.dtype) for s in interface.inputs]
    try:
        with onednn.without():
            model = onnx_writer.to_onnx(program, shapes, trained.config.model, inputs, outputs)
    except onnx_writer.UnwritableError as error:
        raise ConfigError(f"{trained.config.model}: {error}") from error
    return model.SerializeToString(), {"opset": onnx_writer.OPSET, **facts}
