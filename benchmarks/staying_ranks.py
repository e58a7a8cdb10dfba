"""Sides that are ranks together: each rank has all of them, and makes a step of which it is asked.

So all are measured in turn in the same processes, and what they hold at most, once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from peak import Allocated

from benchmarks.side_by_side import (
    Figures,
    Pairs,
    Rounds,
    Side,
    StayingSide,
    in_turn,
    paired_ratio,
)
from benchmarks.work import Step
from rosetrainer.parallel.context import ParallelContext


def answer(builders: Mapping[str, Callable[[], Step]], context: ParallelContext) -> None:
    """On each rank: sets all sides up, then makes a step of whichever rank 0 is asked for.

    Rank 0 first prints what each side holds at most, on the rank that holds most.
    """
    sides, memory, alone = dict[str, Step](), {}, context.world_size == 1
    for name, build in builders.items():
        with Allocated() as allocated:
            sides[name] = build()
            for _ in range(2):  # the first one makes moments and buffers
                allocated.mark()
                sides[name]()
        most = torch.tensor(allocated.peak)
        if not alone:
            dist.all_reduce(most, dist.ReduceOp.MAX)
        memory[name] = int(most)
    if context.rank == 0:
        print(json.dumps(memory), flush=True)
    names = [*sides]
    while True:
        line = sys.stdin.readline().strip() if context.rank == 0 else ""
        chosen = torch.tensor(names.index(line) if line else -1)
        if not alone:
            dist.broadcast(chosen, 0)
        if chosen < 0:
            return
        started = time.perf_counter()
        sides[names[int(chosen)]]()
        if not alone:
            dist.barrier()  # until the last rank has ended
        if context.rank == 0:
            print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


@dataclass(frozen=True)
class SideOfRanks:
    """A step of one side, by ranks that have all of them."""

    name: str
    process: subprocess.Popen[str]

    def run(self) -> Figures:
        return StayingSide(self.name, self.process, asks=self.name).run()


def ask_in_turn(
    side: Side, names: Sequence[str], rounds: int, pairs: Pairs
) -> tuple[Rounds, Figures]:
    """Rounds of each of the names, by ranks that `answer`, and the bytes of each at the peak."""
    with side.start(stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        memory = StayingSide(side.name, process).figures()
        sides = [SideOfRanks(name, process) for name in names]
        return in_turn(sides, rounds, pairs, ratio=paired_ratio), memory
