"""Tensor parallel: ours against torch's DTensor, and against one process; where the time goes.

python benchmarks/tensor_parallel.py

Two ranks with one thread each, four, and one process with two threads: the same model and the same
work, in bf16 where the processor has it, or as --dtype says, in turn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.breakdown import breakdown, without_communication
from benchmarks.dtensor_step import DTensorStep
from benchmarks.our_step import OurStep
from benchmarks.plain_step import plain_model
from benchmarks.side_by_side import Figures, Rounds, in_turn, introduce, keep, median
from benchmarks.work import Work, check_work, matmul_peaks, print_table, seconds_of, side_of
from rosetrainer.commands.flags import parse_flags
from rosetrainer.environment import is_rank, world_from_environment
from rosetrainer.hardware.memory import keep_freed_memory
from rosetrainer.hardware.performance import choose_dtype
from rosetrainer.launch.launcher import launch
from rosetrainer.launch.rank import run_rank
from rosetrainer.parallel.context import ParallelContext, end_parallel, init_tensor_parallel

NAME = "tensor_parallel"
RANKS = 2
ALONE, OURS, OURS_4 = "ours, one process", "ours, tp 2", "ours, tp 4"
DTENSOR, DTENSOR_FUSED = "DTensor, tp 2", "DTensor, tp 2, fused AdamW"
DTENSOR_WANTED, ALONE_WANTED, ALONE_WANTED_4 = 1.4, 0.95, 0.85


@dataclass(frozen=True)
class DtypeWork(Work):
    """One update of a GPT on random tokens, timed."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the products; auto is bfloat16 where the processor multiplies it."""

    @property
    def compute_dtype(self) -> torch.dtype:
        return choose_dtype(self.dtype, torch.device("cpu"))


def parse(argv: list[str]) -> DtypeWork:
    """Raises ConfigError."""
    work = parse_flags(DtypeWork, argv, f"python benchmarks/{NAME}.py")
    check_work(work, ranks_of(OURS_4), Work().model)
    return work


def ranks_of(name: str) -> int:
    return 4 if name == OURS_4 else RANKS


def ours(work: Work, dtype: torch.dtype, context: ParallelContext) -> Figures:
    step = OurStep(work, dtype, context)
    return {
        "seconds": seconds_of(step, work.steps),
        "parts": breakdown(step, work.steps),
        "without communication": without_communication(step, work.steps),
    }


def dtensor(work: Work, dtype: torch.dtype, fused: bool) -> Figures:
    mesh = init_device_mesh("cpu", (RANKS,))
    step = DTensorStep(work, dtype, plain_model(work.model), mesh, fused)
    return {"seconds": seconds_of(step, work.steps)}


def ours_alone(work: Work, dtype: torch.dtype, context: ParallelContext) -> Figures:
    return {"seconds": seconds_of(OurStep(work, dtype, context), work.steps)}


PARALLEL: dict[str, Callable[[Work, torch.dtype, ParallelContext], Figures]] = {
    OURS: ours,
    OURS_4: ours_alone,
    DTENSOR: lambda work, dtype, context: dtensor(work, dtype, fused=False),
    DTENSOR_FUSED: lambda work, dtype, context: dtensor(work, dtype, fused=True),
}


def one_round(name: str, work: DtypeWork) -> Figures:
    dtype = work.compute_dtype
    if name == "peak":
        return matmul_peaks([str(dtype).removeprefix("torch.")])
    if name in (ALONE, OURS, OURS_4):
        keep_freed_memory()  # as `train` does
    if name == ALONE:
        return {"seconds": seconds_of(OurStep(work, dtype), work.steps)}
    figures = PARALLEL[name](work, dtype, init_tensor_parallel(device="cpu"))
    end_parallel()
    return figures


def run_round(name: str, argv: list[str]) -> int:
    """One process, or the launcher of ranks, or one of these; rank 0 prints the figures."""
    if name in PARALLEL and not is_rank():
        return launch(ranks_of(name), ["--round", name, *argv], 1, f"benchmarks.{NAME}")
    figures = one_round(name, parse(argv))
    if world_from_environment()[0] == 0:
        print(json.dumps(figures), flush=True)
    return 0


def print_parts(found: Rounds) -> None:
    """The medians of each part of our step, and the bound."""
    print(f"where the time of {OURS} goes, on rank 0:")
    whole = median_part(found, "all")
    for name in found[OURS][0]["parts"]:
        seconds = median_part(found, name)
        print(f"  {name:32} {seconds * 1e3:6.0f} ms  {seconds / whole:4.0%}")
    bound = median(found, OURS, "without communication")
    print(
        f"  without communication (wrong results, only the time): {bound * 1e3:.0f} ms a step, "
        f"{median(found, ALONE, 'seconds') / bound:.2f} of one process"
    )


def median_part(found: Rounds, name: str) -> float:
    parts = {OURS: [figures["parts"] for figures in found[OURS]]}
    return median(parts, OURS, name)


def main(argv: list[str]) -> int:
    if argv[:1] == ["--round"]:
        return run_round(argv[1], argv[2:])
    work = parse(argv)
    dtype: Literal["float32", "bfloat16"] = (
        "bfloat16" if work.compute_dtype == torch.bfloat16 else "float32"
    )
    introduce(f"{work}, {dtype}, one process with 2 threads, 2 and 4 ranks with 1 each")
    threads = {ALONE: 2, **dict.fromkeys(PARALLEL, 1), "peak": 2}
    sides = [side_of(name, NAME, argv, count) for name, count in threads.items()]
    others = [name for name in threads if name not in (OURS, "peak")]
    found = in_turn(sides, work.rounds, {f"beside {name}": (name, OURS) for name in others})
    print_table(work, found, dict.fromkeys((ALONE, *PARALLEL), dtype))
    print_parts(found)
    seconds = median(found, OURS, "seconds")
    best = min(median(found, name, "seconds") for name in (DTENSOR, DTENSOR_FUSED))
    keep("tensor-parallel-dtensor", best / seconds, DTENSOR_WANTED, found)
    alone = median(found, ALONE, "seconds")
    keep("tensor-parallel-one-process", alone / seconds, ALONE_WANTED, found)
    of_four = median(found, OURS_4, "seconds")
    keep("tensor-parallel-four-ranks", alone / of_four, ALONE_WANTED_4, found)
    return 0


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))
