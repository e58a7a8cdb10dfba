"""Signs of work for the hang watch: what takes long gives one after each part."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


class Heartbeat:
    """Counts beats, and the bytes of files that a library writes in one call."""

    def __init__(self) -> None:
        self._beats = 0
        self._files: set[Path] = set()

    def beat(self) -> None:
        """For each block or tensor that is done, from any thread."""
        self._beats += 1

    @contextlib.contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """While `path` grows, that is work as well."""
        self._files.add(path)
        try:
            yield
        finally:
            self._files.discard(path)
            self.beat()

    def count(self) -> int:
        """Another number than before, if there was a sign of work since."""
        written = 0
        for path in tuple(self._files):
            with contextlib.suppress(OSError):
                written += path.stat().st_size
        return self._beats + written


HEARTBEAT = Heartbeat()
"""The process's own: the hang watch ends a process, not one of its threads."""


class IdleClock:
    """How long a rank has shown no sign of work: a count that changes, or processor time.

    Much has no count, as a compilation, and to wait for other ranks takes no processor. An endless
    loop does, so its time counts only until ENDLESS times `seconds` after the last count.
    """

    SHARE = 0.02  # of `seconds`: so much processor time is work; waiting and polling take less
    ENDLESS = 10
    STALL = 5.0  # seconds between two looks: the whole process was stopped, and is not idle

    def __init__(self, seconds: float, now: float) -> None:
        self._seconds, self._looked = seconds, now
        self._idle, self._uncounted = 0.0, 0.0
        self._count, self._shares = -1, 0.0

    def look(self, now: float, count: int, processor: float | None) -> float:
        """Seconds without a sign. processor: its seconds so far, None where they say nothing."""
        passed = now - self._looked
        if passed <= self.STALL:
            self._idle += passed
            self._uncounted += passed
        shares = 0.0 if processor is None else processor // (self.SHARE * self._seconds)
        if count != self._count:
            self._idle = self._uncounted = 0.0
        elif shares != self._shares and self._uncounted < self.ENDLESS * self._seconds:
            self._idle = 0.0
        self._looked, self._count, self._shares = now, count, shares
        return self._idle
