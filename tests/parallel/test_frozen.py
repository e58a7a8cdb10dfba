"""Parameters that are not trained, at level 3 of ZeRO: what is moved and freed, and what is not."""

from __future__ import annotations

from dataclasses import replace

import torch
from oracle import dense_model, tiny_config
from parallel.test_zero import ACCUMULATION, own_batches
from ranks import run_ranks
from torch import Tensor

from rosetrainer.config import OptimConfig, ParallelConfig
from rosetrainer.models.gpt import GPTModel
from rosetrainer.optim.frozen import freeze
from rosetrainer.optim.optimizer import build_optimizer
from rosetrainer.parallel.context import init_parallel
from rosetrainer.parallel.sharding import gather_whole, load_whole
from rosetrainer.parallel.zero.frozen import PartlyFrozen
from rosetrainer.parallel.zero.groups import shard_model
from rosetrainer.parallel.zero.sharded_model import ShardedModel, sharding_of
from rosetrainer.parallel.zero.unit import Unit
from rosetrainer.training.step import compute_gradients

# A gradient flows through the last block to what is trained of the one before it, and ends there.
PATTERNS = "*embedding*,blocks.0.*,blocks.1.feed_forward.*,blocks.2.*"


def frozen_blocks_held(sharded: PartlyFrozen) -> list[int]:
    """From now on, of how many blocks the frozen parameters are whole when some have come."""
    found: list[int] = []

    def fill(unit: Unit, whole: list[Tensor], rows: Tensor) -> None:
        original(unit, whole, rows)
        blocks = [one.whole[0].untyped_storage().nbytes() > 0 for one in sharded.frozen[1:]]
        found.append(sum(blocks))

    original, Unit._fill = Unit._fill, fill  # type: ignore[assignment, method-assign]
    return found


def check_frozen() -> None:
    config = tiny_config(d_model=25, d_ff=35, n_layers=3, tied=False)
    context = init_parallel(ParallelConfig(dp_size=3, zero=3))
    model, dp = GPTModel(config, context).double(), context.dp
    load_whole(model, dense_model(config).state_dict())
    freeze(model, PATTERNS)
    shard_model(model, context)
    sharded, optimizer = sharding_of(model), build_optimizer(model, OptimConfig(weight_decay=0.3))
    assert isinstance(sharded, PartlyFrozen)
    before, held = gather_whole(model), frozen_blocks_held(sharded)
    dp.ledger.clear()
    compute_gradients(model, own_batches(context, config, 0), context)
    calls = {key: traffic.calls for key, traffic in dp.ledger.entries.items()}
    # Forward in each micro-batch two frozen blocks and a trained one; once in the step what stands
    # outside, frozen or not, and the frozen part of the block where the backward pass ends, which
    # stays. Backward that part: the last blocks of either kind are there.
    assert calls["all_gather", "forward"] == ACCUMULATION * (2 + 1) + 2 + 1
    assert calls["all_gather", "backward"] == ACCUMULATION
    widths = sum(len(unit.row) for unit in sharded.units)
    summed = dp.ledger.entries["reduce_scatter", "backward"].payload_bytes
    assert summed == ACCUMULATION * widths * dp.size * 8
    assert max(held) == 2
    assert all(w.untyped_storage().nbytes() == 0 for one in sharded.frozen for w in one.whole)
    for parameter in model.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
    optimizer.step()
    after = gather_whole(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    whole, at_level_1 = GPTModel(config, context), replace(context.parallel, zero=1)
    freeze(whole, PATTERNS)
    shard_model(whole, replace(context, parallel=at_level_1))
    assert type(sharding_of(whole)) is ShardedModel  # what is frozen is not gathered


def test_of_what_is_frozen_nothing_is_summed_and_it_is_gathered_where_it_is_used() -> None:
    run_ranks(3, check_frozen)
