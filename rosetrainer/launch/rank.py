"""How a rank ends: its error is shown once, and it never outlives its launcher.

Imports no torch, so that a rank is under watch before its seconds of importing begin.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from rosetrainer.environment import (
    LAUNCHED,
    PlaceError,
    reports_for_machine,
    trainer_command,
    world_from_environment,
)
from rosetrainer.validation import ConfigError

RENDEZVOUS_DIR = "ROSETRAINER_RENDEZVOUS_DIR"
"""Environment variable: the folder in which the ranks of one launch meet."""

STOP_MESSAGE = "report_stop.txt"
"""In that folder: what rank 0 says when a signal has stopped it."""

STOP_SECONDS_FILE = "stop_seconds.txt"
"""In that folder: what rank 0 says it needs when a signal has come."""

GRACE = 120
"""Seconds that ranks have, if they need so long, to end their step and save after a signal."""

SILENT_SECONDS = 30
"""How long a rank that leaves it to another one to tell of a mistake waits to be ended."""

PIPE_CLOSED = 128 + signal.SIGPIPE
"""Exit status when the reader of our output, `head` say, has gone: there is nothing to say."""


NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "_ALLOC_FAILED")
"""In the text of a RuntimeError: torch's allocators on each system, CUDA's own, cuBLAS's."""


class RankError(Exception):
    """A failure that is already explained.

    The text, at most five lines, is all that a user needs; no traceback. An empty one means that
    another rank speaks. status: with which the process ends, 2 for a user's mistake.
    """

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


def run_rank(main: Callable[[], int | None]) -> NoReturn:
    """Ends the process with main()'s status: 2 for a ConfigError, 130 for Ctrl-C, 1 otherwise.

    Under our launcher an error goes to a file and the launcher prints it. Under torchrun
    one rank of each machine speaks for all about a mistake, since all of them make it; the others
    wait for torchrun to end them, which else would end that one before it has spoken.
    """
    launched = os.environ.get(LAUNCHED)
    if launched:
        _watch(int(launched))
        _take_interrupts()
        # Rank 0's lines should reach a pipe or a log file while it runs, not when it ends.
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    speaks = not launched and reports_for_machine()
    try:
        status = main()
    except ConfigError as error:
        if launched:
            _report_to_launcher(error, 2)
        if speaks or isinstance(error, PlaceError):
            print(f"error: {error}", file=sys.stderr)
        elif "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(SILENT_SECONDS)
        sys.exit(2)
    except RankError as error:
        end_rank(error)
    except BrokenPipeError:
        os._exit(PIPE_CLOSED)
    except KeyboardInterrupt:
        if speaks:
            print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if is_out_of_memory(error):
            rank, world_size, _, _ = world_from_environment()
            end_rank(RankError(explain_out_of_memory(error, rank, world_size)))
        if launched:
            _report_to_launcher(error, 1)
        raise
    sys.exit(status)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory, of the machine or of a GPU, could not be had; torch is not imported here."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(reason in str(error) for reason in NO_MEMORY)


def explain_out_of_memory(error: Exception, rank: int, world_size: int) -> str:
    """Two lines: how much was asked for, and what needs less."""
    asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    for_what = f" when it asked for {asked[1]} more" if asked else ""
    return f"rank {rank} of {world_size} ran out of memory{for_what}\n  {memory_advice()}"


def memory_advice() -> str:
    """One line: what needs less memory, and how to know before."""
    return (
        "training needs less with a smaller --micro-batch-size or with --recompute block, and "
        "more ranks with --tp-size share the model; the same flags after "
        f"`{trainer_command()} plan` predict how much"
    )


def end_rank(error: RankError) -> NoReturn:
    """Tells of the error and ends the process, from any of its threads."""
    if os.environ.get(LAUNCHED):
        _report_to_launcher(error, error.status)
    if str(error):
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(error.status)


def report_stop(text: str) -> None:
    """What rank 0 says when a signal has stopped it; under our launcher, which says the rest."""
    if os.environ.get(LAUNCHED):
        (Path(os.environ[RENDEZVOUS_DIR]) / STOP_MESSAGE).write_text(text)
    else:
        print(f"stopped; {text}", flush=True)


def report_stop_seconds(seconds: float) -> None:
    """Rank 0 tells how long it takes to stop, to our launcher, which waits so long, or the user."""
    if os.environ.get(LAUNCHED):
        path = Path(os.environ[RENDEZVOUS_DIR]) / STOP_SECONDS_FILE
        part = path.with_suffix(".part")
        part.write_text(str(seconds))
        part.replace(path)
    elif seconds >= 1:
        print(stop_line(seconds), flush=True)


def stop_line(seconds: float) -> str:
    return (
        f"finishing the step under way, then saving: about {seconds:.0f} s; a second signal, or "
        f"Ctrl-C, ends at once"
    )


def error_file(folder: str | Path, rank: int) -> Path:
    """Where a rank leaves its error for the launcher: {"time": seconds, "text": what to print}."""
    return Path(folder) / f"error_{rank:05}.json"


def _report_to_launcher(error: Exception, status: int) -> NoReturn:
    """Writes the error file and ends the process.

    The time tells the launcher which error is the cause: a rank's error breaks the connections
    of the others within milliseconds.
    """
    now = time.time()
    text = str(error)
    if not isinstance(error, (ConfigError, RankError)):
        frames = error.__traceback__.tb_next if error.__traceback__ else None
        trace = "".join(traceback.format_exception(type(error), error, frames)).rstrip()
        text = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} failed:\n{trace}"
    path = error_file(os.environ[RENDEZVOUS_DIR], int(os.environ["RANK"]))
    part = path.with_suffix(".part")
    try:
        part.write_text(json.dumps({"time": now, "text": text}))
        part.replace(path)  # whole or not at all: a SIGTERM may come in the middle
    except OSError:
        if text:
            print(f"error: {text}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # The interpreter's own ending can hang in a communicator whose peers are gone.
    os._exit(status)


def _take_interrupts() -> None:
    """Ctrl-C, which the launcher passes on, ends this rank at once unless it is listened to.

    An exception in the middle of torch's import can get lost in its C++ code. The launcher has
    blocked the signals for us until now.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})


def _watch(launcher: int) -> None:
    """Ends this process if its launcher is gone, even while a collective hangs."""

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.3)
        os._exit(1)

    threading.Thread(target=watch, name="launcher watch", daemon=True).start()
