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
        self.rows: Tensor | None = None  # (S, W): the whole gradients, until they are summed
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
        self._fill(self.whole, rows)
        self.show(gathered=True)

    @torch.no_grad()
    def collect(self) -> None:
        """Adds the whole gradients to the rows, and frees them."""
        is_first = self.rows is None
        if self.rows is None:
            self.rows = self.row.new_empty(self.shards.size, len(self.row))
        for part, places in enumerate(self.places):
            self.rows[part, places[-1].stop :] = 0
            for place, parameter, spec in zip(places, self.parameters, self.specs, strict=True):
                assert parameter.grad is not None, "a parameter has no gradient"
                slice_of_row = self.rows[part, place].view(spec.box_shape(part))
                slice_of_whole = parameter.grad[spec.box(part)]
                (slice_of_row.copy_ if is_first else slice_of_row.add_)(slice_of_whole)
        for parameter in self.parameters:
            parameter.grad = None

    def finish_step(self) -> None:
        """Sums the whole gradients over the shards; the parameters are slices, each with its
        gradient."""
        self.collect()
        assert self.rows is not None
        row = reduce_scatter(self.rows, self.shards, "backward", dim=0)  # (1, W)
        self.rows = None
        self.show(gathered=False)
        for i, place in enumerate(self.places[self.shards.rank]):
            self.parameters[i].grad = row[0, place].view(self.slices[i].shape)

    @torch.no_grad()
    def _fill(self, whole: list[Tensor], rows: Tensor) -> None:
        for part, places in enumerate(self.places):
            for place, tensor, spec in zip(places, whole, self.specs, strict=True):
                tensor[spec.box(part)].copy_(rows[part, place].view(spec.box_shape(part)))
