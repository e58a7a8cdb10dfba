"""A step's micro-batches on this rank, and the gradient of its global batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rosetrainer.config import TrainConfig
from rosetrainer.data.batches import Corpus, rows_of_rank
from rosetrainer.hardware import gloo_sums, shared_sums
from rosetrainer.hardware.kernels import replaced
from rosetrainer.optim.casts import weights_cast_once
from rosetrainer.optim.non_finite import check_gradients
from rosetrainer.optim.precision import Autocast
from rosetrainer.parallel import comm
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.data_parallel import (
    GradientSum,
    accumulate_gradients,
    plain_backward,
    reduce_gradients,
)
from rosetrainer.parallel.dropout import Seed
from rosetrainer.parallel.pipeline.runner import accumulate_in_stages, sum_tied_gradients
from rosetrainer.parallel.zero.in_stages import sum_into_slices, whole_for_a_step
from rosetrainer.parallel.zero.sharded_model import sharding_of


def compute_gradients(
    model: nn.Module,
    batches: Sequence[tuple[Any, ...]],
    context: ParallelContext,
    autocast: Autocast = nullcontext,
    seed: Seed = None,
) -> float:
    """Leaves the global batch's gradient in every .grad; its mean loss in nats.

    As accumulate_gradients, then summed over the ranks. If the loss is not finite, no gradient is.
    Of a sharded model parameters and gradients are then this rank's slices.
    Raises NonFiniteGradientError on every rank if a gradient of one is not finite.
    """
    if context.pp.size > 1:
        return _compute_in_stages(model, batches, context, autocast, seed)
    if sharded := sharding_of(model):
        # Level 3 gathers weights as they are multiplied: copies would outlive what it frees.
        copies = nullcontext() if sharded.level == 3 else weights_cast_once()
        with fast_sums(context), copies:
            loss = accumulate_gradients(model, batches, context, autocast, seed, sharded.backward)
        local = sharded.finish()
        if math.isfinite(loss):
            check_gradients(local, context)  # type: ignore[arg-type]
            reduce_gradients(model, context)  # over tp; over dp they are summed
        return loss
    over_dp = GradientSum(model, context.dp)
    with fast_sums(context), weights_cast_once():
        backward = over_dp.backward if context.parallel.overlap else plain_backward
        loss = accumulate_gradients(model, batches, context, autocast, seed, backward)
    over_dp.wait()
    if math.isfinite(loss):
        check_gradients(model, context)  # before the sum, which gives the nan to every rank
        reduce_gradients(model, context, over_dp)
    return loss


def _compute_in_stages(
    model: nn.Module,
    batches: Sequence[tuple[Any, ...]],
    context: ParallelContext,
    autocast: Autocast,
    seed: Seed,
) -> float:
    """The same in a pipeline, in which sums over dp come after the last backward pass."""
    sharded = sharding_of(model)
    with fast_sums(context), whole_for_a_step(sharded):
        with weights_cast_once(adds=True):
            loss = accumulate_in_stages(model, batches, context, autocast, seed)
        if math.isfinite(loss):
            check_gradients(model, context)
            sum_tied_gradients(model, context)
            if sharded:
                sum_into_slices(sharded)
            reduce_gradients(model, context)
    return loss


def fast_sums(context: ParallelContext) -> AbstractContextManager[None]:
    """Inside, on CPUs, a reduce-scatter is one where gloo would make an all-reduce of it, and sums
    over tp go through memory where its ranks share a machine's."""
    ours: dict[tuple[Any, str], Any] = {}
    if context.device.type == "cpu":
        open_sums(context)
        ours[comm, "_reduce_scatter_single"] = gloo_sums.reduce_scatter_single
        ours[dist, "all_reduce"] = shared_sums.all_reduce
    return replaced(ours)


def open_sums(context: ParallelContext, wanted: bool = True) -> str:
    """From the first call on sums over tp go through shared memory; else why they do not."""
    return shared_sums.open_sums(context.tp.group, wanted) if context.device.type == "cpu" else ""


def micro_batches(
    config: TrainConfig, corpus: Corpus, context: ParallelContext, step: int
) -> list[tuple[Any, ...]]:
    """This rank's part of the step's global batch: by dp rank alone, so a tp group shares it."""
    optim, dp = config.optim, context.dp
    count, size = optim.accumulation(dp.size), optim.micro_batch(dp.size)
    batches = []
    for rows in rows_of_rank(dp.rank, dp.size, count, size):
        arrays = corpus.train_batch(config.run.seed, step, optim.global_batch_size, rows)
        on_device = (torch.from_numpy(array).to(context.device) for array in arrays)
        batches.append((rows.start, *on_device))
    return batches
