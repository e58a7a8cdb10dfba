"""The texts of a corpus: one that is cut in two, or documents of which each goes to one side.

A document is a whole file, a line of JSON lines, or a row of parquet.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rosetrainer.data.encoding import unix_lines
from rosetrainer.data.text_files import TextFile, recognise
from rosetrainer.environment import python_command
from rosetrainer.validation import ConfigError

Side = Literal["train", "val"]

ROWS = 256  # of parquet, in memory at once


@dataclass(frozen=True)
class Texts:
    """What a corpus is made of."""

    sha256: str
    """Decides the content, the order included."""
    size: str
    """How much it is, in words."""
    sides: Callable[[], Iterator[tuple[Side, str]]]
    """Gives each text in the given order, with the side that it is for, as often as it is called.

    Raises ConfigError if the files have changed since.
    """
    are_documents: bool = False
    """Whether each text is a document, after which an id of its own stands."""


def one_text(text: str, val_fraction: float) -> Texts:
    """A text whose last part is for validation."""
    cut = int(len(text) * (1 - val_fraction))

    def sides() -> Iterator[tuple[Side, str]]:
        yield "train", text[:cut]
        yield "val", text[cut:]

    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return Texts(sha256, f"a text of {len(text)} characters", sides)


def read_one(path: Path, val_fraction: float, as_text: bool = False) -> Texts:
    """A file as one text. Raises ConfigError."""
    text = recognise(path, as_text).read()
    if not text.strip():
        what = "holds only white space" if text else "is empty"
        raise ConfigError(f"{path} {what}; pass a file with text")
    return one_text(text, val_fraction)


def read_texts(
    paths: tuple[Path, ...], key: str, val_fraction: float, as_text: bool = False
) -> Texts:
    """One text file as one text; several files, JSON lines and parquet as documents.

    key: of the text in JSON lines and parquet. as_text: see `recognise`. What a user may not expect
    is printed. Raises ConfigError for what cannot be read, or gives no document to one side.
    """
    files = tuple(recognise(path, as_text) for path in paths)
    if len(files) == 1 and files[0].form == "text":
        return read_one(paths[0], val_fraction, as_text)

    def documents() -> Iterator[str]:
        return (text for file in files for text in texts_of(file, key))

    sizes, order, number, blank = Counter[bytes](), hashlib.sha256(), 0, 0
    for text in documents():
        if not text.strip():
            blank += 1
            continue
        number += 1
        order.update(digest := _digest(text))
        sizes[digest] += len(text.encode())
    where = ", ".join(map(str, paths[:3])) + (", …" if len(paths) > 3 else "")
    if not number:
        raise ConfigError(f"{where}: no document has a text; pass files with text")
    if blank:
        print(f"left out, as they have no text: {blank} of the documents")
    if number == 1:
        print(f"{where}: one document, so it is cut at its end as a single text is")
        return one_text(next(text for text in documents() if text.strip()), val_fraction)
    val = choose_validation(sizes, val_fraction)

    def sides() -> Iterator[tuple[Side, str]]:
        again = hashlib.sha256()
        for text in documents():
            if text.strip():
                again.update(digest := _digest(text))
                yield "val" if digest in val else "train", text
        if again.digest() != order.digest():
            raise ConfigError("the files were changed while they were read; try again")

    return Texts(order.hexdigest(), f"{number} documents", sides, are_documents=True)


def choose_validation(sizes: dict[bytes, int], val_fraction: float) -> set[bytes]:
    """Which documents are for validation, by the hash of each, out of its bytes.

    In the order of their hashes, each is taken that brings the fraction of bytes nearer to
    val_fraction; so neither the order of the files nor a document's place decides, and equal
    documents stay together. Both sides get one at least. Raises ConfigError if one cannot.
    """
    if not 0 < val_fraction < 1:
        side = "validation" if val_fraction == 0 else "training"
        raise ConfigError(
            f"val_fraction={val_fraction} leaves no document for {side}; it must be above 0 and "
            "below 1"
        )
    if len(sizes) < 2:
        raise ConfigError(
            "all documents are the same, so none is left for validation that is not trained on; "
            "pass different ones"
        )
    wanted, taken, chosen = val_fraction * sum(sizes.values()), 0, set[bytes]()
    for digest in sorted(sizes):
        if abs(taken + sizes[digest] - wanted) < abs(taken - wanted):
            taken += sizes[digest]
            chosen.add(digest)
    smallest = min(sizes, key=lambda digest: (sizes[digest], digest))
    if len(chosen) == len(sizes):
        chosen.remove(smallest)
    return chosen or {smallest}


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def texts_of(file: TextFile, key: str) -> Iterator[str]:
    """The file's documents, one by one; key: of the text in JSON lines and parquet.

    Raises ConfigError, with the line's or the row's number, for one that is not as it should be.
    """
    if file.form == "text":
        yield file.read()
    elif file.form == "lines":
        for number, line in file.lines():
            where = f"{file.path}, line {number}"
            yield _checked(_value(line, key, where), key, where)
    else:
        for number, value in enumerate(_parquet_values(file.path, key), 1):
            yield _checked(value, key, f"{file.path}, row {number}")


def _value(line: str, key: str, where: str) -> Any:
    try:
        value = json.loads(line.strip())
    except RecursionError:
        raise ConfigError(f"{where} is JSON too deeply nested to be read") from None
    except ValueError as error:
        problem = str(error)
        if isinstance(error, json.JSONDecodeError):
            problem = f"{error.msg} at character {error.pos}"
        raise ConfigError(
            f'{where} is not JSON: {problem}; each line must be one object, {{"{key}": "..."}}'
        ) from None
    if not isinstance(value, dict):
        raise ConfigError(
            f"{where} is JSON, but no object: {line.strip()[:20]!r}; each line must be one, "
            f'{{"{key}": "..."}}'
        )
    if key not in value:
        raise ConfigError(f"{where} has no key {key!r}; {_others(value)}")
    return value[key]


def _others(names: Any) -> str:
    shown = ", ".join(repr(name) for name in list(names)[:8])
    return f"it has {shown or 'none'}; --text-key names the one that holds the text"


def _checked(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        kind = {type(None): "null", bool: "true or false", dict: "an object", list: "a list"}
        found = kind.get(type(value), "a number" if isinstance(value, (int, float)) else "bytes")
        raise ConfigError(f"{where}: {key!r} holds {found}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: {key!r} is not Unicode: U+{ord(value[error.start]):04X} at character "
            f"{error.start} is half of a pair"
        ) from None
    return unix_lines(value)


def _parquet_values(path: Path, key: str) -> Iterator[Any]:
    try:
        import pyarrow  # an extra: only parquet needs it
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            f"{path} is parquet, which takes a library to read: "
            f"{python_command()} -m pip install pyarrow"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if key not in names:
                raise ConfigError(f"{path} has no column {key!r}; {_others(names)}")
            for batch in file.iter_batches(batch_size=ROWS, columns=[key]):
                yield from batch.column(0).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"cannot read {path} as parquet: {reason}; was it copied whole?"
        ) from None
