"""Signs of work for the hang watch: what takes long gives one after each part."""

from __future__ import annotations

import contextlib
from pathlib import Path


class Heartbeat:
    """Any thread adds to beats for each block or tensor that is done, and to growing a file that a
    library writes in one call."""

    def __init__(self) -> None:
        self.beats, self.growing = 0, set[Path]()

    def count(self) -> int:
        """Another number than before, if there was a sign of work since."""
        written = 0
        for path in tuple(self.growing):
            with contextlib.suppress(OSError):
                written += path.stat().st_size
        return self.beats + written


HEARTBEAT = Heartbeat()
"""The process's own: the hang watch ends a process, not one of its threads."""


class IdleClock:
    """How long a rank has shown no sign of work: a count that changes, or processor time.

    Much has no count, as a compilation, and to wait for other ranks takes no processor. An endless
    loop does, so its time counts only until ENDLESS times `seconds` after the last count.
    """

    SHARE = 0.02  # of `seconds`: so much processor time is work; waiting and polling take less
    ENDLESS = 10

    def __init__(self, seconds: float) -> None:
        self._seconds, self._idle, self._uncounted = seconds, 0.0, 0.0
        self._signs = (-1, 0.0)

    def look(self, waited: float, count: int, processor: float) -> float:
        """Seconds without a sign.

        waited: before this look, by intention: a process that was stopped has not been idle.
        processor: its seconds so far, 0 where they say nothing.
        """
        signs = count, processor // (self.SHARE * self._seconds)
        self._idle += waited
        self._uncounted = 0.0 if count != self._signs[0] else self._uncounted + waited
        if signs != self._signs and self._uncounted < self.ENDLESS * self._seconds:
            self._idle = 0.0
        self._signs = signs
        return self._idle
