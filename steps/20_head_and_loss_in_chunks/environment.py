"""What this process was started with, and how a script here ends at a user's mistake."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from config import ConfigError


def world_from_environment() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local world size) as torchrun set them; (0, 1, 0, 1) alone."""
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return tuple(int(os.environ.get(name, alone)) for name, alone in names.items())


def say(text: str) -> None:
    """Prints the text on rank 0 alone: one voice for all."""
    if world_from_environment()[0] == 0:
        print(text, flush=True)


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
    """main(), and status 2 for a ConfigError; all ranks make the same one, and one speaks."""
    try:
        main()
    except ConfigError as error:
        if world_from_environment()[2] == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
