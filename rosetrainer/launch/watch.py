"""Ranks that hang, or that the others wait for: noticed, and named."""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist

from rosetrainer.heartbeat import HEARTBEAT, IdleClock
from rosetrainer.launch.errors import ERROR_REPORT, RankError, end_rank
from rosetrainer.launch.process_group import START_SECONDS, store_host

POLL_SECONDS = 0.25
FOLLOW_SECONDS = 5.0  # a rank stays after another one has reported what hangs, or is about to

PACKAGE = str(Path(__file__).parent.parent)
WAITING = (
    *("launch/process_group.py", "parallel/context.py", "parallel/comm.py"),
    *("hardware/gloo_sums.py", "hardware/shared_sums.py", "hardware/shared_memory.py"),
)
"""The files of this package whose functions wait for other ranks."""


class RankState(NamedTuple):
    """How a rank stands, by itself."""

    collectives_started: int  # 0 where ranks start unequally many, as those of a pipeline do
    waits: bool
    idle: float  # seconds without a sign of work
    location: str  # the innermost line of this package, as "micro_batches, data.py:12"
    written: float  # when, by its clock


class HangWatch:
    """Ends this rank when no rank makes progress, and names the rank at fault.

    Progress is a collective started, a beat, or processor time, see IdleClock. When a rank has had
    none for so many seconds, all begin to write into the store how they stand, again and again. It
    waits on for one that is at work, as others wait for whoever saves, and ends if there is none.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, seconds: float) -> None:
        # A connection of its own: while the main thread waits in the store it holds the other one.
        self._store = store.clone()  # type: ignore[attr-defined]
        self._rank, self._seconds = rank, seconds
        self._keys = [f"state/{other}" for other in range(world_size)]
        self._patience = min(max(seconds / 10, 4.0), 30.0)
        self.collectives_started: Callable[[], int] = lambda: 0
        self.comparable = True  # all ranks start equally many
        self._idle, self._exchanged = 0.0, time.monotonic()
        self._ended = threading.Event()
        ERROR_REPORT.is_first = self.is_first
        self._write()
        parts = (self._measure, self._exchange)
        self._threads = [threading.Thread(target=p, name="hang watch", daemon=True) for p in parts]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._ended.set()
        for thread in self._threads:  # one alive when the interpreter ends can abort the process
            thread.join(self._patience)

    def _measure(self) -> None:
        """How long this rank has been idle. Ends it if the store does not answer then."""
        clock = IdleClock(self._seconds)
        while not self._ended.wait(POLL_SECONDS):
            count = self.collectives_started() + HEARTBEAT.count()
            # A thread that waits for a GPU takes all of a core; one that compiles is at work.
            tells = not torch.cuda.is_initialized() or compiles()
            self._idle = clock.look(POLL_SECONDS, count, processor_seconds() * tells)
            waits = time.monotonic() > self._exchanged + self._patience
            if waits and self._idle >= self._seconds:
                self._end(f"{store_host()} does not answer", self._rank == 1)

    def _exchange(self) -> None:
        """Writes how this rank stands, once one has asked. Ends it if no rank makes progress."""
        since: dict[bytes, float] = {}  # when each state was first seen
        with suppress(RuntimeError, OSError):  # the store has ended
            while not self._ended.wait(self._patience / 8):
                if asks := self._idle >= self._seconds:
                    self._store.set("asked", "")
                if self._store.check(["asked"]):
                    self._write()
                come = [r for r, key in enumerate(self._keys) if asks and self._store.check([key])]
                found = {rank: self._store.get(self._keys[rank]) for rank in come}
                self._exchanged = now = time.monotonic()
                since = {text: since.get(text, now) for text in found.values()}
                new = {r: text for r, text in found.items() if now < since[text] + self._patience}
                alive = {rank: RankState(*json.loads(text)) for rank, text in new.items()}
                idle = min((state.idle for state in alive.values()), default=0.0)
                if len(come) < len(self._keys) and self._idle < START_SECONDS + self._patience:
                    continue  # some may still import torch
                if idle >= self._seconds + self._patience / 4:  # some are so old
                    rank, why = at_fault(alive, set(come), len(self._keys))
                    self._end(f"rank {rank} {why}", self.is_first())

    def _write(self) -> None:
        stack = main_stack()
        file, name, line = next((one for one in stack if one[0].startswith(PACKAGE)), stack[0])
        count, location = self.collectives_started(), f"{name}, {Path(file).name}:{line}"
        waits = file.endswith(WAITING)
        state = RankState(count * self.comparable, waits, self._idle, location, time.time())
        self._store.set(self._keys[self._rank], json.dumps(state))

    def is_first(self) -> bool:
        """Whether no other rank has failed before; the store counts.

        If it has ended while this rank was idle, so has its host, which has reported what hangs.
        """
        try:
            return bool(self._store.add("failures", 1) == 1)
        except (RuntimeError, OSError):
            return self._idle < self._seconds / 2

    def _end(self, why: str, first: bool) -> NoReturn:
        if not first:
            time.sleep(FOLLOW_SECONDS)  # its end is not to be reported as the cause
        ERROR_REPORT.is_first = lambda: first
        text = (
            f"no progress for {self._seconds:g} s: {why}; all ranks end, and the same command goes "
            f"on from the last checkpoint; --timeout gives slower ranks more time"
        )
        end_rank(RankError(text))


def processor_seconds() -> float:
    """The main thread's on Linux, with those for which it was ready and the processors were taken:
    on a crowded machine a rank at work has little more. Elsewhere the process's."""
    with suppress(OSError):
        ran, queued, _ = Path("/proc/self/schedstat").read_text().split()
        return (int(ran) + int(queued)) / 1e9
    return time.process_time()


def main_stack() -> list[tuple[str, str, int]]:
    """The main thread's place in each function, the innermost first: (file, function, line)."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    stack = traceback.walk_stack(frame)
    return [(one.f_code.co_filename, one.f_code.co_name, line) for one, line in stack]


def compiles() -> bool:
    """Whether the main thread is in torch.compile, where nothing is counted."""
    return any("/_dynamo/" in file or "/_inductor/" in file for file, _, _ in main_stack())


def at_fault(alive: dict[int, RankState], here: set[int], world_size: int) -> tuple[int, str]:
    """The rank that hangs, and how one can tell. here: those that have ever come."""
    if missing := set(range(world_size)) - here:
        return min(missing), "has not come to the others"
    if silent := here - set(alive):
        return min(silent), "gives no sign of life"
    # Of those that have started equally many the one that does not wait: not all is counted.
    rank = min(alive, key=lambda r: alive[r][:2])
    if all(state[:2] == alive[rank][:2] for state in alive.values()) and alive[rank].waits:
        return rank, "waits like all others: a connection may be lost"
    return rank, f"does not come to where others wait; it stands in {alive[rank].location}"
