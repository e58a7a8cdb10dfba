"""Parameters that travel together: a block's, or what stands outside of all blocks.

Letters: S shards; W numbers of the largest shard. A unit's parameters lie in rows (S, W), of which
each rank holds one: its slice of the first parameter, of the second, and so on, then zeros.
"""

from __future__ import annotations

import math
from itertools import accumulate

import torch
from comm import Pending, start_all_gather, start_reduce_scatter
from parallel_context import Axis
from torch import Tensor, nn
from zero_cut import ZeroSpec


class Unit:
    """Its parameters are this rank's slices (sharded), or, while it is used, whole (gathered).

    A parameter's shard spec changes with it. Whole tensors keep their place while they are freed,
    for autograd knows them.
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
        self.is_gathered = False
        self.is_fresh = False  # whether the whole tensors are what the slices are
        self.gathering: Pending | None = None
        self.rows: Tensor | None = None  # (S, W): the whole gradients, until they are summed
        self.scattering: Pending | None = None
        self.gradient: Tensor | None = None  # (1, W): this rank's row of the sum so far
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

    def start_gather(self, phase: str) -> None:
        if self.gathering is None and not self.is_fresh:
            self.gathering = start_all_gather(self.row[None], self.shards, phase, dim=0)

    def gather(self, phase: str) -> None:
        """Lets the parameters be whole."""
        if self.is_gathered:
            return
        self.start_gather(phase)
        if self.gathering is not None:
            rows, self.gathering = self.gathering.wait(), None  # (S, W)
            for whole, spec in zip(self.whole, self.specs, strict=True):
                size = math.prod(spec.gathered_shape) * whole.element_size()
                whole.untyped_storage().resize_(size)
            self._fill(self.whole, rows)
            self.is_fresh = True
        self.show(gathered=True)

    def release(self, free: bool) -> None:
        """Lets the parameters be slices. free: gives the memory of the whole ones back."""
        if self.gathering is not None:  # whose turn did not come
            self.gathering.wait()
            self.gathering = None
        self.show(gathered=False)
        if free:
            self.is_fresh = False
            for whole in self.whole:
                whole.untyped_storage().resize_(0)

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

    def start_scatter(self) -> None:
        """Sums the rows over the shards, each of which gets its own."""
        assert self.rows is not None
        rows, self.rows = self.rows, None
        self.scattering = start_reduce_scatter(rows, self.shards, "backward", dim=0)

    def finish_scatter(self) -> None:
        """Adds what start_scatter has summed to what earlier micro-batches left."""
        if self.scattering is not None:
            row, self.scattering = self.scattering.wait(), None
            self.gradient = row if self.gradient is None else self.gradient.add_(row)

    def finish_step(self) -> None:
        """Lets the parameters be slices, each with its gradient."""
        assert self.gradient is not None
        self.show(gathered=False)
        self.is_fresh = False  # once these gradients have moved the slices
        for i, place in enumerate(self.places[self.shards.rank]):
            self.parameters[i].grad = self.gradient[0, place].view(self.slices[i].shape)
        self.gradient = None

    @torch.no_grad()
    def _fill(self, whole: list[Tensor], rows: Tensor) -> None:
        for part, places in enumerate(self.places):
            for place, tensor, spec in zip(places, whole, self.specs, strict=True):
                tensor[spec.box(part)].copy_(rows[part, place].view(spec.box_shape(part)))
