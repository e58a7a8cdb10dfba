"""Texts, encoded: the files of a corpus and what meta.json says of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from rosetrainer.data.documents import Texts
from rosetrainer.data.text_parts import PART, parts
from rosetrainer.data.token_writer import TokenWriter
from rosetrainer.data.tokenizer import BPETokenizer, BytesTokenizer, CharsTokenizer, Tokenizer
from rosetrainer.validation import ConfigError


def write_corpus(
    folder: Path, texts: Texts, options: dict[str, Any], python_docs: bool = False
) -> dict[str, Any]:
    """Writes train.bin, val.bin and the tokenizer's file if it has one; gives meta.json's keys.

    options: the tokenizer, its vocab_size, and val_fraction for the message. Documents are encoded
    one by one, each with the id for the end of text behind it. Raises ConfigError for a text that
    is too short for two sides.
    """
    tokenizer = _tokenizer(texts, options)
    hashes: dict[str, tuple[str, list[str]]] = {}
    if isinstance(tokenizer, BPETokenizer):
        hashes[BPETokenizer.FILE] = (tokenizer.save(folder), [])
    tokens: dict[str, int] = {}
    val_bytes = 0
    with TokenWriter(folder / "train.bin") as train, TokenWriter(folder / "val.bin") as val:
        writers: dict[str, TokenWriter] = {"train": train, "val": val}
        for side, text in texts.sides():
            for part in parts(text, PART):
                writers[side].write(tokenizer.encode(part))
            if tokenizer.end_of_text is not None:
                writers[side].write(np.array([tokenizer.end_of_text], np.uint16))
            val_bytes += len(text.encode()) if side == "val" else 0
        for name, writer in writers.items():
            tokens[name] = writer.tokens
            hashes[f"{name}.bin"] = writer.hashes()
    for name, count in tokens.items():
        if count < 2:
            raise ConfigError(
                f"val_fraction={options['val_fraction']} of {texts.size} leaves {count} tokens for "
                f"{name}.bin; it needs 2 at least"
            )
    meta: dict[str, Any] = {
        "tokenizer": options["tokenizer"],
        "vocab_size": tokenizer.vocab_size,
        "train_tokens": tokens["train"],
        "val_tokens": tokens["val"],
        "bytes_per_token": val_bytes / tokens["val"],
    }
    if texts.counts is not None:
        meta |= {"documents": texts.counts, "end_of_text": tokenizer.end_of_text}
    if isinstance(tokenizer, CharsTokenizer):
        meta["characters"] = tokenizer.characters
    if python_docs:
        meta["python"] = f"{sys.implementation.name} {sys.version.split()[0]}"
    return meta | described(hashes)


def described(hashes: dict[str, tuple[str, list[str]]]) -> dict[str, Any]:
    """meta.json's keys of the files: by name the SHA-256, and that of each block of a .bin."""
    blocks = {name: of_blocks for name, (_, of_blocks) in hashes.items() if of_blocks}
    return {"sha256": {name: whole for name, (whole, _) in hashes.items()}, "blocks": blocks}


def _tokenizer(texts: Texts, options: dict[str, Any]) -> Tokenizer:
    ends = texts.counts is not None
    if options["tokenizer"] == "chars":
        return CharsTokenizer("".join(sorted(texts.characters())), ends)
    if options["tokenizer"] == "bpe":
        # The merges are learnt, so they must not see the validation text.
        train = (text for side, text in texts.sides() if side == "train")
        return BPETokenizer.train(train, options["vocab_size"], ends)
    return BytesTokenizer(ends)
