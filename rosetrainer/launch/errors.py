"""What a user is told of an error, in a few lines, and the exit status that goes with it.

Imports no torch, as `rank`, whose errors these are.
"""

from __future__ import annotations

import contextlib
import os
import re
import traceback
from collections.abc import Iterable
from errno import EACCES, EDQUOT, EFBIG, ENOSPC, EROFS
from pathlib import Path

from rosetrainer import environment
from rosetrainer.durable_files import room, short
from rosetrainer.validation import ConfigError

LOST = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe"),
    *("remote process exited", "NCCL communicator was aborted"),
    "Connection was likely closed",  # to whoever keeps the store
)
NO_ROOM = [os.strerror(code) for code in (ENOSPC, EFBIG, EDQUOT, EROFS, EACCES)]
NO_MEMORY = ("allocate memory", "not enough memory", "out of memory", "_ALLOC_FAILED")


class RankError(Exception):
    """An error with all that a user needs to know of it, in a few lines."""


def explain(error: Exception, folder: Path | None) -> tuple[str, int]:
    """What to tell of it, and the exit status, 2 where the user can mend it.

    folder: of the training run, where it has begun: a traceback goes into a file there.
    """
    if isinstance(error, ConfigError | RankError):
        return str(error), 2 if isinstance(error, ConfigError) else 1
    if _says(error, NO_ROOM):
        where = folder or Path.cwd()
        what = f"cannot write in {where}: {short(error)}; {room(where)} bytes can be written there"
        return f"{what}; free some space, and the same command goes on", 2
    rank, world_size = 0, 1
    with contextlib.suppress(environment.PlaceError):
        rank, world_size, _, _ = environment.world_from_environment()
    who, trace = f"rank {rank} of {world_size}", "".join(traceback.format_exception(error)).rstrip()
    if lost_connection(error):
        what = f"rank {rank} has lost its connection to another rank, which has ended"
        return f"{what}; the same command goes on from the last checkpoint", 1
    if isinstance(error, MemoryError) or _says(error, NO_MEMORY):
        asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        for_what = f" when it asked for {asked[1]} more" if asked else ""
        return f"{who} ran out of memory{for_what}\n  {memory_advice()}", 1
    if folder:
        file = folder / f"error_rank_{rank:05d}.txt"
        with contextlib.suppress(OSError):
            file.write_text(trace)
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{last.filename}, line {last.lineno}, in {last.name}"
            what = traceback.format_exception_only(error)[0].partition("\n")[0]
            return f"{who} failed: {what}\n  {place}\n  the whole traceback: {file}", 1
    return f"{who} failed:\n{trace}", 1


def lost_connection(error: Exception) -> bool:
    """Whether it follows from another rank's end."""
    return _says(error, LOST)


def _says(error: Exception, reasons: Iterable[str]) -> bool:
    """torch, safetensors and the system alike tell in its text alone what an error is about."""
    return any(reason in str(error) for reason in reasons)


def memory_advice() -> str:
    return (
        "training needs less with a smaller --micro-batch-size or with --recompute block, "
        "--zero 3 lets the ranks of --dp-size share the model, and more ranks with --tp-size do; "
        "the same flags after "
        f"`{environment.trainer_command()} plan` predict how much"
    )
