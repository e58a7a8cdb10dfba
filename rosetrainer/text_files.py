"""Files of text, read as what they are."""

from __future__ import annotations

from pathlib import Path

from rosetrainer.fields import ConfigError


def read(paths: tuple[Path, ...]) -> str:
    """The texts of UTF-8 files, one after the other as they are. Raises ConfigError."""
    return "".join(_text(path) for path in paths)


def _text(path: Path) -> str:
    try:
        if path.is_dir():
            raise ConfigError(f"{path} is a directory; pass text files, for example {path}/*.txt")
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; pass a text file") from None
    if not data:
        raise ConfigError(f"{path} is empty; pass a file with text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}; convert "
            f"it, for example `iconv -f LATIN1 -t UTF-8 {path} > converted.txt`"
        ) from None
