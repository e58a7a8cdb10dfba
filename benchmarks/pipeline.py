"""Pipelines: ours against torch.distributed.pipelining's, step time, memory and the runner's own.

python benchmarks/pipeline.py

Two ranks, then four, with a thread each: the same model in the same stages, 8 micro-batches, one
step of each side in turn in the same processes. Both sides clip and update.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
import torch.distributed as dist
from peak import Peak

from benchmarks.our_step import OurStep
from benchmarks.pipelining_step import PipeliningStep, untied
from benchmarks.plain_step import plain_model
from benchmarks.side_by_side import Rounds, introduce, keep, median
from benchmarks.work import Step, Work, parse_work
from rosetrainer.config import GPTConfig, ParallelConfig
from rosetrainer.environment import is_rank, world_from_environment
from rosetrainer.hardware.memory import keep_freed_memory
from rosetrainer.hardware.performance import choose_dtype
from rosetrainer.launch.launcher import launch
from rosetrainer.launch.rank import run_rank
from rosetrainer.parallel.context import ParallelContext, end_parallel, init_parallel
from rosetrainer.parallel.pipeline.stage import Stage

NAME, MICRO_BATCHES = "pipeline", 8
JUDGED = "ours, 1F1B"  # the default, for its time and its memory
OURS = {JUDGED: "1f1b", "ours, ZB-H1": "zero-bubble"}
TORCH = {"torch, 1F1B": "1F1B", "torch, interleaved zero-bubble": "InterleavedZeroBubble"}
TIME_WANTED, MEMORY_WANTED, OVERHEAD_WANTED = 1.1, 1.0, 0.03
DEFAULT = Work(
    GPTConfig(n_layers=8, n_heads=4, d_model=256, context_length=256, tied=False),
    batch_size=MICRO_BATCHES,
    steps=1,
    rounds=7,
)
UNTIMED = 2


def sides_of(work: Work, dtype: torch.dtype, context: ParallelContext) -> dict[str, Step]:
    sides: dict[str, Step] = {}
    for name, schedule in OURS.items():
        changed: Any = {"pp_schedule": schedule}
        parallel = replace(context.parallel, **changed)
        own = replace(context, parallel=parallel)
        sides[name] = OurStep(work, dtype, own, MICRO_BATCHES)
    for name, schedule in TORCH.items():
        assert context.pp.group
        plain = untied(plain_model(work.model))
        sides[name] = PipeliningStep(work, dtype, plain, context.pp.group, schedule, MICRO_BATCHES)
    return sides


def seconds_of_step(step: Step, context: ParallelContext) -> float:
    """Until the last rank has ended."""
    dist.barrier(context.pp.group)
    started = time.perf_counter()
    step()
    dist.barrier(context.pp.group)
    return time.perf_counter() - started


def most_bytes(step: Any, context: ParallelContext) -> int:
    """Of what a step makes or receives into, the most alive at once on the rank that has most."""
    with Peak(*step.model.parameters()) as peak:  # a view of a parameter is nothing new
        step()
    buffers = step.receive_buffers() if isinstance(step, PipeliningStep) else []
    most = torch.tensor(peak.bytes + sum(buffer.nbytes for buffer in buffers))
    dist.all_reduce(most, dist.ReduceOp.MAX, group=context.pp.group)
    return int(most)


def without_computing(step: OurStep) -> Callable[[], float]:
    """The schedule's actions, messages included, whose layers compute nothing: the runner alone."""
    smallest = min(step.model.parameters(), key=torch.Tensor.numel)

    def hidden(stage: Stage, x: Any, ids: Any, seed: Any) -> Any:
        x = stage.input_buffer(ids).zero_() if x is None else x
        return x + smallest.view(-1)[0]

    def loss(x: Any, labels: Any) -> Any:
        return x.mean(), None

    def run() -> float:
        from rosetrainer.parallel.pipeline.runner import accumulate_in_stages
        from rosetrainer.training.step import micro_batches

        batches = micro_batches(step.config, step.corpus, step.context, 0)
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(Stage, "hidden", hidden))
            head = step.model.output_head
            if hasattr(head, "loss"):
                stack.enter_context(mock.patch.object(head, "loss", loss))
            dist.barrier(step.context.pp.group)
            started = time.perf_counter()
            accumulate_in_stages(step.model, batches, step.context)
            dist.barrier(step.context.pp.group)
            seconds = time.perf_counter() - started
        step.optimizer.zero_grad()
        return seconds

    return run


def compare(work: Work, context: ParallelContext) -> None:
    """On each rank of a pipeline; the first one prints and keeps."""
    dtype, p = choose_dtype("auto", context.device), context.pp.size
    sides, first = sides_of(work, dtype, context), context.rank == 0
    for step in sides.values():
        for _ in range(UNTIMED):
            step()
    found: Rounds = {name: [] for name in (*sides, *(f"{name}, runner" for name in OURS))}
    for number in range(work.rounds):
        names = list(sides) if number % 2 == 0 else list(reversed(sides))
        for name in names:
            found[name].append({"seconds": seconds_of_step(sides[name], context)})
        for name in OURS:
            step = sides[name]
            assert isinstance(step, OurStep)
            found[f"{name}, runner"].append({"seconds": without_computing(step)()})
        if first:
            shown = ", ".join(f"{name} {one[-1]['seconds']:.3f}" for name, one in found.items())
            print(f"p {p}, round {number + 1}, seconds: {shown}", flush=True)
    memory = {name: most_bytes(step, context) for name, step in sides.items()}
    if first:
        report(p, found, memory)


def report(p: int, found: Rounds, memory: dict[str, int]) -> None:
    for name, bytes_ in memory.items():
        seconds = median(found, name, "seconds")
        print(f"  p {p}  {name:32} {seconds * 1e3:7.0f} ms a step {bytes_ / 2**20:8.1f} MiB")
    load = os.getloadavg()[0]
    print(
        f"  p {p}  load of the machine over the last minute: {load:.1f} on {os.cpu_count()} cores"
    )
    theirs = min(TORCH, key=lambda name: median(found, name, "seconds"))
    ratio = median(found, theirs, "seconds") / median(found, JUDGED, "seconds")
    told: dict[str, Any] = {"ours": JUDGED, "theirs": theirs, "bytes": memory, "load": load}
    keep(f"pipeline-p{p}-time", ratio, TIME_WANTED, found, **told)
    keep(
        f"pipeline-p{p}-memory",
        memory[JUDGED] / memory[theirs],
        MEMORY_WANTED,
        found,
        at_most=True,
        **told,
    )
    shares = [
        statistics.median(
            runner["seconds"] / whole["seconds"]
            for runner, whole in zip(found[f"{name}, runner"], found[name], strict=True)
        )
        for name in OURS
    ]
    keep(f"pipeline-p{p}-overhead", max(shares), OVERHEAD_WANTED, found, at_most=True, **told)


def main(argv: list[str]) -> int:
    work = parse_work(argv, NAME, default=DEFAULT)
    if is_rank():
        keep_freed_memory()  # as `train` does
        context = init_parallel(ParallelConfig(pp_size=world_from_environment()[1]), "cpu")
        compare(work, context)
        end_parallel()
        return 0
    introduce(f"{work}, a thread each rank, {MICRO_BATCHES} micro-batches")
    return launch(2, argv, 1, f"benchmarks.{NAME}") or launch(4, argv, 1, f"benchmarks.{NAME}")


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))
