"""Ranks on this machine: starts them, ends them together, reports the first error once.

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
from pathlib import Path
from types import FrameType

from rosetrainer.environment import usable_cores
from rosetrainer.launch.failures import memory_advice
from rosetrainer.launch.interfaces import INTERFACE, local_interface
from rosetrainer.launch.rank import (
    ERROR_FILE,
    GRACE,
    LAUNCHED,
    PIPE_CLOSED,
    RENDEZVOUS_DIR,
    STOP_MESSAGE,
    STOP_SECONDS_FILE,
    stop_line,
)
from rosetrainer.launch.stop import SECOND_SIGNAL_SECONDS
from rosetrainer.validation import ConfigError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
CRASHES = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
"""Signals by which a rank dies of itself or by the system, never because another rank failed."""

POLL_SECONDS = 0.05
TERMINATE_SECONDS = 3
"""Time that a rank has to end by itself after another one has failed."""
STOP_SECONDS = 9
"""Time that the ranks have, at least, to save and leave after a signal."""
STOP_MARGIN = 1.5
"""Times what the ranks were measured to need, for they may be slower now."""
SUSPENDED_SECONDS = 5
"""How long a rank may be suspended (SIGSTOP) after a signal, which then does not reach it."""

ERROR_NAME = "error_{:05}.json"
Ranks = list[subprocess.Popen[bytes]]
Signals = list[tuple[int, float]]  # (number, time) of each that has come


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
        tempfile.TemporaryDirectory(prefix="rosetrainer_", ignore_cleanup_errors=True) as name,
    ):
        ranks: Ranks = []
        folder = Path(name)
        environment = _rank_environment(nproc, threads) | {RENDEZVOUS_DIR: name}
        try:
            for rank in range(nproc):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                own[ERROR_FILE] = str(folder / ERROR_NAME.format(rank))
                ranks.append(_start([sys.executable, "-m", module, *argv], environment | own))
            failed = _wait(ranks, received)
            if received:
                return stop(ranks, received, folder, grace)
            _end(ranks, received)
            return _report(failed, folder) if failed else 0
        finally:
            kill(ranks)


def _start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A rank whose signals wait until run_rank takes them: it may want to end in its own way."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return subprocess.Popen(command, env=environment, start_new_session=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _wait(ranks: Ranks, received: Signals) -> dict[int, int]:
    """Waits for the end of all ranks, for a failure or for a signal; gives failed ranks' statuses.

    After the first failure it looks once more, since the cause may be the one seen later.
    """
    failed: dict[int, int] = {}
    while True:
        seen, statuses = bool(failed), [rank.poll() for rank in ranks]
        failed = {rank: status for rank, status in enumerate(statuses) if status}
        if received or None not in statuses or seen:
            return failed
        time.sleep(POLL_SECONDS)


def _error(folder: Path, rank: int) -> tuple[str, float, float]:
    """(text, whether another rank was first, time), see launch.rank.record; the text may be ""."""
    if not (text := _read(folder / ERROR_NAME.format(rank))):
        return "", math.inf, math.inf
    message = json.loads(text)["message"]
    details = message["extraInfo"]
    return message["message"], not details["first"], details["timestamp"]


def _report(failed: dict[int, int], folder: Path) -> int:
    """Prints why the first of the ranks has failed; returns the exit status for all.

    A crash follows from no other rank's end; else the first error is the cause.
    """
    is_own = {n: -status in CRASHES or status == PIPE_CLOSED for n, status in failed.items()}
    rank = min(failed, key=lambda n: (not is_own[n], _error(folder, n)[1:]))
    status, text = failed[rank], _error(folder, rank)[0]
    if status == PIPE_CLOSED:
        return PIPE_CLOSED
    if status < 0 and not text:
        name = {s.value: s.name for s in signal.Signals}.get(-status, "unknown")
        hint = f"; if the machine ran out of memory: {memory_advice()}"
        text = f"rank {rank} was killed by signal {-status} ({name})"
        text += hint * (status == -signal.SIGKILL)
    say(f"error: {text or f'rank {rank} ended with exit status {status}'}")
    return 2 if status == 2 else 1


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
def _note_signals() -> Iterator[Signals]:
    """The list to which each signal that would end us is added for a while."""
    received: Signals = []

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


def _end(ranks: Ranks, received: Signals) -> None:
    """Ends the ranks that another one's failure has left; at once if a signal comes meanwhile."""
    for rank in ranks:
        rank.terminate()  # does nothing to one that has ended
    end = time.monotonic() + TERMINATE_SECONDS
    while None in [rank.poll() for rank in ranks] and time.monotonic() < end and not received:
        time.sleep(POLL_SECONDS)
    kill(ranks)


def stop(ranks: Ranks, received: Signals, folder: Path, grace: float) -> int:
    """Passes the signal on, lets the ranks save and leave, and kills those that do not.

    They have as long as rank 0 has measured, at most `grace` seconds. Prints one line.
    """
    signum, since = received[0]
    said = f"stopped by {signal.Signals(signum).name}".replace("stopped by SIGINT", "interrupted")
    for rank in ranks:
        rank.send_signal(signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM)
    end, needed = since + min(STOP_SECONDS, grace), 0.0
    killed: set[int] = set()
    suspended: dict[int, float] = {}  # rank -> since when
    while running := [number for number, rank in enumerate(ranks) if rank.poll() is None]:
        now = time.monotonic()
        if received[-1][1] > since + SECOND_SIGNAL_SECONDS:
            kill(ranks)
            say(f"{said}; all ranks were killed")
            return 128 + signum
        if not needed and (needed := float(_read(folder / STOP_SECONDS_FILE) or 0)):
            end = since + min(max(STOP_SECONDS, STOP_MARGIN * needed), grace)
            if needed >= STOP_SECONDS:
                say(stop_line(needed) + f"; --grace gives {grace:g} s" * (needed > grace))
        suspended = {n: suspended.get(n, now) for n in running if is_suspended(ranks[n].pid)}
        for n in running:
            if now >= min(end, suspended.get(n, math.inf) + SUSPENDED_SECONDS):
                ranks[n].kill()
                killed.add(n)
        if killed:
            end = min(end, now + TERMINATE_SECONDS)  # without it its peers wait in vain
        time.sleep(POLL_SECONDS)
    names = ", ".join(map(str, sorted(killed)))
    fate = f", ranks {names} were killed" if len(killed) > 1 else f", rank {names} was killed"
    if needed > grace:
        fate += f" after {grace:g} s; --grace gives them longer"
    say(f"{said}; {_read(folder / STOP_MESSAGE) or 'all ranks have ended'}{fate * bool(killed)}")
    saved = signum == signal.SIGTERM and not any(rank.returncode for rank in ranks)
    return 0 if saved else 128 + signum


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def is_suspended(pid: int) -> bool:
    ps = ["ps", "-o", "state=", "-p", str(pid)]
    stat = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2]
    state = stat or subprocess.run(ps, capture_output=True, text=True).stdout
    return state.strip().startswith(("T", "t"))


def kill(ranks: Ranks) -> None:
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.wait()


def say(text: str) -> None:
    """Prints to standard error; on a terminal below the progress bar that may stand there."""
    print("\n" * sys.stderr.isatty() + text, file=sys.stderr)
