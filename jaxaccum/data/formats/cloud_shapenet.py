"""The data sets ShapeNet-55, ShapeNet-34 and Projected ShapeNet (Yu et al. 2021, arXiv:2108.08839;
2023, arXiv:2301.04545): one folder of complete clouds, and lists of what each benchmark uses."""

from __future__ import annotations

import os
from pathlib import Path

from jaxaccum.data.base import DataError
from jaxaccum.data.cloud_check import Check
from jaxaccum.data.cloud_models import (
    Model,
    NormalisedModels,
    PairedModels,
    is_text,
    viewpoints,
)
from jaxaccum.data.clouds import CloudReport
from jaxaccum.data.texts import lines, read_json, read_text, shown, shown_path

# The 55 categories of ShapeNetCore, for sets without a dictionary of their own.
SYNSETS = {
    "02691156": "airplane", "02747177": "trash bin", "02773838": "bag", "02801938": "basket",
    "02808440": "bathtub", "02818832": "bed", "02828884": "bench", "02843684": "birdhouse",
    "02871439": "bookshelf", "02876657": "bottle", "02880940": "bowl", "02924116": "bus",
    "02933112": "cabinet", "02942699": "camera", "02946921": "can", "02954340": "cap",
    "02958343": "car", "02992529": "cellphone", "03001627": "chair", "03046257": "clock",
    "03085013": "keyboard", "03207941": "dishwasher", "03211117": "display",
    "03261776": "earphone", "03325088": "faucet", "03337140": "file cabinet",
    "03467517": "guitar", "03513137": "helmet", "03593526": "jar", "03624134": "knife",
    "03636649": "lamp", "03642806": "laptop", "03691459": "loudspeaker", "03710193": "mailbox",
    "03759954": "microphone", "03761084": "microwaves", "03790512": "motorbike",
    "03797390": "mug", "03928116": "piano", "03938244": "pillow", "03948459": "pistol",
    "03991062": "flowerpot", "04004475": "printer", "04074963": "remote", "04090263": "rifle",
    "04099429": "rocket", "04225987": "skateboard", "04256520": "sofa", "04330267": "stove",
    "04379243": "table", "04401088": "telephone", "04460130": "tower", "04468005": "train",
    "04530566": "watercraft", "04554684": "washer",
}  # fmt: skip


def open_shapenet(
    root: Path, benchmark: str, split: str, check: Check | None
) -> NormalisedModels | PairedModels:
    """The shapes of one split; of Projected ShapeNet with their partial clouds.

    Args:
      root: the folder that holds shapenet_pc.
      benchmark: its name, as `open_clouds` takes it.
      split: "train", "val", "test" or "unseen".
      check: of the files' content.

    Raises:
      DataError: they cannot be used.
    """
    listing = _shapenet_list(root, benchmark, split)
    where = f"{shown_path(listing)} ({split})"
    projected = listing.parent.name.startswith("Projected")
    report, models = CloudReport(where), []
    seen: set[str] = set()
    for number, line in enumerate(lines(read_text(listing)), 1):
        # Projected lists have the folder in front, ShapeNet's have not.
        file = line.strip().rpartition("/")[2]
        if not file:
            continue
        if file in seen:
            report.skip("shape listed again", shown_path(listing), number)
            continue
        seen.add(file)
        # The name of a shape may have hyphens, too.
        synset, hyphen, name = file.removesuffix(".npy").partition("-")
        if not hyphen or not synset or not name or not file.endswith(".npy"):
            raise DataError(
                f"{shown_path(listing)}:{number}: the row {shown(line.strip())}, expected "
                "SYNSET-NAME.npy.",
                file=str(listing), line=number,
            )  # fmt: skip
        complete = root / "shapenet_pc" / file
        if not projected:
            models.append(Model(synset, name, complete))
            continue
        partials = root / "projected_partial_noise" / synset / name / "models"
        if views := viewpoints(partials, split, report):
            models.append(Model(synset, name, complete, partials, views))
    names = _synset_names(root)
    if projected:
        return PairedModels("projected", where, models, names, report, check)
    return NormalisedModels("shapenet", where, models, names, report, check)


def _shapenet_list(root: Path, benchmark: str, split: str) -> Path:
    """The list of a benchmark's split.

    Raises:
      DataError: there is no such benchmark, or it has no such split.
    """
    try:
        folders = sorted(root.iterdir())
    except OSError as error:
        raise DataError(
            f"{shown_path(root)}: cannot be read: {error.strerror}. Check its rights.",
            file=str(root),
        ) from None
    there = {
        folder.name
        for folder in folders
        if (folder / "train.txt").is_file() or (folder / "test.txt").is_file()
    }
    choice = f"There are: {', '.join(sorted(there)) or 'none'}."
    if not benchmark:
        raise DataError(
            f"{root}: which benchmark? Write {root}:BENCHMARK. {choice}", file=str(root)
        )
    names = [name for name in sorted(there) if plain_name(name) == plain_name(benchmark)]
    if len(names) != 1 and benchmark not in there:
        raise DataError(
            f"{root}: no benchmark {benchmark!r}; looked for folders with train.txt or test.txt. "
            f"{choice}",
            file=str(root),
        )
    name = benchmark if benchmark in there else names[0]
    if split == "unseen":
        if "ShapeNet-34" not in name:
            raise DataError(
                f"{root}: {name} has no unseen categories; ShapeNet-34 benchmarks have.",
                file=str(root),
            )
        name = name.replace("ShapeNet-34", "ShapeNet-Unseen21")
    file = root / name / ("train.txt" if split == "train" else "test.txt")
    if not file.is_file():
        what = "not a file" if os.path.lexists(file) else "no such list"
        raise DataError(f"{file}: {what}, for the split {split!r}. {choice}", file=str(file))
    return file


def plain_name(benchmark: str) -> str:
    """A benchmark's name without what may be left out of it."""
    return benchmark.lower().replace("_shapenet", "").replace("_noise", "")


def _synset_names(root: Path) -> dict[str, str]:
    """Category id -> name: ShapeNet's 55, and the data set's own."""
    for name in ("synset_dict.json", "shapenet_synset_dict.json"):
        file = root / name
        if not file.is_file():
            continue
        own = read_json(file)
        if not isinstance(own, dict):
            raise DataError(
                f"{shown_path(file)}: not a json of category ids and names, but {shown(own)}.",
                file=str(file),
            )
        for key, value in own.items():
            if (
                not isinstance(value, str | int)
                or isinstance(value, bool)
                or not is_text(str(value))
            ):
                raise DataError(
                    f"{shown_path(file)}: not a json of category ids and names: {shown(key)} is "
                    f"{shown(value)}, no name.",
                    file=str(file),
                )
        return SYNSETS | {key: str(value) for key, value in own.items()}
    return SYNSETS
