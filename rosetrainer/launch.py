"""Ranks on this machine: starts them, ends them together, shows the first error once.

It is torchrun's own agent, with its log lines, restarts and half-minute waits left out. torchrun
itself works as well, and is the way to start ranks on more than one machine.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from rosetrainer.environment import usable_cores
from rosetrainer.fields import ConfigError
from rosetrainer.rank import GRACE_SECONDS, LAUNCHED, PIPE_CLOSED

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
CRASHES = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
"""Signals by which a rank dies of itself or by the system, never because another rank failed."""


class _Stopped(BaseException):
    """A signal asked the launcher to end. No `except Exception` on the way may swallow it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signal = signal.Signals(signum)


def launch(nproc: int, argv: list[str], threads: int = 0, module: str = "rosetrainer") -> int:
    """Runs `python -m module argv...` as nproc ranks; returns the exit status for all of them.

    0 if all ranks end well, 2 for a user's mistake (a rank's ConfigError), 128 + n if signal n
    stopped the launcher (130 for Ctrl-C), otherwise 1. A rank has `threads` CPU threads; 0
    leaves OMP_NUM_THREADS as the user set it, or else shares the cores. The ranks call
    `rosetrainer.rank.run_rank`. Call it from the main thread. Raises ConfigError for nproc < 1.
    """
    if nproc < 1:
        raise ConfigError(f"nproc={nproc} must be 1 or more")
    try:
        with _stop_on_signals() as arm, _environment(_rank_environment(nproc, threads)):
            failures = _run(nproc, argv, module, arm)
    except _Stopped as stop:
        name = "interrupted" if stop.signal == signal.SIGINT else f"stopped by {stop.signal.name}"
        _say(f"{name}; all ranks have ended")
        return 128 + stop.signal
    return _report(failures, nproc) if failures else 0


def _run(
    nproc: int, argv: list[str], module: str, arm: Callable[[], None]
) -> dict[int, ProcessFailure]:
    """Runs the ranks to their end; the failures by rank, in the order in which they were seen."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    arm()
    logging.getLogger("torch.distributed.elastic").propagate = False
    logging.getLogger("torch.distributed.elastic").addHandler(logging.NullHandler())
    # torchelastic replaces ${local_rank} in arguments; a prompt may well hold a dollar sign.
    arguments = [argument.replace("$", "$$") for argument in argv]
    with tempfile.TemporaryDirectory(prefix="rosetrainer_") as error_files:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=0.1,
            signals_to_handle="",  # _stop_on_signals has them, from before torch's import
            logs_specs=DefaultLogsSpecs(log_dir=error_files),
        )
        try:
            elastic_launch(config, sys.executable)("-m", module, *arguments)
        except ChildFailedError as failed:
            return failed.failures
    return {}


def _report(failures: dict[int, ProcessFailure], nproc: int) -> int:
    """Prints the failure that came first; returns the exit status that it stands for."""
    rank = min(failures, key=lambda r: _moment(failures[r]))
    failure = failures[rank]
    if failure.exitcode == PIPE_CLOSED:
        return PIPE_CLOSED
    if details := _details(failure):
        if details["mistake"]:
            _say(f"error: {details['mistake']}")
            return 2
        _say(f"error: rank {rank} of {nproc} failed:\n{details['py_callstack'].rstrip()}")
    elif failure.exitcode < 0:
        reason = f"signal {-failure.exitcode} ({failure.signal_name()})"
        hint = "; if the machine ran out of memory, a smaller micro_batch_size needs less"
        is_kill = failure.exitcode == -signal.SIGKILL
        _say(f"error: rank {rank} was killed by {reason}{hint if is_kill else ''}")
    else:
        _say(f"error: rank {rank} ended with exit status {failure.exitcode}")
    return 2 if failure.exitcode == 2 else 1


def _moment(failure: ProcessFailure) -> float:
    """When the failure happened. The agent's clock has whole seconds, and it looks at intervals.

    So a crash counts a second earlier, before the errors that other ranks then raise about a
    lost connection, and any other end without an error file a second later, after the error
    that caused it.
    """
    if details := _details(failure):
        return float(details["time"])
    return failure.timestamp + (-1 if -failure.exitcode in CRASHES else 1)


def _details(failure: ProcessFailure) -> dict[str, Any]:
    """What the rank wrote (see rosetrainer.rank), or nothing if it could not."""
    message = failure.error_file_data["message"]
    return message["extraInfo"] if isinstance(message, dict) else {}


def _rank_environment(nproc: int, threads: int) -> dict[str, str]:
    """What the ranks need in their environment; but for `threads`, the user's settings win."""
    defaults = {
        "OMP_NUM_THREADS": str(max(1, usable_cores() // nproc)),
        # Warnings of torch's C++ side about sockets, which tell a user of one machine nothing.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    # gloo resolves the host's name otherwise, which fails or waits on a laptop without a network.
    if loopback := {"lo", "lo0"}.intersection(name for _, name in socket.if_nameindex()):
        defaults["GLOO_SOCKET_IFNAME"] = loopback.pop()
    wanted = {name: os.environ.get(name, value) for name, value in defaults.items()}
    if threads > 0:
        wanted["OMP_NUM_THREADS"] = str(threads)
    wanted[LAUNCHED] = str(os.getpid())
    # How long the agent waits between SIGTERM and SIGKILL; 30 s otherwise.
    wanted["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(GRACE_SECONDS)
    return wanted


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """os.environ with these values for a while; a second launch must find the user's own."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[Callable[[], None]]:
    """Signals that end a program raise _Stopped; the agent then sends SIGTERM to the ranks.

    The ranks are in sessions of their own, so a terminal's Ctrl-C reaches the launcher only.
    Gives a function to call when torch is imported: an exception in the middle of that import
    can get lost in its C++ code, so a signal waits until then.
    """
    received: int | None = None
    last = -math.inf
    armed = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal received, last
        received, before_this, last = received or signum, last, time.monotonic()
        # A terminal and a parent process may both send one; that is one wish, not impatience.
        if armed and last - before_this > 1:
            raise _Stopped(received)

    def arm() -> None:
        nonlocal armed
        armed = True
        if received:
            raise _Stopped(received)

    # One that is ignored stays ignored: nohup, or a shell's background job.
    handled = [s for s in STOP_SIGNALS if signal.getsignal(s) != signal.SIG_IGN]
    before = {s: signal.signal(s, stop) for s in handled}
    try:
        yield arm
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _say(text: str) -> None:
    """Prints to standard error; on a terminal below the progress bar that may stand there."""
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(text, file=sys.stderr)
