"""A signal that asks a run to stop: obeyed at once before training, and between steps later.

Imports no torch, so that a signal counts from a process's first moment on.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

from rosetrainer.environment import LAUNCHED, reports_for_machine
from rosetrainer.launch.rank import RENDEZVOUS_DIR, leave

GRACE = 120
"""Seconds that ranks have, if they need so long, to end their step and save after a signal."""

SECOND_SIGNAL_SECONDS = 1.0
"""A terminal and a launcher may both send a signal; one that comes later means: end at once."""

STOP_FILE = "stop.json"
"""In RENDEZVOUS_DIR: what rank 0 says of its stop."""


class StopTime:
    """How long a stop takes: the step under way, then a save, each as long as the last one took."""

    def __init__(self) -> None:
        self.grace: float = GRACE
        self.save = 0.0
        """Seconds."""
        self._step, self._steps, self._began = 0.0, 0, 0.0
        self._warned = False

    def begin_step(self, now: float) -> None:
        self._began = now

    def end_step(self, now: float) -> str:
        """Once, as soon as it is known, a line if a stop takes longer than there will be time."""
        self._step, self._steps, self._began = now - self._began, self._steps + 1, 0.0
        torchrun = "TORCHELASTIC_RUN_ID" in os.environ and LAUNCHED not in os.environ
        given = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30") if torchrun else self.grace
        need = self._step + self.save
        if self._warned or self._steps < 2 or need <= float(given):  # the first step compiles
            return ""
        self._warned = True
        flag = "torchrun's --shutdown-timeout" if torchrun else "--grace"
        return (
            f"warning: a step takes {self._step:.1f} s and a save {self.save:.1f} s, and {flag} "
            f"gives {float(given):g} s: a signal would end this run before it has saved; set "
            f"{flag} {math.ceil(1.5 * need)}, and as much in the scheduler (Slurm: KillWait, "
            f"Kubernetes: terminationGracePeriodSeconds, docker: --stop-timeout)"
        )

    def left(self, now: float) -> float:
        """Seconds. A step that takes longer than the last one, or the first, is half done."""
        passed = now - self._began if self._began else 0.0
        step = self._step - passed if self._step > passed else passed
        return step + (self.save or max(self._step, passed))


class StopRequest:
    """A signal to stop, once it has come: to a rank, or to our launcher, which passes it on."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.since = math.inf
        self.again = False
        """Whether a second one has come, which means: end at once."""
        self.time = StopTime()
        self._listens, self._launches, self._waits = False, False, False

    def listen(self, launches: bool = False) -> None:
        """From now on. A signal that is ignored, as under nohup, stays ignored.

        A thread looks at them, for the main one may hang in another rank's absence. launches: this
        process is no rank, which obeys, but the launcher.
        """
        self._launches = launches
        if not self._listens:
            self._listens = True
            reading, writing = os.pipe()
            os.set_blocking(writing, False)
            signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
            threading.Thread(target=self._look, args=(reading,), name="stop", daemon=True).start()
        more = (signal.SIGHUP, signal.SIGQUIT) if launches else ()
        for signum in (signal.SIGINT, signal.SIGTERM, *more):
            if signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self._receive)

    def wait_for_steps(self) -> None:
        """From now on the training loop looks at `signal`: all ranks have come to it."""
        self._waits = True

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(signum)

    def _look(self, reading: int) -> None:
        while received := os.read(reading, 1):
            signum, now = signal.Signals(received[0]), time.monotonic()
            if signal.getsignal(signum) != self._receive:
                continue
            first, self.since = self.since == math.inf, min(self.since, now)
            self.again = now > self.since + SECOND_SIGNAL_SECONDS
            if self._launches:
                continue
            if not self._waits:
                report_stop("before it went a step, so there is nothing to save")
                os._exit(stop_status(signum))
            if self.again:
                os._exit(128 + signum)
            if first:
                report_stop(seconds=self.time.left(now))


STOP = StopRequest()
"""The process's own: signals belong to a process."""


def stop_status(signum: signal.Signals | None) -> int:
    """The exit status of a run that has ended, or that a signal has stopped: 130 after Ctrl-C."""
    return 130 if signum == signal.SIGINT else 0


def report_stop(message: str = "", seconds: float = 0.0) -> None:
    """How a stop has ended, or how long it will take: to our launcher, or to the user."""
    if not reports_for_machine():
        return
    if LAUNCHED in os.environ:
        leave(Path(os.environ[RENDEZVOUS_DIR]) / STOP_FILE, message=message, seconds=seconds)
    elif message:
        print(f"stopped; {message}", flush=True)
    elif seconds >= 1:
        print(stop_line(seconds), flush=True)


def stop_line(seconds: float) -> str:
    return (
        f"finishing the step under way, then saving: about {seconds:.0f} s; a second signal, or "
        f"Ctrl-C, ends at once"
    )
