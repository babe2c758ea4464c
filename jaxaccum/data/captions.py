"""A caption for every sample of clouds, and its vector: what a network is told in words.

Captions come from a file, from the data set itself, or are made from the category's name. Their
vectors are computed once, ahead of training, and kept on disk.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from jaxaccum.data.base import DataError, Findings
from jaxaccum.data.texts import read_text, shown, shown_path
from jaxaccum.machine import user_cache

Vectors = NDArray[np.float32]
_FORMAT = "jaxaccum text vectors 1"
_FROM_FILE = "from the file"
_TITLES = {"caption", "captions", "text", "description"}  # of the second column, in a header


class Named(Protocol):
    """What captions need of a source of clouds."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def report(self) -> Findings: ...

    def __len__(self) -> int: ...

    def category(self, index: int) -> int:
        """The category of sample `index`."""
        ...

    def name(self, index: int) -> str:
        """CATEGORY/NAME; of embedded shapes another name."""
        ...


@runtime_checkable
class Described(Named, Protocol):
    """A source whose samples are views of shapes, and that may describe these itself."""

    def shape(self, index: int) -> str:
        """The name of the shape of sample `index`."""
        ...

    def description(self, index: int) -> str | None:
        """A caption of that shape; None if the source has none."""
        ...


class TextEncoder(Protocol):
    """Turns captions into vectors.

    Attributes:
      name: as the user gave it.
      width: T, the length of a vector.
      identity: 12 hex characters; encoders of one identity give the same vectors.
    """

    @property
    def name(self) -> str: ...

    @property
    def width(self) -> int: ...

    @property
    def identity(self) -> str: ...

    def describe(self) -> str:
        """What it is, in one line."""
        ...

    def encode(self, captions: Sequence[str]) -> Vectors:
        """(n, T) float32, a row of one caption does not depend on the others."""
        ...


@dataclass
class CaptionReport(Findings):
    """Where the captions of a source come from, and what a file had that was not used.

    Attributes:
      samples: samples with a caption, that is all.
      different: different captions.
      origins: where captions come from -> samples.
    """

    samples: int = 0
    different: int = 0
    origins: dict[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        """What there is, in one line."""
        origins = ", ".join(f"{count} {origin}" for origin, count in self.origins.items())
        return f"{self.different} captions for {self.samples} samples: {origins}"


@dataclass(frozen=True, eq=False)
class Captions:
    """A caption for each sample of a source.

    Attributes:
      texts: the different captions, in the order of their first samples.
      ids: (samples,) int32, of each sample the index in `texts`.
      report: where they come from.
    """

    texts: tuple[str, ...]
    ids: NDArray[np.int32]
    report: CaptionReport

    @classmethod
    def of(
        cls, source: Named, file: str | os.PathLike[str] | None = None, published: bool = False
    ) -> Captions:
        """The captions of a source.

        A sample has the caption of its shape in the file; else what the data set itself says of
        the shape, which embedded shapes do; else "a 3D object from category NAME".

        Args:
          source: the samples.
          file: rows of a key and a caption, see `read_captions`. The key is CATEGORY_NAME, of
            embedded shapes their name.
          published: as the text-conditioned PoinTr does it: the category's digits for its name, and
            of names of shapes what is before the first hyphen or dot.

        Raises:
          DataError: the file cannot be read, or is of other shapes.
        """
        where = source.report.where
        report = CaptionReport(f"captions of {where}", len(source))
        rows = read_captions(file, report) if file else {}
        views = source if isinstance(source, Described) else None
        found: dict[str, tuple[str, str]] = {}  # of shapes, which may have several samples
        numbers: dict[str, int] = {}
        ids = np.zeros(len(source), np.int32)
        for index in range(len(source)):
            shape = views.shape(index) if views else source.name(index)
            if shape not in found:
                key = _key(shape, published)
                own = views.description(index) if views else None
                why = "" if not file else ", the file's is empty" if key in rows else ", no row"
                if rows.get(key):
                    found[shape] = rows[key], _FROM_FILE
                elif own:
                    found[shape] = own, f"by the data set{why}"
                else:
                    found[shape] = _template(source, index, shape, published), f"by category{why}"
            caption, origin = found[shape]
            report.origins[origin] = report.origins.get(origin, 0) + 1
            ids[index] = numbers.setdefault(caption, len(numbers))
        if file and _FROM_FILE not in report.origins:
            wanted = ", as in " + shown(_key(next(iter(found)), published)) if found else ""
            keys = ", ".join(map(shown, itertools.islice(rows, 3))) or "nothing"
            raise DataError(
                f"{shown_path(Path(file))}: no caption for any shape of {where}. Expected "
                f"CATEGORY_NAME in the first column{wanted}; there is {keys}. Without a file, "
                "captions are made of the names of categories.",
                file=str(file),
            )
        report.different = len(numbers)
        return cls(tuple(numbers), ids, report)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> str:
        """The caption of sample `index`."""
        return self.texts[self.ids[index]]


@dataclass(frozen=True, eq=False)
class Texts:
    """The captions of a source as vectors.

    Attributes:
      captions: of each sample.
      vectors: (n, T) float32, of each different caption.
      identity: 12 hex characters, of the captions and the encoder.
      report: lines for people.
    """

    captions: Captions
    vectors: Vectors
    identity: str
    report: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        source: Named,
        captions_file: str | os.PathLike[str] | None,
        encoder: TextEncoder,
        cache_dir: str | os.PathLike[str] | None,
        published: bool = False,
    ) -> Texts:
        """The captions of a source and their vectors.

        Args:
          source, captions_file, published: as of `Captions.of`.
          encoder, cache_dir: as of `cached_vectors`.

        Raises:
          DataError: the captions cannot be used.
          ImportError, ValueError: the encoder cannot be used.
        """
        captions = Captions.of(source, captions_file, published)
        lines = [*captions.report.lines(), f"  {encoder.describe()}"]
        notes = list[str]()
        vectors = cached_vectors(encoder, captions.texts, cache_dir, notes.append)
        lines += [f"  {note}" for note in notes]
        digest = hashlib.sha256(f"{encoder.identity}\0{captions.texts}".encode())
        digest.update(captions.ids.astype("<i4").tobytes())
        return cls(captions, vectors, digest.hexdigest()[:12], tuple(lines))

    @property
    def width(self) -> int:
        """T, the length of a vector."""
        return self.vectors.shape[1]

    def __len__(self) -> int:
        return len(self.captions)

    def empty(self, count: int) -> dict[str, NDArray[Any]]:
        """The arrays of `count` samples without a caption: text (n, T) 0 and caption (n,) -1."""
        return {
            "text": np.zeros((count, self.width), np.float32),
            "caption": np.full(count, -1, np.int32),
        }

    def write(self, batch: dict[str, NDArray[Any]], row: int, index: int) -> None:
        """Writes the vector and the caption's id of sample `index` into a row of a batch."""
        batch["caption"][row] = number = self.captions.ids[index]
        batch["text"][row] = self.vectors[number]


def read_captions(file: str | os.PathLike[str], report: Findings | None = None) -> dict[str, str]:
    """Key -> caption of a file of captions, such as Cap3D's (Luo et al. 2023, arXiv:2306.07279).

    Text as `texts.read_text` takes it, columns divided by commas: the key, the caption; further
    columns are not read, which is said. All rows have as many, or a first row with the word
    caption, captions, text or description in its second column names them. Of rows of one key the
    last counts. A header is a row like others, of a key that no shape has.

    Args:
      file: *.csv.
      report: takes what was left out.

    Raises:
      DataError: it cannot be read, is no text, or a row has one column, or more than others: those
        of a caption with a comma that is not in quotes.
    """
    path = Path(file)
    text = read_text(path)
    captions: dict[str, str] = {}
    # Strict: else a quote that is not closed takes the rest of the file for one caption.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    start = 1
    first: dict[int, tuple[int, list[str]]] = {}  # number of columns -> the first such row
    try:
        for row in reader:
            if len(row) == 1:
                raise _error(path, start, f"one column, {shown(row[0])}, expected KEY,CAPTION")
            while len(row) > 2 and not row[-1].strip():
                row.pop()
            if row:
                first.setdefault(len(row), (start, row))
                key = row[0].strip()
                if key in captions and report is not None:
                    report.skip("caption that a later row replaces", shown_path(path), start)
                captions[key] = " ".join(row[1].split())
            start = reader.line_num + 1
    except csv.Error as error:
        raise _error(
            path, start, f"not a row of CSV ({error}). Quotes inside a caption are doubled"
        ) from None
    if first:
        _check_columns(path, first, report)
    return captions


def _check_columns(
    path: Path, first: dict[int, tuple[int, list[str]]], report: Findings | None
) -> None:
    """Refuses rows with more columns than others, and says which columns are not read.

    Args:
      first: number of columns -> line and row of the first with as many, in the order of the file.
    """
    line, row = next(iter(first.values()))
    titled = row[1].strip().lower() in _TITLES
    expected = len(row) if titled else min(first)
    wider = next((number for number in first if number > expected), None)
    if wider is not None:
        other, found = first[wider]
        usual, _ = first[expected]
        raise _error(
            path,
            other,
            f"{wider} columns, but line {usual} has {expected}: the caption would be "
            f"{shown(found[1].strip())}, without {shown(','.join(found[2:]))}. Put a caption with "
            'commas in quotes, as in KEY,"a plane, with wings"; or give every row as many columns',
        )
    if expected > 2 and report is not None:
        report.notes.append(
            f"{shown_path(path)} has {expected} columns, of which the first two are read, not "
            f"{shown(','.join(row[2:]))} of line {line} and the like; a caption with commas is to "
            "be in quotes"
        )


def cached_vectors(
    encoder: TextEncoder,
    captions: Sequence[str],
    cache_dir: str | os.PathLike[str] | None,
    note: Callable[[str], object] | None = None,
) -> Vectors:
    """The vectors of captions; those that are not kept on disk yet are computed and kept.

    Args:
      encoder: what makes them.
      captions: n of them.
      cache_dir: folder for one file for each encoder, by its identity; None keeps nothing.
      note: takes lines for people: what was computed, and a damaged file, which is made anew.

    Returns:
      (n, T) float32.

    Raises:
      ValueError: the encoder gave something else than finite vectors of its width.
      OSError: the folder cannot be written to.
    """
    note = note or (lambda line: None)
    file = None if cache_dir is None else Path(cache_dir) / f"text-{encoder.identity}.npz"
    keys = [hashlib.blake2b(caption.encode(), digest_size=16).digest() for caption in captions]
    known = {} if file is None else _read_cache(file, encoder, note)
    missing = {key: text for key, text in zip(keys, captions, strict=True) if key not in known}
    if missing:
        fresh = np.asarray(encoder.encode(list(missing.values())), np.float32)
        if fresh.shape != (len(missing), encoder.width) or not np.isfinite(fresh).all():
            raise ValueError(
                f"{encoder.name}: vectors of the shape {fresh.shape} for {len(missing)} captions, "
                f"expected {(len(missing), encoder.width)}, all finite."
            )
        known |= zip(missing, fresh, strict=True)
        if file is not None:
            _write_cache(file, encoder, known)
    kept = "" if file is None else f", {len(set(keys)) - len(missing)} found in {file}"
    note(f"{len(missing)} captions encoded{kept}")
    if not captions:
        return np.zeros((0, encoder.width), np.float32)
    return np.stack([known[key] for key in keys])


def _read_cache(
    file: Path, encoder: TextEncoder, note: Callable[[str], object]
) -> dict[bytes, Vectors]:
    """What is kept in a file; nothing if there is none or it is damaged, which is said."""
    if not file.exists():
        return {}
    try:
        with np.load(file) as arrays:  # checks the checksums of what it reads
            kind, keys, vectors = str(arrays["format"]), arrays["keys"], arrays["vectors"]
    except Exception as error:  # there is no end to what a damaged file can raise
        note(f"{file} is damaged and is made anew ({type(error).__name__}: {error})")
        return {}
    right = keys.dtype == np.uint8 and keys.shape == (len(vectors), 16)
    right = right and vectors.dtype == np.float32 and vectors.shape == (len(keys), encoder.width)
    if kind != _FORMAT or not right or not np.isfinite(vectors).all():
        note(f"{file} holds something else than vectors of {encoder.name} and is made anew")
        return {}
    return {key.tobytes(): vector for key, vector in zip(keys, vectors, strict=True)}


def _write_cache(file: Path, encoder: TextEncoder, known: dict[bytes, Vectors]) -> None:
    keys = np.frombuffer(b"".join(known), np.uint8).reshape(-1, 16)
    vectors = np.stack(list(known.values()))
    content = io.BytesIO()
    np.savez(content, format=_FORMAT, encoder=encoder.name, keys=keys, vectors=vectors)
    user_cache.write(file, content.getbuffer())


def _key(shape: str, published: bool) -> str:
    """The key of a shape in a file of captions."""
    category, slash, name = shape.partition("/")
    return f"{category}{'_' if slash else ''}{re.split('[-.]', name)[0] if published else name}"


def _template(source: Named, index: int, shape: str, published: bool) -> str:
    category = source.names[source.category(index)]
    if published and "/" in shape:
        category = shape.partition("/")[0]
    return f"a 3D object from category {category}"


def _error(path: Path, line: int, message: str) -> DataError:
    return DataError(f"{shown_path(path)}:{line}: {message}.", file=str(path), line=line)
