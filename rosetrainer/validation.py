"""What a config's field may hold: bounds on its type, checked with one line for the user."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
HIDDEN, POSITIONAL = "no flag", "a word without a flag"
"""In the Annotated of a field of a command's dataclass: how it is given."""

HUGE = 2**40  # no count of ours is larger, and sums of some still fit 64 bits


class ConfigError(ValueError):
    """A mistake of the user's. The text is one line: the values, and what would work."""


@contextmanager
def one_line(problem: str, advice: str) -> Iterator[None]:
    """An OSError inside becomes a ConfigError: "{problem}: No such file or directory; {advice}"."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{problem}: {error.strerror}; {advice}") from None


@dataclass(frozen=True)
class Bounds:
    """The values that a number may take: low <= value <= high, or value < high if `open`."""

    low: float
    high: float = math.inf
    open: bool = False

    def holds(self, value: float) -> bool:
        return self.low <= value and (value < self.high if self.open else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{plain(self.low)} or more"
        return f"from {plain(self.low)} to {'below ' * self.open}{plain(self.high)}"


def plain(number: float) -> str:
    """With all digits of an integer: 1099511627776, 0.5, 1e-30."""
    return f"{int(number)}" if number == int(number) else f"{number:g}"


def shown(value: Any) -> str:
    """As Python would write it, but no longer than a line can be."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**60:
        return f"an integer of {math.floor(math.log10(abs(value))) + 1} digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


Count = Annotated[int, Bounds(1, HUGE)]
CountOrZero = Annotated[int, Bounds(0, HUGE)]
LocalRanks = Annotated[int, Bounds(1, 1024)]  # processes that one machine is asked to start
Fraction = Annotated[float, Bounds(0, 1)]
BelowOne = Annotated[float, Bounds(0, 1, open=True)]
Positive = Annotated[float, Bounds(1e-30, 1e9)]
PositiveOrZero = Annotated[float, Bounds(0, 1e9)]


def config_from_dict(cls: type[T], values: Any, where: str) -> T:
    """The dataclass cls (nested ones too) out of values; `where` names them in a ConfigError."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} should hold an object, not {type(values).__name__}")
    values = getattr(cls, "upgrade", dict)(values)
    hints = get_type_hints(cls)
    known = fields(cls)  # type: ignore[arg-type]
    required = [f.name for f in known if f.default is f.default_factory is MISSING]
    if lacking := [name for name in required if name not in values]:
        raise ConfigError(f"{where} lacks the keys {', '.join(lacking)}")
    if unknown := sorted(map(str, set(values) - {f.name for f in known})):
        newer = "which a newer rosetrainer may have written"
        raise ConfigError(f"{where} has unknown keys {', '.join(unknown)}, {newer}")
    made: dict[str, Any] = {}
    for name, value in values.items():
        if value is None and name not in required and type(None) not in get_args(hints[name]):
            continue  # an older version's word for the default
        if is_dataclass(hints[name]):
            made[name] = config_from_dict(hints[name], value, f"{where}: {name}")
        elif isinstance(value, str) and Path in (hints[name], *get_args(hints[name])):
            made[name] = Path(value)
        else:
            made[name] = value
    config = cls(**made)
    check_fields(config)
    return config


def check_fields(config: Any) -> None:
    """Raises ConfigError if a field's value is not of its type or lies outside its Bounds.

    Nested components are checked too.
    """
    for name, hint in type_hints(type(config)).items():  # type: ignore[arg-type]
        value = getattr(config, name)
        if problem := _mismatch(hint, value):
            raise ConfigError(f"{name}={shown(value)} must be {problem}")
        if is_dataclass(value):
            check_fields(value)


@cache
def type_hints(cls: Any) -> dict[str, Any]:
    """Of a dataclass's fields."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cls)}


def _mismatch(hint: Any, value: Any) -> str:
    """What a value of type `hint` must be, or "" if value is that."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        problem = _mismatch(args[0], value)
        bounds = [a for a in args[1:] if isinstance(a, Bounds)]
        if problem or all(b.holds(value) for b in bounds):
            return problem
        return f"{bounds[0]}"
    if origin in (Union, UnionType):
        options = [_mismatch(a, value) for a in args if a is not type(None) or value is None]
        return "" if "" in options else " or ".join(options)
    if origin is Literal:
        return "" if value in args and isinstance(value, str) else one_of(args)
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return "" if number and -math.inf < value < math.inf else "a finite number"
    if hint is type(None):
        return ""
    ok = isinstance(value, origin or hint) and (hint is not int or not isinstance(value, bool))
    named = {int: "an integer", bool: "true or false", Path: "a path", str: "a text"}
    return "" if ok else named.get(hint, f"a {hint.__name__}")


def unknown_setting(config: Any, known: Mapping[str, tuple[Any, ...] | None]) -> str:
    """The first setting of config that `known` leaves out, "activation=silu, only for gelu", or "".

    known: for each field the values that are taken into account, None for all; a field that is not
    there has to keep its default.
    """
    for f in fields(config):
        value, values = getattr(config, f.name), known.get(f.name, (f.default,))
        if values is not None and value not in values:
            return f"{f.name}={value}, only for {one_of(values)}"
    return ""


def divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def one_of(values: Any) -> str:
    """1, 2 or 4"""
    words = [str(v) for v in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
