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
    """As a dist.Work: the other ranks' parts are under way; wait() leaves the sum in `part`."""

    works: list[dist.Work]
    own: Tensor
    part: Tensor  # comes as the first other rank's
    others: list[Tensor]  # the rest of them
    rank: int

    def wait(self) -> bool:
        for work in self.works:
            work.wait()
        # In the order of the ranks, wherever a number lies; the first two commute.
        terms = self.others
        at = max(self.rank - 1, 0)
        for term in (*terms[:at], self.own, *terms[at:]):
            self.part += term
        return True


def reduce_scatter_single(part: Tensor, whole: Tensor, group: Any, async_op: bool) -> _Sum:
    """As torch's: part (d, ..) becomes this rank's slice of the sum of all ranks' (n*d, ..).

    Besides those two it needs the memory of n - 2 parts.
    """
    assert async_op
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    rows = whole.unflatten(0, (n, -1))
    peers = [peer for peer in range(n) if peer != rank]
    parts = [part, *(torch.empty_like(part) for _ in peers[1:])]
    works = [
        dist.irecv(p, group=group, group_src=peer) for p, peer in zip(parts, peers, strict=True)
    ]
    works += [dist.isend(rows[peer], group=group, group_dst=peer) for peer in peers]
    return _Sum([w for w in works if w], rows[rank], part, parts[1:], rank)
