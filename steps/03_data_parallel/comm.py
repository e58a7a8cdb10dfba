"""Every collective of the program, each counted on its axis's ledger."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from parallel_context import Axis
from torch import Tensor


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


def broadcast_(buffer: Tensor, axis: Axis, phase: str) -> Tensor:
    """Overwrites buffer, in place, with the axis's first rank's."""
    if axis.size > 1:
        axis.ledger.record("broadcast", phase, buffer.numel() * buffer.element_size())
        dist.broadcast(buffer, group=axis.group, group_src=0)
    return buffer
