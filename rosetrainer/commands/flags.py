"""Command-line flags out of a config dataclass, and how many ranks they ask for.

Written out, for reading a hundred flags is to take milliseconds: a command that starts ranks, or is
one, reads them before torch's seconds of importing.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, is_dataclass, replace
from typing import Any, TypeVar

from rosetrainer.commands.flag_fields import Flag, default_of, flags_of, settings_of
from rosetrainer.config import ParallelConfig
from rosetrainer.environment import LAUNCHED, is_rank, trainer_command, world_from_environment
from rosetrainer.validation import ConfigError, check_fields

T = TypeVar("T")
HELP = ("-h", "--help")


def parse_flags(cls: type[T], argv: list[str], prog: str, default: T | None = None) -> T:
    """An instance of cls out of argv; nested dataclasses give flat flags.

    What argv leaves out is the default's, or each field's own.

    Raises ConfigError for a flag or value that does not fit; `--help` prints and exits.
    """
    flags = list(flags_of(cls, default))
    if {*HELP} & {*argv}:
        from rosetrainer.commands.flag_help import print_help

        print_help(cls, flags, shown(prog))
        raise SystemExit(0)
    given = _read(flags, argv, prog)
    for flag in flags:
        if flag.default is MISSING and flag.field.name not in given:
            raise ConfigError(f"{flag.word} is missing; see {shown(prog)} --help")
    parsed = _filled(cls, default, given)
    check_fields(parsed)
    return parsed


def parse_subcommand(commands: Mapping[str, type[Any]], argv: list[str], prog: str) -> Any:
    """An instance of the dataclass that argv names first, out of the rest of it, as parse_flags."""
    if argv[:1] and argv[0] in HELP:
        from rosetrainer.commands.flag_help import print_commands

        print_commands(commands, shown(prog))
        raise SystemExit(0)
    if not argv or argv[0] not in commands:
        not_this = f", not {argv[0]}" if argv else ""
        raise ConfigError(f"Expected one of {{{', '.join(commands)}}}{not_this}")
    return parse_flags(commands[argv[0]], argv[1:], f"{prog} {argv[0]}")


def _read(flags: list[Flag], argv: list[str], prog: str) -> dict[str, Any]:
    """Values by the fields' names; of two of one flag the last counts."""
    by_word = {flag.word: flag for flag in flags if not flag.positional}
    switches = {f"--no-{w[2:]}": flag for w, flag in by_word.items() if flag.is_switch}
    places = [flag for flag in flags if flag.positional]
    given: dict[str, Any] = {}
    words = iter(argv)
    for word in words:
        name, equals, text = word.partition("=")
        name = name.replace("_", "-")
        if name in switches or (name in by_word and by_word[name].is_switch):
            if equals:
                raise ConfigError(f"{name} takes no value, and {text!r} is given")
            flag = switches.get(name) or by_word[name]
            given[flag.field.name] = name not in switches
        elif name in by_word:
            flag = by_word[name]
            value = text if equals else next(words, None)
            if value is None or (not equals and value.replace("_", "-") in by_word | switches):
                raise ConfigError(f"{name} needs a value; see {shown(prog)} --help")
            given[flag.field.name] = flag.value(value)
        elif word.startswith("-") or not places:
            raise ConfigError(
                f"unknown argument {word}; {_hint(name, [*by_word, *switches], prog)}"
            )
        elif places[0].takes_many:
            given[places[0].field.name] = (
                *given.get(places[0].field.name, ()),
                places[0].value(word),
            )
        else:
            flag = places.pop(0)
            given[flag.field.name] = flag.value(word)
    return given


def _hint(word: str, known: list[str], prog: str) -> str:
    import difflib  # for a mistake only

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    return f"did you mean {close[0]}?" if close else f"see {shown(prog)} --help"


def _filled(cls: type[T], instance: T | None, given: Mapping[str, Any]) -> T:
    """The instance, or one of the fields' own defaults, with the values that are given."""
    values = {}
    for field, kinds, _ in settings_of(cls):
        if is_dataclass(kinds[0]):
            default = default_of(field, instance)
            values[field.name] = _filled(kinds[0], None if default is MISSING else default, given)
        elif field.name in given:
            values[field.name] = given[field.name]
    return replace(instance, **values) if instance is not None else cls(**values)  # type: ignore


def shown(prog: str) -> str:
    """As a user here would type it."""
    return prog.replace("python -m rosetrainer", trainer_command())


def ranks_to_start(
    command: str, argv: list[str], nproc: int | None, parallel: ParallelConfig
) -> tuple[int, bool]:
    """(world size, whether this process has to start those ranks or is one of them).

    Raises ConfigError where more ranks are asked for than there are or will be.
    """
    if is_rank():
        if nproc is not None and LAUNCHED not in os.environ:
            raise ConfigError(
                f"nproc={nproc} under torchrun, srun or mpirun, which start the ranks themselves; "
                f"leave --nproc and --hosts out"
            )
        return world_from_environment()[1], False
    check_fields(parallel)
    sizes = [size for size in (parallel.tp_size, parallel.dp_size) if size]
    sizes += [parallel.pp_size] * (parallel.pp_size > 1)
    if nproc is None and math.prod(sizes) > 1:
        flags = shlex.join(["--nproc", str(math.prod(sizes)), *argv])
        raise ConfigError(
            f"{' x '.join(map(str, sizes))} ranks are asked for, and this is one; "
            f"run: {trainer_command()} {command} {flags}"
        )
    return nproc or 1, nproc is not None and nproc > 1
