"""A process that makes one update of a detector and prints how long everything took, as JSON.

python first_step.py MODEL SIZE BATCH
"""

import json
import sys
import time
from pathlib import Path

START = time.perf_counter()
sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

import jax

from benchmarks import runs
from jaxaccum.training import run


def main() -> None:
    model, size, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    run.use_compilation_cache()
    this = runs.prepare(
        "detection", model, nbs=count, microbatch=count, bn_group=count, data__image_size=size
    )
    jax.devices()
    imported = time.perf_counter()
    updates = runs.Updates(this)
    first = time.perf_counter()
    usual = updates.seconds()
    print(json.dumps({"start": imported - START, "first": first - imported, "usual": usual}))


if __name__ == "__main__":
    main()
