"""Data-parallel: ours at ZeRO's levels against DDP, ZeroRedundancyOptimizer and fully_shard.

python benchmarks/sharded.py

Two ranks, then four, with a thread each, in bf16 where the processor has it: the same model and the
same work, one step of each side in turn in the same processes. All sides clip and update.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch

from benchmarks.our_step import OurStep
from benchmarks.plain_step import plain_model
from benchmarks.sharded_step import (
    DataParallelStep,
    FullyShardAutocastStep,
    FullyShardStep,
    ZeroRedundancyStep,
)
from benchmarks.side_by_side import Figures, Rounds, Side, introduce, keep, median, paired_ratio
from benchmarks.staying_ranks import answer, ask_in_turn
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


def compare(ranks: int, work: Work, argv: list[str]) -> None:
    side = Side(f"{ranks} ranks", [f"benchmarks/{NAME}.py", "--ranks", str(ranks), *argv])
    pairs = {name: pair[:2] for name, pair in PAIRS.items()}
    report(ranks, *ask_in_turn(side, (*OURS, *THEIRS), work.rounds, pairs))


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
        answer(builders(work, choose_dtype("auto", context.device), context), context)
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
