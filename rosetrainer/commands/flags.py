"""Command-line flags out of a config dataclass, and how many ranks they ask for."""

from __future__ import annotations

import argparse
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, is_dataclass, replace
from itertools import groupby
from typing import Any, NoReturn, TypeVar

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
    parser = _parser(cls, flags, prog, wants_help=bool({*HELP} & {*argv}))
    found, unknown = parser.parse_known_intermixed_args([_dashes(word) for word in argv])
    if unknown:
        raise ConfigError(f"unknown argument {unknown[0]}; {_hint(unknown[0], flags, prog)}")
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(found).items()}
    parsed = _filled(cls, default, given)
    check_fields(parsed)
    return parsed


def parse_subcommand(commands: Mapping[str, type[Any]], argv: list[str], prog: str) -> Any:
    """An instance of the dataclass that argv names first, out of the rest of it, as parse_flags."""
    if argv[:1] and argv[0] in commands:
        return parse_flags(commands[argv[0]], argv[1:], f"{prog} {argv[0]}")
    parser = _Parser(prog=shown(prog), formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_subparsers(required=True, metavar=f"{{{','.join(commands)}}}")
    for name, cls in commands.items():
        chosen.add_parser(name, help=cls.__doc__)
    return parser.parse_args(argv)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Instead of the usage, and an exit, before any caller's word."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parser(cls: type, flags: list[Flag], prog: str, wants_help: bool) -> _Parser:
    """Of flags, each component's in a group with its docstring."""
    docs: dict[type, dict[str, str]] = {}
    if wants_help:
        from rosetrainer.commands.field_docs import field_docs  # reads the sources

        docs = {flag.component: field_docs(flag.component) for flag in flags}
    places = [flag.place for flag in flags if flag.positional]
    usage = " ".join([shown(prog), *places, "[flags]"])
    parser = _Parser(shown(prog), usage, cls.__doc__, allow_abbrev=False)
    own_first = sorted(flags, key=lambda flag: flag.component is not cls)
    for component, own in groupby(own_first, lambda flag: flag.component):
        doc = component.__doc__
        group = parser if component is cls else parser.add_argument_group(description=doc)
        for flag in own:
            text = docs.get(component, {}).get(flag.field.name, "")
            if flag.default not in (MISSING, ()):
                text += f" (default: {flag.default})"
            group.add_argument(flag.word, **flag.options, help=text.replace("%", "%%"))
    return parser


def _dashes(word: str) -> str:
    """--d_model is --d-model."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def _hint(word: str, flags: list[Flag], prog: str) -> str:
    import difflib  # for a mistake only

    known = [form for flag in flags for form in flag.forms]
    close = difflib.get_close_matches(word.partition("=")[0], known, n=1, cutoff=0.75)
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
