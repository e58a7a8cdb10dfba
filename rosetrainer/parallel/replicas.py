"""What several ranks hold alike must stay alike: a comparison by checksums, bit for bit."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rosetrainer.parallel.comm import all_gather, all_reduce
from rosetrainer.parallel.context import Axis, ParallelContext
from rosetrainer.parallel.sharding import shard_spec, whole_specs

CHUNK = 2**16  # words of 16 bits


class ReplicaError(RuntimeError):
    """Ranks that should hold the same numbers do not."""


@torch.no_grad()
def check_replicas(model: nn.Module, context: ParallelContext, step: int) -> None:
    """Raises ReplicaError, on every rank, if a replicated parameter differs between ranks.

    It names the first parameter, the rank, and the rank that it was compared with.
    """
    parameters = dict(model.named_parameters())
    specs = whole_specs(model) | {name: shard_spec(p) for name, p in parameters.items()}
    own = torch.zeros(len(specs), dtype=torch.int64, device=context.device)
    for index, name in enumerate(specs):
        if name in parameters:  # which another stage of a pipeline may have
            own[index] = checksum(parameters[name])
    # A finding is one number, (parameter x ranks + rank) x ranks + other rank: the least wins.
    ranks = context.world_size
    nothing = len(specs) * ranks * ranks
    finding = torch.full((), nothing, device=context.device)
    for axis in context.axes:
        together = all_gather(own[None], axis, "replicas", dim=0)  # (n, parameters)
        for index, (name, spec) in enumerate(specs.items()):
            first = spec.holders(axis)[0]
            if name in parameters and together[axis.rank, index] != together[first, index]:
                other = context.rank + (first - axis.rank) * stride_of(axis, context)
                code = (index * ranks + context.rank) * ranks + other
                finding = finding.clamp(max=code)
    for axis in context.axes:
        finding = all_reduce(finding, axis, "replicas", dist.ReduceOp.MIN)
    if finding < nothing:
        rest, other = divmod(int(finding), ranks)
        index, rank = divmod(rest, ranks)
        raise ReplicaError(
            f"after step {step} rank {rank} holds another {list(specs)[index]} than rank "
            f"{other}; they should be the same bit for bit"
        )


def checksum(tensor: Tensor) -> Tensor:
    """An int64 that depends on every bit of the tensor and on its place.

    In chunks: words and places as int64 are twelve times as large as the tensor.
    """
    words = tensor.detach().contiguous().flatten().view(torch.int16)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), CHUNK):
        chunk = words[start : start + CHUNK].long()
        first, end = 2 * start + 1, 2 * (start + len(chunk)) + 1
        places = torch.arange(first, end, 2, device=words.device)  # odd, so no bit is lost
        total += chunk.mul_(places).sum()
    return total


def stride_of(axis: Axis, context: ParallelContext) -> int:
    """How far apart in world rank two neighbours of the axis are."""
    return math.prod(inner.size for inner in context.axes[context.axes.index(axis) + 1 :])
