"""Writes a corpus: token ids into train.bin and val.bin, and what meta.json says of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from rosetrainer.data.bpe import BPETokenizer, parts
from rosetrainer.data.documents import Side, Texts
from rosetrainer.data.token_file import hashes
from rosetrainer.data.tokenizer import (
    BytesTokenizer,
    CharsTokenizer,
    Ids,
    Tokenizer,
    dtype_of_ids,
)
from rosetrainer.validation import ConfigError


def write_tokens(
    folder: Path, tokenizer: Tokenizer, tokens: Iterable[tuple[Side, Ids]]
) -> dict[str, Any]:
    """Writes train.bin, val.bin and the tokenizer's file if it has one; gives meta.json's keys.

    tokens: ids (n,) with the side that they are for, which need not fit into memory together.
    """
    lengths = np.array([len(piece) for piece in tokenizer.pieces])
    dtype = dtype_of_ids(tokenizer.vocab_size)
    stored = np.dtype(dtype).newbyteorder("<")
    counts, ends, val_bytes = Counter[Side](), Counter[Side](), 0
    with (folder / "train.bin").open("xb") as train, (folder / "val.bin").open("xb") as val:
        for side, ids in tokens:
            (train if side == "train" else val).write(ids.astype(stored).tobytes())
            counts[side] += len(ids)
            ends[side] += int(np.count_nonzero(ids == tokenizer.end_of_text))
            val_bytes += int(lengths[ids].sum()) if side == "val" else 0
    found = {name: hashes(folder / name, dtype) for name in ("train.bin", "val.bin")}
    meta: dict[str, Any] = {
        "tokenizer": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype,
        "train_tokens": counts["train"],
        "val_tokens": counts["val"],
        "sha256": {name: whole for name, (whole, _) in found.items()},
        "blocks": {name: blocks for name, (_, blocks) in found.items()},
    }
    if tokenizer.kind != "ids" and val_bytes:
        meta["bytes_per_token"] = val_bytes / counts["val"]
    if tokenizer.end_of_text is not None:
        meta["end_of_text"] = tokenizer.end_of_text
        if any(ends.values()):
            meta["documents"] = {"train": ends["train"], "val": ends["val"]}
    if isinstance(tokenizer, CharsTokenizer):
        meta["characters"] = tokenizer.characters
    if isinstance(tokenizer, BPETokenizer):
        tokenizer.save(folder)
        meta["sha256"][tokenizer.FILE] = hashes(folder / tokenizer.FILE)[0]
    return meta


def write_texts(
    folder: Path, texts: Texts, options: dict[str, Any], given: Tokenizer | None = None
) -> dict[str, Any]:
    """As write_tokens. Each document is followed by the id for the end of text.

    given: the tokenizer, if it is not made of the texts. options: the tokenizer, its vocab_size,
    and val_fraction for the message. Raises ConfigError for a text that is too short for two sides.
    """
    tokenizer = given or make_tokenizer(texts, options)
    meta = write_tokens(folder, tokenizer, _encoded(texts, tokenizer))
    for side in ("train", "val"):
        if (count := meta[f"{side}_tokens"]) < 2:
            raise ConfigError(
                f"val_fraction={options['val_fraction']} of {texts.size} leaves {count} tokens for "
                f"{side}.bin; it needs 2 at least"
            )
    return meta


def make_tokenizer(texts: Texts, options: dict[str, Any]) -> Tokenizer:
    if options["tokenizer"] == "chars":
        characters = set(chain.from_iterable(set(text) for _, text in texts.sides()))
        return CharsTokenizer("".join(sorted(characters)), texts.are_documents)
    if options["tokenizer"] == "bpe":
        # The merges are learnt, so they must not see the validation text.
        train = (text for side, text in texts.sides() if side == "train")
        return BPETokenizer.train(train, options["vocab_size"], texts.are_documents)
    return BytesTokenizer(texts.are_documents)


def _encoded(texts: Texts, tokenizer: Tokenizer) -> Iterator[tuple[Side, Ids]]:
    last = tokenizer.end_of_text if texts.are_documents else None
    end = [] if last is None else [last]
    for side, text in texts.sides():
        for part in parts(text):
            yield side, tokenizer.encode(part)
        yield side, tokenizer.as_ids(end)
