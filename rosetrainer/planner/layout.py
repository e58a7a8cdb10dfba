"""What a step moves and what a rank holds, as closed forms in the config: nothing is started.

Letters: B rows of a micro-batch, T tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rosetrainer.config import GPTConfig, ParallelConfig
from rosetrainer.parallel.data_parallel import BUCKET_BYTES
from rosetrainer.parallel_config import SPLIT_BACKWARD
from rosetrainer.planner import zero
from rosetrainer.planner.activations import activations
from rosetrainer.planner.loss import bytes_of_sums
from rosetrainer.planner.peak import peak
from rosetrainer.planner.pipeline import live_bytes, messages, shares_of_rank, together
from rosetrainer.planner.settings import check_settings
from rosetrainer.planner.shares import (
    Parameter,
    Share,
    Work,
    blocks,
    padded_vocabulary,
    parameters,
)
from rosetrainer.validation import ConfigError

LedgerTable = dict[tuple[str, str, str], tuple[int, int]]  # axis, operation, phase: calls, bytes
Moved = tuple[str, str, list[int]]  # operation, phase, payload bytes of each call


@dataclass(frozen=True)
class Plan:
    """The ledger of one step and the bytes that a rank holds, by what they are."""

    ledger: LedgerTable
    memory: dict[str, int]
    peak: int | None = None
    """The most at once, within a few percent; None of a pipeline's rank."""


def plan(
    model: GPTConfig, parallel: ParallelConfig, work: Work, pp_rank: int = 0, part: int = 0
) -> Plan:
    """The plan of one rank; tp_size and dp_size are given. Raises ConfigError as check_settings.

    pp_rank: which stages it has. Its activations are those of the micro-batches that it holds at
    once, each counted whole until its backward pass is made. part: which of ZeRO's shards it has.
    """
    assert parallel.tp_size and parallel.dp_size
    check_settings(model, parallel)
    unsplit = ("llama", "transformer_xl")
    if model.architecture in unsplit and parallel.pp_schedule in SPLIT_BACKWARD:
        raise ConfigError(
            f"plan has no closed form for architecture={model.architecture} with pp_schedule="
            f"{parallel.pp_schedule}; it can be 1f1b"
        )
    if parallel.pp_schedule in SPLIT_BACKWARD:  # whose layers make their weights' gradients later
        parallel = replace(parallel, overlap=False)
    shares = shares_of_rank(model, parallel, pp_rank)
    own = together(shares)
    sizes = list(parameters(model, parallel.tp_size or 1, bool(work.source_tokens), own))
    held = sum(p.elements for p in sizes) * work.weight_bytes
    memory = {
        "parameters": held,
        "gradients": held,
        "optimizer": 2 * held + 4 * len(sizes),  # two moments, and a count of steps in fp32
        **(zero.memory(parallel, sizes, work, part) if parallel.zero else {}),
        "activations": live_bytes(
            parallel,
            pp_rank,
            work.micro_batches,
            {s: activations(model, parallel, work, share) for s, share in shares.items()},
        ),
    }
    at_once = peak(model, parallel, work, own, sizes, memory) if parallel.pp_size == 1 else None
    return Plan(ledger(model, parallel, work, sizes, own, pp_rank, part), memory, at_once)


def ledger(
    model: GPTConfig,
    parallel: ParallelConfig,
    work: Work,
    sizes: list[Parameter],
    share: Share,
    pp_rank: int,
    part: int,
) -> LedgerTable:
    """What one step moves, evaluation and saving aside."""
    found: LedgerTable = {}

    def add(axis: str, operation: str, phase: str, *payloads: int, times: int = 1) -> None:
        calls, size = found.get((axis, operation, phase), (0, 0))
        if payloads:
            more = (len(payloads) * times, sum(payloads) * times)
            found[axis, operation, phase] = (calls + more[0], size + more[1])

    if parallel.pp_size > 1:
        for operation, phase, payloads in messages(model, parallel, work, pp_rank, sizes[0]):
            add("pp", operation, phase, *payloads)
        add("pp", "all_reduce", "optimizer", 8, 8, 8)  # loss, norm, who has a bad gradient
    if parallel.dp_size and parallel.dp_size > 1:
        if parallel.zero:
            for axis, operation, phase, payloads in zero.moved(parallel, sizes, work):
                add(axis, operation, phase, *payloads)
            add("dp", "all_reduce", "optimizer", 8)  # the norm
        else:
            everything = [p.elements for p in sizes]
            add("dp", "all_reduce", "backward", *buckets(everything, work.weight_bytes))
        add("dp", "all_reduce", "optimizer", 8, 8, 8)  # tokens, loss, who has a bad gradient
    if parallel.tp_size and parallel.tp_size > 1:
        for operation, phase, payloads in micro_batch(model, parallel, work, share):
            add("tp", operation, phase, *payloads, times=work.micro_batches)
        tokens_cut = parallel.sequence_parallel  # a replicated one saw a rank's own tokens only
        summed = [p for p in sizes if p.summed or (p.replicated and tokens_cut)]
        shards = zero.shards_of(parallel) if parallel.zero else 1
        partial = [(p.summed or 1) * zero.elements_of_slice(p, shards, part) for p in summed]
        add("tp", "all_reduce", "backward", *buckets(partial, work.weight_bytes))
        add("tp", "all_reduce", "optimizer", 8, 8)  # the norm, who has a bad gradient
    return found


def micro_batch(
    model: GPTConfig, parallel: ParallelConfig, work: Work, share: Share
) -> Iterator[Moved]:
    """What moves over tp in one micro-batch, forward and backward."""
    all_blocks = blocks(share, work)
    ends = [length for length in (work.source_tokens, work.tokens) if length]
    product = work.rows * model.d_model * work.product_bytes
    columns = [product * t for block in all_blocks for t in block.columns]
    head = [product * work.tokens] * share.last
    if model.architecture == "bert":  # its bias is a column more
        head = [size // model.d_model * (model.d_model + 1) for size in head]
    sums = [product * t for block in all_blocks for t in block.rows]
    embeddings = [work.rows * model.d_model * work.weight_bytes * t for t in ends]
    sums += embeddings * share.first
    table = padded_vocabulary(model, tp := parallel.tp_size or 1) // tp
    if share.last:
        tokens = work.rows * work.tokens
        yield "all_reduce", "forward", bytes_of_sums(tokens, table, work.product_bytes)
    # Without dropout, backward needs nothing after a block's last row-parallel product.
    last = None if model.dropout else -1
    recomputed = all_blocks if parallel.recompute == "block" else []
    recomputed_sums = [product * t for block in recomputed for t in block.rows[:last]]
    if not parallel.sequence_parallel:
        yield "all_reduce", "forward", sums
        yield "all_reduce", "backward", [*columns, *head]
        yield "all_reduce", "recompute", recomputed_sums
        return
    yield "all_gather", "forward", [*columns, *head]
    yield "reduce_scatter", "forward", sums
    yield "reduce_scatter", "backward", [*columns, *head]
    yield "all_gather", "backward", sums + (columns if parallel.overlap else [])
    yield "reduce_scatter", "recompute", recomputed_sums
    yield "all_gather", "recompute", [product * t for block in recomputed for t in block.columns]


def buckets(sizes: list[int], width: int) -> list[int]:
    """The bytes of each bucket in which gradients of these sizes are summed."""
    filled: list[int] = []
    for size in sizes:
        if filled and filled[-1] + size * width <= BUCKET_BYTES:
            filled[-1] += size * width
        else:
            filled.append(size * width)
    return filled
