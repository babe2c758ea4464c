"""A detector that compiles in seconds, with all that a real one has; also a run of it to kill.

python tests/tiny.py WORKDIR [STEPS] trains it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from jaxaccum import config as configs
from jaxaccum.models import yolo

yolo.FAMILIES["tiny"] = yolo.Family(
    depth={"t": 1.0},
    width={"t": 0.25},
    max_channels={"t": 1024},
    rows=(
        (-1, 1, "Conv", (32, 3, 2)),
        (-1, 1, "Conv", (32, 3, 2)),
        (-1, 1, "Conv", (64, 3, 2)),  # 2, stride 8
        (-1, 1, "C2f", (64, True)),
        (-1, 1, "Conv", (64, 3, 2)),  # 4, stride 16
        ((3, 4), 1, "Detect", ()),
    ),
)
yolo.FAMILIES["tiny-3d"] = dataclasses.replace(
    yolo.FAMILIES["tiny"], rows=(*yolo.FAMILIES["tiny"].rows[:-1], ((3, 4), 1, "Detect3D", ()))
)
# As YOLO26 is built: distances without bins, two sets of branches, attention in a C3k2.
yolo.FAMILIES["tiny-26"] = dataclasses.replace(
    yolo.FAMILIES["tiny"],
    depthwise_head=True,
    bins=1,
    one_to_one=True,
    rows=(
        *yolo.FAMILIES["tiny"].rows[:3],
        (-1, 1, "C3k2", (64, True, 0.5, True)),
        (-1, 1, "Conv", (64, 3, 2)),  # 4, stride 16
        (-1, 1, "SPPF", (64, 5, True)),
        ((3, 5), 1, "Detect", ()),
    ),
)


def predicted(trained, source, out, **options):
    """What the verb `predict` writes of files, as its JSON has it."""
    from jaxaccum.tasks.predicting import predict_files

    predict_files(trained, source, out, [], **options)
    return json.loads((out / trained.task.results).read_text())


def untrained(folder, config, names, facts=None):
    """A network with its initial weights, as the best of a run."""
    import numpy as np

    from jaxaccum import tasks
    from jaxaccum.training import checkpoint, inference

    task = tasks.of(config).create(config, names, np.dtype(np.float32))
    params, stats = task.initialise(0)
    meta = {"fingerprint": "", "config": config.to_dict(), "names": list(names)}
    with checkpoint.Checkpoints(folder) as checkpoints:
        checkpoints.save_best(0, {"params": params, "stats": stats}, {**meta, "facts": facts or {}})
    return inference.load(folder)


def tiny_config(**changes):
    """A run on the embedded scenes at 64 px; `changes` are dotted fields."""
    config = configs.detection()
    config.model = "tiny-t"
    config.update_from_flattened_dict(
        {
            "nbs": 4, "bn_group": 2, "microbatch": 2, "devices": 1, "steps": 12,
            "data.image_size": 64, "data.max_objects": 32, "log.every": 1, "log.images": 1,
            "log.report": False, "log.tensorboard": False, "eval.every": 6, "eval.batch": 64,
            "checkpoint.every": 3,
            "lr.warmup_epochs": 0.0, "optimizer.name": "adamw", "optimizer.momentum": 0.9,
            "lr.base": 1e-3,  # at the default of 1e-2 rounding grows tenfold per update
        }
        | changes
    )  # fmt: skip
    return config.lock()


def tiny_config3d(**changes):
    """A run on the embedded streets at 64 x 96 px."""
    config = configs.detection3d()
    config.model = "tiny-3d-t"
    config.update_from_flattened_dict(
        {
            "nbs": 4, "bn_group": 2, "microbatch": 2, "devices": 1, "steps": 6,
            "data.height": 64, "data.width": 96, "data.max_objects": 20, "log.every": 1,
            "log.images": 1, "log.report": False, "log.tensorboard": False, "eval.every": 3,
            "eval.batch": 8, "checkpoint.every": 3, "lr.warmup_epochs": 0.0,
        }
        | changes
    )  # fmt: skip
    return config.lock()


if __name__ == "__main__":
    import jax

    from jaxaccum import train
    from jaxaccum.training import run

    jax.config.update("jax_platforms", "cpu")
    run.use_compilation_cache()
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 400
    changes = {"steps": steps, "eval.every": 80, "checkpoint.every": 10}
    train.train(tiny_config(**changes), Path(sys.argv[1]))
