"""python -m jaxaccum.convert --from=FILE --out=DIR [--model=NAME] [--names=a,b,c]
python -m jaxaccum.convert --from=WORKDIR --to=FILE.safetensors

Weights in: a .pt, .pth or .safetensors file of a YOLO detector, of PoinTr or of AdaPoinTr becomes a
workdir that evaluate, predict and `init_from` take. Weights out: the best weights of a run as a
state dict that PyTorch loads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from safetensors.numpy import save_file

from jaxaccum import models, tasks
from jaxaccum.training.checkpoint import CheckpointError, Checkpoints
from jaxaccum.training.inference import load
from jaxaccum.weights import transfer as weights
from jaxaccum.weights.initial import read, sha256
from jaxaccum.weights.transfer import Transfer, Weights, WeightsError

PyTree = Any


def convert(
    source: Path, out: Path, model: str = "", names: Sequence[str] = ()
) -> tuple[Transfer, tasks.Adopted]:
    """Writes the weights of a file as the best ones of a workdir.

    Args:
      source: a .pt or .safetensors file.
      out: a folder without weights of its own.
      model: its name; "" to tell it from the shapes.
      names: of the classes; those of the file by default.
    Returns:
      (what was loaded, what is saved beside it).
    Raises:
      WeightsError: the file does not hold the whole model. CheckpointError: `out` is taken, or
        cannot be written.
    """
    found = read(source)
    name = model or weights.guess_model(found)
    kind = _task_of(name)
    adopted = kind.adopt(found, name, names, source)
    config, names = adopted.config, adopted.names
    task = kind.create(config, names, np.dtype(np.float32))
    params, stats = task.initialise(0)
    source_weights = Weights(found.state, None, found.model, found.origin)
    params, stats, report = weights.transfer(source_weights, task.model, params, stats, names)
    if not report.complete:
        raise WeightsError("\n".join([f"the file is not a whole {name}", *report.lines()]))
    digest = sha256(source) if source.is_file() else ""
    meta = {
        "fingerprint": "converted",
        "recipe": {"converted_from": source.name, "sha256": digest},
        "config": config.to_dict(),
        "names": list(names),
        "facts": adopted.facts,
        "best": {},
        "metrics": {},
    }
    if any((out / kind).is_dir() and any((out / kind).iterdir()) for kind in ("last", "best")):
        raise CheckpointError(f"{out} already holds a run: give another --out")
    out.mkdir(parents=True, exist_ok=True)
    with Checkpoints(out) as checkpoints:
        checkpoints.save_best(0, {"params": params, "stats": stats}, meta)
    return report, adopted


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


def write(workdir: Path, file: Path) -> int:
    """Writes the best weights of a workdir as a state dict under the reference's keys.

    Returns:
      the number of tensors.
    Raises:
      CheckpointError: the workdir holds none, or the file cannot be written.
    """
    if workdir.is_dir() and file.is_dir():
        raise CheckpointError(f"cannot write {file}: it is a folder, expected a file")
    trained = load(workdir)
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
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, file, facts)
    except OSError as error:
        raise CheckpointError(f"cannot write {file}: {error}") from error
    return len(state)


if __name__ == "__main__":
    from jaxaccum import command_line

    _FROM = flags.DEFINE_string(
        "from", None, "a .pt, .pth or .safetensors file, or a run", required=True
    )
    _OUT = flags.DEFINE_string("out", None, "the workdir to make of a file")
    _TO = flags.DEFINE_string("to", None, "the .safetensors to make of a run")
    _MODEL = flags.DEFINE_string("model", "", "family-scale; told from the shapes by default")
    _NAMES = flags.DEFINE_list("names", [], "class names, in order; those of the file by default")

    def main() -> int:
        source = Path(_FROM.value or "")
        if bool(_OUT.value) == bool(_TO.value):
            raise WeightsError(
                "give --out=DIR to make a workdir of a file, or --to=FILE.safetensors to make a "
                "file of a run"
            )
        if _TO.value:
            count = write(source, Path(_TO.value))
            print(f"{count} tensors in {_TO.value}")
            return 0
        out = Path(_OUT.value or "")
        report, adopted = convert(source, out, _MODEL.value, _NAMES.value)
        print(*report.lines(), sep="\n")
        told = "" if _MODEL.value else " (told from the shapes)"
        print(f"model {adopted.config.model}{told}, {adopted.summary}")
        *hints, last = (*adopted.hints, f"weights in {out / 'best'}")
        for line in hints:
            print(line)
        print(last)
        return 0

    command_line.run_verb(
        main,
        __doc__,
        (
            ("convert --from=yolo11n.pt --model=yolo11-n --out=runs/converted", "weights in"),
            ("convert --from=runs/mine --to=mine.safetensors", "weights out, for PyTorch"),
        ),
    )
