"""Data-parallel: ours at ZeRO's levels against DDP, ZeroRedundancyOptimizer and fully_shard.

python benchmarks/sharded.py

Two ranks, then four, with a thread each, in bf16 where the processor has it: the same model and the
same work, one step of each side in turn in the same processes. All sides clip and update.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
import torch.distributed as dist
from peak import Allocated

from benchmarks.our_step import OurStep
from benchmarks.plain_step import plain_model
from benchmarks.sharded_step import (
    DataParallelStep,
    FullyShardAutocastStep,
    FullyShardStep,
    ZeroRedundancyStep,
)
from benchmarks.side_by_side import (
    Figures,
    Rounds,
    Side,
    StayingSide,
    in_turn,
    introduce,
    keep,
    median,
    paired_ratio,
)
from benchmarks.work import Step, Work, parse_work
from rosetrainer.config import GPTConfig, ParallelConfig
from rosetrainer.environment import is_rank, world_from_environment
from rosetrainer.hardware.memory import keep_freed_memory
from rosetrainer.hardware.performance import choose_dtype
from rosetrainer.launch.launcher import launch
from rosetrainer.launch.rank import run_rank
from rosetrainer.parallel.context import ParallelContext, end_parallel, init_parallel

NAME = "sharded"
RANKS = (2, 4)
LEVEL_0, LATE, LEVEL_1 = "ours, zero 0", "ours, zero 0, no overlap", "ours, zero 1"
LEVEL_3, LATE_3 = "ours, zero 3", "ours, zero 3, no overlap"
OURS: dict[str, dict[str, Any]] = {
    LEVEL_0: {},
    LATE: {"overlap": False},
    LEVEL_1: {"zero": 1},
    LEVEL_3: {"zero": 3},
    LATE_3: {"zero": 3, "overlap": False},
}
DDP, REDUNDANCY = "DDP", "ZeroRedundancyOptimizer"
FULLY, AUTOCAST = "fully_shard", "fully_shard, autocast"
THEIRS: dict[str, type[DataParallelStep]] = {
    DDP: DataParallelStep,
    REDUNDANCY: ZeroRedundancyStep,
    FULLY: FullyShardStep,
    AUTOCAST: FullyShardAutocastStep,
}
PAIRS = {
    "ddp": (DDP, LEVEL_0, 1.0),
    "zero-redundancy": (REDUNDANCY, LEVEL_1, 1.15),
    "fully-shard": (FULLY, LEVEL_3, 1.15),
    "fully-shard-autocast": (AUTOCAST, LEVEL_3, 1.15),
    "overlap": (LATE, LEVEL_0, 1 / 0.95),
    "overlap-zero-3": (LATE_3, LEVEL_3, 1 / 0.95),
}
"""By what they compare: the other side, ours, how many times as fast it should be."""
MEMORY = {"memory": AUTOCAST, "memory-bf16": FULLY}
"""By what they compare with ours at level 3: the other side. Under autocast what goes from block to
block is fp32, as in ours; under fully_shard's own policy it is bf16 too."""
MEMORY_WANTED = 1.0
DEFAULT = Work(
    GPTConfig(n_layers=8, n_heads=8, d_model=512, context_length=256),
    batch_size=8,
    steps=1,
    rounds=15,
)


def builders(
    work: Work, dtype: torch.dtype, context: ParallelContext
) -> dict[str, Callable[[], Step]]:
    def ours(changes: dict[str, Any]) -> Step:
        own = replace(context, parallel=replace(context.parallel, **changes))
        return OurStep(work, dtype, own, context.dp.size)

    made: dict[str, Callable[[], Step]] = {}
    for name, changes in OURS.items():
        made[name] = lambda changes=changes: ours(changes)  # type: ignore[misc]
    for name, kind in THEIRS.items():
        made[name] = lambda kind=kind: kind(work, dtype, plain_model(work.model))  # type: ignore[misc]
    return made


def answer(work: Work, context: ParallelContext) -> None:
    """On each rank: sets all sides up, then makes a step of whichever rank 0 is asked for.

    Rank 0 first prints what each side holds at most, on the rank that holds most.
    """
    dtype, sides, memory = choose_dtype("auto", context.device), dict[str, Step](), {}
    for name, build in builders(work, dtype, context).items():
        with Allocated() as allocated:
            sides[name] = build()
            for _ in range(2):  # the first one makes moments and buffers
                allocated.mark()
                sides[name]()
        most = torch.tensor(allocated.peak)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        memory[name] = int(most)
    if context.rank == 0:
        print(json.dumps(memory), flush=True)
    names = [*sides]
    while True:
        line = sys.stdin.readline().strip() if context.rank == 0 else ""
        chosen = torch.tensor(names.index(line) if line else -1)
        dist.broadcast(chosen, 0)
        if chosen < 0:
            return
        started = time.perf_counter()
        sides[names[int(chosen)]]()
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


def compare(ranks: int, work: Work, argv: list[str]) -> None:
    side = Side(f"{ranks} ranks", [f"benchmarks/{NAME}.py", "--ranks", str(ranks), *argv])
    with side.start(stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        memory = StayingSide(side.name, process).figures()
        pairs = {name: pair[:2] for name, pair in PAIRS.items()}
        sides = [SideOfRanks(name, process) for name in (*OURS, *THEIRS)]
        found = in_turn(sides, work.rounds, pairs, ratio=paired_ratio)
    report(ranks, found, memory)


def report(ranks: int, found: Rounds, memory: Figures) -> None:
    for name, most in memory.items():
        seconds = median(found, name, "seconds") * 1e3
        print(f"  {ranks} ranks  {name:26} {seconds:7.0f} ms a step {most / 2**20:8.1f} MiB")
    load = os.getloadavg()[0]
    print(f"  load of the machine over the last minute: {load:.1f} on {os.cpu_count()} cores")
    told: dict[str, Any] = {"bytes": memory, "load": load}
    for name, (theirs, ours, wanted) in PAIRS.items():
        keep(f"sharded-{ranks}-{name}", paired_ratio(found, theirs, ours), wanted, found, **told)
    how = {"at_most": True, **told}
    for name, theirs in MEMORY.items():
        ratio = memory[LEVEL_3] / memory[theirs]
        keep(f"sharded-{ranks}-{name}", ratio, MEMORY_WANTED, found, **how)


def main(argv: list[str]) -> int:
    ranks = 0
    if argv[:1] == ["--ranks"]:
        ranks, argv = int(argv[1]), argv[2:]
    work = parse_work(argv, NAME, default=DEFAULT)
    if is_rank():
        keep_freed_memory()  # as `train` does
        context = init_parallel(ParallelConfig(dp_size=world_from_environment()[1]), "cpu")
        answer(work, context)
        end_parallel()
        return 0
    if ranks:
        return launch(ranks, argv, 1, f"benchmarks.{NAME}")
    introduce(f"{work}, a thread each rank")
    for ranks in RANKS:
        compare(ranks, work, argv)
    return 0


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))
