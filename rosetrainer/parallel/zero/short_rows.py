"""Weights that travel in the dtype of products: under bf16 half as much is gathered, and held.

Letters: S shards; W numbers of the longest row. In a row (W,) of fp32 numbers slices in bf16 lie
two in a number's place, behind all others.
"""

from __future__ import annotations

import math
from itertools import accumulate

import torch
from torch import Tensor, nn

from rosetrainer.parallel.comm import start_all_gather
from rosetrainer.parallel.context import Axis
from rosetrainer.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from rosetrainer.parallel.zero.cut import ZeroSpec
from rosetrainer.parallel.zero.unit import Unit


class Rows:
    """Where in the row of a part each parameter's slice lies, each in a dtype of its own."""

    def __init__(self, specs: list[ZeroSpec], dtypes: list[torch.dtype], parts: int) -> None:
        """dtypes: the widest first, which is that of the row's numbers."""
        self.specs, self.dtypes = specs, dtypes
        self.ends = [self._ends(part) for part in range(parts)]  # of each slice, in bytes
        self.width = max(-(-ends[-1] // dtypes[0].itemsize) for ends in self.ends)

    def _ends(self, part: int) -> list[int]:
        pairs = zip(self.specs, self.dtypes, strict=True)
        return list(accumulate(math.prod(s.box_shape(part)) * d.itemsize for s, d in pairs))

    def pieces(self, row: Tensor, part: int) -> list[Tensor]:
        """Views of the row."""
        found, start = [], 0
        for spec, dtype, end in zip(self.specs, self.dtypes, self.ends[part], strict=True):
            piece = row.view(dtype)[start // dtype.itemsize : end // dtype.itemsize]
            found.append(piece.view(spec.box_shape(part)))
            start = end
        return found


class ShortUnit(Unit):
    """A unit whose slices stay as they are, and of which some are whole in a shorter dtype."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        specs: list[ZeroSpec],
        shards: Axis,
        dtypes: list[torch.dtype],
    ) -> None:
        """dtypes: in which each parameter is whole, its own ones first."""
        super().__init__(parameters, specs, shards)
        self.layout = None if len(set(dtypes)) == 1 else Rows(specs, dtypes, shards.size)
        pairs = zip(self.whole, dtypes, strict=True)
        self.whole = [w if w.dtype == d else torch.empty_like(w, dtype=d) for w, d in pairs]

    def start_gather(self, phase: str) -> None:
        if self.layout is None:
            super().start_gather(phase)
        elif self.gathering is None and not self.is_fresh:
            row = self.row.new_zeros(self.layout.width)
            torch._foreach_copy_(self.layout.pieces(row, self.shards.rank), self.slices)
            self.gathering = start_all_gather(row[None], self.shards, phase, dim=0)

    @torch.no_grad()
    def _fill(self, whole: list[Tensor], rows: Tensor) -> None:
        if self.layout is None:
            super()._fill(whole, rows)
            return
        for part, row in enumerate(rows):
            boxes = [w[s.box(part)] for w, s in zip(whole, self.specs, strict=True)]
            torch._foreach_copy_(boxes, self.layout.pieces(row, part))


def multiplied(blocks: list[nn.Module]) -> set[nn.Parameter]:
    """The weights of the blocks' linear layers, which bf16 uses in bf16 alone."""
    kinds = (ColumnParallelLinear, RowParallelLinear)
    layers = (layer for block in blocks for layer in block.modules())
    return {layer.weight for layer in layers if isinstance(layer, kinds)}
