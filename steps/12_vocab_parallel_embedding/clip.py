"""Clipping by the true global norm: the one that a single process would measure."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from comm import all_reduce_
from parallel_context import Axis, ParallelContext
from sharding import ShardSpec, shard_spec
from torch import Tensor, nn


@torch.no_grad()
def clip_gradients(model: nn.Module, context: ParallelContext, max_norm: float) -> float:
    """Scales all gradients so that their global norm is at most max_norm; returns the norm before.

    The norm is that of the whole gradients: each part counts once, on the first rank that holds
    it. A max_norm of 0 only measures.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    specs = [shard_spec(parameter) for parameter in trained.values()]
    axes = [axis for axis in context.axes if any(spec.is_cut_over(axis) for spec in specs)]
    gradients, counted = [], []
    for (name, parameter), spec in zip(trained.items(), specs, strict=True):
        assert parameter.grad is not None, f"{name} has no gradient"
        gradients.append(parameter.grad)
        if parameter.grad.numel() and counts_here(spec, axes):  # a part may be empty
            counted.append(parameter.grad)
    norm = global_norm(counted, axes, gradients[0].device)
    if 0 < max_norm < norm:
        factor = max_norm / norm
        times = 1 if factor > 1e-30 else 2  # fp32 ends at 1e-38: there, its root twice
        for _ in range(times):
            torch._foreach_mul_(gradients, factor ** (1 / times))
    return norm


def global_norm(counted: list[Tensor], axes: list[Axis], device: torch.device) -> float:
    """The norm of all ranks' tensors together; nan or inf only if a number of theirs is."""
    wide = torch.promote_types(counted[0].dtype, torch.float32) if counted else None
    norms = torch._foreach_norm(counted, 2, wide) if counted else ()  # few kernels, one wait
    norm = root_of_squares(list(norms), axes, device)
    if 1e-8 < norm < math.inf or math.isnan(norm):
        return norm
    # Squares may have left the dtype's range, at 1.8e19 and 1e-19 in fp32: so scale, then square.
    largest = torch.zeros((), dtype=torch.float64, device=device)
    for gradient in counted:
        largest = torch.maximum(largest, torch.linalg.vector_norm(gradient, math.inf))
    for axis in axes:
        all_reduce_(largest, axis, "optimizer", dist.ReduceOp.MAX)
    scale = largest.item()
    if scale in (0, math.inf):
        return scale
    return scale * root_of_squares([(g.double() / scale).norm() for g in counted], axes, device)


def root_of_squares(norms: list[Tensor], axes: list[Axis], device: torch.device) -> float:
    """The norm of all ranks' numbers, out of the norms of each rank's tensors."""
    square = torch.zeros((), dtype=torch.float64, device=device)
    if norms:
        square = torch.stack(norms).double().square().sum()
    for axis in axes:
        all_reduce_(square, axis, "optimizer")
    return math.sqrt(square.item())


def counts_here(spec: ShardSpec, axes: list[Axis]) -> bool:
    """Whether this rank is the first of those that hold this part: so each part counts once."""
    return all(axis.rank == spec.holders(axis)[0] for axis in axes)
