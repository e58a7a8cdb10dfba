"""Tensor-parallel linear layers, and the shard spec that every parameter carries.

Shape letters: B batch, T sequence, I in_features, O out_features; tp = tp.size.

From "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism"
(Shoeybi et al.). Layers are made with empty weights; init_weights fills them.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from comm import (
    all_gather,
    copy_to_tensor_parallel_region,
    gather_from_tensor_parallel_region,
)
from config import ConfigError
from parallel_context import Axis
from torch import Tensor, nn


@dataclass(frozen=True)
class ShardSpec:
    """What a rank's parameter is of the whole one. Everything that shards or gathers reads this.

    `shape` is the whole tensor as the layer would hold it alone. It is cut along `dim` into
    `parts` equal contiguous slices, of which this rank holds number `part`; a replicated tensor
    is one part.
    """

    shape: tuple[int, ...]
    dim: int = 0
    parts: int = 1
    part: int = 0
    init_mean: float = 0.0
    init_std: float = 0.0

    def shard(self, whole: Tensor) -> Tensor:
        """This rank's slice of a tensor of `shape`; a copy."""
        width = self.shape[self.dim] // self.parts
        return whole.narrow(self.dim, self.part * width, width).clone()

    def unshard(self, local: Tensor, tp: Axis, phase: str) -> Tensor:
        """The whole tensor on every rank; all-gathers over tp if it is cut."""
        if self.parts > 1:
            gathered = all_gather(local, tp, phase, dim=self.dim)
            # With fewer parts than ranks, neighbours hold the same part: one of them is enough.
            by_part = gathered.unflatten(self.dim, (self.parts, tp.size // self.parts, -1))
            local = by_part.select(self.dim + 1, 0).flatten(self.dim, self.dim + 1)
        return local


def new_parameter(spec: ShardSpec) -> nn.Parameter:
    """An empty parameter of this rank's shape, with its spec."""
    local = list(spec.shape)
    local[spec.dim] //= spec.parts
    parameter = nn.Parameter(torch.empty(local))
    parameter.shard_spec = spec  # type: ignore[attr-defined]
    return parameter


def shard_spec(parameter: nn.Parameter) -> ShardSpec:
    spec = getattr(parameter, "shard_spec", None)
    assert isinstance(spec, ShardSpec), "a parameter without a shard spec: use new_parameter"
    return spec


def draw_whole(spec: ShardSpec, seed: int, name: str) -> Tensor:
    """The initial value of the whole parameter `name`, fp32 on the CPU.

    It depends on (seed, name, shape) alone, so every layout starts from the same numbers.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    noise = torch.randn(spec.shape, generator=generator, device="cpu", dtype=torch.float32)
    return noise * spec.init_std + spec.init_mean


@torch.no_grad()
def init_weights(model: nn.Module, seed: int) -> None:
    """Fills every parameter with this rank's slice of the whole initial value."""
    for name, parameter in model.named_parameters():
        spec = shard_spec(parameter)
        parameter.copy_(spec.shard(draw_whole(spec, seed, name)))


class ColumnParallelLinear(nn.Module):
    """Y = X Wᵀ + b with W's rows split over tp: "column" is meant of Wᵀ.

    (B, T, I) -> (B, T, O/tp), or (B, T, O) with gather_output: every rank reads all of X and makes
    its slice of Y. Raises ConfigError if out_features is not divisible by tp.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        gather_output: bool = False,
        *,
        tp: Axis,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        if out_features % tp.size:
            raise ConfigError(
                f"out_features={out_features} is not divisible by tp_size={tp.size}; "
                f"it can be a multiple of {tp.size}"
            )
        self.tp = tp
        self.gather_output = gather_output
        std = 1 / math.sqrt(in_features) if init_std is None else init_std
        cut = ShardSpec((out_features,), 0, tp.size, tp.rank)
        weight = replace(cut, shape=(out_features, in_features), init_std=std)
        self.weight = new_parameter(weight)  # (O/tp, I)
        self.bias = new_parameter(cut) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = copy_to_tensor_parallel_region(x, self.tp)  # (B, T, I)    backward: all-reduce
        y = F.linear(x, self.weight, self.bias)  # (B, T, O/tp)
        return gather_from_tensor_parallel_region(y, self.tp) if self.gather_output else y
