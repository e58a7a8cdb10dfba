"""Ranks on this machine: starts them, ends them together, reports the first error once.

They are in sessions of their own, so a terminal's Ctrl-C reaches the launcher only, and they meet
in a folder, so nothing has to listen on a port. For more than one machine there is torchrun.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rosetrainer.environment import LAUNCHED, usable_cores
from rosetrainer.launch.failures import memory_advice
from rosetrainer.launch.interfaces import INTERFACE, local_interface
from rosetrainer.launch.rank import ERROR_FILE, PIPE_CLOSED, RENDEZVOUS_DIR
from rosetrainer.launch.stop import STOP, STOP_FILE, stop_line
from rosetrainer.validation import ConfigError

CRASHES = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
"""Signals by which a rank dies of itself or by the system, never because another rank failed."""

POLL_SECONDS = 0.05
TERMINATE_SECONDS = 3
"""Time that a rank has to end by itself after another one has failed."""
STOP_SECONDS = 9
"""Time that the ranks have, at least, to save and leave after a signal."""
STOP_MARGIN = 1.5
"""Times what the ranks were measured to need, for they may be slower now."""

Ranks = list[subprocess.Popen[bytes]]


def launch(nproc: int, argv: list[str], threads: int = 0, module: str = "rosetrainer") -> int:
    """Runs `python -m module argv...` as nproc ranks; returns the exit status for all of them.

    0 if all ranks end well, 2 for a user's mistake (a rank's ConfigError), 128 + n if signal n
    stopped the launcher (130 for Ctrl-C; 0 for a SIGTERM after which all ranks end well),
    otherwise 1. A rank has `threads` CPU threads; 0 leaves OMP_NUM_THREADS as the user set it, or
    else shares the cores. The ranks call `launch.rank.run_rank`. Call it from the main thread of a
    process that ends after it: signals stay noted. Raises ConfigError for nproc < 1, or if this
    machine's ranks cannot reach each other.
    """
    if nproc < 1:
        raise ConfigError(f"nproc={nproc} must be 1 or more")
    STOP.listen(launches=True)
    ranks: Ranks = []
    with tempfile.TemporaryDirectory(prefix="rosetrainer_", ignore_cleanup_errors=True) as name:
        folder, environment = Path(name), _rank_environment(nproc, threads)
        try:
            for rank in range(nproc):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), RENDEZVOUS_DIR: name}
                own[ERROR_FILE] = str(_error_file(folder, rank))
                command = [sys.executable, "-m", module, *argv]
                process = subprocess.Popen(command, env=environment | own, start_new_session=True)
                ranks.append(process)
            while _running(ranks) and not _failed(ranks) and not STOP.signal:
                time.sleep(POLL_SECONDS)
            if STOP.signal:
                return _stop(ranks, folder, STOP.signal)
            return _fail(ranks, folder) if _failed(ranks) else 0
        finally:
            for process in ranks:
                process.kill()
            for process in ranks:
                process.wait()


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


def _running(ranks: Ranks) -> list[int]:
    return [number for number, rank in enumerate(ranks) if rank.poll() is None]


def _failed(ranks: Ranks) -> dict[int, int]:
    """The exit statuses of those that have not ended well."""
    return {number: status for number, rank in enumerate(ranks) if (status := rank.poll())}


def _terminate(ranks: Ranks) -> None:
    for rank in ranks:
        rank.terminate()  # does nothing to one that has ended
        rank.send_signal(signal.SIGCONT)  # one that is suspended would not see it


def _fail(ranks: Ranks, folder: Path) -> int:
    """Ends the ranks that another one's failure has left, and prints why the first has failed.

    A crash follows from no other rank's end; else the first error is the cause. It may be seen
    later than what follows from it.
    """
    time.sleep(POLL_SECONDS)
    failed = _failed(ranks)
    _terminate(ranks)
    end = time.monotonic() + TERMINATE_SECONDS
    while _running(ranks) and time.monotonic() < end and not STOP.signal:
        time.sleep(POLL_SECONDS)
    crashed = [n for n, status in failed.items() if -status in CRASHES or status == PIPE_CLOSED]
    errors = {rank: _read(_error_file(folder, rank)).get("message", {}) for rank in failed}
    times = {n: one["extraInfo"]["timestamp"] if one else math.inf for n, one in errors.items()}
    rank = min(crashed or failed, key=lambda n: times[n])
    status = failed[rank]
    if status == PIPE_CLOSED:
        return PIPE_CLOSED
    text = f"error: rank {rank} ended with exit status {status}"
    if status < 0:
        name = next((known.name for known in signal.Signals if known == -status), "real-time")
        text = f"error: rank {rank} was killed by signal {-status} ({name})"
    if status == -signal.SIGKILL:
        text += f"; if the machine ran out of memory: {memory_advice()}"
    _say(errors[rank].get("message", text))
    return 2 if status == 2 else 1


def _stop(ranks: Ranks, folder: Path, signum: signal.Signals) -> int:
    """Lets the ranks save and leave, and prints one line; those that are left then are killed.

    They have as long as rank 0 has measured, at most the grace time.
    """
    said = "interrupted" if signum == signal.SIGINT else f"stopped by {signum.name}"
    grace, needed, seconds = STOP.time.grace, 0.0, float(STOP_SECONDS)
    _terminate(ranks)
    while (left := _running(ranks)) and time.monotonic() < STOP.since + min(seconds, grace):
        if STOP.again:
            _say(f"{said}; all ranks were killed")
            return 128 + signum
        if not needed and (needed := _read(folder / STOP_FILE).get("seconds", 0.0)):
            seconds = max(STOP_SECONDS, STOP_MARGIN * needed)
            if needed >= STOP_SECONDS:
                _say(stop_line(needed) + f"; --grace gives {grace:g} s" * (needed > grace))
        time.sleep(POLL_SECONDS)
    fate = _read(folder / STOP_FILE).get("message") or "all ranks have ended"
    if left:
        names = ", ".join(map(str, left))
        fate += f", ranks {names} were killed" if len(left) > 1 else f", rank {names} was killed"
        fate += f" after {grace:g} s; --grace gives them longer" * (needed > grace)
    _say(f"{said}; {fate}")
    saved = signum == signal.SIGTERM and not left and not _failed(ranks)
    return 0 if saved else 128 + signum


def _error_file(folder: Path, rank: int) -> Path:
    return folder / f"error_{rank}.json"


def _read(path: Path) -> dict[str, Any]:
    """What launch.rank.leave has written, if it has."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _say(text: str) -> None:
    """Prints to standard error; on a terminal below the progress bar that may stand there."""
    print("\n" * sys.stderr.isatty() + text, file=sys.stderr)
