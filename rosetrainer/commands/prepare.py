"""Makes a corpus: python -m rosetrainer prepare [SOURCE] [flags]

  python-docs         the documentation that this Python carries, about 2 MB (the default)
  shakespeare [PATH]  tiny-shakespeare, out of a file or downloaded
  file PATH...        your own texts: a file of text, or several files, JSON lines or parquet,
                      packed by gzip, bzip2 or xz or not
  markov              a random chain whose true loss is known: the floor for any model
  import PATH...      token ids of nanoGPT's or llm.c's: a folder, or a file of each side

Each has flags of its own, see for example: python -m rosetrainer prepare file --help
The corpus goes to data/NAME unless --out names another folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rosetrainer.commands.flags import parse_flags
from rosetrainer.data import python_docs, shakespeare
from rosetrainer.data.corpus_folder import must_make, new_folder, summary
from rosetrainer.data.documents import Texts, one_text, read_one, read_texts
from rosetrainer.environment import prepare_command, trainer_command
from rosetrainer.validation import POSITIONAL, Bounds, ConfigError

if TYPE_CHECKING:
    from rosetrainer.data.bpe import BPETokenizer

# What needs numpy is imported late: a second call, which finds all made, answers at once.
Writer = Callable[[Path], dict[str, Any]]
"""Writes all of a corpus but meta.json into a folder, and gives the keys of that."""

BPE_VOCAB = 4096


@dataclass(frozen=True)
class Target:
    """Where the corpus goes."""

    out: Path | None = None
    """Folder for the corpus; data/NAME unless given."""
    force: bool = False
    """Replace a corpus made with other options."""


@dataclass(frozen=True)
class TextOptions:
    """How a text becomes tokens."""

    tokenizer: Literal["bytes", "chars", "bpe"] = "bytes"
    """A token is a byte, a character, or a frequent string of bytes."""
    vocab_size: Annotated[int, Bounds(257, 65535)] | None = None
    """Tokens of bpe; 4096 unless given."""
    val_fraction: Annotated[float, Bounds(0, 1)] = 0.1
    """The part that is kept for validation: the end of one text, some of many documents."""


@dataclass(frozen=True)
class PythonDocs(TextOptions, Target):
    """The documentation that this Python carries: reference topics and docstrings."""


@dataclass(frozen=True)
class Shakespeare(TextOptions, Target):
    """Tiny-shakespeare, 1.1 MB."""

    path: Annotated[Path | None, POSITIONAL] = None
    """A file that holds it; downloaded unless given."""


@dataclass(frozen=True)
class Files(TextOptions, Target):
    """Your own texts: one file is one text; several, JSON lines and parquet are documents."""

    tokenizer: str = "bytes"  # type: ignore[assignment]
    """bytes, chars or bpe: a token is a byte, a character, or a frequent string of bytes; or those
    of a tokenizer.json, by its path or its folder's."""
    paths: Annotated[tuple[Path, ...], POSITIONAL] = ()
    text_key: str = "text"
    """The key of JSON lines, or the column of parquet, that holds a document's text."""
    as_text: bool = False
    """Take JSON, HTML and RTF as the text that they are, markup and all."""


@dataclass(frozen=True)
class ChainOptions:
    """A random chain of order k: the last k tokens decide the next one's distribution."""

    order: Annotated[int, Bounds(1, 15)] = 2
    """k."""
    alphabet: Annotated[int, Bounds(2, 26)] = 8
    """Different tokens, shown as letters."""
    train_tokens: Annotated[int, Bounds(2, 2**26)] = 400_000
    """Tokens of train.bin."""
    val_tokens: Annotated[int, Bounds(2, 2**26)] = 60_000
    """Tokens of val.bin."""
    seed: Annotated[int, Bounds(0, 2**40)] = 1337
    """Decides the chain and the tokens."""


@dataclass(frozen=True)
class Markov(ChainOptions, Target):
    """A random chain whose true loss is known."""


@dataclass(frozen=True)
class Import(Target):
    """Token ids that nanoGPT or llm.c wrote; they are copied, and stay as they are."""

    paths: Annotated[tuple[Path, ...], POSITIONAL] = ()
    """A folder with files for training and for validation, or two files, in this order."""
    tokenizer: str = ""
    """The path of the tokenizer.json that the ids are of; bytes; or ids, of which nothing is known:
    then prompts and what `generate` writes are numbers."""
    vocab_size: Annotated[int, Bounds(1, 2**24)] | None = None
    """How many ids there are; for ids."""


SOURCES = {
    "python-docs": PythonDocs,
    "shakespeare": Shakespeare,
    "file": Files,
    "markov": Markov,
    "import": Import,
}


def main(argv: list[str]) -> None:
    if argv[:1] in (["-h"], ["--help"]):
        print((__doc__ or "").replace("python -m rosetrainer", trainer_command()))
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may be no text
    source, flags = "python-docs", argv
    if argv and not argv[0].startswith("-"):
        source, flags = argv[0], argv[1:]
    if source not in SOURCES:
        raise ConfigError(f"no corpus {source!r}; it can be {', '.join(SOURCES)}")
    config: Any = parse_flags(SOURCES[source], flags, f"python -m rosetrainer prepare {source}")
    out = config.out or Path("data") / source
    started = time.perf_counter()
    options, write = _open(source, config)
    if not must_make(out, source, options, config.force):
        return
    with new_folder(out) as folder:
        meta = {"source": source, "options": options, **write(folder)}
        (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    print(f"{out}: {summary(meta)}, made in {time.perf_counter() - started:.1f} s")


def _open(source: str, config: Any) -> tuple[dict[str, Any], Writer]:
    """What decides the corpus's content, and what writes it."""
    if source == "import":
        from rosetrainer.data.token_import import open_source

        ids = open_source(config.paths, config.tokenizer, config.vocab_size)
        return ids.options, ids.write
    if source != "markov":
        return _open_texts(source, config)
    size = config.alphabet ** (config.order + 1)
    if size > 2**16:
        raise ConfigError(
            f"alphabet={config.alphabet} and order={config.order} make a table of {size} "
            f"probabilities; alphabet^(order + 1) can be at most {2**16}"
        )
    options = _options(config, ChainOptions)

    def write(folder: Path) -> dict[str, Any]:
        from rosetrainer.data.markov import write_corpus

        return write_corpus(folder, options)

    return options, write


def _options(config: Any, part: type[Any]) -> dict[str, Any]:
    """The fields that config has of a dataclass from which it inherits."""
    return {f.name: getattr(config, f.name) for f in fields(part)}


def _open_texts(source: str, config: Any) -> tuple[dict[str, Any], Writer]:
    """As _open; texts of the user's are read once, the others when they are written."""
    options, fraction = _options(config, TextOptions), config.val_fraction
    given = None
    if config.tokenizer not in ("bytes", "chars", "bpe"):
        given = _tokenizer_of(config.tokenizer, config.vocab_size)
        del options["tokenizer"]
        options["vocab_size"] = given.vocab_size
        options["tokenizer_sha256"] = hashlib.sha256(given.to_json().encode()).hexdigest()
    elif config.tokenizer == "bpe":
        options["vocab_size"] = config.vocab_size or BPE_VOCAB
    elif config.vocab_size is not None:
        raise ConfigError(
            f"vocab_size={config.vocab_size} is for --tokenizer bpe; leave it out, the vocabulary "
            f"of {config.tokenizer} follows from the text"
        )
    if source == "python-docs":
        python = {"python": f"{sys.implementation.name} {sys.version.split()[0]}"}
        docs = python_docs.python_docs
        return options, lambda to: _write(to, one_text(docs(), fraction), options) | python
    if source == "shakespeare" and config.path is None:
        options["text_sha256"] = shakespeare.SHA256
        download = shakespeare.download
        return options, lambda to: _write(to, one_text(download(), fraction), options)
    if source == "shakespeare":
        texts = read_one(config.path, fraction)
    else:
        assert source == "file", f"_open_texts does not say where the text of {source} comes from"
        if not config.paths:
            raise ConfigError(f"file needs a path: {prepare_command()} file PATH...")
        texts = read_texts(config.paths, config.text_key, fraction, config.as_text)
    options["text_sha256"] = texts.sha256
    return options, lambda to: _write(to, texts, options, given)


def _tokenizer_of(name: str, vocab_size: int | None) -> BPETokenizer:
    """Raises ConfigError if there is none, or a size is given besides."""
    from rosetrainer.data.bpe import BPETokenizer, find_tokenizer

    if (path := find_tokenizer(name)) is None:
        raise ConfigError(
            f"tokenizer={name!r} can be bytes, chars, bpe, or the path of a tokenizer.json or of "
            f"its folder"
        )
    if vocab_size is not None:
        raise ConfigError(
            f"vocab_size={vocab_size} is for --tokenizer bpe; leave it out, {path} has its own"
        )
    return BPETokenizer.load(path)


def _write(
    folder: Path, texts: Texts, options: dict[str, Any], given: BPETokenizer | None = None
) -> dict[str, Any]:
    from rosetrainer.data.corpus_writer import write_texts

    return write_texts(folder, texts, options, given)
