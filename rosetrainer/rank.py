"""How a rank ends: its error is shown once, and it never outlives its launcher.

Imports no torch, so that a rank is under watch before its seconds of importing begin.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from rosetrainer.fields import ConfigError

LAUNCHED = "ROSETRAINER_LAUNCHED"
"""Environment variable that rosetrainer.launch gives its ranks: the launcher's process id."""

PIPE_CLOSED = 128 + signal.SIGPIPE
"""Exit status when the reader of our output, `head` say, has gone: there is nothing to say."""

GRACE_SECONDS = 3
"""Time that a rank has to end by itself after SIGTERM."""


def run_rank(main: Callable[[], int | None]) -> NoReturn:
    """Ends the process with main()'s status: 2 for a ConfigError, 130 for Ctrl-C, 1 otherwise.

    Under rosetrainer.launch an error goes to torchelastic's error file and the launcher prints
    it. Under torchrun one rank of each machine speaks for all: they make the same mistake.
    """
    launched = os.environ.get(LAUNCHED)
    if launched:
        _watch(int(launched))
        # Rank 0's lines should reach a pipe or a log file while it runs, not when it ends.
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    speaks = not launched and os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        status = main()
    except ConfigError as error:
        if launched:
            _report_to_launcher(error, 2)
        if speaks:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os._exit(PIPE_CLOSED)
    except KeyboardInterrupt:
        if speaks:
            print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if launched:
            _report_to_launcher(error, 1)
        raise
    sys.exit(status)


def _report_to_launcher(error: Exception, status: int) -> NoReturn:
    """Writes the error file in the format that torchelastic reads, and ends the process.

    Besides torchelastic's fields it holds the time unrounded: a rank's error breaks the
    connections of the others within milliseconds, and the first one is the cause.
    """
    now = time.time()
    frames = error.__traceback__.tb_next if error.__traceback__ else None
    details = {
        "py_callstack": "".join(traceback.format_exception(type(error), error, frames)),
        "timestamp": str(int(now)),
        "time": now,
        "mistake": str(error) if isinstance(error, ConfigError) else None,
    }
    message = {"message": f"{type(error).__name__}: {error}", "extraInfo": details}
    try:
        path = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"message": message}))
        part.replace(path)  # whole or not at all: a SIGTERM may come in the middle
    except (KeyError, OSError):
        print(details["py_callstack"], file=sys.stderr, end="")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # The interpreter's own ending can hang in a communicator whose peers are gone.
    os._exit(status)


def _watch(launcher: int) -> None:
    """Ends this process if its launcher is gone, or if it outlives a SIGTERM for too long.

    A rank that hangs in a collective runs no Python code in its main thread, a signal handler
    included, but the interpreter still writes the signal's number to the wakeup descriptor.
    """
    signals, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)

    def watch() -> None:
        deadline = math.inf
        while os.getppid() == launcher and time.monotonic() < deadline:
            if not select.select([signals], [], [], 0.5)[0]:
                continue
            if {signal.SIGINT, signal.SIGTERM}.intersection(os.read(signals, 64)):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="launcher watch", daemon=True).start()
