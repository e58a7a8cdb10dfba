"""How a script here ends at a user's mistake: one line on stderr, exit status 2, no traceback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from config import ConfigError


class Flags(argparse.ArgumentParser):
    """A mistake in the flags is a ConfigError, like any other of the user's."""

    def __init__(self) -> None:
        super().__init__(allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def count(text: str) -> int:
    """The type of a flag: an integer from 1 on."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def run(main: Callable[[], None]) -> None:
    """main(), and one line with status 2 for a ConfigError."""
    try:
        main()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
