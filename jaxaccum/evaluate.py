"""python -m jaxaccum.evaluate --workdir=DIR [--data=PATH] [--precise_bn=N] [--references=PATH]
    [--drawn=FILE] [--pictures=4]

Evaluates the best weights of a run on its val split; of completion, on the test split and the
unseen categories, and where we crop the clouds, in the modes easy, median and hard. The last line
of the output is one JSON object.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from jaxaccum.config import ConfigError
from jaxaccum.draw import contact_sheet, save_image
from jaxaccum.machine import known_answers
from jaxaccum.machine.waiting import waiting
from jaxaccum.training import run
from jaxaccum.training.inference import load
from jaxaccum.training.precise_bn import recompute_statistics


def evaluate(
    workdir: Path,
    data_path: str = "",
    precise_bn: int = 0,
    references: str = "",
    drawn: Path | None = None,
    pictures: int = 4,
) -> dict[str, Any]:
    """Metrics of a run's best weights, on everything that its data set has for the purpose.

    Args:
      workdir: of the run.
      data_path: evaluate on this data set instead of the run's own, by the same rules as
        `data.path`.
      precise_bn: recompute the running statistics over this many of the run's training samples
        first.
      references: a PCN folder with whose cars predictions of real scans are compared.
      drawn: a file for one picture of samples with what was predicted.
      pictures: samples in it, of each set that is evaluated.
    Raises:
      ConfigError: references for a task that has no use for them.
    """
    trained = load(workdir)
    config = trained.config
    own = config.copy_and_resolve_references()
    if references:
        if "references" not in config.eval:
            raise ConfigError("--references is for networks that complete clouds")
        config.eval.references = references
    if data_path:
        config.data.path = data_path
        for other in ("val_path", "images"):
            if other in config.data:
                config.data[other] = ""
    measure, reports = trained.task.full_evaluator(config)
    print(*reports, sep="\n")
    stats = trained.stats
    if precise_bn:
        train_set = run.open_source(own, "train", trained.names)
        this = run.prepare(own, names=trained.names, samples=len(train_set), identity={})
        stream = run.make_stream(this, train_set, plain=True)
        stats = recompute_statistics(this, trained.params, stats, stream, precise_bn)
    with waiting("evaluating"):
        metrics, samples = measure(trained.params, stats, pictures if drawn else 0)
    for line in trained.task.tables(metrics):
        print(line)
    if drawn and samples:
        drawn.parent.mkdir(parents=True, exist_ok=True)
        save_image(drawn, contact_sheet(samples, 2))
    return {
        "workdir": str(workdir),
        "model": config.model,
        "step": trained.step,
        "fingerprint": trained.fingerprint,
        **{k: None if np.isnan(v) else v for k, v in metrics.items()},
    }


if __name__ == "__main__":
    from jaxaccum import command_line

    _WORKDIR = flags.DEFINE_string("workdir", None, "the run to evaluate", required=True)
    _DATA = flags.DEFINE_string("data", "", "another data set to evaluate on")
    _PRECISE = flags.DEFINE_integer(
        "precise_bn", 0, "recompute batch-norm statistics over this many training samples",
        0, 10**9,
    )  # fmt: skip
    _DRAWN = flags.DEFINE_string("drawn", "", "a file for a picture of samples and predictions")
    _PICTURES = flags.DEFINE_integer("pictures", 4, "samples in it, of each set", 1, 1000)
    _REFERENCES = flags.DEFINE_string("references", "", "PCN folder, for the MMD of real scans")
    _ALLOW = flags.DEFINE_bool("allow_wrong_numbers", False, known_answers.FLAG_HELP)

    def main() -> int:
        run.use_compilation_cache()
        known_answers.require(_ALLOW.value)
        drawn = Path(_DRAWN.value) if _DRAWN.value else None
        found = evaluate(
            Path(_WORKDIR.value), _DATA.value, _PRECISE.value, _REFERENCES.value, drawn,
            _PICTURES.value,
        )  # fmt: skip
        print(json.dumps(found))
        return 0

    command_line.run_verb(
        main,
        __doc__,
        (
            ("evaluate --workdir=runs/mine", "the best weights, on the run's own val split"),
            ("evaluate --workdir=runs/mine --data=DIR/data.yaml", "on another data set"),
            ("evaluate --workdir=runs/mine --drawn=seen.png", "with a picture of what is found"),
        ),
    )
