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
from typing import NoReturn

from rosetrainer import environment
from rosetrainer.launch.errors import explain, lost_connection
from rosetrainer.validation import ConfigError

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # variable, torchrun's too: a rank leaves its error there
RENDEZVOUS_DIR = "ROSETRAINER_RENDEZVOUS_DIR"  # variable: where the ranks of our launcher meet
PIPE_CLOSED = 128 + signal.SIGPIPE  # exit status when nobody reads our output any more, as `head`

LATER = 60
"""Seconds added to the time of an error that follows from another rank's, so that the launcher
takes that one for the cause: clocks of machines differ, and torchrun compares whole seconds."""


@dataclass
class ErrorReport:
    """What training adds to the report of an error that ends this process."""

    folder: Path | None = None  # of the run: for a traceback
    is_first: Callable[[], bool] | None = None  # whether no other rank has failed before


ERROR_REPORT = ErrorReport()


def run_rank(main: Callable[[], int | None]) -> NoReturn:
    """Ends the process with main()'s status: 2 for a ConfigError, 130 for Ctrl-C, 1 otherwise."""
    if environment.LAUNCHED in os.environ:
        threading.Thread(target=_follow_launcher, name="launcher watch", daemon=True).start()
        # Rank 0's lines should reach a pipe or a log file while it runs, not when it ends.
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        status = main()
    except BrokenPipeError:
        os._exit(PIPE_CLOSED)
    except KeyboardInterrupt:
        if environment.reports_for_machine():
            print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        end_rank(error)
    sys.exit(status)


def _follow_launcher() -> None:
    """Ends this process once its launcher is gone, even while a collective hangs."""
    while os.getppid() == int(os.environ[environment.LAUNCHED]):
        time.sleep(0.3)
    os._exit(1)


def end_rank(error: Exception) -> NoReturn:
    """Ends the process, from any of its threads, and reports why unless another rank was first."""
    now, (text, status) = time.time(), explain(error, ERROR_REPORT.folder)
    if ERROR_REPORT.is_first:
        first = ERROR_REPORT.is_first()
    else:  # they have not met: a mistake of the user's is one of all ranks
        alone = isinstance(error, environment.PlaceError) or not isinstance(error, ConfigError)
        first = alone or environment.reports_for_machine()
    follows = not first or lost_connection(error)
    if not record(f"error: {text}", now + LATER * follows) and first:
        print(f"error: {text}", file=sys.stderr)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # The interpreter's own ending can hang in a communicator whose peers are gone.
    os._exit(status)


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
