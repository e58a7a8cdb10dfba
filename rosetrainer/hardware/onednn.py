"""fp32 products by oneDNN, where torch would take MKL, which is Intel's.

MKL does not run its best kernels on other processors. On AMD's a product and the gradient of its
input take a tenth to a fifth less time by oneDNN, and where there is AVX512, half; the gradient of
the weight only there. So each of the two is measured. bf16 products are oneDNN's anyway.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TORCHS_LINEAR, TORCHS_MM, TORCHS_ADDMM_ = F.linear, torch.mm, torch.Tensor.addmm_
ROWS_OF_A_SUM = 2048  # of addmm_, so that they stay in the cache between the product and the sum


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
        return product(gradient, weight.T), torch.mm(rows.T, x.flatten(0, -2)), bias_gradient


def mm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """As torch.mm: (n, k) times (k, m) -> (n, m)."""
    if not are_for_onednn(a, b):
        return TORCHS_MM(a, b, out=out)
    y = product(a, b.T)
    return y if out is None else out.copy_(y)


def addmm_(total: Tensor, a: Tensor, b: Tensor, **factors: float) -> Tensor:
    """As Tensor.addmm_: (n, m) += (n, k) times (k, m)."""
    if factors or not are_for_onednn(total, a, b):
        return TORCHS_ADDMM_(total, a, b, **factors)
    for block, rows in zip(total.split(ROWS_OF_A_SUM), a.split(ROWS_OF_A_SUM), strict=True):
        block.add_(product(rows, b.T))
    return total


def are_for_onednn(*tensors: Tensor) -> bool:
    """Whether oneDNN has a product of these, which autograd need not know of.

    Over nothing it has none, where torch's are zeros.
    """
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    plain = all(x.dtype == torch.float32 and x.is_cpu and x.numel() for x in tensors)
    return plain and not recorded and not torch.compiler.is_compiling()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """oneDNN's own F.linear, the operator that torch.compile calls; without autograd."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y
