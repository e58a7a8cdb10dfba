"""A rank's life: its error goes to whoever launched it, and it never outlives our launcher.

Imports no torch, so that a rank is under watch before its seconds of importing begin.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from rosetrainer.environment import (
    LAUNCHED,
    PlaceError,
    reports_for_machine,
    world_from_environment,
)
from rosetrainer.launch.failures import RankError, explain
from rosetrainer.validation import ConfigError

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable, torchrun's and our launcher's: where a rank leaves its error."""

RENDEZVOUS_DIR = "ROSETRAINER_RENDEZVOUS_DIR"
"""Environment variable: the folder in which the ranks of one launch of ours find each other."""

STOP_MESSAGE = "stop_message.txt"
"""In that folder: what rank 0 says when a signal has stopped it."""

STOP_SECONDS_FILE = "stop_seconds.txt"
"""In that folder: what rank 0 says it needs when a signal has come."""

GRACE = 120
"""Seconds that ranks have, if they need so long, to end their step and save after a signal."""

PIPE_CLOSED = 128 + signal.SIGPIPE
"""Exit status when the reader of our output, `head` say, has gone: there is nothing to say."""


def run_rank(main: Callable[[], int | None]) -> NoReturn:
    """Ends the process with main()'s status: 2 for a ConfigError, 130 for Ctrl-C, 1 otherwise."""
    if LAUNCHED in os.environ:
        _watch(int(os.environ[LAUNCHED]))
        _take_interrupts()
        # Rank 0's lines should reach a pipe or a log file while it runs, not when it ends.
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        status = main()
    except BrokenPipeError:
        os._exit(PIPE_CLOSED)
    except KeyboardInterrupt:
        if reports_for_machine():
            print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        end_rank(error)
    sys.exit(status)


def end_rank(error: Exception) -> NoReturn:
    """Reports the error and ends the process, from any of its threads."""
    now, rank, world_size = time.time(), 0, 1
    with contextlib.suppress(PlaceError):
        rank, world_size, _, _ = world_from_environment()
    failure = explain(error, rank, world_size)
    if isinstance(error, ConfigError) and not isinstance(error, PlaceError):
        failure.first = reports_for_machine()  # for all ranks make the same mistake
    if not record(failure, now) and failure.first:
        print(f"error: {failure}", file=sys.stderr)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    # The interpreter's own ending can hang in a communicator whose peers are gone.
    os._exit(failure.status)


def record(failure: RankError, now: float) -> bool:
    """Leaves the error for the launcher, in torchrun's format; whether that will report it.

    See torch.distributed.elastic.multiprocessing.errors. The time tells which error is the cause:
    a rank's error breaks the connections of the others within milliseconds, and torchrun compares
    whole seconds.
    """
    if not os.environ.get(ERROR_FILE):
        return False
    when = now if failure.first else now + 1
    details = {"py_callstack": f"error: {failure}", "timestamp": when, "first": failure.first}
    message = {"message": str(failure), "extraInfo": details}
    try:
        _write(Path(os.environ[ERROR_FILE]), json.dumps({"message": message}))
    except OSError:
        return False
    # torchrun starts ranks again without a word of what has ended them.
    tries = [f"TORCHELASTIC_{name}" for name in ("RESTART_COUNT", "MAX_RESTARTS")]
    made, most = (int(os.environ.get(name, "0")) for name in tries)
    return LAUNCHED in os.environ or made >= most


def _write(path: Path, text: str) -> None:
    """Whole or not at all: a SIGTERM may come in the middle, and the launcher reads at any time."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def report_stop(text: str) -> None:
    """What rank 0 says when a signal has stopped it; under our launcher, which says the rest."""
    if LAUNCHED in os.environ:
        _write(Path(os.environ[RENDEZVOUS_DIR]) / STOP_MESSAGE, text)
    else:
        print(f"stopped; {text}", flush=True)


def report_stop_seconds(seconds: float) -> None:
    """Rank 0 tells how long it takes to stop, to our launcher, which waits so long, or the user."""
    if LAUNCHED in os.environ:
        _write(Path(os.environ[RENDEZVOUS_DIR]) / STOP_SECONDS_FILE, str(seconds))
    elif seconds >= 1:
        print(stop_line(seconds), flush=True)


def stop_line(seconds: float) -> str:
    return (
        f"finishing the step under way, then saving: about {seconds:.0f} s; a second signal, or "
        f"Ctrl-C, ends at once"
    )


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
