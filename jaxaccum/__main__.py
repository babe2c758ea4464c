"""jaxaccum VERB [...], the same as python -m jaxaccum.VERB [...]: all that jaxaccum does."""

from __future__ import annotations

import runpy
import sys
from difflib import get_close_matches

import jaxaccum
from jaxaccum import start
from jaxaccum.machine import host_memory

VERBS = {
    "train": "trains a model from a config, and continues it",
    "evaluate": "measures a run's weights on its data or on others",
    "predict": "finds, draws and writes what is in images, videos or clouds",
    "export": "writes a network as one program, StableHLO or ONNX",
    "convert": "takes weights of other programs in, and gives them out",
    "compare": "trains several models on one data set, and reports",
    "plan": "says what a geometry costs in memory and time, before it runs",
    "calibrate": "measures how far plans are off on this machine",
    "import-config": "turns a config of Ultralytics or PoinTr into one of ours",
    "pack": "writes a data set once as large files that are read at random",
    "models": "lists the models with their parameters and operations",
}
_WRONG_WORDS = 2


def usage() -> str:
    """The verbs, and how to go on."""
    width = max(map(len, VERBS))
    rows = [f"  {verb:<{width}}  {told}" for verb, told in VERBS.items()]
    return "\n".join([
        "jaxaccum VERB [--FLAG=VALUE ...]", "", *rows, "",
        "jaxaccum VERB --help shows examples and flags; jaxaccum --version the version.",
        "In Python: jaxaccum.load(...), jaxaccum.train(...) (docs/python.md).",
    ])  # fmt: skip


def main() -> None:
    """The command `jaxaccum`."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in ("--version", "version"):
        print(f"jaxaccum {jaxaccum.__version__}")
    elif word in ("", "-h", "-help", "--help", "help", "--helpfull"):
        print(usage())
    elif word in VERBS:
        host_memory.restart("jaxaccum")
        del sys.argv[1]
        start.prepare()
        start.importing()
        runpy.run_module(f"jaxaccum.{word.replace('-', '_')}", run_name="__main__", alter_sys=True)
        return
    else:
        close = get_close_matches(word, VERBS, n=1, cutoff=0.5)
        meant = f"did you mean {close[0]}?" if close else f"one of {', '.join(VERBS)}"
        print(f"error: {word!r} is no verb of jaxaccum: {meant}", file=sys.stderr)
        sys.exit(_WRONG_WORDS)
    sys.exit(0 if word else _WRONG_WORDS)


if __name__ == "__main__":
    main()
