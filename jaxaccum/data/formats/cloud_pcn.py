"""The data set PCN (Yuan et al. 2018, arXiv:1808.00671): PCN.json and a folder for each split."""

from __future__ import annotations

from pathlib import Path

from jaxaccum.data.base import DataError
from jaxaccum.data.cloud_check import Check
from jaxaccum.data.cloud_models import Model, PairedModels, read_categories, viewpoints
from jaxaccum.data.clouds import CloudReport
from jaxaccum.data.texts import shown_path


def open_pcn(root: Path, split: str, check: Check | None) -> PairedModels:
    """The shapes of one split.

    Args:
      root: the folder that holds PCN.json.
      split: "train", "val" or "test".
      check: of the files' content.

    Raises:
      DataError: they cannot be used.
    """
    where = f"{shown_path(root)} ({split})"
    if split == "unseen":
        raise DataError(f"{where}: PCN has no unseen categories. Use train, val or test.")
    report, models, names = CloudReport(where), [], {}
    listing = root / "PCN.json"
    seen = set[tuple[str, str]]()
    for category in read_categories(listing, split):
        synset = category["taxonomy_id"]
        names[synset] = category["taxonomy_name"]
        for name in category[split]:
            if (synset, name) in seen:
                report.skip("shape listed again", f"{shown_path(listing)}: {synset}/{name}")
                continue
            seen.add((synset, name))
            partials = root / split / "partial" / synset / name
            if views := viewpoints(partials, split, report):
                complete = root / split / "complete" / synset / f"{name}.pcd"
                models.append(Model(synset, name, complete, partials, views))
    return PairedModels("pcn", where, models, names, report, check)
