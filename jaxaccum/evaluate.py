"""python -m jaxaccum.evaluate --workdir=DIR [--data=PATH] [--split=SPLIT] [--precise_bn=N]
    [--references=PATH] [--drawn=FILE] [--pictures=4] [--predictions=FILE] [--end_to_end] [--rect]

Evaluates the best weights of a run on its val split; of completion, on the test split and the
unseen categories, and where we crop the clouds, in the modes easy, median and hard. The last line
of the output is one JSON object, the one before it says how long a sample took.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from absl import flags

from jaxaccum import full_evaluation
from jaxaccum.machine import known_answers
from jaxaccum.training import run
from jaxaccum.training.inference import END_TO_END_HELP, WEIGHTS_HELP, load


def evaluate(
    workdir: Path, data_path: str = "", weights: str = "", **options: Any
) -> dict[str, Any]:
    """Metrics of a run's best weights; see `full_evaluation.evaluate`.

    Args:
      workdir: of the run.
      data_path: evaluate on this data set instead of the run's own.
      weights: as of `inference.load`.
    """
    found = full_evaluation.evaluate(load(workdir, weights), data_path, **options)
    return {"workdir": str(workdir), **found}


if __name__ == "__main__":
    from jaxaccum import command_line

    _WORKDIR = flags.DEFINE_string("workdir", None, "the run to evaluate", required=True)
    _DATA = flags.DEFINE_string(
        "data", "", "another data set to evaluate on; of COCO, the json of these images"
    )
    _SPLIT = flags.DEFINE_string("split", "", "of the data set: train, val, test, ...")
    _WEIGHTS = flags.DEFINE_string("weights", "", WEIGHTS_HELP)
    _ONCE = flags.DEFINE_bool("end_to_end", None, END_TO_END_HELP)
    _RECT = flags.DEFINE_bool("rect", None, full_evaluation.RECT_HELP)
    _PRECISE = flags.DEFINE_integer(
        "precise_bn", 0, "recompute batch-norm statistics over this many training samples",
        0, 10**9,
    )  # fmt: skip
    _DRAWN = flags.DEFINE_string("drawn", "", "a file for a picture of samples and predictions")
    _PICTURES = flags.DEFINE_integer("pictures", 4, "samples in it, of each set", 1, 1000)
    _PREDICTIONS = flags.DEFINE_string(
        "predictions", "", "a file for what a detector finds, as COCO's tools read results"
    )
    _REFERENCES = flags.DEFINE_string("references", "", "PCN folder, for the MMD of real scans")
    _ALLOW = flags.DEFINE_bool("allow_wrong_numbers", False, known_answers.FLAG_HELP)

    def main() -> int:
        run.use_compilation_cache()
        known_answers.require(_ALLOW.value)
        drawn = Path(_DRAWN.value) if _DRAWN.value else None
        found = evaluate(
            Path(_WORKDIR.value), _DATA.value, _WEIGHTS.value, split=_SPLIT.value,
            precise_bn=_PRECISE.value, references=_REFERENCES.value, drawn=drawn,
            pictures=_PICTURES.value, predictions=_PREDICTIONS.value or None,
            end_to_end=_ONCE.value, rect=_RECT.value,
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
