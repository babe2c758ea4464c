"""What the rows of a COCO json must hold: one table of fields, read and checked in one place."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxaccum.data.base import DataError
from jaxaccum.data.texts import MissingFileError, number, read_json, shown, shown_path

_DIGITS = re.compile(r"[+-]?\d{1,100}", re.A)
_LARGEST_SIDE = 10**6  # pixels
_SHOWN = ("id", "image_id", "category_id", "file_name", "name", "width", "height", "bbox")
_REQUIRED = object()


@dataclass(frozen=True)
class Field:
    """One field of a row.

    Attributes:
      name: its key.
      read: its value as we use it; ValueError says what is wrong with it.
      default: the value of a row without it, or `_REQUIRED`.
    """

    name: str
    read: Callable[[Any], Any]
    default: Any = _REQUIRED


def identifier(value: Any) -> str:
    """The id that a number or a text stands for: 1, 1.0, "1" and "01" are the same, "1".

    A text, because chosen whole numbers collide in a dict and make it quadratic.
    """
    if type(value) is int:
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str) and value.strip():
        text = value.strip()
        return str(int(text)) if _DIGITS.fullmatch(text) else text
    raise ValueError(f"is {said(value)}, expected a whole number or a text")


def _numeric(value: Any) -> float:
    """A number, or a text that holds one, as float; nan and inf too."""
    if type(value) is float:
        return value
    if isinstance(value, str):
        return number(value.strip())
    if type(value) is not int:
        raise ValueError
    return float(value) if abs(value) < 1e30 else math.inf  # what is too large for a float


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"is {said(value)}, expected a text")
    if "\0" in value:
        raise ValueError(f"is {said(value)}, expected a text without NUL")
    return value


def _name(value: Any) -> str:
    name = _text(value)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"is {said(value)}, expected a text in Unicode") from None
    return name


def _size(value: Any) -> int | None:
    """A side in pixels, None where it is unknown: null, 0 or an empty text."""
    if value is None or value == "":
        return None
    try:
        side = _numeric(value)
    except ValueError:
        side = math.nan
    if not (0 <= side <= _LARGEST_SIDE and side.is_integer()):
        raise ValueError(f"is {said(value)}, expected a whole number of pixels, or 0 for unknown")
    return int(side) or None


def _crowd(value: Any) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    try:
        flag = _numeric(value)
    except ValueError:
        flag = math.nan
    if flag not in (0, 1):
        raise ValueError(f"is {said(value)}, expected 0 or 1")
    return flag == 1


def _box(value: Any) -> tuple[float, float, float, float]:
    if isinstance(value, list) and len(value) == 4:
        x, y, w, h = value
        if type(x) is type(y) is type(w) is type(h) is float:  # nearly all, and they are many
            return x, y, w, h
        try:
            x, y, w, h = map(_numeric, value)
        except ValueError:
            pass
        else:
            return x, y, w, h
    raise ValueError(
        f"is not four numbers but {said(value)}. Write it as [x, y, width, height] in pixels"
    )


def _above(value: Any) -> str:
    """A supercategory; what is none of them, such as null or "none", is ""."""
    return value.strip() if isinstance(value, str) and value.strip().lower() != "none" else ""


TABLE: Mapping[str, tuple[Field, ...]] = {
    "images": (
        Field("id", identifier),
        Field("file_name", _text),
        Field("width", _size, None),
        Field("height", _size, None),
    ),
    "annotations": (
        Field("image_id", identifier),
        Field("category_id", identifier),
        Field("bbox", _box),
        Field("iscrowd", _crowd, False),
    ),
    "categories": (
        Field("id", identifier),
        Field("name", _name),
        Field("supercategory", _above, ""),
    ),
}


_FIELDS = {key: {field.name: field for field in fields} for key, fields in TABLE.items()}


def read_coco(file: str) -> dict[str, list[Any]]:
    """The rows of a COCO json, not yet checked: its images, annotations and categories.

    Raises:
      DataError: it cannot be read, or lacks one of the lists.
    """
    try:
        content = read_json(file)
    except MissingFileError:
        raise DataError(
            f"{shown_path(file)}: no such COCO json. Check the path.", file=file
        ) from None
    for key in TABLE:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(
                f"{shown_path(file)}: no list `{key}`; a COCO json has images, annotations and "
                f"categories. Is this the instances file?",
                file=file,
            )
    return {key: content[key] for key in TABLE}


def field_of(row: Any, key: str, index: int, name: str, file: str) -> Any:
    """One checked field of a row.

    Args:
      row: the row as the json has it.
      key: the list that it is in: images, annotations or categories.
      index: its place there, from 0.
      name: a field of `TABLE[key]`.
      file: the json, for messages.

    Raises:
      DataError: naming row and field.
    """
    field = _FIELDS[key][name]
    if not isinstance(row, dict):
        raise DataError(
            f"{shown_path(file)}: {key}[{index}] is {said(row)}, expected an object with "
            f"{', '.join(f.name for f in TABLE[key])}. Correct or remove it.",
            file=file,
        )
    if field.name not in row:
        if field.default is not _REQUIRED:
            return field.default
        raise wrong(row, key, index, file, f"{key}[{index}] lacks {field.name}", "Add it")
    try:
        return field.read(row[field.name])
    except ValueError as error:
        problem = f"{key}[{index}].{field.name} {error}"
        raise wrong(row, key, index, file, problem, "Correct it") from None


def wrong(row: Any, key: str, index: int, file: str, problem: str, fix: str) -> DataError:
    """The error of a row: where, what, the row itself, and the two ways out."""
    out = "remove the row" if key == "categories" else "leave its image out: data.on_error='skip'"
    return DataError(
        f"{shown_path(file)}: {problem}; it is row {index} of `{key}`, {_short(row)}. "
        f"{fix}, or {out}.",
        file=file,
    )


def _short(row: Any) -> str:
    """A row for a message: its telling fields, each cut."""
    parts = [f"{json.dumps(k)}: {said(row[k], 60)}" for k in _SHOWN if k in row]
    return f"{{{', '.join(parts)}}}"


def said(value: Any, width: int = 80) -> str:
    """A value of the json for a message, as JSON has it, cut; however deep it is."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    try:
        return shown(value, width)
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
