"""python -m jaxaccum.evaluate --workdir=DIR [--data=PATH] [--precise_bn=N]

Evaluates the best weights of a run on its val split. The last line of the output is one JSON
object.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags, logging

from jaxaccum import run
from jaxaccum.evaluation import recompute_statistics
from jaxaccum.inference import load


def evaluate(workdir: Path, data_path: str = "", precise_bn: int = 0) -> dict[str, Any]:
    """Metrics of a run's best weights, on everything that its data set has for the purpose.

    Args:
      workdir: of the run.
      data_path: evaluate on this data set instead of the run's own, by the same rules as
        `data.path`.
      precise_bn: recompute the running statistics over this many training samples first.
    """
    trained = load(workdir)
    config = trained.config
    if data_path:
        config.data.path = data_path
        for other in ("val_path", "images"):
            if other in config.data:
                config.data[other] = ""
    measure, reports = trained.task.full_evaluator(config)
    print(*reports, sep="\n")
    stats = trained.stats
    if precise_bn:
        train_set = run.open_source(config, "train", trained.names)
        this = run.prepare(config, names=trained.names, samples=len(train_set), identity={})
        stream = run.make_stream(this, train_set, plain=True)
        stats = recompute_statistics(trained.task, trained.params, stats, stream, precise_bn)
    metrics, _ = measure(trained.params, stats, 0)
    return {
        "workdir": str(workdir),
        "model": config.model,
        "step": trained.step,
        "fingerprint": trained.fingerprint,
        **{k: None if np.isnan(v) else v for k, v in metrics.items()},
    }


if __name__ == "__main__":
    from jaxaccum.train import main_with_clear_errors

    _WORKDIR = flags.DEFINE_string("workdir", None, "the run to evaluate", required=True)
    _DATA = flags.DEFINE_string("data", "", "another data set to evaluate on")
    _PRECISE = flags.DEFINE_integer(
        "precise_bn", 0, "recompute batch-norm statistics over this many training samples"
    )

    def main(_) -> int:
        logging.set_verbosity(logging.ERROR)
        run.use_compilation_cache()
        print(json.dumps(evaluate(Path(_WORKDIR.value), _DATA.value, _PRECISE.value)))
        return 0

    main_with_clear_errors(main)
