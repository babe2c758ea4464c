"""python -m jaxaccum.pack --config=FILE[:arg] [--config.key=value ...] --out=DIR [--shards=N]

Writes the data of a config once as sharded ArrayRecord, to be read by index by many processes.
--config.data.path=packed:DIR then gives the same samples in the same order, and the recipe keeps
its fingerprint, so that a run may go from a folder to the packed set and on.
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from absl import flags

from jaxaccum import config as configs
from jaxaccum import data, tasks
from jaxaccum.data.formats import packed
from jaxaccum.machine.waiting import Bar
from jaxaccum.training.workdir import why_not_written

SAMPLES_PER_SHARD = 512  # if nobody says how many shards
Example = dict[str, Any]


def pack(config: ml_collections.ConfigDict, out: Path, shards: int = 0) -> list[str]:
    """Writes the splits of a config that its task reads: train and val; of clouds also test, and
    unseen where there is one.

    What is read is checked: labels as the config asks for, and that every image can be decoded.

    Args:
      config: as made by a file in configs/.
      out: the folder to make. Its last step is a rename: an interrupted pack leaves OUT.incomplete,
        which does not open, and no OUT.
      shards: files of each split; 0 for one for each 512 samples.

    Returns:
      Lines for people.

    Raises:
      ConfigError, DataError: what cannot be packed, or cannot be written there.
    """
    configs.validate(config)
    if shards < 0:
        raise configs.ConfigError(f"--shards is at least 1, or 0 to choose; got {shards}")
    if config.data.path.startswith(packed.PREFIX):
        raise data.DataError(f"{config.data.path} is packed already: copy the folder.")
    packed.require_packages(f"--out={out}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise data.DataError(f"--out={out}: there is something already. Name a new folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(f"{out.name}.incomplete")
    try:
        work.mkdir()
    except FileExistsError:
        raise data.DataError(
            f"{work} is there: another pack is writing it, or one was interrupted. If none runs, "
            f"remove it and start again."
        ) from None
    try:
        return _written(config, out, work, shards)
    except (OSError, RuntimeError) as error:  # ArrayRecord's own words are in RuntimeErrors
        if isinstance(error, RuntimeError) and "write" not in str(error):
            raise
        why, advice = why_not_written(error, out.parent)
        raise data.DataError(f"--out={out}: {why}. {advice}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _written(config: ml_collections.ConfigDict, out: Path, work: Path, shards: int) -> list[str]:
    task = tasks.of(config)
    sources = _sources(config)
    splits = {name: task.packed_split(one, config, name) for name, one in sources.items()}
    lines = [line for source in sources.values() for line in source.report.lines()]
    made = _write_records(task, splits, work, shards)
    folder = made / packed.FOLDER
    folder.mkdir()
    for name, split in splits.items():
        np.savez(folder / f"{name}.npz", **split.arrays)  # type: ignore[arg-type]
    files = sorted(f for f in made.rglob("*") if f.is_file())
    sizes = {file.relative_to(made).as_posix(): file.stat().st_size for file in files}
    told = {
        "format": packed.FORMAT,
        "task": task.name,
        "options": task.packed_options(config),
        "splits": {name: split.told for name, split in splits.items()},
        "files": sizes,
    }
    (folder / packed.SET).write_text(json.dumps(told, indent=1), encoding="utf-8")
    made.rename(out)  # over an empty folder, too
    count = sum(name.startswith(f"packed_{task.name}-") for name in sizes)
    return [
        *lines,
        f"{sum(sizes.values()) / 2**20:.1f} MiB in {count} shards of {', '.join(splits)}; use "
        f"--config.data.path={packed.PREFIX}{out}",
    ]


def _sources(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The sources of the splits that the task reads."""
    task, sources = tasks.of(config), dict[str, Any]()
    for name in task.packed_splits(config):
        names = sources["train"].names if sources else None
        sources[name] = task.open_to_pack(config, name, names)
    return sources


def _write_records(
    task: type[tasks.Task], splits: dict[str, tasks.PackedSplit], work: Path, shards: int
) -> Path:
    """Writes the records of all splits as a TFDS data set; returns its folder in `work`."""
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(task.packed_features(tfds, splits["train"].told["names"]))
    total = sum(count for split in splits.values() for count, _ in split.records.values())
    bar = Bar(total=total, unit=" records", disable=None)  # None: on a terminal only
    generators = {
        name: [
            functools.partial(_examples, example, part, bar)
            for part in _parts(count, shards or -(-count // SAMPLES_PER_SHARD))
        ]
        for split in splits.values()
        for name, (count, example) in split.records.items()
    }

    # A builder that is given its shards, as the order of the samples is part of a recipe. TFDS's
    # GeneratorBasedBuilder shuffles, and told not to, it sorts a whole split in memory. This one
    # keeps the examples of a shard until it has counted them, so shards must not be large.
    class Builder(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        name = f"packed_{task.name}"
        VERSION = tfds.core.Version("1.0.0")
        url_infos = None  # nothing is downloaded; to look for it, TFDS wants one more package

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                features=features,
                description=f"Packed for the task {task.name} by python -m jaxaccum.pack.",
                disable_shuffling=True,
            )

        def _shard_iterators_per_split(self, dl_manager: Any) -> Any:
            del dl_manager
            return generators

        def _log_download_bytes(self) -> None:
            """Says nothing: TFDS would name a folder that is renamed in the end."""

        _log_download_done = _log_download_bytes

    builder = Builder(data_dir=work, file_format="array_record")
    builder.download_and_prepare(download_dir=work / "downloads")
    bar.close()
    return Path(builder.data_dir)


def _parts(count: int, shards: int) -> list[range]:
    """`count` indices in order, in at most that many parts of nearly the same size."""
    shards = min(shards, count)
    ends = [count * i // shards for i in range(shards + 1)]
    return [range(a, b) for a, b in itertools.pairwise(ends)]


def _examples(
    example: Callable[[int], Example], part: range, bar: Bar
) -> Iterator[tuple[int, Example]]:
    for index in part:
        yield index, example(index)
        bar.update()


if __name__ == "__main__":
    from jaxaccum import command_line, config_files

    _CONFIG = config_files.define()
    _OUT = flags.DEFINE_string("out", None, "the folder to make", required=True)
    _SHARDS = flags.DEFINE_integer("shards", 0, "files of each split; 0: one for 512 samples", 0)

    def main() -> int:
        print(*pack(_CONFIG.value, Path(_OUT.value or ""), _SHARDS.value), sep="\n")
        return 0

    command_line.run_verb(
        main,
        __doc__,
        (
            (
                "pack --config=configs/yolo_s.py --config.data.path=DIR/data.yaml --out=packed",
                "then train with --config.data.path=packed:packed",
            ),
        ),
    )
