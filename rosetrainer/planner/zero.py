"""What ZeRO moves over dp and leaves on a rank.

Letters: S shards; W numbers of a unit's largest shard, as which all of its shards travel. Unit 0 is
what stands outside of blocks, each block is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from rosetrainer.config import ParallelConfig
from rosetrainer.parallel.zero.cut import dim_of_slices
from rosetrainer.planner.shares import Parameter, Work

Moved = tuple[str, str, str, list[int]]  # axis, operation, phase, payload bytes of each call


def shards_of(parallel: ParallelConfig) -> int:
    return (parallel.dp_size or 1) // parallel.dp_replicas


def elements_of_slice(parameter: Parameter, shards: int, part: int) -> int:
    """Of the slice that one of the shards has: the last one has the largest."""
    n = parameter.shape[dim_of_slices(parameter.shape, shards)]
    return parameter.elements // n * ((part + 1) * n // shards - part * n // shards)


def widths(sizes: Sequence[Parameter], shards: int) -> list[int]:
    """W of each unit."""
    found = [0] * (1 + max(one.block for one in sizes))
    for one in sizes:
        found[one.block] += elements_of_slice(one, shards, shards - 1)
    return [width for width in found if width]  # a stage may have nothing outside of blocks


def gathered_bytes(one: Parameter, work: Work) -> int:
    """Of one of its numbers: what a block multiplies is gathered as it is multiplied."""
    short = one.multiplied and one.block
    return min(work.product_bytes, work.weight_bytes) if short else work.weight_bytes


def gathering(parallel: ParallelConfig, work: Work) -> Work:
    """The work as weights are gathered for it: in a pipeline in their own dtype."""
    return work if parallel.pp_size == 1 else replace(work, product_bytes=work.weight_bytes)


def rows_to_gather(sizes: Sequence[Parameter], parallel: ParallelConfig, work: Work) -> list[int]:
    """Bytes of the rows of each unit, which are whole numbers of a weight's bytes."""
    shards, found = shards_of(parallel), [0] * (1 + max(one.block for one in sizes))
    for one in sizes:
        own = elements_of_slice(one, shards, shards - 1)
        found[one.block] += own * gathered_bytes(one, work)
    each = [-(-size // work.weight_bytes) * work.weight_bytes for size in found if size]
    return [shards * size for size in each]


def moved(parallel: ParallelConfig, sizes: Sequence[Parameter], work: Work) -> Iterator[Moved]:
    """What a step moves of parameters and gradients over dp."""
    shards, level, work = shards_of(parallel), parallel.zero, gathering(parallel, work)
    axis = "dp" if parallel.dp_replicas == 1 else "shards"
    root, *blocks = rows_to_gather(sizes, parallel, work)
    again = work.micro_batches if level == 3 else 1  # at other levels they stay for the whole step
    yield axis, "all_gather", "forward", [root, *blocks * again]
    if level == 3 and not parallel.zero_keep:  # what the last block has gathered is used at once
        yield axis, "all_gather", "backward", blocks[:-1] * work.micro_batches
    times = work.micro_batches if level > 1 else 1
    each = [width * work.weight_bytes for width in widths(sizes, shards)]
    yield axis, "reduce_scatter", "backward", [shards * size for size in each] * times
    if parallel.dp_replicas > 1:
        yield "replicas", "all_reduce", "backward", each


def memory(
    parallel: ParallelConfig, sizes: Sequence[Parameter], work: Work, part: int
) -> dict[str, int]:
    """Bytes that one of the shards holds from step to step, and of what it gathers for a while.

    Parameters lie in rows of W; where only moments are cut, or gradients too, whole beside them. At
    level 3 what is gathered is unit 0, first with its rows, then with a block and the rows of one
    that come or have come.
    """
    shards, work = shards_of(parallel), gathering(parallel, work)
    each = rows_to_gather(sizes, parallel, work)
    rows = sum(widths(sizes, shards)) * work.weight_bytes
    whole = [0] * (1 + max(one.block for one in sizes))
    for one in sizes:
        whole[one.block] += one.elements * gathered_bytes(one, work)
    own = sum(elements_of_slice(one, shards, part) for one in sizes) * work.weight_bytes
    of_level_3 = parallel.zero == 3
    found = {
        "parameters": rows + (0 if of_level_3 else sum(whole)),
        "gradients": rows if parallel.pp_size == 1 else sum(whole),  # until the last is made
        "optimizer": 2 * own + 4 * len(sizes),
    }
    if of_level_3:
        blocks = sum(whole[1:]) if parallel.zero_keep else max(whole[1:])
        found["gathered"] = whole[0] + max(each[0], blocks + max(each[1:]))
    return found
