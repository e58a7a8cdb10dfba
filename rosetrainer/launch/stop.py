"""A signal that asks a run to stop: obeyed at once before training, and between steps later.

Imports no torch, so that a signal counts from a process's first moment on.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from types import FrameType

from rosetrainer.launch.rank import GRACE, LAUNCHED, report_stop, report_stop_seconds

SECOND_SIGNAL_SECONDS = 1.0
"""A terminal and a launcher may both send a signal; one that comes later means: end at once."""


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

    def end_step(self, now: float) -> None:
        self._step, self._steps, self._began = now - self._began, self._steps + 1, 0.0

    def left(self, now: float) -> float:
        """Seconds. A step that takes longer than the last one, or the first, is half done."""
        passed = now - self._began if self._began else 0.0
        step = self._step - passed if self._step > passed else passed
        return step + (self.save or max(self._step, passed))

    def warning(self) -> str:
        """Once, as soon as it is known, a line if a stop takes longer than there will be time."""
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


class StopRequest:
    """SIGTERM or Ctrl-C, once it has come. A second one ends the process at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.time = StopTime()
        self._waits = False
        self._before: dict[signal.Signals, object] = {}

    def listen(self) -> None:
        """From now on. A signal that is ignored, as under nohup, stays ignored.

        A thread looks at the signals, for the main one may hang in another rank's absence.
        """
        if self._before:
            return
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for signum in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(signum) != signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, self._receive)
        threading.Thread(target=self._obey, args=(reading,), name="stop", daemon=True).start()

    def wait_for_steps(self) -> None:
        """From now on the training loop looks at `signal`: all ranks have come to it."""
        self._waits = True

    def release(self) -> None:
        """Signals mean again what they meant before."""
        signal.set_wakeup_fd(-1)
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(signum)

    def _obey(self, reading: int) -> None:
        first: float | None = None
        while received := os.read(reading, 1):
            signum = signal.Signals(received[0])
            if signum not in self._before:
                continue
            if not self._waits:
                if os.environ.get("RANK", "0") == "0":
                    report_stop("before it went a step, so there is nothing to save")
                os._exit(stop_status(signum))
            if first is not None and time.monotonic() - first > SECOND_SIGNAL_SECONDS:
                os._exit(128 + signum)
            if first is None:
                first = time.monotonic()
                if os.environ.get("RANK", "0") == "0":
                    report_stop_seconds(self.time.left(first))


def stop_status(signum: signal.Signals | None) -> int:
    """The exit status of a run that has ended, or that a signal has stopped: 130 after Ctrl-C."""
    return 130 if signum == signal.SIGINT else 0


STOP = StopRequest()
"""The process's own: signals belong to a process. `python -m rosetrainer train` listens."""
