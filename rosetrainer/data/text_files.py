"""Files of text: packed or not; one text, JSON lines or parquet."""

from __future__ import annotations

import builtins
import json
import shlex
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Literal

from rosetrainer.data.encoding import byte_order_mark, decode
from rosetrainer.data.file_kinds import BINARY, HEAD, MARKUP, compression, is_parquet, refuse
from rosetrainer.durable_files import free
from rosetrainer.validation import ConfigError, one_line

LARGEST_UNPACKED = 1 << 30  # bytes: a packed file of 1 MB can hold a thousand times as much
LONGEST_LINE = 1 << 28
JSON_LINES = (".jsonl", ".ndjson")
MODULES = {"gzip": "gzip", "bzip2": "bz2", "xz": "lzma"}  # that open each


@dataclass(frozen=True)
class TextFile:
    """A file that can be read: what it holds, and how it is packed."""

    path: Path
    form: Literal["text", "lines", "parquet"]
    packed: str | None

    def read(self) -> str:
        """All of it as one text. Raises ConfigError if that is none."""
        with self.open() as stream:
            data = stream.read(LARGEST_UNPACKED + 1 if self.packed else -1)
        if self.packed and len(data) > LARGEST_UNPACKED:
            raise ConfigError(
                f"{self.path} unpacks to more than {LARGEST_UNPACKED >> 20} MiB; if it should, "
                f"{self.unpacking()}"
            )
        return self._decode(data)

    def lines(self) -> Iterator[tuple[int, str]]:
        """Its lines that are not blank, and their numbers from 1 on. Raises ConfigError."""
        with self.open() as stream:
            lines: Iterable[str]
            if byte_order_mark(stream.read(4))[0] == "utf-8":
                stream.seek(0)
                lines = self._utf8_lines(stream)
            else:  # UTF-16, rare, and rarely large
                lines = self.read().split("\n")
            yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())

    def _utf8_lines(self, stream: IO[bytes]) -> Iterator[str]:
        offset = 0
        while line := stream.readline(LONGEST_LINE + 1):
            if len(line) > LONGEST_LINE:
                raise ConfigError(
                    f"{self.path} has a line of more than {LONGEST_LINE >> 20} MiB, at offset "
                    f"{offset}; a line of JSON can hold that much at most"
                )
            yield self._decode(line, offset)
            offset += len(line)

    def _decode(self, data: bytes, offset: int = 0) -> str:
        with self.inside_packed():
            return decode(data, self.path, offset)

    def head(self) -> bytes:
        with self.open() as stream:
            return stream.read(HEAD)

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Its bytes, unpacked. Raises ConfigError where they cannot be read."""
        module: Any = builtins
        if self.packed is not None:
            try:
                module = import_module(MODULES[self.packed])
            except ImportError:
                raise ConfigError(
                    f"{self.path} is {self.packed}, and this Python was built without "
                    f"{MODULES[self.packed]}; {self.unpacking()}"
                ) from None
        damage = (EOFError, OSError, zlib.error, getattr(module, "LZMAError", EOFError))
        try:
            with module.open(self.path, "rb") as stream:
                yield stream
        except damage as error:
            reason = getattr(error, "strerror", None)
            if reason:
                raise ConfigError(f"cannot read {self.path}: {reason}; pass a text file") from None
            raise ConfigError(
                f"{self.path} is {self.packed}, but damaged or cut off ({error}); was it copied "
                "whole?"
            ) from None

    def unpacking(self) -> str:
        """The command that unpacks it."""
        unpacked = free("unpacked")
        command = f"{self.packed} -dc < {shlex.quote(str(self.path))} > {unpacked}"
        return f"`{command}`, and pass {unpacked}"

    @contextmanager
    def inside_packed(self) -> Iterator[None]:
        """In a packed file, advice about its content only helps once it is unpacked: say that."""
        try:
            yield
        except ConfigError as error:
            if self.packed is None:
                raise
            what = str(error).partition("; ")[0]
            raise ConfigError(f"{what}, inside {self.packed}; {self.unpacking()}") from None

    def holds_json_lines(self, head: bytes) -> bool:
        """Whether its name says so, or its first line is a JSON object."""
        if set(JSON_LINES) & set(self.path.suffixes):
            return True
        if not _as_utf8(head).lstrip().startswith(b"{"):
            return False
        try:
            return isinstance(json.loads(next(self.lines())[1]), dict)
        except (ConfigError, ValueError, RecursionError, StopIteration):
            return False  # then it is read as a text, and what is wrong with it is said


def recognise(path: Path, as_text: bool = False) -> TextFile:
    """Finds out by its bytes what a file is. as_text: JSON lines, JSON and markup are text too.

    Raises ConfigError for what is no text, with advice for its kind.
    """
    _check_regular(path)
    file = TextFile(path, "text", None)
    head = file.head()
    if packed := compression(head):
        file = TextFile(path, "text", packed)
        head = file.head()
        if compression(head):
            raise ConfigError(f"{path} is packed twice; {file.unpacking()}")
    if is_parquet(head):
        if packed:
            raise ConfigError(f"{path} is parquet inside {packed}; {file.unpacking()}")
        return TextFile(path, "parquet", None)
    with file.inside_packed():
        refuse(path, head, BINARY)
        if as_text:
            return file
        if file.holds_json_lines(head):
            return TextFile(path, "lines", packed)
        refuse(path, _as_utf8(head), MARKUP, ", or take it as it is: --as-text")
    return file


def _check_regular(path: Path) -> None:
    """Raises ConfigError unless path is a file; reading a pipe, say, would wait for ever."""
    with one_line(f"cannot read {path}", "pass a text file"):
        mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise ConfigError(f"{path} is a directory; pass text files, for example {path}/*.txt")
    if not stat.S_ISREG(mode):
        raise ConfigError(
            f"{path} is a pipe or a device, and a text is read more than once; write it to a file, "
            "and pass that"
        )


def _as_utf8(head: bytes) -> bytes:
    encoding, mark = byte_order_mark(head)
    return head[mark:].decode(encoding, "replace").encode()
