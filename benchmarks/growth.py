"""How a step's time and memory grow: each size of the work doubled, beside its closed form.

python benchmarks/growth.py

A rank with a thread: a base, and beside it the same with d_model, layers, T, V or the batch
doubled, one step of each in turn in the same process. Time should grow as the floating-point
operations do, and the bytes at the peak as `plan` says. Then two and four ranks divide the base's
model (tp) or its batch (dp).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch

from benchmarks.our_step import OurStep
from benchmarks.side_by_side import Figures, Rounds, Side, introduce, keep, median, paired_ratio
from benchmarks.staying_ranks import answer, ask_in_turn
from benchmarks.work import Step, Work, parse_work
from rosetrainer.config import GPTConfig, ParallelConfig
from rosetrainer.environment import is_rank, usable_cores, world_from_environment
from rosetrainer.hardware.memory import keep_freed_memory
from rosetrainer.hardware.performance import choose_dtype
from rosetrainer.launch.launcher import launch
from rosetrainer.launch.rank import run_rank
from rosetrainer.parallel.context import ParallelContext, end_parallel, init_parallel
from rosetrainer.planner.layout import Work as PlannedWork
from rosetrainer.planner.layout import plan

NAME = "growth"
RANKS = (2, 4)
BASE = "base"
MOST = 1.1
"""How many times as fast as its closed form something may grow."""
DEFAULT = Work(
    GPTConfig(vocab_size=4096, n_layers=4, n_heads=4, d_model=256, context_length=256),
    batch_size=4,
    steps=1,
    rounds=15,
)


def doubled(base: Work) -> dict[str, Work]:
    """By what is doubled; d_model with its heads, so that a head stays as wide."""
    model = base.model
    sizes = {
        "d_model": replace(model, d_model=2 * model.d_model, n_heads=2 * model.n_heads),
        "layers": replace(model, n_layers=2 * model.n_layers),
        "T": replace(model, context_length=2 * model.context_length),
        "V": replace(model, vocab_size=2 * model.vocab_size),
    }
    works = {name: replace(base, model=changed) for name, changed in sizes.items()}
    return {BASE: base, **works, "batch": replace(base, batch_size=2 * base.batch_size)}


def planned_peak(work: Work, parallel: ParallelConfig, dtype: torch.dtype) -> int:
    rows = work.batch_size // (parallel.dp_size or 1)
    of_rank = PlannedWork(rows, work.model.context_length, product_bytes=dtype.itemsize)
    most = plan(work.model, parallel, of_rank).peak
    assert most is not None
    return most


def builders(work: Work, context: ParallelContext) -> dict[str, Callable[[], Step]]:
    dtype = choose_dtype("auto", context.device)
    works = doubled(work) if context.world_size == 1 else {BASE: work}
    made: dict[str, Callable[[], Step]] = {}
    for name, one in works.items():
        made[name] = partial(OurStep, one, dtype, context, context.dp.size)
    return made


def ask(
    layout: ParallelConfig, names: list[str], rounds: int, argv: list[str]
) -> tuple[Rounds, Figures]:
    sizes = [str(layout.tp_size), str(layout.dp_size)]
    side = Side(" x ".join(sizes), [f"benchmarks/{NAME}.py", "--layout", *sizes, *argv])
    return ask_in_turn(side, names, rounds, {name: (name, BASE) for name in names[1:]})


def report_sizes(work: Work, argv: list[str], dtype: torch.dtype) -> tuple[Rounds, Figures]:
    works, alone = doubled(work), ParallelConfig(1, 1)
    found, memory = ask(alone, [*works], work.rounds, argv)
    base = planned_peak(work, alone, dtype)
    print("  doubled     ms a step   times   FLOPs x     MiB   times    plan x")
    worst = {}
    for name, one in works.items():
        seconds, bytes_held = median(found, name, "seconds"), memory[name]
        time = paired_ratio(found, name, BASE)
        flops, held = one.flops / work.flops, bytes_held / memory[BASE]
        form = planned_peak(one, alone, dtype) / base
        print(
            f"  {name:10} {seconds * 1e3:9.0f} {time:8.2f} {flops:9.2f} {bytes_held / 2**20:8.1f} "
            f"{held:6.2f} {form:9.2f}"
        )
        worst[name] = max(time / flops, held / form)
    fastest = max(worst, key=worst.__getitem__)
    print(f"  what grows fastest beside its closed form: {fastest}, {worst[fastest]:.2f} times")
    keep(NAME, worst[fastest], MOST, found, at_most=True, bytes=memory)
    return found, memory


def report_ranks(
    work: Work, argv: list[str], dtype: torch.dtype, alone: tuple[Rounds, Figures]
) -> None:
    print(f"  ranks, on {usable_cores()} cores     ms a step   times     MiB   times    plan x")
    one = planned_peak(work, ParallelConfig(1, 1), dtype)
    for ranks in RANKS:
        for name, layout in (("tp", ParallelConfig(ranks, 1)), ("dp", ParallelConfig(1, ranks))):
            found, memory = ask(layout, [BASE], work.rounds, argv)
            seconds = median(found, BASE, "seconds")
            print(
                f"  {name} {ranks}                   {seconds * 1e3:9.0f} "
                f"{seconds / median(alone[0], BASE, 'seconds'):7.2f} {memory[BASE] / 2**20:7.1f} "
                f"{memory[BASE] / alone[1][BASE]:7.2f} "
                f"{planned_peak(work, layout, dtype) / one:9.2f}"
            )


def main(argv: list[str]) -> int:
    sizes: list[int] = []
    if argv[:1] == ["--layout"]:
        sizes, argv = [int(word) for word in argv[1:3]], argv[3:]
    work = parse_work(argv, NAME, default=DEFAULT)
    if is_rank():
        keep_freed_memory()  # as `train` does
        world = world_from_environment()[1]
        assert sizes[0] * sizes[1] == world
        context = init_parallel(ParallelConfig(tp_size=sizes[0], dp_size=sizes[1]), "cpu")
        answer(builders(work, context), context)
        end_parallel()
        return 0
    if sizes:
        return launch(
            sizes[0] * sizes[1], ["--layout", *map(str, sizes), *argv], 1, f"benchmarks.{NAME}"
        )
    introduce(f"{work}, a thread each rank")
    dtype = choose_dtype("auto", torch.device("cpu"))
    alone = report_sizes(work, argv, dtype)
    report_ranks(work, argv, dtype, alone)
    return 0


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))
