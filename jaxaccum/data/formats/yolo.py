"""The YOLO format: a data.yaml, folders or lists of images, a text file of labels for each."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxaccum.data.base import (
    DataError,
    Report,
    no_objects,
    normalised_objects,
    refuse_faults,
)
from jaxaccum.data.formats.yolo_labels import HIGHEST as HIGHEST
from jaxaccum.data.formats.yolo_labels import (
    LARGEST_FILE,
    Corners,
    KeyPoints,
    LabelFiles,
    LongRows,
    label_file,
    parse_labels,
)
from jaxaccum.data.formats.yolo_labels import LOWEST as LOWEST
from jaxaccum.data.images import SUFFIXES, Damaged, FileSource, Record, Unreadable, read_header
from jaxaccum.data.texts import (
    MissingFileError,
    lines,
    read_text,
    read_yaml,
    shown,
    shown_path,
    whole_number,
)
from jaxaccum.data.walking import found_files

MOST_CLASSES = 100_000  # several times what the largest public set has
MOST_KEY_POINTS = 10_000
LONGEST_CLASS_NAME = 1000  # characters


def open_yolo(path: str, split: str, *, on_error: str = "raise") -> FileSource:
    """Opens one split of a YOLO data set.

    Args:
      path: the data.yaml: `path` (root, relative to the yaml), `train` and `val` (each a folder,
        a txt list of images, or a list of those), `names` and/or `nc`; `kpt_shape` if rows are
        boxes with key points, of which the boxes are used.
      split: "train" or "val", or another that the file names.
      on_error: "raise" refuses a label file with an error in it; "skip" counts and drops its
        image.

    Raises:
      DataError: naming file, line and fix.
    """
    config = _read_config(path)
    names = _class_names(config, path)
    key_points = _key_points(config, path)
    root = Path(path).parent
    if config.get("path") not in (None, ""):
        word = _path(config["path"], "`path`", path)
        root /= next((w for w in _slashed(word) if os.path.exists(root / w)), word)
    root = Path(os.path.realpath(root))
    report = Report(f"{shown_path(path)} ({split})")
    long_rows = None if "kpt_shape" in config else LongRows()

    found = list(_split_images(config, split, root, path, report))
    records, labels, corners = [], LabelFiles(), Corners()
    faults = list[tuple[str, str]]()
    for image in found:
        file = labels.of(image.file)
        try:
            header = read_header(image.file)
        except Unreadable as problem:
            report.skip(str(problem), str(image.file))
            if isinstance(problem, Damaged):
                faults.append((shown_path(image.file), str(problem)))
            continue
        try:
            text = read_text(file, limit=LARGEST_FILE)
            rows, places = parse_labels(
                text, len(names), str(file), key_points=key_points, long_rows=long_rows
            )
            objects = normalised_objects(rows, header.size, report, str(file), places)
            corners.add(rows, places, str(file))
        except MissingFileError:
            labels.none(image.file, file)
            objects = no_objects()
        except DataError as error:
            if on_error != "skip":
                raise
            report.skip("image with an error in its labels", error.file, error.line)
            continue
        records.append(Record(image.name, str(image.file), header, objects))
    if long_rows is not None:
        long_rows.refuse(path)
    corners.refuse()
    if on_error != "skip":
        refuse_faults(report.where, faults)
    again = len(found) - len({os.path.normpath(image.file) for image in found})
    if again:
        report.notes.append(f"{again} images are named again in `{split}`, and are read again")
    if records and len(labels.missing) == len(records):
        raise DataError(
            f"{report.where}: none of the {len(records)} images has a label file; looked for "
            f"{shown_path(labels.missing[0])} and so on. Put the labels where the last /images/ of "
            f"the image's path becomes /labels/ and its suffix .txt; leave out only those of "
            f"background images.",
            file=path,
        )
    labels.tell(report, {image.file.parent for image in found if not image.listed})
    return FileSource(names, records, report)


def _read_config(path: str) -> dict[str, Any]:
    name = shown_path(path)
    try:
        config = read_yaml(path)
    except MissingFileError:
        raise DataError(f"{name}: no such data.yaml. Check the path.", file=path) from None
    if not isinstance(config, dict):
        raise DataError(
            f"{name}: expected keys (path, train, val, names), found {shown(config)}. "
            f"See the YOLO data.yaml format.",
            file=path,
        )
    channels = config.get("channels")
    if channels is not None and _whole(channels) != 3:
        raise DataError(
            f"{name}: channels is {_said(channels)}; only 3 (RGB) is supported. "
            f"Images with other channels are read as RGB if you remove the key.",
            file=path,
        )
    return config


def _whole(value: Any) -> int | None:
    """A value of the data.yaml as a whole number; None if it is none."""
    try:
        return whole_number(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _said(value: Any) -> str:
    """A value of the data.yaml for a message: numbers without the quotes of strings."""
    return str(value) if _whole(value) is not None else shown(value)


def _class_names(config: dict[str, Any], path: str) -> tuple[str, ...]:
    def wrong(problem: str) -> DataError:
        return DataError(f"{shown_path(path)}: {problem}", file=path)

    names, told = config.get("names"), config.get("nc")
    count = _whole(told)
    if told is not None and (count is None or not 1 <= count <= MOST_CLASSES):
        raise wrong(f"nc is {_said(told)}, expected a whole number from 1 to {MOST_CLASSES:,}.")
    if isinstance(names, dict):
        names = _by_id(names, wrong)
    if not names:
        if count is None:
            raise wrong("neither names nor nc. Add `names: [first, second, ...]`.")
        return tuple(f"class{i}" for i in range(count))
    if not isinstance(names, list):
        raise wrong(f"names is {shown(names)}, expected a list or a mapping from id to name.")
    if len(names) > MOST_CLASSES:
        raise wrong(f"names has {len(names):,} entries, expected at most {MOST_CLASSES:,}.")
    for i, name in enumerate(names):
        if not isinstance(name, str) or not name.strip() or len(name) > LONGEST_CLASS_NAME:
            fix = " Write a class of that name in quotes." if name is None else ""
            raise wrong(
                f"names[{i}] is {'null' if name is None else shown(name)}, expected a name of 1 "
                f"to {LONGEST_CLASS_NAME} characters.{fix}"
            )
        if any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
            raise wrong(f"names[{i}] is {shown(name)}, expected a name without control characters.")
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        ids = [i for i, name in enumerate(names) if name == twice[0]]
        raise wrong(
            f"names has {shown(twice[0])} more than once ({shown(ids)[1:-1]}"
            f"{f', and {len(twice) - 1} others' if len(twice) > 1 else ''}); names must differ. "
            f"Rename one, or give both the same id in the labels."
        )
    if count is not None and count != len(names):
        raise wrong(
            f"nc is {count} but names has {len(names)} entries. Make them agree, or remove nc."
        )
    return tuple(names)


def _by_id(names: dict[Any, Any], wrong: Callable[[str], DataError]) -> list[Any]:
    """The names of a mapping from ids, in their order."""
    ids = {key: _whole(key) for key in names}
    if sorted(i if i is not None else -1 for i in ids.values()) != list(range(len(names))):
        some = ", ".join(_said(key) for key in list(names)[:20])
        raise wrong(
            f"names has the class ids [{some}{', ...' if len(names) > 20 else ''}], expected 0 to "
            f"{len(names) - 1} without gaps. Number the classes from 0, in the labels too."
        )
    return [names[key] for key in sorted(names, key=lambda key: ids[key] or 0)]


def _key_points(config: dict[str, Any], path: str) -> KeyPoints | None:
    """`kpt_shape`, None without; null and an empty list say that there are no key points."""
    shape = config.get("kpt_shape")
    if not shape and shape != "":
        return None
    numbers = [_whole(value) for value in shape] if isinstance(shape, list) else []
    if len(numbers) == 2 and 1 <= (numbers[0] or 0) <= MOST_KEY_POINTS and numbers[1] in (2, 3):
        return numbers[0] or 0, numbers[1] or 0
    raise DataError(
        f"{shown_path(path)}: kpt_shape is {shown(shape)}, expected [number of key points, 2 or 3] "
        f"(3: x, y and visibility) of 1 to {MOST_KEY_POINTS:,} key points, or null for none.",
        file=path,
    )


def _path(value: Any, field: str, path: str) -> str:
    """A field of the data.yaml that must be a path."""
    problem = ""
    if not isinstance(value, str):
        problem = "expected a path"
    elif not value.strip() or "\0" in value:
        problem = "which is no path"
    else:
        try:
            os.fsencode(value)
        except UnicodeEncodeError:
            problem = "which no file can be called"
    if problem:
        raise DataError(
            f"{shown_path(path)}: {field} is {shown(value)}, {problem}. Correct it.", file=path
        )
    return str(value)


class _Image(NamedTuple):
    """An image: its name relative to the split, its file, and whether a list named it."""

    name: str
    file: Path
    listed: bool = False


def _split_images(
    config: dict[str, Any], split: str, root: Path, path: str, report: Report
) -> Iterator[_Image]:
    """Yields each image of the split."""
    told, yaml = config.get(split), shown_path(path)
    if not told:
        raise DataError(
            f"{yaml}: no `{split}`; the file has {', '.join(map(_said, list(config)[:20]))}. "
            f"Add `{split}: images/{split}` or wherever its images are.",
            file=path,
        )
    for i, entry in enumerate(told if isinstance(told, list) else [told]):
        field = f"`{split}`[{i}]" if isinstance(told, list) else f"`{split}`"
        written, *others = [root / word for word in _readings(_path(entry, field, path))]
        place = next((p for p in (written, *others) if os.path.exists(p)), written)
        if place != written:
            report.notes.append(
                f"{field} names {shown_path(written)}, where there is nothing; "
                f"read {shown_path(place)} instead"
            )
        if os.path.isdir(place):
            for file in found_files(place, report, SUFFIXES, "images", _is_label):
                yield _Image(file.name, file.file)
        elif os.path.isfile(place) and place.suffix.lower() == ".txt":
            yield from _listed_images(place, root, report)
        elif os.path.exists(place):
            raise DataError(
                f"{yaml}: {field} names the file {shown_path(place)}, expected a folder of images "
                f"or a .txt list of them.",
                file=path,
            )
        else:
            download = (
                " The `download` key is not run: fetch the data yourself."
                if config.get("download")
                else ""
            )
            raise DataError(
                f"{yaml}: {field} names {shown_path(str(place)[:500])}, which {_reason(place)}. "
                f"Correct `path` (relative to the yaml file) or `{split}` (relative to `path`)."
                f"{download}",
                file=path,
            )


def _slashed(word: str) -> list[str]:
    """A path as written, and as Windows may have written it."""
    return list(dict.fromkeys((word, word.replace("\\", "/"))))


def _readings(word: str) -> Iterator[str]:
    """A path as written, as Windows may have written it, and one level nearer: a popular exporter
    writes ../train/images beside train/images."""
    yield from _slashed(word)
    first, *rest = Path(_slashed(word)[-1]).parts or ("",)
    if first == ".." and rest:
        yield str(Path(*rest))


def _reason(place: Path) -> str:
    """Why there is no file at a path."""
    try:
        os.stat(place)
    except FileNotFoundError:
        return "is a link that leads nowhere" if place.is_symlink() else "does not exist"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "was not there before"


def _is_label(file: Path) -> bool:
    """Whether labels lie beside their images, as they do where no folder is called images."""
    return file.suffix.lower() == ".txt" and label_file(file) == file


def _listed_images(listing: Path, root: Path, report: Report) -> Iterator[_Image]:
    otherwise = named = 0
    for line in lines(read_text(listing)):
        entry = line.strip()
        if not entry:
            continue
        named += 1
        readings = list(_readings(entry))
        places = [(word, base / word) for word in readings for base in (listing.parent, root)]
        for word, place in places:
            if os.path.isfile(place):
                otherwise += word != entry
                yield _Image(_portable_name(word, root), place, listed=True)
                break
        else:
            place = places[0][1]
            reason = "listed, but no file" if os.path.exists(place) else "image missing"
            report.skip(reason, str(place))
    if not named:
        report.skip("list without images", str(listing))
    if otherwise:
        report.notes.append(
            f"{otherwise} lines of {shown_path(listing)} name nothing as they are; read with / for "
            f"\\, or one level nearer"
        )


def _portable_name(entry: str, root: Path) -> str:
    """A listed image's name without the part that says where the data set lies."""
    path = Path(entry)
    if not path.is_absolute():
        return path.as_posix()
    if path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    *_, tail = path.as_posix().rpartition("/images/")
    return tail if tail != path.as_posix() else path.name
