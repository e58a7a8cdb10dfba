"""One failure is told once, by the rank that it came to first, in a few lines."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from rosetrainer.fields import ConfigError
from rosetrainer.parallel_context import Axis
from rosetrainer.rank import RankError

LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


@dataclass
class Failures:
    """Where the traceback of an error that is not the user's goes, once there is a run folder."""

    folder: Path | None = None


@contextlib.contextmanager
def told_once(store: dist.Store | None, world: Axis) -> Iterator[Failures]:
    """Makes an error in here a RankError: with a text on the first rank, else empty."""
    failures = Failures()
    try:
        yield failures
    except RankError:
        raise
    except Exception as error:
        if store is None and isinstance(error, ConfigError):
            raise  # nobody else could speak
        status = 2 if isinstance(error, ConfigError) else 1
        text = explain(error, world, failures.folder) if is_first(store) else ""
        raise RankError(text, status) from error


def is_first(store: dist.Store | None) -> bool:
    """Whether no other rank has failed before; the store counts."""
    try:
        return store is None or store.add("failures", 1) == 1
    except (RuntimeError, OSError):
        return True  # whoever kept the store is gone, so this may be the only one to speak


def explain(error: Exception, world: Axis, folder: Path | None) -> str:
    """What a user needs of it: at most five lines."""
    if isinstance(error, ConfigError):
        return str(error)
    line = (str(error).splitlines() or [""])[0]
    if any(reason in str(error) for reason in LOST):
        return (
            f"rank {world.rank} has lost its connection to another rank, which has ended; the same "
            f"command goes on from the last checkpoint"
        )
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = (
        f"rank {world.rank} of {world.size} failed: {type(error).__name__}: {line}\n"
        f"  {last.filename}, line {last.lineno}, in {last.name}"
    )
    if folder is not None:
        path = folder / f"error_rank_{world.rank:05d}.txt"
        with contextlib.suppress(OSError):
            path.write_text("".join(traceback.format_exception(error)))
            text += f"\n  the whole traceback: {path}"
    return text
