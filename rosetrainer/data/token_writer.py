"""A .bin file while it is written: token ids in parts, and the hashes that meta.json keeps."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType

from rosetrainer.data.corpus_files import SCAN
from rosetrainer.data.tokenizer import Ids


class TokenWriter:
    """Little-endian uint16, no header. What is in memory does not grow with the file."""

    def __init__(self, path: Path):
        self._file = path.open("xb")
        self._whole, self._block = hashlib.sha256(), hashlib.sha256()
        self._blocks: list[str] = []
        self.tokens = 0

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, ids: Ids) -> None:
        """Appends ids, (n,)."""
        while len(ids):
            left = SCAN - self.tokens % SCAN  # in the present block
            data = ids[:left].astype("<u2").tobytes()
            self._file.write(data)
            self._whole.update(data)
            self._block.update(data)
            self.tokens += len(ids[:left])
            ids = ids[left:]
            if self.tokens % SCAN == 0:
                self._blocks.append(self._block.hexdigest())
                self._block = hashlib.sha256()

    def hashes(self) -> tuple[str, list[str]]:
        """(SHA-256 of what was written, that of each block as block_hashes gives it)."""
        last = [self._block.hexdigest()] if self.tokens % SCAN else []
        return self._whole.hexdigest(), self._blocks + last
