"""Every collective of the program, each with its backward, each counted on its axis's ledger.

Shape letters: n = axis.size. The "region" functions are Megatron's `f` and `g` and their relatives
(Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
Parallelism"): a tensor is replicated over the axis, or split along its last dimension, or, under
sequence parallelism, along its tokens, and each function leads from one region to another, forward
and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from parallel_context import Axis, Ledger
from torch import Tensor

# torch 2.13 renamed these two, and warns of the older names, the only ones that 2.11 has.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Pending:
    """A collective under way; its input must stay as it is until wait() gives the result."""

    work: dist.Work | None
    ledger: Ledger
    finish: Callable[[], Tensor]
    held: Tensor | None = None  # the input, which has to live that long

    def wait(self) -> Tensor:
        if self.work is not None:
            since = perf_counter()
            self.work.wait()
            self.ledger.wait_seconds += perf_counter() - since
        return self.finish()


def all_reduce(tensor: Tensor, axis: Axis, phase: str, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """A new tensor: the sum (or `op`) of all ranks' tensors, the same on every rank."""
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    return all_reduce_(total, axis, phase, op)


def all_reduce_(buffer: Tensor, axis: Axis, phase: str, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """all_reduce in place, for a contiguous buffer that belongs to the caller alone."""
    return start_all_reduce(buffer, axis, phase, op).wait()


def start_all_reduce(
    buffer: Tensor, axis: Axis, phase: str, op: Any = dist.ReduceOp.SUM
) -> Pending:
    """all_reduce_, under way."""
    work = None
    if axis.size > 1:
        axis.ledger.record("all_reduce", phase, buffer.numel() * buffer.element_size())
        work = dist.all_reduce(buffer, op=op, group=axis.group, async_op=True)
    return Pending(work, axis.ledger, lambda: buffer)


def all_gather(tensor: Tensor, axis: Axis, phase: str, dim: int = -1) -> Tensor:
    """(.., d, ..) on each rank -> (.., n*d, ..) on every rank, concatenated along `dim` by rank."""
    return start_all_gather(tensor, axis, phase, dim).wait()


def start_all_gather(tensor: Tensor, axis: Axis, phase: str, dim: int = -1) -> Pending:
    """all_gather, under way."""
    if axis.size == 1:
        return Pending(None, axis.ledger, lambda: tensor)
    # The collective stacks along dimension 0, so `dim` travels there and back.
    part = tensor.detach().movedim(dim, 0).contiguous()
    whole = part.new_empty((axis.size * part.shape[0], *part.shape[1:]))
    axis.ledger.record("all_gather", phase, whole.numel() * whole.element_size())
    work = _all_gather_single(whole, part, group=axis.group, async_op=True)
    return Pending(work, axis.ledger, lambda: whole.movedim(0, dim).contiguous(), part)


def reduce_scatter(tensor: Tensor, axis: Axis, phase: str, dim: int = -1) -> Tensor:
    """(.., n*d, ..) on each rank -> (.., d, ..): this rank's slice of the sum over the ranks."""
    return start_reduce_scatter(tensor, axis, phase, dim).wait()


def start_reduce_scatter(tensor: Tensor, axis: Axis, phase: str, dim: int = -1) -> Pending:
    """reduce_scatter, under way."""
    if axis.size == 1:
        return Pending(None, axis.ledger, lambda: tensor)
    whole = tensor.detach().movedim(dim, 0).contiguous()
    part = whole.new_empty((whole.shape[0] // axis.size, *whole.shape[1:]))
    axis.ledger.record("reduce_scatter", phase, whole.numel() * whole.element_size())
    work = _reduce_scatter_single(part, whole, group=axis.group, async_op=True)
    return Pending(work, axis.ledger, lambda: part.movedim(0, dim).contiguous(), whole)


def start_send(tensor: Tensor, axis: Axis, to: int, phase: str) -> Pending:
    """tensor to the axis's rank `to`, under way: it must stay as it is until wait()."""
    tensor = tensor.detach().contiguous()
    axis.ledger.record("send", phase, tensor.numel() * tensor.element_size())
    work = dist.isend(tensor, group=axis.group, group_dst=to)
    return Pending(work, axis.ledger, lambda: tensor, tensor)


def start_receive(buffer: Tensor, axis: Axis, source: int, phase: str) -> Pending:
    """What the axis's rank `source` sends, into buffer. From one rank in the order of sending."""
    axis.ledger.record("receive", phase, buffer.numel() * buffer.element_size())
    work = dist.irecv(buffer, group=axis.group, group_src=source)
    return Pending(work, axis.ledger, lambda: buffer, buffer)


def broadcast_(buffer: Tensor, axis: Axis, phase: str) -> Tensor:
    """Overwrites buffer, in place, with the axis's first rank's."""
    if axis.size > 1:
        axis.ledger.record("broadcast", phase, buffer.numel() * buffer.element_size())
        dist.broadcast(buffer, group=axis.group, group_src=0)
    return buffer


def own_slice(tensor: Tensor, axis: Axis, dim: int = -1) -> Tensor:
    """(.., n*d, ..) -> (.., d, ..): this rank's part, without communication."""
    width = tensor.shape[dim] // axis.size
    return tensor.narrow(dim, axis.rank * width, width).contiguous()


# Letters, of what a rank has: I the same on each, its gradient whole; R the same on each, its
# gradient still to be summed; V a part of its own; P a partial sum.
def copy_to_tensor_parallel_region(x: Tensor, axis: Axis) -> Tensor:
    """`f`, I -> R. forward: x as it is; backward: all-reduce, for every rank's slice used all."""
    return x if axis.size == 1 else _Copy.apply(x, axis)


def reduce_from_tensor_parallel_region(x: Tensor, axis: Axis) -> Tensor:
    """`g`, P -> I. forward: all-reduce of the partial sums; backward: the gradient as it is."""
    return x if axis.size == 1 else _Reduce.apply(x, axis)


def gather_from_tensor_parallel_region(x: Tensor, axis: Axis) -> Tensor:
    """(.., d) V -> (.., n*d) I. forward: all-gather; backward: this rank's slice, not summed.

    What was gathered is replicated, so every rank's gradient of it is already the whole one.
    """
    return x if axis.size == 1 else _Gather.apply(x, axis)


def scatter_to_tensor_parallel_region(x: Tensor, axis: Axis) -> Tensor:
    """(.., n*d) I -> (.., d) V. forward: this rank's slice; backward: all-gather."""
    return x if axis.size == 1 else _Scatter.apply(x, axis)


def enter_tensor_parallel_region(x: Tensor, axis: Axis) -> Tensor:
    """What a layer cut over the axis reads: (B, T, D) R. `f`; under sequence parallelism from
    (B, T/n, D) V, forward: all-gather of the tokens; backward: reduce-scatter.
    """
    if axis.sequence_parallel and axis.size > 1:
        return _GatherTokens.apply(x, axis)
    return copy_to_tensor_parallel_region(x, axis)


def leave_tensor_parallel_region(x: Tensor, axis: Axis) -> Tensor:
    """What a layer cut over the axis gives: the sum of (B, T, D) P. `g`; under sequence
    parallelism (B, T/n, D) V of it, forward: reduce-scatter; backward: all-gather.
    """
    if axis.sequence_parallel and axis.size > 1:
        return _ScatterTokens.apply(x, axis)
    return reduce_from_tensor_parallel_region(x, axis)


def own_tokens(x: Tensor, axis: Axis) -> Tensor:
    """(.., T) -> (.., T/n) under sequence parallelism. Raises ValueError if n does not divide T."""
    if not axis.sequence_parallel:
        return x
    if x.shape[-1] % axis.size:
        raise ValueError(f"{x.shape[-1]} tokens cannot be divided by tp_size={axis.size}")
    return own_slice(x, axis)


def first_token(x: Tensor, axis: Axis) -> int:
    """Where in its sequence x, (B, T or T/n, D) between two layers, begins on this rank."""
    return axis.rank * x.shape[1] if axis.sequence_parallel else 0


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduce(gradient, ctx.axis, "backward"), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x, axis, "forward")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis, "forward")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return own_slice(gradient, ctx.axis), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return own_slice(x, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_gather(gradient, ctx.axis, "backward"), None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis, "forward", dim=-2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(gradient, ctx.axis, "backward", dim=-2), None


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x, axis, "forward", dim=-2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_gather(gradient, ctx.axis, "backward", dim=-2), None
