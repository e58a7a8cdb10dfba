"""Parameters that travel together: a block's, or what stands outside of all blocks.

Letters: S shards; W numbers of the largest shard. A unit's parameters lie in rows (S, W), of which
each rank holds one: its slice of the first parameter, of the second, and so on, then zeros.
"""

from __future__ import annotations

import math
from itertools import accumulate

import torch
from comm import all_gather, reduce_scatter
from parallel_context import Axis
from torch import Tensor, nn
from zero_cut import ZeroSpec


class Unit:
    """Its parameters are this rank's slices (sharded), or, while it is used, whole (gathered).

    A parameter's shard spec changes with it.
    """

    def __init__(self, parameters: list[nn.Parameter], specs: list[ZeroSpec], shards: Axis) -> None:
        """The parameters hold their whole tensors, and from now on their slices of those."""
        self.parameters, self.specs, self.shards = parameters, specs, shards
        self.places = [self._places_of(part) for part in range(shards.size)]
        width = max(places[-1].stop for places in self.places)
        self.row = parameters[0].detach().new_zeros(width)
        own = zip(self.places[shards.rank], specs, strict=True)
        self.slices = [self.row[place].view(s.box_shape(shards.rank)) for place, s in own]
        # By .data, so that autograd sees no change in what it has saved when it is gathered again.
        self.whole = [p.data for p in parameters]
        for tensor, whole, spec in zip(self.slices, self.whole, specs, strict=True):
            tensor.copy_(whole[spec.box(shards.rank)])
        self.show(gathered=False)

    def _places_of(self, part: int) -> list[slice]:
        """Where in the row of a part each parameter's slice lies."""
        sizes = [math.prod(spec.box_shape(part)) for spec in self.specs]
        return [slice(end - n, end) for n, end in zip(sizes, accumulate(sizes), strict=True)]

    def show(self, gathered: bool) -> None:
        """Lets each parameter be its whole tensor, or this rank's slice, and say so."""
        self.is_gathered = gathered
        for i, parameter in enumerate(self.parameters):
            parameter.data = self.whole[i] if gathered else self.slices[i]
            spec = self.specs[i].gathered if gathered else self.specs[i]
            parameter.shard_spec = spec  # type: ignore[attr-defined]

    def gather(self, phase: str) -> None:
        """Lets the parameters be whole."""
        if self.is_gathered:
            return
        rows = all_gather(self.row[None], self.shards, phase, dim=0)  # (S, W)
        self._copy(rows, self.whole, to_rows=False)
        self.show(gathered=True)

    def finish_step(self) -> None:
        """Sums the whole gradients over the shards; the parameters are slices, each with its
        gradient."""
        gradients = []
        for parameter in self.parameters:
            assert parameter.grad is not None, "a parameter has no gradient"
            gradients.append(parameter.grad)
            parameter.grad = None
        rows = self.row.new_zeros(self.shards.size, len(self.row))
        self._copy(rows, gradients, to_rows=True)
        row = reduce_scatter(rows, self.shards, "backward", dim=0)  # (1, W)
        self.show(gathered=False)
        for i, place in enumerate(self.places[self.shards.rank]):
            self.parameters[i].grad = row[0, place].view(self.slices[i].shape)

    @torch.no_grad()
    def _copy(self, rows: Tensor, whole: list[Tensor], to_rows: bool) -> None:
        for part, places in enumerate(self.places):
            for place, tensor, spec in zip(places, whole, self.specs, strict=True):
                slice_of_row = rows[part, place].view(spec.box_shape(part))
                slice_of_whole = tensor[spec.box(part)]
                if to_rows:
                    slice_of_row.copy_(slice_of_whole)
                else:
                    slice_of_whole.copy_(slice_of_row)
