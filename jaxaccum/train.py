"""python -m jaxaccum.train --config=FILE[:arg] [--workdir=DIR] [--config.key=value ...]

Trains a model from a config. Started again on the same workdir, it continues.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from jaxaccum import command_line, config_files
from jaxaccum.machine import known_answers
from jaxaccum.training import run
from jaxaccum.training.distributed import FLAG_HELP, joined
from jaxaccum.training.loop import train
from jaxaccum.training.preemption import Preempted, end_at_once
from jaxaccum.training.verification import require_law

__all__ = ["train", "verb"]


EXAMPLES = (
    ("train --config=configs/quickstart.py", "minutes on a laptop, nothing to download"),
    (
        "train --config=configs/yolo_s.py --config.data.path=DIR/data.yaml --workdir=runs/mine",
        "a detector on your images; the same command continues it",
    ),
    (
        "train --config=configs/yolo_n.py:11 --config.nbs=32 --config.microbatch=auto",
        "with an argument of the config, and with fields of it changed",
    ),
)


def verb() -> None:
    """The command line of `python -m jaxaccum.train`."""
    config = config_files.define()
    workdir = flags.DEFINE_string("workdir", None, "where the run lives; runs/CONFIG by default")
    other = flags.DEFINE_bool("accept_other_recipe", False, "continue under another recipe")
    distributed = flags.DEFINE_string("distributed", "", FLAG_HELP)
    verify = flags.DEFINE_bool(
        "verify", False, "first compute the first update on two geometries in float64, and refuse "
        "to train where they differ",
    )  # fmt: skip
    allow = flags.DEFINE_bool("allow_wrong_numbers", False, known_answers.FLAG_HELP)

    def main() -> int:
        run.use_compilation_cache()
        file = config_flags.get_config_filename(flags.FLAGS["config"])
        folder = Path(workdir.value or config_files.default_workdir(file))
        try:
            with joined(distributed.value) as peers:
                known_answers.require(allow.value)
                if verify.value:
                    print(require_law(config.value, peers), flush=True)
                train(config.value, folder, other.value, peers)
        except Preempted as stopped:
            if peers.alone:  # else JAX has to leave the other processes in order
                end_at_once(stopped.code)
            raise
        return 0

    command_line.run_verb(main, __doc__, EXAMPLES)


class _Callable(types.ModuleType):
    """Makes `jaxaccum.train(...)` that of jaxaccum/api.py, though this module has its name."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        return importlib.import_module("jaxaccum.api").train(*given, **named)


if __name__ == "__main__":
    verb()
else:
    sys.modules[__name__].__class__ = _Callable
