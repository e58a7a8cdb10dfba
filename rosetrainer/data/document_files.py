"""The documents of a file: a whole text, the lines of JSON lines, or the rows of parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rosetrainer.data.text_encoding import unix_lines
from rosetrainer.data.text_files import TextFile
from rosetrainer.environment import python_command
from rosetrainer.validation import ConfigError

ROWS = 256  # of parquet, in memory at once


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
        place = (
            error
            if not isinstance(error, json.JSONDecodeError)
            else (f"{error.msg} at character {error.pos}")
        )
        raise ConfigError(
            f'{where} is not JSON: {place}; each line must be one object, {{"{key}": "..."}}'
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
