"""How ZeRO cuts a parameter over dp: by the shard spec that checkpoints, norms and updates read.

Letters: S shards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from comm import all_gather
from sharding import Cut, ShardSpec
from torch import Tensor


@dataclass(frozen=True)
class ShardCut(Cut):
    """A cut into S slices that differ by one row at most; with fewer rows some have none."""

    def rows(self, n: int, part: int) -> slice:
        """Which of n rows the part has."""
        return slice(part * n // self.parts, (part + 1) * n // self.parts)


@dataclass(frozen=True)
class ZeroSpec(ShardSpec):
    """The spec of a parameter of which a rank holds a slice; `gathered` is that of its whole, which
    tp may have cut. `shard_cut` is the last of its cuts."""

    gathered: ShardSpec = field(kw_only=True)
    shard_cut: ShardCut = field(kw_only=True)

    @property
    def gathered_shape(self) -> tuple[int, ...]:
        return shape_of(self.gathered.index)

    def box(self, part: int) -> tuple[slice, ...]:
        """Where in the gathered parameter a part lies."""
        index = [slice(0, n) for n in self.gathered_shape]
        dim = self.shard_cut.dim
        index[dim] = self.shard_cut.rows(index[dim].stop, part)
        return tuple(index)

    def box_shape(self, part: int) -> tuple[int, ...]:
        return shape_of(self.box(part))

    @property
    def index(self) -> tuple[slice, ...]:
        """Where in a tensor of `shape`, and its pad, this rank's part lies."""
        pairs = zip(self.gathered.index, self.box(self.shard_cut.part), strict=True)
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
        return self.gathered.unshard(whole, phase)


def zero_spec(spec: ShardSpec, cut: ShardCut) -> ZeroSpec:
    """The spec of one of the slices into which the cut divides what `spec` says."""
    known = {one.name: getattr(spec, one.name) for one in fields(ShardSpec)}
    known["cuts"] = (*spec.cuts, cut)
    return ZeroSpec(**known, gathered=spec, shard_cut=cut)


def dim_of_slices(shape: Sequence[int], parts: int) -> int:
    """The first dimension of those along which the largest slice is smallest."""
    return min(range(len(shape)), key=lambda dim: -(-shape[dim] // parts) / shape[dim])


def shape_of(index: Sequence[slice]) -> tuple[int, ...]:
    return tuple(one.stop - one.start for one in index)
