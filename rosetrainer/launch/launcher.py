"""Ranks on this machine: starts them, ends them together, reports the first error once.

They are in sessions of their own, so a terminal's Ctrl-C reaches the launcher only. On one machine
they meet in a folder, so nothing has to listen on a port. Each of several has its own launcher.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time

from rosetrainer.environment import LAUNCHED, name_ranks, usable_cores
from rosetrainer.launch.errors import ERROR_FILE, memory_advice, recorded
from rosetrainer.launch.interfaces import INTERFACE, local_interface
from rosetrainer.launch.rank import PIPE_CLOSED, RENDEZVOUS_DIR, STOP, on_signals
from rosetrainer.validation import ConfigError

POLL_SECONDS = 0.05
TERMINATE_SECONDS = 3  # for a rank to end by itself after another one has failed
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

Ranks = dict[int, subprocess.Popen[bytes]]
Received = list[signal.Signals]  # signals to the launcher
Statuses = dict[int, int | None]  # the exit status of each rank, or None while it runs
Told = dict[int, tuple[float, str]]  # when and why each rank has ended, as it says itself


def launch(
    nproc: int,
    argv: list[str],
    threads: int = 0,
    module: str = "rosetrainer",
    machine: tuple[int, int] = (0, 1),
) -> int:
    """Runs `python -m module argv...` as nproc ranks; returns the exit status for all of them.

    0 if all ranks end well, 2 for a user's mistake (a rank's ConfigError), 128 + n if signal n
    stopped the launcher (0 for a SIGTERM after which all ranks end well), otherwise 1. A rank has
    `threads` CPU threads; 0 leaves OMP_NUM_THREADS as the user set it, or else shares the cores.
    machine: the number of this one, and of how many; ranks of several meet at MASTER_ADDR.
    The ranks call `launch.rank.run_rank`. Call it from the main thread of a process that ends after
    it: signals stay noted. Raises ConfigError for nproc < 1, or if ranks cannot reach each other.
    """
    if nproc < 1:
        raise ConfigError(f"nproc={nproc} must be 1 or more")
    ranks, received, command = Ranks(), Received(), [sys.executable, "-m", module, *argv]
    on_signals(received.append, *SIGNALS)
    with tempfile.TemporaryDirectory(prefix="rosetrainer_", ignore_cleanup_errors=True) as folder:
        shared = _rank_environment(nproc, threads, folder, machine[1])
        try:
            for local_rank in range(nproc):
                rank = machine[0] * nproc + local_rank
                own = {"RANK": str(rank), "LOCAL_RANK": str(local_rank)}
                own[ERROR_FILE] = f"{folder}/error_{rank}.json"
                ranks[rank] = subprocess.Popen(command, env=shared | own, start_new_session=True)
            while None in (now := _statuses(ranks).values()) and not any(now) and not received:
                time.sleep(POLL_SECONDS)
            time.sleep(POLL_SECONDS)  # the cause may be seen later than what follows from it
            failed, stopped = _statuses(ranks), bool(received)
            for process in ranks.values():
                process.terminate()  # does nothing to one that has ended
                process.send_signal(signal.SIGCONT)  # one that is suspended would not see it
            end = time.monotonic() + (STOP.grace if stopped else TERMINATE_SECONDS)
            while None in (left := _statuses(ranks)).values() and len(received) < 2:
                if time.monotonic() > end:
                    break
                time.sleep(POLL_SECONDS)
            told = {rank: recorded(f"{folder}/error_{rank}.json") for rank in ranks}
            why, status = _stopped(received, left, told) if stopped else _failed(failed, told)
            if why:  # on a terminal below the progress bar that may stand there
                print("\n" * sys.stderr.isatty() + why, file=sys.stderr)
            return status
        finally:
            for process in ranks.values():
                process.kill()
                process.wait()


def _rank_environment(nproc: int, threads: int, folder: str, machines: int) -> dict[str, str]:
    """What all ranks of this machine share."""
    own_cores = max(1, usable_cores() // nproc)
    environment = {
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # warnings about sockets, which mean nothing here
        **os.environ,  # the user's settings win
        "WORLD_SIZE": str(nproc * machines),
        "LOCAL_WORLD_SIZE": str(nproc),
        "OMP_NUM_THREADS": str(threads or os.environ.get("OMP_NUM_THREADS", own_cores)),
        LAUNCHED: str(os.getpid()),
        RENDEZVOUS_DIR: folder if machines == 1 else "",
    }
    if nproc > 1 and machines == 1:
        environment[INTERFACE] = local_interface()
    return environment


def _statuses(ranks: Ranks) -> Statuses:
    return {rank: process.poll() for rank, process in ranks.items()}


def _stopped(received: Received, statuses: Statuses, told: Told) -> tuple[str, int]:
    """What to tell of a stop, by the first rank, and the exit status. Who still runs is killed."""
    signum, *again = received
    said = "interrupted" if signum == signal.SIGINT else f"stopped by {signum.name}"
    _, fate = told[min(statuses)]
    if left := [rank for rank, status in statuses.items() if status is None]:
        after = "" if again else f" after {STOP.grace:g} s; --grace gives more"
        fate += f"{'; ' * bool(fate)}{name_ranks(left)} been killed{after}"
    ended_well = signum == signal.SIGTERM and set(statuses.values()) == {0}
    return f"{said}; {fate or 'all ranks have ended'}", 0 if ended_well else 128 + signum


def _failed(statuses: Statuses, told: Told) -> tuple[str, int]:
    """Why the first of those has failed that had when it was seen, and the exit status."""
    failed = [(told[rank], rank) for rank, status in statuses.items() if status]
    (_, why), rank = min(failed, default=((0.0, ""), min(statuses)))
    status = statuses[rank] or 0
    if status in (0, PIPE_CLOSED):
        return "", status
    ended = f"ended with exit status {status}"
    if status < 0:
        name = next((known.name for known in signal.Signals if known == -status), "real-time")
        ended = f"was killed by signal {-status} ({name})"
    if status == -signal.SIGKILL:
        ended += f"; if the machine ran out of memory: {memory_advice()}"
    return why or f"error: rank {rank} {ended}", 2 if status == 2 else 1
