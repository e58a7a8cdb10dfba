"""Every collective of the program, each with its backward, each counted on its axis's ledger.

Shape letters: n = axis.size. `copy_to_tensor_parallel_region` is Megatron's `f` (Shoeybi et al.,
"Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism"): a tensor
is either replicated over the axis or split along its last dimension, and each such function leads
from one region to the other, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from parallel_context import Axis
from torch import Tensor

# torch 2.13 renamed it, and warns of the older name, the only one that 2.11 has.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_reduce(tensor: Tensor, axis: Axis, phase: str, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """A new tensor: the sum (or `op`) of all ranks' tensors, the same on every rank."""
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    return all_reduce_(total, axis, phase, op)


def all_reduce_(buffer: Tensor, axis: Axis, phase: str, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """all_reduce in place, for a contiguous buffer that belongs to the caller alone."""
    if axis.size > 1:
        axis.ledger.record("all_reduce", phase, buffer.numel() * buffer.element_size())
        dist.all_reduce(buffer, op=op, group=axis.group)
    return buffer


def all_gather(tensor: Tensor, axis: Axis, phase: str, dim: int = -1) -> Tensor:
    """(.., d, ..) on each rank -> (.., n*d, ..) on every rank, concatenated along `dim` by rank."""
    if axis.size == 1:
        return tensor
    # The collective stacks along dimension 0, so `dim` travels there and back.
    part = tensor.detach().movedim(dim, 0).contiguous()
    whole = part.new_empty((axis.size * part.shape[0], *part.shape[1:]))
    axis.ledger.record("all_gather", phase, whole.numel() * whole.element_size())
    _all_gather_single(whole, part, group=axis.group)
    return whole.movedim(0, dim).contiguous()


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


def gather_from_tensor_parallel_region(x: Tensor, axis: Axis) -> Tensor:
    """(.., d) V -> (.., n*d) I. forward: all-gather; backward: this rank's slice, not summed.

    What was gathered is replicated, so every rank's gradient of it is already the whole one.
    """
    return x if axis.size == 1 else _Gather.apply(x, axis)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduce(gradient, ctx.axis, "backward"), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis, "forward")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return own_slice(gradient, ctx.axis), None
