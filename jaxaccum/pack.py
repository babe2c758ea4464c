"""python -m jaxaccum.pack --config=FILE[:arg] [--config.key=value ...] --out=DIR [--shards=N]

Writes the data of a config once as sharded ArrayRecord, to be read by index by many processes.
--config.data.path=packed:DIR then gives the same samples in the same order, and the recipe keeps
its fingerprint, so that a run may go from a folder to the packed set and on.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import ml_collections
import numpy as np
from absl import flags
from tqdm import tqdm

from jaxaccum import config as configs
from jaxaccum import data, tasks
from jaxaccum.data import packed
from jaxaccum.data.cloud_sources import CroppedClouds, PairedClouds
from jaxaccum.data.images import FileSource, read_header
from jaxaccum.data.synthetic.shapes import Shapes
from jaxaccum.data.tfds import TfdsSource

SAMPLES_PER_SHARD = 512  # if nobody says how many shards
Example = dict[str, Any]


@dataclasses.dataclass
class _Split:
    """A split on its way into a packed set.

    Attributes:
      told: what set.json says of it.
      arrays: what SPLIT.npz holds of it; what is known only after the records is added by them.
      records: TFDS split -> the number of its records and the one at an index.
    """

    told: dict[str, Any]
    arrays: packed.Arrays
    records: dict[str, tuple[int, Callable[[int], Example]]]


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
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _written(config: ml_collections.ConfigDict, out: Path, work: Path, shards: int) -> list[str]:
    sources = _sources(config)
    describe = {"detection": _images, "detection3d": _images3d, "completion": _clouds}
    splits = {name: describe[config.task](source, config, name) for name, source in sources.items()}
    lines = [line for source in sources.values() for line in source.report.lines()]
    made = _write_records(config.task, splits, work, shards)
    folder = made / packed.FOLDER
    folder.mkdir()
    for name, split in splits.items():
        np.savez(folder / f"{name}.npz", **split.arrays)  # type: ignore[arg-type]
    files = sorted(f for f in made.rglob("*") if f.is_file())
    sizes = {file.relative_to(made).as_posix(): file.stat().st_size for file in files}
    told = {
        "format": packed.FORMAT,
        "task": config.task,
        "options": {"merge": config.compat} if config.task == "detection3d" else {},
        "splits": {name: split.told for name, split in splits.items()},
        "files": sizes,
    }
    (folder / packed.SET).write_text(json.dumps(told, indent=1), encoding="utf-8")
    made.rename(out)  # over an empty folder, too
    count = sum(name.startswith(f"packed_{config.task}-") for name in sizes)
    return [
        *lines,
        f"{sum(sizes.values()) / 2**20:.1f} MiB in {count} shards of {', '.join(splits)}; use "
        f"--config.data.path={packed.PREFIX}{out}",
    ]


def _sources(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The sources of the splits that the task reads."""
    config = config.copy_and_resolve_references()
    names = ["train", "val"]
    if config.task == "completion":
        config.text.encoder = ""  # captions are made of what is packed, by any encoder
        names += ["test", *(["unseen"] if data.has_unseen(config.data.path) else [])]
    task, sources = tasks.of(config), dict[str, Any]()
    for name in names:
        sources[name] = task.open(config, name, sources["train"].names if sources else None)
    return sources


def _told(source: Any) -> dict[str, Any]:
    """What is known of any source."""
    return {
        "identity": source.identity,
        "names": list(source.names),
        "samples": len(source),
        "report": dataclasses.asdict(source.report),
    }


def _images(source: Any, config: ml_collections.ConfigDict, split: str) -> _Split:
    """A source of images with boxes."""
    del config
    return _labelled(source, split, packed.OBJECTS, lambda index: {})


def _images3d(source: Any, config: ml_collections.ConfigDict, split: str) -> _Split:
    """A source of images with boxes in space."""
    made = _labelled(
        source, split, packed.OBJECTS_3D, lambda index: {"camera": source.camera(index)}
    )
    options, val = config.data, split == "val"
    fraction = options.val_fraction if val else 1.0
    made.told["pixels"] = source.pixels
    made.told["list"] = options.val_split if val else split
    made.told["sample"] = [fraction, config.seed if fraction < 1 else 0]
    labels = [source.labels(i) for i in range(len(source))]
    for name in packed.LABELS_3D:
        made.arrays[f"label_{name}"] = np.concatenate([getattr(one, name) for one in labels])
    made.arrays["label_counts"] = np.array([len(one) for one in labels])
    made.arrays["kinds"] = packed.as_array([kind for one in labels for kind in one.kinds])
    made.arrays["cameras"] = np.stack([source.camera(i) for i in range(len(source))])
    return made


def _labelled(
    source: Any, split: str, fields: Sequence[str], more: Callable[[int], Example]
) -> _Split:
    samples = range(len(source))
    objects = [source.objects(i) for i in samples]
    arrays = {name: np.concatenate([getattr(one, name) for one in objects]) for name in fields}
    arrays["counts"] = np.array([len(one) for one in objects])
    arrays["titles"] = packed.as_array([source.name(i) for i in samples])
    orientations = np.ones(len(source), np.int8)
    arrays["orientations"] = orientations

    def example(index: int) -> Example:
        image, orientations[index] = _encoded(source, index)
        labels = {name: getattr(objects[index], name) for name in fields}
        return {"image": image, "name": source.name(index), "objects": labels, **more(index)}

    return _Split(_told(source), arrays, {split: (len(source), example)})


def _encoded(source: Any, index: int) -> tuple[bytes, int]:
    """An image as it is stored, and its EXIF orientation: bytes of its file where there is one,
    else a PNG, which loses nothing.

    Raises:
      DataError: it is damaged. It is better found now than in the middle of a run.
    """
    pixels = source.image(index)
    if isinstance(source, FileSource):
        record = source._records[index]
        return Path(record.file).read_bytes(), record.header.orientation
    if isinstance(source, TfdsSource):
        stored = source._records[source._kept[index][0]]["image"]
        if isinstance(stored, bytes):
            return stored, read_header(io.BytesIO(stored)).orientation
    return cv2.imencode(".png", pixels[..., ::-1])[1].tobytes(), 1


def _clouds(source: Any, config: ml_collections.ConfigDict, split: str) -> _Split:
    """A source of clouds, by its shapes: partial clouds that are cropped are cropped when read."""
    del config
    if not isinstance(source, CroppedClouds | PairedClouds):
        raise data.DataError(f"{source.report.where}: no complete clouds to learn from.")
    paired, shapes = isinstance(source, PairedClouds), source.shapes
    samples = range(len(shapes))
    views = [source.shapes.views(i) if isinstance(source, PairedClouds) else 0 for i in samples]
    spoken = isinstance(shapes, Shapes)
    captions = [shapes.caption(i) for i in samples] if isinstance(shapes, Shapes) else []
    arrays: packed.Arrays = {
        "titles": packed.as_array([shapes.name(i) for i in samples]),
        "captions": packed.as_array(captions),
        "categories": np.array([shapes.category(i) for i in samples], np.int32),
        "views": np.array(views),
    }
    told = _told(shapes) | {
        "points": shapes.points,
        "paired": paired,
        "viewpoints": 1 if spoken else 8,
    }

    def complete(index: int) -> Example:
        return {
            "cloud": shapes.complete(index),
            "name": shapes.name(index),
            "category": shapes.names[shapes.category(index)],
        }

    made = _Split(told, arrays, {split: (len(shapes), complete)})
    if isinstance(source, PairedClouds):
        pairs = source.shapes
        places = [(i, view) for i in samples for view in range(views[i])]

        def partial(place: int) -> Example:
            index, view = places[place]
            return {
                "cloud": pairs.partial(index, view),
                "name": f"{pairs.name(index)}/{view}",
                "category": pairs.names[pairs.category(index)],
            }

        made.records[packed.partials(split)] = len(places), partial
    return made


def _write_records(task: str, splits: dict[str, _Split], work: Path, shards: int) -> Path:
    """Writes the records of all splits as a TFDS data set; returns its folder in `work`."""
    import tensorflow_datasets as tfds

    features = _features(tfds, task, splits["train"].told["names"])
    total = sum(count for split in splits.values() for count, _ in split.records.values())
    bar = tqdm(total=total, unit=" records", disable=None)  # None: on a terminal only
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
        name = f"packed_{task}"
        VERSION = tfds.core.Version("1.0.0")
        url_infos = None  # nothing is downloaded; to look for it, TFDS wants one more package

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                features=features,
                description=f"Packed for the task {task} by python -m jaxaccum.pack.",
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


def _features(tfds: Any, task: str, names: Sequence[str]) -> Any:
    """The features of a record. The labels are as in SPLIT.npz: boxes in pixels, in float32."""
    of = tfds.features

    def floats(*shape: int | None, **options: Any) -> Any:
        return of.Tensor(shape=shape, dtype=np.float32, **options)

    if task == "completion":
        # As bytes: a list of numbers takes TFDS milliseconds to read.
        return of.FeaturesDict(
            {"cloud": floats(None, 3, encoding="bytes"), "name": of.Text(), "category": of.Text()}
        )
    objects = {"boxes": floats(4), "classes": of.ClassLabel(names=names)}
    record = {"image": of.Image(shape=(None, None, 3)), "name": of.Text()}
    if task == "detection3d":
        objects |= {"locations": floats(3), "dimensions": floats(3), "yaw": floats()}
        record["camera"] = floats(3, 4)
    return of.FeaturesDict(record | {"objects": of.Sequence(objects)})


def _parts(count: int, shards: int) -> list[range]:
    """`count` indices in order, in at most that many parts of nearly the same size."""
    shards = min(shards, count)
    ends = [count * i // shards for i in range(shards + 1)]
    return [range(a, b) for a, b in itertools.pairwise(ends)]


def _examples(
    example: Callable[[int], Example], part: range, bar: tqdm
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
