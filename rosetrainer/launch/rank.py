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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rosetrainer.environment import LAUNCHED, PlaceError, reports_for_machine
from rosetrainer.launch.failures import explain, is_lost_connection
from rosetrainer.validation import ConfigError

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable, torchrun's and our launcher's: where a rank leaves its error."""

RENDEZVOUS_DIR = "ROSETRAINER_RENDEZVOUS_DIR"
"""Environment variable: the folder in which the ranks of one launch of ours find each other."""

PIPE_CLOSED = 128 + signal.SIGPIPE
"""Exit status when the reader of our output, `head` say, has gone: there is nothing to say."""

LATER = 60
"""Seconds added to the time of an error that follows from another rank's, so that the launcher
takes that one for the cause: clocks of machines differ, and torchrun compares whole seconds."""


@dataclass
class ErrorReport:
    """What training adds to the report of an error that ends this process."""

    folder: Path | None = None
    """Of the run: for a traceback."""
    is_first: Callable[[], bool] | None = None
    """Whether no other rank has failed before."""


ERROR_REPORT = ErrorReport()
"""The process's own."""


def run_rank(main: Callable[[], int | None]) -> NoReturn:
    """Ends the process with main()'s status: 2 for a ConfigError, 130 for Ctrl-C, 1 otherwise."""
    if LAUNCHED in os.environ:
        threading.Thread(target=_follow_launcher, name="launcher watch", daemon=True).start()
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


def _follow_launcher() -> None:
    """Ends this process once its launcher is gone, even while a collective hangs."""
    while os.getppid() == int(os.environ[LAUNCHED]):
        time.sleep(0.3)
    os._exit(1)


def end_rank(error: Exception, first: bool | None = None) -> NoReturn:
    """Ends the process, from any of its threads, and reports why unless another rank was first.

    first: whether this one was, where that is known.
    """
    now, (text, status) = time.time(), explain(error, ERROR_REPORT.folder)
    if first is None and ERROR_REPORT.is_first:
        first = ERROR_REPORT.is_first()
    elif first is None:  # they have not met: a mistake of the user's is one of all ranks
        alone = isinstance(error, PlaceError) or not isinstance(error, ConfigError)
        first = alone or reports_for_machine()
    is_cause = first and not is_lost_connection(error)
    if not record(f"error: {text}", now if is_cause else now + LATER) and first:
        print(f"error: {text}", file=sys.stderr)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    # The interpreter's own ending can hang in a communicator whose peers are gone.
    os._exit(status)


def record(text: str, when: float) -> bool:
    """Leaves an error for the launcher, in torchrun's format; whether that will report it.

    See torch.distributed.elastic.multiprocessing.errors.
    """
    if not os.environ.get(ERROR_FILE):
        return False
    message = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": when}}
    try:
        leave(Path(os.environ[ERROR_FILE]), message=message)
    except OSError:
        return False
    # torchrun starts ranks again without a word of what has ended them.
    tries = [f"TORCHELASTIC_{name}" for name in ("RESTART_COUNT", "MAX_RESTARTS")]
    made, most = (int(os.environ.get(name, "0")) for name in tries)
    return LAUNCHED in os.environ or made >= most


def leave(path: Path, **values: Any) -> None:
    """For the launcher, which may read at any time; a signal may come in the middle."""
    part = path.with_suffix(".part")  # not synced: that can take seconds, and others end meanwhile
    part.write_text(json.dumps(values))
    part.replace(path)
