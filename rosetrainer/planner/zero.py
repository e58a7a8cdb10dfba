"""What ZeRO moves over dp and leaves on a rank.

Letters: S shards; W numbers of a unit's largest shard, as which all of its shards travel. Unit 0 is
what stands outside of blocks, each block is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rosetrainer.config import ParallelConfig
from rosetrainer.parallel.zero.cut import dim_of_slices
from rosetrainer.planner.shares import Parameter

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
    return found


def moved(
    parallel: ParallelConfig, sizes: Sequence[Parameter], micro_batches: int, number_bytes: int
) -> Iterator[Moved]:
    """What a step moves of parameters and gradients over dp."""
    shards, level = shards_of(parallel), parallel.zero
    axis = "dp" if parallel.dp_replicas == 1 else "shards"
    each = widths(sizes, shards)
    root, *blocks = (shards * width * number_bytes for width in each)
    again = micro_batches if level == 3 else 1  # at other levels they stay for the whole step
    yield axis, "all_gather", "forward", [root, *blocks * again]
    if level == 3 and not parallel.zero_keep:  # what the last block has gathered is used at once
        yield axis, "all_gather", "backward", blocks[:-1] * micro_batches
    times = micro_batches if level > 1 else 1
    yield axis, "reduce_scatter", "backward", [root, *blocks] * times
    if parallel.dp_replicas > 1:
        yield "replicas", "all_reduce", "backward", [width * number_bytes for width in each]


def memory(
    parallel: ParallelConfig, sizes: Sequence[Parameter], number_bytes: int, part: int
) -> dict[str, int]:
    """Bytes that one of the shards holds from step to step, and of what it gathers for a while.

    Parameters lie in rows of W; where only moments are cut, or gradients too, whole beside them. At
    level 3 what is gathered is unit 0, a block, and the rows of one that come or have come.
    """
    shards = shards_of(parallel)
    each = widths(sizes, shards)
    rows = sum(each) * number_bytes
    whole = [0] * len(each)
    for one in sizes:
        whole[one.block] += one.elements * number_bytes
    own = sum(elements_of_slice(one, shards, part) for one in sizes) * number_bytes
    of_level_3 = parallel.zero == 3
    found = {
        "parameters": rows + (0 if of_level_3 else sum(whole)),
        "gradients": rows,
        "optimizer": 2 * own + 4 * len(sizes),
    }
    if of_level_3:
        blocks = sum(whole[1:]) if parallel.zero_keep else max(whole[1:])
        found["gathered"] = whole[0] + blocks + shards * max(each[1:]) * number_bytes
    return found
