"""Text files that a user gives: read whatever their encoding, or refused with a reason."""

from __future__ import annotations

import codecs
import json
import locale
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from jaxaccum.data.base import DataError

_MARKS = (  # the longer ones first: UTF-32's begins with UTF-16's
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
# Possessive, or digits without end that are no number would be tried again from each of them.
_NUMBER = re.compile(
    r"[+-]?(\d++(\.\d*+)?|\.\d++)([eE][+-]?\d++)?|[+-]?(nan|inf|infinity)", re.A | re.I
)
_WHOLE = re.compile(r"[+-]?\d{1,18}", re.A)
_JSON_PARTS = re.compile(r'"((?:[^"\\]|\\.)*+)"\s*+(:?)|[{}]', re.S)
_MOST_NODES = 1_000_000  # of a YAML file, every alias counted as what it stands for
_said: set[str] = set()


class MissingFileError(DataError):
    """There is nothing at the path; callers that can go on without the file catch it."""


def read_bytes(file: str | Path, *, limit: int = 1 << 30) -> bytes:
    """The content of a regular file.

    Args:
      file: its path.
      limit: most bytes.

    Raises:
      MissingFileError: there is nothing, not even a link that leads nowhere.
      DataError: it is a folder, a pipe or the like, longer than `limit`, or cannot be read.
    """
    name = shown_path(file)
    try:
        told = os.stat(file)
        if not stat.S_ISREG(told.st_mode):
            kind = "a folder" if stat.S_ISDIR(told.st_mode) else "a pipe or a device"
            raise DataError(f"{name}: {kind}, expected a file. Check the path.", file=str(file))
        if told.st_size > limit:
            raise DataError(
                f"{name}: {told.st_size:,} bytes, expected at most {limit:,}. Check that this is "
                "the right file.",
                file=str(file),
            )
        with open(file, "rb") as opened:
            return opened.read()
    except DataError:  # is a ValueError, too
        raise
    except FileNotFoundError as error:
        if os.path.islink(file):
            raise DataError(
                f"{name}: a link to {shown_path(os.readlink(file))}, where there is nothing. "
                "Restore that file, or remove the link.",
                file=str(file),
            ) from error
        raise MissingFileError(f"{name}: no such file. Check the path.", file=str(file)) from error
    except OSError as error:
        raise DataError(
            f"{name}: cannot be read ({error.strerror}). Check the path and its rights.",
            file=str(file),
        ) from error
    except ValueError as error:  # a NUL in the path
        raise DataError(f"{name}: no path ({error}). Check the path.", file=str(file)) from error


def read_text(file: str | Path, *, limit: int = 1 << 30) -> str:
    """The text of a file in UTF-8, in UTF-16 or UTF-32 with its mark, or else in the encoding of
    the system's locale, which is said once.

    Args:
      file: its path.
      limit: most bytes.

    Raises:
      MissingFileError: there is nothing.
      DataError: it cannot be read, or is no text; names file, byte and encoding.
    """
    data = read_bytes(file, limit=limit)
    name = shown_path(file)
    encoding = next((e for mark, e in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        here = locale.getencoding()
        if encoding != "utf-8" or codecs.lookup(here).name in ("utf-8", "ascii"):
            raise _not_text(name, data, error, file) from error
        try:
            text = data.decode(here)
        except UnicodeDecodeError as other:
            raise _not_text(name, data, other, file) from other
        if here not in _said:
            _said.add(here)
            print(
                f"note: {name} is not UTF-8 and was read as {here}, this system's encoding; "
                "others like it are, too",
                file=sys.stderr,
            )
    if "\0" in text:
        at = text.index("\0")
        raise DataError(
            f"{name}: a NUL at character {at} in {encoding}: not a text file, or UTF-16 without "
            "its mark. Save it as UTF-8.",
            file=str(file),
        )
    return text


def _not_text(name: str, data: bytes, error: UnicodeDecodeError, file: str | Path) -> DataError:
    line = len(lines(data[: error.start].decode("latin-1") + "."))  # also of a line's first byte
    return DataError(
        f"{name}:{line}: byte {error.start} (0x{data[error.start]:02x}) is not "
        f"{error.encoding} ({error.reason}). Save the file as UTF-8.",
        file=str(file),
        line=line,
    )


def lines(text: str) -> list[str]:
    """The lines of a text as editors count them: ended by \\n, \\r\\n or \\r, by nothing else."""
    found = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return found[:-1] if found[-1] == "" else found


def number(word: str) -> float:
    """A decimal number, nan or inf in ASCII; not 0_1, and no digits of other scripts.

    Raises:
      ValueError: it is none.
    """
    if not _NUMBER.fullmatch(word):
        raise ValueError(f"{shown(word)} is not a number")
    return float(word)


def whole_number(word: str) -> int:
    """A whole number of at most 18 ASCII digits.

    Raises:
      ValueError: it is none.
    """
    if not _WHOLE.fullmatch(word):
        raise ValueError(f"{shown(word)} is not a whole number")
    return int(word)


def shown(value: Any, width: int = 80) -> str:
    """repr of a value for a message, cut to a line of `width` characters."""
    if isinstance(value, str | bytes):
        text = repr(value[: width + 1])
    elif isinstance(value, int) and abs(value) >= 10**width:
        text = f"a number of over {width} digits"
    else:
        text = repr(value)
    return text if len(text) <= width else f"{text[: width - 3]}..."


def shown_path(path: str | Path) -> str:
    """A path for a message: what is not UTF-8 in it is escaped, control characters too."""
    if (text := str(path)).isascii() and text.isprintable():
        return text
    text = os.fsencode(path).decode("utf-8", "backslashreplace") if _encodable(path) else str(path)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _encodable(path: str | Path) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def read_json(file: str | Path) -> Any:
    """The content of a JSON file, in any encoding that `read_text` reads.

    Raises:
      MissingFileError: there is nothing.
      DataError: it cannot be read, is not valid JSON, or gives a key of an object twice; names the
        line.
    """
    name = shown_path(file)
    text = read_text(file, limit=1 << 33)
    try:
        return json.loads(text, object_pairs_hook=_once)
    except _GivenTwiceError:
        first, line, key = _given_twice(text)
        raise DataError(
            f"{name}:{line}: not valid JSON: the key {shown(key)} is in line {first} already, and "
            "of the two values one would be lost. Keep one of them.",
            file=str(file),
            line=line,
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno}). Correct "
            "it, or get the file again.",
            file=str(file),
            line=error.lineno,
        ) from error
    except RecursionError as error:
        raise DataError(
            f"{name}: JSON nested too deeply. Get the file again.", file=str(file)
        ) from error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{name}: not valid JSON: {error}.", file=str(file)) from error


class _GivenTwiceError(Exception):
    """A key is in an object of JSON twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of a key that is there twice Python would keep the last."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _GivenTwiceError
    return made


def _given_twice(text: str) -> tuple[int, int, str]:
    """The first key that an object of a JSON text gives twice: its two lines, and itself."""
    around: list[dict[str, int]] = []  # of every open object its keys, with their places
    for part in _JSON_PARTS.finditer(text):
        if part[0] == "{":
            around.append({})
        elif part[0] == "}":
            around.pop()
        elif part[2]:
            key = json.loads(f'"{part[1]}"')
            first = around[-1].setdefault(key, part.start())
            if first != part.start():
                one, other = (len(lines(text[:at] + ".")) for at in (first, part.start()))
                return one, other, key
    raise AssertionError("no key is there twice")


class _Careful(yaml.SafeLoader):
    """YAML of which nothing is dropped or multiplied."""

    merged = 0
    numbers = True  # as keys

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuses a key that is there twice, of which the last would stay."""
        node = super().compose_mapping_node(anchor)
        places: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            word = (key.tag, key.value)
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
                continue
            if not self.numbers and key.tag.endswith((":int", ":float")):
                raise ComposerError(None, None, "a key with the tag of a number", key.start_mark)
            if word in places:
                problem = f"the key {shown(key.value)} is in line {places[word]} already"
                raise ComposerError(None, None, problem, key.start_mark)
            places[word] = key.start_mark.line + 1
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merges what `<<` names; refuses what multiplies by it."""
        for key, value in node.value:
            if key.tag.endswith(":merge"):
                for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if isinstance(part, yaml.MappingNode):
                        self.flatten_mapping(part)
                        self.merged += len(part.value)
        if self.merged > _MOST_NODES:
            raise ComposerError(None, None, f"over {_MOST_NODES:,} merged keys", node.start_mark)
        super().flatten_mapping(node)


class _AsWritten(_Careful):
    """Plain scalars stay the strings that they are written as, but for null: a class called no,
    007 or 2024-02-31 keeps its name. No key is a number by its tag: many can have one hash."""

    numbers = False


_AsWritten.yaml_implicit_resolvers = {
    first: kept
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    if (kept := [r for r in resolvers if r[0].endswith((":null", ":merge"))])
}


def read_yaml(file: str | Path, *, typed: bool = False) -> Any:
    """The content of a YAML file: strings as they are written, None, lists and dicts.

    Args:
      file: its path.
      typed: plain scalars are what YAML takes them for: also numbers, true and false, dates.

    Raises:
      MissingFileError: there is nothing.
      DataError: it cannot be read, is not valid YAML, or grows beyond reason by its aliases.
    """
    name = shown_path(file)
    text = read_text(file, limit=1 << 21)  # seconds of parsing
    try:
        content = yaml.load(text, _Careful if typed else _AsWritten)  # SafeLoaders
        nodes = _nodes(content, {})
    except yaml.MarkedYAMLError as error:
        line = None if error.problem_mark is None else error.problem_mark.line + 1
        where = name if line is None else f"{name}:{line}"
        raise DataError(
            f"{where}: not valid YAML: {error.problem or error.context}. Correct the file.",
            file=str(file),
            line=line,
        ) from error
    except RecursionError as error:
        raise DataError(
            f"{name}: YAML that is nested too deeply, or contains itself. Correct the file.",
            file=str(file),
        ) from error
    # PyYAML's constructors fail in many ways at explicit tags such as `!!int x`.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, OverflowError) as e:
        raise DataError(
            f"{name}: not valid YAML: {shown(str(e), 200)}. Correct the file.", file=str(file)
        ) from e
    if nodes > _MOST_NODES:
        raise DataError(
            f"{name}: {shown(nodes)} values once its aliases are followed, expected at most "
            f"{_MOST_NODES:,}. Correct the file.",
            file=str(file),
        )
    return content


def _nodes(content: Any, known: dict[int, int]) -> int:
    """Values in a tree, shared parts counted each time; RecursionError if it contains itself."""
    if not isinstance(content, list | dict):
        return 1
    if id(content) not in known:
        known[id(content)] = sys.maxsize  # what is met again before it is counted contains itself
        parts = content if isinstance(content, list) else [*content.keys(), *content.values()]
        known[id(content)] = 1 + sum(_nodes(part, known) for part in parts)
    elif known[id(content)] == sys.maxsize:
        raise RecursionError
    return known[id(content)]
