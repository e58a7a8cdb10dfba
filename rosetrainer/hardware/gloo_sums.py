"""Reduce-scatter between CPUs: each rank gets its part from all the others, and adds up.

gloo's own is an all-reduce of a copy, which moves twice as much, and of which it keeps a slice.
NCCL's is what its name says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class _Sum:
    """As a dist.Work: the parts of all ranks (n, d, ..) are under way; wait() leaves their sum."""

    work: dist.Work
    parts: Tensor
    total: Tensor

    def wait(self) -> bool:
        self.work.wait()
        first, *others = self.parts
        self.total.copy_(first)
        for part in others:  # in the order of the ranks, wherever a number lies
            self.total += part
        return True


def reduce_scatter_single(part: Tensor, whole: Tensor, group: Any, async_op: bool) -> _Sum:
    """As torch's: part (d, ..) becomes this rank's slice of the sum of all ranks' (n*d, ..)."""
    assert async_op
    parts = torch.empty_like(whole)
    work = dist.all_to_all_single(parts, whole, group=group, async_op=True)
    return _Sum(work, parts.unflatten(0, (-1, len(part))), part)
