"""A .bin file: token ids, little-endian uint16 or uint32, no header; checked when it is read."""

from __future__ import annotations

import hashlib
import os
import stat
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from rosetrainer.validation import ConfigError, one_line

Int64s = np.ndarray[Any, np.dtype[np.int64]]

SCAN = 1 << 20  # tokens of a block: read at once, with a SHA-256 of its own


class TokenFile:
    """It is read with pread: a memory map of a file that shrinks would kill the process."""

    def __init__(self, path: Path, remedy: str, dtype: str = "uint16"):
        """remedy: what a message advises. dtype: uint16 or uint32. Raises ConfigError if path is
        not a readable file."""
        with one_line(f"cannot read {path}", remedy):
            if not path.exists():
                raise ConfigError(f"{path} is missing; {remedy}")
            # Without waiting: a pipe would be waited for until somebody writes to it.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        weakref.finalize(self, os.close, self._descriptor)
        facts = os.fstat(self._descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise ConfigError(f"{path} is not a file; {remedy}")
        self.path, self.remedy = path, remedy
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.size, self._changed = facts.st_size, facts.st_mtime_ns

    def read(self, start: int, count: int, vocab_size: int) -> Int64s:
        """Tokens start to start + count, (count,). Raises ConfigError if they are not there."""
        width = self.dtype.itemsize
        where, wanted, data = width * start, width * count, b""
        while len(data) < wanted:  # a pread gives at most 2 GiB
            with one_line(f"cannot read {self.path}", self.remedy):
                more = os.pread(self._descriptor, wanted - len(data), where + len(data))
            if not more:
                raise ConfigError(
                    f"{self.path} ends before byte {where + wanted}; {self.size} bytes were there, "
                    f"it was cut while in use; {self.remedy}"
                )
            data += more
        ids = np.frombuffer(data, self.dtype)
        if ids.max(initial=0) >= vocab_size:
            index = start + int(np.argmax(ids >= vocab_size))
            raise ConfigError(
                f"{self.path}: token {index} (byte {width * index}) is {ids[index - start]}, not "
                f"below vocab_size={vocab_size}; {self.remedy}"
            )
        if os.fstat(self._descriptor).st_mtime_ns != self._changed:
            raise ConfigError(
                f"{self.path} was changed while in use, as seen when byte {where} was read; "
                f"{self.remedy}"
            )
        return ids.astype(np.int64)

    def check(
        self, tokens: int, vocab_size: int, sha256: str, blocks: list[str] | None = None
    ) -> None:
        """Reads all of it. Raises ConfigError unless it holds just those tokens, all possible.

        sha256, blocks: as `hashes` gave them. Those of the blocks say where damage lies; without
        them that of the whole file is compared.
        """
        if self.size == 0:
            raise ConfigError(f"{self.path} is empty; {self.remedy}")
        width = self.dtype.itemsize
        if self.size % width:
            kind = "an odd number" if width == 2 else f"not a multiple of {width}"
            raise ConfigError(
                f"{self.path} has {self.size} bytes, {kind}: it cannot be {self.dtype.name} "
                f"tokens; {self.remedy}"
            )
        if self.size != width * tokens:
            raise ConfigError(
                f"{self.path} has {self.size // width} tokens, but meta.json says {tokens}; "
                f"{self.remedy}"
            )
        whole = hashlib.sha256()
        for number, start in enumerate(range(0, tokens, SCAN)):
            ids = self.read(start, min(SCAN, tokens - start), vocab_size)
            content = ids.astype(self.dtype).tobytes()
            if blocks is None:
                whole.update(content)
            elif hashlib.sha256(content).hexdigest() != blocks[number]:
                raise self._not_as_described(width * start, len(content))
        if blocks is None and whole.hexdigest() != sha256:
            raise self._not_as_described(0, self.size)

    def _not_as_described(self, start: int, count: int) -> ConfigError:
        return ConfigError(
            f"{self.path}: bytes {start} to {start + count} are not what meta.json describes; "
            f"{self.remedy}"
        )


def hashes(path: Path, dtype: str = "uint16") -> tuple[str, list[str]]:
    """The SHA-256 of a whole file, and that of each block of SCAN tokens."""
    whole, blocks = hashlib.sha256(), list[str]()
    buffer = memoryview(bytearray(np.dtype(dtype).itemsize * SCAN))
    with path.open("rb") as file:
        while size := file.readinto(buffer):
            whole.update(buffer[:size])
            blocks.append(hashlib.sha256(buffer[:size]).hexdigest())
    return whole.hexdigest(), blocks
