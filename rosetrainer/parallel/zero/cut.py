"""How ZeRO cuts a parameter over dp: by the shard spec that checkpoints, norms and updates read.

Letters: S shards, R replicas of them; S x R = dp.size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields

from torch import Tensor, nn

from rosetrainer.parallel.comm import all_gather
from rosetrainer.parallel.context import Axis
from rosetrainer.parallel.sharding import Cut, ShardSpec, shard_spec


@dataclass(frozen=True)
class ShardCut(Cut):
    """A cut of dp into S slices that differ by one row at most; with fewer rows some have none.

    Ranks r, r + S, r + 2S, .. hold the same slice: `copies` of them, R. With an `owner` that part
    has all rows, as Muon wants a matrix.
    """

    owner: int | None = None

    def part_of(self, rank: int) -> int:
        return rank % self.parts

    @property
    def holders(self) -> Sequence[int]:
        return range(self.part, self.axis.size, self.parts)

    def rows(self, n: int, part: int) -> slice:
        """Which of n rows the part has."""
        if self.owner is not None:
            return slice(0, n if part == self.owner else 0)
        return slice(part * n // self.parts, (part + 1) * n // self.parts)


@dataclass(frozen=True)
class ZeroSpec(ShardSpec):
    """The spec of a parameter of which a rank holds a slice; `gathered` is that of its whole, which
    tp may have cut."""

    gathered: ShardSpec | None = None

    @property
    def shard_cut(self) -> ShardCut:
        cut = self.cuts[-1]
        assert isinstance(cut, ShardCut)
        return cut

    @property
    def gathered_spec(self) -> ShardSpec:
        assert self.gathered
        return self.gathered

    @property
    def gathered_shape(self) -> tuple[int, ...]:
        return tuple(one.stop - one.start for one in self.gathered_spec.index)

    def box(self, part: int) -> tuple[slice, ...]:
        """Where in the gathered parameter a part lies."""
        index = [slice(0, n) for n in self.gathered_shape]
        dim = self.shard_cut.dim
        index[dim] = self.shard_cut.rows(index[dim].stop, part)
        return tuple(index)

    def box_shape(self, part: int) -> tuple[int, ...]:
        return tuple(one.stop - one.start for one in self.box(part))

    @property
    def index(self) -> tuple[slice, ...]:
        """Where in a tensor of `shape`, and its pad, this rank's part lies."""
        pairs = zip(self.gathered_spec.index, self.box(self.shard_cut.part), strict=True)
        return tuple(slice(a.start + b.start, a.start + b.stop) for a, b in pairs)

    def unshard(self, local: Tensor, phase: str) -> Tensor:
        """The whole tensor, of `dense_shape`, on every rank; all-gathers over each cut."""
        cut = self.shard_cut
        shapes = [self.box_shape(part) for part in range(cut.parts)]
        row = local.new_zeros(1, max(map(math.prod, shapes)))
        row[0, : local.numel()] = local.flatten()
        rows = all_gather(row, cut.axis, phase, dim=0)  # (dp, ..), the first S of each part
        whole = local.new_empty(self.gathered_shape)
        for part, shape in enumerate(shapes):
            whole[self.box(part)] = rows[part, : math.prod(shape)].view(shape)
        return self.gathered_spec.unshard(whole, phase)


def zero_spec(spec: ShardSpec, dp: Axis, replicas: int, owner: int | None = None) -> ZeroSpec:
    """The spec of one of dp.size / replicas slices of what `spec` says."""
    shape = tuple(one.stop - one.start for one in spec.index)
    cut = ShardCut(dp, dim_of_slices(shape, dp.size // replicas), replicas, owner=owner)
    known = {field.name: getattr(spec, field.name) for field in fields(ShardSpec)}
    return ZeroSpec(**{**known, "cuts": (*spec.cuts, cut)}, gathered=spec)


def dim_of_slices(shape: Sequence[int], parts: int) -> int:
    """The first dimension of those along which the largest slice is smallest."""
    return min(range(len(shape)), key=lambda dim: -(-shape[dim] // parts) / shape[dim])


def owners(parameters: Collection[nn.Parameter], shards: int) -> dict[nn.Parameter, int]:
    """To which shard each matrix belongs: in order, to the one that has least so far."""
    load, found = [0] * shards, {}
    for parameter in parameters:
        found[parameter] = min(range(shards), key=load.__getitem__)
        load[found[parameter]] += math.prod(shard_spec(parameter).shape)
    return found
