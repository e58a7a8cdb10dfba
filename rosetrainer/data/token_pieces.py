"""What every tokenizer is: for each id a string of bytes, its piece, and how pieces become text."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import numpy as np

from rosetrainer.validation import ConfigError

Ids = np.ndarray[Any, np.dtype[np.uint16]]

LARGEST_VOCAB = 65536  # the ids of a corpus are stored as uint16


class Tokenizer(ABC):
    """pieces[id] is the string of bytes that token `id` stands for.

    end_of_text is the id that ends a document, which no text encodes to; None if there is none.
    """

    def __init__(self, pieces: list[bytes], end_of_text: int | None = None):
        self.pieces, self.end_of_text = pieces, end_of_text

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """Token ids of text, (n,). Raises ConfigError for text that has none."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.piece(i) for i in ids).decode("utf-8", "replace")

    def stream_decoder(self) -> StreamDecoder:
        return StreamDecoder(self)

    def piece(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            raise ConfigError(f"token id {token_id} is not from 0 to {self.vocab_size - 1}")
        return self.pieces[token_id]


class StreamDecoder:
    """Decodes a text while it is being generated.

    A character may be split over several tokens: its bytes are held back until it is whole.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        return self.utf8.decode(self._tokenizer.piece(int(token_id)))

    def finish(self) -> str:
        """U+FFFD if the text stopped inside a character, else nothing."""
        return self.utf8.decode(b"", final=True)
