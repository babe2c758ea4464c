"""python -m jaxaccum.compare --configs=FILE[:arg][@key=value],... --out=DIR [--set=key=value,...]
    [--memory=2GiB] [--nbs=16] [--seeds=0,1] [--most=64] [--check_updates=5]

Compares models twice: each at the largest batch that fits in memory, and all at one batch.

Phase 1 asks how good each model gets on this memory: its effective batch is the largest microbatch
that fits, and the learning rate follows the batch. Phase 2 asks which architecture is better: all
have the effective batch `--nbs`, computed in as many microbatches as each needs. Phase 1 minus
Phase 2 is what the batch does. A config is followed by settings of its own (`@model=yolov8-p2-n`);
`--set` is for all. Started again, it goes on where it stopped.
"""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import jax
from absl import flags

from jaxaccum import command_line
from jaxaccum.comparing.comparison import compare
from jaxaccum.config import ConfigError
from jaxaccum.machine import known_answers

EXAMPLES = (
    (
        "compare --configs=configs/yolo_n.py,configs/yolo_s.py --set=epochs=9 --out=ns",
        "two models, each at its own batch, and both at one",
    ),
)


def verb() -> None:
    """The command line of `python -m jaxaccum.compare`."""
    models = flags.DEFINE_list(
        "configs", None, "FILE[:arg][@key=value]... of each model", required=True
    )
    out = flags.DEFINE_string("out", None, "folder of the comparison", required=True)
    settings = flags.DEFINE_list("set", [], "key=value for all models")
    memory = flags.DEFINE_string("memory", None, "of one device, such as 2GiB")
    nbs = flags.DEFINE_integer("nbs", 0, "effective batch of Phase 2; 0: the smallest of Phase 1",
                               0, 10**6)  # fmt: skip
    seeds = flags.DEFINE_list("seeds", ["0"], "seeds, each a repetition")
    most = flags.DEFINE_integer("most", 64, "largest effective batch of Phase 1", 1, 10**6)
    check = flags.DEFINE_integer("check_updates", 5, "updates to check on other geometries",
                                 0, 10**6)  # fmt: skip
    allow = flags.DEFINE_bool("allow_wrong_numbers", False, known_answers.FLAG_HELP)

    def main() -> int:
        # This process only plans and reads: the accelerator is for those that it starts.
        jax.config.update("jax_platforms", "cpu")
        # Asked to stop, it stops what it started.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        if not all(re.fullmatch(r"\d{1,9}", text, re.ASCII) for text in seeds.value):
            raise ConfigError(f"--seeds are numbers; got {','.join(seeds.value)}")
        compare(
            models.value, Path(out.value), settings=settings.value, memory=memory.value,
            nbs=nbs.value, seeds=list(dict.fromkeys(map(int, seeds.value))), most=most.value,
            check_updates=check.value, command=sys.argv[1:], allow_wrong_numbers=allow.value,
        )  # fmt: skip
        return 0

    command_line.run_verb(main, __doc__, EXAMPLES)


if __name__ == "__main__":
    verb()
