"""Tokenizers: text to token ids and back.

Every token stands for a fixed string of bytes (its piece), so decoding is the same for all kinds:
join the pieces and read the result as UTF-8. The kinds differ in how they encode.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np

from rosetrainer.data.text_parts import (
    PART,
    code_points,
    gpt2_alphabet,
    parts,
    tokenizers_library,
    training_parts,
    utf8,
)
from rosetrainer.data.token_pieces import LARGEST_VOCAB, Ids, Tokenizer
from rosetrainer.validation import ConfigError


class BytesTokenizer(Tokenizer):
    """A token is a byte of the text's UTF-8: any text, 256 ids, nothing to learn.

    end_of_text: id 256 ends a document.
    """

    def __init__(self, end_of_text: bool = False) -> None:
        super().__init__(*_with_end([bytes([i]) for i in range(256)], end_of_text))

    def encode(self, text: str) -> Ids:
        return np.frombuffer(utf8(text), np.uint8).astype(np.uint16)


class CharsTokenizer(Tokenizer):
    """A token is one of `characters`, a string of different characters in code point order.

    end_of_text: one id more, the last, ends a document.
    """

    def __init__(self, characters: str, end_of_text: bool = False):
        if len(characters) + end_of_text > LARGEST_VOCAB:
            raise ConfigError(
                f"the text has {len(characters)} different characters, more than the "
                f"{LARGEST_VOCAB - end_of_text} that fit; use the tokenizer bytes or bpe"
            )
        super().__init__(*_with_end([utf8(c) for c in characters], end_of_text))
        self.characters, self._code_points = characters, code_points(characters)

    def encode(self, text: str) -> Ids:
        points = code_points(text)
        ids = np.searchsorted(self._code_points, points)
        known = len(self._code_points)
        ids[ids == known] = 0  # beyond the last character: the next line finds it wrong
        strange = np.flatnonzero(self._code_points[ids] != points)
        if strange.size:
            where = int(strange[0])
            raise ConfigError(
                f"character {text[where]!r} (U+{ord(text[where]):04X}) at position {where} is not "
                f"among the corpus's {known} characters"
            )
        return ids.astype(np.uint16)


class IdsTokenizer(Tokenizer):
    """For ids of which nobody says what they stand for: the text is the numbers themselves."""

    def __init__(self, vocab_size: int):
        super().__init__([f" {i}".encode() for i in range(vocab_size)])

    def encode(self, text: str) -> Ids:
        words = text.split()
        for word in words:
            if not (word.isascii() and word.isdigit() and int(word) < self.vocab_size):
                raise ConfigError(
                    f"{word[:20]!r} is no id from 0 to {self.vocab_size - 1}; the corpus was "
                    "imported as ids alone, so a text is numbers, '12 7 9' say"
                )
        return np.array([int(word) for word in words], np.uint16)


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding: frequent strings of bytes are tokens, any text encodes.

    `backend` is a tokenizers.Tokenizer. Sennrich et al., "Neural Machine Translation of Rare Words
    with Subword Units"; on bytes: Radford et al., "Language Models are Unsupervised Multitask
    Learners" (GPT-2). Where `backend` has the special token END, that ends a document.
    """

    FILE = "tokenizer.json"
    END = "<|endoftext|>"

    def __init__(self, backend: Any):
        byte_of = {char: byte for byte, char in enumerate(gpt2_alphabet())}
        added = backend.get_added_tokens_decoder()
        try:
            tokens = [backend.id_to_token(i) for i in range(backend.get_vocab_size())]
            pieces = [
                added[i].content.encode() if i in added else bytes(byte_of[c] for c in token)
                for i, token in enumerate(tokens)
            ]
        except (KeyError, TypeError):
            raise ConfigError("it is not a byte-level BPE whose ids are 0, 1, 2, …") from None
        special = {token.content: i for i, token in added.items() if token.special}
        super().__init__(pieces, special.get(self.END))
        if self.end_of_text is not None:
            pieces[self.end_of_text] = b""
        backend.encode_special_tokens = True  # "<|endoftext|>" in a text ends no document
        self._backend = backend

    @classmethod
    def train(
        cls, texts: str | Iterable[str], vocab_size: int, end_of_text: bool = False
    ) -> BPETokenizer:
        """At most vocab_size tokens, 256 of them the single bytes; a short text gives fewer.

        end_of_text: the last of them ends a document.
        """
        library = tokenizers_library()
        backend = library.Tokenizer(library.models.BPE())
        backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size - end_of_text,
            initial_alphabet=sorted(gpt2_alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(training_parts(texts), trainer)
        if end_of_text:
            backend.add_special_tokens([cls.END])
        return cls(backend)

    @classmethod
    def load(cls, path: Path) -> BPETokenizer:
        library = tokenizers_library()
        try:
            return cls(library.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"cannot use {path}: {' '.join(str(error).split())}") from None

    def save(self, folder: Path) -> str:
        """Writes FILE, and gives its SHA-256."""
        content = self.to_json().encode()
        (folder / self.FILE).write_bytes(content)
        return hashlib.sha256(content).hexdigest()

    def to_json(self) -> str:
        return str(self._backend.to_str(pretty=True))

    def encode(self, text: str) -> Ids:
        utf8(text)
        ids = [
            np.array(self._backend.encode(part, add_special_tokens=False).ids, np.uint16)
            for part in parts(text, PART)
        ]
        return np.concatenate([np.zeros(0, np.uint16), *ids])


def load_tokenizer(folder: Path, meta: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a corpus: of meta's keys tokenizer, vocab_size, characters, end_of_text.

    A markov corpus has no text; its tokens are shown as the letters a, b, c, …
    Raises ConfigError if meta (or, for bpe, tokenizer.json in the folder) describes no tokenizer.
    """
    kind, vocab_size = meta.get("tokenizer"), meta.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise ConfigError(f"{folder}/meta.json: vocab_size={vocab_size!r} must be an integer")
    ends = meta.get("end_of_text") is not None
    tokenizer: Tokenizer
    if kind == "bytes":
        tokenizer = BytesTokenizer(ends)
    elif kind == "chars":
        characters = meta.get("characters")
        if not isinstance(characters, str) or list(characters) != sorted(set(characters)):
            raise ConfigError(f"{folder}/meta.json: characters must be a sorted string")
        tokenizer = CharsTokenizer(characters, ends)
    elif kind == "markov":
        tokenizer = CharsTokenizer(ascii_lowercase[:vocab_size])
    elif kind == "bpe":
        tokenizer = BPETokenizer.load(folder / BPETokenizer.FILE)
    elif kind == "ids" and 0 < vocab_size <= LARGEST_VOCAB:
        tokenizer = IdsTokenizer(vocab_size)
    else:
        raise ConfigError(
            f"{folder}/meta.json: tokenizer={kind!r} can be 'bytes', 'chars', 'bpe', 'markov' or "
            "'ids'"
        )
    if tokenizer.vocab_size != vocab_size:
        raise ConfigError(
            f"{folder}/meta.json: vocab_size={vocab_size!r}, but its {kind} tokenizer has "
            f"{tokenizer.vocab_size} tokens"
        )
    if tokenizer.end_of_text != meta.get("end_of_text"):
        raise ConfigError(
            f"{folder}/meta.json: end_of_text={meta.get('end_of_text')!r}, but that of its {kind} "
            f"tokenizer is {tokenizer.end_of_text}"
        )
    return tokenizer


def _with_end(pieces: list[bytes], end_of_text: bool) -> tuple[list[bytes], int | None]:
    return ([*pieces, b""], len(pieces)) if end_of_text else (pieces, None)
