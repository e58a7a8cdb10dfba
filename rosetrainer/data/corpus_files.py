"""What a corpus is on disk: meta.json and files of token ids, each checked before it is used."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import weakref
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from rosetrainer.data.corpus_advice import another_folder, no_corpus, of_other_meta
from rosetrainer.data.token_pieces import LARGEST_VOCAB
from rosetrainer.validation import Bounds, ConfigError, Count, Positive, config_from_dict

Int64s = np.ndarray[Any, np.dtype[np.int64]]

SCAN = 1 << 20  # tokens that the check of a whole file reads at once, a block


@dataclass(frozen=True)
class CorpusMeta:
    """meta.json."""

    source: str
    """The subcommand of `prepare` that made the corpus."""
    options: dict
    """What decided its content: two corpora of one source and the same options are equal."""
    tokenizer: Literal["bytes", "chars", "bpe", "markov", "ids"]
    vocab_size: Annotated[int, Bounds(1, LARGEST_VOCAB)]
    dtype: Literal["uint16"]
    train_tokens: Count
    val_tokens: Count
    sha256: dict
    """By file name."""
    blocks: dict | None = None
    """By file name, the SHA-256 of each block, so that damage can be found; see block_hashes."""
    bytes_per_token: Positive | None = None
    """Of the validation text: nats / ln 2 / bytes_per_token are bits per byte."""
    documents: dict | None = None
    """How many make up train and val; left out where one text was cut in two."""
    end_of_text: Annotated[int, Bounds(0, LARGEST_VOCAB - 1)] | None = None
    """The id that ends each document."""
    python: str | None = None
    """python-docs: whose documentation it is."""
    characters: str | None = None
    """chars: the characters in the order of their ids."""
    chain: dict | None = None
    """markov: the order, and the probabilities as MarkovChain has them."""
    floor_nats: Annotated[float, Bounds(0)] | None = None
    """markov: the true chain's mean loss on val.bin."""


class TokenFile:
    """A .bin file. It is read with pread: a map of a file that shrinks would kill the process."""

    def __init__(self, path: Path, remedy: str):
        _check_regular(path, remedy)
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}; {remedy}") from None
        weakref.finalize(self, os.close, self._descriptor)
        self.path, self.remedy = path, remedy
        facts = os.fstat(self._descriptor)
        self.size, self._changed = facts.st_size, facts.st_mtime_ns

    def read(self, start: int, count: int, vocab_size: int) -> Int64s:
        """Tokens start to start + count, (count,). Raises ConfigError if they are not there."""
        where, wanted, data = 2 * start, 2 * count, b""
        while len(data) < wanted:  # a pread gives at most 2 GiB
            try:
                more = os.pread(self._descriptor, wanted - len(data), where + len(data))
            except OSError as error:
                raise ConfigError(f"cannot read {self.path}: {error.strerror}") from None
            if not more:
                raise ConfigError(
                    f"{self.path} ends before byte {where + wanted}; {self.size} bytes were there, "
                    f"it was cut while in use; {self.remedy}"
                )
            data += more
        ids = np.frombuffer(data, "<u2")
        if ids.max(initial=0) >= vocab_size:
            index = start + int(np.argmax(ids >= vocab_size))
            raise ConfigError(
                f"{self.path}: token {index} (byte {2 * index}) is {ids[index - start]}, not below "
                f"vocab_size={vocab_size}; {self.remedy}"
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

        blocks: what block_hashes gave for it, which says where damage lies; without them the whole
        file's SHA-256 is compared.
        """
        if self.size == 0:
            raise ConfigError(f"{self.path} is empty; {self.remedy}")
        if self.size % 2:
            raise ConfigError(
                f"{self.path} has {self.size} bytes, an odd number: it cannot be uint16 tokens; "
                f"{self.remedy}"
            )
        if self.size != 2 * tokens:
            raise ConfigError(
                f"{self.path} has {self.size // 2} tokens, but meta.json says {tokens}; "
                f"{self.remedy}"
            )
        whole = hashlib.sha256()
        for number, start in enumerate(range(0, tokens, SCAN)):
            ids = self.read(start, min(SCAN, tokens - start), vocab_size)
            content = ids.astype("<u2").tobytes()
            if blocks is None:
                whole.update(content)
            elif block_hashes(content) != [blocks[number]]:
                raise self._not_as_described(2 * start, len(content))
        if blocks is None and whole.hexdigest() != sha256:
            raise self._not_as_described(0, self.size)

    def _not_as_described(self, start: int, count: int) -> ConfigError:
        return ConfigError(
            f"{self.path}: bytes {start} to {start + count} are not what meta.json describes; "
            f"{self.remedy}"
        )


def block_hashes(content: bytes) -> list[str]:
    """The SHA-256 of each block of a .bin file."""
    size = 2 * SCAN
    blocks = (content[start : start + size] for start in range(0, len(content), size))
    return [hashlib.sha256(block).hexdigest() for block in blocks]


def read_meta(folder: Path) -> CorpusMeta:
    """The corpus's meta.json. Raises ConfigError if it is not there or not as it should be."""
    path = folder / "meta.json"
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"{path} is not a file; {another_folder(folder)}")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(no_corpus(folder)) from None
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; {another_folder(folder)}"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not JSON ({error}); was it cut off? {another_folder(folder)}"
        ) from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"{path}: {error}; {another_folder(folder)}") from None
    try:
        _check_keys(values)
        meta = config_from_dict(CorpusMeta, values, "it")
        _check_consistent(meta)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; {of_other_meta(folder, values)}") from None
    return meta


def _check_keys(values: Any) -> None:
    """Raises ConfigError for a meta.json of another program."""
    if not isinstance(values, dict):
        return
    required = [f.name for f in fields(CorpusMeta) if f.default is MISSING]
    if lacking := [name for name in required if name not in values]:
        raise ConfigError(f"it lacks the keys {', '.join(lacking)}")
    if unknown := sorted(set(values) - {f.name for f in fields(CorpusMeta)}):
        raise ConfigError(
            f"it has unknown keys {', '.join(unknown)}, which a newer rosetrainer may have written"
        )


def _check_regular(path: Path, remedy: str) -> None:
    """Raises ConfigError unless path is a file; reading a pipe, say, would wait for ever."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; {remedy}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{path} is not a file; {remedy}")


def _check_consistent(meta: CorpusMeta) -> None:
    """Raises ConfigError unless meta's parts fit one another."""
    if not all(isinstance(meta.sha256.get(name), str) for name in ("train.bin", "val.bin")):
        raise ConfigError("sha256 must hold a text for train.bin and val.bin each")
    if meta.documents is not None and not _counts_documents(meta):
        raise ConfigError("documents must count those of train and val, each from 0 up")
    if meta.end_of_text is not None and meta.end_of_text >= meta.vocab_size:
        raise ConfigError(f"end_of_text={meta.end_of_text} is not below vocab_size")
    for name, tokens in (("train.bin", meta.train_tokens), ("val.bin", meta.val_tokens)):
        if meta.blocks is None:
            break
        blocks = meta.blocks.get(name)
        if not isinstance(blocks, list) or len(blocks) != math.ceil(tokens / SCAN):
            raise ConfigError(f"blocks must hold a hash for each {2 * SCAN} bytes of {name}")
    if (meta.chain is None) != (meta.floor_nats is None):
        raise ConfigError("it must hold chain and floor_nats, or neither")
    if meta.chain is None:
        return
    order, table = meta.chain.get("order"), meta.chain.get("probabilities")
    try:
        probabilities = np.array(table, np.float64)
    except (TypeError, ValueError):
        probabilities = np.zeros(0)
    alphabet = meta.vocab_size
    whole = type(order) is int and 1 <= order <= 16
    if not whole or probabilities.shape != (alphabet ** int(order or 0), alphabet):
        raise ConfigError(
            f"chain must hold an order and probabilities, vocab_size^order rows of {alphabet}"
        )
    sums = probabilities.sum(axis=1)
    if not (probabilities > 0).all() or not np.allclose(sums, 1, rtol=0, atol=1e-9):
        raise ConfigError("chain: probabilities must be above 0, and each row's sum 1")


def _counts_documents(meta: CorpusMeta) -> bool:
    counts = meta.documents or {}
    return set(counts) == {"train", "val"} and all(
        type(count) is int and count >= 0 for count in counts.values()
    )
