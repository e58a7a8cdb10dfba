"""Ranks that hang, or that the others wait for: noticed, and named."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn, Protocol

import torch
import torch.distributed as dist

from rosetrainer.heartbeat import HEARTBEAT, IdleClock
from rosetrainer.launch import process_group
from rosetrainer.launch.failures import RankError, answer, is_first
from rosetrainer.launch.process_group import START_SECONDS, store_host
from rosetrainer.launch.rank import end_rank

POLL_SECONDS = 0.25
LEAST_ANSWER_SECONDS, MOST_ANSWER_SECONDS = 4.0, 30.0
"""How long the ranks have to answer another one: a tenth of the timeout, between these."""

FOLLOW_SECONDS = 5.0
"""How long a rank stays after another one has reported what hangs, or is about to."""

WAITING = (str(Path(torch.__file__).parent / "distributed"), process_group.__file__)
"""The code in which a rank waits for others."""


class Ledger(Protocol):
    """Counts collectives: parallel.context has one for each axis."""

    collectives_started: int


@dataclass(frozen=True)
class Answer:
    """What a rank is doing when another one asks."""

    collectives_started: int
    """Collectives; 0 where the ranks start unequally many, as those of a pipeline do."""
    idle: float
    """Seconds without a sign of work."""
    waits: bool
    location: str


class HangWatch:
    """Ends this rank when no rank makes progress, and names the rank at fault.

    Progress is a collective started, a beat, or processor time, see IdleClock. A rank without any
    for so many seconds asks all others in the store, where a thread of each looks for such a
    question. If one of them is at work the rank waits on: others wait for whoever saves, say.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, seconds: float, waits_in: str
    ) -> None:
        """waits_in: the file whose code waits for other ranks, beside WAITING."""
        # A connection of its own: while the main thread waits in the store it holds the other one.
        self._store = store.clone()  # type: ignore[attr-defined]
        self._rank, self._world_size, self._seconds = rank, world_size, seconds
        self._patience = min(max(seconds / 10, LEAST_ANSWER_SECONDS), MOST_ANSWER_SECONDS)
        self._ledgers: list[Ledger] = []
        self._waiting, self._on_cuda = (*WAITING, waits_in), False
        self._comparable = True
        self._idle, self._answered, self._asked_at = 0.0, 0, -math.inf
        self._ended = threading.Event()
        self._store.set(f"here/{rank}", "")
        parts = (self._look, self._reply)
        self._threads = [threading.Thread(target=p, name="hang watch", daemon=True) for p in parts]
        for thread in self._threads:
            thread.start()

    def follow(
        self, ledgers: Iterable[Ledger], on_cuda: bool = False, comparable: bool = True
    ) -> None:
        """Counts the collectives of these as well. comparable: all ranks start equally many."""
        self._ledgers += ledgers
        self._on_cuda, self._comparable = on_cuda, comparable

    def close(self) -> None:
        self._ended.set()
        for thread in self._threads:  # one alive when the interpreter ends can abort the process
            thread.join(self._patience)

    def _collectives_started(self) -> int:
        return sum(ledger.collectives_started for ledger in self._ledgers)

    def _look(self) -> None:
        """Asks the others when this rank has been idle for too long."""
        clock, ask_at = IdleClock(self._seconds, time.monotonic()), 0.0
        while not self._ended.wait(POLL_SECONDS):
            processor = processor_seconds(self._on_cuda)
            count = self._collectives_started() + HEARTBEAT.count()
            self._idle = clock.look(time.monotonic(), count, processor)
            # A little later, for ranks that wait for the same one stopped within a moment.
            if self._idle >= self._seconds + 2 * POLL_SECONDS and time.monotonic() >= ask_at:
                ask_at = time.monotonic()
                ask_at += self._ask()

    def _ask(self) -> float:
        """Ends this process if all hang; else gives the seconds until asking again makes sense."""
        nobody: tuple[dict[int, Answer], set[int]] = {}, set()
        found = answer(self._ask_all, self._patience + 2 * LEAST_ANSWER_SECONDS, nobody)
        if found is None:
            self._end(f"{store_host()} does not answer", self._rank == 1)
        answers, here = found
        if not answers:  # the store has ended, with a rank that had a reason, and reported it
            self._end(f"{store_host()} has ended", False)
        at_work = min((one.idle for one in answers.values()), default=self._idle)
        if at_work < self._seconds:
            return self._seconds - at_work
        if len(here) == self._world_size or self._idle >= START_SECONDS:
            fault, why = at_fault(answers, here, self._world_size)
            # Where nobody keeps the store any more, it has ended with the rank that was first.
            self._end(f"rank {fault} {why}", is_first(self._store, False))
        return START_SECONDS - self._idle

    def _ask_all(self) -> tuple[dict[int, Answer], set[int]]:
        """What each rank that answers says, and which ranks have ever come."""
        number, ranks = self._answered + 1, range(self._world_size)
        self._store.set(f"asked/{number}", "")
        keys = [f"answer/{number}/{rank}" for rank in ranks]
        deadline = time.monotonic() + self._patience
        while not (complete := self._store.check(keys)) and time.monotonic() < deadline:
            time.sleep(0.1)
        there = [rank for rank in ranks if complete or self._store.check([keys[rank]])]
        here = [rank for rank in ranks if complete or self._store.check([f"here/{rank}"])]
        return {r: Answer(**json.loads(self._store.get(keys[r]))) for r in there}, set(here)

    def _reply(self) -> None:
        """Answers every question that a rank has asked, until the store is gone."""
        every = min(max(self._seconds / 10, POLL_SECONDS), LEAST_ANSWER_SECONDS / 2)
        with suppress(RuntimeError, OSError):
            while not self._ended.wait(every):
                while self._store.check([f"asked/{self._answered + 1}"]):
                    frame = sys._current_frames()[threading.main_thread().ident or 0]
                    waits = frame.f_code.co_filename.startswith(self._waiting)
                    count = self._collectives_started() if self._comparable else 0
                    own = Answer(count, self._idle, waits, location_of(frame))
                    key = f"answer/{self._answered + 1}/{self._rank}"
                    self._store.set(key, json.dumps(asdict(own)))
                    self._answered, self._asked_at = self._answered + 1, time.monotonic()

    def was_asked(self) -> bool:
        """Whether another rank has asked, so lately that it may have ended all since."""
        return time.monotonic() - self._asked_at < 2 * MOST_ANSWER_SECONDS

    def _end(self, why: str, first: bool) -> NoReturn:
        text = (
            f"no progress for {self._seconds:g} s: {why}; all ranks end, and the same command goes "
            f"on from the last checkpoint; --timeout gives slower ranks more time"
        )
        if not first:
            time.sleep(FOLLOW_SECONDS)  # its end is not to be reported as the cause
        end_rank(RankError(text, first=first))


def processor_seconds(on_cuda: bool) -> float | None:
    """The main thread's processor time; None where a thread that waits uses it, or none is known.

    On Linux with the time for which it was ready and the processors were taken: on a crowded
    machine a rank at work has little more. Waiting for a GPU takes all of a core, so that only a
    compilation differs from it.
    """
    main = threading.main_thread()
    if on_cuda and not _compiles(sys._current_frames().get(main.ident or 0)):
        return None
    with suppress(OSError):
        ran, queued, _ = Path(f"/proc/self/task/{main.native_id}/schedstat").read_text().split()
        return (int(ran) + int(queued)) / 1e9
    if not hasattr(time, "pthread_getcpuclockid"):
        return None
    return time.clock_gettime(time.pthread_getcpuclockid(main.ident or 0))


def _compiles(frame: FrameType | None) -> bool:
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in ("/_dynamo/", "/_inductor/")):
            return True
        frame = frame.f_back
    return False


def location_of(frame: FrameType) -> str:
    """Where a thread stands: the innermost line of this package, as "micro_batches, data.py:12"."""
    own = Path(__file__).parent.parent
    found: FrameType | None = frame
    while found is not None and own not in Path(found.f_code.co_filename).parents:
        found = found.f_back
    found = found or frame
    return f"{found.f_code.co_name}, {Path(found.f_code.co_filename).name}:{found.f_lineno}"


def at_fault(answers: dict[int, Answer], here: set[int], world_size: int) -> tuple[int, str]:
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
