"""Where the weights of a run come from: a file, or another run's workdir."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from jaxaccum import config as configs
from jaxaccum.tasks import of
from jaxaccum.training.checkpoint import Checkpoints
from jaxaccum.training.inference import load, require_run
from jaxaccum.weights import branches, torch_file
from jaxaccum.weights import transfer as weights
from jaxaccum.weights.transfer import Transfer, Weights, WeightsError

PyTree = Any


def read(path: Path) -> Weights:
    """The weights in a .pt or .safetensors file, or the best ones of a workdir.

    Raises:
      WeightsError, CheckpointError: there are none, or they cannot be used.
    """
    if not path.exists():
        raise WeightsError(
            f"{path} does not exist: give a .pt, .pth or .safetensors file or a workdir"
        )
    if not path.is_dir():
        found = torch_file.read(path)
        state = branches.unfolded(found.state)
        return dataclasses.replace(found, state=state, folded=state is not found.state)
    trained = load(path, computes=False)
    state = weights.to_reference(trained.params) | weights.to_reference(trained.stats)
    return Weights(
        {k: np.asarray(v) for k, v in state.items()}, trained.names, trained.config.model,
        f"{path}, update {trained.step} of a run", trained.config.data.get("image_size"),
    )  # fmt: skip


def load_initial(
    path: str | Path,
    model: weights.Model,
    params: PyTree,
    stats: PyTree,
    names: Sequence[str],
    beside: Sequence[str],
) -> tuple[PyTree, PyTree, Transfer]:
    """Initial values of a run from the weights of another, with other classes too.

    Args:
      path: a .pt or .safetensors file, or a workdir.
      model: the model to be trained; params, stats: its initial values.
      names: its classes.
      beside: top-level names of values that are no part of the model, see `Task.loss_modules`.
    Returns:
      (params, stats, what was loaded).
    Raises:
      WeightsError, CheckpointError: nothing there, or hardly anything fits.
    """
    own, others = (
        [{k: v for k, v in tree.items() if (k in beside) == aside} for tree in (params, stats)]
        for aside in (False, True)
    )
    params, stats = own
    params, stats, report = weights.transfer(read(Path(path)), model, params, stats, names)
    return {**params, **others[0]}, {**stats, **others[1]}, report


def identities(config: ml_collections.ConfigDict) -> dict[str, str]:
    """What identifies the files of weights that a run needs, wherever they lie."""
    found = {"init": identify(config.init_from)}
    for field, called in of(config).fields.weight_files.items():
        found[called] = identify(configs.get(config, field), field)
    return found


def identify(path: str | Path, field: str = "init_from") -> str:
    """What identifies the weights that a run needs, wherever they lie; "" for none.

    Args:
      path: of a file or a workdir. field: of the config that names it.
    Raises:
      WeightsError: there is neither.
    """
    if not str(path):
        return ""
    path = Path(path)
    if path.is_dir():
        require_run(path)
        with Checkpoints(path) as checkpoints:
            best = checkpoints.best is not None
            step = checkpoints.best if best else checkpoints.latest
            return f"{checkpoints.meta(best=best)['fingerprint']} of update {step}"
    if not path.is_file():
        raise WeightsError(f"{field}: {path} is neither a file nor a workdir")
    return sha256(path)[:12]


def sha256(file: Path) -> str:
    """Hex digits of the hash of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
