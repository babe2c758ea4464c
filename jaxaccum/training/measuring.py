"""The full evaluation of trained weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxaccum.config import ConfigError
from jaxaccum.draw import contact_sheet, save_image
from jaxaccum.machine.waiting import waiting
from jaxaccum.tasks import Trained
from jaxaccum.training import run
from jaxaccum.training.inference import at_hand
from jaxaccum.training.precise_bn import recompute_statistics


def measure(
    trained: Trained,
    data_path: str = "",
    split: str = "",
    precise_bn: int = 0,
    references: str = "",
    drawn: str | os.PathLike[str] | None = None,
    pictures: int = 4,
    predictions: str | os.PathLike[str] | None = None,
    end_to_end: bool | None = None,
) -> dict[str, Any]:
    """Metrics of weights, on everything that their data set has for the purpose.

    Args:
      trained: the weights, and what they are of.
      data_path: evaluate on this data set instead of the run's own, by the same rules as
        `data.path`; but a COCO json is the one to evaluate on, not that of a training set.
      split: of the data set; "" for its val split, of completion for test and unseen.
      precise_bn: recompute the running statistics over this many of the run's training samples
        first.
      references: a PCN folder with whose cars predictions of real scans are compared.
      drawn: a file for one picture of samples with what was predicted.
      pictures: samples in it, of each set that is evaluated.
      predictions: a file for what is found, as COCO's tools read results; where the data set is no
        COCO json, NAME.truth.json beside it is the data set as one.
      end_to_end: by the one-to-one branch and without NMS, or not; None: as its config says.
    Raises:
      ConfigError: references for a task that has no use for them, or there is no such branch.
    """
    trained = trained.with_end_to_end(end_to_end)
    config = trained.config
    own = at_hand(config.copy_and_resolve_references())
    if references:
        if "references" not in config.eval:
            raise ConfigError("--references is for networks that complete clouds")
        config.eval.references = references
    if data_path:
        config.data.path = data_path
        is_json = data_path.endswith(".json") and not data_path.startswith("packed:")
        if is_json and split:
            raise ConfigError(
                f"--split={split}: the json given is that of the images to evaluate on"
            )
        for other, value in (("val_path", data_path if is_json else ""), ("images", "")):
            if other in config.data:
                config.data[other] = value
    measure, reports = trained.task.full_evaluator(config, split)
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
    if predictions:
        _save_predictions(Path(predictions), *trained.task.coco_results(measure))
    if drawn and samples:
        Path(drawn).parent.mkdir(parents=True, exist_ok=True)
        save_image(Path(drawn), contact_sheet(samples, 2))
    return {
        "model": config.model,
        "step": trained.step,
        "fingerprint": trained.fingerprint,
        **trained.task.choices(),
        **{k: None if np.isnan(v) else v for k, v in metrics.items()},
    }


def _save_predictions(
    file: Path, found: list[dict[str, Any]], truth: dict[str, Any] | None
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found), encoding="utf-8")
    print(f"{len(found)} boxes in {file}, as COCO's tools read results")
    if truth is not None:
        beside = file.with_suffix(".truth.json")
        beside.write_text(json.dumps(truth), encoding="utf-8")
        print(f"their data set as COCO's json: {beside}")
