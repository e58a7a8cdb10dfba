"""The plan of a training run: what a step moves and a rank holds, as a table."""

from __future__ import annotations

import torch

from rosetrainer.config import TrainConfig
from rosetrainer.data.span_corruption import lengths
from rosetrainer.parallel.pipeline.simulation import (
    backward_takes_twice,
    checked_schedule,
    live_activations,
    simulate,
)
from rosetrainer.parallel.pipeline.stage import layers_of_stages
from rosetrainer.planner.layout import Plan, Work, plan
from rosetrainer.planner.settings import check_settings
from rosetrainer.planner.zero import shards_of

RING = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}
"""Ring traffic of a rank is this x (n - 1) / n of the payload."""

DIRECT = {"send": 1.0, "receive": 0.0}
"""A message is what its sender sends."""


def plan_training(config: TrainConfig, dtype: torch.dtype, pp_rank: int = 0) -> Plan:
    """The plan of one of the ranks that config asks for. Raises ConfigError as check_settings.

    Of ZeRO's shards the last one's, which is the largest.
    """
    check_settings(config.optim)
    dp, T = config.parallel.dp_size or 1, config.model.context_length
    S, T = lengths(T) if config.model.architecture == "t5" else (0, T)
    work = Work(
        config.optim.micro_batch(dp),
        T,
        config.optim.accumulation(dp),
        S,
        product_bytes=dtype.itemsize,
        weight_bytes=8 if dtype == torch.float64 else 4,
    )
    last = shards_of(config.parallel) - 1 if config.parallel.zero else 0
    return plan(config.model, config.parallel, work, pp_rank, last)


def describe(config: TrainConfig, dtype: torch.dtype) -> str:
    """The plan as tables, one for each rank of a pipeline; all sizes are bytes."""
    parallel = config.parallel
    sizes = {"tp": parallel.tp_size or 1, "dp": parallel.dp_size or 1, "pp": parallel.pp_size}
    sizes |= {"replicas": parallel.dp_replicas, "shards": shards_of(parallel)}
    stages = f" x {sizes['pp']} pipeline-parallel" if sizes["pp"] > 1 else ""
    parts = [
        f"{sizes['tp']} tensor-parallel x {sizes['dp']} data-parallel{stages} ranks, "
        f"V {config.model.vocab_size}, {str(dtype).removeprefix('torch.')}\n"
    ]
    if stages:
        parts.append(bubble(config))
    for pp_rank in range(sizes["pp"]):
        if stages:
            parts.append(share(config, pp_rank))
        parts += table(plan_training(config, dtype, pp_rank), sizes)
    return "\n".join(parts)


def table(found: Plan, sizes: dict[str, int]) -> list[str]:
    lines = [f"{'a step moves':34} {'calls':>7} {'payload':>15} {'ring, a rank':>15}"]
    total = 0.0
    for (axis, operation, phase), (calls, payload) in found.ledger.items():
        n = sizes[axis]
        part = DIRECT[operation] if operation in DIRECT else RING[operation] * (n - 1) / n
        total += part * payload
        name = f"  {axis} {operation} {phase}"
        lines.append(f"{name:34} {calls:7,} {payload:15,} {part * payload:15,.0f}")
    lines.append(f"{'  together':34} {'':7} {'':15} {total:15,.0f}\n")
    lines.append(f"{'a rank holds':34} {'bytes':>23}")
    for name, size in found.memory.items():
        lines.append(f"  {name:32} {size:23,}")
    lines.append(f"  {'together':32} {sum(found.memory.values()):23,}")
    if found.peak is not None:
        lines.append(f"  {'at once, in the backward pass':32} {found.peak:23,}")
    return lines


def bubble(config: TrainConfig) -> str:
    """A line: how much of a step the ranks of a pipeline wait."""
    micro_batches = config.optim.accumulation(config.parallel.dp_size or 1)
    schedule, name = checked_schedule(config.parallel, micro_batches), config.parallel.pp_schedule
    run = simulate(schedule, backward_takes_twice)
    return (
        f"{name}, {micro_batches} micro-batches: where all stages cost alike, "
        f"and backward twice as much as forward, a rank waits for {run.bubble_share:.1%} of the "
        f"step, and a step takes {run.bubble_ratio:.1%} longer than without waiting"
    )


def share(config: TrainConfig, pp_rank: int) -> str:
    """A line: what a rank of a pipeline has, and how much it holds at once."""
    micro_batches = config.optim.accumulation(config.parallel.dp_size or 1)
    actions = checked_schedule(config.parallel, micro_batches).actions[pp_rank]
    every = layers_of_stages(config.model, config.parallel)
    own = sorted({action.stage for action in actions})
    blocks = " and ".join(f"{every[stage][0]}-{every[stage][-1]}" for stage in own)
    return (
        f"\npp rank {pp_rank}: blocks {blocks}; the activations of at most "
        f"{live_activations(actions)} micro-batches at once, counted in each stage\n"
    )
