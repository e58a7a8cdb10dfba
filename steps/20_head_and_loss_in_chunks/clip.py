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
    parameters = list(model.parameters())
    square = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    for parameter in parameters:
        assert parameter.grad is not None
        if counts_here(shard_spec(parameter), tp):
            norm = torch.linalg.vector_norm(parameter.grad, dtype=_sum_dtype(parameter))
            square += norm.double() ** 2
    norm = math.sqrt(all_reduce_(square, tp, "optimizer").item())
    if 0 < max_norm < norm:
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.mul_(max_norm / norm)
    return norm


def counts_here(spec: ShardSpec, tp: Axis) -> bool:
    """Whether this rank is the first of those that hold this part: so each part counts once."""
    return tp.rank % (tp.size // spec.parts) == 0


def _sum_dtype(parameter: nn.Parameter) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32
