"""The shard spec that every parameter carries: which part of the whole tensor a rank holds.

Parameters are made empty; init_weights or load_whole fills them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.nn.functional as F
from comm import all_gather
from config import ConfigError
from parallel_context import Axis
from torch import Tensor, nn


@dataclass(frozen=True)
class Cut:
    """How one axis divides a parameter: into equal contiguous slices along `dim`, by rank.

    `copies` neighbours hold the same slice. With `ranks`, as for a pipeline's stage or an expert,
    only those ranks of the axis have the parameter, and the axis slices nothing.
    """

    axis: Axis
    dim: int = 0
    copies: int = 1
    ranks: tuple[int, ...] = ()

    @property
    def parts(self) -> int:
        return 1 if self.ranks else self.axis.size // self.copies

    @property
    def part(self) -> int:  # the number of this rank's
        return self.part_of(self.axis.rank)

    def part_of(self, rank: int) -> int:
        return 0 if self.ranks else rank // self.copies

    @property
    def holders(self) -> Sequence[int]:  # the ranks of the axis that hold this part
        return self.ranks or range(self.part * self.copies, (self.part + 1) * self.copies)


@dataclass(frozen=True)
class ShardSpec:
    """What a rank's parameter is of the whole one. Everything that shards or gathers reads this.

    `shape` is the whole tensor as the layer would hold it alone. Each of `cuts` divides what the
    one before it left, over an axis of its own; over other axes the parameter is replicated. A
    fused projection has its stride (3 for q, k, v) as leading dimension, so that q, k and v are
    each cut; `dense_shape` is nn.Linear's shape for the same numbers. To make the parts equal,
    `pad` zeros follow the last along each dimension: ranks hold them, the whole does not.
    """

    shape: tuple[int, ...]
    cuts: tuple[Cut, ...] = ()
    stride: int = 1
    pad: tuple[int, ...] = ()
    init_mean: float = 0.0
    init_std: float = 0.0
    decay: bool = False
    partial_over: tuple[str, ...] = ()  # axes beside those of the batch, see is_partial

    @property
    def dense_shape(self) -> tuple[int, ...]:
        if self.stride == 1:
            return self.shape
        return (self.shape[0] * self.shape[1], *self.shape[2:])

    @property
    def index(self) -> tuple[slice, ...]:
        """Where in a tensor of `shape`, and its pad, this rank's part lies."""
        size = [n + zeros for n, zeros in zip_longest(self.shape, self.pad, fillvalue=0)]
        first = [0] * len(size)
        for cut in self.cuts:
            size[cut.dim] //= cut.parts
            first[cut.dim] += cut.part * size[cut.dim]
        return tuple(slice(start, start + n) for start, n in zip(first, size, strict=True))

    def holders(self, axis: Axis) -> Sequence[int]:
        """The ranks of the axis that hold the same part as this one; without a cut, all."""
        found = [cut.holders for cut in self.cuts if cut.axis.name == axis.name]
        return found[0] if found else range(axis.size)

    def is_cut_over(self, axis: Axis) -> bool:
        return any(cut.axis.name == axis.name for cut in self.cuts)

    def is_partial(self, axis: Axis) -> bool:
        """Whether the gradient that autograd leaves is only a partial sum over the axis."""
        return axis.name in self.partial_over or (axis.divides_batch and not self.is_cut_over(axis))

    def shard(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor of `dense_shape`; a copy."""
        if tuple(whole.shape) != self.dense_shape:
            raise ConfigError(f"shape {tuple(whole.shape)} does not fit {self.dense_shape}")
        whole = whole.reshape(self.shape)
        if self.pad:
            whole = F.pad(whole, [n for zeros in reversed(self.pad) for n in (0, zeros)])
        return whole[self.index].clone()

    def unshard(self, local: Tensor, phase: str) -> Tensor:
        """The whole tensor, of `dense_shape`, on every rank; all-gathers over each cut."""
        for cut in reversed(self.cuts):
            if cut.parts > 1:
                gathered = all_gather(local, cut.axis, phase, dim=cut.dim)
                by_part = gathered.unflatten(cut.dim, (cut.parts, cut.copies, -1))
                local = by_part.select(cut.dim + 1, 0).flatten(cut.dim, cut.dim + 1)
        local = local[tuple(map(slice, self.shape))]  # without the pad
        return local.reshape(self.dense_shape)


def new_parameter(spec: ShardSpec) -> nn.Parameter:
    """An empty parameter of this rank's shape, with its spec."""
    parameter = nn.Parameter(torch.empty([one.stop - one.start for one in spec.index]))
    parameter.shard_spec = spec  # type: ignore[attr-defined]
    return parameter


def replicated_parameter(
    shape: tuple[int, ...], tp: Axis, init_mean: float = 0.0, init_std: float = 0.0
) -> nn.Parameter:
    """An empty parameter of all ranks that acts between the cut layers: under sequence parallelism
    on a rank's own tokens only, so that its gradient is partial."""
    partial_over = (tp.name,) if tp.sequence_parallel else ()
    spec = ShardSpec(shape, init_mean=init_mean, init_std=init_std, partial_over=partial_over)
    return new_parameter(spec)


def shard_spec(parameter: nn.Parameter) -> ShardSpec:
    spec = getattr(parameter, "shard_spec", None)
    assert isinstance(spec, ShardSpec), "a parameter without a shard spec: use new_parameter"
    return spec


def whole_specs(model: nn.Module) -> dict[str, ShardSpec]:
    """The spec of each parameter by name; of a pipeline's, of those on other stages too."""
    found: dict[str, ShardSpec] | None = getattr(model, "whole_specs", None)
    return found or {name: shard_spec(p) for name, p in model.named_parameters()}


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
def gather_whole(model: nn.Module, *, gradients: bool = False) -> dict[str, Tensor]:
    """Every whole parameter, or its gradient, by name, as nn.Linear would hold it."""
    whole = {}
    for name, parameter in model.named_parameters():
        local = parameter.grad if gradients else parameter
        assert local is not None, f"{name} has no gradient"
        whole[name] = shard_spec(parameter).unshard(local.detach(), "checkpoint")
    return whole
