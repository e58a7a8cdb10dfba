"""The texts of a corpus: one that is cut in two, or documents of which each goes to one side."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from rosetrainer.data.document_files import texts_of
from rosetrainer.data.text_files import TextFile, recognise
from rosetrainer.validation import ConfigError

Side = Literal["train", "val"]


class Texts(ABC):
    """What a corpus is made of."""

    sha256: str
    """Decides the content, the order included."""
    size: str
    """How much it is, in words."""
    counts: dict[str, int] | None = None
    """Documents of each side; None for one text."""

    @abstractmethod
    def characters(self) -> set[str]: ...

    @abstractmethod
    def sides(self) -> Iterator[tuple[Side, str]]:
        """Each text, in the order in which they were given, with the side it is for."""


class OneText(Texts):
    """A text whose last part is kept for validation."""

    def __init__(self, text: str, val_fraction: float):
        self._text, self._cut = text, int(len(text) * (1 - val_fraction))
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.size = f"a text of {len(text)} characters"

    def characters(self) -> set[str]:
        return set(self._text)

    def sides(self) -> Iterator[tuple[Side, str]]:
        yield "train", self._text[: self._cut]
        yield "val", self._text[self._cut :]


class Documents(Texts):
    """The documents of files, which are read again whenever they are gone through."""

    def __init__(self, files: tuple[TextFile, ...], key: str, val_fraction: float):
        """Raises ConfigError for what cannot be read, and if a side would have no document."""
        self._files, self._key = files, key
        sizes: dict[bytes, int] = {}
        repeats: dict[bytes, int] = {}  # beyond the first of equal documents
        order = hashlib.sha256()
        self.blank = 0
        for text in self.texts():
            digest = _digest(text)
            order.update(digest)
            if digest in sizes:
                repeats[digest] = repeats.get(digest, 0) + 1
            sizes[digest] = sizes.get(digest, 0) + len(text.encode())
        self.sha256, self.number = order.hexdigest(), len(sizes) + sum(repeats.values())
        self.size = f"{self.number} documents"
        self._val: set[bytes] = set()
        if self.number > 1:
            self._val = choose_validation(sizes, val_fraction)
        val = len(self._val) + sum(repeats.get(digest, 0) for digest in self._val)
        self.counts = {"train": self.number - val, "val": val}

    def characters(self) -> set[str]:
        return {character for text in self.texts() for character in set(text)}

    def texts(self) -> Iterator[str]:
        """All documents that have a text, and counts the others."""
        self.blank = 0
        for file in self._files:
            for text in texts_of(file, self._key):
                if text.strip():
                    yield text
                else:
                    self.blank += 1

    def sides(self) -> Iterator[tuple[Side, str]]:
        order = hashlib.sha256()
        for text in self.texts():
            digest = _digest(text)
            order.update(digest)
            yield "val" if digest in self._val else "train", text
        if order.hexdigest() != self.sha256:
            raise ConfigError("the files were changed while they were read; try again")


def choose_validation(sizes: dict[bytes, int], val_fraction: float) -> set[bytes]:
    """Which documents are for validation, out of each one's hash and bytes.

    In the order of their hashes, each is taken that brings the share of the bytes nearer to
    val_fraction; so neither the order of the files nor a document's place decides, and equal
    documents stay together. Both sides get one at least. Raises ConfigError if one cannot.
    """
    if not 0 < val_fraction < 1:
        side = "validation" if val_fraction == 0 else "training"
        raise ConfigError(
            f"val_fraction={val_fraction} leaves no document for {side}; it must be above 0 and "
            "below 1"
        )
    if len(sizes) < 2:
        raise ConfigError(
            "all documents are the same, so none is left for validation that is not trained on; "
            "pass different ones"
        )
    wanted, taken, chosen = val_fraction * sum(sizes.values()), 0, set[bytes]()
    for digest in sorted(sizes):
        if abs(taken + sizes[digest] - wanted) < abs(taken - wanted):
            taken += sizes[digest]
            chosen.add(digest)
    smallest = min(sizes, key=lambda digest: (sizes[digest], digest))
    if len(chosen) == len(sizes):
        chosen.remove(smallest)
    return chosen or {smallest}


def read_texts(
    paths: tuple[Path, ...], key: str, val_fraction: float, as_text: bool = False
) -> Texts:
    """One text file as one text; several files, JSON lines and parquet as documents.

    key: of the text in JSON lines and parquet. as_text: see `recognise`. What a user may not expect
    is said on the screen. Raises ConfigError.
    """
    files = tuple(recognise(path, as_text) for path in paths)
    if len(files) == 1 and files[0].form == "text":
        return read_one(paths[0], val_fraction, as_text)
    documents = Documents(files, key, val_fraction)
    where = ", ".join(map(str, paths[:3])) + (", …" if len(paths) > 3 else "")
    if not documents.number:
        raise ConfigError(f"{where}: no document has a text; pass files with text")
    if documents.blank:
        print(f"left out, as they have no text: {documents.blank} of the documents")
    if documents.number == 1:
        print(f"{where}: one document, so it is cut at its end as a single text is")
        return OneText(next(documents.texts()), val_fraction)
    return documents


def read_one(path: Path, val_fraction: float, as_text: bool = False) -> OneText:
    """A file as one text. Raises ConfigError."""
    text = recognise(path, as_text).read()
    if not text.strip():
        what = "holds only white space" if text else "is empty"
        raise ConfigError(f"{path} {what}; pass a file with text")
    return OneText(text, val_fraction)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
