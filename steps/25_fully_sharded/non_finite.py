"""Numbers that are not finite: a bad gradient costs one step, a bad loss ends the run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from comm import all_reduce
from parallel_context import ParallelContext
from sharding import whole_specs
from torch import nn


class NonFiniteGradientError(ArithmeticError):
    """A gradient holds nan or inf. Raised on every rank, with the first rank that has one."""


def check_gradients(model: nn.Module, context: ParallelContext) -> None:
    """Raises NonFiniteGradientError on all ranks if a gradient of any rank is not finite.

    Before gradients are summed: then every rank would have it, and none could be named.
    """
    names, gradients = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            names.append(name)
            gradients.append(parameter.grad)
    norms = torch._foreach_norm(gradients)
    suspects = (~torch.stack([norm.float() for norm in norms]).isfinite()).nonzero()
    # A sum of squares is nan or inf if a number is, but finite numbers too can overflow it.
    bad = [index for index in suspects.flatten().tolist() if not gradients[index].isfinite().all()]
    every = list(whole_specs(model))  # those of other stages too: all ranks number them alike
    nobody = context.world_size * len(every)
    found = context.rank * len(every) + every.index(names[bad[0]]) if bad else nobody
    first = torch.tensor(found, device=context.device)
    for axis in context.axes:
        first = all_reduce(first, axis, "optimizer", dist.ReduceOp.MIN)
    if first < nobody:
        rank, index = divmod(int(first), len(every))
        raise NonFiniteGradientError(f"rank {rank} has nan or inf in a gradient: {every[index]}")
