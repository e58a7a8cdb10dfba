"""A column-parallel product whose backward pass computes while its collectives are under way.

The gradient of the input has to be summed over the ranks, the gradient of the weight does not: so
the sum starts first. From "Megatron-LM: Training Multi-Billion Parameter Language Models Using
Model Parallelism" (Shoeybi et al.) and its sequence-parallel successor (Korthikanti et al.).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from comm import (
    all_gather,
    enter_tensor_parallel_region,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from parallel_context import Axis
from torch import Tensor


def column_linear(x: Tensor, weight: Tensor, bias: Tensor | None, tp: Axis) -> Tensor:
    """x Wᵀ + b with this rank's rows of W: (B, T, I), or (B, T/n, I) under sequence parallelism,
    times (O/n, I) -> (B, T, O/n); backward: the gradient of x is summed over the ranks.
    """
    x = for_product(x)
    if tp.size > 1 and tp.overlap:
        bias = None if bias is None else for_product(bias)
        return _ColumnLinear.apply(x, for_product(weight), bias, tp)
    return F.linear(enter_tensor_parallel_region(x, tp), weight, bias)


def for_product(x: Tensor) -> Tensor:
    """x in autocast's dtype, if it is on: what travels is then as short as what is multiplied."""
    if torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


class _ColumnLinear(torch.autograd.Function):
    """Keeps x as it came: under sequence parallelism the rank's own tokens, not all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tp: Axis) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tp, ctx.has_bias = tp, bias is not None
        whole = all_gather(x, tp, "forward", dim=-2) if tp.sequence_parallel else x
        return F.linear(whole, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        tp = ctx.tp
        rows = gradient.flatten(0, -2)  # (B*T, O/n)
        if tp.sequence_parallel:
            gathering = start_all_gather(x, tp, "backward", dim=-2)
            partial = F.linear(rows, weight.T).view(*gradient.shape[:-1], -1)
            summing = start_reduce_scatter(partial, tp, "backward", dim=-2)
            x = gathering.wait()
        else:
            summing = start_all_reduce(F.linear(rows, weight.T).view(x.shape), tp, "backward")
        weight_gradient = torch.mm(rows.T, x.flatten(0, -2))  # while the sum is under way
        bias_gradient = rows.sum(0) if ctx.has_bias else None
        return summing.wait(), weight_gradient, bias_gradient, None
