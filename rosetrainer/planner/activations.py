"""What a micro-batch keeps for its backward pass, in bytes.

Letters: B rows of a micro-batch, T tokens, S tokens of a source (encoder-decoder), D d_model;
e bytes of a number in a product, m of a weight. "Reducing Activation Recomputation in Large
Transformer Models" (Korthikanti et al.) counts activations like this.
"""

from __future__ import annotations

from rosetrainer.config import GPTConfig, ParallelConfig
from rosetrainer.planner import llama
from rosetrainer.planner.attention import bytes_of_scores
from rosetrainer.planner.shares import Share, Work, blocks, padded_vocabulary, parameters


def activations(model: GPTConfig, parallel: ParallelConfig, work: Work, share: Share) -> int:
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
    for block in blocks(share, work):
        if parallel.recompute == "block":
            total += B * block.rows[0] // own * D * m
            continue
        if model.architecture == "llama":
            total += llama.bytes_of_block(model, parallel, work, own, gathered)
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
        if share.first:
            total += B * T * (8 + 1)  # ids, and whether this rank has their row
            # Positions: a GPT's are the same for all rows; a slice of one row is a view of it.
            positions = B * T // own if work.source_tokens and B > 1 else T
            total += positions * 8 * (model.architecture == "gpt2")
            total += dropout * B * T // own * D
        if model.architecture == "llama":
            total += llama.bytes_of_angles(model, work) * (share.layers > 0)
            total += share.last * llama.bytes_of_norm(model, work, own)
        else:
            total += share.last * stream(T)  # the last norm of this side
    if work.source_tokens:
        total += memory_and_masks(model, parallel, work, own, gathered)
    if share.last:  # head and loss: the gradients of the input, of all tokens, and of the table
        total += B * work.tokens * D * e + padded_vocabulary(model, tp) // tp * D * max(m, 4)
    return total + (weight_copies(model, parallel, work, share) if e < m else 0)


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


def weight_copies(model: GPTConfig, parallel: ParallelConfig, work: Work, share: Share) -> int:
    """Bytes of the weights' copies in the products' dtype, in blocks that are not recomputed."""
    sizes = parameters(model, parallel.tp_size or 1, bool(work.source_tokens), share)
    own = sum(p.elements for p in sizes if p.multiplied and parallel.recompute != "block")
    return own * work.product_bytes
