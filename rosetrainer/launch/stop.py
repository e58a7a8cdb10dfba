"""A signal that asks a run to stop: obeyed at once before training, and between steps later.

Imports no torch, so that a signal counts from a process's first moment on.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable

from rosetrainer.environment import LAUNCHED, reports_for_machine
from rosetrainer.launch.rank import record

GRACE = 120  # seconds that ranks have, if they need them, for a step and a save after a signal
STOP_SECONDS, STOP_MARGIN = 9, 1.5
"""A stop has so many seconds at least, and so many times what it was measured to take."""
SECOND_SIGNAL_SECONDS = 1.0
"""A terminal and a launcher may both send a signal; one that comes later means: end at once."""


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
    """A signal to stop, once it has come to this rank, and how long a stop takes.

    That is the step under way, then a save, each as long as the last one took.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.grace: float = GRACE
        self.waits_for_step = False  # the training loop looks at `signal`: all have come to it
        self.step_began = self.save_seconds = self._step_seconds = 0.0
        self._warned = False

    def listen(self) -> None:
        on_signals(self._obey, signal.SIGINT, signal.SIGTERM)

    def _obey(self, signum: signal.Signals) -> None:
        if not self.waits_for_step:
            report_stop("before it went a step, so there is nothing to save")
            os._exit(stop_status(signum))
        if self.signal is not None:
            os._exit(128 + signum)
        self.signal, need = signum, self.seconds_left(time.monotonic())
        measured = max(STOP_SECONDS, STOP_MARGIN * need) if self.save_seconds else math.inf
        given = min(measured, self.grace)
        late = threading.Timer(given, self._give_up, [signum, given])
        late.daemon = True  # a rank that leaves before does not wait for it
        with contextlib.suppress(RuntimeError):  # no memory for a thread: the launcher ends us then
            late.start()
        if need >= 1 and reports_for_machine():
            short = f"; --grace gives {self.grace:g} s" * (need > self.grace)
            print(
                f"finishing the step under way, then saving: about {need:.0f} s{short}; a second "
                f"signal, or Ctrl-C, ends at once",
                flush=True,
            )

    def _give_up(self, signum: signal.Signals, given: float) -> None:
        report_stop(f"not saved, for the step under way has not ended within {given:g} s")
        os._exit(128 + signum)

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


def report_stop(message: str) -> None:
    """How a stop has ended: to our launcher, which reports it, or else to the user."""
    if reports_for_machine() and not (LAUNCHED in os.environ and record(message, time.time())):
        print(f"stopped; {message}", flush=True)
