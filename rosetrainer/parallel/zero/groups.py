"""Which rank holds which slice, where it is not simply the next one: groups of shards (hybrid
sharding), and matrices that one shard has whole, as Muon wants them.

Letters: S shards, R replicas of them; S x R = dp.size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rosetrainer.parallel.comm import start_all_reduce
from rosetrainer.parallel.context import Axis, ParallelContext
from rosetrainer.parallel.sharding import shard_spec
from rosetrainer.parallel.zero.cut import ShardCut, ZeroSpec, dim_of_slices, shape_of, zero_spec
from rosetrainer.parallel.zero.frozen import PartlyFrozen, parts
from rosetrainer.parallel.zero.sharded_model import ShardedModel
from rosetrainer.parallel.zero.short_rows import ShortUnit, multiplied


@dataclass(frozen=True)
class GroupCut(ShardCut):
    """Ranks r, r + S, r + 2S, .. hold the same slice: `copies` of them, R. With an `owner` that
    part has all rows."""

    owner: int | None = None

    def part_of(self, rank: int) -> int:
        return rank % self.parts

    @property
    def holders(self) -> Sequence[int]:
        return range(self.part, self.axis.size, self.parts)

    def rows(self, n: int, part: int) -> slice:
        if self.owner is None:
            return super().rows(n, part)
        return slice(0, n if part == self.owner else 0)


class GroupUnit(ShortUnit):
    """Its gradient is summed over the shards, and then over the groups of them."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        specs: list[ZeroSpec],
        axes: tuple[Axis, Axis],
        dtypes: list[torch.dtype],
    ) -> None:
        """axes: of the shards, of their replicas."""
        super().__init__(parameters, specs, axes[0], dtypes)
        self.replicas = axes[1]

    def finish_step(self) -> None:
        assert self.gradient is not None
        start_all_reduce(self.gradient, self.replicas, "backward").wait()
        super().finish_step()


def shard_model(
    model: nn.Module,
    context: ParallelContext,
    matrices: Collection[nn.Parameter] = (),
    products: torch.dtype | None = None,
    timeout_seconds: float = 300.0,
) -> None:
    """Lets the model be sharded as context.parallel.zero says; at level 0 it stays as it is.

    At level 3 it may be one of shapes alone, on the meta device: so no more than a unit is whole.
    matrices: parameters that belong whole to one shard each, as Muon wants them. products: the
    dtype of matrix products, in which what blocks multiply is gathered; unless given, their own.
    """
    if not context.parallel.zero or context.dp.size == 1:
        return
    shards, replicas = shard_axes(context, timeout_seconds)
    owner, blocks = owners(matrices, shards.size), blocks_of(model)
    shorter = products is not None and products.itemsize < next(model.parameters()).itemsize
    short = multiplied(blocks) if shorter else set()

    def unit_of(parameters: list[nn.Parameter]) -> GroupUnit:
        parameters.sort(key=short.__contains__)
        dtypes = [products if products and p in short else p.dtype for p in parameters]
        specs = []
        for parameter in parameters:
            spec = shard_spec(parameter)
            dim = dim_of_slices(shape_of(spec.index), shards.size)
            cut = GroupCut(context.dp, dim, replicas.size, owner=owner.get(parameter))
            specs.append(zero_spec(spec, cut))
            if parameter.is_meta:
                give_memory(parameter, context.device)
        unit = GroupUnit(parameters, specs, (shards, replicas), dtypes)
        unit.release(in_slices(context))
        return unit

    trained = parts(model, blocks, trained=True)
    units, later = [unit_of(own) for _, own in trained], [module for module, _ in trained[1:]]
    still = parts(model, blocks, trained=False)
    sharded: Any = ShardedModel
    if still and context.parallel.zero == 3:
        sharded = partial(PartlyFrozen, frozen=[(module, unit_of(own)) for module, own in still])
    model.sharded = sharded(model, later, units, context.parallel)


def in_slices(context: ParallelContext) -> bool:
    """Whether parameters themselves are sharded."""
    return context.parallel.zero == 3 and context.dp.size > 1


def give_memory(parameter: nn.Parameter, device: torch.device) -> None:
    """To one on the meta device, in place; it is empty."""
    spec, trained = shard_spec(parameter), parameter.requires_grad
    empty = nn.Parameter(torch.empty_like(parameter, device=device), trained)
    torch.utils.swap_tensors(parameter, empty)
    parameter.shard_spec = spec  # type: ignore[attr-defined]


def shard_axes(context: ParallelContext, timeout_seconds: float) -> tuple[Axis, Axis]:
    """The axes of the shards, neighbours on dp, and of those that hold the same shard."""
    dp, tp, replicas = context.dp, context.tp, context.parallel.dp_replicas
    if replicas == 1:
        return dp, Axis("replicas")
    every = torch.arange(context.world_size)  # world ranks
    ranks = every.view(context.pp.size, replicas, dp.size // replicas, tp.size)
    timeout = timedelta(seconds=timeout_seconds)

    def axis(name: str, groups: Tensor) -> Axis:
        group, _ = dist.new_subgroups_by_enumeration(groups.tolist(), timeout=timeout)
        return Axis(name, groups.shape[1], dist.get_rank(group), group)

    shards = axis("shards", ranks.movedim(2, 3).flatten(0, 2))
    return shards, axis("replicas", ranks.movedim(1, 3).flatten(0, 2))


def owners(parameters: Collection[nn.Parameter], shards: int) -> dict[nn.Parameter, int]:
    """To which shard each matrix belongs: in order, to the one that has least so far."""
    load, found = [0] * shards, {}
    for parameter in parameters:
        found[parameter] = min(range(shards), key=load.__getitem__)
        load[found[parameter]] += math.prod(shard_spec(parameter).shape)
    return found


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """In the order of their use; of two sides the encoder's come first."""
    lists = {n: m for n, m in model.named_children() if isinstance(m, nn.ModuleList)}
    return [block for name in sorted(lists, key=lambda n: n != "encoder") for block in lists[name]]
