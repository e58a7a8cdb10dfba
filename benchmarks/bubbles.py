"""The bubble of 1F1B: as it ran, as simulated with measured times, and in theory, (p-1)/(m+p-1).

python benchmarks/bubbles.py

Two ranks, then four, with a thread each, and 2, 4, 8 and 16 micro-batches of one size. Between
theory and the run stand three simulations, so that each cause of a difference has its own column.
"""

from __future__ import annotations

import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch.distributed as dist

from benchmarks.our_step import OurStep
from benchmarks.side_by_side import Rounds, introduce, keep, median
from benchmarks.work import Work, parse_work
from rosetrainer.config import GPTConfig, ParallelConfig
from rosetrainer.environment import is_rank, usable_cores, world_from_environment
from rosetrainer.hardware.memory import keep_freed_memory
from rosetrainer.hardware.performance import choose_dtype
from rosetrainer.launch.launcher import launch
from rosetrainer.launch.rank import run_rank
from rosetrainer.parallel.context import ParallelContext, end_parallel, init_parallel
from rosetrainer.parallel.pipeline.schedule import Schedule
from rosetrainer.parallel.pipeline.simulation import checked_schedule, simulate
from rosetrainer.reporting.timeline import Times, gather_times, measured, simulated, theory

NAME, MICRO_BATCHES, WANTED = "bubbles", (2, 4, 8, 16), 0.1
DEFAULT = Work(
    GPTConfig(n_layers=8, n_heads=4, d_model=256, context_length=256, tied=False),
    batch_size=1,
    steps=1,
    rounds=7,
)
WAYS = ("theory", "stages", "actions", "messages", "measured")
EXPLAINED = """\
  theory: all stages take equally long, and so do all micro-batches; stages: each stage's F and B
  as measured, the simulation of --timeline; actions: each micro-batch's own time; messages: with
  the time of a message; measured: what is left is the runner and what the clock does not see"""


def one_step(step: OurStep, context: ParallelContext) -> tuple[Times, float]:
    """When each action began and ended on each rank, and the seconds of the whole step."""
    dist.barrier(context.pp.group)
    model: Any = step.model
    model.action_times = []
    started = perf_counter()
    step()
    seconds = perf_counter() - started
    times = gather_times(model.action_times, context.pp, context.device)
    model.action_times = None
    return times, seconds


def shares(schedule: Schedule, times: Times) -> dict[str, float]:
    """The bubble as a share of the step, by WAYS; "travel" is a message's seconds."""
    ran = measured(times)
    pairs = list(zip(schedule.actions, times, strict=True))
    own = {
        action: ended - began - waited
        for actions, noted in pairs
        for action, (began, ended, waited) in zip(actions, noted, strict=True)
    }
    travel = message_seconds(schedule, times)
    runs = {
        "theory": theory(schedule, ran.busy),
        "stages": simulated(schedule, times),
        "actions": simulate(schedule, lambda action: own[action]),
        "messages": simulate(schedule, lambda action: own[action], travel),
        "measured": ran,
    }
    return {name: run.bubble_share for name, run in runs.items()} | {"travel": travel}


def message_seconds(schedule: Schedule, times: Times) -> float:
    """From the end of an action to the beginning of one that has waited for its result: a median.

    0 where none has waited.
    """
    ends = {
        action: ended
        for actions, noted in zip(schedule.actions, times, strict=True)
        for action, (_, ended, _) in zip(actions, noted, strict=True)
    }
    found = []
    for actions, noted in zip(schedule.actions, times, strict=True):
        for action, (began, _, waited) in zip(actions, noted, strict=True):
            source = schedule.fed_by(action)
            if source and began < ends[source] < began + waited:
                found.append(began + waited - ends[source])
    return statistics.median(found) if found else 0.0


def compare(work: Work, context: ParallelContext) -> None:
    """On each rank of a pipeline; the first one prints and keeps."""
    first, p = context.rank == 0, context.pp.size
    dtype = choose_dtype("auto", context.device)
    steps = {
        m: OurStep(replace(work, batch_size=m * work.batch_size), dtype, context, m)
        for m in MICRO_BATCHES
    }
    found: Rounds = {f"m {m}": [] for m in steps}
    for number in range(-1, work.rounds):  # one that warms up
        for m, step in steps.items():
            times, seconds = one_step(step, context)
            if number >= 0:
                figures = shares(checked_schedule(context.parallel, m), times)
                rest = 1 - measured(times).length / seconds  # loss, norm, update
                found[f"m {m}"].append(figures | {"seconds": seconds, "rest": rest})
        if first and number >= 0:
            shown = ", ".join(f"{name} {one[-1]['measured']:.1%}" for name, one in found.items())
            print(f"p {p}, round {number + 1}, measured: {shown}", flush=True)
    if first:
        report(p, found)


def report(p: int, found: Rounds) -> None:
    print(f"  bubble as a share of the step; medians of {len(found['m 2'])} steps, p {p}")
    print(f"  {'':6}" + "".join(f"{name:>10}" for name in WAYS) + f"{'message':>12}{'rest':>8}")
    for name in found:
        row = "".join(f"{median(found, name, way):10.1%}" for way in WAYS)
        travel = f"{median(found, name, 'travel') * 1e6:9.0f} µs"
        print(f"  {name:6}{row}{travel}{median(found, name, 'rest'):8.1%}")
    load = os.getloadavg()[0]
    print(f"  load of the machine over the last minute: {load:.1f} on {os.cpu_count()} cores")
    if p > usable_cores():
        print(f"  {p} ranks share {usable_cores()} cores: who waits lends its core to others")
    for way in ("stages", "actions"):
        off = [abs(median(found, m, "measured") / median(found, m, way) - 1) for m in found]
        keep(f"bubbles-p{p}-{way}", max(off), WANTED, found, at_most=True, load=load)


def main(argv: list[str]) -> int:
    work = parse_work(argv, NAME, default=DEFAULT)
    if is_rank():
        keep_freed_memory()  # as `train` does
        context = init_parallel(ParallelConfig(pp_size=world_from_environment()[1]), "cpu")
        compare(work, context)
        end_parallel()
        return 0
    introduce(f"{work}, a thread each rank")
    print(EXPLAINED)
    return launch(2, argv, 1, f"benchmarks.{NAME}") or launch(4, argv, 1, f"benchmarks.{NAME}")


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))
