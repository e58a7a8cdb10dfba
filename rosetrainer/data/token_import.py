"""Imports token ids that nanoGPT or llm.c wrote."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rosetrainer.data.advice import TOKENIZERS
from rosetrainer.data.bpe import BPETokenizer, find_tokenizer
from rosetrainer.data.corpus_writer import write_tokens
from rosetrainer.data.documents import Side
from rosetrainer.data.file_kinds import compression
from rosetrainer.data.token_file import SCAN
from rosetrainer.data.tokenizer import (
    LARGEST_UINT16,
    BytesTokenizer,
    Ids,
    IdsTokenizer,
    Tokenizer,
    dtype_of_ids,
)
from rosetrainer.durable_files import free
from rosetrainer.validation import ConfigError, one_line

IDS_WANTED = "pass token ids, as nanoGPT or llm.c has them"
ANOTHER = "name the tokenizer that these ids are of"
HEADER = 256  # int32 numbers that llm.c's files begin with
# By the first of them: the version that must follow, and how an id is stored.
LLM_C = {20240520: (1, "<u2"), 20240801: (7, "<u4")}


@dataclass(frozen=True)
class IdFile:
    """A file of ids: where they begin, how many there are, and how each is stored."""

    path: Path
    offset: int
    count: int
    dtype: str

    def parts(self, tokenizer: Tokenizer) -> Iterator[Ids]:
        """All ids, in parts of bounded size. Raises ConfigError for one not in the vocabulary."""
        for first in range(0, self.count, SCAN):
            wanted = min(SCAN, self.count - first)
            start = self.offset + first * np.dtype(self.dtype).itemsize
            with one_line(f"cannot read {self.path}", IDS_WANTED):
                ids = np.fromfile(self.path, self.dtype, wanted, offset=start)
            if len(ids) < wanted:
                raise ConfigError(f"{self.path} became shorter while it was read")
            self._check(ids, first, tokenizer.vocab_size)
            yield ids.astype(dtype_of_ids(tokenizer.vocab_size))

    def _check(self, ids: np.ndarray[Any, Any], first: int, vocab_size: int) -> None:
        bare = self.dtype == "<u2" and not self.offset
        if bare and first == 0 and _are_uint32(ids):
            largest = int(ids[: len(ids) // 2 * 2].view("<u4").max())
            remedy = (
                f"write them as uint16, in Python `numpy.fromfile({str(self.path)!r}, 'uint32')"
                f".astype('uint16').tofile({str(free(self.path))!r})`"
            )
            raise ConfigError(
                f"{self.path} holds uint32, not uint16, ids up to {largest}; "
                + (remedy if largest < LARGEST_UINT16 else ANOTHER)
            )
        if ids.max(initial=0) >= vocab_size:
            where = int(np.argmax(ids >= vocab_size))
            raise ConfigError(
                f"{self.path}: id {first + where} is {ids[where]}, not below vocab_size="
                f"{vocab_size} of the tokenizer; {ANOTHER}"
            )


@dataclass(frozen=True)
class Source:
    """What is imported."""

    files: dict[Side, list[IdFile]]
    tokenizer: Tokenizer
    options: dict[str, Any]
    """What decides the content."""

    def parts(self, side: Side) -> Iterator[Ids]:
        return (ids for file in self.files[side] for ids in file.parts(self.tokenizer))

    def write(self, folder: Path) -> dict[str, Any]:
        """Writes train.bin, val.bin and the tokenizer's file; gives meta.json's keys."""
        tokens = ((side, ids) for side in self.files for ids in self.parts(side))
        return write_tokens(folder, self.tokenizer, tokens)


def open_source(paths: tuple[Path, ...], tokenizer: str, vocab_size: int | None) -> Source:
    """Reads all ids once. Raises ConfigError for what cannot be a corpus.

    paths: a folder, or a file for training and one for validation. tokenizer: bytes, ids, or the
    path of a tokenizer.json; vocab_size: of ids.
    """
    by_side = _find(paths)
    known = _tokenizer(tokenizer, vocab_size)
    dtype = {"uint16": "<u2", "uint32": "<u4"}[dtype_of_ids(known.vocab_size)]
    files = {side: [_open(path, dtype) for path in found] for side, found in by_side.items()}
    options: dict[str, Any] = {"vocab_size": known.vocab_size}
    if isinstance(known, BPETokenizer):
        options["tokenizer_sha256"] = hashlib.sha256(known.to_json().encode()).hexdigest()
    else:
        options["tokenizer"] = tokenizer
    source = Source(files, known, options)
    for side, found in files.items():
        digest, count = hashlib.sha256(), sum(file.count for file in found)
        for ids in source.parts(side):
            digest.update(ids.astype(dtype).tobytes())
        if count < 2:
            raise ConfigError(f"{found[0].path} holds {count} ids; {side}.bin needs 2")
        options[f"{side}_sha256"] = digest.hexdigest()
    return source


def _are_uint32(ids: np.ndarray[Any, Any]) -> bool:
    """Whether every second one is the upper half of a uint32 below 2^18."""
    low, high = ids[0::2], ids[1::2]
    return len(ids) > 15 and bool((high < 4).all() and (low > 3).any())


def _find(paths: tuple[Path, ...]) -> dict[Side, list[Path]]:
    """The files of each side, in the order of their names."""
    if len(paths) == 2:
        return {"train": [paths[0]], "val": [paths[1]]}
    if len(paths) != 1 or not paths[0].is_dir():
        named = " ".join(map(str, paths)) or "nothing"
        raise ConfigError(
            f"import needs a folder with train.bin and val.bin, or two files, those for training "
            f"first; not {named}"
        )
    found: dict[Side, list[Path]] = {"train": [], "val": []}
    for side in found:
        exact = paths[0] / f"{side}.bin"
        found[side] = [exact] if exact.exists() else sorted(paths[0].glob(f"*{side}*.bin"))
        if not found[side]:
            raise ConfigError(
                f"{paths[0]} has neither {side}.bin nor another *{side}*.bin; pass two files, "
                "those for training first"
            )
    return found


def _open(path: Path, dtype: str) -> IdFile:
    """dtype: of ids without a header."""
    if not path.is_file():
        raise ConfigError(f"{path} is not a file; {IDS_WANTED}")
    with one_line(f"cannot read {path}", IDS_WANTED), path.open("rb") as file:
        size, head = path.stat().st_size, file.read(4 * HEADER)
    if packed := compression(head):
        raise ConfigError(f"{path} is {packed}; unpack it, and pass what comes out")
    if head.startswith(b"\x93NUMPY"):
        name = np.dtype(dtype).name
        raise ConfigError(
            f"{path} is a numpy array; write its ids alone, for example "
            f"numpy.load({str(path)!r}).astype('{name}').tofile({str(free('ids.bin'))!r})"
        )
    numbers = np.frombuffer(head[: len(head) // 4 * 4], "<i4")
    if len(numbers) and int(numbers[0]) in LLM_C:
        return _open_llm_c(path, size, numbers)
    width = np.dtype(dtype).itemsize
    if size % width:
        kind = "an odd number" if width == 2 else f"not a multiple of {width}"
        raise ConfigError(
            f"{path} has {size} bytes, {kind}: it cannot be {np.dtype(dtype).name} ids; was it "
            f"copied whole?"
        )
    return IdFile(path, 0, size // width, dtype)


def _open_llm_c(path: Path, size: int, numbers: np.ndarray[Any, Any]) -> IdFile:
    version, dtype = LLM_C[int(numbers[0])]
    if len(numbers) < HEADER:
        raise ConfigError(f"{path} ends inside llm.c's header; was it copied whole?")
    if numbers[1] != version:
        raise ConfigError(
            f"{path} is llm.c's, magic {numbers[0]}, but of version {numbers[1]}; {version} is "
            "known here"
        )
    held = (size - 4 * HEADER) / np.dtype(dtype).itemsize
    if held != numbers[2]:
        raise ConfigError(
            f"{path} says that it has {numbers[2]} ids, and has {held:g}; was it copied whole?"
        )
    return IdFile(path, 4 * HEADER, int(numbers[2]), dtype)


def _tokenizer(name: str, vocab_size: int | None) -> Tokenizer:
    if name == "ids":
        if vocab_size is None:
            raise ConfigError(
                "--tokenizer ids needs --vocab-size, the number of different ids that there can be"
            )
        return IdsTokenizer(vocab_size)
    if vocab_size is not None:
        raise ConfigError(
            f"vocab_size={vocab_size} is for --tokenizer ids; leave it out, the tokenizer "
            f"{name!r} has its own"
        )
    if name == "bytes":
        return BytesTokenizer()
    path = find_tokenizer(name)
    if path is None:
        raise ConfigError(
            f"tokenizer={name!r} must be {TOKENIZERS}; for ids of gpt2's, take the tokenizer.json "
            "of openai-community/gpt2"
        )
    return BPETokenizer.load(path)
