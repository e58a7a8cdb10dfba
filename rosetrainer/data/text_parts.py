"""Text as tokenizers take it: its bytes, its code points, and parts that can be encoded alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from rosetrainer.validation import ConfigError

PART = 1 << 20  # characters that go to the tokenizers library at once; bounds its memory


def utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the text is not Unicode: U+{ord(text[error.start]):04X} at position {error.start} "
            "stands for no character"
        ) from None


def code_points(text: str) -> np.ndarray[Any, np.dtype[np.uint32]]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def parts(text: str, length: int) -> Iterator[str]:
    """Consecutive parts of text, of `length` characters or a little more.

    A cut lies between the end of a word and a line feed. No token of the GPT-2 pattern spans that
    place, so the parts' tokens, put together, are the tokens of the whole text.
    """
    word_end = re.compile(r"(?<=[A-Za-z0-9.])(?=\n)")
    start = 0
    while start < len(text):
        cut = word_end.search(text, start + length)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end


def gpt2_alphabet() -> str:
    """The character that stands for byte i, at place i: vocabularies hold text, not bytes.

    Visible Latin-1 characters stand for themselves, the other bytes for U+0100, U+0101, …
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return "".join(chr(b) if b in visible else chr(next(others)) for b in range(256))


def tokenizers_library() -> Any:
    try:
        import tokenizers  # lazily: only bpe needs it
    except ImportError:
        raise ConfigError("the bpe tokenizer needs a library: pip install tokenizers") from None
    return tokenizers


def training_parts(texts: str | Iterable[str]) -> Iterator[str]:
    for text in [texts] if isinstance(texts, str) else texts:
        utf8(text)  # the library has no clear word for text that is not Unicode
        yield from parts(text, PART)
