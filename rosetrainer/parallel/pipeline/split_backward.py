"""The backward pass in two halves: what the stage before waits for, and weights' gradients later.

Shape letters: B batch, T sequence, I in_features, O out_features; tp = tp.size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosetrainer.parallel.comm import (
    enter_tensor_parallel_region,
    leave_tensor_parallel_region,
)
from rosetrainer.parallel.overlap import for_product
from rosetrainer.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear


class WeightGradients:
    """The products dYᵀ X that a backward pass has put off, in their order."""

    def __init__(self) -> None:
        self._put_off: list[Callable[[], None]] = []

    def put_off(self, product: Callable[[], None]) -> None:
        self._put_off.append(product)

    def take(self) -> list[Callable[[], None]]:
        """What has been put off since the last call."""
        taken, self._put_off = self._put_off, []
        return taken


def split_backward(model: Any) -> None:
    """From now on the linear layers put their weights' gradients off, to model.weight_gradients.

    All other gradients, a bias's too, are made with that of the input. A weight with two uses, as
    an embedding's that is the output head as well, gets both with it.
    """
    gradients = WeightGradients()
    for layer in model.modules():
        if isinstance(layer, ColumnParallelLinear):
            layer.forward = partial(_column, layer, gradients)  # type: ignore[method-assign]
        elif isinstance(layer, RowParallelLinear):
            layer.forward = partial(_row, layer, gradients)  # type: ignore[method-assign]
    model.weight_gradients = gradients


def _column(layer: ColumnParallelLinear, gradients: WeightGradients, x: Tensor) -> Tensor:
    """As the layer's own forward, without gather_output."""
    assert not layer.gather_output
    x = enter_tensor_parallel_region(for_product(x), layer.tp)  # (B, T, I)
    y = _SplitLinear.apply(x, layer.weight, gradients)  # (B, T, O/tp)
    return y if layer.bias is None else y + for_product(layer.bias.flatten())


def _row(layer: RowParallelLinear, gradients: WeightGradients, x: Tensor) -> Tensor:
    """As the layer's own forward, of an input that is cut already."""
    assert layer.input_is_parallel
    product = _SplitLinear.apply(for_product(x), layer.weight, gradients)  # (B, T, O) partial
    y = leave_tensor_parallel_region(product, layer.tp)
    return y if layer.bias is None else y + layer.bias


class _SplitLinear(torch.autograd.Function):
    """Y = X Wᵀ; backward dX = dY W at once, dW = dYᵀ X put off, then added to the parameter's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: nn.Parameter, gradients: WeightGradients) -> Tensor:
        weight = for_product(parameter.reshape(-1, x.shape[-1]))
        ctx.save_for_backward(x, weight)
        ctx.parameter, ctx.gradients = parameter, gradients
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        parameter, rows = ctx.parameter, gradient.flatten(0, -2)  # (B*T, O)

        def add() -> None:
            product = torch.mm(rows.T, x.flatten(0, -2)).view(parameter.shape).to(parameter.dtype)
            parameter.grad = product if parameter.grad is None else parameter.grad.add_(product)

        ctx.gradients.put_off(add)
        return F.linear(rows, weight.T).view(x.shape), None, None
