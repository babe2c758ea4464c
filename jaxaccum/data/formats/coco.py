"""The COCO format: one json of images, annotations and categories for each split."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxaccum.data.base import (
    CLIPPED,
    DataError,
    Objects,
    Report,
    normalised_objects,
    refuse_faults,
)
from jaxaccum.data.formats.coco_files import cut, image_folder, place_of
from jaxaccum.data.formats.coco_rows import field_of, read_coco, said, wrong
from jaxaccum.data.formats.yolo import HIGHEST, LOWEST
from jaxaccum.data.images import Damaged, FileSource, Header, Record, Unreadable, read_header
from jaxaccum.data.texts import shown, shown_path

_LISTED = 20  # of a long list, how many a message names
_LARGEST = 1e6  # pixels
_TELLING = 8  # boxes from which on their numbers tell what they mean

_Box = tuple[float, float, float, float]


class _Annotation(NamedTuple):
    """A row of `annotations`: its place, its category's id, its x, y, w, h, None of a crowd."""

    at: int
    category: str
    box: _Box | None


class _Content(NamedTuple):
    """A json, its rows checked.

    Attributes:
      file: where it lies.
      rows: images, annotations and categories as they are written.
      categories: id -> name of the categories that are classes, in the order of their ids.
      annotations: id of an image -> its annotations.
      damaged: id of an image -> how many of its annotations are wrong, where such images are left
        out.
    """

    file: str
    rows: Mapping[str, list[Any]]
    categories: dict[str, str]
    annotations: Mapping[str, list[_Annotation]]
    damaged: Mapping[str, int]


class _Image(NamedTuple):
    """A row of `images`: its place, file name and size (height, width), None where unknown."""

    at: int
    file_name: str
    declared: tuple[int | None, int | None]


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
    val json are matched to them by name. A supercategory that nothing uses, annotations with
    iscrowd and images that are not there are left out and counted; images without annotations are
    kept. Boxes that reach beyond their image are clipped, and counted.

    Args:
      path: the train json.
      split: "train" or "val".
      val_path: the val json; else the train json's name with its last "train" replaced by "val".
      images: the folder of images; else guessed.
      names: the train set's class names, if known: saves reading the train json for val.
      on_error: "raise" refuses a wrong row; "skip" counts and drops its image.

    Raises:
      DataError: naming the file, the row, the field and the fix.
    """
    given = val_path if split == "val" else ""
    file = path if split == "train" else given or _sibling(path, split)
    report = Report(f"{shown_path(file)} ({split})")
    content = _read(file, report, on_error, names)
    if names is None:
        train = content if file == path else _read(path, Report(path), on_error, None)
        names = tuple(train.categories.values())
    index_of = _class_indices(content.categories, names, file)

    entries = _images(content, report, on_error)
    _refuse_strays(content, entries, report, on_error)
    named = [image.file_name for image in entries.values() if image is not None]
    folder = image_folder(named, file, split, images)
    again = _named_again(entries, file, on_error)
    records, sizes, faults = [], {}, list[tuple[str, str]]()
    ids = dict[str, Any]()
    for key, image in entries.items():
        if image is None:
            continue
        if image.file_name in again:
            report.skip("image with several rows", shown_path(image.file_name))
            continue
        place, name = place_of(folder, image.file_name)
        if not os.path.isfile(place):
            report.skip("image missing", shown_path(place))
            continue
        try:
            header = read_header(place)
        except Unreadable as problem:
            report.skip(str(problem), shown_path(place))
            if isinstance(problem, Damaged):
                faults.append((shown_path(place), str(problem)))
            continue
        try:
            _check_size(image, header, content)
            objects = _objects(key, name, index_of, header, report, content)
        except DataError:
            if on_error != "skip":
                raise
            report.skip("image with an error in its labels", shown_path(name))
            continue
        sizes[key] = header.size
        records.append(Record(name, place, header, objects))
        ids[place] = content.rows["images"][image.at]["id"]
    _refuse_other_boxes(content, sizes, report)
    if on_error != "skip":
        refuse_faults(report.where, faults)
    categories: list[Any] = [None] * len(names)
    for at, row in enumerate(content.rows["categories"]):
        number = index_of.get(field_of(row, "categories", at, "id", file))
        if number is not None:
            categories[number] = row["id"]
    return CocoSource(names, records, report, ids, categories)


class CocoSource(FileSource):
    """Images of a COCO json."""

    def __init__(
        self, names: Sequence[str], records: Sequence[Record], report: Report,
        ids: Mapping[str, Any], categories: Sequence[Any],
    ) -> None:  # fmt: skip
        """ids: file -> the id of its image. categories: ids of the classes, None of one that the
        json does not have."""
        super().__init__(names, records, report)
        self._ids, self._own = ids, categories

    def coco_ids(self) -> tuple[list[Any], list[Any]]:
        """The json's own ids of the images, in order, and of the classes."""
        return [self._ids[record.file] for record in self._records], list(self._own)


def _sibling(path: str, split: str) -> str:
    """The json of another split beside a train json: of its name, or in a folder of that name."""
    given = Path(path)
    words = ("val", "valid") if split == "val" else (split,)
    head, found, tail = given.name.rpartition("train")
    tried = [given.with_name(f"{head}{word}{tail}") for word in words] if found else []
    if given.absolute().parent.name == "train":
        tried += [given.absolute().parent.with_name(word) / given.name for word in words]
    for place in tried:
        if os.path.isfile(place):
            return str(place)
    what = f"tried {', '.join(map(shown_path, tried))}"
    if not tried:
        what = f"{shown_path(given.name)} has no 'train' in it to replace by {split!r}"
    fix = " Name it: val_path=...json." if split == "val" else ""
    raise DataError(f"{shown_path(path)}: no {split} json found ({what}).{fix}", file=path)


def _read(file: str, report: Report, on_error: str, names: Sequence[str] | None) -> _Content:
    """A json, its categories and annotations checked; `names` are the classes that count."""
    rows = read_coco(file)
    annotations: defaultdict[str, list[_Annotation]] = defaultdict(list)
    damaged: Counter[str] = Counter()
    used: set[str] = set()
    for index, row in enumerate(rows["annotations"]):
        key = None
        try:
            key = field_of(row, "annotations", index, "image_id", file)
            category = field_of(row, "annotations", index, "category_id", file)
            crowd = field_of(row, "annotations", index, "iscrowd", file)
            # Nothing is learned from a crowd's box, so it may be anything.
            box = None if crowd else field_of(row, "annotations", index, "bbox", file)
        except DataError:
            if on_error != "skip":
                raise
            if key is None:
                report.skip("annotation of an unknown image", f"annotations[{index}]")
            else:
                damaged[key] += 1
            continue
        used.add(category)
        annotations[key].append(_Annotation(index, category, box))
    categories = _categories(rows["categories"], used, names or (), report, file)
    return _Content(file, rows, categories, annotations, damaged)


def _refuse_other_boxes(
    content: _Content, sizes: Mapping[str, tuple[int, int]], report: Report
) -> None:
    """Refuses boxes that are all meant otherwise: most of them could be clipped, and be taught."""
    boxes = [
        (*one.box, *sizes[key])
        for key in sizes
        for one in content.annotations.get(key, ())
        if one.box is not None
    ]
    if len(boxes) < _TELLING:
        return
    x, y, right, bottom, height, width = np.array(boxes, np.float64).T
    file, count = content.file, len(boxes)
    if min(x.min(), y.min()) >= 0 and max(v.max() for v in (x, y, right, bottom)) <= 1:
        raise DataError(
            f"{shown_path(file)}: the bbox of all {count} annotations lies between 0 and 1, "
            f"expected pixels. Multiply x and width by the image's width, y and height by its "
            f"height.",
            file=file,
        )
    clipped = len(report.skipped.get(CLIPPED, ()))
    corners = (x >= 0) & (x < right) & (right < width + 1)
    corners &= (y >= 0) & (y < bottom) & (bottom < height + 1)
    if 3 * clipped >= count and corners.all():
        raise DataError(
            f"{shown_path(file)}: {clipped} of {count} boxes reach beyond their image as [x, y, "
            f"width, height], and all lie in it as [left, top, right, bottom]. Write bbox as "
            f"[x, y, width, height] in pixels.",
            file=file,
        )


def _categories(
    rows: Sequence[Any], used: set[str], names: Sequence[str], report: Report, file: str
) -> dict[str, str]:
    """id -> name of the categories that are classes, in the order of their ids."""
    found = []
    for index, row in enumerate(rows):
        key, name, above = (
            field_of(row, "categories", index, field, file)
            for field in ("id", "name", "supercategory")
        )
        found.append((key, name, above))
    if not found:
        raise DataError(f"{shown_path(file)}: `categories` is empty. Add at least one.", file=file)
    roots = _roots(found, used, names)
    for index in sorted(roots):
        report.skip(
            "supercategory that no annotation uses", f"categories[{index}] {said(found[index][1])}"
        )
    kept = [row for index, row in enumerate(found) if index not in roots]
    for part, what in ((0, "id"), (1, "name")):
        value, times = Counter(row[part] for row in kept).most_common(1)[0]
        if times > 1:
            shown_names = _some(sorted(row[1] for row in kept))
            raise DataError(
                f"{shown_path(file)}: category ids and names must be unique, but {times} rows of "
                f"`categories` have the {what} {_bare(value)} (names: {shown_names}). Rename or "
                f"merge them.",
                file=file,
            )
    return dict(sorted(((key, name) for key, name, _ in kept), key=lambda row: _order(row[0])))


def _order(key: str) -> tuple[bool, int, str]:
    """Ids that are numbers by their size, the others after them by their letters."""
    whole = key.lstrip("+-").isdecimal() and key.isascii()
    return (not whole, int(key) if whole else 0, key)


def _roots(rows: Sequence[tuple[str, str, str]], used: set[str], names: Sequence[str]) -> set[int]:
    """Which rows (id, name, supercategory) of the categories are no classes, by their index.

    Exporters write the name of the project or of a group as one more category, above the others.
    Such a row is left out where no annotation uses it and it is not among the known `names`, and
    where one of these says what it is: another row names it as its supercategory; another row has
    its name; or it has the lowest id, and alone of all rows nothing above it.
    """
    above = Counter(over for _, _, over in rows)
    used_names = Counter(name for key, name, _ in rows if key in used)
    lower_names = Counter(name for _, name, over in rows if over)
    lowest = min((key for key, _, _ in rows), key=_order)
    known = set(names)
    roots = set()
    for i, (key, name, over) in enumerate(rows):
        if key in used:
            continue
        twin = used_names[name] > 0 or (not over and lower_names[name] > 0)
        top = key == lowest and not over and len(rows) > 1 and above[""] == 1
        if twin or (name not in known and (above[name] > (over == name) or top)):
            roots.add(i)
    return roots if len(roots) < len(rows) else set()


def _class_indices(categories: dict[str, str], names: Sequence[str], file: str) -> dict[str, int]:
    class_of = {name: index for index, name in enumerate(names)}
    unknown = sorted(set(categories.values()) - class_of.keys())
    if unknown:
        raise DataError(
            f"{shown_path(file)}: the categories {_some(unknown)} are not among the classes of "
            f"the train set, {_some(names)}. Train and val must name their categories alike.",
            file=file,
        )
    return {key: class_of[name] for key, name in categories.items()}


def _some(values: Sequence[str]) -> str:
    """A list for a message, cut."""
    more = f", ... ({len(values)} in all)" if len(values) > _LISTED else ""
    return f"[{', '.join(said(value) for value in values[:_LISTED])}{more}]"


def _bare(key: str) -> str:
    """An id for a message, without quotes: it may be a number in the json."""
    return key if len(key) <= 40 and key.isprintable() else shown(key)


def _images(content: _Content, report: Report, on_error: str) -> dict[str, _Image | None]:
    """The images by id, None for one whose row is wrong, counted."""
    entries: dict[str, _Image | None] = {}
    if not content.rows["images"]:
        raise DataError(
            f"{shown_path(content.file)}: `images` is empty. Add images.", file=content.file
        )
    for index, row in enumerate(content.rows["images"]):
        key, image = None, None
        try:
            key, name, width, height = (
                field_of(row, "images", index, field, content.file)
                for field in ("id", "file_name", "width", "height")
            )
            image = _Image(index, name, (height, width))
        except DataError:
            if on_error != "skip":
                raise
            report.skip("image with an error in its row", f"images[{index}]")
            try:
                key = field_of(row, "images", index, "id", content.file)
            except DataError:
                continue
        if key in entries:
            raise DataError(
                f"{shown_path(content.file)}: two images have the id {_bare(key)}, the second of "
                f"them is images[{index}]. Give each image its own.",
                file=content.file,
            )
        entries[key] = image
    return entries


def _named_again(entries: Mapping[str, _Image | None], file: str, on_error: str) -> frozenset[str]:
    """File names that several rows have: each would teach the image with a part of its boxes.

    Raises:
      DataError: there are some, and on_error is not "skip".
    """
    first: dict[str, int] = {}
    again = set[str]()
    for image in entries.values():
        if image is None:
            continue
        before = first.setdefault(image.file_name, image.at)
        if before == image.at:
            continue
        if on_error != "skip":
            raise DataError(
                f"{shown_path(file)}: images[{image.at}].file_name is {shown(image.file_name)}, as "
                f"that of images[{before}]: each row would be learned with its own boxes only. "
                "Make them one row, with the annotations of both.",
                file=file,
            )
        again.add(image.file_name)
    return frozenset(again)


def _refuse_strays(
    content: _Content, entries: Mapping[str, _Image | None], report: Report, on_error: str
) -> None:
    for key, count in content.damaged.items():
        if key not in entries:
            for _ in range(count):
                report.skip("annotation of an unknown image", f"of image {_bare(key)}")
    for key, rows in content.annotations.items():
        if key in entries:
            continue
        for one in rows:
            row = content.rows["annotations"][one.at]
            if on_error != "skip":
                problem = (
                    f"annotations[{one.at}].image_id is for image {_bare(key)}, which `images` "
                    f"does not have"
                )
                raise wrong(row, "annotations", one.at, content.file, problem, "Add the image")
            label = said(row["id"]) if "id" in row else f"s[{one.at}]"
            report.skip("annotation of an unknown image", f"annotation {label}")


def _check_size(image: _Image, header: Header, content: _Content) -> None:
    declared = [side or known for side, known in zip(image.declared, header.size, strict=True)]
    if tuple(declared) != header.size:
        row = content.rows["images"][image.at]
        problem = (
            f"image {cut(image.file_name)} is declared {declared[1]} x {declared[0]} (width "
            f"x height) but is {header.size[1]} x {header.size[0]}; its boxes would be misplaced"
        )
        fix = "Restore the original image, or correct its entry and its boxes"
        raise wrong(row, "images", image.at, content.file, problem, fix)


def _objects(
    key: str,
    name: str,
    index_of: Mapping[str, int],
    header: Header,
    report: Report,
    content: _Content,
) -> Objects:
    """The objects of the image with the id `key`; counts what it leaves out."""
    height, width = header.size
    rows = []
    if key in content.damaged:
        raise DataError(f"{name}: one of its annotations is wrong.", file=content.file)
    for at, category, box in content.annotations.get(key, ()):

        def refused(problem: str, fix: str, at: int = at) -> DataError:
            row, where = content.rows["annotations"][at], f"annotations[{at}]"
            return wrong(row, "annotations", at, content.file, f"{where}{problem}", fix)

        if box is None:
            report.skip("crowd box", shown_path(name))
            continue
        if category not in index_of:
            raise refused(
                f".category_id: unknown category {_bare(category)}, expected one of "
                f"[{', '.join(map(_bare, list(index_of)[:_LISTED]))}]",
                "Add it to `categories`",
            )
        placed = _placed(box, width, height)
        if placed is None:
            raise refused(
                f".bbox: the box does not lie in the image of {width} x {height} pixels",
                "Write it as [x, y, width, height] in pixels, with x, y its top left corner",
            )
        x, y, w, h = box
        # Less than a pixel is the rounding of those who wrote the file.
        if min(x, y, width - x - w, height - y - h) <= -1:
            report.skip(CLIPPED, shown_path(name))
        rows.append((float(index_of[category]), *placed))
    table = np.array(rows, np.float64).reshape(-1, 5)
    lines = [None] * len(rows)
    return normalised_objects(table, header.size, report, shown_path(name), lines, False)


def _placed(box: _Box, width: int, height: int) -> _Box | None:
    """A box's centre, width and height as parts of the image, None if it lies outside."""
    x, y, w, h = box
    row = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
    if all(LOWEST <= v <= HIGHEST for v in row):
        return row
    if not all(abs(v) <= _LARGEST for v in box):  # nan, too
        return None
    left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
    if left >= right or top >= bottom:
        return None
    return (
        (left + right) / 2 / width,
        (top + bottom) / 2 / height,
        (right - left) / width,
        (bottom - top) / height,
    )
