"""The gradient of a global batch: micro-batches on each rank, summed over the data-parallel axis.

Every token of the global batch weighs the same, however it is spread over ranks and micro-batches:
each rank divides by the step's global token count, and gradients are summed, not averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rosetrainer.config import IGNORED
from rosetrainer.parallel.comm import all_reduce, all_reduce_
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.dropout import Seed
from rosetrainer.parallel.sharding import shard_spec

BUCKET_BYTES = 25 * 2**20  # as large as DistributedDataParallel's: few calls, little memory


def accumulate_gradients(
    model: nn.Module,
    micro_batches: Sequence[tuple[Any, ...]],
    context: ParallelContext,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    seed: Seed = None,
) -> float:
    """Adds this rank's part of the global batch's gradient to every parameter's .grad.

    Returns the mean loss of the whole batch, in nats.

    micro_batches: this rank's (first row in the global batch, input_ids, labels), the two (b, T);
    or what else the model takes, the labels last. All dp ranks have equally many.
    seed: for dropout, of the global batch.
    """
    counts, tokens = count_tokens(micro_batches, context)
    total = torch.zeros((), dtype=torch.float64)
    for (first_row, *inputs, labels), count in zip(micro_batches, counts, strict=True):
        seed = seed and replace(seed, first_row=first_row)
        with autocast():
            _, loss = model(*inputs, labels=labels, return_logits=False, seed=seed)
        share = loss * (count / tokens)
        share.backward()
        total += share.detach().to("cpu", torch.float64)
    return float(sum_over_dp(total, context))


def count_tokens(
    micro_batches: Sequence[tuple[Any, ...]], context: ParallelContext
) -> tuple[list[int], float]:
    """The labels that count in each micro-batch, and in the global batch, 1 where it has none."""
    counts = [int((labels != IGNORED).sum()) for *_, labels in micro_batches]
    local = torch.tensor(sum(counts), dtype=torch.float64)
    return counts, max(float(sum_over_dp(local, context)), 1.0)


def reduce_gradients(model: nn.Module, context: ParallelContext) -> None:
    """Sums each gradient over the axes on which its shard spec says that it is partial.

    Where the axis cuts the parameter, over the ranks that hold the same part.
    """
    for axis in context.axes:
        if axis.size == 1:
            continue
        partial, addends = [], []
        for name, parameter in model.named_parameters():
            spec = shard_spec(parameter)
            if spec.is_partial(axis):
                assert parameter.grad is not None, f"{name} has no gradient"
                cut = next((cut for cut in spec.cuts if cut.axis.name == axis.name), None)
                part, parts = (cut.part, cut.parts) if cut else (0, 1)
                partial.append((parameter.grad, part))
                addends.append(in_its_place(parameter.grad, part, parts))
        own = iter(partial)
        for bucket in buckets(addends, BUCKET_BYTES):
            flat = torch.cat([addend.flatten() for addend in bucket])
            all_reduce_(flat, axis, "backward")
            sizes = [addend.numel() for addend in bucket]
            for addend, summed in zip(bucket, flat.split(sizes), strict=True):
                gradient, part = next(own)
                gradient.copy_(summed.view(addend.shape)[part])


def in_its_place(gradient: Tensor, part: int, parts: int) -> Tensor:
    """(parts, ..): zeros but for this part, so that a sum adds what its holders have to nothing."""
    if parts == 1:
        return gradient[None]
    whole = gradient.new_zeros(parts, *gradient.shape)
    whole[part] = gradient
    return whole


def buckets(tensors: list[Tensor], limit_bytes: int) -> Iterator[list[Tensor]]:
    """The tensors in order, in groups of one dtype and at most limit_bytes, or of one tensor."""
    group: list[Tensor] = []
    size = 0
    for tensor in tensors:
        more = tensor.numel() * tensor.element_size()
        if group and (size + more > limit_bytes or tensor.dtype != group[0].dtype):
            yield group
            group, size = [], 0
        group.append(tensor)
        size += more
    if group:
        yield group


def sum_over_dp(scalar: Tensor, context: ParallelContext) -> Tensor:
    return all_reduce(scalar.to(context.device), context.dp, "optimizer").cpu()
