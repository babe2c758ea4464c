"""python -m jaxaccum.convert --from=FILE --out=DIR [--model=NAME] [--names=a,b,c]
python -m jaxaccum.convert --from=WORKDIR_OR_FILE --to=FILE.safetensors

Weights in: a .pt, .pth or .safetensors file of a YOLO detector, of PoinTr or of AdaPoinTr becomes a
workdir that evaluate, predict and `init_from` take. Weights out: the best weights of a run, or
those of such a file, as a state dict that PyTorch loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from jaxaccum import tasks
from jaxaccum.training.checkpoint import CheckpointError, Checkpoints
from jaxaccum.training.inference import load
from jaxaccum.weights import exchange
from jaxaccum.weights.initial import sha256
from jaxaccum.weights.transfer import Transfer, WeightsError

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
    trained, report, adopted = exchange.adopt(source, model, names)
    digest = sha256(source) if source.is_file() else ""
    meta = {
        "fingerprint": "converted",
        "recipe": {"converted_from": source.name, "sha256": digest},
        "config": trained.config.to_dict(),
        "names": list(trained.names),
        "facts": adopted.facts,
        "best": {},
        "metrics": {},
    }
    if any((out / kind).is_dir() and any((out / kind).iterdir()) for kind in ("last", "best")):
        raise CheckpointError(f"{out} already holds a run: give another --out")
    out.mkdir(parents=True, exist_ok=True)
    with Checkpoints(out) as checkpoints:
        checkpoints.save_best(0, {"params": trained.params, "stats": trained.stats}, meta)
    return report, adopted


def write(source: Path, file: Path, model: str = "", names: Sequence[str] = ()) -> int:
    """Writes the best weights of a workdir, or those of a file, as a state dict under the
    reference's keys; see `exchange.save`.

    Args:
      source: a workdir, or a .pt, .pth or .safetensors file.
      file: to write.
      model, names: of weights from a file, as `convert` takes them.
    Returns:
      the number of tensors.
    Raises:
      CheckpointError: the workdir holds none, or the file cannot be written. WeightsError: its
        name is not that of such a file.
    """
    exchange.require_safetensors(file)
    if source.exists() and file.is_dir():
        raise CheckpointError(f"cannot write {file}: it is a folder, expected a file")
    if source.is_file():
        return exchange.save(exchange.adopt(source, model, names)[0], file)
    if model or names:
        raise WeightsError(f"{source} is a run, which knows its model and its classes")
    return exchange.save(load(source), file)


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
            count = write(source, Path(_TO.value), _MODEL.value, _NAMES.value)
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
