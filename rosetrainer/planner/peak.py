"""The most bytes that a rank holds at once: in the backward pass of a step's last micro-batch.

Letters: L blocks, b one of them; S shards. Unit 0 is what stands outside of blocks. A rank holds
parameters and moments throughout. While the backward pass goes from block L to block 1,
activations go and gradients come, and with them what their sums need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from rosetrainer.config import GPTConfig, ParallelConfig
from rosetrainer.parallel.data_parallel import BUCKET_BYTES
from rosetrainer.parallel.vocab_parallel import rows_of_a_chunk
from rosetrainer.planner import zero
from rosetrainer.planner.activations import activations, keeps_copies, weight_copies
from rosetrainer.planner.shares import Parameter, Share, Work, padded_vocabulary

Held = Callable[[int], int]
"""The bytes of something when block b's gradients are made."""


def peak(
    model: GPTConfig,
    parallel: ParallelConfig,
    work: Work,
    share: Share,
    sizes: Sequence[Parameter],
    memory: dict[str, int],
) -> int:
    """Bytes, within a few percent; memory: a plan's. Of a process that runs no pipeline."""
    blocks = max(one.block for one in sizes)
    copies = copies_of_weights(parallel, work, sizes)
    kept = memory["activations"] - weight_copies(model, parallel, work, share)
    temporary = of_one_block(model, parallel, work, share, memory)
    of_sums = gradients_of_zero if parallel.zero else gradients
    before, after = of_sums(parallel, work, sizes)
    moments = []
    for b in range(blocks, 0, -1):
        own = max(temporary, of_head(model, parallel, work)) if b == blocks else temporary
        begins = kept * b // blocks + own + before(b)
        moments += [begins, kept * (b - 1) // blocks + after(b)]
    return memory["parameters"] + memory["optimizer"] + copies + max(*moments, after(0))


def copies_of_weights(parallel: ParallelConfig, work: Work, sizes: Sequence[Parameter]) -> int:
    """Of each weight in the products' dtype, where that is a shorter one: for the whole step."""
    if not keeps_copies(parallel, work):
        return 0
    return sum(one.elements for one in sizes if one.multiplied) * work.product_bytes


def of_one_block(
    model: GPTConfig, parallel: ParallelConfig, work: Work, share: Share, memory: dict[str, int]
) -> int:
    """Of a block's backward pass alone: the gradient of its widest activation, and what it computes
    again."""
    again = 0
    if parallel.recompute != "none":
        all_kept = activations(model, replace(parallel, recompute="none"), work, share)
        again = (all_kept - memory["activations"]) // max(share.layers, 1)
    width = model.ff_width // (parallel.tp_size or 1)
    return work.rows * work.tokens * width * work.weight_bytes + again


def of_head(model: GPTConfig, parallel: ParallelConfig, work: Work) -> int:
    """Of the loss alone: a chunk's logits, in fp32 and as they are multiplied."""
    table, wide = padded_vocabulary(model, tp := parallel.tp_size or 1) // tp, work.weight_bytes
    rows = min(work.rows * work.tokens, rows_of_a_chunk(table, wide))
    return rows * table * (wide + work.product_bytes * (work.product_bytes < wide))


def gradients(
    parallel: ParallelConfig, work: Work, sizes: Sequence[Parameter]
) -> tuple[Held, Held]:
    """Before and after block b's are made. Copies of all travel; without overlap a bucket's."""
    each = of_units(sizes, lambda one: one.elements * work.weight_bytes)
    accumulated, summed = work.micro_batches > 1, (parallel.dp_size or 1) > 1

    def held(done: int, all_of_them: bool) -> int:
        copies = done if parallel.overlap else min(done, BUCKET_BYTES)
        return (sum(each) if all_of_them else done) + summed * copies

    def before(b: int) -> int:
        return held(sum(each[b + 1 :]), accumulated)

    def after(b: int) -> int:
        return held(sum(each[b:]), accumulated or b == 0)

    return before, after


def gradients_of_zero(
    parallel: ParallelConfig, work: Work, sizes: Sequence[Parameter]
) -> tuple[Held, Held]:
    """As gradients, of which a unit's are whole until they are summed; what is gathered, too.

    A unit's sum takes its rows and those that come while the next unit's gradients are made.
    """
    shards, level = zero.shards_of(parallel), parallel.zero
    rows = [width * work.weight_bytes for width in zero.widths(sizes, shards)]
    whole = of_units(sizes, lambda one: one.elements * zero.gathered_bytes(one, work))
    travelling = zero.rows_to_gather(sizes, parallel, work)
    accumulated = work.micro_batches > 1

    def gathered(b: int) -> int:
        if level < 3:
            return 0
        blocks = sum(whole[1 : b + 1]) if parallel.zero_keep else whole[b] * (b > 0)
        ahead = parallel.overlap and not parallel.zero_keep and b > 1
        return whole[0] + blocks + (travelling[b - 1] if ahead else 0)

    def sums(b: int) -> int:
        """Of units after b: each a row; and what the last of them still needs."""
        under_way = (2 * shards - 1) * rows[b + 1] if b + 1 < len(rows) else 0
        done = sum(rows) if accumulated and level > 1 else sum(rows[b + 2 :])
        return done + under_way

    def accumulating(b: int) -> int:
        """At level 1, of the units whose sum has not begun."""
        return shards * sum(rows[: b + 1]) if accumulated and level == 1 else 0

    def before(b: int) -> int:
        return gathered(b) + sums(b) + accumulating(b) + whole[0]

    def after(b: int) -> int:
        own = whole[b] if b else 0
        return gathered(b) + sums(b) + accumulating(b) + whole[0] + own

    return before, after


def of_units(sizes: Sequence[Parameter], size: Callable[[Parameter], int]) -> list[int]:
    found = [0] * (1 + max(one.block for one in sizes))
    for one in sizes:
        found[one.block] += size(one)
    return found
