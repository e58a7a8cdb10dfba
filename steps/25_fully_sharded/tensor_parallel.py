"""Tensor-parallel linear layers.

Shape letters: B batch, T sequence, I in_features, O out_features, s stride; tp = tp.size.
A letter behind a shape says what a rank has of it over tp: I the same on each, its gradient whole;
V a part of its own; P a partial sum.

From "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism"
(Shoeybi et al.). Layers are made with empty weights, see sharding.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch.nn.functional as F
from comm import (
    gather_from_tensor_parallel_region,
    leave_tensor_parallel_region,
    scatter_to_tensor_parallel_region,
)
from config import ConfigError
from overlap import column_linear
from parallel_context import Axis
from sharding import Cut, ShardSpec, new_parameter, replicated_parameter, shard_spec
from torch import Tensor, nn


def width_of(spec: ShardSpec, dim: int) -> str:
    """A whole width, and what of it this rank holds: 256/2 (rank 1 holds 128:256)."""
    cuts, own = [cut for cut in spec.cuts if cut.dim == dim and cut.parts > 1], spec.index[dim]
    held = [f"/{cut.parts} (rank {cut.axis.rank} holds {own.start}:{own.stop})" for cut in cuts]
    return "".join([str(spec.shape[dim]), *held])


class ColumnParallelLinear(nn.Module):
    """Y = X Wᵀ + b with W's rows split over tp: "column" is meant of Wᵀ.

    (B, T, I) -> (B, T, O/tp), or (B, T, O) with gather_output: every rank reads all of X, which
    under sequence parallelism it gathers from (B, T/tp, I), and makes its slice of Y. With stride
    s the output features are s blocks of O/s, and each block is split: the local output is this
    rank's slice of the first block, then of the second, and so on.

        forward  Y = X Wᵀ + b    (B, T, I) I -> (B, T, O/tp) V
        dgrad    dX = dY W       (B, T, I) P, all-reduce over tp (`f`): I
        wgrad    dW = dYᵀ X      (O/tp, I), stays on its rank; so does db

    Under sequence parallelism X is all-gathered first, and dX reduce-scattered to (B, T/tp, I) V.
    Raises ConfigError if out_features is not divisible by stride x tp.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        gather_output: bool = False,
        stride: int = 1,
        *,
        tp: Axis,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        if out_features % (stride * tp.size):
            raise ConfigError(
                f"out_features={out_features} is not divisible by stride x tp_size = "
                f"{stride} x {tp.size}; it can be a multiple of {stride * tp.size}"
            )
        self.tp = tp
        self.stride = stride
        self.gather_output = gather_output
        # The fan-in is the whole one. It is not cut here, in a row-parallel layer it is.
        std = 1 / math.sqrt(in_features) if init_std is None else init_std
        rows = (out_features,) if stride == 1 else (stride, out_features // stride)
        cut = ShardSpec(rows, (Cut(tp, len(rows) - 1),), stride)
        self.weight = new_parameter(
            replace(cut, shape=(*rows, in_features), init_std=std, decay=True)
        )  # (O/tp, I) or (s, O/s/tp, I)
        self.bias = new_parameter(cut) if bias else None

    def extra_repr(self) -> str:
        blocks = f"{self.stride} x " if self.stride > 1 else ""
        spec, bias = shard_spec(self.weight), ", bias" if self.bias is not None else ""
        return f"in={spec.shape[-1]}, out={blocks}{width_of(spec, len(spec.shape) - 2)}{bias}"

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.flatten() if self.bias is not None else None
        y = column_linear(x, self.weight.reshape(-1, x.shape[-1]), bias, self.tp)  # (B, T, O/tp)
        if self.gather_output:
            y = y.unflatten(-1, (self.stride, -1))  # (B, T, s, O/s/tp)
            y = gather_from_tensor_parallel_region(y, self.tp).flatten(-2)  # (B, T, O)
        return y


class RowParallelLinear(nn.Module):
    """Y = X Wᵀ + b with W's columns split over tp: each rank multiplies its slice of X.

    (B, T, I/tp) -> (B, T, O), or from (B, T, I) with input_is_parallel=False, which takes the
    slice first; under sequence parallelism (B, T/tp, O). The products are partial sums; the bias
    is added once, after they are summed.

        forward  Y = X Wᵀ        (B, T, I/tp) V -> (B, T, O) P, all-reduce over tp (`g`): I
        dgrad    dX = dY W       (B, T, I/tp) V
        wgrad    dW = dYᵀ X      (O, I/tp), stays on its rank; db (O,) I

    Under sequence parallelism a reduce-scatter of the tokens takes the all-reduce's place; backward
    dY is all-gathered, and db is P.

    Raises ConfigError if in_features is not divisible by tp.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        input_is_parallel: bool = True,
        *,
        tp: Axis,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        if in_features % tp.size:
            raise ConfigError(
                f"in_features={in_features} is not divisible by tp_size={tp.size}; "
                f"it can be a multiple of {tp.size}"
            )
        self.tp = tp
        self.input_is_parallel = input_is_parallel
        std = 1 / math.sqrt(in_features) if init_std is None else init_std
        self.weight = new_parameter(
            ShardSpec((out_features, in_features), (Cut(tp, 1),), init_std=std, decay=True)
        )  # (O, I/tp)
        self.bias = replicated_parameter((out_features,), tp) if bias else None  # (O,)

    def extra_repr(self) -> str:
        spec, bias = shard_spec(self.weight), ", bias" if self.bias is not None else ""
        return f"in={width_of(spec, 1)}, out={spec.shape[0]}{bias}"

    def forward(self, x: Tensor) -> Tensor:
        if not self.input_is_parallel:
            x = scatter_to_tensor_parallel_region(x, self.tp)  # (B, T, I/tp)
        partial = F.linear(x, self.weight)  # (B, T, O) partial
        y = leave_tensor_parallel_region(partial, self.tp)  # (B, T, O)    sum over tp
        return y if self.bias is None else y + self.bias
