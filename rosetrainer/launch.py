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
from pathlib import Path
from types import FrameType

from rosetrainer.environment import usable_cores
from rosetrainer.fields import ConfigError
from rosetrainer.interfaces import INTERFACE, local_interface
from rosetrainer.rank import LAST_WORDS, LAUNCHED, MEETING, PIPE_CLOSED, error_file, memory_advice

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
CRASHES = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
"""Signals by which a rank dies of itself or by the system, never because another rank failed."""

LOOK_SECONDS = 0.05
"""Time between two looks at the ranks."""

GRACE_SECONDS = 3
"""Time that a rank has to end by itself after another one has failed."""

STOP_SECONDS = 9
"""Time that the ranks have to save and leave after a signal; docker, say, kills us after 10."""

ONE_WISH_SECONDS = 1
"""A terminal and a parent process may both send a signal; so soon again it is no impatience."""

STOPPED_SECONDS = 5
"""How long a rank may be suspended (SIGSTOP) after a signal; it takes no notice of that signal."""

Ranks = list[subprocess.Popen[bytes]]


def launch(nproc: int, argv: list[str], threads: int = 0, module: str = "rosetrainer") -> int:
    """Runs `python -m module argv...` as nproc ranks; returns the exit status for all of them.

    0 if all ranks end well, 2 for a user's mistake (a rank's ConfigError), 128 + n if signal n
    stopped the launcher (130 for Ctrl-C; 0 for a SIGTERM after which all ranks end well),
    otherwise 1. A rank has `threads` CPU threads; 0 leaves OMP_NUM_THREADS as the user set it, or
    else shares the cores. The ranks call `rosetrainer.rank.run_rank`. Call it from the main
    thread. Raises ConfigError for nproc < 1, or if this machine's ranks cannot reach each other.
    """
    if nproc < 1:
        raise ConfigError(f"nproc={nproc} must be 1 or more")
    with (
        _note_signals() as received,
        tempfile.TemporaryDirectory(prefix="rosetrainer_", ignore_cleanup_errors=True) as folder,
    ):
        ranks: Ranks = []
        environment = _rank_environment(nproc, threads) | {MEETING: folder}
        try:
            for rank in range(nproc):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                ranks.append(_start([sys.executable, "-m", module, *argv], environment | place))
            failures = _wait(ranks, folder, received)
            if received:
                return _stop(ranks, received, folder)
            if not failures:
                return 0
            _end(ranks, received)
            return _report(min(failures, key=_Failure.order))
        finally:
            _kill(ranks)


def _start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A rank whose signals wait until run_rank takes them: it may want to end in its own way."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return subprocess.Popen(command, env=environment, start_new_session=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@dataclass(frozen=True)
class _Failure:
    """How a rank ended, and what it wrote about that (see rosetrainer.rank)."""

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
    end = math.inf
    while True:
        statuses = [rank.poll() for rank in ranks]
        failures = [_failure(rank, n, folder) for rank, n in enumerate(statuses) if n]
        if received or None not in statuses or time.monotonic() >= end:
            return failures
        if failures:
            explained = any(failure.text != "" for failure in failures)
            end = min(end, time.monotonic() + (LOOK_SECONDS if explained else GRACE_SECONDS))
        time.sleep(LOOK_SECONDS)


def _failure(rank: int, status: int, folder: str) -> _Failure:
    try:
        written = json.loads(error_file(folder, rank).read_text())
    except FileNotFoundError:
        return _Failure(rank, status, None, math.inf)
    return _Failure(rank, status, written["text"], written["time"])


def _end(ranks: Ranks, received: list[tuple[int, float]]) -> None:
    """Ends the ranks that another one's failure has left; at once if a signal comes meanwhile."""
    for rank in ranks:
        rank.terminate()
    end = time.monotonic() + GRACE_SECONDS
    while None in [rank.poll() for rank in ranks] and time.monotonic() < end and not received:
        time.sleep(LOOK_SECONDS)
    _kill(ranks)


def _report(failure: _Failure) -> int:
    """Prints a failure; returns the exit status that it stands for."""
    if failure.status == PIPE_CLOSED:
        return PIPE_CLOSED
    if failure.text:
        _say(f"error: {failure.text}")
    elif failure.status < 0:
        name = {s.value: s.name for s in signal.Signals}.get(-failure.status, "unknown")
        is_kill = failure.status == -signal.SIGKILL
        hint = f"; if the machine ran out of memory: {memory_advice()}" if is_kill else ""
        _say(f"error: rank {failure.rank} was killed by signal {-failure.status} ({name}){hint}")
    else:
        _say(f"error: rank {failure.rank} ended with exit status {failure.status}")
    return 2 if failure.status == 2 else 1


def _stop(ranks: Ranks, received: list[tuple[int, float]], folder: str) -> int:
    """Passes the signal on, lets the ranks save and leave, and kills those that do not.

    Says it in one line, with rank 0's last words if it had any.
    """
    signum, since = received[0]
    interrupted = signum == signal.SIGINT
    said = "interrupted" if interrupted else f"stopped by {signal.Signals(signum).name}"
    for rank in ranks:
        rank.send_signal(signal.SIGINT if interrupted else signal.SIGTERM)
    end = since + STOP_SECONDS
    killed: list[int] = []
    stopped: dict[int, float] = {}  # rank -> since when
    while running := [number for number, rank in enumerate(ranks) if rank.poll() is None]:
        now = time.monotonic()
        if received[-1][1] > since + ONE_WISH_SECONDS:
            _kill(ranks)
            _say(f"{said}; all ranks were killed")
            return 128 + signum
        stopped = {n: stopped.get(n, now) for n in running if _is_stopped(ranks[n].pid)}
        frozen = [n for n in stopped if now >= stopped[n] + STOPPED_SECONDS]
        for number in running if now >= end else frozen:
            ranks[number].kill()
            killed = sorted({*killed, number})
            end = min(end, now + GRACE_SECONDS)  # without it its peers wait in vain
        time.sleep(LOOK_SECONDS)
    names = f"rank{'s' * (len(killed) > 1)} {', '.join(map(str, killed))}"
    fate = f", {names} {'were' if len(killed) > 1 else 'was'} killed" if killed else ""
    words = Path(folder) / LAST_WORDS
    told = words.read_text() if words.exists() else "all ranks have ended"
    _say(f"{said}; {told}{fate}")
    saved = signum == signal.SIGTERM and not any(rank.returncode for rank in ranks)
    return 0 if saved else 128 + signum


def _is_stopped(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    if stat.exists():
        state = stat.read_text().rpartition(")")[2]
    else:
        ps = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True)
        state = ps.stdout
    return state.strip().startswith(("T", "t"))


def _kill(ranks: Ranks) -> None:
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.wait()


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


def _say(text: str) -> None:
    """Prints to standard error; on a terminal below the progress bar that may stand there."""
    print("\n" * sys.stderr.isatty() + text, file=sys.stderr)
