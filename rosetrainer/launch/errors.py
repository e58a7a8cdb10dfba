"""What a user is told of a rank's end, in a few lines and once, by whoever has launched it.

Imports no torch: the launcher needs none, and a rank may fail before it has imported it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from errno import EACCES, EDQUOT, EFBIG, ENOSPC, EROFS
from pathlib import Path
from typing import NoReturn

from rosetrainer import environment
from rosetrainer.durable_files import room, short
from rosetrainer.validation import ConfigError

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # variable, torchrun's too: a rank leaves its error there

LATER = 60
"""Seconds added to the time of an error that follows from another rank's, so that the launcher
takes that one for the cause: clocks of machines differ, and torchrun compares whole seconds."""

LOST = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe"),
    *("remote process exited", "NCCL communicator was aborted"),
    "Connection was likely closed",  # to whoever keeps the store
)
NO_ROOM = [os.strerror(code) for code in (ENOSPC, EFBIG, EDQUOT, EROFS, EACCES)]
NO_MEMORY = ("allocate memory", "not enough memory", "out of memory", "_ALLOC_FAILED")


class RankError(Exception):
    """An error with all that a user needs to know of it, in a few lines."""


@dataclass
class ErrorReport:
    """What training adds to the report of an error that ends this process."""

    folder: Path | None = None  # of the run: for a traceback
    is_first: Callable[[], bool] | None = None  # whether no other rank has failed before


ERROR_REPORT = ErrorReport()


def end_rank(error: Exception) -> NoReturn:
    """Ends the process, from any of its threads, and reports why unless another rank was first."""
    now, (text, status) = time.time(), explain(error, ERROR_REPORT.folder)
    if ERROR_REPORT.is_first:
        first = ERROR_REPORT.is_first()
    else:  # they have not met: a mistake of the user's is one of all ranks
        alone = isinstance(error, environment.PlaceError) or not isinstance(error, ConfigError)
        first = alone or environment.reports_for_machine()
    follows = not first or _says(error, LOST)
    if not record(f"error: {text}", now + LATER * follows) and first:
        print(f"error: {text}", file=sys.stderr)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # The interpreter's own ending can hang in a communicator whose peers are gone.
    os._exit(status)


def report_stop(message: str) -> None:
    """How a stop has ended: to our launcher, which reports it, or else to the user."""
    launched = environment.LAUNCHED in os.environ
    if environment.reports_for_machine() and not (launched and record(message, time.time())):
        print(f"stopped; {message}", flush=True)


def record(text: str, when: float) -> bool:
    """Leaves what has ended this rank, in torchrun's format; whether a launcher will report it.

    See torch.distributed.elastic.multiprocessing.errors.
    """
    error = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": when}}
    try:
        Path(os.environ[ERROR_FILE]).write_text(json.dumps({"message": error}))
    except (KeyError, OSError):
        return False
    # torchrun starts ranks again without a word of what has ended them.
    counts = ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")
    made, most = (int(os.environ.get(name, "0")) for name in counts)
    return environment.LAUNCHED in os.environ or made >= most


def recorded(file: str) -> tuple[float, str]:
    """(when, what) as `record` has left it. A rank that was killed or has crashed leaves nothing:
    it is the first, for that follows from no other rank's end."""
    with contextlib.suppress(OSError, ValueError):
        error = json.loads(Path(file).read_text())["message"]
        return error["extraInfo"]["timestamp"], error["message"]
    return 0.0, ""


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
    if _says(error, LOST):
        what = f"rank {rank} has lost its connection to another rank, which has ended"
        return f"{what}; the same command goes on from the last checkpoint", 1
    who, trace = f"rank {rank} of {world_size}", "".join(traceback.format_exception(error)).rstrip()
    if isinstance(error, MemoryError) or _says(error, NO_MEMORY):
        asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        for_what = f" when it asked for {asked[1]} more" if asked else ""
        return f"{who} ran out of memory{for_what}\n  {memory_advice()}", 1
    if folder:
        file = folder / f"error_rank_{rank:05d}.txt"
        with contextlib.suppress(OSError):
            file.write_text(trace)
            *_, place = traceback.format_tb(error.__traceback__)
            what = traceback.format_exception_only(error)[0].partition("\n")[0]
            return f"{who} failed: {what}\n{place}  the whole traceback: {file}", 1
    return f"{who} failed:\n{trace}", 1


def _says(error: Exception, reasons: Iterable[str]) -> bool:
    """torch, safetensors and the system alike tell in its text alone what an error is about."""
    return any(reason in str(error) for reason in reasons)


def memory_advice() -> str:
    return (
        "training needs less with a smaller --micro-batch-size or with --recompute block, --zero 3 "
        "lets the ranks of --dp-size share the model, and more ranks with --tp-size do; the same "
        f"flags after `{environment.trainer_command()} plan` predict how much"
    )
