"""Tokenizers: text to token ids and back.

Every token stands for a fixed string of bytes (its piece), so all kinds decode alike: the pieces
are joined and read as UTF-8. The kinds differ in how they encode.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np

from rosetrainer.validation import ConfigError

Ids = np.ndarray[Any, np.dtype[Any]]

LARGEST_VOCAB = 2**24
LARGEST_UINT16 = 65536  # the ids of a larger vocabulary are stored as uint32


def dtype_of_ids(vocab_size: int) -> Literal["uint16", "uint32"]:
    """How a corpus stores them."""
    return "uint16" if vocab_size <= LARGEST_UINT16 else "uint32"


class Tokenizer(ABC):
    """pieces[id] is the string of bytes that token `id` stands for.

    end_of_text is the id that ends a document, which no text encodes to; None if there is none.
    """

    kind: str
    """As meta.json names it."""

    def __init__(self, pieces: list[bytes], end_of_text: bool = False):
        """end_of_text: append an id, with an empty piece, that ends a document."""
        self.pieces, self.end_of_text = pieces, len(pieces) if end_of_text else None
        self.pieces += [b""] * end_of_text

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """Token ids of text, (n,). Raises ConfigError for text that has none."""

    def as_ids(self, ids: list[int]) -> Ids:
        """As a corpus stores them."""
        return np.array(ids, dtype_of_ids(self.vocab_size))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.piece(i) for i in ids).decode("utf-8", "replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Decodes a text while it is being generated: what each id completes, maybe nothing.

        A character may be split over several tokens: its bytes are held back until it is whole. At
        the end comes U+FFFD if the text stopped inside a character.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        yield from (utf8.decode(self.piece(int(token))) for token in ids)
        yield utf8.decode(b"", final=True)

    def piece(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            raise ConfigError(f"token id {token_id} is not from 0 to {self.vocab_size - 1}")
        return self.pieces[token_id]


class BytesTokenizer(Tokenizer):
    """A token is a byte of the text's UTF-8: any text, 256 ids, nothing to learn."""

    kind = "bytes"

    def __init__(self, end_of_text: bool = False) -> None:
        super().__init__([bytes([i]) for i in range(256)], end_of_text)

    def encode(self, text: str) -> Ids:
        return np.frombuffer(utf8(text), np.uint8).astype(np.uint16)


class CharsTokenizer(Tokenizer):
    """A token is one of `characters`, a string of different characters in code point order."""

    kind = "chars"

    def __init__(self, characters: str, end_of_text: bool = False):
        if len(characters) + end_of_text > LARGEST_UINT16:
            raise ConfigError(
                f"the text has {len(characters)} different characters, more than the "
                f"{LARGEST_UINT16 - end_of_text} that fit; use the tokenizer bytes or bpe"
            )
        super().__init__([utf8(c) for c in characters], end_of_text)
        self.characters, self._code_points = characters, _code_points(characters)

    def encode(self, text: str) -> Ids:
        points, known = _code_points(text), len(self._code_points)
        ids = np.searchsorted(self._code_points, points)
        ids[ids == known] = 0  # beyond the last character: the next line finds it wrong
        unknown = np.flatnonzero(self._code_points[ids] != points)
        if unknown.size:
            where = int(unknown[0])
            raise ConfigError(
                f"character {text[where]!r} (U+{ord(text[where]):04X}) at position {where} is not "
                f"among the corpus's {known} characters"
            )
        return ids.astype(np.uint16)


class IdsTokenizer(Tokenizer):
    """For ids whose text nobody knows: the text is the numbers themselves."""

    kind = "ids"

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
        return self.as_ids([int(word) for word in words])


def utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the text is not Unicode: U+{ord(text[error.start]):04X} at position {error.start} "
            "stands for no character"
        ) from None


def _code_points(text: str) -> np.ndarray[Any, np.dtype[np.uint32]]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
