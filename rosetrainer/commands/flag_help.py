"""What `--help` shows: each flag with what its value is, its field's docstring and its default."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import MISSING
from itertools import groupby
from typing import Any, Literal, get_args, get_origin

from rosetrainer.commands.flag_fields import Flag

COLUMN = 26
"""Where the texts begin."""


def print_help(cls: type, flags: list[Flag], prog: str) -> None:
    """flags: those of cls."""
    places = [f"{f.word}..." if f.takes_many else f.word for f in flags if f.positional]
    needed = [f.default is MISSING for f in flags if f.positional]
    words = [w if must else f"[{w}]" for w, must in zip(places, needed, strict=True)]
    print(" ".join(["usage:", prog, *words, "[flags]"]))
    print(f"\n{inspect.getdoc(cls)}\n\nflags:")
    print(_row("-h, --help", "Show this, and end."))
    own_first = sorted(flags, key=lambda flag: flag.component is not cls)
    for component, own in groupby(own_first, lambda flag: flag.component):
        if component is not cls:
            print(f"\n{inspect.getdoc(component)}")
        docs = field_docs(component)
        for flag in own:
            default = "" if flag.default in (MISSING, ()) else f" (default: {flag.default})"
            print(_row(_left(flag), docs.get(flag.field.name, "") + default))


def print_commands(commands: Mapping[str, type], prog: str) -> None:
    print(f"usage: {prog} {{{','.join(commands)}}} ...\n")
    for name, cls in commands.items():
        print(_row(name, inspect.getdoc(cls) or ""))


def _left(flag: Flag) -> str:
    if flag.positional:
        return flag.word
    if flag.is_switch:
        return f"{flag.word}, --no-{flag.word[2:]}"
    return f"{flag.word} {'|'.join(_words_of(flag.kinds))}"


def _words_of(kinds: Iterable[Any]) -> list[str]:
    """INT, PATH, {auto,cpu,cuda}, None"""
    choices = {kind: f"{{{','.join(get_args(kind))}}}" for kind in kinds if _is_literal(kind)}
    named = {type(None): "None", str: "TEXT"}
    return [choices.get(kind) or named.get(kind) or kind.__name__.upper() for kind in kinds]


def _is_literal(kind: Any) -> bool:
    return get_origin(kind) is Literal


def _row(left: str, text: str) -> str:
    """A line, or some; a text's own lines stay where they end with a sentence."""
    width = min(shutil.get_terminal_size().columns, 100)
    gap, lines = " " * COLUMN, []
    for sentence in re.split(r"(?<=\.)\n", text):
        lines += textwrap.wrap(" ".join(sentence.split()), max(width - COLUMN, 20))
    left = f"  {left}"
    if len(left) < COLUMN and lines:
        left = left.ljust(COLUMN) + lines.pop(0)
    return "\n".join([left, *(gap + line for line in lines)])


def field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass, and of those from which it inherits."""
    docs: dict[str, str] = {}
    for one in reversed(cls.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            told = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if told and isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                docs[field.target.id] = str(ast.literal_eval(text.value))  # type: ignore
    return docs
