"""Ranks on this machine: starts them, ends them together, shows the first error once.

They are in sessions of their own, so a terminal's Ctrl-C reaches the launcher only, and they meet
in a folder, so nothing has to listen on a port. For more than one machine there is torchrun.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from rosetrainer.environment import usable_cores
from rosetrainer.launch import ending
from rosetrainer.launch.ending import Ranks, end, kill, say, stop
from rosetrainer.launch.interfaces import INTERFACE, local_interface
from rosetrainer.launch.rank import (
    GRACE,
    LAUNCHED,
    PIPE_CLOSED,
    RENDEZVOUS_DIR,
    error_file,
    memory_advice,
)
from rosetrainer.validation import ConfigError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
CRASHES = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
"""Signals by which a rank dies of itself or by the system, never because another rank failed."""


def launch(
    nproc: int,
    argv: list[str],
    threads: int = 0,
    module: str = "rosetrainer",
    grace: float = GRACE,
) -> int:
    """Runs `python -m module argv...` as nproc ranks; returns the exit status for all of them.

    0 if all ranks end well, 2 for a user's mistake (a rank's ConfigError), 128 + n if signal n
    stopped the launcher (130 for Ctrl-C; 0 for a SIGTERM after which all ranks end well),
    otherwise 1. A rank has `threads` CPU threads; 0 leaves OMP_NUM_THREADS as the user set it, or
    else shares the cores. grace: seconds that ranks have to save and leave after a signal, if
    they need so long. The ranks call `launch.rank.run_rank`. Call it from the main thread.
    Raises ConfigError for nproc < 1, or if this machine's ranks cannot reach each other.
    """
    if nproc < 1:
        raise ConfigError(f"nproc={nproc} must be 1 or more")
    with (
        _note_signals() as received,
        tempfile.TemporaryDirectory(prefix="rosetrainer_", ignore_cleanup_errors=True) as folder,
    ):
        ranks: Ranks = []
        environment = _rank_environment(nproc, threads) | {RENDEZVOUS_DIR: folder}
        try:
            for rank in range(nproc):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                ranks.append(_start([sys.executable, "-m", module, *argv], environment | place))
            failures = _wait(ranks, folder, received)
            if received:
                return stop(ranks, received, folder, grace)
            if not failures:
                return 0
            end(ranks, received)
            return _report(min(failures, key=_Failure.order))
        finally:
            kill(ranks)


def _start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A rank whose signals wait until run_rank takes them: it may want to end in its own way."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return subprocess.Popen(command, env=environment, start_new_session=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@dataclass(frozen=True)
class _Failure:
    """How a rank ended, and what it wrote about that (see rosetrainer.launch.rank)."""

    rank: int
    status: int  # -n: killed by signal n
    text: str | None  # None where it could not write, "" where another rank speaks for it
    time: float

    def order(self) -> tuple[int, float]:
        """The smallest is the cause: a rank's end breaks the connections of all others."""
        if -self.status in CRASHES or self.status == PIPE_CLOSED:
            return 0, self.time  # nothing that another rank does ends a rank like this
        if self.text:
            return 1, self.time
        return (2 if self.text is None else 3), self.time


def _wait(ranks: Ranks, folder: str, received: list[tuple[int, float]]) -> list[_Failure]:
    """Waits for the end of all ranks, for a failure or for a signal; returns the failures.

    After the first failure it looks once more, since the cause may be the one seen later. And if
    the first ones leave it to another rank to say why, that one has time to say it.
    """
    latest = math.inf
    while True:
        statuses = [rank.poll() for rank in ranks]
        failures = [_failure(rank, n, folder) for rank, n in enumerate(statuses) if n]
        if received or None not in statuses or time.monotonic() >= latest:
            return failures
        if failures:
            explained = any(failure.text != "" for failure in failures)
            latest = min(
                latest,
                time.monotonic() + (ending.LOOK_SECONDS if explained else ending.GRACE_SECONDS),
            )
        time.sleep(ending.LOOK_SECONDS)


def _failure(rank: int, status: int, folder: str) -> _Failure:
    try:
        written = json.loads(error_file(folder, rank).read_text())
    except FileNotFoundError:
        return _Failure(rank, status, None, math.inf)
    return _Failure(rank, status, written["text"], written["time"])


def _report(failure: _Failure) -> int:
    """Prints a failure; returns the exit status that it stands for."""
    if failure.status == PIPE_CLOSED:
        return PIPE_CLOSED
    if failure.text:
        say(f"error: {failure.text}")
    elif failure.status < 0:
        name = {s.value: s.name for s in signal.Signals}.get(-failure.status, "unknown")
        is_kill = failure.status == -signal.SIGKILL
        hint = f"; if the machine ran out of memory: {memory_advice()}" if is_kill else ""
        say(f"error: rank {failure.rank} was killed by signal {-failure.status} ({name}){hint}")
    else:
        say(f"error: rank {failure.rank} ended with exit status {failure.status}")
    return 2 if failure.status == 2 else 1


def _rank_environment(nproc: int, threads: int) -> dict[str, str]:
    """The environment that all ranks share; but for `threads`, the user's settings win."""
    defaults = {
        "OMP_NUM_THREADS": str(max(1, usable_cores() // nproc)),
        # Warnings of torch's C++ side about sockets, which tell a user of one machine nothing.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if nproc > 1:
        defaults[INTERFACE] = local_interface()
    environment = defaults | dict(os.environ)
    if threads > 0:
        environment["OMP_NUM_THREADS"] = str(threads)
    world = {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)}
    return environment | world | {LAUNCHED: str(os.getpid())}


@contextlib.contextmanager
def _note_signals() -> Iterator[list[tuple[int, float]]]:
    """The list to which (signal, time) of each signal that would end us is added for a while."""
    received: list[tuple[int, float]] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append((signum, time.monotonic()))

    # One that is ignored stays ignored: nohup, or a shell's background job.
    handled = [s for s in STOP_SIGNALS if signal.getsignal(s) != signal.SIG_IGN]
    before = {s: signal.signal(s, note) for s in handled}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
