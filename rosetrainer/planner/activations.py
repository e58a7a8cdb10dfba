"""What a micro-batch keeps for its backward pass, in bytes.

Letters: B rows of a micro-batch, T tokens, S tokens of a source (encoder-decoder), D d_model;
e bytes of a number in a product, m of a weight. "Reducing Activation Recomputation in Large
Transformer Models" (Korthikanti et al.) counts activations like this.
"""

from __future__ import annotations

from rosetrainer.config import GPTConfig, ParallelConfig
from rosetrainer.planner import llama, t5, transformer_xl
from rosetrainer.planner.attention import bytes_of_scores
from rosetrainer.planner.shares import Share, Work, blocks, padded_vocabulary, parameters


def activations(model: GPTConfig, parallel: ParallelConfig, work: Work, share: Share) -> int:
    """Bytes that one micro-batch keeps for its backward pass, on a CPU's kernels."""
    tp = parallel.tp_size or 1
    own = tp if parallel.sequence_parallel else 1  # over how many ranks the stream is divided
    gathered = 1 if parallel.sequence_parallel and not parallel.overlap and tp > 1 else own
    D, B, e, m = model.d_model, work.rows, work.product_bytes, work.weight_bytes
    if model.architecture == "t5":
        total = t5.activations(model, parallel, work, own, gathered)
    else:
        total = before_the_head(model, parallel, work, share, own, gathered)
    if share.last:  # head and loss: the gradients of the input, of all tokens, and of the table
        wide = D + (model.architecture == "bert")  # whose bias is a column more
        total += B * work.tokens * wide * e + padded_vocabulary(model, tp) // tp * wide * max(m, 4)
    return total + weight_copies(model, parallel, work, share)


def before_the_head(
    model: GPTConfig, parallel: ParallelConfig, work: Work, share: Share, own: int, gathered: int
) -> int:
    """own, gathered: over how many ranks the stream is divided, and inputs of column-parallel
    layers."""
    tp, dropout = parallel.tp_size or 1, bool(model.dropout)
    D, B, e, m = model.d_model, work.rows, work.product_bytes, work.weight_bytes

    def stream(T: int) -> int:  # a norm's input, mean and deviation
        return B * T // own * (D + 2) * m

    def column_input(T: int) -> int:
        return B * T // gathered * D * e

    total, kept = 0, 1 if model.function == "relu" else 2  # of an activation: output, mostly input
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
        total += kept * B * block.rows[-1] * model.ff_width // tp * e
        if model.architecture == "transformer_xl":
            total += transformer_xl.bytes_of_attention(model, parallel, work)
            continue
        for T, S, rows in block.attentions:
            total += B * (2 * T + 2 * S) * width * e  # queries, keys, values, result
            if parallel.recompute == "none":
                rows = {"glm": T, "bert": 1}.get(model.architecture, rows)
                total += bytes_of_scores(B, model.n_heads // tp, T, S, e, rows, dropout)
                if model.architecture == "bert":  # one mask for all rows
                    total -= (B - 1) * S * (1 if dropout else e)
    ends = [length for length in (work.source_tokens, work.tokens) if length]
    for T in ends:
        if share.first:
            total += B * T * (8 + 1)  # ids, and whether this rank has their row
            # Positions: a GPT's are the same for all rows; a slice of one row is a view of it.
            positions = B * T // own if work.source_tokens and B > 1 else T
            total += positions * 8 * (model.architecture in ("gpt2", "bert"))
            tables = {"glm": 2, "bert": 1}.get(model.architecture, 0)
            total += tables * B * T // own * 8  # positions of each row, or kinds of tokens
            total += (model.architecture == "bert") * stream(T)  # the embeddings' norm
            total += dropout * B * T // own * D
        if model.architecture == "llama":
            total += llama.bytes_of_angles(model, work) * (share.layers > 0)
            total += share.last * llama.bytes_of_norm(model, work, own)
        elif model.architecture == "bert":
            total += share.last * (stream(T) + kept * B * T // own * D * m)  # its transform
        else:
            total += share.last * stream(T)  # the last norm of this side
    if model.architecture == "transformer_xl":
        total += transformer_xl.bytes_of_distances(model, parallel, work, share.layers)
    if parallel.recompute != "none":  # whose inputs are kept, the mask too
        T = work.tokens
        total += {"glm": B * T * T, "bert": T}.get(model.architecture, 0) * (share.layers > 0)
    if work.source_tokens:
        total += memory_and_masks(model, parallel, work, own, gathered)
    return total


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


def keeps_copies(parallel: ParallelConfig, work: Work) -> bool:
    """Whether weights are cast for products; ZeRO gathers them in that dtype."""
    return not parallel.zero and work.product_bytes < work.weight_bytes


def weight_copies(model: GPTConfig, parallel: ParallelConfig, work: Work, share: Share) -> int:
    """Bytes of the weights' copies in the products' dtype, in blocks that are not recomputed."""
    if not keeps_copies(parallel, work):
        return 0
    sizes = parameters(model, parallel.tp_size or 1, bool(work.source_tokens), share)
    own = sum(p.elements for p in sizes if p.multiplied and parallel.recompute != "block")
    if model.architecture == "transformer_xl" and own:  # nothing asks for distances' gradient
        own -= share.layers * transformer_xl.weights_of_distances(model, parallel)
    return own * work.product_bytes
