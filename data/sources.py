"""Where the text of a corpus comes from."""

from __future__ import annotations

import ast
import hashlib
import http.client
import importlib
import os
import sysconfig
import urllib.error
import urllib.request
import warnings
from bisect import bisect
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np

from rosetrainer.data import MarkovChain
from rosetrainer.environment import python_command
from rosetrainer.fields import ConfigError
from rosetrainer.tokenizer import Ids

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PREPARE = f"{python_command()} data/prepare.py"
SHAKESPEARE_HINT = f"pass a file that you have: `{PREPARE} shakespeare PATH`"
TIMEOUT = 10  # seconds

SMALLEST_DOCS = 200_000  # bytes; less is a Python without its library's sources
# Not prose, or not the standard library, or not in every Python.
SKIPPED_FOLDERS = {
    *("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings"),
    *("ensurepip", "turtledemo", "pydoc_data", "lib-dynload", "__pycache__"),
}
SHORTEST_DOCSTRING = 4  # words


def python_docs() -> str:
    """The language reference's topics and the library's docstrings, out of the running Python.

    Raises ConfigError if this Python carries too little of them.
    """
    documents = {**_topics(), **_module_docs(Path(sysconfig.get_path("stdlib")))}
    # By name, the last tenth would be tkinter to zipfile and nothing else; by the name's hash, it
    # is a fair sample, and the order is still the same everywhere.
    names = sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest())
    text = "\n\n\n".join(documents[name] for name in names) + "\n"
    if len(text) < SMALLEST_DOCS:
        raise ConfigError(
            f"this Python carries {len(text)} bytes of documentation, fewer than {SMALLEST_DOCS}; "
            f"use a Python with its standard library's sources, or `{PREPARE} file PATH` with a "
            "text of your own"
        )
    return text


def _topics() -> dict[str, str]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions leave it out
        return {}
    return {f"topic {name}": _clean(text) for name, text in sorted(topics.items())}


def _module_docs(library: Path) -> dict[str, str]:
    """Each module's docstrings, one after the other; a docstring seen before is left out."""
    documents: dict[str, str] = {}
    seen: set[str] = set()
    for path in _sources(library):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old modules have invalid escapes
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        docstrings = []
        for docstring in map(_clean, _docstrings(tree)):
            prose = docstring.isascii() and docstring.replace("\n", "").isprintable()
            if prose and docstring not in seen and len(docstring.split()) >= SHORTEST_DOCSTRING:
                seen.add(docstring)
                docstrings.append(docstring)
        if docstrings:
            documents[path.relative_to(library).as_posix()] = "\n\n".join(docstrings)
    return documents


def _sources(library: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(library):
        folders[:] = sorted(f for f in folders if f not in SKIPPED_FOLDERS)
        yield from (Path(folder, f) for f in sorted(files) if f.endswith(".py"))


def _docstrings(node: ast.AST) -> Iterator[str]:
    """In the order of the source; definitions inside functions are left out."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield ast.get_docstring(node) or ""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.If, ast.Try)):
        for child in ast.iter_child_nodes(node):
            yield from _docstrings(child)


def _clean(text: str) -> str:
    lines = (line.expandtabs().rstrip() for line in text.strip().splitlines())
    return "\n".join(lines)


def shakespeare(path: Path | None) -> str:
    """Tiny-shakespeare (Karpathy's char-rnn), out of a file or from GitHub."""
    if path is not None:
        return files((path,))
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=TIMEOUT) as reply:
            data: bytes = reply.read(2_000_000)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(
            f"cannot download {SHAKESPEARE_URL} ({reason}); {SHAKESPEARE_HINT}"
        ) from None
    if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
        raise ConfigError(
            f"{SHAKESPEARE_URL} gave {len(data)} bytes that are not tiny-shakespeare; "
            f"{SHAKESPEARE_HINT}"
        )
    return data.decode()


def files(paths: tuple[Path, ...]) -> str:
    """The texts of UTF-8 files, one after the other as they are. Raises ConfigError."""
    return "".join(_text(path) for path in paths)


def _text(path: Path) -> str:
    try:
        if path.is_dir():
            raise ConfigError(f"{path} is a directory; pass text files, for example {path}/*.txt")
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; pass a text file") from None
    if not data:
        raise ConfigError(f"{path} is empty; pass a file with text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}; convert "
            f"it, for example `iconv -f LATIN1 -t UTF-8 {path} > converted.txt`"
        ) from None


def markov(
    order: int, alphabet: int, seed: int, lengths: tuple[int, ...]
) -> tuple[MarkovChain, list[Ids]]:
    """A random chain, and for each length tokens drawn from it.

    Dirichlet(1/2) rows: 8 letters are left with 1.47 of their ln 8 = 2.08 nats on average.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    table = generator.dirichlet(np.full(alphabet, 0.5), size=alphabet**order)
    table = np.maximum(table, 1e-6)  # no token is impossible, so no loss is infinite
    chain = MarkovChain(order, table / table.sum(axis=1, keepdims=True))
    cumulative = [list(accumulate(row))[:-1] for row in chain.probabilities.tolist()]
    return chain, [_draw(generator, order, alphabet, cumulative, length) for length in lengths]


def _draw(
    generator: np.random.Generator,
    order: int,
    alphabet: int,
    cumulative: list[list[float]],
    length: int,
) -> Ids:
    tokens = generator.integers(alphabet, size=min(order, length)).tolist()
    context = 0
    for token in tokens:
        context = context * alphabet + token
    for uniform in generator.random(length - len(tokens)).tolist():
        token = bisect(cumulative[context], uniform)
        tokens.append(token)
        context = (context * alphabet + token) % len(cumulative)
    return np.array(tokens, np.uint16)
