"""Ranks that hang, or that the others wait for: noticed, and named."""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist

from rosetrainer.heartbeat import HEARTBEAT, IdleClock
from rosetrainer.launch import process_group
from rosetrainer.launch.failures import RankError
from rosetrainer.launch.process_group import START_SECONDS, store_host
from rosetrainer.launch.rank import ERROR_REPORT, end_rank

POLL_SECONDS = 0.25
FOLLOW_SECONDS = 5.0
"""How long a rank stays after another one has reported what hangs, or is about to."""

WAITING = (str(Path(torch.__file__).parent / "distributed"), process_group.__file__)
"""The code in which a rank waits for others."""


class RankState(NamedTuple):
    """How a rank stands, by itself."""

    collectives_started: int
    """0 where the ranks start unequally many, as those of a pipeline do."""
    idle: float
    """Seconds without a sign of work."""
    waits: bool
    location: str
    written: float
    """When, by its clock."""


class HangWatch:
    """Ends this rank when no rank makes progress, and names the rank at fault.

    Progress is a collective started, a beat, or processor time, see IdleClock. When a rank has had
    none for so many seconds, all begin to write into the store how they stand, again and again. It
    waits on for one that is at work, as others wait for whoever saves, and ends if there is none.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, seconds: float, waits_in: str
    ) -> None:
        """waits_in: the file whose code waits for other ranks, beside WAITING."""
        # A connection of its own: while the main thread waits in the store it holds the other one.
        self._store = store.clone()  # type: ignore[attr-defined]
        self._rank, self._seconds = rank, seconds
        self._patience = min(max(seconds / 10, 4.0), 30.0)
        self._waiting = (*WAITING, waits_in)
        self.follow(lambda: 0)
        self._keys = [f"state/{other}" for other in range(world_size)]
        self._states: dict[int, tuple[RankState, float]] = {}  # by rank, and since when
        self._idle, self._exchanged = 0.0, time.monotonic()
        self._ended = threading.Event()
        self._write(RankState(0, 0.0, False, "its start", 0.0))
        ERROR_REPORT.is_first = self.is_first
        parts = (self._look, self._exchange)
        self._threads = [threading.Thread(target=p, name="hang watch", daemon=True) for p in parts]
        for thread in self._threads:
            thread.start()

    def follow(
        self, collectives_started: Callable[[], int], on_cuda: bool = False, comparable: bool = True
    ) -> None:
        """From now on this counts the collectives. comparable: all ranks start equally many."""
        self._collectives_started = collectives_started
        self._on_cuda, self._comparable = on_cuda, comparable

    def close(self) -> None:
        self._ended.set()
        for thread in self._threads:  # one alive when the interpreter ends can abort the process
            thread.join(self._patience)

    def _look(self) -> None:
        """Ends this process once it has been idle for too long, and so has each rank that lives."""
        clock = IdleClock(self._seconds, time.monotonic())
        while not self._ended.wait(POLL_SECONDS):
            now, count = time.monotonic(), self._collectives_started() + HEARTBEAT.count()
            # A thread that waits for a GPU takes all of a core; one that compiles is at work.
            tells = not self._on_cuda or compiles()
            self._idle = clock.look(now, count, processor_seconds() if tells else None)
            if self._idle < self._seconds + self._patience / 4:  # what others wrote is that old
                continue
            if now > self._exchanged + self._patience:
                self._end(f"{store_host()} does not answer")
            here = dict(self._states)
            alive = {r: one for r, (one, since) in here.items() if now < since + self._patience}
            waited_for_start = self._idle >= START_SECONDS + self._patience
            all_here = len(here) == len(self._keys) or waited_for_start
            if alive and all_here and min(s.idle for s in alive.values()) >= self._seconds:
                fault, why = at_fault(alive, set(here), len(self._keys))
                self._end(f"rank {fault} {why}")

    def _exchange(self) -> None:
        """Writes how this rank stands, once one has asked, and reads how all do while it asks."""
        with suppress(RuntimeError, OSError):  # the store has ended
            while not self._ended.wait(self._patience / 8):
                if asks := self._idle >= self._seconds:
                    self._store.set("asked", "")
                if self._store.check(["asked"]):
                    frame = sys._current_frames()[threading.main_thread().ident or 0]
                    waits = frame.f_code.co_filename.startswith(self._waiting)
                    count = self._collectives_started() if self._comparable else 0
                    place = location_of(frame)
                    self._write(RankState(count, self._idle, waits, place, time.time()))
                if asks:
                    self._read(time.monotonic())
                self._exchanged = time.monotonic()

    def _write(self, state: RankState) -> None:
        self._store.set(self._keys[self._rank], json.dumps(state))

    def _read(self, now: float) -> None:
        """The states of all ranks that have ever come."""
        for rank, key in enumerate(self._keys):
            if self._store.check([key]):
                state = RankState(*json.loads(self._store.get(key)))
                if rank not in self._states or state != self._states[rank][0]:
                    self._states[rank] = state, now

    def is_first(self) -> bool:
        """Whether no other rank has failed before; the store counts.

        If it has ended while this rank was idle, so has its host, which has reported what hangs. If
        it does not answer, rank 1 reports.
        """
        try:
            count = ThreadPoolExecutor(1).submit(self._store.add, "failures", 1)
            return bool(count.result(self._patience) == 1)
        except TimeoutError:
            return self._rank == 1
        except (RuntimeError, OSError):
            return self._idle < self._seconds / 2

    def _end(self, why: str) -> NoReturn:
        text = (
            f"no progress for {self._seconds:g} s: {why}; all ranks end, and the same command goes "
            f"on from the last checkpoint; --timeout gives slower ranks more time"
        )
        first = self.is_first()
        if not first:
            time.sleep(FOLLOW_SECONDS)  # its end is not to be reported as the cause
        end_rank(RankError(text), first)


def processor_seconds() -> float | None:
    """The main thread's processor time, or None where it is not known.

    On Linux with the time for which it was ready and the processors were taken: on a crowded
    machine a rank at work has little more.
    """
    main = threading.main_thread()
    with suppress(OSError):
        ran, queued, _ = Path(f"/proc/self/task/{main.native_id}/schedstat").read_text().split()
        return (int(ran) + int(queued)) / 1e9
    if not hasattr(time, "pthread_getcpuclockid"):
        return None
    return time.clock_gettime(time.pthread_getcpuclockid(main.ident or 0))


def compiles() -> bool:
    """Whether the main thread is in torch.compile, where nothing is counted."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    files = [one.f_code.co_filename for one, _ in traceback.walk_stack(frame)]
    return any("/_dynamo/" in file or "/_inductor/" in file for file in files)


def location_of(frame: FrameType) -> str:
    """Where a thread stands: the innermost line of this package, as "micro_batches, data.py:12"."""
    package, stack = Path(__file__).parent.parent, [one for one, _ in traceback.walk_stack(frame)]
    own = [one for one in stack if package in Path(one.f_code.co_filename).parents]
    found = (own or stack)[0]
    return f"{found.f_code.co_name}, {Path(found.f_code.co_filename).name}:{found.f_lineno}"


def at_fault(answers: dict[int, RankState], here: set[int], world_size: int) -> tuple[int, str]:
    """The rank that hangs, and how one can tell: out of the answers, and of who has ever come."""
    if missing := [rank for rank in range(world_size) if rank not in here]:
        return missing[0], "has not come to the others"
    if silent := [rank for rank in range(world_size) if rank not in answers]:
        return silent[0], "gives no sign of life"
    # Of those that have started equally many the one that does not wait: not all is counted.
    rank = min(answers, key=lambda r: (answers[r].collectives_started, answers[r].waits))
    stands = f"it stands in {answers[rank].location}"
    if answers[rank].collectives_started < max(one.collectives_started for one in answers.values()):
        number = answers[rank].collectives_started + 1
        return rank, f"has not come to collective {number}, in which others wait; {stands}"
    if answers[rank].waits:
        return rank, "waits like all others: a connection may be lost"
    return rank, f"does not come to where others wait; {stands}"
