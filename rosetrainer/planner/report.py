"""The plan of a training run: what a step moves and a rank holds, as a table."""

from __future__ import annotations

import torch

from rosetrainer.config import TrainConfig
from rosetrainer.planner.layout import Plan, Work, plan
from rosetrainer.planner.settings import check_settings

RING = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}
"""Ring traffic of a rank is this x (n - 1) / n of the payload."""


def plan_training(config: TrainConfig, dtype: torch.dtype) -> Plan:
    """The plan of one of the ranks that config asks for. Raises ConfigError as check_settings."""
    check_settings(config.optim)
    dp = config.parallel.dp_size or 1
    work = Work(
        config.optim.micro_batch(dp),
        config.model.context_length,
        config.optim.accumulation(dp),
        product_bytes=dtype.itemsize,
        weight_bytes=8 if dtype == torch.float64 else 4,
    )
    return plan(config.model, config.parallel, work)


def describe(config: TrainConfig, found: Plan, dtype: torch.dtype) -> str:
    """The table; all sizes are bytes."""
    sizes = {"tp": config.parallel.tp_size or 1, "dp": config.parallel.dp_size or 1}
    lines = [
        f"{sizes['tp']} tensor-parallel x {sizes['dp']} data-parallel ranks, "
        f"V {config.model.vocab_size}, {str(dtype).removeprefix('torch.')}\n",
        f"{'a step moves':34} {'calls':>7} {'payload':>15} {'ring, a rank':>15}",
    ]
    total = 0.0
    for (axis, operation, phase), (calls, payload) in found.ledger.items():
        n = sizes[axis]
        ring = RING[operation] * (n - 1) / n * payload
        total += ring
        name = f"  {axis} {operation} {phase}"
        lines.append(f"{name:34} {calls:7,} {payload:15,} {ring:15,.0f}")
    lines.append(f"{'  together':34} {'':7} {'':15} {total:15,.0f}\n")
    lines.append(f"{'a rank holds':34} {'bytes':>23}")
    for name, size in found.memory.items():
        lines.append(f"  {name:32} {size:23,}")
    lines.append(f"  {'together':32} {sum(found.memory.values()):23,}")
    return "\n".join(lines)
