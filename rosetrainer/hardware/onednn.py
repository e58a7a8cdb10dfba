"""fp32 products on an AMD processor: by oneDNN, where torch would take MKL, which is Intel's.

MKL does not run its best kernels there. With oneDNN's a product and the gradient of its input take
a tenth to a fifth less time; the gradient of the weight does not, and stays torch's. bf16 products
are oneDNN's anyway.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rosetrainer.hardware.performance import cpu_words

TORCHS_LINEAR = F.linear


def is_faster(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether training in dtype on this device is one of those that oneDNN makes faster."""
    return dtype == torch.float32 and device.type == "cpu" and is_amd()


@cache
def is_amd() -> bool:
    """Whether the processor is AMD's and torch has oneDNN."""
    return "AuthenticAMD" in cpu_words() and torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: (.., I) times (O, I) -> (.., O)."""
    ours = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    if ours and not torch.compiler.is_compiling():  # which takes oneDNN itself where it likes
        return _Linear.apply(x, weight, bias)
    return TORCHS_LINEAR(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        bias_gradient = rows.sum(0) if ctx.has_bias else None
        return product(gradient, weight.T), rows.T @ x.flatten(0, -2), bias_gradient


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """oneDNN's own F.linear, the operator that torch.compile calls; without autograd."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y
