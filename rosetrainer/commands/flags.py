"""Command-line flags out of a config dataclass, and how many ranks they ask for."""

from __future__ import annotations

import contextlib
import difflib
import io
import math
import os
import re
import shlex
from typing import TypeVar

import tyro

from rosetrainer.config import ParallelConfig
from rosetrainer.environment import LAUNCHED, is_rank, trainer_command, world_from_environment
from rosetrainer.validation import ConfigError, check_fields

T = TypeVar("T")


def parse_flags(cls: type[T], argv: list[str], prog: str, default: T | None = None) -> T:
    """An instance of cls out of argv; nested dataclasses give flat flags, a union subcommands.

    What argv leaves out is the default's, or each field's own.

    Raises ConfigError for a flag or value that does not fit; `--help` prints and exits.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            parsed, unknown = tyro.cli(
                cls,
                prog=_shown(prog) if {"-h", "--help"} & {*argv} else prog,
                args=argv,
                config=(tyro.conf.OmitArgPrefixes,),
                return_unknown_args=True,
                default=tyro.MISSING_NONPROP if default is None else default,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(_first_line(printed.getvalue())) from None
    if unknown:
        known = _known_flags(cls, prog)
        close = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.75)
        hint = f"did you mean {close[0]}?" if close else f"see {_shown(prog)} --help"
        raise ConfigError(f"unknown argument {unknown[0]}; {hint}")
    check_fields(parsed)
    return parsed


def _shown(prog: str) -> str:
    """As a user here would type it."""
    return prog.replace("python -m rosetrainer", trainer_command())


def _known_flags(cls: type, prog: str) -> list[str]:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        tyro.cli(cls, prog=prog, args=["--help"], config=(tyro.conf.OmitArgPrefixes,))
    return re.findall(r"--[a-z0-9-]+", shown.getvalue())


def _first_line(box: str) -> str:
    """The message inside the box that tyro draws, without its frame and its help.

    Where the terminal has ASCII only, the box is a rule above the message and one below.
    """
    words: list[str] = []
    for line in box.splitlines()[1:]:
        line = line.strip("│ ")
        if not line.strip("-─╰╯") or line.startswith("Got errors"):  # a rule, or the frame
            if words:
                break
        else:
            words.append(line)
    return " ".join(words) or " ".join(box.split())


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
