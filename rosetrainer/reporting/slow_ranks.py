"""Finds ranks that compute slowly, while training goes on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from rosetrainer.parallel.comm import all_gather
from rosetrainer.parallel.context import Axis


class SlowRanks:
    """Compares the seconds of a step that each rank does not spend waiting for others.

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
        self._reported: set[int] = set()
        self.begin_step()

    def begin_step(self) -> None:
        self._started, self._waited = time.perf_counter(), self._waited_so_far()

    def end_step(self) -> str:
        """A line about slow ranks, once for each in a run, or ""."""
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
        found = (suspects & self._suspects) - self._reported
        self._suspects, self._reported = suspects, self._reported | found
        return "; ".join(
            f"rank {rank} is slow: {busy[rank] * 1000:.0f} ms a step by itself, where the others "
            f"need {statistics.median(busy[:rank] + busy[rank + 1 :]) * 1000:.0f}"
            for rank in sorted(found)
        )

    def _waited_so_far(self) -> float:
        return sum(axis.ledger.wait_seconds for axis in self._axes)


def slow_ranks(busy: list[float], factor: float, least: float) -> set[int]:
    """Ranks whose seconds exceed the median of the others by factor, and by `least` seconds."""
    slow = set()
    for rank, own in enumerate(busy):
        others = statistics.median(busy[:rank] + busy[rank + 1 :])
        if own > factor * others and own - others > least:
            slow.add(rank)
    return slow
