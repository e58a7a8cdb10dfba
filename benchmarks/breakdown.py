"""Where the time of a tensor-parallel step goes: matmul, other compute, communication, waiting.

Every sum over the ranks is noted: when it began, how long the rank then could only wait for it.
The same sums are measured alone, with both ranks ready. Of the time that a rank waited, as much as
the sum takes alone, less what it computed meanwhile, is communication; the rest is waiting for the
other rank, which came later.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.our_step import OurStep
from benchmarks.work import seconds_of
from rosetrainer.hardware import shared_sums
from rosetrainer.parallel.context import Axis

MATMULS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product", "mkldnn", "_linear")
"""Names of operations, in part, that are matrix products. Attention's fused kernels are, mostly."""

Kind = tuple[tuple[int, ...], torch.dtype]


@dataclass
class Sum:
    """An all-reduce under way, as comm.py sees it: a Work."""

    kind: Kind
    work: Any
    begun: float = field(default_factory=time.perf_counter)
    meanwhile: float = 0.0
    waited: float = 0.0

    def wait(self) -> None:
        since = time.perf_counter()
        self.work.wait()
        self.meanwhile, self.waited = since - self.begun, time.perf_counter() - since

    def communication(self, alone: float) -> float:
        """Of the seconds waited, those for which the sum itself is to blame."""
        return min(self.waited, max(alone - self.meanwhile, 0.0))


@contextmanager
def noted() -> Iterator[list[Sum]]:
    """The list of all sums that begin in this context."""
    sums: list[Sum] = []
    real = shared_sums.all_reduce

    def all_reduce(tensor: Tensor, *arguments: Any, **options: Any) -> Sum:
        sums.append(Sum((tuple(tensor.shape), tensor.dtype), real(tensor, *arguments, **options)))
        return sums[-1]

    with mock.patch.object(shared_sums, "all_reduce", all_reduce):
        yield sums


class Nothing:
    def wait(self) -> None:
        pass


def without_communication(step: OurStep, steps: int) -> float:
    """Seconds of a step whose sums are left out: wrong figures, and the bound of what overlap can
    reach."""
    with mock.patch.object(shared_sums, "all_reduce", lambda *arguments, **options: Nothing()):
        return seconds_of(step, steps)


def alone(kind: Kind, axis: Axis, repeats: int = 7) -> float:
    """Seconds of one all-reduce for which all ranks are ready."""
    shape, dtype = kind
    buffer = torch.zeros(shape, dtype=dtype)
    found = []
    for _ in range(repeats):
        dist.barrier(axis.group)
        started = time.perf_counter()
        shared_sums.all_reduce(buffer, dist.ReduceOp.SUM, axis.group, True).wait()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def matmul_seconds(step: OurStep, steps: int) -> float:
    """Seconds of a step inside matrix products, by the profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    microseconds = sum(
        event.self_cpu_time_total
        for event in profiler.key_averages()
        if event.key.startswith(("aten::", "mkldnn::"))
        and any(name in event.key for name in MATMULS)
    )
    return float(microseconds) / 1e6 / steps


def breakdown(step: OurStep, steps: int) -> dict[str, float]:
    """Seconds of a step of this rank, by what it does; the parts add up to "all"."""
    tp = step.context.tp
    before = tp.ledger.wait_seconds
    started = time.perf_counter()
    with noted() as sums:
        for _ in range(steps):
            step()
    whole = (time.perf_counter() - started) / steps
    waited = (tp.ledger.wait_seconds - before) / steps
    calls = {operation for operation, _ in tp.ledger.entries}
    assert calls == {"all_reduce"}, f"only all_reduce is noted here, and there are {calls}"
    costs = {kind: alone(kind, tp) for kind in sorted({s.kind for s in sums}, key=str)}
    communication = sum(s.communication(costs[s.kind]) for s in sums) / steps
    matmul = matmul_seconds(step, steps)
    return {
        "all": whole,
        "matmul": matmul,
        "other compute": whole - waited - matmul,
        "communication": communication,
        "waiting for the other rank": waited - communication,
        "sums, alone": sum(costs[s.kind] for s in sums) / steps,
    }
