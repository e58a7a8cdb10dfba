"""Layer norm of fp32 on a CPU: its forward pass by plain kernels, for torch's runs through each row
with Welford's recurrence, which no vector unit likes. It takes a third to a half of the time.

Shape letters: D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TORCHS_LAYER_NORM = F.layer_norm


def layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """As F.layer_norm: (.., D) -> (.., D)."""
    given = [t for t in (x, weight, bias) if t is not None]
    ours = len(shape) == 1 and all(t.dtype == torch.float32 and t.is_cpu for t in given)
    if ours and x.numel() and not torch.compiler.is_compiling():  # which fuses its own
        return _LayerNorm.apply(x, weight, bias, eps)
    return TORCHS_LAYER_NORM(x, shape, weight, bias, eps)


class _LayerNorm(torch.autograd.Function):
    """Keeps what torch's keeps, and has its backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        y = x - mean
        length = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        factor = length.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
        y.mul_(factor)
        if weight is not None:
            y.mul_(weight)
        if bias is not None:
            y.add_(bias)
        ctx.save_for_backward(x, mean, factor, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, factor, weight, bias = ctx.saved_tensors
        shape, wanted = x.shape[-1:], ctx.needs_input_grad[:3]
        back = torch.ops.aten.native_layer_norm_backward
        return *back(gradient, x, shape, mean, factor, weight, bias, wanted), None
