"""Flags out of a dataclass: one for each field, and for those of the dataclasses in it."""

from __future__ import annotations

from argparse import SUPPRESS, BooleanOptionalAction
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from rosetrainer.validation import HIDDEN, POSITIONAL, type_hints


@dataclass(frozen=True)
class Flag:
    """A field of a component, as a flag, or as a word by its place."""

    component: type
    field: Field[Any]
    kinds: tuple[type, ...]
    """Of its value: (int, NoneType) of `int | None`, say."""
    default: Any
    """MISSING where it has to be given."""
    positional: bool

    @property
    def word(self) -> str:
        """--d-model of d_model; the name itself of what is positional."""
        name = self.field.name
        return name if self.positional else f"--{name.replace('_', '-')}"

    @property
    def forms(self) -> list[str]:
        """What a user can write for it."""
        if self.positional:
            return []
        return [self.word, f"--no-{self.word[2:]}"] if bool in self.kinds else [self.word]

    @property
    def place(self) -> str:
        """In the usage, of what is positional."""
        name = self.field.name.upper() + "..." * self.takes_many
        return name if self.default is MISSING else f"[{name}]"

    @property
    def takes_many(self) -> bool:
        return any(get_origin(kind) is tuple for kind in self.kinds)

    @property
    def options(self) -> dict[str, Any]:
        """For argparse's add_argument. What is left out is not in the namespace."""
        if bool in self.kinds:
            return {"action": BooleanOptionalAction, "default": SUPPRESS}
        shared = {"type": self.value, "metavar": "|".join(map(_shown, self.kinds))}
        if not self.positional:
            return shared | {"required": self.default is MISSING, "default": SUPPRESS}
        count = "*" if self.takes_many else "?"
        shared["metavar"] = self.field.name.upper()
        return shared | (
            {} if self.default is MISSING else {"nargs": count, "default": self.default}
        )

    def value(self, text: str) -> Any:
        """The text, as a number or a path if it is one; check_fields tells what else is wrong."""
        if text == "None" and type(None) in self.kinds:
            return None
        for kind in (int, float, Path):
            if kind in self.kinds or tuple[kind, ...] in self.kinds:  # type: ignore[valid-type]
                try:
                    return kind(text)
                except ValueError:
                    return text
        return text


def flags_of(cls: type, instance: Any = None) -> Iterator[Flag]:
    """Of the fields of a dataclass, and of the dataclasses in it; instance: its defaults."""
    for field, kinds, marks in settings_of(cls):
        default = default_of(field, instance)
        if is_dataclass(kinds[0]):
            yield from flags_of(kinds[0], None if default is MISSING else default)
        elif HIDDEN not in marks:
            yield Flag(cls, field, kinds, default, POSITIONAL in marks)


def settings_of(cls: type) -> Iterator[tuple[Field[Any], tuple[type, ...], list[Any]]]:
    """Each field, the types that its value can have, and what else its Annotated says."""
    hints = type_hints(cls)
    for field in fields(cls):
        marks: list[Any] = []
        yield field, tuple(_kinds(hints[field.name], marks)), marks


def _kinds(hint: Any, marks: list[Any]) -> Iterator[Any]:
    if get_origin(hint) is Annotated:
        marks += get_args(hint)[1:]
        hint = get_args(hint)[0]
        yield from _kinds(hint, marks)
    elif get_origin(hint) in (Union, UnionType):
        for one in get_args(hint):
            yield from _kinds(one, marks)
    else:
        yield hint


def default_of(field: Field[Any], instance: Any) -> Any:
    if instance is not None:
        return getattr(instance, field.name)
    return field.default if field.default_factory is MISSING else field.default_factory()


def _shown(kind: Any) -> str:
    """INT, PATH, {auto,cpu,cuda}, None"""
    if get_origin(kind) is Literal:
        return f"{{{','.join(get_args(kind))}}}"
    named = {type(None): "None", str: "TEXT"}
    return named.get(kind) or str(kind.__name__).upper()
