"""A rank's life: it ends with its work, at a signal, or when its launcher does.

Imports no torch, so that it is under watch, and a signal counts, from its first moment on.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from rosetrainer.environment import LAUNCHED, reports_for_machine
from rosetrainer.launch.errors import end_rank, report_stop

RENDEZVOUS_DIR = "ROSETRAINER_RENDEZVOUS_DIR"  # variable: where the ranks of our launcher meet
PIPE_CLOSED = 128 + signal.SIGPIPE  # exit status when nobody reads our output any more, as `head`
GRACE = 120  # seconds that ranks have, if they need them, for a step and a save after a signal
STOP_SECONDS, STOP_MARGIN = 9, 1.5
"""A stop has so many seconds at least, and so many times what it was measured to take."""
SECOND_SIGNAL_SECONDS = 1.0
"""A terminal and a launcher may both send a signal; one that comes later means: end at once."""


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


def on_signals(call: Callable[[signal.Signals], None], *signums: signal.Signals) -> None:
    """Calls it for the first that comes, and for each that comes SECOND_SIGNAL_SECONDS later.

    One that is ignored, as under nohup, stays so. A thread does that, for the main one may hang in
    another rank's absence.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for signum in signums:
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, lambda *_: None)  # Python then writes it into the pipe

    def read() -> None:
        first = math.inf
        while received := os.read(reading, 1):
            now = time.monotonic()
            if received[0] in signums and not first <= now <= first + SECOND_SIGNAL_SECONDS:
                first = min(first, now)
                call(signal.Signals(received[0]))

    threading.Thread(target=read, name="signals", daemon=True).start()


class StopRequest:
    """A signal to stop, once it has come to this rank: obeyed at once before training, and between
    steps later. How long that takes: the step under way, then a save, each like the last one."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.grace: float = GRACE
        self.waits_for_step = False  # the training loop looks at `signal`: all have come to it
        self.step_began = self.save_seconds = self._step_seconds = 0.0
        self._given, self._warned = math.inf, False

    def listen(self) -> None:
        on_signals(self._obey, signal.SIGINT, signal.SIGTERM, signal.SIGALRM)

    def _obey(self, signum: signal.Signals) -> None:
        if not self.waits_for_step:
            report_stop("before it went a step, so there is nothing to save")
            os._exit(stop_status(signum))
        if self.signal is not None:
            if signum == signal.SIGALRM:
                late = f"the step under way has not ended within {self._given:g} s"
                report_stop(f"not saved, for {late}")
                signum = self.signal
            os._exit(128 + signum)
        self.signal, need = signum, self.seconds_left(time.monotonic())
        measured = max(STOP_SECONDS, STOP_MARGIN * need) if self.save_seconds else math.inf
        self._given = min(measured, self.grace)
        signal.setitimer(signal.ITIMER_REAL, self._given)  # SIGALRM then
        if need >= 1 and reports_for_machine():
            short = f"; --grace gives {self.grace:g} s" * (need > self.grace)
            again = "a second signal, or Ctrl-C, ends at once"
            told = f"finishing the step under way, then saving: about {need:.0f} s{short}; {again}"
            print(told, flush=True)

    def end_step(self, now: float) -> str:
        """Once, as soon as it is known, a line if a stop takes longer than there will be time."""
        is_first, self._step_seconds = not self._step_seconds, now - self.step_began
        self.step_began = 0.0
        flag, given, need = "--grace", self.grace, self._step_seconds + self.save_seconds
        if "TORCHELASTIC_RUN_ID" in os.environ and LAUNCHED not in os.environ:
            flag = "torchrun's --shutdown-timeout"
            given = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
        if is_first or self._warned or need <= given:  # the first step compiles
            return ""
        self._warned = True
        return (
            f"warning: a step takes {self._step_seconds:.1f} s and a save {self.save_seconds:.1f} "
            f"s, and {flag} gives {given:g} s: a signal would end this run before it has saved; "
            f"set {flag} {math.ceil(STOP_MARGIN * need)}, and as much in the scheduler (Slurm: "
            f"KillWait, Kubernetes: terminationGracePeriodSeconds, docker: --stop-timeout)"
        )

    def seconds_left(self, now: float) -> float:
        """A step that takes longer than the last one, or the first, is taken to be half done."""
        passed = now - self.step_began if self.step_began else 0.0
        step = self._step_seconds - passed if self._step_seconds > passed else passed
        return step + (self.save_seconds or max(self._step_seconds, passed))


STOP = StopRequest()
"""The process's own: signals belong to a process."""


def stop_status(signum: signal.Signals | None) -> int:
    """The exit status of a run that has ended, or that a signal has stopped: 130 after Ctrl-C."""
    return 130 if signum == signal.SIGINT else 0
