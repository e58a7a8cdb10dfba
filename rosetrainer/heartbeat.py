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
    """How long a rank has shown no sign of work.

    A sign is a count that has changed. Where a rank that waits for others needs no processor, its
    processor time is one too: much has no count, as a compilation or a long batch. An endless loop
    takes time as well, so this counts only until ENDLESS times `seconds` after the last count.
    """

    SHARE = 0.02
    """Of `seconds`: this much processor time counts as work; waiting and polling take less."""

    ENDLESS = 10

    STALL = 5.0
    """Seconds between two looks after which the whole process was stopped, and is not idle."""

    def __init__(self, seconds: float, now: float) -> None:
        self._seconds = seconds
        self._looked = self._signed = self._counted = now
        self._count, self._shares = -1, 0.0

    def look(self, now: float, count: int, processor: float | None) -> float:
        """Seconds without a sign. processor: its seconds so far, None where they say nothing."""
        if now - self._looked > self.STALL:
            self._signed += now - self._looked
            self._counted += now - self._looked
        shares = 0.0 if processor is None else processor // (self.SHARE * self._seconds)
        if count != self._count:
            self._counted = now
        is_endless = now - self._counted >= self.ENDLESS * self._seconds
        if (count, shares) != (self._count, self._shares) and not is_endless:
            self._signed = now
        self._looked, self._count, self._shares = now, count, shares
        return now - self._signed
