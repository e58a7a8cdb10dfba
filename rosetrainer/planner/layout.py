"""What a step moves and what a rank holds, as closed forms in the config: nothing is started.

Letters: B rows of a micro-batch, T tokens, S tokens of a source (encoder-decoder), D d_model,
F d_ff, V padded vocabulary; e bytes of a number in a product, m of a weight. "Reducing Activation
Recomputation in Large Transformer Models" (Korthikanti et al.) counts activations like this.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from rosetrainer.config import GPTConfig, ParallelConfig
from rosetrainer.parallel.data_parallel import BUCKET_BYTES
from rosetrainer.parallel.vocab_parallel import PADDED_TO
from rosetrainer.planner.attention import bytes_of_scores
from rosetrainer.planner.loss import bytes_of_sums
from rosetrainer.planner.settings import check_settings

LedgerTable = dict[tuple[str, str, str], tuple[int, int]]  # axis, operation, phase: calls, bytes
Moved = tuple[str, str, list[int]]  # operation, phase, payload bytes of each call


@dataclass(frozen=True)
class Work:
    """One rank's part of a step."""

    rows: int
    tokens: int
    micro_batches: int = 1
    source_tokens: int = 0  # of an encoder-decoder; 0 stands for a GPT
    product_bytes: int = 4
    weight_bytes: int = 4


class Parameter(NamedTuple):
    elements: int
    replicated: bool = False  # all ranks hold the same
    multiplied: bool = False  # a linear layer's matrix


@dataclass(frozen=True)
class Block:
    """A transformer block: the sequence lengths that its parts see."""

    columns: tuple[int, ...]  # inputs of column-parallel layers
    rows: tuple[int, ...]  # outputs of row-parallel layers
    attentions: tuple[tuple[int, int, int], ...]  # (queries, keys, rows of the padding mask)


@dataclass(frozen=True)
class Plan:
    """The ledger of one step and the bytes that a rank holds, by what they are."""

    ledger: LedgerTable
    memory: dict[str, int]


def plan(model: GPTConfig, parallel: ParallelConfig, work: Work) -> Plan:
    """The plan of one rank; tp_size and dp_size are given. Raises ConfigError as check_settings."""
    assert parallel.tp_size and parallel.dp_size
    check_settings(model, parallel)
    sizes = list(parameters(model, parallel.tp_size, bool(work.source_tokens)))
    held = sum(p.elements for p in sizes) * work.weight_bytes
    memory = {
        "parameters": held,
        "gradients": held,
        "optimizer": 2 * held + 4 * len(sizes),  # two moments, and a count of steps in fp32
        "activations": activations(model, parallel, work),
    }
    return Plan(ledger(model, parallel, work, sizes), memory)


def blocks(model: GPTConfig, work: Work) -> list[Block]:
    T, S = work.tokens, work.source_tokens
    if not S:
        return [Block((T, T), (T, T), ((T, T, 0),))] * model.n_layers
    encoder = Block((S, S), (S, S), ((S, S, 1),))
    decoder = Block((T, T, S, T), (T, T, T), ((T, T, T), (T, S, 1)))
    return [encoder] * model.n_layers + [decoder] * model.n_layers


def parameters(model: GPTConfig, tp: int, encoder_decoder: bool) -> Iterator[Parameter]:
    """Each parameter as a rank holds it, in order."""
    D, F, bias = model.d_model, model.ff_width, model.bias
    width = model.n_heads * model.head_width
    table = Parameter(padded_vocabulary(model, tp) // tp * D)
    norm = [Parameter(D, replicated=True)] * (1 + bias)

    def column(rows: int) -> list[Parameter]:
        weight = Parameter(rows // tp * D, multiplied=True)
        return [weight] + [Parameter(rows // tp)] * bias

    def row(columns: int) -> list[Parameter]:
        weight = Parameter(D * columns // tp, multiplied=True)
        return [weight] + [Parameter(D, replicated=True)] * bias

    attention = [*norm, *column(3 * width), *row(width)]
    cross = [*norm, *column(width), *column(2 * width), *row(width)]
    feed_forward = [*norm, *column(F), *row(F)]
    yield table
    yield from [Parameter(model.context_length * D, replicated=True)] * (1 + encoder_decoder)
    yield from [*attention, *feed_forward] * model.n_layers
    if encoder_decoder:
        yield from norm
        yield from [*attention, *cross, *feed_forward] * model.n_layers
    yield from norm
    yield from [] if model.tied else [table]


def padded_vocabulary(model: GPTConfig, tp: int) -> int:
    multiple = math.lcm(PADDED_TO, tp)
    return -(-model.vocab_size // multiple) * multiple


def ledger(
    model: GPTConfig, parallel: ParallelConfig, work: Work, sizes: list[Parameter]
) -> LedgerTable:
    """What one step moves, evaluation and saving aside."""
    found: LedgerTable = {}

    def add(axis: str, operation: str, phase: str, *payloads: int, times: int = 1) -> None:
        calls, size = found.get((axis, operation, phase), (0, 0))
        if payloads:
            more = (len(payloads) * times, sum(payloads) * times)
            found[axis, operation, phase] = (calls + more[0], size + more[1])

    if parallel.dp_size and parallel.dp_size > 1:
        everything = [p.elements for p in sizes]
        add("dp", "all_reduce", "backward", *buckets(everything, work.weight_bytes))
        add("dp", "all_reduce", "optimizer", 8, 8, 8)  # tokens, loss, who has a bad gradient
    if parallel.tp_size and parallel.tp_size > 1:
        for operation, phase, payloads in micro_batch(model, parallel, work):
            add("tp", operation, phase, *payloads, times=work.micro_batches)
        if parallel.sequence_parallel:
            partial = [p.elements for p in sizes if p.replicated]
            add("tp", "all_reduce", "backward", *buckets(partial, work.weight_bytes))
        add("tp", "all_reduce", "optimizer", 8, 8)  # the norm, who has a bad gradient
    return found


def micro_batch(model: GPTConfig, parallel: ParallelConfig, work: Work) -> Iterator[Moved]:
    """What moves over tp in one micro-batch, forward and backward."""
    all_blocks = blocks(model, work)
    ends = [length for length in (work.source_tokens, work.tokens) if length]
    product = work.rows * model.d_model * work.product_bytes
    columns = [product * t for block in all_blocks for t in block.columns]
    head = product * work.tokens
    sums = [product * t for block in all_blocks for t in block.rows]
    sums += [work.rows * model.d_model * work.weight_bytes * t for t in ends]  # embeddings
    table = padded_vocabulary(model, tp := parallel.tp_size or 1) // tp
    yield "all_reduce", "forward", bytes_of_sums(work.rows * work.tokens, table, work.product_bytes)
    # Without dropout, backward needs nothing after a block's last row-parallel product.
    last = None if model.dropout else -1
    recomputed = all_blocks if parallel.recompute == "block" else []
    recomputed_sums = [product * t for block in recomputed for t in block.rows[:last]]
    if not parallel.sequence_parallel:
        yield "all_reduce", "forward", sums
        yield "all_reduce", "backward", [*columns, head]
        yield "all_reduce", "recompute", recomputed_sums
        return
    yield "all_gather", "forward", [*columns, head]
    yield "reduce_scatter", "forward", sums
    yield "reduce_scatter", "backward", [*columns, head]
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


def activations(model: GPTConfig, parallel: ParallelConfig, work: Work) -> int:
    """Bytes that one micro-batch keeps for its backward pass, on a CPU's kernels."""
    tp = parallel.tp_size or 1
    own = tp if parallel.sequence_parallel else 1  # over how many ranks the stream is divided
    gathered = 1 if parallel.sequence_parallel and not parallel.overlap and tp > 1 else own
    D, B, e, m = model.d_model, work.rows, work.product_bytes, work.weight_bytes
    dropout = bool(model.dropout)

    def stream(T: int) -> int:  # a norm's input, mean and deviation
        return B * T // own * (D + 2) * m

    def column_input(T: int) -> int:
        return B * T // gathered * D * e

    total = 0
    for block in blocks(model, work):
        if parallel.recompute == "block":
            total += B * block.rows[0] // own * D * m
            continue
        width = model.n_heads * model.head_width // tp
        total += sum(stream(T) for T in block.rows) + sum(map(column_input, block.columns))
        total += dropout * sum(B * T // own * D for T in block.rows)  # one byte each
        total += 2 * B * block.rows[-1] * model.ff_width // tp * e  # GELU's input and output
        for T, S, rows in block.attentions:
            total += B * (2 * T + 2 * S) * width * e  # queries, keys, values, result
            if parallel.recompute == "none":
                total += bytes_of_scores(B, model.n_heads // tp, T, S, e, rows, dropout)
    ends = [length for length in (work.source_tokens, work.tokens) if length]
    for T in ends:
        total += B * T * (8 + 1)  # ids, and whether this rank has their row
        # Positions: a GPT's are the same for all rows, and a slice of one row is a view of it.
        total += (B * T // own if work.source_tokens and B > 1 else T) * 8
        total += dropout * B * T // own * D + stream(T)  # embedding; the last norm of this side
    if work.source_tokens:
        total += memory_and_masks(model, parallel, work, own, gathered)
    # Head and loss: the gradients of the input, of all tokens, and of the table.
    total += B * work.tokens * D * e + padded_vocabulary(model, tp) // tp * D * max(m, 4)
    return total + (weight_copies(model, parallel, work) if e < m else 0)


def memory_and_masks(
    model: GPTConfig, parallel: ParallelConfig, work: Work, own: int, gathered: int
) -> int:
    """Bytes, maybe negative, by which an encoder-decoder keeps more than its blocks would alone."""
    B, T, S, L = work.rows, work.tokens, work.source_tokens, model.n_layers
    encoded = B * S * model.d_model
    recompute = parallel.recompute
    masks = 0 if recompute == "none" else B * (2 * S + T * T)  # inputs of what is recomputed
    if recompute == "block":
        return encoded // own * work.weight_bytes + masks
    # All layers look at one encoded source; each keeps it alone only where it gathered it.
    shared = gathered == own and work.product_bytes == work.weight_bytes
    return masks - shared * (L - 1) * encoded // own * work.product_bytes


def weight_copies(model: GPTConfig, parallel: ParallelConfig, work: Work) -> int:
    """Bytes of the weights' copies in the products' dtype, in blocks that are not recomputed."""
    sizes = parameters(model, parallel.tp_size or 1, bool(work.source_tokens))
    own = sum(p.elements for p in sizes if p.multiplied and parallel.recompute != "block")
    return own * work.product_bytes
