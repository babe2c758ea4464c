"""Weights in and out: a file of another program as a trained model, and the other way."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from safetensors.numpy import save as serialize

from jaxaccum import models, tasks
from jaxaccum.data.texts import shown_path
from jaxaccum.machine import user_cache
from jaxaccum.training.checkpoint import CheckpointError
from jaxaccum.training.workdir import why_not_written
from jaxaccum.weights import transfer as weights
from jaxaccum.weights.initial import read
from jaxaccum.weights.transfer import Transfer, WeightsError


def adopt(
    source: Path, model: str = "", names: Sequence[str] = ()
) -> tuple[tasks.Trained, Transfer, tasks.Adopted]:
    """The weights of a file as a trained model.

    Args:
      source: a .pt, .pth or .safetensors file.
      model: its name; "" to tell it from the shapes.
      names: of the classes; those of the file by default.
    Returns:
      (the model, what was loaded, what belongs beside it).
    Raises:
      WeightsError: the file does not hold the whole model.
    """
    found = read(source)
    name = model or weights.guess_model(found)
    kind = _task_of(name)
    adopted = kind.adopt(found, name, names, source)
    config, names = adopted.config, adopted.names
    task = kind.create(config, names, np.dtype(np.float32))
    params, stats = task.initialise(0)
    source_weights = dataclasses.replace(found, names=None)
    params, stats, report = weights.transfer(source_weights, task.model, params, stats, names)
    if not report.complete:
        raise WeightsError("\n".join([f"the file is not a whole {name}", *report.lines()]))
    trained = tasks.Trained(
        task, params, stats, config, tuple(names), 0, "converted", adopted.facts
    )
    return trained, report, adopted


def _task_of(model: str) -> type[tasks.Task]:
    """The task that has a model of this name.

    Raises:
      WeightsError: there is none; names the nearest.
    """
    for task in tasks.TASKS.values():
        if model in task.fields.models():
            return task
    known = models.names()
    close = get_close_matches(model, known, n=3, cutoff=0.4)
    raise WeightsError(
        f"--model: no model named {model!r}; a name is family-scale"
        + (f": did you mean {', '.join(close)}?" if close else f", one of {', '.join(known)}")
    )


def require_safetensors(file: Path) -> None:
    """Refuses a name that says that the file is of another kind.

    Raises:
      WeightsError: it does.
    """
    if file.suffix.lower() != ".safetensors":
        raise WeightsError(
            f"{file}: weights are written as safetensors, which PyTorch's users load with "
            f"safetensors.torch.load_file: name it {file.with_suffix('.safetensors').name}"
        )


def save(trained: tasks.Trained, file: Path) -> int:
    """Writes weights as a state dict under the reference's keys.

    Args:
      file: NAME.safetensors, with the rights that new files have here.
    Returns:
      the number of tensors.
    Raises:
      CheckpointError: the file cannot be written. WeightsError: it is named otherwise.
    """
    require_safetensors(file)
    state = weights.for_pytorch(trained.task.model, trained.params, trained.stats, trained.step)
    facts = {
        "format": "pt",
        "model": trained.config.model,
        "names": json.dumps(trained.names),
        "recipe": trained.fingerprint,
    }
    if "image_size" in trained.config.data:
        facts["image_size"] = str(trained.config.data.image_size)
    try:
        # In one move, and with the rights that new files get: the library's are its owner's alone.
        user_cache.write(file, serialize(state, facts))
    except OSError as error:
        why, advice = why_not_written(error, file.parent)
        raise CheckpointError(f"cannot write {shown_path(file)}: {why}. {advice}") from error
    return len(state)
