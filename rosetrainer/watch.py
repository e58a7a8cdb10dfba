"""Ranks that hang, or that the others wait for: noticed, and named."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from rosetrainer.comm import all_gather
from rosetrainer.failures import answer, is_first
from rosetrainer.parallel_context import Axis
from rosetrainer.rank import RankError, end_rank

POLL_SECONDS = 0.25
ANSWER_SECONDS = 2.5
"""All ranks stop making progress at nearly the same time; so long each has to say so."""


class HangWatch:
    """A thread that ends this rank if it makes no progress, and names the rank at fault.

    Progress is a collective begun or a `beat`. A rank that cannot answer is stopped; else the one
    at fault is the one that has begun the fewest collectives: the others wait in the next.
    """

    def __init__(self, store: dist.Store, world: Axis, seconds: float):
        self._store, self._world, self._seconds = store, world, seconds
        self._axes: Sequence[Axis] = (world,)
        self._beats = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)
        self._thread.start()

    def follow(self, axes: Sequence[Axis]) -> None:
        """Counts the collectives of these as well."""
        self._axes = (self._world, *axes)

    def beat(self) -> None:
        """Says that this rank is at work although it begins no collective."""
        self._beats += 1

    def close(self) -> None:
        self._ended.set()
        self._thread.join()  # one that is alive when the interpreter ends can abort the process

    def _watch(self) -> None:
        last, since = (-1, -1), time.monotonic()
        while not self._ended.wait(POLL_SECONDS):
            now = (self._beats, sum(axis.ledger.begun for axis in self._axes))
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > self._seconds:
                self._end(now[1])

    def _end(self, begun: int) -> None:
        text = answer(lambda: self._verdict(begun), ANSWER_SECONDS + 1)
        if text is None:
            host = "the process that keeps the ranks' store, by default of rank 0's machine,"
            text = self._told(f"{host} does not answer") if self._world.rank == 1 else ""
        if not text:
            time.sleep(1.0)  # the end of this rank is not to be told as the cause
        end_rank(RankError(text))

    def _verdict(self, begun: int) -> str:
        """What this rank has to say of who is at fault; nothing if another one says it."""
        key = "hang/{}".format
        self._store.set(key(self._world.rank), str(begun))
        deadline = time.monotonic() + ANSWER_SECONDS
        ranks = range(self._world.size)
        while True:
            said = [rank for rank in ranks if self._store.check([key(rank)])]
            answers = {rank: int(self._store.get(key(rank))) for rank in said}
            if len(answers) == self._world.size or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        fault, why = at_fault(answers, self._world.size)
        speaks = self._world.rank == min(set(answers) - {fault}, default=self._world.rank)
        if speaks:
            is_first(self._store)
        return self._told(f"rank {fault} {why}") if speaks else ""

    def _told(self, who: str) -> str:
        return (
            f"no progress for {self._seconds:g} s: {who}; all ranks end, and the same command goes "
            f"on from the last checkpoint; --timeout gives slower ranks more time"
        )


def at_fault(begun: dict[int, int], world_size: int) -> tuple[int, str]:
    """The rank that hangs, and how one can tell, out of the collectives that each has begun."""
    silent = [rank for rank in range(world_size) if rank not in begun]
    if silent:
        return silent[0], "gives no sign of life"
    rank = min(begun, key=lambda r: begun[r])
    if begun[rank] == max(begun.values()):
        return rank, "waits like all others: a connection may be lost"
    return rank, f"has not come to collective {begun[rank] + 1}, in which others wait"


class Pace:
    """Compares what each rank needs for a step by itself, the waiting for others taken off.

    A rank that needs more than SLOW times the median of the others, in two windows of steps one
    after the other, is slow. On CUDA the waiting is the device's, and nothing is compared.
    """

    WINDOW = 5
    SLOW = 3.0
    LEAST_SECONDS = 0.01

    def __init__(self, world: Axis, axes: Sequence[Axis], device: torch.device) -> None:
        self._world, self._axes, self._device = world, axes, device
        self._busy: list[float] = []
        self._suspects: set[int] = set()
        self._told: set[int] = set()
        self.begin()

    def begin(self) -> None:
        """Before each step."""
        self._started, self._waited = time.perf_counter(), self._waited_so_far()

    def end(self) -> str:
        """After each step: a line about ranks newly found slow, or ""."""
        if self._world.size == 1 or self._device.type == "cuda":
            return ""
        waited = self._waited_so_far() - self._waited
        self._busy.append(time.perf_counter() - self._started - waited)
        if len(self._busy) < self.WINDOW:
            return ""
        own = torch.tensor([statistics.median(self._busy)], dtype=torch.float64)
        self._busy.clear()
        busy = all_gather(own, self._world, "pace", dim=0).tolist()
        suspects = slow_ranks(busy, self.SLOW, self.LEAST_SECONDS)
        found = (suspects & self._suspects) - self._told
        self._suspects, self._told = suspects, (self._told | found) & suspects
        return "; ".join(
            f"rank {rank} is slow: {busy[rank] * 1000:.0f} ms a step by itself, where the others "
            f"need {statistics.median(busy[:rank] + busy[rank + 1 :]) * 1000:.0f}"
            for rank in sorted(found)
        )

    def _waited_so_far(self) -> float:
        return sum(axis.ledger.waited for axis in self._axes)


def slow_ranks(busy: list[float], factor: float, least: float) -> set[int]:
    """Ranks whose seconds exceed the median of the others by factor, and by `least` seconds."""
    slow = set()
    for rank, own in enumerate(busy):
        others = statistics.median(busy[:rank] + busy[rank + 1 :])
        if own > factor * others and own - others > least:
            slow.add(rank)
    return slow
