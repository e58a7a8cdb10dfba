"""The text of the default corpus: the documentation that the running Python carries."""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from rosetrainer.environment import prepare_command
from rosetrainer.validation import ConfigError

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
            "use a Python with its standard library's sources, or a text of your own: "
            f"`{prepare_command()} file PATH`"
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
