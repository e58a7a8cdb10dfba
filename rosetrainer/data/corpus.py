"""What a corpus is on disk: train.bin, val.bin, and meta.json, which says what they hold."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Annotated, Any, Literal

import numpy as np

from rosetrainer.data.advice import no_corpus, of_other_meta
from rosetrainer.data.bpe import BPETokenizer
from rosetrainer.data.token_file import SCAN
from rosetrainer.data.tokenizer import (
    LARGEST_VOCAB,
    BytesTokenizer,
    CharsTokenizer,
    IdsTokenizer,
    Tokenizer,
    dtype_of_ids,
)
from rosetrainer.validation import Bounds, ConfigError, Count, Positive, config_from_dict


@dataclass(frozen=True)
class CorpusMeta:
    """meta.json."""

    source: str
    """The subcommand of `prepare` that made the corpus."""
    options: dict
    """What decided its content: two corpora of one source and the same options are equal."""
    tokenizer: Literal["bytes", "chars", "bpe", "markov", "ids"]
    vocab_size: Annotated[int, Bounds(1, LARGEST_VOCAB)]
    dtype: Literal["uint16", "uint32"]
    train_tokens: Count
    val_tokens: Count
    sha256: dict
    """By file name."""
    blocks: dict | None = None
    """By file name, the SHA-256 of each block, so that damage can be found; see token_file."""
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


def read_meta(folder: Path) -> CorpusMeta:
    """The corpus's meta.json. Raises ConfigError if it is not there or not as it should be."""
    path, values = folder / "meta.json", None
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError("it is not a file")
        values = json.loads(path.read_text(encoding="utf-8"))
        meta = config_from_dict(CorpusMeta, values, "it")
        _check_consistent(meta)
        return meta
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(no_corpus(folder)) from None
    except OSError as error:
        problem = f"it cannot be read: {error.strerror}"
    except ConfigError as error:
        problem = str(error)
    except (ValueError, RecursionError) as error:
        problem = f"it is not JSON, or was cut off ({error})"
    raise ConfigError(f"{path}: {problem}; {of_other_meta(folder, values)}")


def _check_consistent(meta: CorpusMeta) -> None:
    """Raises ConfigError unless meta's parts fit one another."""
    if not all(isinstance(meta.sha256.get(name), str) for name in ("train.bin", "val.bin")):
        raise ConfigError("sha256 must hold a text for train.bin and val.bin each")
    if meta.dtype != (wanted := dtype_of_ids(meta.vocab_size)):
        raise ConfigError(f"dtype={meta.dtype!r} must be {wanted} for vocab_size={meta.vocab_size}")
    if meta.documents is not None:
        are_counts = all(type(n) is int and n >= 0 for n in meta.documents.values())
        if set(meta.documents) != {"train", "val"} or not are_counts:
            raise ConfigError("documents must count those of train and val, each from 0 up")
    if meta.end_of_text is not None and meta.end_of_text >= meta.vocab_size:
        raise ConfigError(f"end_of_text={meta.end_of_text} is not below vocab_size")
    for name, tokens in (("train.bin", meta.train_tokens), ("val.bin", meta.val_tokens)):
        if meta.blocks is None:
            break
        blocks = meta.blocks.get(name)
        if not isinstance(blocks, list) or len(blocks) != math.ceil(tokens / SCAN):
            raise ConfigError(f"blocks must hold a hash for each {SCAN} tokens of {name}")
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


def load_tokenizer(folder: Path, meta: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a corpus: of meta's keys tokenizer, vocab_size, characters, end_of_text.

    A markov corpus has no text; its tokens are shown as the letters a, b, c, …
    Raises ConfigError if meta (or, for bpe, tokenizer.json in the folder) describes no tokenizer.
    """
    kind, vocab_size = meta.get("tokenizer"), meta.get("vocab_size")
    end, where = meta.get("end_of_text"), f"{folder}/meta.json"
    if not isinstance(vocab_size, int):
        raise ConfigError(f"{where}: vocab_size={vocab_size!r} must be an integer")
    tokenizer: Tokenizer
    if kind == "bytes":
        tokenizer = BytesTokenizer(end is not None)
    elif kind == "chars":
        characters = meta.get("characters")
        if not isinstance(characters, str) or list(characters) != sorted(set(characters)):
            raise ConfigError(f"{where}: characters must be a sorted string")
        tokenizer = CharsTokenizer(characters, end is not None)
    elif kind == "markov":
        tokenizer = CharsTokenizer(ascii_lowercase[:vocab_size])
    elif kind == "bpe":
        tokenizer = BPETokenizer.load(folder / BPETokenizer.FILE)
    elif kind == "ids" and vocab_size > 0:
        tokenizer = IdsTokenizer(vocab_size)
    else:
        raise ConfigError(
            f"{where}: tokenizer={kind!r} can be 'bytes', 'chars', 'bpe', 'markov' or 'ids'"
        )
    if tokenizer.vocab_size != vocab_size:
        raise ConfigError(
            f"{where}: vocab_size={vocab_size!r}, but its {kind} tokenizer has "
            f"{tokenizer.vocab_size} tokens"
        )
    if tokenizer.end_of_text != end:
        raise ConfigError(
            f"{where}: end_of_text={end!r}, but that of its {kind} tokenizer is "
            f"{tokenizer.end_of_text}"
        )
    return tokenizer
