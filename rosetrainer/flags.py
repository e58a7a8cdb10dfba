"""Command-line flags out of a config dataclass, and a user's mistake as one line."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

import tyro

from rosetrainer.config import ConfigError

T = TypeVar("T")


def parse_flags(cls: type[T], argv: list[str], prog: str) -> T:
    """An instance of cls out of argv; nested dataclasses give flat flags.

    Raises ConfigError for a flag or value that does not fit; `--help` prints and exits.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            parsed, unknown = tyro.cli(
                cls,
                prog=prog,
                args=argv,
                config=(tyro.conf.OmitArgPrefixes,),
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(_first_line(printed.getvalue())) from None
    if unknown:
        known = re.findall(r"--[a-z0-9-]+", tyro.extras.get_parser(
            cls, prog=prog, config=(tyro.conf.OmitArgPrefixes,)).format_help())
        close = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.75)
        hint = f"did you mean {close[0]}?" if close else f"see {prog} --help"
        raise ConfigError(f"unknown argument {unknown[0]}; {hint}")
    return parsed


def _first_line(box: str) -> str:
    """The message inside the box that tyro draws, without its frame and its help."""
    words: list[str] = []
    for line in box.splitlines()[1:]:
        line = line.strip("│ ")
        if not line or line.startswith(("─", "╰", "Got errors")):
            break
        words.append(line)
    return " ".join(words) or " ".join(box.split())


def fail(error: Exception) -> NoReturn:
    """One line on standard error, exit status 2."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def run_cli(main: Callable[[list[str]], object]) -> None:
    """main(argv) with a user's mistake shown as one line."""
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        fail(error)
