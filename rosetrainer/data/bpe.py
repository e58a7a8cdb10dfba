"""Byte-level byte-pair encoding, WordPiece and Unigram, by the library `tokenizers`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rosetrainer.data.tokenizer import Ids, Tokenizer, utf8
from rosetrainer.validation import ConfigError

PART = 1 << 20  # characters that are encoded at a time, which bounds the memory


class BPETokenizer(Tokenizer):
    """Frequent strings of bytes are tokens, and any text encodes.

    `backend` is a tokenizers.Tokenizer. Sennrich et al., "Neural Machine Translation of Rare Words
    with Subword Units"; on bytes: Radford et al., "Language Models are Unsupervised Multitask
    Learners" (GPT-2). Where `backend` has the special token END, that ends a document. It may be
    BERT's WordPiece too, which reads words and forgets how they were spelled and set apart, or
    T5's Unigram, which forgets how they were set apart: Kudo, "Subword Regularization: Improving
    Neural Network Translation Models with Multiple Subword Candidates".
    """

    kind, FILE, END = "bpe", "tokenizer.json", "<|endoftext|>"

    def __init__(self, backend: Any):
        added = backend.get_added_tokens_decoder()
        kinds = {kind.__name__: kind for kind in (WordPiece, Unigram)}
        piece_of = kinds.get(type(backend.model).__name__, ByteLevel)(backend.model)
        try:
            tokens = [backend.id_to_token(i) for i in range(backend.get_vocab_size())]
            pieces = [
                added[i].content.encode() if i in added else piece_of(token)
                for i, token in enumerate(tokens)
            ]
        except (AttributeError, KeyError, TypeError):
            raise ConfigError(
                "it is no byte-level BPE, WordPiece or Unigram whose ids are 0, 1, 2, …"
            ) from None
        super().__init__(pieces)
        backend.no_truncation()  # which is for batches of sentences, as padding is
        backend.no_padding()
        special = {token.content: i for i, token in added.items() if token.special}
        self.end_of_text = special.get(self.END)
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
        import tokenizers as library  # late: only bpe needs it

        backend = library.Tokenizer(library.models.BPE())
        backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size - end_of_text,
            initial_alphabet=sorted(_gpt2_alphabet()),
            show_progress=False,
        )
        texts = [texts] if isinstance(texts, str) else texts
        backend.train_from_iterator((part for text in texts for part in parts(text)), trainer)
        if end_of_text:
            backend.add_special_tokens([cls.END])
        return cls(backend)

    @classmethod
    def load(cls, path: Path) -> BPETokenizer:
        import tokenizers as library

        try:
            return cls(library.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"cannot use {path}: {' '.join(str(error).split())}") from None

    def save(self, folder: Path) -> None:
        (folder / self.FILE).write_bytes(self.to_json().encode())

    def to_json(self) -> str:
        return str(self._backend.to_str(pretty=True))

    def encode(self, text: str) -> Ids:
        utf8(text)
        return self.as_ids(self._backend.encode(text, add_special_tokens=False).ids)


class ByteLevel:
    """The bytes that a token of GPT-2's alphabet stands for."""

    def __init__(self, model: Any) -> None:
        self.byte_of = {char: byte for byte, char in enumerate(_gpt2_alphabet())}

    def __call__(self, token: str) -> bytes:
        return bytes(self.byte_of[char] for char in token)


class WordPiece:
    """A token that goes on with a word says so by its first characters; others have a space."""

    def __init__(self, model: Any) -> None:
        self.prefix: str = model.continuing_subword_prefix

    def __call__(self, token: str) -> bytes:
        goes_on = token.startswith(self.prefix) and token != self.prefix
        return (token.removeprefix(self.prefix) if goes_on else f" {token}").encode()


class Unigram:
    """A space is a character of a token; where a vocabulary has all bytes, a token is one byte."""

    SPACE, BYTE = "\u2581", re.compile("<0x([0-9A-F]{2})>")

    def __init__(self, model: Any) -> None:
        self.has_bytes = all(
            model.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256)
        )

    def __call__(self, token: str) -> bytes:
        byte = self.BYTE.fullmatch(token) if self.has_bytes else None
        return bytes.fromhex(byte[1]) if byte else token.replace(self.SPACE, " ").encode()


def find_tokenizer(name: str) -> Path | None:
    """A tokenizer.json, of which `name` is the path or the folder; None if there is none."""
    path = Path(name)
    path = path / BPETokenizer.FILE if path.is_dir() else path
    return path if name and path.is_file() else None


def parts(text: str, length: int = PART) -> Iterator[str]:
    """Consecutive parts of text, of `length` characters or a little more.

    A cut lies between the end of a word and a line feed. No token of the GPT-2 pattern spans that
    place, and to a Unigram a line feed is a space. So the parts' tokens, put together, are the
    tokens of the whole text.
    """
    word_end, start = re.compile(r"(?<=[A-Za-z0-9.])(?=\n)"), 0
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
