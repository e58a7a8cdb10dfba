"""Tokenizers: text to token ids and back.

Every token stands for a fixed string of bytes (its piece), so decoding is the same for all kinds:
join the pieces and read the result as UTF-8. The kinds differ in how they encode.
"""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np

from rosetrainer.fields import ConfigError

Ids = np.ndarray[Any, np.dtype[np.uint16]]

LARGEST_VOCAB = 65536  # the ids of a corpus are stored as uint16
PART = 1 << 20  # characters that go to the tokenizers library at once; bounds its memory


class Tokenizer(ABC):
    """pieces[id] is the string of bytes that token `id` stands for."""

    def __init__(self, pieces: list[bytes]):
        self.pieces = pieces

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
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        return self._utf8.decode(self._tokenizer.piece(int(token_id)))

    def finish(self) -> str:
        """U+FFFD if the text stopped inside a character, else nothing."""
        return self._utf8.decode(b"", final=True)


class BytesTokenizer(Tokenizer):
    """A token is a byte of the text's UTF-8: any text, 256 ids, nothing to learn."""

    def __init__(self) -> None:
        super().__init__([bytes([i]) for i in range(256)])

    def encode(self, text: str) -> Ids:
        return np.frombuffer(_utf8(text), np.uint8).astype(np.uint16)


class CharsTokenizer(Tokenizer):
    """A token is one of `characters`, a string of different characters in code point order."""

    def __init__(self, characters: str):
        if len(characters) > LARGEST_VOCAB:
            raise ConfigError(
                f"the text has {len(characters)} different characters, more than the "
                f"{LARGEST_VOCAB} that fit; use the tokenizer bytes or bpe"
            )
        super().__init__([_utf8(c) for c in characters])
        self._code_points = _code_points(characters)

    def encode(self, text: str) -> Ids:
        points = _code_points(text)
        ids = np.searchsorted(self._code_points, points)
        ids[ids == self.vocab_size] = 0  # beyond the last character: the next line finds it wrong
        strange = np.flatnonzero(self._code_points[ids] != points)
        if strange.size:
            where = int(strange[0])
            raise ConfigError(
                f"character {text[where]!r} (U+{ord(text[where]):04X}) at position {where} is not "
                f"among the corpus's {self.vocab_size} characters"
            )
        return ids.astype(np.uint16)


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding: frequent strings of bytes are tokens, any text encodes.

    `backend` is a tokenizers.Tokenizer. Sennrich et al., "Neural Machine Translation of Rare Words
    with Subword Units"; on bytes: Radford et al., "Language Models are Unsupervised Multitask
    Learners" (GPT-2).
    """

    FILE = "tokenizer.json"

    def __init__(self, backend: Any):
        byte_of = {char: byte for byte, char in enumerate(_gpt2_alphabet())}
        try:
            tokens = [backend.id_to_token(i) for i in range(backend.get_vocab_size())]
            pieces = [bytes(byte_of[c] for c in token) for token in tokens]
        except (KeyError, TypeError):
            raise ConfigError("it is not a byte-level BPE whose ids are 0, 1, 2, …") from None
        super().__init__(pieces)
        self._backend = backend

    @classmethod
    def train(cls, text: str, vocab_size: int) -> BPETokenizer:
        """At most vocab_size tokens, 256 of them the single bytes; a short text gives fewer."""
        library = _tokenizers_library()
        backend = library.Tokenizer(library.models.BPE())
        backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=sorted(_gpt2_alphabet()),
            show_progress=False,
        )
        _utf8(text)  # the library has no clear word for text that is not Unicode
        backend.train_from_iterator(_parts(text, PART), trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: Path) -> BPETokenizer:
        library = _tokenizers_library()
        try:
            return cls(library.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"cannot use {path}: {' '.join(str(error).split())}") from None

    def to_json(self) -> str:
        return str(self._backend.to_str(pretty=True))

    def encode(self, text: str) -> Ids:
        _utf8(text)
        ids = [
            np.array(self._backend.encode(part, add_special_tokens=False).ids, np.uint16)
            for part in _parts(text, PART)
        ]
        return np.concatenate([np.zeros(0, np.uint16), *ids])


def load_tokenizer(folder: Path, meta: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a corpus; reads of meta the keys tokenizer, vocab_size and characters.

    A markov corpus has no text; its tokens are shown as the letters a, b, c, …
    Raises ConfigError if meta (or, for bpe, tokenizer.json in the folder) describes no tokenizer.
    """
    kind, vocab_size = meta.get("tokenizer"), meta.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise ConfigError(f"{folder}/meta.json: vocab_size={vocab_size!r} must be an integer")
    tokenizer: Tokenizer
    if kind == "bytes":
        tokenizer = BytesTokenizer()
    elif kind == "chars":
        characters = meta.get("characters")
        if not isinstance(characters, str) or list(characters) != sorted(set(characters)):
            raise ConfigError(f"{folder}/meta.json: characters must be a sorted string")
        tokenizer = CharsTokenizer(characters)
    elif kind == "markov":
        tokenizer = CharsTokenizer(ascii_lowercase[:vocab_size])
    elif kind == "bpe":
        tokenizer = BPETokenizer.load(folder / BPETokenizer.FILE)
    else:
        raise ConfigError(
            f"{folder}/meta.json: tokenizer={kind!r} can be 'bytes', 'chars', 'bpe' or 'markov'"
        )
    if tokenizer.vocab_size != vocab_size:
        raise ConfigError(
            f"{folder}/meta.json: vocab_size={vocab_size!r}, but its {kind} tokenizer has "
            f"{tokenizer.vocab_size} tokens"
        )
    return tokenizer


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the text is not Unicode: U+{ord(text[error.start]):04X} at position {error.start} "
            "stands for no character"
        ) from None


def _code_points(text: str) -> np.ndarray[Any, np.dtype[np.uint32]]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _parts(text: str, length: int) -> Iterator[str]:
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


def _gpt2_alphabet() -> str:
    """The character that stands for byte i, at place i: vocabularies hold text, not bytes.

    Visible Latin-1 characters stand for themselves, the other bytes for U+0100, U+0101, …
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return "".join(chr(b) if b in visible else chr(next(others)) for b in range(256))


def _tokenizers_library() -> Any:
    try:
        import tokenizers  # lazily: only bpe needs it
    except ImportError:
        raise ConfigError("the bpe tokenizer needs a library: pip install tokenizers") from None
    return tokenizers
