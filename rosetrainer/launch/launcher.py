"""Ranks on this machine: starts them, ends them together, reports the first error once.

They are in sessions of their own, so a terminal's Ctrl-C reaches the launcher only, and they meet
in a folder, so nothing has to listen on a port. For more than one machine there is torchrun.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rosetrainer.environment import LAUNCHED, usable_cores
from rosetrainer.launch.interfaces import INTERFACE, local_interface
from rosetrainer.launch.rank import ERROR_FILE, PIPE_CLOSED, RENDEZVOUS_DIR, memory_advice
from rosetrainer.launch.stop import SECOND_SIGNAL_SECONDS, STOP, STOP_FILE, STOP_MARGIN, on_signals
from rosetrainer.validation import ConfigError

POLL_SECONDS = 0.05
TERMINATE_SECONDS = 3  # for a rank to end by itself after another one has failed
STOP_SECONDS = 9  # at least, for the ranks to save and leave after a signal
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

Ranks = list[subprocess.Popen[bytes]]
Received = list[tuple[signal.Signals, float]]  # signals to the launcher, and when they have come


def launch(nproc: int, argv: list[str], threads: int = 0, module: str = "rosetrainer") -> int:
    """Runs `python -m module argv...` as nproc ranks; returns the exit status for all of them.

    0 if all ranks end well, 2 for a user's mistake (a rank's ConfigError), 128 + n if signal n
    stopped the launcher (0 for a SIGTERM after which all ranks end well), otherwise 1. A rank has
    `threads` CPU threads; 0 leaves OMP_NUM_THREADS as the user set it, or else shares the cores.
    The ranks call `launch.rank.run_rank`. Call it from the main thread of a process that ends after
    it: signals stay noted. Raises ConfigError for nproc < 1, or if ranks cannot reach each other.
    """
    if nproc < 1:
        raise ConfigError(f"nproc={nproc} must be 1 or more")
    ranks, received = Ranks(), Received()
    on_signals(lambda signum: received.append((signum, time.monotonic())), *SIGNALS)
    with tempfile.TemporaryDirectory(prefix="rosetrainer_", ignore_cleanup_errors=True) as folder:
        environment = _rank_environment(nproc, threads) | {RENDEZVOUS_DIR: folder}
        try:
            for rank in range(nproc):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                own[ERROR_FILE] = f"{folder}/error_{rank}.json"
                command = [sys.executable, "-m", module, *argv]
                process = subprocess.Popen(command, env=environment | own, start_new_session=True)
                ranks.append(process)
            while None in _statuses(ranks) and not any(_statuses(ranks)) and not received:
                time.sleep(POLL_SECONDS)
            time.sleep(POLL_SECONDS)  # the cause may be seen later than what follows from it
            statuses = _statuses(ranks)
            for process in ranks:
                process.terminate()  # does nothing to one that has ended
                process.send_signal(signal.SIGCONT)  # one that is suspended would not see it
            if received:
                return _stop(ranks, folder, received)
            return _fail(ranks, folder, statuses) if any(statuses) else 0
        finally:
            for process in ranks:
                process.kill()
                process.wait()


def _rank_environment(nproc: int, threads: int) -> dict[str, str]:
    """What all ranks share."""
    environment = {
        "OMP_NUM_THREADS": str(max(1, usable_cores() // nproc)),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # warnings about sockets, which mean nothing here
        **os.environ,  # the user's settings win
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        LAUNCHED: str(os.getpid()),
    }
    if threads > 0:
        environment["OMP_NUM_THREADS"] = str(threads)
    if nproc > 1:
        environment[INTERFACE] = local_interface()
    return environment


def _statuses(ranks: Ranks) -> list[int | None]:
    """The exit status of each, or None while it runs."""
    return [rank.poll() for rank in ranks]


def _fail(ranks: Ranks, folder: str, statuses: list[int | None]) -> int:
    """Waits for the others' end, and prints why, by the statuses before, the first has failed."""
    end = time.monotonic() + TERMINATE_SECONDS
    while None in _statuses(ranks) and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
    failures = [_failure(folder, rank, status) for rank, status in enumerate(statuses) if status]
    _, _, status, why = min(failures)
    if status != PIPE_CLOSED:
        _say(why)
    return status if status in (2, PIPE_CLOSED) else 1


def _failure(folder: str, rank: int, status: int) -> tuple[float, int, int, str]:
    """(when, rank, status, why). One that was killed or has crashed leaves no error: it is first,
    for that follows from no other rank's end."""
    if error := _read(f"{folder}/error_{rank}.json").get("message"):
        return error["extraInfo"]["timestamp"], rank, status, error["message"]
    why = f"error: rank {rank} ended with exit status {status}"
    if status < 0:
        name = next((known.name for known in signal.Signals if known == -status), "real-time")
        why = f"error: rank {rank} was killed by signal {-status} ({name})"
    if status == -signal.SIGKILL:
        why += f"; if the machine ran out of memory: {memory_advice()}"
    return 0.0, rank, status, why


def _stop(ranks: Ranks, folder: str, received: Received) -> int:
    """Lets the ranks save and leave, and prints one line; those that are left then are killed.

    They have as long as rank 0 has measured, at most the grace time.
    """
    (signum, since), grace = received[0], STOP.grace
    said = "interrupted" if signum == signal.SIGINT else f"stopped by {signum.name}"
    needed, seconds = 0.0, float(STOP_SECONDS)
    while None in _statuses(ranks) and time.monotonic() < since + min(seconds, grace):
        if received[-1][1] > since + SECOND_SIGNAL_SECONDS:
            _say(f"{said}; all ranks were killed")
            return 128 + signum
        report = _read(f"{folder}/{STOP_FILE}")
        if not needed and (needed := report.get("seconds", 0.0)):
            seconds = max(STOP_SECONDS, STOP_MARGIN * needed)
            if needed >= STOP_SECONDS:
                _say(report["wait"] + f"; --grace gives {grace:g} s" * (needed > grace))
        time.sleep(POLL_SECONDS)
    statuses = _statuses(ranks)
    fate = _read(f"{folder}/{STOP_FILE}").get("end") or "all ranks have ended"
    if left := [str(rank) for rank, status in enumerate(statuses) if status is None]:
        names = f"ranks {', '.join(left)} were" if len(left) > 1 else f"rank {left[0]} was"
        after = f" after {grace:g} s; --grace gives them longer" * (needed > grace)
        fate += f", {names} killed{after}"
    _say(f"{said}; {fate}")
    return 0 if signum == signal.SIGTERM and not any(statuses) and not left else 128 + signum


def _read(path: str) -> dict[str, Any]:
    """What launch.rank.leave has written, if it has."""
    return dict(json.loads(Path(path).read_text())) if os.path.exists(path) else {}


def _say(text: str) -> None:
    """Prints to standard error; on a terminal below the progress bar that may stand there."""
    print("\n" * sys.stderr.isatty() + text, file=sys.stderr)
