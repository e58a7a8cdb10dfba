"""Tensor-parallel linear layers, and the shard spec that every parameter carries.

Shape letters: B batch, T sequence, I in_features, O out_features, s stride; tp = tp.size.

From "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism"
(Shoeybi et al.). Layers are made with empty weights; init_weights or load_whole fills them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosetrainer.config import ConfigError
from rosetrainer.parallel.comm import (
    all_gather,
    gather_from_tensor_parallel_region,
    leave_tensor_parallel_region,
    scatter_to_tensor_parallel_region,
)
from rosetrainer.parallel.context import Axis
from rosetrainer.parallel.overlap import column_linear


@dataclass(frozen=True)
class ShardSpec:
    """What a rank's parameter is of the whole one. Everything that shards or gathers reads this.

    `shape` is the whole tensor as the layer would hold it alone. It is cut along `dim` into
    `parts` equal contiguous slices, of which this rank holds number `part`; a replicated tensor
    is one part. A fused projection has its stride (3 for q, k, v) as leading dimension, so that
    q, k and v are each cut; `dense_shape` is nn.Linear's shape for the same numbers. To make the
    parts equal, `pad` zeros follow the last along `dim`: ranks hold them, the whole does not.
    """

    shape: tuple[int, ...]
    dim: int = 0
    parts: int = 1
    part: int = 0
    stride: int = 1
    pad: int = 0
    init_mean: float = 0.0
    init_std: float = 0.0
    decay: bool = False
    # The axes over which the gradient that autograd leaves is only a partial sum.
    partial_over: tuple[str, ...] = ("dp",)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        if self.stride == 1:
            return self.shape
        return (self.shape[0] * self.shape[1], *self.shape[2:])

    @property
    def width(self) -> int:  # of a part, along `dim`
        return (self.shape[self.dim] + self.pad) // self.parts

    def shard(self, whole: Tensor) -> Tensor:
        """This rank's slice of a tensor of `dense_shape`; a copy."""
        if tuple(whole.shape) != self.dense_shape:
            raise ConfigError(f"shape {tuple(whole.shape)} does not fit {self.dense_shape}")
        whole = whole.reshape(self.shape)
        if self.pad:
            zeros = whole.new_zeros(*self.shape[: self.dim], self.pad, *self.shape[self.dim + 1 :])
            whole = torch.cat([whole, zeros], self.dim)
        return whole.narrow(self.dim, self.part * self.width, self.width).clone()

    def unshard(self, local: Tensor, tp: Axis, phase: str) -> Tensor:
        """The whole tensor, of `dense_shape`, on every rank; all-gathers over tp if it is cut."""
        if self.parts > 1:
            gathered = all_gather(local, tp, phase, dim=self.dim)
            # With fewer parts than ranks, neighbours hold the same part: one of them is enough.
            by_part = gathered.unflatten(self.dim, (self.parts, tp.size // self.parts, -1))
            local = by_part.select(self.dim + 1, 0).flatten(self.dim, self.dim + 1)
        local = local.narrow(self.dim, 0, self.shape[self.dim])  # without the pad
        return local.reshape(self.dense_shape)


def new_parameter(spec: ShardSpec) -> nn.Parameter:
    """An empty parameter of this rank's shape, with its spec."""
    local = list(spec.shape)
    local[spec.dim] = spec.width
    parameter = nn.Parameter(torch.empty(local))
    parameter.shard_spec = spec  # type: ignore[attr-defined]
    return parameter


def replicated_parameter(
    shape: tuple[int, ...], tp: Axis, init_mean: float = 0.0, init_std: float = 0.0
) -> nn.Parameter:
    """An empty parameter of all ranks that acts between the cut layers: under sequence parallelism
    on a rank's own tokens only, so that its gradient is partial."""
    partial_over = ("dp", tp.name) if tp.sequence_parallel else ("dp",)
    spec = ShardSpec(shape, init_mean=init_mean, init_std=init_std, partial_over=partial_over)
    return new_parameter(spec)


def shard_spec(parameter: nn.Parameter) -> ShardSpec:
    spec = getattr(parameter, "shard_spec", None)
    assert isinstance(spec, ShardSpec), "a parameter without a shard spec: use new_parameter"
    return spec


def draw_whole(spec: ShardSpec, seed: int, name: str) -> Tensor:
    """The initial value of the whole parameter `name`, fp32 on the CPU, of spec.dense_shape.

    It depends on (seed, name, shape) alone, so every layout starts from the same numbers.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    noise = torch.randn(spec.dense_shape, generator=generator, device="cpu", dtype=torch.float32)
    return noise * spec.init_std + spec.init_mean


@torch.no_grad()
def init_weights(model: nn.Module, seed: int) -> None:
    """Fills every parameter with this rank's slice of the whole initial value."""
    for name, parameter in model.named_parameters():
        spec = shard_spec(parameter)
        parameter.copy_(spec.shard(draw_whole(spec, seed, name)))


def check_whole(model: nn.Module, whole: Mapping[str, Tensor]) -> None:
    """Raises ConfigError if names or dense shapes are not the model's."""
    specs = {name: shard_spec(parameter) for name, parameter in model.named_parameters()}
    for name in sorted(specs.keys() ^ whole.keys()):
        problem = "lack" if name in specs else "have, and the model lacks,"
        raise ConfigError(f"weights do not fit the model: they {problem} {name}")
    for name, spec in specs.items():
        if tuple(whole[name].shape) != spec.dense_shape:
            raise ConfigError(
                f"{name} has shape {tuple(whole[name].shape)}, the model's is {spec.dense_shape}"
            )


@torch.no_grad()
def load_whole(model: nn.Module, whole: Mapping[str, Tensor]) -> None:
    """Fills every parameter with its slice of whole[name], of its dense shape.

    Raises ConfigError if names or shapes differ, before anything is changed.
    """
    check_whole(model, whole)
    for name, parameter in model.named_parameters():
        parameter.copy_(shard_spec(parameter).shard(whole[name]))


@torch.no_grad()
def gather_whole(model: nn.Module, tp: Axis, gradients: bool = False) -> dict[str, Tensor]:
    """Every whole parameter, or its gradient, by name, as nn.Linear would hold it."""
    whole = {}
    for name, parameter in model.named_parameters():
        local = parameter.grad if gradients else parameter
        assert local is not None, f"{name} has no gradient"
        whole[name] = shard_spec(parameter).unshard(local.detach(), tp, "checkpoint")
    return whole


class ColumnParallelLinear(nn.Module):
    """Y = X Wᵀ + b with W's rows split over tp: "column" is meant of Wᵀ.

    (B, T, I) -> (B, T, O/tp), or (B, T, O) with gather_output: every rank reads all of X, which
    under sequence parallelism it gathers from (B, T/tp, I), and makes its slice of Y. With stride
    s the output features are s blocks of O/s, and each block is split: the local output is this
    rank's slice of the first block, then of the second, and so on.
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
        cut = ShardSpec(rows, len(rows) - 1, tp.size, tp.rank, stride)
        self.weight = new_parameter(
            replace(cut, shape=(*rows, in_features), init_std=std, decay=True)
        )  # (O/tp, I) or (s, O/s/tp, I)
        self.bias = new_parameter(cut) if bias else None

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
            ShardSpec((out_features, in_features), 1, tp.size, tp.rank, init_std=std, decay=True)
        )  # (O, I/tp)
        self.bias = replicated_parameter((out_features,), tp) if bias else None  # (O,)

    def forward(self, x: Tensor) -> Tensor:
        if not self.input_is_parallel:
            x = scatter_to_tensor_parallel_region(x, self.tp)  # (B, T, I/tp)
        partial = F.linear(x, self.weight)  # (B, T, O) partial
        y = leave_tensor_parallel_region(partial, self.tp)  # (B, T, O)    sum over tp
        return y if self.bias is None else y + self.bias
