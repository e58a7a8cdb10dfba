"""Which part of a run's state each rank holds, and which of its holders writes it.

A parameter's slices follow from its shard spec, and AdamW's moments are cut like their parameter.
What several ranks hold alike is written by one of them, so that all have about equally much to do.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from torch import Tensor, nn

from rosetrainer.optim.adamw import AdamW
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.sharding import ShardSpec, shard_spec, whole_specs


def owned_slices(
    model: nn.Module, optimizer: AdamW, context: ParallelContext, copy: bool
) -> tuple[dict[str, Tensor], dict[str, Any], int]:
    """What this rank writes: tensors on the CPU by global name, and their slices of the whole.

    And the bytes that all ranks write. A moment's name is its parameter's and its own:
    blocks.0.attention.dense.weight/exp_avg. copy: the tensors must not change with the model.
    """
    tensors, slices = {}, {}
    everything = list(whole_state(model, optimizer))
    need = sum(math.prod(spec.shape) * tensor.element_size() for _, tensor, spec in everything)
    # Of a pipeline's other stages too, which hold as much for each number.
    numbers = sum(math.prod(spec.shape) for spec in whole_specs(model).values())
    need = need * numbers // sum(math.prod(shard_spec(p).shape) for p in model.parameters())
    writers = assign_writers([spec for _, _, spec in everything], context)
    for (name, tensor, spec), writer in zip(everything, writers, strict=True):
        first, size = own_box(spec)
        if 0 in size or writer != context.rank:
            continue
        own = tensor.detach()[tuple(map(slice, size))]
        tensors[name] = own.to("cpu", copy=copy).contiguous()
        slices[name] = {
            "shape": list(spec.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "first": first,
            "size": size,
        }
    return tensors, slices, need


def whole_state(model: nn.Module, optimizer: AdamW) -> Iterator[tuple[str, Tensor, ShardSpec]]:
    """(global name, this rank's tensor, spec): each parameter and the moments that it has."""
    for name, parameter in model.named_parameters():
        spec = shard_spec(parameter)
        yield name, parameter, spec
        moments = optimizer.state.get(parameter, {})
        for moment in sorted(set(moments) - {"step"}):
            yield f"{name}/{moment}", moments[moment], spec


def own_box(spec: ShardSpec) -> tuple[list[int], list[int]]:
    """(first index, size) along each dimension of what this rank holds, without the pad."""
    sides = list(zip(spec.index, spec.shape, strict=True))
    first = [min(one.start, n) for one, n in sides]
    return first, [min(one.stop, n) - start for (one, n), start in zip(sides, first, strict=True)]


def assign_writers(specs: Sequence[ShardSpec], context: ParallelContext) -> list[int]:
    """For each tensor the rank that writes the part which this rank holds.

    Of all that hold it, the one with the least to write so far; every rank computes the same.
    """
    load, writers = [0] * context.world_size, []
    known: dict[Any, dict[tuple[int, ...], list[int]]] = {}  # most tensors are cut in few ways
    for spec in specs:
        way = tuple((cut.axis.name, cut.copies, cut.ranks) for cut in spec.cuts)
        if way not in known:
            known[way] = holders_by_part(spec, context)
        chosen = {}
        for part, holders in known[way].items():
            chosen[part] = min(holders, key=load.__getitem__)
            load[chosen[part]] += math.prod(spec.shape) // len(known[way])
        writers.append(chosen[tuple(cut.part for cut in spec.cuts)])
    return writers


def holders_by_part(spec: ShardSpec, context: ParallelContext) -> dict[tuple[int, ...], list[int]]:
    """The world ranks that hold each part, in order; of several stages only the first's."""
    found = defaultdict(list)
    for rank, place in enumerate(product(*(range(axis.size) for axis in context.axes))):
        at = dict(zip((axis.name for axis in context.axes), place, strict=True))
        if all(not cut.ranks or at[cut.axis.name] == cut.ranks[0] for cut in spec.cuts):
            found[tuple(cut.part_of(at[cut.axis.name]) for cut in spec.cuts)].append(rank)
    return found
