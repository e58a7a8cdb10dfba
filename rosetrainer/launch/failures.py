"""A rank's error as a user is told of it, in a few lines.

Imports no torch: a rank has errors to report before its seconds of importing that are over.
"""

from __future__ import annotations

import contextlib
import errno
import re
import traceback
from pathlib import Path

from rosetrainer.durable_files import room, short
from rosetrainer.environment import PlaceError, trainer_command, world_from_environment
from rosetrainer.validation import ConfigError

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "_ALLOC_FAILED")
"""In the text of a RuntimeError: torch's allocators on each system, CUDA's own, cuBLAS's."""

LOST = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe"),
    *("remote process exited", "NCCL communicator was aborted"),
    "Connection was likely closed",  # to whoever keeps the store
)
NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES)


class RankError(Exception):
    """An error with all that a user needs to know of it, in a few lines."""


def explain(error: Exception, folder: Path | None) -> tuple[str, int]:
    """What to tell of it, and the exit status, 2 where the user can mend it.

    folder: of the training run, where it has begun: a traceback goes into a file there.
    """
    if isinstance(error, ConfigError | RankError):
        return str(error), 2 if isinstance(error, ConfigError) else 1
    if is_out_of_room(error):
        where = folder or Path.cwd()
        what = f"cannot write in {where}: {short(error)}; {room(where)} bytes can be written there"
        return f"{what}; free some space, and the same command goes on", 2
    rank, world_size = 0, 1
    with contextlib.suppress(PlaceError):
        rank, world_size, _, _ = world_from_environment()
    if is_lost_connection(error):
        what = f"rank {rank} has lost its connection to another rank, which has ended"
        return f"{what}; the same command goes on from the last checkpoint", 1
    who, trace = f"rank {rank} of {world_size}", "".join(traceback.format_exception(error)).rstrip()
    if is_out_of_memory(error):
        asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        for_what = f" when it asked for {asked[1]} more" if asked else ""
        return f"{who} ran out of memory{for_what}\n  {memory_advice()}", 1
    if folder:
        file = folder / f"error_rank_{rank:05d}.txt"
        with contextlib.suppress(OSError):
            file.write_text(trace)
            line = str(error).partition("\n")[0]
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{last.filename}, line {last.lineno}, in {last.name}"
            what = f"{who} failed: {type(error).__name__}: {line}"
            return f"{what}\n  {place}\n  the whole traceback: {file}", 1
    return f"{who} failed:\n{trace}", 1


def is_lost_connection(error: Exception) -> bool:
    """Whether another rank's end is the cause."""
    return any(reason in str(error) for reason in LOST)


def is_out_of_room(error: Exception) -> bool:
    """Whether a disk, or a limit on files, has not taken what was written."""
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    return type(error).__name__ == "SafetensorError" and "I/O error" in str(error)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory, of the machine or of a GPU, could not be had."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(reason in str(error) for reason in NO_MEMORY)


def memory_advice() -> str:
    """One line: what needs less memory, and how to know before."""
    return (
        "training needs less with a smaller --micro-batch-size or with --recompute block, and "
        "more ranks with --tp-size share the model; the same flags after "
        f"`{trainer_command()} plan` predict how much"
    )
