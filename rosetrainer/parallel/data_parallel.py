"""The gradient of a global batch: micro-batches on each rank, summed over the data-parallel axis.

Every token of the global batch weighs the same, however it is spread over ranks and micro-batches:
each rank divides by the step's global token count, and gradients are summed, not averaged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rosetrainer.config import IGNORED
from rosetrainer.parallel.comm import Pending, all_reduce, start_all_reduce
from rosetrainer.parallel.context import Axis, ParallelContext
from rosetrainer.parallel.dropout import Seed
from rosetrainer.parallel.sharding import shard_spec

BUCKET_BYTES = 25 * 2**20  # as large as DistributedDataParallel's: few calls, little memory


Backward = Callable[[Tensor, bool], None]
"""The backward pass of a micro-batch's part of the loss, and whether it is the last one."""


def plain_backward(loss: Tensor, _: bool) -> None:
    loss.backward()


def accumulate_gradients(
    model: nn.Module,
    micro_batches: Sequence[tuple[Any, ...]],
    context: ParallelContext,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    seed: Seed = None,
    backward: Backward = plain_backward,
) -> float:
    """Adds this rank's part of the global batch's gradient to every parameter's .grad.

    Returns the mean loss of the whole batch, in nats.

    micro_batches: this rank's (first row in the global batch, input_ids, labels), the two (b, T);
    or what else the model takes, the labels last. All dp ranks have equally many.
    seed: for dropout, of the global batch.
    """
    counts, tokens = count_tokens(micro_batches, context)
    total = torch.zeros((), dtype=torch.float64)
    for index, (first_row, *inputs, labels) in enumerate(micro_batches):
        seed = seed and replace(seed, first_row=first_row)
        with autocast():
            _, loss = model(*inputs, labels=labels, return_logits=False, seed=seed)
        share = loss * (counts[index] / tokens)
        backward(share, index == len(micro_batches) - 1)
        total += share.detach().to("cpu", torch.float64)
    return float(sum_over_dp(total, context))


def count_tokens(
    micro_batches: Sequence[tuple[Any, ...]], context: ParallelContext
) -> tuple[list[int], float]:
    """The labels that count in each micro-batch, and in the global batch, 1 where it has none."""
    counts = [int((labels != IGNORED).sum()) for *_, labels in micro_batches]
    local = torch.tensor(sum(counts), dtype=torch.float64)
    return counts, max(float(sum_over_dp(local, context)), 1.0)


class Addend(NamedTuple):
    """A gradient that is partial over an axis; its holders among the ranks have one part of it."""

    parameter: nn.Parameter
    part: int
    parts: int

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter.dtype

    def numel(self) -> int:
        return self.parameter.numel() * self.parts

    def element_size(self) -> int:
        return self.parameter.element_size()

    def in_its_place(self) -> Tensor:
        """(parts, ..): zeros but for this part, so that a sum adds what its holders have to
        nothing."""
        gradient = self.parameter.grad
        assert gradient is not None, "a parameter has no gradient"
        if self.parts == 1:
            return gradient[None]
        whole = gradient.new_zeros(self.parts, *gradient.shape)
        whole[self.part] = gradient
        return whole


class GradientSum:
    """Sums the gradients of a model over an axis in buckets, those of its last layers first.

    Only what the shard spec says is partial over the axis; where the axis cuts a parameter, over
    the ranks that hold the same part. The sum of a bucket may be under way while the backward pass
    makes the gradients before it ("PyTorch Distributed: Experiences on Accelerating Data Parallel
    Training", Li et al.). Buckets start in one order on all ranks, whichever is ready first, and
    hold the same whenever they start: so the sums have the same bits.
    """

    def __init__(self, model: nn.Module, axis: Axis) -> None:
        self.axis, addends = axis, []
        for parameter in model.parameters() if axis.size > 1 else ():
            spec = shard_spec(parameter)
            if parameter.requires_grad and spec.is_partial(axis):
                cut = next((cut for cut in spec.cuts if cut.axis.name == axis.name), None)
                part, parts = (cut.part, cut.parts) if cut else (0, 1)
                addends.append(Addend(parameter, part, parts))
        self.buckets = list(buckets(addends, BUCKET_BYTES))[::-1]
        self.missing = [len(bucket) for bucket in self.buckets]  # gradients that are not made yet
        self.started = 0
        self.under_way: deque[Pending] = deque()

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """loss.backward(); in the last micro-batch each bucket starts when its gradients are made.

        The gradients themselves stay as they are until finish().
        """
        hooks = []
        for index, bucket in enumerate(self.buckets if is_last else ()):
            made = partial(self._made, index)
            hooks += [one.parameter.register_post_accumulate_grad_hook(made) for one in bucket]
        try:
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()

    def _made(self, index: int, _: Tensor) -> None:
        self.missing[index] -= 1
        while self.started < len(self.buckets) and not self.missing[self.started]:
            self._start()

    def _start(self) -> None:
        bucket = self.buckets[self.started]
        flat = torch.cat([one.in_its_place().flatten() for one in bucket])
        self.under_way.append(start_all_reduce(flat, self.axis, "backward"))
        self.started += 1

    def wait(self) -> None:
        """For what is under way, which goes on even if its result is not wanted any more."""
        for pending in self.under_way:
            pending.wait()

    @torch.no_grad()
    def finish(self) -> None:
        """Leaves the sums in the gradients. Starts what has not been started, one by one."""
        for bucket in self.buckets:
            if not self.under_way:
                self._start()
            flat = self.under_way.popleft().wait()
            for one, total in zip(bucket, flat.split([o.numel() for o in bucket]), strict=True):
                gradient = one.parameter.grad
                assert gradient is not None
                gradient.copy_(total.view(one.parts, *gradient.shape)[one.part])


def reduce_gradients(
    model: nn.Module, context: ParallelContext, over_dp: GradientSum | None = None
) -> None:
    """Sums each gradient over the axes on which its shard spec says that it is partial.

    over_dp: the sum over dp, where it is under way.
    """
    for axis in context.axes:
        if over_dp is not None and axis is over_dp.axis:
            over_dp.finish()
        else:
            GradientSum(model, axis).finish()


def buckets(tensors: Sequence[Any], limit_bytes: int) -> Iterator[list[Any]]:
    """The tensors in order, in groups of one dtype and at most limit_bytes, or of one tensor."""
    group: list[Any] = []
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
