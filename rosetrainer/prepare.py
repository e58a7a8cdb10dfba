"""Makes a corpus: python -m rosetrainer prepare [python-docs | shakespeare | file | markov] [flags]

  python-docs         the documentation that this Python carries, about 2 MB (the default)
  shakespeare [PATH]  tiny-shakespeare, out of a file or downloaded
  file PATH...        your own text files, UTF-8
  markov              a random chain whose true loss is known: the floor for any model

Each has flags of its own, see for example: python -m rosetrainer prepare file --help
The corpus goes to data/NAME unless --out names another folder.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional

# numpy and the sources are imported where they are needed: a second call finds all made, at once.
from rosetrainer.corpus_folder import must_make, summary, write
from rosetrainer.environment import prepare_command
from rosetrainer.fields import Bounds, ConfigError, check_fields
from rosetrainer.flags import parse_flags

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
    """The last part of the text that is kept for validation."""


@dataclass(frozen=True)
class PythonDocs:
    """The documentation that this Python carries: reference topics and docstrings."""

    target: Target = field(default_factory=Target)
    text: TextOptions = field(default_factory=TextOptions)


@dataclass(frozen=True)
class Shakespeare:
    """Tiny-shakespeare, 1.1 MB."""

    path: Positional[Path | None] = None
    """A file that holds it; downloaded unless given."""
    target: Target = field(default_factory=Target)
    text: TextOptions = field(default_factory=TextOptions)


@dataclass(frozen=True)
class Files:
    """Your own text files, UTF-8, one after the other."""

    paths: Positional[tuple[Path, ...]] = ()
    """The files."""
    target: Target = field(default_factory=Target)
    text: TextOptions = field(default_factory=TextOptions)


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
class Markov:
    """A random chain whose true loss is known."""

    target: Target = field(default_factory=Target)
    chain: ChainOptions = field(default_factory=ChainOptions)


SOURCES = {
    "python-docs": PythonDocs,
    "shakespeare": Shakespeare,
    "file": Files,
    "markov": Markov,
}


def main(argv: list[str]) -> None:
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    source, flags = "python-docs", argv
    if argv and not argv[0].startswith("-"):
        source, flags = argv[0], argv[1:]
    if source not in SOURCES:
        raise ConfigError(f"no corpus {source!r}; it can be {', '.join(SOURCES)}")
    config: Any = parse_flags(SOURCES[source], flags, f"python -m rosetrainer prepare {source}")
    check_fields(config.target)
    out = config.target.out or Path("data") / source
    started = time.perf_counter()
    options, text = _options(source, config)
    if not must_make(out, source, options, config.target.force):
        return
    from rosetrainer.corpus_files import block_hashes  # late, for it imports numpy

    if source == "markov":
        files, meta = _markov_corpus(options)
    else:
        files, meta = _text_corpus(source, text, options)
    meta = {"source": source, "options": options, "dtype": "uint16", **meta}
    meta["sha256"] = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    meta["blocks"] = {name: block_hashes(files[name]) for name in ("train.bin", "val.bin")}
    write(out, {**files, "meta.json": (json.dumps(meta, indent=1) + "\n").encode()})
    print(f"{out}: {summary(meta)}, made in {time.perf_counter() - started:.1f} s")


def _options(source: str, config: Any) -> tuple[dict[str, Any], str | None]:
    """What decides the corpus's content, and its text if we have read it already."""
    if source == "markov":
        check_fields(config.chain)
        size = config.chain.alphabet ** (config.chain.order + 1)
        if size > 2**16:
            raise ConfigError(
                f"alphabet={config.chain.alphabet} and order={config.chain.order} make a table of "
                f"{size} probabilities; alphabet^(order + 1) can be at most {2**16}"
            )
        return asdict(config.chain), None
    check_fields(config.text)
    options = asdict(config.text)
    if config.text.tokenizer == "bpe":
        options["vocab_size"] = config.text.vocab_size or BPE_VOCAB
    elif config.text.vocab_size is not None:
        raise ConfigError(
            f"vocab_size={config.text.vocab_size} is for --tokenizer bpe; leave it out, the "
            f"vocabulary of {config.text.tokenizer} follows from the text"
        )
    if source == "python-docs":
        return options, None
    from rosetrainer import shakespeare, text_files

    if source == "file" and not config.paths:
        raise ConfigError(f"file needs a path: {prepare_command()} file PATH...")
    if source == "shakespeare" and config.path is None:
        return {**options, "text_sha256": shakespeare.SHA256}, None
    text = text_files.read(config.paths if source == "file" else (config.path,))
    return {**options, "text_sha256": hashlib.sha256(text.encode()).hexdigest()}, text


def _text_corpus(
    source: str, text: str | None, options: dict[str, Any]
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Files and meta.json's keys of a corpus of text."""
    from rosetrainer import python_docs, shakespeare
    from rosetrainer.tokenizer import BPETokenizer, BytesTokenizer, CharsTokenizer, Tokenizer

    if text is None:
        text = python_docs.python_docs() if source == "python-docs" else shakespeare.download()
    cut = int(len(text) * (1 - options["val_fraction"]))
    halves = (text[:cut], text[cut:])
    files: dict[str, bytes] = {}
    meta: dict[str, Any] = {}
    tokenizer: Tokenizer = BytesTokenizer()
    if options["tokenizer"] == "chars":
        meta["characters"] = "".join(sorted(set(text)))
        tokenizer = CharsTokenizer(meta["characters"])
    elif options["tokenizer"] == "bpe":
        # The merges are learnt, so they must not see the validation text.
        tokenizer = bpe = BPETokenizer.train(halves[0], options["vocab_size"])
        files[BPETokenizer.FILE] = bpe.to_json().encode()
    if source == "python-docs":
        meta["python"] = _python()
    train, val = (tokenizer.encode(half) for half in halves)
    for name, ids in (("train", train), ("val", val)):
        if len(ids) < 2:
            raise ConfigError(
                f"val_fraction={options['val_fraction']} of a text of {len(text)} characters "
                f"leaves {len(ids)} tokens for {name}.bin; it needs 2 at least"
            )
        files[f"{name}.bin"] = ids.astype("<u2").tobytes()
    return files, {
        "tokenizer": options["tokenizer"],
        "vocab_size": tokenizer.vocab_size,
        "train_tokens": len(train),
        "val_tokens": len(val),
        "bytes_per_token": len(halves[1].encode()) / len(val),
        **meta,
    }


def _markov_corpus(options: dict[str, Any]) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Files and meta.json's keys of a corpus drawn from a random chain."""
    from rosetrainer import markov

    lengths = (options["train_tokens"], options["val_tokens"])
    chain, (train, val) = markov.draw(
        options["order"], options["alphabet"], options["seed"], lengths
    )
    files = {"train.bin": train.astype("<u2").tobytes(), "val.bin": val.astype("<u2").tobytes()}
    return files, {
        "tokenizer": "markov",
        "vocab_size": options["alphabet"],
        "train_tokens": len(train),
        "val_tokens": len(val),
        "chain": {"order": chain.order, "probabilities": chain.probabilities.tolist()},
        "floor_nats": float(chain.label_losses(val.astype("int64")).mean()),
    }


def _python() -> str:
    return f"{sys.implementation.name} {sys.version.split()[0]}"
