"""Clipping by the true global norm: the one that a single process would measure."""

from __future__ import annotations

import math

import torch
from comm import all_reduce_
from parallel_context import Axis
from tensor_parallel import ShardSpec, shard_spec
from torch import nn


@torch.no_grad()
def clip_gradients(model: nn.Module, tp: Axis, max_norm: float) -> float:
    """Scales all gradients so that their global norm is at most max_norm; returns the norm before.

    The norm is that of the whole gradients: each part counts once, on the first rank that holds
    it. A max_norm of 0 only measures.
    """
    gradients, counted = [], []
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        gradients.append(parameter.grad)
        if counts_here(shard_spec(parameter), tp):
            counted.append(parameter.grad)
    square = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
    if counted:
        wide = torch.promote_types(counted[0].dtype, torch.float32)
        norms = torch._foreach_norm(counted, 2, wide)  # of all at once: few kernels, one wait
        square = torch.stack(norms).double().square().sum()
    norm = math.sqrt(all_reduce_(square, tp, "optimizer").item())
    if 0 < max_norm < norm:
        torch._foreach_mul_(gradients, max_norm / norm)
    return norm


def counts_here(spec: ShardSpec, tp: Axis) -> bool:
    """Whether this rank is the first of those that hold this part: so each part counts once."""
    return tp.rank % (tp.size // spec.parts) == 0
