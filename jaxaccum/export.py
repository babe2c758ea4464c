"""python -m jaxaccum.export --workdir=DIR --out=FILE [--platforms=cpu,cuda,tpu] [--batch=N]

Writes a run's best weights and its network as one StableHLO program, which `load_exported`, or any
runtime of StableHLO, runs without this package's models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags, logging
from jax import export as jax_export

from jaxaccum.checkpoint import CheckpointError
from jaxaccum.config import ConfigError
from jaxaccum.inference import load

PLATFORMS = ("cpu", "cuda", "tpu")
_KNOWN = (*PLATFORMS, "rocm")


def export(
    workdir: Path, file: Path, platforms: Sequence[str] = PLATFORMS, batch: int = 0
) -> dict[str, Any]:
    """Writes FILE, the program, and FILE.json, what it takes and gives.

    The program maps images (N, S, S, 3) uint8 RGB to boxes (N, A, 4), x1 y1 x2 y2 in pixels, and
    class probabilities (N, A, classes), before non-maximum suppression. The weights are in it.

    Args:
      workdir: of the run.
      file: to write.
      platforms: it can run on.
      batch: images per call; 0 for any number.
    Returns:
      what FILE.json holds.
    Raises:
      CheckpointError: the workdir holds no weights, or the file cannot be written.
      ConfigError: an unknown platform.
    """
    if not platforms or not set(platforms) <= set(_KNOWN):
        raise ConfigError(f"platforms are of {', '.join(_KNOWN)}; got {', '.join(platforms)!r}")
    trained = load(workdir)
    size = trained.task.image_size
    params, stats = jax.device_get(trained.params), jax.device_get(trained.stats)

    @jax.jit
    def predict(images):
        return trained.task.predict(params, stats, images)

    count = batch or jax_export.symbolic_shape("n")[0]
    images = jax.ShapeDtypeStruct((count, size, size, 3), jnp.uint8)
    exported = jax_export.export(predict, platforms=tuple(platforms))(images)
    facts = {
        "model": trained.config.model,
        "names": list(trained.names),
        "image_size": size,
        "batch": batch or "any",
        "platforms": list(exported.platforms),
        "input": "images (N, S, S, 3) uint8 RGB, letterboxed to S = image_size",
        "output": "boxes (N, A, 4) x1 y1 x2 y2 in pixels, class probabilities (N, A, classes)",
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(exported.serialize())
        file.with_name(f"{file.name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    except OSError as error:
        raise CheckpointError(f"cannot write {file}: {error}") from error
    return facts


def load_exported(file: Path) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """The program in a file, as a function of images."""
    return jax.jit(jax_export.deserialize(bytearray(file.read_bytes())).call)


if __name__ == "__main__":
    from jaxaccum.train import main_with_clear_errors

    _WORKDIR = flags.DEFINE_string("workdir", None, "the run whose weights to use", required=True)
    _OUT = flags.DEFINE_string("out", None, "the file to write", required=True)
    _PLATFORMS = flags.DEFINE_list("platforms", list(PLATFORMS), "where it can run")
    _BATCH = flags.DEFINE_integer("batch", 0, "images per call; 0 for any number", 0)

    def main(_) -> int:
        logging.set_verbosity(logging.ERROR)
        facts = export(Path(_WORKDIR.value), Path(_OUT.value), _PLATFORMS.value, _BATCH.value)
        print(json.dumps(facts))
        return 0

    main_with_clear_errors(main)
