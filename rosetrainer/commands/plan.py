"""What a layout would move and hold, before anything is started."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from rosetrainer.commands.train import TrainCommand, parse_train_flags
from rosetrainer.config import TrainConfig
from rosetrainer.data.batches import open_corpus
from rosetrainer.hardware.performance import choose_dtype
from rosetrainer.planner.layout import Plan, Work, plan
from rosetrainer.planner.settings import check_settings
from rosetrainer.validation import ConfigError, Count, check_fields

MOST_LOGITS = 2**42  # of a micro-batch: they are counted chunk by chunk
RING = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}
"""Ring traffic of a rank is this x (n - 1) / n of the payload."""


@dataclass(frozen=True)
class PlanCommand(TrainCommand):
    """Predicts a step's communication and a rank's memory, by train's flags; starts no process."""

    vocabulary: Count | None = None
    """Number of token ids; the corpus's unless given."""


def main(argv: list[str]) -> int:
    """The command. Raises ConfigError for a user's mistake."""
    command = parse_train_flags(PlanCommand, argv, "plan")
    check_fields(command)
    config, parallel = command.config, command.config.parallel
    tp_size, dp_size = parallel.tp_size or 1, parallel.dp_size or 1
    if command.nproc:
        tp_size, dp_size = parallel.resolve(command.nproc)
    parallel = replace(parallel, tp_size=tp_size, dp_size=dp_size)
    vocabulary = command.vocabulary or corpus_vocabulary(config)
    config = replace(config.with_settings(vocab_size=vocabulary), parallel=parallel)
    config.check(tp_size * dp_size)
    rows = config.optim.micro_batch(dp_size)
    logits = rows * config.model.context_length * vocabulary
    if logits > MOST_LOGITS:
        raise ConfigError(
            f"{rows} sequences x context_length={config.model.context_length} x {vocabulary} ids "
            f"are {logits:.1e} logits in a forward pass, at most {MOST_LOGITS:.1e} can be planned; "
            f"try a smaller micro_batch_size or context_length"
        )
    dtype = choose_dtype(config.precision.dtype, torch.device("cpu"))
    print(describe(config, plan_training(config, dtype), dtype))
    return 0


def corpus_vocabulary(config: TrainConfig) -> int:
    try:
        return open_corpus(config.run.data, config.model.context_length).meta.vocab_size
    except ConfigError as error:
        raise ConfigError(f"{error}; or give --vocabulary") from None


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
