"""The COCO format: one json of images, annotations and categories for each split."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxaccum.data.base import DataError, Objects, Report, normalised_objects
from jaxaccum.data.images import FileSource, Header, Record, Unreadable, read_header
from jaxaccum.data.yolo import HIGHEST, LOWEST

_PROBE = 20  # files to look for before a folder is taken or given up


def open_coco(
    path: str,
    split: str,
    *,
    val_path: str = "",
    images: str = "",
    names: Sequence[str] | None = None,
    on_error: str = "raise",
) -> FileSource:
    """Opens one split of a COCO data set.

    Category ids become 0 to nc-1 in the order of the ids of the train json; the categories of the
    val json are matched to them by name. Annotations with iscrowd are left out and counted;
    images without annotations are kept.

    Args:
      path: the train json.
      split: "train" or "val".
      val_path: the val json; else the train json's name with its last "train" replaced by "val".
      images: the folder of images; else guessed.
      names: the train set's class names, if known: saves reading the train json for val.
      on_error: "raise" refuses a wrong annotation; "skip" counts and drops its image.

    Raises:
      DataError: naming the file, the annotation and the fix.
    """
    file = path if split == "train" else val_path or _sibling(path)
    content = _read_json(file)
    if names is None:
        names = tuple(_categories(content if file == path else _read_json(path), path).values())
    index_of = _class_indices(_categories(content, file), names, file)

    annotations = defaultdict(list)
    report = Report(f"{file} ({split})")
    for annotation in content["annotations"]:
        annotations[annotation.get("image_id")].append(annotation)
    _refuse_strays(content, annotations, report, file, on_error)
    folder = _image_folder(content["images"], file, split, images)

    records = []
    for image in content["images"]:
        place = folder / image["file_name"]
        try:
            header = read_header(place)
        except Unreadable as problem:
            report.skip(str(problem), str(place))
            continue
        try:
            _check_size(image, header, file)
            objects = _objects(
                annotations.get(image["id"], []),
                index_of,
                header,
                report,
                file,
                image["file_name"],
            )
        except DataError:
            if on_error != "skip":
                raise
            report.skip("image with an error in its labels", image["file_name"])
            continue
        records.append(Record(image["file_name"], str(place), header, objects))
    return FileSource(names, records, report)


def _sibling(path: str) -> str:
    name = Path(path).name
    head, found, tail = name.rpartition("train")
    sibling = Path(path).with_name(f"{head}val{tail}")
    if not found or not sibling.is_file():
        tried = f"tried {sibling}" if found else f"{name} has no 'train' in it to replace by 'val'"
        raise DataError(
            f"{path}: no val json found ({tried}). Name it: val_path=...json.", file=path
        )
    return str(sibling)


def _read_json(file: str) -> dict[str, Any]:
    try:
        with Path(file).open(encoding="utf-8") as stream:
            content = json.load(stream)
    except FileNotFoundError:
        raise DataError(f"{file}: no such COCO json. Check the path.", file=file) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not valid JSON: {error}", file=file) from error
    keys = {
        "images": ("id", "file_name"),
        "annotations": ("image_id", "category_id", "bbox"),
        "categories": ("id", "name"),
    }
    for key, fields in keys.items():
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list):
            raise DataError(
                f"{file}: no list `{key}`; a COCO json has images, annotations and categories. "
                f"Is this the instances file?",
                file=file,
            )
        for row in rows:
            missing = [f for f in fields if f not in row]
            if missing:
                raise DataError(
                    f"{file}: an entry of `{key}` lacks {', '.join(missing)}: {_short(row)}. "
                    f"Add it, or remove the entry.",
                    file=file,
                )
    return dict(content)


def _short(row: object) -> str:
    text = json.dumps(row)
    return text if len(text) <= 120 else text[:117] + "..."


def _categories(content: dict[str, Any], file: str) -> dict[int, str]:
    categories = {c["id"]: str(c["name"]) for c in content["categories"]}
    names = sorted(categories.values())
    if len(names) < len(content["categories"]) or len(set(names)) < len(names):
        raise DataError(
            f"{file}: category ids and names must be unique, found {names}. Rename or merge them.",
            file=file,
        )
    if not names:
        raise DataError(f"{file}: `categories` is empty. Add at least one.", file=file)
    return dict(sorted(categories.items()))


def _class_indices(categories: dict[int, str], names: Sequence[str], file: str) -> dict[int, int]:
    unknown = sorted(set(categories.values()) - set(names))
    if unknown:
        raise DataError(
            f"{file}: the categories {unknown} are not among the classes of the train set, "
            f"{list(names)}. Train and val must name their categories alike.",
            file=file,
        )
    return {key: list(names).index(name) for key, name in categories.items()}


def _refuse_strays(
    content: dict[str, Any],
    annotations: dict[Any, list[dict[str, Any]]],
    report: Report,
    file: str,
    on_error: str,
) -> None:
    known = [image["id"] for image in content["images"]]
    if len(set(known)) < len(known):
        twice = next(i for i in known if known.count(i) > 1)
        raise DataError(
            f"{file}: two images have the id {twice}. Give each image its own.", file=file
        )
    for image_id in annotations.keys() - set(known):
        stray = annotations[image_id]
        if on_error != "skip":
            raise DataError(
                f"{file}: annotation {_short(stray[0])} is for image {image_id}, which `images` "
                f"does not have. Add the image or remove the annotation.",
                file=file,
            )
        for annotation in stray:
            report.skip("annotation of an unknown image", f"annotation {annotation.get('id')}")


def _image_folder(entries: Sequence[dict[str, Any]], file: str, split: str, images: str) -> Path:
    """The folder that the file names of the json are relative to."""
    candidates = list(dict.fromkeys(_folders(Path(file), split, images)))
    for folder in candidates:
        if any((folder / entry["file_name"]).is_file() for entry in entries[:_PROBE]):
            return folder
    if not entries:
        raise DataError(f"{file}: `images` is empty. Add images.", file=file)
    tried = "\n  ".join(str(folder / entries[0]["file_name"]) for folder in candidates)
    raise DataError(
        f"{file}: none of its first {min(len(entries), _PROBE)} images was found. Tried, for the "
        f"first of them:\n  {tried}\nName the folder that file_name is relative to: images=...",
        file=file,
    )


def _folders(file: Path, split: str, images: str) -> Iterator[Path]:
    tags = [file.stem.removeprefix("instances_"), split]
    if images:
        yield from (Path(images, *tag) for tag in ([], [tags[0]], [tags[1]]))
        return
    for base in (file.parent, file.parent.parent):
        yield from (base / "images" / tag for tag in tags)
        yield base / "images"
        yield from (base / tag for tag in tags)
        yield base


def _check_size(image: dict[str, Any], header: Header, file: str) -> None:
    declared = (image.get("height", header.size[0]), image.get("width", header.size[1]))
    if declared != header.size:
        raise DataError(
            f"{file}: image {image['file_name']} is declared {declared[1]} x {declared[0]} (width "
            f"x height) but is {header.size[1]} x {header.size[0]}; its boxes would be misplaced. "
            f"Restore the original image, or correct its entry and its boxes.",
            file=file,
        )


def _objects(
    annotations: Sequence[dict[str, Any]],
    index_of: dict[int, int],
    header: Header,
    report: Report,
    file: str,
    image: str,
) -> Objects:
    height, width = header.size
    rows = []
    for annotation in annotations:

        def wrong(problem: str, fix: str, row: dict[str, Any] = annotation) -> DataError:
            shown = {k: row.get(k) for k in ("id", "image_id", "category_id", "bbox")}
            return DataError(f"{file}: {problem}, in annotation {_short(shown)}. {fix}", file=file)

        if annotation.get("iscrowd"):
            report.skip("crowd box", image)
            continue
        if annotation["category_id"] not in index_of:
            raise wrong(
                f"unknown category {annotation['category_id']}, expected one of {list(index_of)}",
                "Add it to `categories`, or correct the annotation.",
            )
        try:
            x, y, w, h = (float(v) for v in annotation["bbox"])
        except (TypeError, ValueError):
            raise wrong("bbox is not four numbers", "Write it as [x, y, width, height].") from None
        row = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
        if not all(math.isfinite(v) and LOWEST <= v <= HIGHEST for v in row):
            raise wrong(
                f"the box does not lie in the image of {width} x {height} pixels",
                "Write it as [x, y, width, height] in pixels, with x, y its top left corner.",
            )
        rows.append((float(index_of[annotation["category_id"]]), *row))
    table = np.array(rows, np.float64).reshape(-1, 5)
    return normalised_objects(table, header.size, report, image, [None] * len(rows))
